"""Build inner packets of every shape that a tunnel must carry unchanged."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from struct import pack
from typing import Final

from harness import V4_OF_A, V4_OF_B, V6_OF_A, V6_OF_B
from harness.net.checksum import checksum

TCP, UDP, IGMP, GRE, ESP, AH, NO_NEXT, OSPF, SCTP = 6, 17, 2, 47, 50, 51, 59, 89, 132
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
MORE_FRAGMENTS, DONT_FRAGMENT = 0x2000, 0x4000
_BODY: Final = bytes(range(64))


def ipv4(
    body: bytes = _BODY,
    *,
    protocol: int = UDP,
    to: str = V4_OF_B,
    fragment: int = 0,
    options: bytes = b"",
    ttl: int = 64,
) -> bytes:
    """Build an IPv4 packet from A; options: a multiple of 4 bytes. fragment: flags and offset, in units of 8 bytes."""
    words = 5 + len(options) // 4
    addresses = socket.inet_aton(V4_OF_A) + socket.inet_aton(to)
    header = pack(">BBHHHBBH", 0x40 | words, 0, words * 4 + len(body), 0x1234, fragment, ttl, protocol, 0)
    value = checksum(header + addresses + options)
    return header[:10] + pack(">H", value) + addresses + options + body


def ipv6(body: bytes = _BODY, *, protocol: int = UDP, to: str = V6_OF_B, hops: int = 64) -> bytes:
    """Build an IPv6 packet from A; protocol: the first next header."""
    addresses = ip_address(V6_OF_A).packed + ip_address(to).packed
    return pack(">LHBB", 6 << 28 | 0x12345, len(body), protocol, hops) + addresses + body


def datagram(source: str, to: str, payload: bytes = _BODY, *, port: int = 1111, wrong: int = 0) -> bytes:
    """Build a UDP datagram with its checksum, which is off by `wrong`."""
    addresses = ip_address(source).packed + ip_address(to).packed
    length = 8 + len(payload)
    header = pack(">HHHH", port, port, length, 0)
    value = checksum(addresses + pack(">LL", length, UDP) + header + payload) or 0xFFFF
    return header[:6] + pack(">H", value ^ wrong) + payload


def segment(source: str, to: str, *, wrong: int = 0) -> bytes:
    """Build a TCP SYN with its checksum, which is off by `wrong`."""
    addresses = ip_address(source).packed + ip_address(to).packed
    header = pack(">HHLLBBHHH", 1111, 1111, 7, 0, 5 << 4, 2, 1000, 0, 0)
    value = checksum(addresses + pack(">LL", len(header), TCP) + header)
    return header[:16] + pack(">H", value ^ wrong) + header[18:]


def _extension(following: int, option: bytes) -> bytes:
    """Build a hop-by-hop or destination options header of 8 bytes from an option of 6 (RFC 8200, 4.2)."""
    return bytes([following, 0]) + option


def _v6_fragment(flags: int) -> bytes:
    return pack(">BBHL", UDP, 0, flags, 0xABCDEF)


V4: Final = datagram(V4_OF_A, V4_OF_B)
V6: Final = datagram(V6_OF_A, V6_OF_B)
_ROUTER_ALERT: Final = bytes([5, 2, 0, 0, 1, 0])
_PADN: Final = bytes([1, 4, 0, 0, 0, 0])
# An option of type 0x1e, which RFC 4727 sets aside for experiments: skipped where it is unknown.
_UNKNOWN_OPTION: Final = bytes([0x1E, 4, 1, 2, 3, 4])
SHAPES: Final[dict[str, bytes]] = {
    "IPv4 first fragment": ipv4(V4[:48], fragment=MORE_FRAGMENTS),
    "IPv4 middle fragment": ipv4(V4[48:64], fragment=MORE_FRAGMENTS | 6),
    "IPv4 last fragment": ipv4(V4[64:], fragment=8),
    "IPv4 fragment at the highest offset": ipv4(V4[:16], fragment=0x1FFE),
    "IPv4 fragment with DF": ipv4(V4[:48], fragment=DONT_FRAGMENT | MORE_FRAGMENTS),
    "IPv4 DF": ipv4(V4, fragment=DONT_FRAGMENT),
    "IPv4 option NOP": ipv4(V4, options=b"\1\1\1\0"),
    "IPv4 option record route": ipv4(V4, options=bytes([7, 7, 4, 0, 0, 0, 0, 0])),
    "IPv4 option router alert": ipv4(V4, options=bytes([148, 4, 0, 0])),
    "IPv4 forty bytes of options": ipv4(V4, options=b"\1" * 40),
    "IPv4 TTL 0": ipv4(V4, ttl=0),
    "IPv4 TTL 1": ipv4(V4, ttl=1),
    "IPv4 UDP without checksum": ipv4(V4[:6] + bytes(2) + V4[8:]),
    "IPv4 UDP with wrong checksum": ipv4(datagram(V4_OF_A, V4_OF_B, wrong=1)),
    "IPv4 TCP with wrong checksum": ipv4(segment(V4_OF_A, V4_OF_B, wrong=1), protocol=TCP),
    "IPv4 without payload": ipv4(b""),
    "IPv4 protocol 2, IGMP": ipv4(protocol=IGMP, to="224.0.0.22", ttl=1),
    "IPv4 protocol 47, GRE": ipv4(protocol=GRE),
    "IPv4 protocol 50, ESP": ipv4(protocol=ESP),
    "IPv4 protocol 51, AH": ipv4(protocol=AH),
    "IPv4 protocol 59": ipv4(protocol=NO_NEXT),
    "IPv4 protocol 89, OSPF, to 224.0.0.5": ipv4(protocol=OSPF, to="224.0.0.5", ttl=1),
    "IPv4 protocol 132, SCTP": ipv4(protocol=SCTP),
    "IPv4 protocol 255": ipv4(protocol=255),
    "IPv4 to 255.255.255.255": ipv4(datagram(V4_OF_A, "255.255.255.255"), to="255.255.255.255"),
    "IPv6 first fragment": ipv6(_v6_fragment(1) + V6[:48], protocol=FRAGMENT),
    "IPv6 middle fragment": ipv6(_v6_fragment(48 | 1) + V6[48:64], protocol=FRAGMENT),
    "IPv6 last fragment": ipv6(_v6_fragment(64) + V6[64:], protocol=FRAGMENT),
    "IPv6 atomic fragment": ipv6(_v6_fragment(0) + V6, protocol=FRAGMENT),
    "IPv6 hop-by-hop, router alert": ipv6(_extension(UDP, _ROUTER_ALERT) + V6, protocol=HOP_BY_HOP),
    "IPv6 hop-by-hop, unknown option": ipv6(_extension(UDP, _UNKNOWN_OPTION) + V6, protocol=HOP_BY_HOP),
    "IPv6 destination options": ipv6(_extension(UDP, _PADN) + V6, protocol=DESTINATION),
    "IPv6 routing header": ipv6(pack(">BBBBL", UDP, 0, 253, 0, 0) + V6, protocol=ROUTING),
    "IPv6 authentication header": ipv6(pack(">BBHLLL", UDP, 2, 0, 1, 1, 0xDEADBEEF) + V6, protocol=AH),
    "IPv6 hop limit 0": ipv6(V6, hops=0),
    "IPv6 hop limit 1": ipv6(V6, hops=1),
    "IPv6 UDP with wrong checksum": ipv6(datagram(V6_OF_A, V6_OF_B, wrong=1)),
    "IPv6 TCP with wrong checksum": ipv6(segment(V6_OF_A, V6_OF_B, wrong=1), protocol=TCP),
    "IPv6 no next header": ipv6(b"", protocol=NO_NEXT),
    "IPv6 protocol 50, ESP": ipv6(protocol=ESP),
    "IPv6 protocol 132, SCTP": ipv6(protocol=SCTP),
    "IPv6 to ff02::1:6": ipv6(datagram(V6_OF_A, "ff02::1:6"), to="ff02::1:6"),
}
