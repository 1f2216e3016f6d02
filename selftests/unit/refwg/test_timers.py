from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refwg.messages import MILLISECOND, SECOND
from refwg.timers import Action, PeerTimers, Timer, TimerHeap, jitter

if TYPE_CHECKING:
    from collections.abc import Callable


def running(*, persistent_keepalive: int = 0) -> PeerTimers:
    timers = PeerTimers(persistent_keepalive_interval=persistent_keepalive)
    timers.start()
    return timers


def no_jitter() -> int:
    return 0


EVENTS: list[tuple[Callable[[PeerTimers], None], int, Action]] = [
    (lambda timers: timers.handshake_initiated(0, no_jitter), 5 * SECOND, Action.RETRY_HANDSHAKE),
    (lambda timers: timers.handshake_initiated(0, lambda: 333), 5 * SECOND + 333, Action.RETRY_HANDSHAKE),
    (lambda timers: timers.data_received(0), 10 * SECOND, Action.SEND_KEEPALIVE),
    (lambda timers: timers.data_sent(0, no_jitter), 15 * SECOND, Action.NEW_HANDSHAKE),
    (lambda timers: timers.data_sent(0, lambda: 7), 15 * SECOND + 7, Action.NEW_HANDSHAKE),
    (lambda timers: timers.session_derived(0), 540 * SECOND, Action.ZERO_KEY_MATERIAL),
    (lambda timers: timers.any_authenticated_packet_sent(0), 25 * SECOND, Action.SEND_PERSISTENT_KEEPALIVE),
]


@pytest.mark.requirement("TM-01", "TM-10", "TM-16")
@pytest.mark.parametrize(("event", "deadline", "action"), EVENTS)
def test_each_event_sets_exact_deadline_of_its_timer(
    event: Callable[[PeerTimers], None], deadline: int, action: Action
) -> None:
    timers = running(persistent_keepalive=25)
    event(timers)
    assert timers.next_deadline() == deadline
    assert timers.expire(deadline - 1) is None
    assert timers.expire(deadline) is action
    assert timers.next_deadline() is None


@pytest.mark.requirement("TM-28")
@pytest.mark.parametrize(("event", "deadline", "action"), EVENTS)
def test_stopped_timers_do_not_fire_and_are_not_set(
    event: Callable[[PeerTimers], None], deadline: int, action: Action
) -> None:
    timers = running(persistent_keepalive=25)
    event(timers)
    timers.stop()
    event(timers)
    assert timers.expire(deadline) is not action
    assert timers.next_deadline() is None


CANCELLATIONS: list[tuple[Callable[[PeerTimers], None], Timer, Callable[[PeerTimers], None]]] = [
    (
        lambda timers: timers.data_received(0),
        Timer.SEND_KEEPALIVE,
        lambda timers: timers.any_authenticated_packet_sent(0),
    ),
    (
        lambda timers: timers.data_sent(0, no_jitter),
        Timer.NEW_HANDSHAKE,
        lambda timers: timers.any_authenticated_packet_received(0),
    ),
    (
        lambda timers: timers.handshake_initiated(0, no_jitter),
        Timer.RETRANSMIT_HANDSHAKE,
        PeerTimers.handshake_complete,
    ),
]


@pytest.mark.requirement("TM-12", "TM-18", "TM-33")
@pytest.mark.parametrize(("begin", "timer", "end"), CANCELLATIONS)
def test_each_event_cancels_timer_that_it_answers(
    begin: Callable[[PeerTimers], None], timer: Timer, end: Callable[[PeerTimers], None]
) -> None:
    timers = running()
    begin(timers)
    assert timers.deadline_of(timer) is not None
    end(timers)
    assert timers.deadline_of(timer) is None
    end(timers)


@pytest.mark.requirement("TM-03", "TM-05", "TM-27")
def test_handshake_is_given_up_after_19_retries() -> None:
    timers, actions = running(), []
    timers.data_received(0)
    for attempt in range(1, 21):
        timers.handshake_initiated(attempt, no_jitter)
        actions.append(timers.expire(attempt + 5 * SECOND))
    assert actions == [Action.RETRY_HANDSHAKE] * 19 + [Action.GIVE_UP]
    assert timers.deadline_of(Timer.SEND_KEEPALIVE) is None
    assert timers.next_deadline() == 20 + 545 * SECOND


@pytest.mark.requirement("TM-27")
def test_zero_key_timer_is_kept_when_handshake_is_given_up() -> None:
    timers = running()
    timers.session_derived(0)
    timers.handshake_attempts = 19
    timers.handshake_initiated(100 * SECOND, no_jitter)
    assert timers.expire(105 * SECOND) is Action.GIVE_UP
    assert timers.next_deadline() == 540 * SECOND


