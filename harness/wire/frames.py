"""Find the UDP datagram in an Ethernet frame, and change it with correct checksums.

Sources: RFC 791, RFC 8200, RFC 768, RFC 1071; PACKET_AUXDATA in packet(7) for checksum state and VLAN tag of a frame.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field, replace
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
# Offset of the checksum in the header of each protocol whose checksum covers a pseudo-header.
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
    """The place of the transport header in a frame.

    protocol: IP protocol number. network, start, end: offsets in the frame of the IP header, of the transport header
    and of the end of the IP packet. addresses: source and destination from the IP header, 4 or 16 bytes each.
    """

    protocol: int
    network: int
    start: int
    end: int
    addresses: bytes = field(repr=False)

    def source(self, frame: bytes) -> tuple[str, int]:
        """Read source address and port from the frame."""
        half = len(self.addresses) // 2
        return _address(self.addresses[:half]), int.from_bytes(frame[self.start : self.start + 2])

    def destination(self, frame: bytes) -> tuple[str, int]:
        """Read destination address and port from the frame."""
        half = len(self.addresses) // 2
        return _address(self.addresses[half:]), int.from_bytes(frame[self.start + 2 : self.start + 4])

    def payload(self, frame: bytes) -> bytes:
        """Return the payload of a UDP datagram."""
        return frame[self.start + _UDP_HEADER : self.end]


def transport(frame: bytes) -> Transport | None:
    """Find the transport header of an IP packet, also behind VLAN tags; None for fragments and all but IP."""
    start = _ETHERTYPE
    while (kind := int.from_bytes(frame[start : start + 2])) in _VLANS:
        start += _VLAN_TAG
    start += 2
    if kind == _IPV4 and len(frame) >= start + 20:
        length, fragment = struct.unpack_from(">HxxH", frame, start + 2)
        if fragment & _MORE_FRAGMENTS_OR_OFFSET:
            return None
        header = start + (frame[start] & 15) * 4
        return _checked(
            frame, Transport(frame[start + 9], start, header, start + length, frame[start + 12 : start + 20])
        )
    if kind == _IPV6 and len(frame) >= start + _IPV6_HEADER:
        header = start + _IPV6_HEADER
        end = header + int.from_bytes(frame[start + 4 : start + 6])
        return _checked(frame, Transport(frame[start + 6], start, header, end, frame[start + 8 : header]))
    return None


def _checked(frame: bytes, place: Transport) -> Transport | None:
    """Return `place` if its lengths fit the frame, with room for a header of 8 bytes."""
    return place if place.start + _UDP_HEADER <= place.end <= len(frame) else None


def udp(frame: bytes) -> Transport | None:
    """Find the UDP datagram of a frame; None for a fragment and for anything else."""
    place = transport(frame)
    return place if place is not None and place.protocol == socket.IPPROTO_UDP else None


def message(frame: bytes, datagram: Transport, time: int) -> Message:
    """Return the datagram of a frame as a message; time: ns of wall time."""
    return Message(
        time=time,
        source=datagram.source(frame),
        destination=datagram.destination(frame),
        payload=datagram.payload(frame),
    )


def _address(packed: bytes) -> str:
    return str(IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed))  # noqa: PLR2004 - bytes of IPv4


def changed(frame: bytes, datagram: Transport, payload: bytes, *, port: int | None = None) -> bytes:
    """Return the frame with another UDP payload of the same length, and the right checksum; port: new source port."""
    new = bytearray(frame)
    new[datagram.start + _UDP_HEADER : datagram.end] = payload
    if port is not None:
        new[datagram.start : datagram.start + 2] = port.to_bytes(2)
    return _summed(new, datagram)


def reflected(frame: bytes, datagram: Transport) -> bytes:
    """Return the frame with source and destination exchanged in Ethernet, IP and UDP; all checksums stay correct."""
    new = bytearray(frame)
    new[:6], new[6:12] = new[6:12], new[:6]
    half = len(datagram.addresses) // 2
    addresses = datagram.network + (_IPV4_SOURCE if half == _IPV4_ADDRESSES // 2 else _IPV6_SOURCE)
    for start, size in ((addresses, half), (datagram.start, 2)):
        middle, end = start + size, start + 2 * size
        new[start:middle], new[middle:end] = new[middle:end], new[start:middle]
    return bytes(new)


def finished(frame: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """Return the frame as on a cable: with the checksum and the VLAN tag that the kernel left out (PACKET_AUXDATA).

    ancillary: from recvmsg(2).
    """
    for level, kind, data in ancillary:
        if level == SOL_PACKET and kind == PACKET_AUXDATA:
            status, _, _, _, _, tci, tpid = _AUXDATA.unpack_from(data)
            if status & _CHECKSUM_NOT_READY and (place := transport(frame)) and place.protocol in _CHECKSUMS:
                frame = _summed(bytearray(frame), place)
            if status & _VLAN_VALID:
                tag = struct.pack(">HH", tpid if status & _VLAN_TPID_VALID else _VLANS[0], tci)
                frame = frame[:_ETHERTYPE] + tag + frame[_ETHERTYPE:]
    return frame


def segments(frame: bytes) -> list[bytes]:
    """Split a frame with a UDP_SEGMENT payload into frames as a network card does; other frames stay as they are."""
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


def _summed(frame: bytearray, place: Transport) -> bytes:
    """Fill in the transport checksum."""
    at = place.start + _CHECKSUMS[place.protocol]
    frame[at : at + 2] = bytes(2)
    segment = bytes(frame[place.start : place.end])
    pseudo = place.addresses + struct.pack(">II", len(segment), place.protocol)
    value = checksum(pseudo + segment)
    # RFC 768: a UDP checksum of 0 means "no checksum"; a computed 0 is sent as all ones.
    if value == 0 and place.protocol == socket.IPPROTO_UDP:
        value = _16_BITS
    frame[at : at + 2] = value.to_bytes(2)
    return bytes(frame)
