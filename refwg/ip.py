"""Read IP packets inside the tunnel (addresses, lengths, ECN), and build ICMP errors.

Mirrors what the driver takes from ip_tunnels.h, inet_ecn.h (RFC 6040) and icmp.c (RFC 1122, RFC 4443).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

# Lengths of an address in network order; only the length shows the family.
IPV4_BYTES: Final = 4
IPV6_BYTES: Final = 16
IPV4_HEADER_LENGTH: Final = 20
IPV6_HEADER_LENGTH: Final = 40
ECN_MASK: Final = 0b11
ECT_1: Final = 1
ECT_0: Final = 2
CE: Final = 3
# What the inner mark becomes, by outer and inner mark (RFC 6040, figure 4); every other pair changes nothing.
_DECAPSULATED_ECN: Final = {(CE, ECT_0): CE, (CE, ECT_1): CE, (ECT_1, ECT_0): ECT_1}

_IPV4: Final = 4
_IPV6: Final = 6
_U16: Final = Struct(">H")
_PORTS: Final = Struct(">HH")
_FRAGMENT_OFFSET: Final = 0x1FFF
_IPV6_FRAGMENT_OFFSET: Final = 0xFFF8
_IPV6_SHORTEST_EXTENSION: Final = 8
_IPPROTO_ICMP: Final = 1
_IPPROTO_UDP: Final = 17
_IPPROTO_FRAGMENT: Final = 44
_IPPROTO_AH: Final = 51
_IPPROTO_ICMPV6: Final = 58
# Hop-by-hop options, routing, fragment, authentication, destination options: what may stand before the payload.
_IPV6_EXTENSIONS: Final = frozenset({0, 43, _IPPROTO_FRAGMENT, _IPPROTO_AH, 60})
# Questions and answers: echo, timestamp, information, address mask. Every other ICMP type may be an error.
_ICMP_NO_ERRORS: Final = frozenset({0, 8, 13, 14, 15, 16, 17, 18})
_ICMPV6_FIRST_NO_ERROR: Final = 128
_ICMP_HOST_UNREACHABLE: Final = bytes([3, 1])
_ICMPV6_ADDRESS_UNREACHABLE: Final = bytes([1, 3])
# How much of the offending packet an error may quote: RFC 1812 (576 bytes in all), RFC 4443 (1280 in all).
_ICMP_QUOTE: Final = 576 - 20 - 8
_ICMPV6_QUOTE: Final = 1280 - 40 - 8


def version(packet: bytes) -> int:
    """4 or 6 if there is at least a whole header of that version, else 0."""
    first = packet[0] >> 4 if packet else 0
    if first == _IPV4 and len(packet) >= IPV4_HEADER_LENGTH:
        return _IPV4
    if first == _IPV6 and len(packet) >= IPV6_HEADER_LENGTH:
        return _IPV6
    return 0


def source(packet: bytes) -> bytes:
    return packet[12:16] if packet[0] >> 4 == _IPV4 else packet[8:24]


def destination(packet: bytes) -> bytes:
    return packet[16:20] if packet[0] >> 4 == _IPV4 else packet[24:40]


def claimed_length(packet: bytes) -> int:
    """Length of the packet by its own header; without wrapping at 16 bits, so at most 65575."""
    if packet[0] >> 4 == _IPV4:
        return int.from_bytes(packet[2:4])
    return int.from_bytes(packet[4:6]) + IPV6_HEADER_LENGTH


def ecn(packet: bytes) -> int:
    return (packet[1] if packet[0] >> 4 == _IPV4 else packet[1] >> 4) & ECN_MASK


def encapsulated_ecn(inner: int) -> int:
    """ECN of the outer header: the inner one, but a mark made before the tunnel stays inside (RFC 3168, 9.1.1)."""
    return ECT_0 if inner == CE else inner


def decapsulate_ecn(packet: bytes, outer: int) -> bytes:
    """Carry the mark of the outer header inwards, as RFC 6040 says; what cannot be marked stays as it is."""
    mark = _DECAPSULATED_ECN.get((outer, ecn(packet)))
    return packet if mark is None else _with_ecn(packet, mark)


def internet_checksum(data: bytes) -> int:
    """RFC 1071: the complement of the ones' complement sum of 16-bit words."""
    return _folded(sum(word for (word,) in _U16.iter_unpack(data + bytes(len(data) % 2)))) ^ 0xFFFF


