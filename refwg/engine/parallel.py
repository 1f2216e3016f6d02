"""Let workers encrypt and decrypt batches; send and deliver them in their order.

Does what the driver does with its queues of each peer (wg_packet_tx_worker in send.c, wg_packet_rx_poll in receive.c):
packets are encrypted and decrypted by any CPU, and each peer has a queue for either direction that is served from its
head, while that is done. Everything that changes a peer happens then, in that order: the replay window, timers,
endpoint, statistics. So the results are those of the batch engine.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

from refwg.boundary import Deliver, Transmit
from refwg.engine.batch import BatchEngine
from refwg.engine.jobs import Areas, Job, Kind, Workbench
from refwg.engine.rows import LARGEST_READ
from refwg.engine.virtio import HEADER_LENGTH
from refwg.engine.workers import Pool
from refwg.errors import DropReason, Shortage
from refwg.messages import MINIMUM_DATA_LENGTH, MessageType
from refwg.shortage import as_shortage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from refwg.device import Effect, Reserved
    from refwg.engine.cut import Superframe
    from refwg.engine.jobs import Answer
    from refwg.engine.offloads import Offloads
    from refwg.engine.rows import Arena
    from refwg.engine.sealing import Messages
    from refwg.engine.simple import Surroundings
    from refwg.noise import Keypair
    from refwg.peer import Peer
    from refwg.socket import ReceivedBatch

# Smaller batches are not worth waking a worker, unless the peer's queue must be kept in order anyway.
_FOR_WORKERS: Final = 8
# Batches in each direction that can be in work: each worker has one, and a next one that waits for it.
_BATCHES_PER_WORKER: Final = 2
# MAX_QUEUED_PACKETS of the driver: what waits behind a batch.
_LONGEST_QUEUE: Final = 1024
# Where a data message has its receiver index.
_INDEX: Final = slice(4, 8)
# Seconds.
_LAST_WAIT: Final = 0.2


class _Entry:
    """One place in a queue of a peer; conclude: called when it is at the head, with the answer of a job.

    is_done: False while a worker has it.
    """

    __slots__ = ("answer", "conclude", "is_done")

    def __init__(self, conclude: Callable[[Answer | None], None], *, is_done: bool) -> None:
        self.conclude = conclude
        self.is_done = is_done
        self.answer: Answer | None = None


_Queues = dict["Peer", deque[_Entry]]


class ParallelEngine(BatchEngine):
    """Moves packets in batches that workers encrypt and decrypt.

    workers: how many, at least one. complain: called with a topic and a message when one has died.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        offloads: Offloads,
        workers: int,
        complain: Callable[[str, str], None] = lambda _topic, _message: None,
        threads: bool | None = None,
    ) -> None:
        """Start the workers; threads: as in `Pool`."""
        super().__init__(surroundings, offloads=offloads)
        # One batch in work for each, and one that is being filled.
        depth = workers * _BATCHES_PER_WORKER + 1
        # Anonymous and shared: forked workers see it, and nothing else does.
        memory = memoryview(mmap.mmap(-1, Areas.size(depth, 2 * depth)))
        self._areas = Areas(memory, depth, 2 * depth)
        self._free_frames = deque(range(depth))
        self._free_outboxes = deque(range(depth))
        self._free_inboxes = deque(range(depth, 2 * depth))
        self._sending: _Queues = {}
        self._receiving: _Queues = {}
        self._in_work: dict[int, _Entry] = {}
        self._served: deque[_Entry] | None = None
        self._complain = complain
        self.pool = Pool(
            workers,
            lambda: Workbench(Areas(memory, depth, 2 * depth), self._joiner),
            clock=self._clock,
            complain=complain,
            threads=threads,
        )
        self._take_frame()
        self._take_outbox()
        self._take_inbox()

    def close(self) -> None:
        """Send and deliver what is in work, end the workers, and report how often each offload was used."""
        # A worker that does not answer must not delay the end.
        while self._in_work and self._collect(_LAST_WAIT):
            pass
        self.pool.close()
        super().close()

    # Jobs and queues.

    def work_done(self) -> None:
        """Send and deliver batches that are done; call it when `pool` is readable."""
        self._collect(0)

    def settle(self) -> None:
        """Wait until no batch is in work, and all are sent and delivered."""
        while self._in_work:
            self._collect(None)
        while self._sending or self._receiving:
            self._serve_queues()

    def time_passed(self) -> None:
        """As in the simple engine; also look after the workers."""
        self.pool.tend()
        self._serve_queues()
        super().time_passed()

    def next_deadline(self) -> int | None:
        """Return when `time_passed` must be called even without an event, in nanoseconds; None: never."""
        deadlines = (super().next_deadline(), self.pool.next_deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def carry_out(self, effects: Sequence[Effect]) -> None:
        """Carry out effects; data of a peer with batches in work waits behind them."""
        for effect in effects:
            queue = self._queue_of(effect)
            if queue is None or queue is self._served:
                super().carry_out([effect])
            else:
                queue.append(_Entry(self._later(effect), is_done=True))

    def _queue_of(self, effect: Effect) -> deque[_Entry] | None:
        """Return the queue in which an effect must wait; None: there is none, or it does not matter for the order."""
        if isinstance(effect, Deliver):
            return self._receiving.get(effect.peer)
        if isinstance(effect, Transmit) and effect.peer is not None and effect.datagram[0] == MessageType.DATA:
            return self._sending.get(effect.peer)
        return None

    def _later(self, effect: Effect) -> Callable[[Answer | None], None]:
        return lambda _: super(ParallelEngine, self).carry_out([effect])

    def _begin(self, job: Job, queues: _Queues, peer: Peer, conclude: Callable[[Answer | None], None]) -> None:
        """Pass a job to a worker; conclude: called with its answer, None if it is lost, at its turn."""
        entry = _Entry(conclude, is_done=False)
        queues.setdefault(peer, deque()).append(entry)
        self._in_work[job.arena] = entry
        answer = self.pool.submit(job)
        if answer is not None:
            self._finish(job.arena, answer)
            self._serve_queues()

    def _finish(self, arena: int, answer: Answer | None) -> None:
        entry = self._in_work.pop(arena)
        entry.answer, entry.is_done = answer, True

    def _collect(self, timeout: float | None) -> bool:
        """Take answers of workers, and conclude what is its turn; returns whether there were any."""
        answers = self.pool.answers(timeout)
        for arena, answer in answers:
            self._finish(arena, answer)
        self._serve_queues()
        return bool(answers)

    def _serve_queues(self) -> None:
        """Conclude what is done at the head of each queue."""
        # Received packets may cause messages, which then need not wait for the next turn.
        for queues in (self._receiving, self._sending):
            for peer, queue in list(queues.items()):
                self._serve(queue)
                if not queue:
                    del queues[peer]

    def _serve(self, queue: deque[_Entry]) -> None:
        self._served = queue
        while queue and queue[0].is_done:
            entry = queue.popleft()
            # A shortage must cost this batch only, and not the one that is being read meanwhile.
            try:
                with as_shortage("a batch could not be sent or delivered"):
                    entry.conclude(entry.answer)
            except Shortage as shortage:
                self._complain("turn", str(shortage))
        self._served = None

    # Areas of the shared memory.

    def _take(self, free: deque[int]) -> int:
        """Take an area; if all are in work, wait for a batch to be done."""
        while not free:
            self._collect(None if self._in_work else 0)
        return free.popleft()

    def _take_frame(self) -> None:
        self._frame_number = self._take(self._free_frames)
        self._frame_view = self._areas.frames[self._frame_number]
        self._frame = np.frombuffer(self._frame_view, np.uint8)

    def _take_outbox(self) -> None:
        self._outbox_number = self._take(self._free_outboxes)
        self._outbox: Arena = self._areas.arenas[self._outbox_number]

    def _take_inbox(self) -> None:
        self._inbox_number = self._take(self._free_inboxes)
        self._inbox: Arena = self._areas.arenas[self._inbox_number]
        self._inbox_view = self._inbox.memory[:LARGEST_READ]

    def _is_for_workers(self, messages: Messages, queues: _Queues, peer: Peer) -> bool:
        return messages.number >= _FOR_WORKERS or peer in queues

    # From the interface.

    def _cut_and_send(self, superframe: Superframe, first: int, messages: Messages, reserved: Reserved) -> int:
        is_whole = messages.number == superframe.count
        if not is_whole or not self._is_for_workers(messages, self._sending, reserved.peer):
            return super()._cut_and_send(superframe, first, messages, reserved)
        frame = self._frame_number
        self._begin_sealing(messages, reserved, reserved.first_counter, HEADER_LENGTH + superframe.length, frame)
        self._take_frame()
        return 0

    def _seal_and_send(self, messages: Messages, reserved: Reserved, counter: int) -> int:
        if not self._is_for_workers(messages, self._sending, reserved.peer):
            return super()._seal_and_send(messages, reserved, counter)
        self._begin_sealing(messages, reserved, counter)
        return 0

    def _begin_sealing(
        self, messages: Messages, reserved: Reserved, counter: int, frame_length: int = 0, frame: int = 0
    ) -> None:
        """Let a worker encrypt a batch; frame: the area of the superframe that it is cut from, if there is a length."""
        keypair, arena = reserved.keypair, self._outbox_number
        job = Job(
            kind=Kind.CUT if frame_length else Kind.SEAL,
            arena=arena,
            packets=messages.number,
            length=messages.rows.length,
            last_length=messages.last_length,
            remote_index=keypair.remote_index,
            first_counter=counter,
            frame=frame,
            frame_length=frame_length,
            key=keypair.sending.key,
        )

        def conclude(answer: Answer | None) -> None:
            """Send the batch, and free its memory."""
            try:
                if answer is None:
                    self._drop_lost(messages, reserved.peer)
                length = 0 if answer is None else self._send_sealed(messages, reserved)
                super(ParallelEngine, self)._report_sent(reserved, length)
            finally:
                self._free_outboxes.append(arena)
                if frame_length:
                    self._free_frames.append(frame)

        self._begin(job, self._sending, reserved.peer, conclude)
        self._take_outbox()

    def _report_sent(self, reserved: Reserved, length: int) -> None:
        # What is in work is reported when it has been sent.
        if length or reserved.peer not in self._sending:
            super()._report_sent(reserved, length)

    def _drop_lost(self, messages: Messages, peer: Peer) -> None:
        now = self._clock()
        for _ in range(messages.number):
            self._device.drop(DropReason.WORKER_DIED, peer, now)

    # From the network.

    def _receive_single(self, datagram: memoryview, batch: ReceivedBatch) -> None:
        queue = self._queue_of_datagram(datagram) if self._receiving else None
        if queue is None:
            super()._receive_single(datagram, batch)
            return
        copy = memoryview(bytes(datagram))
        queue.append(_Entry(lambda _: super(ParallelEngine, self)._receive_single(copy, batch), is_done=True))
        while len(queue) >= _LONGEST_QUEUE:
            self._collect(None)

    def _queue_of_datagram(self, datagram: memoryview) -> deque[_Entry] | None:
        """Return the queue of the peer that a data message belongs to; None: it need not wait."""
        if len(datagram) < MINIMUM_DATA_LENGTH or datagram[0] != MessageType.DATA:
            return None
        session = self._device.session(int.from_bytes(datagram[_INDEX], "little"), self._clock())
        return None if session is None else self._receiving.get(session[0])

    def _receive_together(self, messages: Messages, session: tuple[Peer, Keypair], batch: ReceivedBatch) -> None:
        if not self._is_for_workers(messages, self._receiving, session[0]):
            super()._receive_together(messages, session, batch)
            return
        arena = self._inbox_number
        job = Job(
            kind=Kind.OPEN,
            arena=arena,
            packets=messages.number,
            length=messages.rows.length,
            last_length=messages.last_length,
            remote_index=0,
            first_counter=0,
            frame=0,
            frame_length=0,
            key=session[1].receiving.key,
        )

        def conclude(answer: Answer | None) -> None:
            """Accept and deliver the batch, and free its memory."""
            try:
                if answer is None:
                    self._drop_lost(messages, session[0])
                else:
                    self._deliver_answer(messages, answer, session, batch)
            finally:
                self._free_inboxes.append(arena)

        self._begin(job, self._receiving, session[0], conclude)
        self._take_inbox()

    def _deliver_answer(
        self, messages: Messages, answer: Answer, session: tuple[Peer, Keypair], batch: ReceivedBatch
    ) -> None:
        counters: list[int] = messages.rows.counters[: messages.number].tolist()
        # counter_validate runs here, in order, as in wg_packet_rx_poll: replays were decrypted for nothing.
        opened = self._accept_opened(counters, answer.failed, session)
        lengths = answer.lengths if len(opened) == messages.number else None
        packets = None if lengths is None else (lengths, answer.runs)
        self._deliver_opened(messages, opened, packets, session, batch)
