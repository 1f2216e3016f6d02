"""Build the inner packets that scripted peers send, with correct lengths and checksums."""

from __future__ import annotations

import socket
import struct
from typing import Final

from harness.net.checksum import checksum

UDP: Final = 17
_HOP_LIMIT: Final = 64


def ip_packet(source: str, destination: str, payload: bytes, *, protocol: int = UDP, tos: int = 0) -> bytes:
    """Return an IPv4 or IPv6 packet, by the family of the addresses. tos: DSCP and ECN together."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    packed = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    if family == socket.AF_INET6:
        return struct.pack(">LHBB", 6 << 28 | tos << 20, len(payload), protocol, _HOP_LIMIT) + packed + payload
    header = struct.pack(">BBHHHBBH", 0x45, tos, 20 + len(payload), 1, 0, _HOP_LIMIT, protocol, 0) + packed
    return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + payload


def udp_packet(source: tuple[str, int], destination: tuple[str, int], payload: bytes, *, tos: int = 0) -> bytes:
    """Return the packet of a UDP datagram; source, destination: address and port."""
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    length = 8 + len(payload)
    bare = struct.pack(">HHHH", source[1], destination[1], length, 0) + payload
    addresses = socket.inet_pton(family, source[0]) + socket.inet_pton(family, destination[0])
    # 0 would mean "no checksum" (RFC 768).
    value = checksum(addresses + struct.pack(">LL", length, UDP) + bare) or 0xFFFF
    return ip_packet(source[0], destination[0], bare[:6] + struct.pack(">H", value) + bare[8:], tos=tos)
