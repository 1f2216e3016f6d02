"""Find the UDP datagram in an Ethernet frame, and change it with correct checksums.

Sources: RFC 791, RFC 8200, RFC 768, RFC 1071; PACKET_AUXDATA in packet(7) for checksum state and VLAN tag of a frame;
include/uapi/linux/virtio_net.h for the header of PACKET_VNET_HDR.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, Self

from harness.net.checksum import checksum
from harness.wire.messages import FRAGMENT, OTHER, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

ETHERNET_HEADER: Final = 14
_ETHERTYPE: Final = 12
_VLAN_TAG: Final = 4
_VLANS: Final = (0x8100, 0x88A8)
_IPV4, _IPV6 = 0x0800, 0x86DD
_IPV4_ADDRESSES: Final = 8
_IPV4_SOURCE, _IPV6_SOURCE = 12, 8
_IPV6_HEADER: Final = 40
_UDP_HEADER: Final = 8
_TCP_DATA_OFFSET: Final = 12
_IPV4_HEADER: Final = 20
_IPV4_PROTOCOL, _IPV6_NEXT = 9, 6
_MORE_FRAGMENTS_OR_OFFSET, _FRAGMENT_OFFSET, _IPV4_MORE = 0x3FFF, 0x1FFF, 0x2000
_EXTENSIONS: Final = {
    socket.IPPROTO_HOPOPTS, socket.IPPROTO_ROUTING, socket.IPPROTO_FRAGMENT, socket.IPPROTO_DSTOPTS, socket.IPPROTO_AH,
}  # fmt: skip
# What `read` returns for a frame that is cut off, and for a fragment that no datagram has a place for.
TRUNCATED, MALFORMED = "truncated", "malformed"
_ETHERTYPES: Final = {0x0806: "ARP", 0x88CC: "LLDP"}
_PROTOCOLS: Final = {1: "ICMP", 2: "IGMP", 6: "TCP", 50: "ESP", 58: "ICMPv6"}
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
PACKET_VNET_HDR: Final = 15
# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
VNET_HEADER: Final = struct.Struct("=BBHHHH")
_GSO_UDP_L4, _GSO_ECN = 5, 0x80
_GSO_TCP: Final = {1, 4}
_NEEDS_CHECKSUM: Final = 1
_TCP_SEQUENCE, _TCP_FLAGS = 4, 13
# FIN and PSH are of the last segment of a superframe, CWR is of the first one (tcp_gso_segment).
_FIN_PSH, _CWR = 0x09, 0x80


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


@dataclass(frozen=True, slots=True)
class Fragment:
    """The place of a fragment in a frame, and in its datagram.

    key: equal for the fragments of one datagram. network, start, end: offsets in the frame of the IP header, of the
    fragment's data, and of its end. offset: of the data in the datagram. is_last: no fragment comes after it.
    following: protocol of the data. naming: offset in the frame of the protocol byte in the IPv4 header or, over IPv6,
    in the last header before the fragment header.
    """

    key: bytes = field(repr=False)
    network: int
    start: int
    end: int
    offset: int
    is_last: bool
    following: int
    naming: int

    @property
    def stop(self) -> int:
        """Offset of the end of its data in the datagram."""
        return self.offset + self.end - self.start

    @property
    def is_v6(self) -> bool:
        """True for a fragment of an IPv6 packet."""
        return self.naming != self.network + _IPV4_PROTOCOL


# What a frame has in it: words stand for a frame with neither.
Contents = Transport | Fragment | str


def read(frame: bytes) -> Contents:
    """Find the transport header of an IP packet, behind VLAN tags and IPv6 extension headers.

    Returns a Fragment for a part of a datagram, and words for a frame without either, such as "ARP" or "truncated".
    """
    start = _ETHERTYPE
    while (kind := int.from_bytes(frame[start : start + 2])) in _VLANS:
        start += _VLAN_TAG
    start += 2
    if len(frame) < start:
        return TRUNCATED
    if kind == _IPV4:
        return _read_ipv4(frame, start)
    if kind == _IPV6:
        return _read_ipv6(frame, start)
    return _ETHERTYPES.get(kind) or f"ethertype {kind:#06x}"


def _read_ipv4(frame: bytes, start: int) -> Contents:
    if len(frame) < start + _IPV4_HEADER:
        return TRUNCATED
    length, identification, place = struct.unpack_from(">H2sH", frame, start + 2)
    header, end = start + (frame[start] & 15) * 4, start + length
    if not start + _IPV4_HEADER <= header <= end <= len(frame):
        return TRUNCATED
    protocol, addresses = frame[start + _IPV4_PROTOCOL], frame[start + 12 : start + 20]
    if place & _MORE_FRAGMENTS_OR_OFFSET:
        key = frame[_ETHERTYPE:start] + addresses + bytes([protocol]) + identification
        offset, is_last = (place & _FRAGMENT_OFFSET) * 8, not place & _IPV4_MORE
        return _fragment(Fragment(key, start, header, end, offset, is_last, protocol, start + _IPV4_PROTOCOL))
    return _checked(Transport(protocol, start, header, end, addresses))


def _read_ipv6(frame: bytes, start: int) -> Contents:
    if len(frame) < start + _IPV6_HEADER:
        return TRUNCATED
    end = start + _IPV6_HEADER + int.from_bytes(frame[start + 4 : start + 6])
    if end > len(frame):
        return TRUNCATED
    naming, header = start + _IPV6_NEXT, start + _IPV6_HEADER
    while (protocol := frame[naming]) in _EXTENSIONS:
        if header + 8 > end:
            return TRUNCATED
        if protocol == socket.IPPROTO_FRAGMENT and (place := int.from_bytes(frame[header + 2 : header + 4]) & 0xFFF9):
            key = frame[_ETHERTYPE:start] + frame[start + 8 : start + 40] + frame[header + 4 : header + 8]
            offset, is_last, following = place & 0xFFF8, not place & 1, frame[header]
            return _fragment(Fragment(key, start, header + 8, end, offset, is_last, following, naming))
        if protocol == socket.IPPROTO_ROUTING and frame[header + 3]:
            # The pseudo-header of its checksum has an address of the routing header (RFC 8200, 8.1).
            return "IPv6 on its way through a routing header"
        naming, header = header, header + _extension_size(frame, protocol, header)
    return _checked(Transport(protocol, start, header, end, frame[start + 8 : start + 40]))


def _extension_size(frame: bytes, protocol: int, header: int) -> int:
    """Return the length of an IPv6 extension header (RFC 8200, section 4; RFC 4302, 2.2, for AH)."""
    if protocol == socket.IPPROTO_FRAGMENT:
        # A fragment that is its whole datagram (RFC 6946).
        return 8
    size = frame[header + 1]
    return (size + 2) * 4 if protocol == socket.IPPROTO_AH else (size + 1) * 8


def _fragment(piece: Fragment) -> Fragment | str:
    """Return the fragment, unless no datagram has a place for it."""
    size = piece.end - piece.start
    is_whole = piece.is_last or size % 8 == 0
    return piece if size > 0 and is_whole and piece.stop <= _16_BITS else MALFORMED


def _checked(place: Transport) -> Transport | str:
    """Return `place` if there is room for a header of 8 bytes."""
    return place if place.start + _UDP_HEADER <= place.end else TRUNCATED


def transport(frame: bytes) -> Transport | None:
    """Find the transport header as `read` does; None for fragments and all but IP."""
    contents = read(frame)
    return contents if isinstance(contents, Transport) else None


def udp(frame: bytes) -> Transport | None:
    """Find the UDP datagram of a frame; None for a fragment and for anything else."""
    place = transport(frame)
    return place if place is not None and place.protocol == socket.IPPROTO_UDP else None


def message(frame: bytes, contents: Contents, time: int) -> Message:
    """Return the datagram of a frame as a message, or what the frame is instead.

    contents: of the frame, from `read`. time: ns of wall time.
    """
    if isinstance(contents, Transport) and contents.protocol == socket.IPPROTO_UDP:
        return Message(
            time=time,
            source=contents.source(frame),
            destination=contents.destination(frame),
            payload=contents.payload(frame),
        )
    sort = OTHER
    match contents:
        case Transport():
            detail = _PROTOCOLS.get(contents.protocol) or f"IP protocol {contents.protocol}"
        case Fragment():
            sort, detail = FRAGMENT, "alone"
        case _:
            sort, detail = (FRAGMENT, MALFORMED) if contents == MALFORMED else (OTHER, contents)
    nowhere = ("", 0)
    payload = frame[ETHERNET_HEADER:]
    return Message(time=time, source=nowhere, destination=nowhere, payload=payload, sort=sort, detail=detail)


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


@dataclass(frozen=True, slots=True)
class Offload:
    """The struct virtio_net_hdr of a frame that leaves work to the card. size: bytes of payload of each segment."""

    kind: int
    size: int

    @classmethod
    def read(cls, header: bytes) -> Self | None:
        """Read the header that PACKET_VNET_HDR puts before a frame; None for a frame that is not a superframe."""
        _, kind, _, size, _, _ = VNET_HEADER.unpack_from(header)
        return cls(kind & ~_GSO_ECN, size) if kind & ~_GSO_ECN else None


def segments(frame: bytes, offload: Offload) -> list[bytes]:
    """Split a superframe of UDP (USO) into frames as a network card does; frames of other kinds stay whole."""
    datagram = udp(frame)
    if datagram is None or offload.kind != _GSO_UDP_L4 or not offload.size:
        return [frame]
    payload = datagram.payload(frame)
    starts = range(0, len(payload), offload.size)
    return [_segment(frame, datagram, payload[at : at + offload.size], number) for number, at in enumerate(starts)]


def inner_segments(header: bytes, packet: bytes) -> list[bytes]:
    """Split a superframe of UDP or TCP that is an IP packet into the packets that a network card makes of it.

    header: the struct virtio_net_hdr of the packet. One that is not a superframe gets the checksum that the kernel has
    left out, if any.
    """
    ethertype = _IPV6 if packet[:1] and packet[0] >> 4 == 6 else _IPV4  # noqa: PLR2004 - the version
    frame = bytes(_ETHERTYPE) + ethertype.to_bytes(2) + packet
    offload, place = Offload.read(header), transport(frame)
    if place is None:
        return [packet]
    if offload is None:
        is_unfinished = header[0] & _NEEDS_CHECKSUM and place.protocol in _CHECKSUMS
        return [_summed(bytearray(frame), place)[ETHERNET_HEADER:]] if is_unfinished else [packet]
    is_tcp = offload.kind in _GSO_TCP and place.protocol == socket.IPPROTO_TCP and offload.size
    parts = _tcp_segments(frame, place, offload.size) if is_tcp else segments(frame, offload)
    return [part[ETHERNET_HEADER:] for part in parts]


def _tcp_segments(frame: bytes, place: Transport, size: int) -> list[bytes]:
    start = place.start + (frame[place.start + _TCP_DATA_OFFSET] >> 4) * 4
    payload = frame[start : place.end]
    starts = range(0, len(payload), size)
    sequence = int.from_bytes(frame[place.start + _TCP_SEQUENCE :][:4])
    parts = []
    for number, at in enumerate(starts):
        new = bytearray(frame[:start] + payload[at : at + size])
        field = place.start + _TCP_SEQUENCE
        new[field : field + 4] = ((sequence + at) % (1 << 32)).to_bytes(4)
        if at + size < len(payload):
            new[place.start + _TCP_FLAGS] &= ~_FIN_PSH
        if number:
            new[place.start + _TCP_FLAGS] &= ~_CWR
        parts.append(_renumbered(new, place, number))
    return parts


def segment_count(frame: bytes, offload: Offload) -> int:
    """Return how many segments a card makes of a superframe of UDP or TCP; 1 for what `read` does not understand."""
    place = transport(frame)
    if place is None or not offload.size:
        return 1
    is_tcp = place.protocol == socket.IPPROTO_TCP
    header = (frame[place.start + _TCP_DATA_OFFSET] >> 4) * 4 if is_tcp else _UDP_HEADER
    return -(-(place.end - place.start - header) // offload.size)


def _segment(frame: bytes, datagram: Transport, part: bytes, number: int) -> bytes:
    new = bytearray(frame[: datagram.start + _UDP_HEADER] + part)
    new[datagram.start + 4 : datagram.start + 6] = (len(new) - datagram.start).to_bytes(2)
    return _renumbered(new, datagram, number)


def _renumbered(new: bytearray, place: Transport, number: int) -> bytes:
    """Return a segment with its own length, identification and checksums. number: of the segment, from 0 on."""
    network = place.network
    if len(place.addresses) == _IPV4_ADDRESSES:
        # The kernel counts up the identification (inet_gso_segment).
        identification = int.from_bytes(new[network + 4 : network + 6]) + number & _16_BITS
        new[network + 4 : network + 6] = identification.to_bytes(2)
    _set_length(new, network, place.start)
    return _summed(new, replace(place, end=len(new)))


def _set_length(new: bytearray, network: int, header_end: int) -> None:
    """Write the length of an IP packet that fills the frame, and the checksum of its IPv4 header."""
    if new[network] >> 4 == 4:  # noqa: PLR2004 - the version
        new[network + 2 : network + 4] = (len(new) - network).to_bytes(2)
        new[network + 10 : network + 12] = bytes(2)
        new[network + 10 : network + 12] = checksum(bytes(new[network:header_end])).to_bytes(2)
    else:
        new[network + 4 : network + 6] = (len(new) - network - _IPV6_HEADER).to_bytes(2)


def reassembled(frame: bytes, first: Fragment, data: bytes) -> bytes:
    """Return a frame with the whole datagram. frame, first: of its first fragment. data: of all fragments."""
    if first.is_v6:
        # Without the fragment header (RFC 8200, 4.5).
        new = bytearray(frame[: first.start - 8] + data)
        new[first.naming] = first.following
    else:
        new = bytearray(frame[: first.start] + data)
        new[first.network + 6 : first.network + 8] = bytes(2)
    _set_length(new, first.network, first.start)
    return bytes(new)


def fragmented(whole: bytes, likes: Sequence[tuple[bytes, Fragment]]) -> list[bytes]:
    """Cut a changed datagram as it had been cut.

    whole: the frame of `reassembled`, with other addresses or other bytes after the IP headers. likes: its fragments.
    """
    first = next(piece for _, piece in likes if piece.offset == 0)
    network, begin = first.network, first.start - (8 if first.is_v6 else 0)
    addresses = slice(network + 8, network + 40) if first.is_v6 else slice(network + 12, network + 20)
    out = []
    for frame, piece in likes:
        new = bytearray(frame)
        new[:_ETHERTYPE], new[addresses] = whole[:_ETHERTYPE], whole[addresses]
        new[piece.start : piece.end] = whole[begin + piece.offset : begin + piece.stop]
        out.append(bytes(new))
    return out


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