@pytest.mark.requirement("TM-32", "TM-27")
def test_zero_key_timer_is_cancelled_when_keys_are_erased() -> None:
    timers = running()
    timers.keys_cleared()
    timers.session_derived(0)
    timers.keys_cleared()
    assert timers.next_deadline() is None


@pytest.mark.requirement("TM-27", "TM-05")
def test_zero_key_timer_is_set_when_handshake_is_given_up() -> None:
    timers = running()
    timers.handshake_attempts = 19
    timers.handshake_initiated(0, no_jitter)
    assert timers.expire(5 * SECOND) is Action.GIVE_UP
    assert timers.expire(545 * SECOND - 1) is None
    assert timers.expire(545 * SECOND) is Action.ZERO_KEY_MATERIAL


@pytest.mark.requirement("TM-33")
def test_completed_handshake_resets_attempts_and_rekey_flag() -> None:
    timers = running()
    timers.handshake_attempts, timers.sent_lastminute_handshake = 10, True
    timers.handshake_complete()
    assert (timers.handshake_attempts, timers.sent_lastminute_handshake) == (0, False)


@pytest.mark.requirement("TM-13", "TM-19")
def test_later_packets_do_not_delay_running_timers() -> None:
    timers = running()
    for now in (0, 3 * SECOND, 9 * SECOND):
        timers.data_received(now)
        timers.data_sent(now, no_jitter)
    assert timers.expire(10 * SECOND) is Action.SEND_KEEPALIVE
    assert timers.expire(15 * SECOND) is Action.NEW_HANDSHAKE


@pytest.mark.requirement("TM-15")
def test_keepalive_timer_restarts_once_when_more_data_arrived() -> None:
    timers = running()
    timers.data_received(0)
    timers.data_received(SECOND)
    assert timers.expire(10 * SECOND) is Action.SEND_KEEPALIVE
    assert timers.next_deadline() == 20 * SECOND
    assert timers.expire(20 * SECOND) is Action.SEND_KEEPALIVE
    assert timers.next_deadline() is None


@pytest.mark.requirement("TM-20", "TM-21")
def test_persistent_keepalive_counts_from_last_packet() -> None:
    timers = running(persistent_keepalive=3)
    timers.any_authenticated_packet_sent(0)
    timers.any_authenticated_packet_received(2 * SECOND)
    assert timers.next_deadline() == 5 * SECOND


@pytest.mark.requirement("TM-25")
def test_persistent_keepalive_does_not_fire_when_turned_off() -> None:
    timers = running(persistent_keepalive=3)
    timers.any_authenticated_packet_sent(0)
    timers.data_received(0)
    timers.persistent_keepalive_interval = 0
    timers.any_authenticated_packet_received(SECOND)
    assert timers.expire(3 * SECOND) is None
    assert timers.expire(10 * SECOND) is Action.SEND_KEEPALIVE


@pytest.mark.requirement("TM-02")
def test_jitter_lies_between_0_and_333_milliseconds() -> None:
    assert jitter(bytes) == 0
    assert jitter((333 * MILLISECOND).to_bytes) == 333 * MILLISECOND
    assert jitter((333 * MILLISECOND + 1).to_bytes) == 0
    assert jitter(lambda length: bytes([255] * length)) == (2**64 - 1) % (333 * MILLISECOND + 1)


def test_timer_heap_returns_owners_in_order_of_deadline() -> None:
    heap: TimerHeap[str] = TimerHeap()
    for owner, deadline in (("a", 30), ("b", 10), ("c", 20)):
        heap.schedule(owner, deadline)
    heap.schedule("d", None)
    assert heap.pop_due(9) is None
    assert [heap.pop_due(30) for _ in range(4)] == ["b", "c", "a", None]
    assert heap.next_deadline() is None


def test_timer_heap_keeps_earliest_deadline_of_owner() -> None:
    heap: TimerHeap[str] = TimerHeap()
    for deadline in (30, 10, 20, 10):
        heap.schedule("a", deadline)
    assert heap.next_deadline() == 10
    assert [heap.pop_due(30), heap.pop_due(30)] == ["a", None]


def test_equal_deadlines_expire_in_insertion_order() -> None:
    heap: TimerHeap[object] = TimerHeap()
    owners = [object() for _ in range(5)]
    for owner in owners:
        heap.schedule(owner, 10)
    assert [heap.pop_due(10) for _ in owners] == owners


def test_later_deadline_does_not_replace_earlier_one() -> None:
    heap: TimerHeap[str] = TimerHeap()
    heap.schedule("a", 10)
    heap.schedule("a", 20)
    heap.remove("nobody")
    assert heap.next_deadline() == 10


def test_timer_heap_drops_deadline_of_removed_owner() -> None:
    heap: TimerHeap[str] = TimerHeap()
    heap.schedule("a", 10)
    heap.schedule("b", 20)
    heap.remove("a")
    heap.remove("nobody")
    assert heap.next_deadline() == 20
