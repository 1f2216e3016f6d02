"""Find the UDP datagram in an Ethernet frame, and change it with correct checksums.

Sources: RFC 791, RFC 8200, RFC 768, RFC 1071; packet(7) for what the kernel keeps beside a frame (PACKET_AUXDATA).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from harness.net.checksum import checksum
from harness.wire.messages import Message, split

ETHERNET_HEADER: Final = 14
_ETHERTYPE: Final = 12
_VLAN_TAG: Final = 4
_VLANS: Final = (0x8100, 0x88A8)
_IPV4, _IPV6 = 0x0800, 0x86DD
_IPV4_ADDRESSES: Final = 8
_IPV4_SOURCE, _IPV6_SOURCE = 12, 8
_IPV6_HEADER: Final = 40
_UDP_HEADER: Final = 8
_MORE_FRAGMENTS_OR_OFFSET: Final = 0x3FFF
_16_BITS: Final = 0xFFFF
# Where the checksum stands in the header of the transport protocols that have one over a pseudo-header.
_CHECKSUMS: Final = {socket.IPPROTO_UDP: 6, socket.IPPROTO_TCP: 16, socket.IPPROTO_ICMPV6: 2}

SOL_PACKET: Final = 263
PACKET_AUXDATA: Final = 8
# struct tpacket_auxdata: status, len, snaplen, mac, net, vlan_tci, vlan_tpid.
_AUXDATA: Final = struct.Struct("IIIHHHH")
_CHECKSUM_NOT_READY: Final = 1 << 3
_VLAN_VALID: Final = 1 << 4
_VLAN_TPID_VALID: Final = 1 << 6


@dataclass(frozen=True, slots=True)
class Transport:
    """Where the transport header of a frame's IP packet is: which protocol, from where, up to which byte."""

    protocol: int
    network: int
    start: int
    end: int
    addresses: bytes
    """Source and destination, 4 or 16 bytes each."""

    def source(self, frame: bytes) -> tuple[str, int]:
        half = len(self.addresses) // 2
        return _address(self.addresses[:half]), int.from_bytes(frame[self.start : self.start + 2])

    def destination(self, frame: bytes) -> tuple[str, int]:
        half = len(self.addresses) // 2
        return _address(self.addresses[half:]), int.from_bytes(frame[self.start + 2 : self.start + 4])

    def payload(self, frame: bytes) -> bytes:
        """What a UDP datagram carries."""
        return frame[self.start + _UDP_HEADER : self.end]


def transport(frame: bytes) -> Transport | None:
    """Find the transport header; None where there is none, in ARP or in a fragment."""
    start = _ETHERTYPE
    while (kind := int.from_bytes(frame[start : start + 2])) in _VLANS:
        start += _VLAN_TAG
    start += 2
    if kind == _IPV4 and len(frame) >= start + 20:
        length, fragment = struct.unpack_from(">HxxH", frame, start + 2)
        if fragment & _MORE_FRAGMENTS_OR_OFFSET:
            return None
        header = start + (frame[start] & 15) * 4
        return _whole(frame, Transport(frame[start + 9], start, header, start + length, frame[start + 12 : start + 20]))
    if kind == _IPV6 and len(frame) >= start + _IPV6_HEADER:
        header = start + _IPV6_HEADER
        end = header + int.from_bytes(frame[start + 4 : start + 6])
        return _whole(frame, Transport(frame[start + 6], start, header, end, frame[start + 8 : header]))
    return None


def _whole(frame: bytes, found: Transport) -> Transport | None:
    return found if found.start + _UDP_HEADER <= found.end <= len(frame) else None


def udp(frame: bytes) -> Transport | None:
    """Find the UDP datagram of a frame, whole and not a fragment."""
    found = transport(frame)
    return found if found is not None and found.protocol == socket.IPPROTO_UDP else None


