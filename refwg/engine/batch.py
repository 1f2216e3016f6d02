"""Move many packets at a time, with the results of the simple engine.

The kernel passes packets of one flow as one superframe (TSO, USO), takes datagrams as one batch (UDP_SEGMENT) and gives
them as one (UDP_GRO). Routes, peers, sessions and timers are then looked at once for all of them, and numpy does what
must be done for each packet but encryption. Whatever is not plain sailing goes packet by packet, through the code of
the simple engine, so that there is one place for every rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, cast

import numpy as np

from refwg import ip
from refwg.boundary import Transmit
from refwg.engine.cut import UDP_CHECKSUM, Superframe, complete_checksums
from refwg.engine.join import Joiner
from refwg.engine.offloads import UDP_GRO, UDP_SEGMENT, offload_of
from refwg.engine.rows import ARENA_LENGTH, LARGEST_READ, ONES, Arena, Nonces, sum_of_words
from refwg.engine.sealing import Messages, is_run, open_all, openers, packet_lengths, seal
from refwg.engine.simple import SimpleEngine
from refwg.engine.virtio import HEADER_LENGTH, LARGEST_FRAME, NEEDS_CHECKSUM, PLAIN_HEADER, parse
from refwg.errors import DropReason, MalformedSuperframe
from refwg.messages import (
    MINIMUM_DATA_LENGTH,
    REJECT_AFTER_MESSAGES,
    MessageType,
    padded_length,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from refwg.device import Reserved
    from refwg.engine.join import Flow, Run
    from refwg.engine.offloads import Offloads
    from refwg.engine.rows import Rows
    from refwg.engine.simple import Surroundings
    from refwg.engine.virtio import VirtioHeader
    from refwg.noise import Keypair
    from refwg.peer import Peer
    from refwg.socket import ReceivedBatch

# Most packets and superframes of the interface, and most batches of a socket, in one turn.
_PACKETS_IN_TURN: Final = 64
_SUPERFRAMES_IN_TURN: Final = 4
_BATCHES_IN_TURN: Final = 8
# UDP_MAX_SEGMENTS of Linux before 6.9.
_SEGMENTS: Final = 64
# Headers of IPv6 and TCP without options: the fewest bytes of a packet of a superframe that are no payload.
_HEADERS: Final = 60
# The largest payload of a UDP datagram over IPv4, and so of a batch.
_LARGEST_BATCH: Final = 65507
_IPV4: Final = 4
# The shortest data message with a packet in it.
_SHORTEST: Final = MINIMUM_DATA_LENGTH + ip.IPV4_HEADER_LENGTH
# Fewer received messages are faster one by one: numpy takes 80 microseconds for any number of them.
_WORTHWHILE: Final = 4
# Refusals of a batch whose datagrams may be sent one by one: the outgoing interface computes no checksums, a datagram
# must be fragmented, or the kernel has no UDP_SEGMENT.
_ONE_BY_ONE: Final = frozenset({"EIO", "EMSGSIZE", "EINVAL", "EOPNOTSUPP"})


class _Single(NamedTuple):
    """A packet of the interface that is no superframe; header: None if it has its checksum."""

    packet: bytes
    header: VirtioHeader | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What packets that are handled together have in common: length, destination, ECN bits, checksum to compute."""
        header, packet = self.header, self.packet
        checksum = (header.checksum_start, header.checksum_offset) if header else None
        if not ip.version(packet):
            return ()
        return len(packet), ip.destination(packet), ip.ecn(packet), checksum


