"""Run the five timers of a peer: events and the time in, actions out.

Mirrors timers.c of the driver; section 6 of the paper. There are five timers:

- retransmit handshake: our initiation got no response for REKEY_TIMEOUT plus jitter; at most 20 are sent in a row;
- send keepalive: data was received, and nothing was sent for KEEPALIVE_TIMEOUT;
- new handshake: data was sent, and nothing was received for KEEPALIVE_TIMEOUT + REKEY_TIMEOUT plus jitter;
- zero key material: no new session for three times REJECT_AFTER_TIME;
- persistent keepalive: no authenticated packet in either direction for the configured interval.

Methods named after an event are called when it happens, like the driver's `wg_timers_data_sent`. No timer runs while
the timers are stopped. Deadlines and `now` are in nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from refwg.messages import (
    KEEPALIVE_TIMEOUT,
    MAX_TIMER_HANDSHAKES,
    REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER_MAX,
    SECOND,
    ZERO_KEYS_AFTER,
)

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Timer(IntEnum):
    """The five timers of a peer, with the driver's names (`wg_timers_init`); integers, because they are hashed fast."""

    RETRANSMIT_HANDSHAKE = auto()
    SEND_KEEPALIVE = auto()
    NEW_HANDSHAKE = auto()
    ZERO_KEY_MATERIAL = auto()
    PERSISTENT_KEEPALIVE = auto()


class Action(Enum):
    """What the owner of the timers must do when one of them expires."""

    RETRY_HANDSHAKE = "no response to our initiation: send another one"
    GIVE_UP = "no response to any retry: drop staged packets"
    SEND_KEEPALIVE = "data received, nothing sent since: send a keepalive"
    NEW_HANDSHAKE = "data sent, nothing received since: send an initiation"
    ZERO_KEY_MATERIAL = "no new session for 540 s: erase all keys"
    SEND_PERSISTENT_KEEPALIVE = "no packet in either direction for the interval: send a keepalive"


_PLAIN_ACTIONS: Final = {
    Timer.NEW_HANDSHAKE: Action.NEW_HANDSHAKE,
    Timer.ZERO_KEY_MATERIAL: Action.ZERO_KEY_MATERIAL,
    Timer.PERSISTENT_KEEPALIVE: Action.SEND_PERSISTENT_KEEPALIVE,
}


def jitter(random_bytes: Callable[[int], bytes]) -> int:
    """Return a random delay of 0 to 333 ms, in nanoseconds.

    Without it, two peers that start together would initiate at the same time again and again.
    """
    # 6.1: jitter delays every initiation that a timer starts (wg_timers_handshake_initiated)
    return int.from_bytes(random_bytes(8)) % (REKEY_TIMEOUT_JITTER_MAX + 1)


