"""Join received packets of one flow into superframes, which the kernel handles as one.

Does what the kernel's GRO does (tcp_offload.c, udp_offload.c), and joins less rather than more: whoever cuts the
superframe again gets the same packets, byte for byte but for the IPv4 identification. No input or output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from refwg.engine.cut import IPPROTO_TCP, IPPROTO_UDP, PSH, TCP_CHECKSUM, UDP_CHECKSUM, UDP_HEADER_LENGTH
from refwg.engine.rows import ONES, sum_of_words, swapped
from refwg.engine.virtio import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CHECKSUM, VirtioHeader
from refwg.ip import IPV4_HEADER_LENGTH, IPV6_HEADER_LENGTH

if TYPE_CHECKING:
    from refwg.engine.rows import Bytes, Rows

_ACK: Final = 0x10
_IPV4: Final = 4
_IPV6: Final = 6
_IPV4_WITHOUT_OPTIONS: Final = 0x45
_DONT_FRAGMENT: Final = 0x4000
_LARGEST: Final = 65535
_TCP_SEQUENCE: Final = 4
_TCP_DATA_OFFSET: Final = 12
_TCP_FLAGS: Final = 13
_TCP_HEADER_LENGTH: Final = 20
_SEQUENCES: Final = 1 << 32
# Bytes that may differ between packets of one flow: lengths, identification, sequence number and checksums.
_MAY_DIFFER: Final = {_IPV4: (2, 3, 4, 5, 10, 11), _IPV6: (4, 5)}
_TCP_MAY_DIFFER: Final = (4, 5, 6, 7, 16, 17)
_UDP_MAY_DIFFER: Final = (4, 5, 6, 7)


class Run(NamedTuple):
    """Packets that can be delivered together: the rows from `first` to before `end`. One packet is delivered as it is.

    flow: None for one packet.
    """

    first: int
    end: int
    flow: Flow | None = None


class Flow(NamedTuple):
    """What the packets of a superframe have in common besides the bytes of their headers.

    transport: where the TCP or UDP header begins. header_length: where the payload begins.
    """

    version: int
    protocol: int
    transport: int
    header_length: int

    @property
    def checksum(self) -> int:
        """Where the checksum field is."""
        return self.transport + (TCP_CHECKSUM if self.protocol == IPPROTO_TCP else UDP_CHECKSUM)


class Joiner:
    """Finds the superframes among received packets; the arguments say which kinds the interface takes."""

    def __init__(self, *, tcp4: bool, tcp6: bool, udp4: bool, udp6: bool) -> None:
        self._kinds = {
            (_IPV4, IPPROTO_TCP): GSO_TCPV4 if tcp4 else 0,
            (_IPV6, IPPROTO_TCP): GSO_TCPV6 if tcp6 else 0,
            (_IPV4, IPPROTO_UDP): GSO_UDP_L4 if udp4 else 0,
            (_IPV6, IPPROTO_UDP): GSO_UDP_L4 if udp6 else 0,
        }
        self._masks: dict[Flow, bytes] = {}
        self._arrays: dict[Flow, Bytes] = {}

    def runs(self, rows: Rows, lengths: list[int]) -> list[Run]:
        """Return the packets in the first rows as runs, in order.

        lengths: of the packets, by their IP headers; each fits its row, behind it there are zeros.
        """
        flow = self._flow(rows.plaintexts[0], lengths[0])
        if flow is not None and len(lengths) > 1 and self._is_one_run(rows, flow, lengths):
            return [Run(0, len(lengths), flow)]
        return self._split(rows, lengths)

    def _flow(self, packet: memoryview, length: int) -> Flow | None:
        """Return the flow of a packet; None if a superframe cannot hold it.

        Whole TCP segments that only carry data (ACK, PSH) and whole UDP datagrams can be held; others, such as
        fragments, and packets with IP options or extension headers, cannot.
        """
        if packet[0] == _IPV4_WITHOUT_OPTIONS:
            version, protocol, transport = _IPV4, packet[9], IPV4_HEADER_LENGTH
            if int.from_bytes(packet[6:8]) & ~_DONT_FRAGMENT:
                return None
        elif packet[0] >> 4 == _IPV6 and length > IPV6_HEADER_LENGTH:
            version, protocol, transport = _IPV6, packet[6], IPV6_HEADER_LENGTH
        else:
            return None
        if not self._kinds.get((version, protocol)):
            return None
        if protocol == IPPROTO_UDP:
            size = UDP_HEADER_LENGTH
        elif length < transport + _TCP_HEADER_LENGTH or packet[transport + _TCP_FLAGS] & ~PSH != _ACK:
            return None
        else:
            size = packet[transport + _TCP_DATA_OFFSET] >> 4 << 2
            if size < _TCP_HEADER_LENGTH:
                return None
        return Flow(version, protocol, transport, transport + size) if length > transport + size else None

    # All packets at once: the usual case.

    def _is_one_run(self, rows: Rows, flow: Flow, lengths: list[int]) -> bool:
        """Return True if all packets make one superframe; flow: of the first."""
        count, length, last = len(lengths), lengths[0], lengths[-1]
        size = length - flow.header_length
        total = length + (count - 2) * size + last - flow.header_length
        if lengths.count(length) < count - 1 or not flow.header_length < last <= length or total > _LARGEST:
            return False
        headers = rows.packets(0, flow.header_length)[:count]
        if np.count_nonzero((headers ^ headers[0]) & self._array(flow)):
            return False
        if flow.protocol == IPPROTO_TCP:
            flags: list[int] = rows.field(flow.transport + _TCP_FLAGS, "u1")[: count - 1].tolist()
            sequence: list[int] = rows.field(flow.transport + _TCP_SEQUENCE, ">u4")[:count].tolist()
            if any(flag & PSH for flag in flags) or sequence != list(
                range(sequence[0], sequence[0] + count * size, size)
            ):
                return False
        elif not self._has_udp_fields(rows, flow, lengths):
            return False
        return self._are_sums_right(rows, flow, lengths)

    def _has_udp_fields(self, rows: Rows, flow: Flow, lengths: list[int]) -> bool:
        """Return True if all UDP lengths are right, and all have a checksum: without one nothing is checked later."""
        count = len(lengths)
        stated: list[int] = rows.field(flow.transport + 4, ">u2")[:count].tolist()
        checksums: list[int] = rows.field(flow.checksum, ">u2")[:count].tolist()
        return stated == [length - flow.transport for length in lengths] and 0 not in checksums

    def _are_sums_right(self, rows: Rows, flow: Flow, lengths: list[int]) -> bool:
        """Return True if the checksums of all packets are right: those of IPv4 headers, and those of TCP or UDP."""
        count = len(lengths)
        if flow.version == _IPV4 and np.count_nonzero(rows.sums(0, count, IPV4_HEADER_LENGTH)):
            return False
        sums = rows.sums(flow.transport, count)
        packet = rows.plaintexts[0]
        want = (ONES - swapped(_pseudo_header(flow, packet, lengths[0]))) % ONES
        last = (ONES - swapped(_pseudo_header(flow, packet, lengths[-1]))) % ONES
        return int(sums[-1]) == last and np.count_nonzero(sums[:-1] != np.uint64(want)) == 0

    def _array(self, flow: Flow) -> Bytes:
        array = self._arrays.get(flow)
        if array is None:
            array = self._arrays[flow] = np.frombuffer(self._mask(flow), np.uint8)
        return array

    def _mask(self, flow: Flow) -> bytes:
        """Return ones for all bits of the headers that must be equal in a superframe."""
        mask = self._masks.get(flow)
        if mask is None:
            bits = bytearray(b"\xff" * flow.header_length)
            may_differ = _TCP_MAY_DIFFER if flow.protocol == IPPROTO_TCP else _UDP_MAY_DIFFER
            for offset in (*_MAY_DIFFER[flow.version], *(flow.transport + offset for offset in may_differ)):
                bits[offset] = 0
            if flow.protocol == IPPROTO_TCP:
                bits[flow.transport + _TCP_FLAGS] = 0xFF & ~PSH
            mask = self._masks[flow] = bytes(bits)
        return mask

    # One packet after the other.

    def _split(self, rows: Rows, lengths: list[int]) -> list[Run]:
        runs: list[Run] = []
        first, flow, total = 0, self._checked_flow(rows, 0, lengths[0]), lengths[0]
        for row in range(1, len(lengths)):
            next_flow = self._checked_flow(rows, row, lengths[row])
            if flow is not None and flow == next_flow and lengths[row] <= lengths[row - 1] == lengths[first]:
                total += lengths[row] - flow.header_length
                if total <= _LARGEST and self._follows(rows, flow, row, lengths[row - 1]):
                    continue
            runs.append(Run(first, row, flow))
            first, flow, total = row, next_flow, lengths[row]
        return [*runs, Run(first, len(lengths), flow)]

    def _checked_flow(self, rows: Rows, row: int, length: int) -> Flow | None:
        """Return the flow of a packet whose lengths and checksums are right; else None."""
        packet = rows.plaintexts[row]
        flow = self._flow(packet, length)
        if flow is None:
            return None
        start = flow.transport
        if flow.version == _IPV4 and sum_of_words(packet[:start]):
            return None
        if flow.protocol == IPPROTO_UDP:
            stated, checksum = (
                int.from_bytes(packet[start + field : start + field + 2]) for field in (4, UDP_CHECKSUM)
            )
            if stated != length - start or not checksum:
                return None
        # The zeros behind a packet of odd length complete its last word.
        total = sum_of_words(bytes(packet[start:length]) + bytes(length % 2)) + _pseudo_header(flow, packet, length)
        return flow if total % ONES == 0 else None

    def _follows(self, rows: Rows, flow: Flow, row: int, length: int) -> bool:
        """Return True if a packet may stand behind the one in the row before it; length: of that one."""
        before, packet = (rows.plaintexts[number][: flow.header_length] for number in (row - 1, row))
        mask = int.from_bytes(self._mask(flow))
        if (int.from_bytes(before) ^ int.from_bytes(packet)) & mask:
            return False
        if flow.protocol == IPPROTO_UDP:
            return True
        start = flow.transport + _TCP_SEQUENCE
        expected = int.from_bytes(before[start : start + 4]) + length - flow.header_length
        # PSH ends a superframe.
        return (
            int.from_bytes(packet[start : start + 4]) == expected % _SEQUENCES
            and not before[flow.transport + _TCP_FLAGS] & PSH
        )

    # The superframe.

    def headers(self, rows: Rows, run: Run, flow: Flow, lengths: list[int]) -> tuple[VirtioHeader, bytearray]:
        """Return what stands in front of the payloads of a run: virtio header, and the headers of IP and TCP or UDP."""
        start, size = flow.transport, flow.header_length
        header = bytearray(rows.plaintexts[run.first][:size])
        payload = lengths[run.first] - size
        total = size + payload * (run.end - run.first - 1) + lengths[run.end - 1] - size
        if flow.version == _IPV4:
            header[2:4] = total.to_bytes(2)
            header[10:12] = bytes(2)
            header[10:12] = ((ONES - sum_of_words(header[:start])) % ONES).to_bytes(2)
        else:
            header[4:6] = (total - start).to_bytes(2)
        if flow.protocol == IPPROTO_TCP:
            header[start + _TCP_FLAGS] |= rows.plaintexts[run.end - 1][start + _TCP_FLAGS] & PSH
        else:
            header[start + 4 : start + 6] = (total - start).to_bytes(2)
        header[flow.checksum : flow.checksum + 2] = _pseudo_header(flow, header, total).to_bytes(2)
        virtio = VirtioHeader(
            flags=NEEDS_CHECKSUM,
            gso_type=self._kinds[flow.version, flow.protocol],
            header_length=size,
            gso_size=payload,
            checksum_start=start,
            checksum_offset=flow.checksum - start,
        )
        return virtio, header


def _pseudo_header(flow: Flow, packet: bytearray | memoryview, length: int) -> int:
    """Return the sum of the pseudo header of a packet of this length, modulo 2^16 - 1."""
    addresses = packet[12:20] if flow.version == _IPV4 else packet[8:40]
    return (sum_of_words(addresses) + flow.protocol + length - flow.transport) % ONES