class BatchEngine(SimpleEngine):
    """Moves packets in both directions in batches.

    offloads: those that are switched on. worthwhile: as many received messages are processed together, and fewer one
    by one.
    """

    def __init__(self, surroundings: Surroundings, *, offloads: Offloads, worthwhile: int = _WORTHWHILE) -> None:
        super().__init__(surroundings)
        self._offloads = offloads
        self._frame_view = memoryview(bytearray(LARGEST_FRAME))
        self._frame = np.frombuffer(self._frame_view, np.uint8)
        self._outbox, self._inbox = Arena(ARENA_LENGTH), Arena(ARENA_LENGTH)
        self._inbox_view = self._inbox.memory[:LARGEST_READ]
        self._nonces = Nonces()
        self._joiner = Joiner(
            tcp4="tso4" in offloads, tcp6="tso6" in offloads, udp4="uso4" in offloads, udp6="uso6" in offloads
        )
        self._fitted_mtu = 0
        self._worthwhile = worthwhile
        # The last turn with packets of the interface had one: probably the next will have one as well.
        self._was_alone = False
        self._room = HEADER_LENGTH if self._tun.has_headers else 0

    def close(self) -> None:
        """Report how often each offload was used."""
        self._offloads.close()

    # From the interface.

    def _fit_superframes(self) -> None:
        """Let the kernel make superframes that one batch of datagrams can hold."""
        self._fitted_mtu = mtu = self._tun.link.mtu
        messages = min(_SEGMENTS, _LARGEST_BATCH // (mtu + MINIMUM_DATA_LENGTH))
        if messages > 1:
            self._tun.limit_superframes(messages * (mtu - _HEADERS) + _HEADERS)

    def packets_waiting(self) -> None:
        """Read, encrypt and send packets of the interface; call it when the interface is readable."""
        if self._fitted_mtu != self._tun.link.mtu:
            self._fit_superframes()
        frame, room = self._frame_view, self._room
        singles: list[_Single] = []
        count = superframes = 0
        while len(singles) < _PACKETS_IN_TURN and superframes < _SUPERFRAMES_IN_TURN:
            length = self._tun.read_into(frame)
            if not length:
                break
            if not self._device.is_up:
                continue
            count += 1
            # The first two bytes of the header say whether there is anything to do.
            header = parse(frame) if room and (frame[0] or frame[1]) else None
            if header is None or not header.gso_type:
                is_partial = header is not None and header.flags & NEEDS_CHECKSUM
                singles.append(_Single(bytes(frame[room:length]), header if is_partial else None))
                if self._was_alone and count == 1:
                    # It is sent before the next read: a system call that finds nothing would delay it.
                    self._send_single(singles.pop())
                continue
            self._send_singles(singles)
            singles.clear()
            superframes += 1
            self._send_superframe(header, length)
            # Workers may still need the last one.
            frame = self._frame_view
        self._send_singles(singles)
        if count:
            self._was_alone = count == 1

    def _send_superframe(self, header: VirtioHeader, length: int) -> None:
        try:
            superframe = Superframe(self._frame[self._room : length], header)
        except MalformedSuperframe:
            self._device.drop(DropReason.MALFORMED_SUPERFRAME, None, self._clock())
            return
        now = self._clock()
        headers = superframe.headers
        self._offloads.count("out", offload_of(header.gso_type, is_ipv4=headers[0] >> 4 == _IPV4))
        mtu = self._mtu_for(headers)
        reserved = self._device.reserve(headers, superframe.count, now)
        length = padded_length(superframe.packet_length, mtu) + MINIMUM_DATA_LENGTH
        step = max(1, min(self._outbox.rows(length).count, _SEGMENTS, _LARGEST_BATCH // length))
        sent = 0
        for first in range(0, superframe.count, step):
            count = min(step, superframe.count - first)
            last = superframe.last_length if first + count == superframe.count else superframe.packet_length
            rows = self._outbox.rows(length)
            if reserved is None:
                superframe.fill(rows, first, count)
                self._send_one_by_one(rows, count, superframe.packet_length, last, mtu)
            else:
                messages = Messages(rows, count, padded_length(last, mtu) + MINIMUM_DATA_LENGTH)
                sent += self._cut_and_send(superframe, first, messages, reserved)
        if reserved is not None:
            self._report_sent(reserved, sent)

    def _send_singles(self, singles: list[_Single]) -> None:
        """Send packets that were read one by one; those of one kind that follow each other are sent together."""
        if len(singles) == 1:
            self._send_single(singles[0])
            return
        first = 0
        kinds = [single.kind for single in singles]
        for position in range(1, len(singles) + 1):
            if position < len(singles) and kinds[position] == kinds[first] and kinds[first]:
                continue
            if position == first + 1:
                self._send_single(singles[first])
            else:
                self._send_equals(singles[first:position])
            first = position

    def _send_single(self, single: _Single) -> None:
        packet = single.packet
        if single.header is not None:
            packet = _with_checksum(packet, single.header)
        self.carry_out(self._device.send_packet(packet, self._mtu_for(packet), self._clock()))

    def _send_equals(self, singles: list[_Single]) -> None:
        """Send packets of one kind together."""
        packet, header = singles[0]
        length, count = len(packet), len(singles)
        mtu = self._mtu_for(packet)
        rows = self._outbox.rows(padded_length(length, mtu) + MINIMUM_DATA_LENGTH)
        if count > min(rows.count, _SEGMENTS, _LARGEST_BATCH // rows.length):
            for single in singles:
                self._send_single(single)
            return
        now = self._clock()
        reserved = self._device.reserve(packet, count, now)
        bodies = rows.packets(0, len(rows.plaintexts[0]))[:count]
        bodies[:, :length] = np.frombuffer(b"".join(single.packet for single in singles), np.uint8).reshape(
            count, length
        )
        bodies[:, length:] = 0
        if header is not None:
            complete_checksums(rows, count, header)
        if reserved is None:
            self._send_one_by_one(rows, count, length, length, mtu)
            return
        messages = Messages(rows, count, rows.length)
        self._report_sent(reserved, self._seal_and_send(messages, reserved, reserved.first_counter))

    def _send_one_by_one(self, rows: Rows, count: int, length: int, last_length: int, mtu: int) -> None:
        """Pass packets in rows to the device one by one, as the simple engine does."""
        for row in range(count):
            packet = bytes(rows.plaintexts[row][: last_length if row == count - 1 else length])
            self.carry_out(self._device.send_packet(packet, mtu, self._clock()))

    def _cut_and_send(self, superframe: Superframe, first: int, messages: Messages, reserved: Reserved) -> int:
        """Cut packets from the `first` on out of a superframe, and `_seal_and_send` them."""
        superframe.fill(messages.rows, first, messages.number)
        return self._seal_and_send(messages, reserved, reserved.first_counter + first)

    def _seal_and_send(self, messages: Messages, reserved: Reserved, counter: int) -> int:
        """Encrypt packets where they are and send the messages; returns the bytes of those not yet reported as sent."""
        seal(messages, reserved.keypair.sending, reserved.keypair.remote_index, counter, self._nonces)
        return self._send_sealed(messages, reserved)

    def _report_sent(self, reserved: Reserved, length: int) -> None:
        """Report to the device what was sent; length: the bytes of messages not yet reported as sent."""
        self.carry_out(self._device.sent_together(reserved, length, self._clock()))

    def _send_sealed(self, messages: Messages, reserved: Reserved) -> int:
        """Send encrypted messages; returns the bytes of those not yet reported as sent."""
        rows, count, last_length = messages
        if count > 1 and UDP_SEGMENT in self._offloads:
            datagrams = rows.messages(count, last_length)
            error = self._sockets.send(self._transmit(datagrams, reserved), rows.length)
            if not error:
                self._offloads.count("out", UDP_SEGMENT)
                return len(datagrams)
            if error not in _ONE_BY_ONE:
                self._not_sent(error)
                for transmit in self._transmits(rows, count, last_length, reserved):
                    self._device.send_failed(transmit, self._clock(), error)
                return 0
        self.carry_out(self._transmits(rows, count, last_length, reserved))
        return 0

    def _transmits(self, rows: Rows, count: int, last_length: int, reserved: Reserved) -> list[Transmit[Peer]]:
        lengths = [rows.length] * (count - 1) + [last_length]
        return [self._transmit(rows.message(row, length), reserved) for row, length in enumerate(lengths)]

    def _transmit(self, messages: memoryview, reserved: Reserved) -> Transmit[Peer]:
        # sendmsg(2) takes a view as well as bytes.
        datagrams = cast("bytes", messages)
        return Transmit(datagrams, reserved.endpoint, reserved.ecn, reserved.peer, carries_data=True)

    # From the network.

    def datagrams_waiting(self, sock: socket.socket, most: int = _BATCHES_IN_TURN) -> None:
        """Read, decrypt and deliver batches of a socket, at most so many; call it when the socket is readable."""
        for _ in range(most):
            batch = self._sockets.receive_into(sock, self._inbox_view)
            if batch is None:
                return
            if batch.length > batch.segment:
                self._offloads.count("in", UDP_GRO)
                self._receive_batch(batch)
            else:
                self._receive_single(self._inbox_view[: batch.length], batch)

    def _receive_single(self, datagram: memoryview, batch: ReceivedBatch) -> None:
        self.carry_out(self._device.receive_datagram(bytes(datagram), batch.endpoint, batch.ecn, self._clock()))

    def _receive_batch(self, batch: ReceivedBatch) -> None:
        """Process datagrams that came together: data messages of one session as a whole, everything else one by one."""
        view = self._inbox_view
        count = -(-batch.length // batch.segment)
        rows = self._inbox.rows(batch.segment) if batch.segment >= _SHORTEST and count >= self._worthwhile else None
        last = batch.length - (count - 1) * batch.segment
        together = count if last >= _SHORTEST else count - 1
        session = self._session(rows, together) if rows is not None else None
        if rows is None or session is None:
            together = 0
        else:
            messages = Messages(rows, together, last if together == count else batch.segment)
            self._receive_together(messages, session, batch)
        for start in range(together * batch.segment, batch.length, batch.segment):
            self._receive_single(view[start : min(start + batch.segment, batch.length)], batch)

    def _session(self, rows: Rows, count: int) -> tuple[Peer, Keypair] | None:
        """Return the session of messages that are all data with one receiver index; None for any others."""
        if not 0 < count <= rows.count:
            return None
        heads = rows.types_and_indices[:count]
        kind, index = int(heads[0]) & 0xFFFF_FFFF, int(heads[0]) >> 32
        if kind != MessageType.DATA or (heads != heads[0]).any():
            return None
        return self._device.session(index, self._clock())

    def _receive_together(self, messages: Messages, session: tuple[Peer, Keypair], batch: ReceivedBatch) -> None:
        """Decrypt messages of one session where they are, and deliver the packets in them."""
        opened = self._open(messages, session)
        lengths = packet_lengths(messages) if len(opened) == messages.number else None
        packets = None if lengths is None else (lengths, self._joiner.runs(messages.rows, lengths))
        self._deliver_opened(messages, opened, packets, session, batch)

    def _deliver_opened(
        self,
        messages: Messages,
        opened: list[int],
        packets: tuple[list[int], list[Run]] | None,
        session: tuple[Peer, Keypair],
        batch: ReceivedBatch,
    ) -> None:
        """Report messages that were decrypted and accepted, and deliver the packets in them.

        opened: their rows. packets: the lengths of all packets, and the packets as runs; None: look at each.
        """
        if not opened:
            return
        rows, padded = messages.rows, messages.padded
        peer, keypair = session
        now = self._clock()
        self.carry_out(self._device.received_together(peer, keypair, batch.endpoint, len(opened), now))
        if packets is not None and self._may_deliver(rows, peer, batch.ecn):
            peer.count_received(sum(padded) + len(padded) * MINIMUM_DATA_LENGTH)
            self._deliver(rows, *packets, peer)
            return
        for row in opened:
            plaintext = bytes(rows.plaintexts[row][: padded[row]])
            packet = self._device.accept_packet(peer, plaintext, batch.ecn, now)
            if packet is not None:
                self._write([PLAIN_HEADER, packet], peer)

    def _open(self, messages: Messages, session: tuple[Peer, Keypair]) -> list[int]:
        """Decrypt messages, mark their counters as received, and count those that are refused; returns the others."""
        peer, keypair = session
        counters: list[int] = messages.rows.counters[: messages.number].tolist()
        if is_run(counters) and keypair.receiving_counter.is_next_run(counters[0], counters[-1]):
            failed = open_all(messages, keypair.receiving, self._nonces)
            return self._accept_opened(counters, failed, session)
        # A replay must not cost a decryption.
        functions = openers(messages, keypair.receiving, self._nonces)
        numbered = enumerate(zip(counters, functions, strict=True))
        now = self._clock()
        return [row for row, (counter, opens) in numbered if self._accept(keypair, counter, opens, peer, now)]

    def _accept_opened(self, counters: list[int], failed: list[int], session: tuple[Peer, Keypair]) -> list[int]:
        """Mark the counters of decrypted messages as received; returns the rows of those that are accepted.

        failed: the rows of those whose tags do not verify.
        """
        peer, keypair = session
        window = keypair.receiving_counter
        if not failed and is_run(counters) and window.is_next_run(counters[0], counters[-1]):
            window.accept_run(counters[0], counters[-1])
            return list(range(len(counters)))
        now = self._clock()
        return [
            row
            for row, counter in enumerate(counters)
            if self._accept(keypair, counter, lambda row=row: row not in failed, peer, now)  # type: ignore[misc]
        ]

    def _accept(self, keypair: Keypair, counter: int, is_authentic: Callable[[], bool], peer: Peer, now: int) -> bool:
        """Mark the counter of one message of a batch as received; returns False if the message was refused.

        is_authentic: called if the counter is fresh; tells whether the tag verifies.
        """
        window = keypair.receiving_counter
        reason = None
        if window.is_exhausted:
            reason = DropReason.SESSION_EXPIRED
        elif not window.is_fresh(counter):
            reason = DropReason.COUNTER_LIMIT if counter >= REJECT_AFTER_MESSAGES else DropReason.REPLAY
        elif not is_authentic():
            reason = DropReason.INVALID_TAG
        if reason is not None:
            self._device.drop(reason, peer, now)
            return False
        window.accept(counter)
        return True

    def _may_deliver(self, rows: Rows, peer: Peer, ecn: int) -> bool:
        """Return True if packets with the ECN bits and the source of the first may be delivered as they are."""
        head = bytes(rows.plaintexts[0][: ip.IPV6_HEADER_LENGTH])
        return ip.decapsulate_ecn(head, ecn) is head and self._device.is_source_allowed(peer, ip.source(head))

    def _deliver(self, rows: Rows, lengths: list[int], runs: list[Run], peer: Peer) -> None:
        for run in runs:
            if run.end == run.first + 1 or not self._deliver_superframe(rows, run, lengths):
                for row in range(run.first, run.end):
                    self._write([PLAIN_HEADER, rows.plaintexts[row][: lengths[row]]], peer)

    def _deliver_superframe(self, rows: Rows, run: Run, lengths: list[int]) -> bool:
        """Pass packets to the kernel as a superframe; returns False if it refused that."""
        flow = cast("Flow", run.flow)
        virtio, header = self._joiner.headers(rows, run, flow, lengths)
        payloads = rows.slices(flow.header_length, lengths[run.first])[run.first : run.end - 1]
        last = rows.plaintexts[run.end - 1][flow.header_length : lengths[run.end - 1]]
        if not self._tun.write_parts([virtio.to_bytes(), header, *payloads, last]):
            return False
        self._offloads.count("in", offload_of(virtio.gso_type, is_ipv4=flow.version == _IPV4))
        return True

    def _write(self, parts: list[bytes | bytearray | memoryview], peer: Peer) -> None:
        if not self._tun.write_parts(parts if self._room else parts[1:]):
            self._device.drop(DropReason.NOT_DELIVERED, peer, self._clock())


def _with_checksum(packet: bytes, header: VirtioHeader) -> bytes:
    """Return a packet with its checksum, whose field holds the sum of the pseudo header only (NEEDS_CHECKSUM)."""
    payload = packet[header.checksum_start :]
    checksum = (ONES - sum_of_words(payload + bytes(len(payload) % 2))) % ONES
    if not checksum and header.checksum_offset == UDP_CHECKSUM:
        checksum = ONES
    field = header.checksum_start + header.checksum_offset
    return packet[:field] + checksum.to_bytes(2) + packet[field + 2 :]
