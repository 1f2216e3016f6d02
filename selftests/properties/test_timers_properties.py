"""Check a peer's timers against the history of its events, the timer heap against a dict."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from refwg.messages import MILLISECOND, SECOND
from refwg.timers import Action, PeerTimers, Timer, TimerHeap, jitter

# Section 6 of the paper, and the driver's jitter and its 20 initiations in a row.
REKEY_TIMEOUT, KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME = 5 * SECOND, 10 * SECOND, 180 * SECOND
JITTER_MAX = 333 * MILLISECOND
INITIATIONS_IN_A_ROW = 20

jitters = st.integers(0, JITTER_MAX)
spans = st.one_of(
    st.sampled_from([0, 1, REKEY_TIMEOUT, KEEPALIVE_TIMEOUT, 15 * SECOND, 540 * SECOND]),
    st.integers(0, 20 * SECOND),
    st.integers(0, 600 * SECOND),
)


class TimersAgainstHistory(RuleBasedStateMachine):
    """Each deadline follows from the events since its timer last ran out or was cancelled."""

    @initialize(interval=st.sampled_from([0, 1, 25, 65535]))
    def begin(self, interval: int) -> None:
        self.timers = PeerTimers(persistent_keepalive_interval=interval)
        self.timers.start()
        self.now = 0
        # Event, time, and the jitter that the deadline includes.
        self.history: list[tuple[str, int, int]] = []

    def note(self, event: str, value: int = 0) -> None:
        self.history.append((event, self.now, value))

    def since(self, *ends: str) -> list[tuple[str, int, int]]:
        """The events after the last of these, or after the last stop."""
        last = max((at for at, (event, *_) in enumerate(self.history) if event in {*ends, "stop"}), default=-1)
        return self.history[last + 1 :]

    # Events.

    @rule(jitter=jitters)
    def data_sent(self, jitter: int) -> None:
        self.timers.data_sent(self.now, lambda: jitter)
        self.note("data sent", jitter)

    @rule()
    def data_received(self) -> None:
        self.timers.data_received(self.now)
        self.note("data received")

    @rule()
    def packet_sent(self) -> None:
        self.timers.any_authenticated_packet_sent(self.now)
        self.note("packet sent")

    @rule()
    def packet_received(self) -> None:
        self.timers.any_authenticated_packet_received(self.now)
        self.note("packet received")

    @rule(jitter=jitters)
    def handshake_initiated(self, jitter: int) -> None:
        self.timers.handshake_initiated(self.now, lambda: jitter)
        self.note("initiated", jitter)

    @rule()
    def handshake_fails(self) -> None:
        """Leave an initiation and its retries unanswered until the last one runs out."""
        self.handshake_initiated(0)
        self.wait(INITIATIONS_IN_A_ROW * REKEY_TIMEOUT)

    @rule()
    def handshake_complete(self) -> None:
        self.timers.handshake_complete()
        self.note("complete")

    @rule()
    def session_derived(self) -> None:
        self.timers.session_derived(self.now)
        self.note("derived")

    @rule()
    def keys_cleared(self) -> None:
        self.timers.keys_cleared()
        self.note("cleared")

    @rule()
    def bounce(self) -> None:
        self.timers.stop()
        assert self.timers.next_deadline() is None
        self.timers.data_sent(self.now, lambda: 0)
        self.timers.session_derived(self.now)
        assert self.timers.next_deadline() is None
        self.timers.start()
        self.note("stop")

    @rule(span=st.integers(1, KEEPALIVE_TIMEOUT - 1))
    def wait_briefly(self, span: int) -> None:
        self.wait(span)

    @rule(span=spans)
    def wait(self, span: int) -> None:
        """Let time pass; timers run out in order, and never early."""
        end = self.now + span
        while (deadline := self.timers.next_deadline()) is not None and deadline <= end:
            assert deadline >= self.now
            if deadline > self.now:
                assert self.timers.expire(deadline - 1) is None
            self.now = deadline
            action = self.timers.expire(self.now)
            assert action is not None
            self.note(action.name)
            self.expired(action)
        assert self.timers.expire(end) is None
        self.now = end

    def expired(self, action: Action) -> None:
        if action is Action.RETRY_HANDSHAKE:
            self.timers.handshake_initiated(self.now, lambda: 0)
            self.note("initiated")

    # Invariants.

    @invariant()
    def retransmission_follows_last_unanswered_initiation(self) -> None:
        initiated = [time + jitter for event, time, jitter in self.since("complete", "GIVE_UP") if event == "initiated"]
        expected = initiated[-1] + REKEY_TIMEOUT if initiated else None
        assert self.timers.deadline_of(Timer.RETRANSMIT_HANDSHAKE) == expected

    @invariant()
    def new_handshake_follows_first_unanswered_data(self) -> None:
        events = self.since("packet received", "NEW_HANDSHAKE")
        sent = [time + jitter for event, time, jitter in events if event == "data sent"]
        expected = sent[0] + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT if sent else None
        assert self.timers.deadline_of(Timer.NEW_HANDSHAKE) == expected

    @invariant()
    def erasure_follows_last_session_or_first_failure(self) -> None:
        sessions = [time for event, time, _ in self.since("cleared", "ZERO_KEY_MATERIAL") if event == "derived"]
        failures = [time for event, time, _ in self.since("cleared", "ZERO_KEY_MATERIAL") if event == "GIVE_UP"]
        # A failed handshake leaves secrets, too, but does not postpone the erasure of a session.
        start = sessions[-1] if sessions else failures[0] if failures else None
        expected = None if start is None else start + 3 * REJECT_AFTER_TIME
        assert self.timers.deadline_of(Timer.ZERO_KEY_MATERIAL) == expected

    @invariant()
    def persistent_keepalive_follows_last_packet(self) -> None:
        events = self.since("SEND_PERSISTENT_KEEPALIVE")
        crossed = [time for event, time, _ in events if event in {"packet sent", "packet received"}]
        interval = self.timers.persistent_keepalive_interval * SECOND
        expected = crossed[-1] + interval if crossed and interval else None
        assert self.timers.deadline_of(Timer.PERSISTENT_KEEPALIVE) == expected

    @invariant()
    def keepalive_comes_within_10_s_after_data_unless_a_packet_was_sent(self) -> None:
        events = self.since("packet sent", "GIVE_UP", "SEND_KEEPALIVE")
        received = [time for event, time, _ in events if event == "data received"]
        deadline = self.timers.deadline_of(Timer.SEND_KEEPALIVE)
        if received:
            assert deadline is not None
            assert deadline <= received[0] + KEEPALIVE_TIMEOUT
        elif deadline is not None:
            # More data arrived before the last keepalive was due, and that keepalive was not sent.
            sent = [time for event, time, _ in self.since("packet sent", "GIVE_UP") if event == "SEND_KEEPALIVE"]
            assert sent
            assert deadline == sent[-1] + KEEPALIVE_TIMEOUT


TimersAgainstHistory.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestPeerTimers = pytest.mark.requirement("TM-13", "TM-19", "TM-21")(TimersAgainstHistory.TestCase)

# All events of a peer except those that erase or replace its keys.
other_events = st.lists(
    st.tuples(
        st.sampled_from(
            ["data sent", "data received", "packet sent", "packet received", "initiated", "complete", "wait"]
        ),
        spans,
    ),
    max_size=40,
)


@settings(max_examples=60)
@pytest.mark.requirement("TM-27")
@given(st.sampled_from([0, 7]), other_events)
def test_keys_are_erased_after_540_s_whatever_happens(interval: int, events: list[tuple[str, int]]) -> None:
    timers = PeerTimers(persistent_keepalive_interval=interval)
    timers.start()
    timers.session_derived(0)
    erasures: list[int] = []
    now = 0
    for event, span in [*events, ("wait", 3 * REJECT_AFTER_TIME)]:
        match event:
            case "data sent":
                timers.data_sent(now, lambda: 0)
            case "data received":
                timers.data_received(now)
            case "packet sent":
                timers.any_authenticated_packet_sent(now)
            case "packet received":
                timers.any_authenticated_packet_received(now)
            case "initiated":
                timers.handshake_initiated(now, lambda: 0)
            case "complete":
                timers.handshake_complete()
        end = now + (span if event == "wait" else 0)
        while (deadline := timers.next_deadline()) is not None and deadline <= end:
            if timers.expire(deadline) is Action.ZERO_KEY_MATERIAL:
                erasures.append(deadline)
        now = end
    assert erasures[0] == 3 * REJECT_AFTER_TIME


@settings(max_examples=30)
@pytest.mark.requirement("TM-01", "TM-03")
@given(st.lists(jitters, min_size=INITIATIONS_IN_A_ROW, max_size=INITIATIONS_IN_A_ROW))
def test_unanswered_handshake_is_given_up_after_20_initiations(jitters: list[int]) -> None:
    timers = PeerTimers()
    timers.start()
    draw, now = iter(jitters), 0
    sent: list[int] = []
    action = Action.RETRY_HANDSHAKE
    while action is Action.RETRY_HANDSHAKE:
        sent.append(now)
        timers.handshake_initiated(now, lambda: next(draw))
        deadline = timers.deadline_of(Timer.RETRANSMIT_HANDSHAKE)
        assert deadline == now + REKEY_TIMEOUT + jitters[len(sent) - 1]
        now = deadline
        expired = timers.expire(now)
        assert expired is not None
        action = expired
    assert (action, len(sent)) == (Action.GIVE_UP, INITIATIONS_IN_A_ROW)


@pytest.mark.requirement("TM-01")
@example((JITTER_MAX + 1).to_bytes(8))
@given(st.binary(min_size=8, max_size=8))
def test_jitter_is_at_most_333_ms_for_any_random_bytes(drawn: bytes) -> None:
    assert 0 <= jitter(lambda length: drawn[:length]) <= JITTER_MAX


class TimerHeapAgainstDict(RuleBasedStateMachine):
    """Each owner is due once, at the earliest time that it was scheduled for."""

    @initialize()
    def begin(self) -> None:
        self.heap: TimerHeap[str] = TimerHeap()
        self.due: dict[str, int] = {}

    @rule(owner=st.sampled_from("abcd"), deadline=st.one_of(st.none(), st.integers(0, 9)))
    def schedule(self, owner: str, deadline: int | None) -> None:
        self.heap.schedule(owner, deadline)
        if deadline is not None:
            self.due[owner] = min(deadline, self.due.get(owner, deadline))

    @rule(owner=st.sampled_from("abcd"))
    def remove(self, owner: str) -> None:
        self.heap.remove(owner)
        self.due.pop(owner, None)

    @rule(now=st.integers(0, 9))
    def pop_due(self, now: int) -> None:
        earliest = min(self.due.values(), default=now + 1)
        owner = self.heap.pop_due(now)
        if earliest > now:
            assert owner is None
        else:
            assert owner is not None
            assert self.due.pop(owner) == earliest

    @invariant()
    def next_deadline_is_the_earliest(self) -> None:
        assert self.heap.next_deadline() == min(self.due.values(), default=None)


TimerHeapAgainstDict.TestCase.settings = settings(max_examples=30, stateful_step_count=25)
TestTimerHeap = TimerHeapAgainstDict.TestCase
