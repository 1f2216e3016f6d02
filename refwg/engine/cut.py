"""Cut a superframe of the interface into the packets that it stands for.

Does what the kernel's segmentation does (tcp_offload.c, udp_offload.c, af_inet.c): each packet has the superframe's
headers, with lengths, IPv4 identification, sequence number, flags and checksums of its own. No input or output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from refwg.engine.rows import MAX_ROWS, ONES, sum_of_words, swapped
from refwg.engine.virtio import GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4
from refwg.errors import MalformedSuperframe
from refwg.ip import IPV4_HEADER_LENGTH, IPV6_HEADER_LENGTH

if TYPE_CHECKING:
    from refwg.engine.rows import Bytes, Integers, Rows
    from refwg.engine.virtio import VirtioHeader

IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17
UDP_HEADER_LENGTH: Final = 8
TCP_HEADER_LENGTH: Final = 20
TCP_CHECKSUM: Final = 16
UDP_CHECKSUM: Final = 6
FIN: Final = 0x01
PSH: Final = 0x08
CWR: Final = 0x80
# Offsets of fields in the headers of IP and TCP.
_TCP_SEQUENCE: Final = 4
_TCP_DATA_OFFSET: Final = 12
_TCP_FLAGS: Final = 13
_UDP_LENGTH: Final = 4
_IPV4_LENGTH: Final = 2
_IPV4_IDENTIFICATION: Final = 4
_IPV4_CHECKSUM: Final = 10
_IPV6_LENGTH: Final = 4
_32_BITS: Final = 0xFFFF_FFFF
_NUMBERS: Final = np.arange(MAX_ROWS, dtype=np.uint32)
_PROTOCOLS: Final = {GSO_TCPV4: (4, IPPROTO_TCP), GSO_TCPV6: (6, IPPROTO_TCP)}


class Superframe:
    """A superframe, ready to be cut.

    count: how many packets it stands for. header_length: bytes of IP and TCP or UDP headers of each. packet_length: of
    each packet but the last; last_length: of the last. length, headers: of the superframe.
    """

    def __init__(self, packet: Bytes, header: VirtioHeader) -> None:
        """Read the headers; raises MalformedSuperframe.

        packet: the bytes behind the virtio header. header: has a segment size.
        """
        self._packet = packet
        self._header = header
        kind = header.gso_type & ~GSO_ECN
        self._is_ipv4 = len(packet) > 0 and packet[0] >> 4 == 4  # noqa: PLR2004 - the version of IP
        self._transport = start = header.checksum_start
        self._protocol = IPPROTO_UDP if kind == GSO_UDP_L4 else IPPROTO_TCP
        self._check(kind, start)
        is_udp = self._protocol == IPPROTO_UDP
        size = UDP_HEADER_LENGTH if is_udp else int(packet[start + _TCP_DATA_OFFSET] >> 4) * 4
        self.header_length = start + size
        payload = len(packet) - self.header_length
        if payload <= 0 or size < (UDP_HEADER_LENGTH if is_udp else TCP_HEADER_LENGTH):
            raise MalformedSuperframe("the superframe has no payload")
        self.size = header.gso_size
        self.length = len(packet)
        self.count = -(-payload // self.size)
        self.packet_length = self.header_length + min(self.size, payload)
        self.last_length = self.header_length + payload - (self.count - 1) * self.size
        self.headers = packet[: self.header_length].tobytes()
        self._template = b""

    def _check(self, kind: int, start: int) -> None:
        """Raise MalformedSuperframe unless type, lengths and header fit each other."""
        version, _ = _PROTOCOLS.get(kind, (4 if self._is_ipv4 else 6, IPPROTO_UDP))
        shortest = IPV4_HEADER_LENGTH if self._is_ipv4 else IPV6_HEADER_LENGTH
        is_known = kind in _PROTOCOLS or kind == GSO_UDP_L4
        if not is_known or not self._header.gso_size or (version == 4) != self._is_ipv4:  # noqa: PLR2004
            raise MalformedSuperframe(f"type {kind} of a superframe does not fit its packet")
        size = UDP_HEADER_LENGTH if kind == GSO_UDP_L4 else TCP_HEADER_LENGTH
        if start % 4 or not shortest <= start <= len(self._packet) - size:
            raise MalformedSuperframe(f"the superframe has its transport header at {start}")

    def _make_template(self) -> None:
        """Make the headers of a packet in the middle, with the fields that differ from packet to packet at zero."""
        start, template = self._transport, bytearray(self.headers)
        self._identification = int.from_bytes(template[_IPV4_IDENTIFICATION:][:2])
        self._sequence = int.from_bytes(template[start + _TCP_SEQUENCE :][:4])
        self._flags = 0
        self._checksum = start + UDP_CHECKSUM
        if self._protocol == IPPROTO_TCP:
            self._flags = template[start + _TCP_FLAGS]
            template[start + _TCP_FLAGS] = self._flags & ~(FIN | PSH | CWR)
            self._checksum = start + TCP_CHECKSUM
        template[self._checksum : self._checksum + 2] = bytes(2)
        # Where lengths are, and what they do not count.
        self._lengths = [(_IPV4_LENGTH, 0) if self._is_ipv4 else (_IPV6_LENGTH, IPV6_HEADER_LENGTH)]
        if self._protocol == IPPROTO_UDP:
            self._lengths.append((start + _UDP_LENGTH, start))
        for offset, before in self._lengths:
            template[offset : offset + 2] = (self.packet_length - before).to_bytes(2)
        if self._is_ipv4:
            template[_IPV4_CHECKSUM : _IPV4_CHECKSUM + 2] = bytes(2)
            self._ip_sum = sum_of_words(template[:start]) - self._identification
        addresses = template[12:20] if self._is_ipv4 else template[8:40]
        self._pseudo = sum_of_words(addresses) + self._protocol + self.packet_length - start
        self._template = bytes(template)

    def fill(self, rows: Rows, first: int, count: int) -> None:
        """Write the packets `first` to `first + count - 1` into the first rows, with zeros behind each.

        The rows are at least as long as a data message of such a packet.
        """
        if not self._template:
            self._make_template()
        has_last = first + count == self.count
        full = count - has_last
        header, end = self.header_length, self.header_length + self.size
        bodies = rows.packets(0, len(rows.plaintexts[0]))[:count]
        bodies[:, :header] = np.frombuffer(self._template, np.uint8)
        begin = header + first * self.size
        middle = begin + full * self.size
        if full:
            bodies[:full, header:end] = self._packet[begin:middle].reshape(full, self.size)
            if end < bodies.shape[1]:
                bodies[:full, end:] = 0
        if has_last:
            self._fill_last(rows, full, middle)
        if self._protocol == IPPROTO_TCP:
            self._write_tcp(rows, first, count, has_last=has_last)
        if self._is_ipv4:
            self._write_identifications(rows, first, count, has_last=has_last)
        self._write_checksums(rows, count, has_last=has_last)

    def _fill_last(self, rows: Rows, row: int, begin: int) -> None:
        """Write the last packet, whose payload begins at `begin` in the superframe, and which may be shorter."""
        body = rows.packets(0, len(rows.plaintexts[0]))[row]
        body[self.header_length : self.last_length] = self._packet[begin:]
        body[self.last_length :] = 0
        for offset, before in self._lengths:
            rows.field(offset, ">u2")[row] = self.last_length - before

    def _write_tcp(self, rows: Rows, first: int, count: int, *, has_last: bool) -> None:
        """Write sequence numbers, and the flags that only the first or the last packet has."""
        start = self._sequence + first * self.size
        sequence = _NUMBERS[:count] * np.uint32(self.size)
        sequence += np.uint32(start & _32_BITS)
        rows.field(self._transport + _TCP_SEQUENCE, ">u4")[:count] = sequence
        flags = rows.field(self._transport + _TCP_FLAGS, "u1")
        if self._flags & CWR and not first:
            flags[0] |= CWR
        if has_last and self._flags & (FIN | PSH):
            flags[count - 1] |= self._flags & (FIN | PSH)

    def _write_identifications(self, rows: Rows, first: int, count: int, *, has_last: bool) -> None:
        """Write the identification of each IPv4 packet, one more than that before it, and the header checksum."""
        identification = _NUMBERS[:count] + np.uint32(self._identification + first)
        identification &= np.uint32(ONES)
        rows.field(_IPV4_IDENTIFICATION, ">u2")[:count] = identification
        # `complement` for numbers of 32 bits; sums of headers are never zero.
        identification += np.uint32(self._ip_sum % ONES + ONES - 1)
        if has_last:
            identification[-1] -= np.uint32(self.packet_length - self.last_length)
        identification %= np.uint32(ONES)
        rows.field(_IPV4_CHECKSUM, ">u2")[:count] = np.uint32(ONES - 1) - identification

    def _write_checksums(self, rows: Rows, count: int, *, has_last: bool) -> None:
        """Write the checksum of TCP or UDP, over pseudo header, header and payload."""
        sums = rows.sums(self._transport, count)
        sums += np.uint64(swapped(self._pseudo % ONES))
        if has_last:
            # The pseudo header has the length of the packet.
            sums[-1] += np.uint64(swapped(ONES - (self.packet_length - self.last_length)))
        rows.field(self._checksum, "<u2")[:count] = complement(sums, is_udp=self._protocol == IPPROTO_UDP)


def complete_checksums(rows: Rows, count: int, header: VirtioHeader) -> None:
    """Write the checksums of packets whose checksum field has the sum of the pseudo header only (NEEDS_CHECKSUM)."""
    sums = rows.sums(header.checksum_start, count)
    is_udp = header.checksum_offset == UDP_CHECKSUM
    rows.field(header.checksum_start + header.checksum_offset, "<u2")[:count] = complement(sums, is_udp=is_udp)


def complement(sums: Integers, *, is_udp: bool) -> Integers:
    """Return the checksums for these sums, which are not zero; it changes the array.

    A sum folds to a number of 1 to 65535, and its checksum is 65535 less that. In UDP a checksum of zero would mean
    none, so that it is sent as all ones.
    """
    sums += np.uint64(ONES - 1)
    sums %= np.uint64(ONES)
    checksums: Integers = np.uint64(ONES - 1) - sums
    if is_udp:
        checksums[checksums == 0] = ONES
    return checksums
