"""Check the queues against lists, and the load state against all earlier queue lengths."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from refwg.messages import SECOND
from refwg.queueing import HandshakeQueue, LastUnderLoad, StagedQueue

# The driver's MAX_STAGED_PACKETS and MAX_QUEUED_INCOMING_HANDSHAKES, of which an eighth means load.
STAGED, HANDSHAKES = 128, 4096
EIGHTH = HANDSHAKES // 8
DEVICES = st.sampled_from([0, 1])
LENGTHS = st.sampled_from([0, 1, EIGHTH - 1, EIGHTH, HANDSHAKES, HANDSHAKES + 1])
batch_sizes = st.one_of(st.integers(0, 3), st.sampled_from([STAGED - 1, STAGED, STAGED + 1]), st.integers(0, 300))


class StagedQueueAgainstList(RuleBasedStateMachine):
    """The queue equals a list that is cut to its newest 128 packets before each batch."""

    @initialize()
    def begin(self) -> None:
        self.queue: StagedQueue[int] = StagedQueue()
        self.waiting: list[int] = []
        self.taken: list[int] = []
        self.staged = self.dropped = self.sent = 0

    @rule(size=batch_sizes)
    def stage(self, size: int) -> None:
        batch = list(range(self.staged, self.staged + size))
        self.staged += size
        self.dropped += self.queue.stage(batch)
        self.waiting = self.waiting[-STAGED:] + batch

    @precondition(lambda self: not self.taken)
    @rule()
    def take(self) -> None:
        self.taken = self.queue.take()
        assert self.taken == self.waiting
        self.waiting = []

    @rule(sent=st.integers(0, 200))
    def restage_all_but_sent(self, sent: int) -> None:
        """Send some of the packets taken, and put the rest back."""
        self.sent += len(self.taken[:sent])
        self.queue.restage(self.taken[sent:])
        self.waiting = self.taken[sent:] + self.waiting
        self.taken = []

    @invariant()
    def each_packet_waits_or_is_dropped_or_sent(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.staged == len(self.queue) + self.dropped + len(self.taken) + self.sent


class HandshakeQueuesAgainstLists(RuleBasedStateMachine):
    """Load lasts for a second after a queue was seen an eighth full, for all that share it."""

    @initialize(shared=st.booleans())
    def begin(self, shared: bool) -> None:
        times = [LastUnderLoad(), LastUnderLoad()]
        # The time that each device uses.
        self.time_of = [0, 0 if shared else 1]
        self.queues: list[HandshakeQueue[int]] = [HandshakeQueue(times[place]) for place in self.time_of]
        self.waiting: list[list[int]] = [[], []]
        self.looks: list[tuple[int, int, int]] = []
        self.number = self.now = 0

    @rule(device=DEVICES, length=LENGTHS)
    def put_or_process_until(self, device: int, length: int) -> None:
        """Put or process messages until a queue has this length; it takes no more than 4096."""
        queue, waiting = self.queues[device], self.waiting[device]
        for _ in range(length - len(waiting)):
            self.number += 1
            has_room = len(waiting) < HANDSHAKES
            assert queue.put(self.number) is has_room
            waiting += [self.number] * has_room
        for _ in range(len(waiting) - length):
            assert queue.next_message() == waiting.pop(0)
            queue.done()

    @rule(device=DEVICES)
    def clear(self, device: int) -> None:
        self.queues[device].clear()
        self.waiting[device].clear()

    @rule(pause=st.sampled_from([0, 1, SECOND - 1, SECOND, 10 * SECOND]), device=DEVICES, length=LENGTHS)
    def look(self, pause: int, device: int, length: int) -> None:
        self.put_or_process_until(device, length)
        self.now += pause
        place = self.time_of[device]
        self.looks.append((self.now, place, len(self.waiting[device])))
        recent = [length for time, seen, length in self.looks if seen == place and self.now - time < SECOND]
        assert self.queues[device].is_under_load(self.now) is any(length >= EIGHTH for length in recent)

    @invariant()
    def lengths_agree(self) -> None:
        assert [len(queue) for queue in self.queues] == [len(messages) for messages in self.waiting]


StagedQueueAgainstList.TestCase.settings = settings(max_examples=30, stateful_step_count=20)
HandshakeQueuesAgainstLists.TestCase.settings = settings(max_examples=30, stateful_step_count=15)
TestStagedQueue = pytest.mark.requirement("Q-02", "Q-03", "Q-11")(StagedQueueAgainstList.TestCase)
TestHandshakeQueue = pytest.mark.requirement("DOS-01", "DOS-07", "DOS-09")(HandshakeQueuesAgainstLists.TestCase)
