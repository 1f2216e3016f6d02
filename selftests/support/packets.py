"""Build the smallest inner packets that a test needs, with correct checksums."""

from __future__ import annotations

from ipaddress import ip_address
from struct import pack

from refwg.ip import internet_checksum

UDP = 17


def ip_packet(
    source: str, destination: str, payload: bytes = b"payload", *, tos: int = 0, protocol: int = UDP
) -> bytes:
    """Build an IPv4 or IPv6 packet, by the family of the addresses."""
    packed = ip_address(source).packed + ip_address(destination).packed
    if len(packed) == 32:
        return pack(">LHBB", 6 << 28 | tos << 20, len(payload), protocol, 64) + packed + payload
    header = pack(">BBHHHBBH", 0x45, tos, 20 + len(payload), 1, 0, 64, protocol, 0) + packed
    return header[:10] + pack(">H", internet_checksum(header)) + header[12:] + payload


def udp(source_port: int, destination_port: int, payload: bytes = b"payload") -> bytes:
    return pack(">HHHH", source_port, destination_port, 8 + len(payload), 0) + payload
