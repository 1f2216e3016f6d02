"""Run the five timers of a peer: events and the time in, actions out.

Mirrors timers.c of the driver; section 6 of the paper. There are five timers:

- retransmit handshake: an initiation of ours is unanswered for REKEY_TIMEOUT plus jitter; at most 20 are sent in a row;
- send keepalive: we received data and have sent nothing for KEEPALIVE_TIMEOUT;
- new handshake: we sent data and have heard nothing for KEEPALIVE_TIMEOUT + REKEY_TIMEOUT plus jitter;
- zero key material: no new session for three times REJECT_AFTER_TIME;
- persistent keepalive: nothing crossed the tunnel for as long as the user said.

Each method that is named after an event says when to call it. Nothing is ever due while the timers are stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
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


class Timer(Enum):
    RETRANSMIT_HANDSHAKE = auto()
    SEND_KEEPALIVE = auto()
    NEW_HANDSHAKE = auto()
    ZERO_KEY_MATERIAL = auto()
    PERSISTENT_KEEPALIVE = auto()


class Action(Enum):
    """What the owner of the timers must do when one of them has run out."""

    RETRY_HANDSHAKE = "our initiation went unanswered: send another"
    GIVE_UP = "every retry went unanswered: drop what is staged"
    SEND_KEEPALIVE = "data came and nothing went: send a keepalive"
    NEW_HANDSHAKE = "data went and nothing came: send an initiation"
    ZERO_KEY_MATERIAL = "no new session for long: erase all keys"
    SEND_PERSISTENT_KEEPALIVE = "nothing crossed the tunnel for as long as the user said: send a keepalive"


_PLAIN_ACTIONS: Final = {
    Timer.NEW_HANDSHAKE: Action.NEW_HANDSHAKE,
    Timer.ZERO_KEY_MATERIAL: Action.ZERO_KEY_MATERIAL,
    Timer.PERSISTENT_KEEPALIVE: Action.SEND_PERSISTENT_KEEPALIVE,
}


def jitter(random_bytes: Callable[[int], bytes]) -> int:
    """A random delay, so that two peers that start together do not collide for ever."""
    return int.from_bytes(random_bytes(8)) % (REKEY_TIMEOUT_JITTER_MAX + 1)


@dataclass(slots=True)
class PeerTimers:
    """The five deadlines of a peer, and what the events have left behind."""

    persistent_keepalive_interval: int = 0
    handshake_attempts: int = 0
    need_another_keepalive: bool = False
    sent_lastminute_handshake: bool = False
    is_running: bool = False
    _deadlines: dict[Timer, int] = field(default_factory=dict)

    def start(self) -> None:
        self.is_running = True

    def stop(self) -> None:
        self.is_running = False
        self._deadlines.clear()

    def deadline_of(self, timer: Timer) -> int | None:
        return self._deadlines.get(timer)

    def next_deadline(self) -> int | None:
        return min(self._deadlines.values(), default=None)

    def data_sent(self, now: int, jitter: Callable[[], int]) -> None:
        """Call after a data packet that is not a keepalive was handed to the network; jitter: called if needed."""
        if Timer.NEW_HANDSHAKE not in self._deadlines:
            self._set(Timer.NEW_HANDSHAKE, now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter())

    def data_received(self, now: int) -> None:
        """Call after an authenticated packet that is no keepalive was received."""
        if Timer.SEND_KEEPALIVE in self._deadlines:
            self.need_another_keepalive = True
        else:
            self._set(Timer.SEND_KEEPALIVE, now + KEEPALIVE_TIMEOUT)

    def any_authenticated_packet_sent(self) -> None:
        """Call before any packet but a cookie reply is sent: keepalive, data or handshake."""
        self._deadlines.pop(Timer.SEND_KEEPALIVE, None)

    def any_authenticated_packet_received(self) -> None:
        """Call after any authenticated packet was received: keepalive, data or handshake."""
        self._deadlines.pop(Timer.NEW_HANDSHAKE, None)

    def any_authenticated_packet_traversal(self, now: int) -> None:
        """Call at each of the two events before."""
        if self.persistent_keepalive_interval:
            self._set(Timer.PERSISTENT_KEEPALIVE, now + self.persistent_keepalive_interval * SECOND)

    def handshake_initiated(self, now: int, jitter: Callable[[], int]) -> None:
        """Call after an initiation was sent."""
        self._set(Timer.RETRANSMIT_HANDSHAKE, now + REKEY_TIMEOUT + jitter())

    def handshake_complete(self) -> None:
        """Call after a response was consumed, or a first packet on the session of our own response was received."""
        self._deadlines.pop(Timer.RETRANSMIT_HANDSHAKE, None)
        self.handshake_attempts = 0
        self.sent_lastminute_handshake = False

    def session_derived(self, now: int) -> None:
        """Call after a session was made, in either role: before a response is sent, after one was consumed."""
        self._set(Timer.ZERO_KEY_MATERIAL, now + ZERO_KEYS_AFTER)

    def keys_cleared(self) -> None:
        """Call after all keys were erased before their time: the timer is not needed any more."""
        self._deadlines.pop(Timer.ZERO_KEY_MATERIAL, None)

    def expire(self, now: int) -> Action | None:
        """Take the earliest action due at `now`; call again until it returns None."""
        timer = min(self._deadlines, key=self._deadlines.__getitem__, default=None)
        if timer is None or now < self._deadlines[timer]:
            return None
        del self._deadlines[timer]
        if timer is Timer.RETRANSMIT_HANDSHAKE:
            return self._retransmit_handshake(now)
        if timer is Timer.SEND_KEEPALIVE:
            return self._send_keepalive(now)
        if timer is Timer.PERSISTENT_KEEPALIVE and not self.persistent_keepalive_interval:
            return self.expire(now)
        return _PLAIN_ACTIONS[timer]

    def _retransmit_handshake(self, now: int) -> Action:
        if self.handshake_attempts > MAX_TIMER_HANDSHAKES:
            self._deadlines.pop(Timer.SEND_KEEPALIVE, None)
            # The failed exchange left secrets behind: they get an end date too.
            self._deadlines.setdefault(Timer.ZERO_KEY_MATERIAL, now + ZERO_KEYS_AFTER)
            return Action.GIVE_UP
        self.handshake_attempts += 1
        return Action.RETRY_HANDSHAKE

    def _send_keepalive(self, now: int) -> Action:
        # The keepalive that goes out now cancels what is set here, as in the driver, unless it cannot be sent.
        if self.need_another_keepalive:
            self.need_another_keepalive = False
            self._set(Timer.SEND_KEEPALIVE, now + KEEPALIVE_TIMEOUT)
        return Action.SEND_KEEPALIVE

    def _set(self, timer: Timer, deadline: int) -> None:
        if self.is_running:
            self._deadlines[timer] = deadline


class TimerHeap(Generic[T]):
    """A timer heap with at most one live entry per owner; stale entries are skipped.

    A deadline mostly moves later, packet by packet, so a later one does not replace the entry. The owner is then due
    too early, has nothing to do, and is scheduled again.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._live: dict[T, int] = {}
        self._entries = 0

    def schedule(self, owner: T, deadline: int | None) -> None:
        """Make sure that `owner` is due at `deadline` or before; None: nothing to schedule."""
        if deadline is None or deadline >= self._live.get(owner, deadline + 1):
            return
        self._live[owner] = deadline
        self._entries += 1
        heappush(self._heap, (deadline, self._entries, owner))

    def remove(self, owner: T) -> None:
        self._live.pop(owner, None)
        self._drop_stale()

    def next_deadline(self) -> int | None:
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: int) -> T | None:
        """Take one owner that is due at `now`, and schedule it again afterwards; call until it returns None."""
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, owner = heappop(self._heap)
        del self._live[owner]
        self._drop_stale()
        return owner

    def _drop_stale(self) -> None:
        while self._heap and self._live.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
