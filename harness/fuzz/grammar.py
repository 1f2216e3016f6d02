"""Generate inner packets and UAPI requests that are nearly right.

Sources: RFC 791, RFC 8200 and RFC 768 for the packets; https://www.wireguard.com/xplatform/ for the requests.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from harness.fuzz.choices import pick, weighted
from harness.scripted.packets import ip_packet, udp_packet

if TYPE_CHECKING:
    from harness.fuzz.choices import Chooser

# Payload sizes at which headers, paddings and MTUs end.
_SIZES: Final = (0, 1, 4, 7, 8, 15, 16, 17, 100, 1280, 1391, 1392, 1393, 1420, 1472, 9000)
_LONGEST: Final = 65000
# ICMP, IGMP, IP in IP, TCP, UDP, GRE, ESP, ICMPv6, no next header, SCTP, reserved; and IPv6's extension headers.
_PROTOCOLS: Final = (1, 2, 4, 6, 17, 41, 47, 50, 58, 59, 132, 255, 0, 43, 44, 51, 60)
_OTHER_IPV4: Final = ("0.0.0.0", "255.255.255.255", "127.0.0.1", "224.0.0.1", "10.99.99.99")  # noqa: S104 - an inner address
_OTHER_IPV6: Final = ("::", "::1", "ff02::1", "fe80::1", "2001:db8::1", "::ffff:192.168.241.2")
_DISCARD: Final = 9
_IPV4: Final = 4
_LENGTHS: Final = (0, 1, 19, 20, 21, 39, 40, 41, 0x7FFF, 0xFFFF)


class Inner(NamedTuple):
    """The addresses inside the tunnel: of the hostile peer, which may send from them, and of the device."""

    source4: str
    source6: str
    device4: str
    device6: str


def inner_packet(choose: Chooser, inner: Inner) -> bytes:
    """Return a plaintext for a data message: a packet, a packet with one wrong place, or anything else."""
    kind = weighted(choose, [(6, "packet"), (10, "broken"), (2, "content"), (1, "empty"), (1, "long")])
    if kind == "empty":
        return b""
    if kind == "content":
        first = pick(choose, (b"", b"\x45", b"\x60", b"\x4f", b"\x00", b"\xf0", b"\x45\x00\x00\x14"))
        return first + choose.content(pick(choose, _SIZES))
    if kind == "long":
        return _packet(choose, inner, bytes(_LONGEST - choose.below(64)))
    packet = _packet(choose, inner, bytes(pick(choose, _SIZES)))
    packet = _broken(choose, packet) if kind == "broken" else packet
    # Any padding up to 15 bytes and more is a packet's own affair; only its length field says where it ends.
    return packet + bytes(pick(choose, (0, 0, 1, 15, 16, 31)))


def _packet(choose: Chooser, inner: Inner, payload: bytes) -> bytes:
    is_ipv4 = choose.below(2) == 0
    source, device = (inner.source4, inner.device4) if is_ipv4 else (inner.source6, inner.device6)
    others = _OTHER_IPV4 if is_ipv4 else _OTHER_IPV6
    source = weighted(choose, [(8, source), (1, device), (1, pick(choose, others))])
    destination = weighted(choose, [(6, device), (1, source), (2, pick(choose, others))])
    if choose.below(3):
        return udp_packet((source, 1024 + choose.below(60000)), (destination, _DISCARD), payload)
    return ip_packet(source, destination, payload, protocol=pick(choose, _PROTOCOLS))


def _broken(choose: Chooser, packet: bytes) -> bytes:
    """Change one field of the header, or cut the packet."""
    is_ipv4 = packet[0] >> 4 == _IPV4
    place = pick(choose, ("first", "length", "any", "cut", "options" if is_ipv4 else "length"))
    changed = bytearray(packet)
    if place == "cut":
        return packet[: choose.below(len(packet))]
    if place == "first":
        changed[0] = choose.below(256)
    elif place == "length":
        real = len(packet) - (0 if is_ipv4 else 40)
        length = weighted(choose, [(3, real + choose.below(40) - 20), (3, pick(choose, _LENGTHS))])
        struct.pack_into(">H", changed, 2 if is_ipv4 else 4, length % 0x10000)
    elif place == "options":
        changed[0] = 0x40 | (5 + choose.below(11))
    else:
        changed[choose.below(min(len(packet), 48))] ^= 1 << choose.below(8)
    return bytes(changed)


# Requests. Keys of a device and of a peer, and values that are right or wrong for some of them.
_DEVICE_KEYS: Final = ("private_key", "listen_port", "fwmark", "replace_peers")
_PEER_KEYS: Final = (
    "remove", "update_only", "preshared_key", "endpoint", "persistent_keepalive_interval", "replace_allowed_ips",
    "allowed_ip", "protocol_version",
)  # fmt: skip
_ODD_KEYS: Final = (
    "", " ", "PUBLIC_KEY", "public_key ", "errno", "get", "set", "rx_bytes", "last_handshake_time_sec", "\0", "a" * 300,
)  # fmt: skip
_NUMBERS: Final = (
    "0", "1", "51820", "65535", "65536", "4294967295", "4294967296", "18446744073709551615", "18446744073709551616",
    "-1", "+1", " 1", "1 ", "0x10", "1e3", "00000000000000000000001", "9" * 400, "", "off", "\u00b2", "1\0",
)  # fmt: skip
_ENDPOINTS: Final = (
    "192.0.2.1:51820", "[2001:db8::1]:51820", "[fe80::1%1]:1", "[fe80::1%lo]:1", "[fe80::1%nothing]:1",
    "[fe80::1%99999999999]:1", "192.0.2.1", "192.0.2.1:", ":51820", "[::]:0", "0.0.0.0:0", "192.0.2.1:65536", "[::1",
    "::1:51820", "host.invalid.:1", "192.0.2.1:51820:1", "[192.0.2.1]:1", "256.1.1.1:1", "1:1", "[]:1", "[::%]:1",
)  # fmt: skip
_PREFIXES: Final = (
    "10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0", "::/0", "2001:db8::/32", "2001:db8::1/128", "10.0.0.1", "10.0.0.1/",
    "10.0.0.1/33", "::/129", "10.0.0.0/-1", "/24", "", "-10.0.0.1/32", "+10.0.0.1/32", "--10.0.0.1/32", "10.0.0/24",
    "10.0.0.1/24/8", "::1%lo/128", "010.0.0.1/32", "10.0.0.1/ 8", "1.2.3.4/99999999999999999999",
)  # fmt: skip
_FLAGS: Final = ("true", "true", "false", "1", "", "TRUE", "true ")
_ZERO: Final = "0" * 64
_FOUR: Final = tuple(f"{number:02x}" * 32 for number in (0x11, 0x22, 0x33, 0x44))
_KEYS_OF: Final = {
    "private_key": "key", "public_key": "key", "preshared_key": "key", "listen_port": "number", "fwmark": "number",
    "persistent_keepalive_interval": "number", "protocol_version": "number", "endpoint": "endpoint",
    "allowed_ip": "prefix", "replace_peers": "flag", "remove": "flag", "update_only": "flag",
    "replace_allowed_ips": "flag",
}  # fmt: skip
_GETS: Final = (b"get=1\n\n", b"get=1\n", b"get=1\r\n\r\n", b"get=2\n\n", b"get=1\nx=1\n\n", b"get=1\n\n\n\n")
_MOST_LINES: Final = 12


def request(choose: Chooser) -> bytes:
    """Return what a client sends on one connection to the control socket: requests, a part of one, or anything."""
    kind = weighted(choose, [(14, "set"), (2, "get"), (2, "odd"), (1, "long"), (1, "many")])
    if kind == "get":
        return pick(choose, _GETS)
    if kind == "odd":
        return weighted(choose, [(1, choose.content(choose.below(200))), (1, b"\n" * choose.below(50)), (1, b"=\n\n")])
    if kind == "long":
        length = pick(choose, (4095, 4096, 4097, 5000, 70000))
        return b"set=1\n" + pick(choose, (b"", b"public_key=", b"fwmark=")) + b"1" * length + b"\n\n"
    if kind == "many":
        peers = [f"public_key={number:064x}\nallowed_ip=10.{number}.0.0/16\n" for number in range(1, choose.below(200))]
        return f"set=1\n{''.join(peers)}\n".encode()
    return _set(choose)


def _set(choose: Chooser) -> bytes:
    """Return a `set=1` request, or one of the ways in which a client may send it wrongly."""
    lines = _lines(choose)
    text = "\n".join(["set=1", *lines, "", ""]).encode("latin-1", "replace")
    framing = weighted(choose, [(12, "whole"), (1, "part"), (1, "windows"), (1, "twice"), (1, "get")])
    if framing == "part":
        return text[: choose.below(len(text))]
    if framing == "windows":
        return text.replace(b"\n", b"\r\n")
    return text + {"twice": text, "get": b"get=1\n\n"}.get(framing, b"")


def _lines(choose: Chooser) -> list[str]:
    lines: list[str] = []
    is_peer = False
    for _ in range(1 + choose.below(_MOST_LINES)):
        key = weighted(
            choose,
            [
                (8, pick(choose, _PEER_KEYS if is_peer else _DEVICE_KEYS)),
                (4, "public_key"),
                (1, pick(choose, _DEVICE_KEYS if is_peer else _PEER_KEYS)),
                (1, pick(choose, _ODD_KEYS)),
            ],
        )
        is_peer = is_peer or key == "public_key"
        equals = "=" if choose.below(30) else pick(choose, ("", "==", " = "))
        lines.append(f"{key}{equals}{_value(choose, key)}")
    return lines


def _value(choose: Chooser, key: str) -> str:
    kind = _KEYS_OF.get(key, "number") if choose.below(8) else pick(choose, ("key", "number", "endpoint", "prefix"))
    if kind == "number":
        return pick(choose, _NUMBERS)
    if kind == "endpoint":
        return pick(choose, _ENDPOINTS)
    if kind == "prefix":
        return pick(choose, _PREFIXES)
    if kind == "flag":
        return pick(choose, _FLAGS)
    return weighted(
        choose, [(12, pick(choose, _FOUR)), (1, _ZERO), (1, "f" * 64), (1, "1" * 63), (1, "1" * 65), (1, "g" * 64)]
    )