def _folded(total: int) -> int:
    while total > 0xFFFF:  # noqa: PLR2004 - what a word can hold
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _with_ecn(packet: bytes, mark: int) -> bytes:
    marked = bytearray(packet)
    if packet[0] >> 4 != _IPV4:
        marked[1] = marked[1] & ~(ECN_MASK << 4) | mark << 4
        return bytes(marked)
    marked[1] = marked[1] & ~ECN_MASK | mark
    # RFC 1624: only the changed word enters the sum, so that a header checksum that was wrong stays wrong.
    checksum = _U16.unpack_from(packet, 10)[0] ^ 0xFFFF
    total = checksum + (_U16.unpack_from(packet)[0] ^ 0xFFFF) + _U16.unpack_from(marked)[0]
    marked[10:12] = _U16.pack(_folded(total) ^ 0xFFFF)
    return bytes(marked)


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpAddresses:
    """Where an inner UDP packet comes from and goes to, as far as a loop can be told by it."""

    source_port: int
    destination: bytes
    destination_port: int


def udp_addresses(packet: bytes) -> UdpAddresses | None:
    """The UDP ports and destination of a packet, or None if it is no UDP packet or not its first fragment."""
    protocol, payload = upper_layer(packet)
    if protocol != _IPPROTO_UDP or len(payload) < _PORTS.size:
        return None
    source_port, destination_port = _PORTS.unpack_from(payload)
    return UdpAddresses(source_port=source_port, destination=destination(packet), destination_port=destination_port)


@dataclass(frozen=True, slots=True, kw_only=True)
class IcmpError:
    """An ICMP or ICMPv6 message without its IP header, and the address it must go to.

    The checksum of an ICMPv6 message is left zero: the stack fills it in, as it chooses the source address.
    """

    destination: bytes
    message: bytes


def unreachable(packet: bytes) -> IcmpError | None:
    """Tell the sender of a packet that nobody is there; None if the packet must not be answered.

    Never answered are errors, packets from or to more than one host, and of IPv4 all fragments but the first (RFC 1122,
    3.2.2; RFC 4443, 2.4, which knows no such rule for fragments).
    """
    if _is_icmp_error(*upper_layer(packet)) or _is_later_ipv4_fragment(packet):
        return None
    if not _is_one_host(source(packet)) or not _is_one_host(destination(packet)):
        return None
    if packet[0] >> 4 == _IPV4:
        body = bytes(4) + packet[:_ICMP_QUOTE]
        checksum = _U16.pack(internet_checksum(_ICMP_HOST_UNREACHABLE + bytes(2) + body))
        return IcmpError(destination=source(packet), message=_ICMP_HOST_UNREACHABLE + checksum + body)
    message = _ICMPV6_ADDRESS_UNREACHABLE + bytes(6) + packet[:_ICMPV6_QUOTE]
    return IcmpError(destination=source(packet), message=message)


def upper_layer(packet: bytes) -> tuple[int | None, bytes]:
    """Protocol and payload behind all headers; the protocol is None if the packet does not tell."""
    if packet[0] >> 4 == _IPV4:
        return None if _is_later_ipv4_fragment(packet) else packet[9], packet[(packet[0] & 0xF) * 4 :]
    protocol, rest = packet[6], packet[IPV6_HEADER_LENGTH:]
    while protocol in _IPV6_EXTENSIONS:
        if len(rest) < _IPV6_SHORTEST_EXTENSION or _is_later_ipv6_fragment(protocol, rest):
            return None, b""
        protocol, rest = rest[0], rest[_extension_length(protocol, rest) :]
    return protocol, rest


def _extension_length(protocol: int, header: bytes) -> int:
    """Extension headers count their length in 8 bytes without the first 8, but for two of them (RFC 4302, RFC 8200)."""
    if protocol == _IPPROTO_FRAGMENT:
        return _IPV6_SHORTEST_EXTENSION
    return (header[1] + 2) * 4 if protocol == _IPPROTO_AH else (header[1] + 1) * 8


def _is_later_ipv4_fragment(packet: bytes) -> bool:
    return packet[0] >> 4 == _IPV4 and _U16.unpack_from(packet, 6)[0] & _FRAGMENT_OFFSET > 0


def _is_later_ipv6_fragment(protocol: int, header: bytes) -> bool:
    return protocol == _IPPROTO_FRAGMENT and _U16.unpack_from(header, 2)[0] & _IPV6_FRAGMENT_OFFSET > 0


def _is_icmp_error(protocol: int | None, payload: bytes) -> bool:
    if protocol == _IPPROTO_ICMP:
        return payload[:1] == b"" or payload[0] not in _ICMP_NO_ERRORS
    return protocol == _IPPROTO_ICMPV6 and (payload[:1] == b"" or payload[0] < _ICMPV6_FIRST_NO_ERROR)


def _is_one_host(address: bytes) -> bool:
    if len(address) == IPV4_BYTES:
        return any(address) and address[0] < 0xE0  # noqa: PLR2004 - 224.0.0.0: multicast, reserved, broadcast
    return any(address) and address[0] != 0xFF  # noqa: PLR2004 - ff00::/8: multicast