def message(frame: bytes, datagram: Transport, time: int) -> Message:
    """The datagram of a frame as a message."""
    return Message(
        time=time,
        source=datagram.source(frame),
        destination=datagram.destination(frame),
        payload=datagram.payload(frame),
    )


def _address(packed: bytes) -> str:
    return str(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed))  # noqa: PLR2004 - bytes of IPv4


def changed(frame: bytes, datagram: Transport, payload: bytes, *, port: int | None = None) -> bytes:
    """The same frame with another UDP payload of the same length, and from another port, with the right checksum."""
    new = bytearray(frame)
    new[datagram.start + _UDP_HEADER : datagram.end] = payload
    if port is not None:
        new[datagram.start : datagram.start + 2] = port.to_bytes(2)
    return _summed(new, datagram)


def reflected(frame: bytes, datagram: Transport) -> bytes:
    """The same frame on its way back: both ends of each layer are exchanged, and no checksum notices."""
    new = bytearray(frame)
    new[:6], new[6:12] = new[6:12], new[:6]
    half = len(datagram.addresses) // 2
    addresses = datagram.network + (_IPV4_SOURCE if half == _IPV4_ADDRESSES // 2 else _IPV6_SOURCE)
    for start, size in ((addresses, half), (datagram.start, 2)):
        middle, end = start + size, start + 2 * size
        new[start:middle], new[middle:end] = new[middle:end], new[start:middle]
    return bytes(new)


def finished(frame: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """The frame as it would be on a cable: with its VLAN tag and its checksum, which the kernel may keep beside it."""
    for level, kind, data in ancillary:
        if level == SOL_PACKET and kind == PACKET_AUXDATA:
            status, _, _, _, _, tci, tpid = _AUXDATA.unpack_from(data)
            if status & _CHECKSUM_NOT_READY and (found := transport(frame)) and found.protocol in _CHECKSUMS:
                frame = _summed(bytearray(frame), found)
            if status & _VLAN_VALID:
                tag = struct.pack(">HH", tpid if status & _VLAN_TPID_VALID else _VLANS[0], tci)
                frame = frame[:_ETHERTYPE] + tag + frame[_ETHERTYPE:]
    return frame


def segments(frame: bytes) -> list[bytes]:
    """The frames that a card would make of one whose datagram was sent by UDP_SEGMENT; else the frame itself."""
    datagram = udp(frame)
    parts = split(datagram.payload(frame)) if datagram is not None else []
    if datagram is None or len(parts) < 2:  # noqa: PLR2004 - more than one
        return [frame]
    return [_segment(frame, datagram, part) for part in parts]


def _segment(frame: bytes, datagram: Transport, part: bytes) -> bytes:
    new = bytearray(frame[: datagram.start + _UDP_HEADER] + part)
    length = len(new) - datagram.start
    new[datagram.start + 4 : datagram.start + 6] = length.to_bytes(2)
    network = datagram.network
    if len(datagram.addresses) == _IPV4_ADDRESSES:
        new[network + 2 : network + 4] = (len(new) - network).to_bytes(2)
        new[network + 10 : network + 12] = bytes(2)
        new[network + 10 : network + 12] = checksum(bytes(new[network : datagram.start])).to_bytes(2)
    else:
        new[network + 4 : network + 6] = length.to_bytes(2)
    return _summed(new, replace(datagram, end=len(new)))


def _summed(frame: bytearray, found: Transport) -> bytes:
    place = found.start + _CHECKSUMS[found.protocol]
    frame[place : place + 2] = bytes(2)
    segment = bytes(frame[found.start : found.end])
    pseudo = found.addresses + struct.pack(">II", len(segment), found.protocol)
    value = checksum(pseudo + segment)
    # Of UDP a zero would say that there is none.
    if value == 0 and found.protocol == socket.IPPROTO_UDP:
        value = _16_BITS
    frame[place : place + 2] = value.to_bytes(2)
    return bytes(frame)
