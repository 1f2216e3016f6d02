"""Bound the queues: packets that wait for a session, handshake messages for their turn.

Mirrors queueing.c of the driver, and from device.c and receive.c what bounds the queues and calls them too long.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from refwg.messages import (
    MAX_QUEUED_INCOMING_HANDSHAKES,
    MAX_STAGED_PACKETS,
    UNDER_LOAD_MEMORY,
    UNDER_LOAD_THRESHOLD,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")


class StagedQueue(Generic[T]):
    """Packets of one peer that wait for a session; new ones push out old ones."""

    def __init__(self) -> None:
        self._packets: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._packets)

    def stage(self, packets: Iterable[T]) -> int:
        """Append, and return how many old packets had to go.

        Room is made before, not after, so that the segments of one large packet are not cut short: a single
        packet makes 129, and a batch may exceed the bound by its whole length.
        """
        dropped = max(0, len(self._packets) - MAX_STAGED_PACKETS)
        for _ in range(dropped):
            self._packets.popleft()
        self._packets.extend(packets)
        return dropped

    def take(self) -> list[T]:
        """Take out all packets, oldest first."""
        packets = list(self._packets)
        self._packets.clear()
        return packets

    def restage(self, packets: Iterable[T]) -> None:
        """Put packets back where `take` had them: before everything that came since."""
        later = self.take()
        self._packets.extend(packets)
        self._packets.extend(later)


class LastUnderLoad:
    """When a device was last under load; None: never.

    All devices share one, as in the driver (`last_under_load` in receive.c): a flood of one concerns them all.
    """

    __slots__ = ("time",)

    def __init__(self) -> None:
        self.time: int | None = None


class HandshakeQueue(Generic[T]):
    """Handshake messages not yet looked at; its length says whether the device is under load."""

    def __init__(self, last_under_load: LastUnderLoad) -> None:
        self._messages: deque[T] = deque()
        self._last_under_load = last_under_load

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: T) -> bool:
        """Append a message if there is room."""
        if len(self._messages) >= MAX_QUEUED_INCOMING_HANDSHAKES:
            return False
        self._messages.append(message)
        return True

    def next_message(self) -> T:
        """The message to look at now. It still counts as waiting until `done` is called, as in the driver."""
        return self._messages[0]

    def done(self) -> None:
        self._messages.popleft()

    def clear(self) -> None:
        self._messages.clear()

    def is_under_load(self, now: int) -> bool:
        """True while this queue is an eighth full, and for one second after any device's queue was."""
        last = self._last_under_load
        if len(self._messages) >= UNDER_LOAD_THRESHOLD:
            last.time = now
        return last.time is not None and now < last.time + UNDER_LOAD_MEMORY