@dataclass(slots=True)
class PeerTimers:
    """The five deadlines of a peer, and the state that events change.

    persistent_keepalive_interval: in seconds, 0: off. handshake_attempts: retries in this series.
    need_another_keepalive: data was received while the keepalive timer ran. sent_lastminute_handshake: the receive path
    has already renewed this session. is_scheduled: False after a deadline was set, until the owner has it in its heap.
    """

    persistent_keepalive_interval: int = 0
    handshake_attempts: int = 0
    need_another_keepalive: bool = False
    sent_lastminute_handshake: bool = False
    is_running: bool = False
    is_scheduled: bool = True
    _deadlines: dict[Timer, int] = field(default_factory=dict)

    def start(self) -> None:
        """Allow timers to be set; call it when the interface goes up, or for a new peer on one that is up."""
        self.is_running = True

    def stop(self) -> None:
        """Cancel all timers, and set none until `start` (`wg_timers_stop`)."""
        self.is_running = False
        self._deadlines.clear()

    def deadline_of(self, timer: Timer) -> int | None:
        """Return when this timer expires, in nanoseconds; None if it is not set."""
        return self._deadlines.get(timer)

    def next_deadline(self) -> int | None:
        """Return when the first timer expires, in nanoseconds; None if none is set."""
        return min(self._deadlines.values(), default=None)

    def data_sent(self, now: int, jitter: Callable[[], int]) -> None:
        """Call after a data packet that is not a keepalive was sent; jitter: called only if the timer is not set."""
        # 6.5: no answer for KEEPALIVE_TIMEOUT + REKEY_TIMEOUT means that the session is dead (wg_timers_data_sent)
        if Timer.NEW_HANDSHAKE not in self._deadlines:
            self._set(Timer.NEW_HANDSHAKE, now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter())

    def data_received(self, now: int) -> None:
        """Call after an authenticated data packet that is not a keepalive was received."""
        # 6.5: answer within KEEPALIVE_TIMEOUT
        # wg_timers_data_received: data that arrives while the timer runs needs one more keepalive
        if Timer.SEND_KEEPALIVE in self._deadlines:
            self.need_another_keepalive = True
        else:
            self._set(Timer.SEND_KEEPALIVE, now + KEEPALIVE_TIMEOUT)

    def any_authenticated_packet_sent(self, now: int) -> None:
        """Call before an initiation, response, keepalive or data packet is sent."""
        # 6.5: the keepalive is needed only if nothing else is sent
        self._deadlines.pop(Timer.SEND_KEEPALIVE, None)
        # wg_timers_any_authenticated_packet_traversal: only if a persistent keepalive is configured
        if self.persistent_keepalive_interval:
            self.any_authenticated_packet_traversal(now)

    def any_authenticated_packet_received(self, now: int) -> None:
        """Call after an authenticated initiation, response, keepalive or data packet was received."""
        # 6.5: the session works, so no new handshake is needed
        self._deadlines.pop(Timer.NEW_HANDSHAKE, None)
        # wg_timers_any_authenticated_packet_traversal: as when one is sent
        if self.persistent_keepalive_interval:
            self.any_authenticated_packet_traversal(now)

    def any_authenticated_packet_traversal(self, now: int) -> None:
        """Delay the persistent keepalive, because an authenticated packet is sent or was received."""
        # 2.1: the interval counts from the last packet in either direction
        self._set(Timer.PERSISTENT_KEEPALIVE, now + self.persistent_keepalive_interval * SECOND)

    def handshake_initiated(self, now: int, jitter: Callable[[], int]) -> None:
        """Call after an initiation was sent; jitter: returns the delay that is added to REKEY_TIMEOUT."""
        # 6.4: another initiation if no response arrives in REKEY_TIMEOUT
        self._set(Timer.RETRANSMIT_HANDSHAKE, now + REKEY_TIMEOUT + jitter())

    def handshake_complete(self) -> None:
        """Call when the initiator has accepted a response, or the responder has received a first packet on `next`."""
        # wg_timers_handshake_complete: ends the series of retries
        self._deadlines.pop(Timer.RETRANSMIT_HANDSHAKE, None)
        self.handshake_attempts = 0
        self.sent_lastminute_handshake = False

    def session_derived(self, now: int) -> None:
        """Call after the keys of a session were derived: before sending a response, or after accepting one."""
        # 6.3: keys are erased if no new session is created for three times REJECT_AFTER_TIME
        self._set(Timer.ZERO_KEY_MATERIAL, now + ZERO_KEYS_AFTER)

    def keys_cleared(self) -> None:
        """Cancel ZERO_KEY_MATERIAL; call it when all keys were erased already."""
        # wg_pm_notification: the only place where the driver cancels this timer alone
        self._deadlines.pop(Timer.ZERO_KEY_MATERIAL, None)

    def expire(self, now: int) -> Action | None:
        """Return the earliest action due at `now`, and unset its timer; call it again until it returns None."""
        timer = min(self._deadlines, key=self._deadlines.__getitem__, default=None)
        if timer is None or now < self._deadlines[timer]:
            return None
        del self._deadlines[timer]
        if timer is Timer.RETRANSMIT_HANDSHAKE:
            return self._retransmit_handshake(now)
        if timer is Timer.SEND_KEEPALIVE:
            return self._send_keepalive(now)
        # wg_expired_send_persistent_keepalive: the interval may have been set to 0 since
        if timer is Timer.PERSISTENT_KEEPALIVE and not self.persistent_keepalive_interval:
            return self.expire(now)
        return _PLAIN_ACTIONS[timer]

    def _retransmit_handshake(self, now: int) -> Action:
        # 6.4: retries end after 90 s (REKEY_ATTEMPT_TIME)
        # wg_expired_retransmit_handshake: the driver counts retries instead, 20 initiations in all, about 100 s
        if self.handshake_attempts > MAX_TIMER_HANDSHAKES:
            self._deadlines.pop(Timer.SEND_KEEPALIVE, None)
            # wg_expired_retransmit_handshake: the failed handshake left secrets behind, so they get a deadline too
            self._deadlines.setdefault(Timer.ZERO_KEY_MATERIAL, now + ZERO_KEYS_AFTER)
            return Action.GIVE_UP
        self.handshake_attempts += 1
        return Action.RETRY_HANDSHAKE

    def _send_keepalive(self, now: int) -> Action:
        # wg_expired_send_keepalive: sending this keepalive cancels the new deadline; it stays if nothing can be sent
        if self.need_another_keepalive:
            self.need_another_keepalive = False
            self._set(Timer.SEND_KEEPALIVE, now + KEEPALIVE_TIMEOUT)
        return Action.SEND_KEEPALIVE

    def _set(self, timer: Timer, deadline: int) -> None:
        if self.is_running:
            self._deadlines[timer] = deadline
            self.is_scheduled = False


class TimerHeap(Generic[T]):
    """A timer heap with at most one live entry per owner; stale entries are skipped.

    Most packets move a deadline to a later time. A later deadline does not replace the entry, which saves a heap
    operation per packet. The owner is then popped too early, has no expired timer, and is scheduled again.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._live: dict[T, int] = {}
        self._entries = 0

    def schedule(self, owner: T, deadline: int | None) -> None:
        """Make sure that `owner` is popped at `deadline` or before; None: nothing to schedule."""
        if deadline is None or deadline >= self._live.get(owner, deadline + 1):
            return
        self._live[owner] = deadline
        self._entries += 1
        heappush(self._heap, (deadline, self._entries, owner))

    def remove(self, owner: T) -> None:
        """Drop the owner's entry; does nothing if it has none."""
        self._live.pop(owner, None)
        self._drop_stale()

    def next_deadline(self) -> int | None:
        """Return when `pop_due` may return an owner, in nanoseconds; None if the heap is empty."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: int) -> T | None:
        """Remove and return one owner that is due at `now`, None if none is.

        The caller acts on it, schedules it again, and repeats until None. Equal deadlines come in insertion order.
        """
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, owner = heappop(self._heap)
        del self._live[owner]
        self._drop_stale()
        return owner

    def _drop_stale(self) -> None:
        while self._heap and self._live.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
