"""Build TCP and UDP packets field by field, and cut superframes by the plainest code.

This is the other opinion in the tests of refwg's batch engine, so it uses nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address
from struct import pack, unpack, unpack_from
from typing import Any

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
TCP, UDP = 6, 17
# Types of superframes in a virtio header.
NONE, TCPV4, TCPV6, UDP_L4, WITH_CWR = 0, 1, 4, 5, 0x80


@dataclass(frozen=True)
class Flow:
    """The headers of a packet; lengths and checksums follow from them and the payload.

    options, ip_options: bytes, a multiple of four. fragment: flags and offset of IPv4. has_checksum: False for a UDP
    datagram without one.
    """

    version: int = 4
    protocol: int = TCP
    number: int = 1
    tos: int = 0
    ttl: int = 64
    identification: int = 1
    fragment: int = 0x4000
    flow_label: int = 0
    ip_options: bytes = b""
    source_port: int = 1000
    destination_port: int = 2000
    sequence: int = 1
    acknowledgment: int = 7
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    options: bytes = b""
    has_checksum: bool = True

    @property
    def addresses(self) -> bytes:
        """Source and destination: the inner addresses of side `number` of a pair, and of the other."""
        form = "192.168.241.{}" if self.version == 4 else "fd00::{}"
        return b"".join(ip_address(form.format(number)).packed for number in (self.number, 3 - self.number))

    def packet(self, payload: bytes, *, is_partial: bool = False) -> bytes:
        """Return a packet; is_partial: its checksum is the sum of the pseudo header, to be completed by others."""
        transport = self._transport(len(payload))
        start = pack(">HH", self.protocol, len(transport) + len(payload))
        place = 16 if self.protocol == TCP else 6
        total = internet_sum(self.addresses + start + (b"" if is_partial else transport + payload))
        value = total if is_partial else 0xFFFF - total
        if self.protocol == UDP and not is_partial:
            value = (value or 0xFFFF) if self.has_checksum else 0
        transport = transport[:place] + pack(">H", value) + transport[place + 2 :]
        return self._ip(len(transport) + len(payload)) + transport + payload

    def _transport(self, length: int) -> bytes:
        ports = pack(">HH", self.source_port, self.destination_port)
        if self.protocol == UDP:
            return ports + pack(">HH", 8 + length, 0)
        offset = (5 + len(self.options) // 4) << 4
        return (
            ports
            + pack(">LLBBHHH", self.sequence, self.acknowledgment, offset, self.flags, self.window, 0, self.urgent)
            + self.options
        )

    def _ip(self, length: int) -> bytes:
        if self.version == 6:
            word = 6 << 28 | self.tos << 20 | self.flow_label
            return pack(">LHBB", word, length, self.protocol, self.ttl) + self.addresses
        size = 20 + len(self.ip_options)
        header = pack(
            ">BBHHHBBH",
            0x40 | size // 4,
            self.tos,
            size + length,
            self.identification,
            self.fragment,
            self.ttl,
            self.protocol,
            0,
        )
        header += self.addresses + self.ip_options
        return header[:10] + pack(">H", 0xFFFF - internet_sum(header)) + header[12:]

    @property
    def header_length(self) -> int:
        """Bytes of a packet before its payload."""
        return len(self.packet(b""))

    def segments(self, payload: bytes, size: int) -> list[bytes]:
        """Return the packets that a superframe stands for; size: of the payload of each but the last."""
        pieces = [payload[start : start + size] for start in range(0, len(payload), size)]
        packets = []
        for number, piece in enumerate(pieces):
            flags = self.flags
            if number:
                flags &= ~CWR
            if number < len(pieces) - 1:
                flags &= ~(FIN | PSH)
            one = replace(
                self,
                identification=(self.identification + number) % 2**16,
                sequence=(self.sequence + number * size) % 2**32,
                flags=flags,
            )
            packets.append(one.packet(piece))
        return packets

    def frame(self, payload: bytes, size: int) -> bytes:
        """Return the superframe of this payload with its virtio header, as a kernel passes it to a program."""
        kind = (UDP_L4 if self.protocol == UDP else TCPV4 if self.version == 4 else TCPV6) | (
            WITH_CWR if self.protocol == TCP and self.flags & CWR else 0
        )
        start = len(self._ip(0))
        offset = 16 if self.protocol == TCP else 6
        virtio = pack("=BBHHHH", 1, kind, self.header_length, size, start, offset)
        return virtio + self.packet(payload, is_partial=True)


def internet_sum(data: bytes) -> int:
    """Return the ones' complement sum of 16-bit words (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(unpack(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def is_sound(packet: bytes) -> bool:
    """Return True if the checksums of a TCP or UDP packet without extension headers are right."""
    start = (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40
    addresses, protocol = (packet[12:20], packet[9]) if packet[0] >> 4 == 4 else (packet[8:40], packet[6])
    pseudo = addresses + pack(">HH", protocol, len(packet) - start)
    is_header_right = packet[0] >> 4 == 6 or internet_sum(packet[:start]) == 0xFFFF
    return is_header_right and internet_sum(pseudo + packet[start:]) == 0xFFFF


def without_identification(packet: bytes) -> bytes:
    """Return a packet with IPv4 identification zero and no header checksum: GRO does not keep the identification."""
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:] if packet[0] >> 4 == 4 else packet


def cut(frame: bytes) -> list[bytes]:
    """Return the packets that a frame with a virtio header stands for; checks what a kernel checks."""
    flags, kind, _, size, start, offset = unpack_from("=BBHHHH", frame)
    packet = frame[10:]
    if kind == NONE:
        assert not flags, "a packet that is no superframe has its checksum"
        return [packet]
    version = packet[0] >> 4
    protocol = UDP if kind & ~WITH_CWR == UDP_L4 else TCP
    assert flags == 1
    assert start == (20 if version == 4 else 40)
    assert offset == (16 if protocol == TCP else 6)
    pseudo = (packet[12:20] if version == 4 else packet[8:40]) + pack(">HH", protocol, len(packet) - start)
    (partial,) = unpack_from(">H", packet, start + offset)
    assert partial % 0xFFFF == internet_sum(pseudo) % 0xFFFF, "the checksum field has the sum of the pseudo header"
    flow = read(packet)
    return flow.segments(packet[flow.header_length :], size)


def read(packet: bytes) -> Flow:
    """Return the headers of a TCP or UDP packet between the two sides of a pair, without IP options."""
    version = packet[0] >> 4
    start = 20 if version == 4 else 40
    common: dict[str, Any] = {"version": version, "protocol": packet[9] if version == 4 else packet[6]}
    if version == 4:
        common |= dict(zip(("identification", "fragment", "ttl"), unpack_from(">HHB", packet, 4), strict=True))
        common |= {"tos": packet[1], "number": packet[15]}
    else:
        (word,) = unpack_from(">L", packet)
        common |= {"tos": word >> 20 & 0xFF, "flow_label": word & 0xFFFFF, "ttl": packet[7], "number": packet[23]}
    ports = dict(zip(("source_port", "destination_port"), unpack_from(">HH", packet, start), strict=True))
    if common["protocol"] == UDP:
        return Flow(**common, **ports)
    names = ("sequence", "acknowledgment", "offset", "flags", "window", "checksum", "urgent")
    fields = dict(zip(names, unpack_from(">LLBBHHH", packet, start + 4), strict=True))
    length = (fields.pop("offset") >> 4) * 4
    del fields["checksum"]
    return Flow(**common, **ports, **fields, options=packet[start + 20 : start + length])
