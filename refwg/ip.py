"""Read IP packets inside the tunnel (addresses, lengths, ECN), and build ICMP errors.

Mirrors what the driver uses of ip_tunnels.h, inet_ecn.h (RFC 6040) and icmp.c (RFC 1122, RFC 4443). All functions but
`version` and `destination` expect a packet with a whole IP header.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

# Length of an address in bytes; it shows the address family.
IPV4_BYTES: Final = 4
IPV6_BYTES: Final = 16
IPV4_HEADER_LENGTH: Final = 20
IPV6_HEADER_LENGTH: Final = 40
ECN_MASK: Final = 0b11
ECT_1: Final = 1
ECT_0: Final = 2
CE: Final = 3
# RFC 6040, figure 4: the new inner mark by outer and inner mark; every other pair leaves the inner mark as it is.
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
# Extension headers: hop-by-hop options, routing, fragment, authentication, destination options.
_IPV6_EXTENSIONS: Final = frozenset({0, 43, _IPPROTO_FRAGMENT, _IPPROTO_AH, 60})
# Requests and replies: echo, timestamp, information, address mask. Every other ICMP type may be an error.
_ICMP_NO_ERRORS: Final = frozenset({0, 8, 13, 14, 15, 16, 17, 18})
_ICMPV6_FIRST_NO_ERROR: Final = 128
_ICMP_HOST_UNREACHABLE: Final = bytes([3, 1])
_ICMPV6_ADDRESS_UNREACHABLE: Final = bytes([1, 3])
# Bytes of the offending packet that an error quotes: up to 576 in all (RFC 1812), up to 1280 in all (RFC 4443).
_ICMP_QUOTE: Final = 576 - 20 - 8
_ICMPV6_QUOTE: Final = 1280 - 40 - 8


def version(packet: bytes) -> int:
    """Return 4 or 6 if the packet has a whole header of that version, else 0."""
    first = packet[0] >> 4 if packet else 0
    if first == _IPV4 and len(packet) >= IPV4_HEADER_LENGTH:
        return _IPV4
    if first == _IPV6 and len(packet) >= IPV6_HEADER_LENGTH:
        return _IPV6
    return 0


def source(packet: bytes) -> bytes:
    """Return the source address, 4 or 16 bytes."""
    return packet[12:16] if packet[0] >> 4 == _IPV4 else packet[8:24]


def destination(packet: bytes) -> bytes:
    """Return the destination address, 4 or 16 bytes; empty if the packet has no whole header of either version."""
    first = packet[0] >> 4 if len(packet) >= IPV4_HEADER_LENGTH else 0
    if first == _IPV4:
        return packet[16:20]
    return packet[24:40] if first == _IPV6 and len(packet) >= IPV6_HEADER_LENGTH else b""


def length_and_source(packet: bytes) -> tuple[int, bytes]:
    """Return the length of the packet in bytes as its header states it, and its source address.

    IPv6: payload length plus 40, up to 65575. The address is empty if there is no whole header of either version.
    """
    first = packet[0] >> 4 if len(packet) >= IPV4_HEADER_LENGTH else 0
    if first == _IPV4:
        return int.from_bytes(packet[2:4]), packet[12:16]
    if first == _IPV6 and len(packet) >= IPV6_HEADER_LENGTH:
        return int.from_bytes(packet[4:6]) + IPV6_HEADER_LENGTH, packet[8:24]
    return 0, b""


def ecn(packet: bytes) -> int:
    """Return the two ECN bits of the IP header (RFC 3168)."""
    return (packet[1] if packet[0] >> 4 == _IPV4 else packet[1] >> 4) & ECN_MASK


def encapsulated_ecn(packet: bytes) -> int:
    """Return the outer ECN bits for a packet: its own ones, but ECT(0) instead of CE (RFC 3168, 9.1.1)."""
    inner = (packet[1] if packet[0] >> 4 == _IPV4 else packet[1] >> 4) & ECN_MASK
    return ECT_0 if inner == CE else inner


def decapsulate_ecn(packet: bytes, outer: int) -> bytes:
    """Combine the outer ECN bits with the packet's own (RFC 6040); returns the packet, IPv4 with a new checksum."""
    mark = _DECAPSULATED_ECN.get((outer, ecn(packet)))
    return packet if mark is None else _with_ecn(packet, mark)


def internet_checksum(data: bytes) -> int:
    """Return the internet checksum (RFC 1071): the complement of the ones' complement sum of 16-bit words."""
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
    # RFC 1624: only the change of the word is added, so that a wrong header checksum stays wrong.
    checksum = _U16.unpack_from(packet, 10)[0] ^ 0xFFFF
    total = checksum + (_U16.unpack_from(packet)[0] ^ 0xFFFF) + _U16.unpack_from(marked)[0]
    marked[10:12] = _U16.pack(_folded(total) ^ 0xFFFF)
    return bytes(marked)


def udp_ports(packet: bytes) -> tuple[int, int] | None:
    """Return source and destination port of a UDP packet or its first fragment, None for any other packet."""
    protocol, payload = upper_layer(packet)
    if protocol != _IPPROTO_UDP or len(payload) < _PORTS.size:
        return None
    source, destination = _PORTS.unpack_from(payload)
    return source, destination


@dataclass(frozen=True, slots=True, kw_only=True)
class IcmpError:
    """An ICMP or ICMPv6 message without its IP header, and the destination address.

    The checksum of an ICMPv6 message is zero. The stack computes it, because it also chooses the source address.
    """

    destination: bytes
    message: bytes


def unreachable(packet: bytes) -> IcmpError | None:
    """Return the error "host unreachable" or "address unreachable" for a packet; None if it must not get one.

    No error is sent for an ICMP error, for a packet from or to more than one host, and for an IPv4 fragment that is not
    the first (RFC 1122, 3.2.2). For IPv6, RFC 4443, 2.4, has the same rules except the one for
    fragments.
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
    """Return protocol and payload after all IP headers; the protocol is None if the packet does not show it.

    Such packets are fragments other than the first, and packets that end within their extension headers.
    """
    if packet[0] >> 4 == _IPV4:
        return None if _is_later_ipv4_fragment(packet) else packet[9], packet[(packet[0] & 0xF) * 4 :]
    protocol, rest = packet[6], packet[IPV6_HEADER_LENGTH:]
    while protocol in _IPV6_EXTENSIONS:
        if len(rest) < _IPV6_SHORTEST_EXTENSION or _is_later_ipv6_fragment(protocol, rest):
            return None, b""
        protocol, rest = rest[0], rest[_extension_length(protocol, rest) :]
    return protocol, rest


def _extension_length(protocol: int, header: bytes) -> int:
    """Return the length of an extension header in bytes.

    The length field counts units of 8 bytes after the first 8 (RFC 8200). A fragment header has no length field, and
    the authentication header counts units of 4 bytes (RFC 4302).
    """
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
