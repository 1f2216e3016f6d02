"""Bound the queues: staged packets of a peer, and handshake messages of a device.

Mirrors queueing.c of the driver, and the limits on both queues in its device.c (`wg_xmit`) and receive.c.
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
    """Packets of one peer that wait for a session; when it is full, the oldest packets are dropped."""

    def __init__(self) -> None:
        self._packets: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._packets)

    def stage(self, packets: Iterable[T]) -> int:
        """Append packets and return how many old ones were dropped.

        Old packets are dropped before the new ones are added, so that all segments of one large packet stay. The queue
        can therefore hold 129 single packets, or 128 and a whole batch.
        """
        # wg_xmit: the oldest packets go first, and before the new ones are added
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
        """Put packets that `take` returned back at the head of the queue."""
        later = self.take()
        self._packets.extend(packets)
        self._packets.extend(later)


class LastUnderLoad:
    """The time at which a device was last under load, in nanoseconds; None: never.

    All devices share one object, as in the driver (`last_under_load` in receive.c), because they share the CPU.
    """

    __slots__ = ("time",)

    def __init__(self) -> None:
        self.time: int | None = None


class HandshakeQueue(Generic[T]):
    """Handshake messages not yet processed; the length decides whether the device is under load (5.3).

    Messages of a proven sender have places of their own, which messages that anyone can forge never take. The two kinds
    are processed in turn, so neither waits for all of the other. The driver has one queue, because its workers empty it
    faster than a link can fill it.
    """

    def __init__(self, last_under_load: LastUnderLoad) -> None:
        self._proven: deque[T] = deque()
        self._others: deque[T] = deque()
        # The kind whose turn it is, and the one that `next_message` returned.
        self._turn = self._taken = self._proven
        self._last_under_load = last_under_load

    def __len__(self) -> int:
        return len(self._proven) + len(self._others)

    def put(self, message: T, *, is_proven: bool = False) -> bool:
        """Append a message; returns False if there is no place for its kind and it must be dropped.

        is_proven: its sender receives what we send to its address: mac2 is valid.
        """
        messages = self._proven if is_proven else self._others
        # wg_packet_receive: 4096 messages
        if len(messages) >= MAX_QUEUED_INCOMING_HANDSHAKES:
            return False
        messages.append(message)
        return True

    def next_message(self) -> T:
        """Return the oldest message of the kind whose turn it is; it stays until `done` is called, as in the driver."""
        self._taken = self._turn or self._proven or self._others
        return self._taken[0]

    def done(self) -> None:
        """Remove the message that `next_message` returned; the other kind is next."""
        self._taken.popleft()
        self._turn = self._others if self._taken is self._proven else self._proven

    def clear(self) -> None:
        """Drop all messages, without counting them; the interface goes down (`wg_stop`)."""
        self._proven.clear()
        self._others.clear()

    def is_under_load(self, now: int) -> bool:
        """True while an eighth of 4096 messages wait, and for one second after any device had so many."""
        # wg_receive_handshake_packet: 512 of 4096 messages, and one second after; both kinds count, because anyone who
        # has our public key can make a valid mac1
        last = self._last_under_load
        if len(self) >= UNDER_LOAD_THRESHOLD:
            last.time = now
        return last.time is not None and now < last.time + UNDER_LOAD_MEMORY
