"""Put IP fragments together, so that a rule applies to a message however it is cut.

Follows RFC 791 (3.2) and RFC 8200 (4.5), and where they leave a choice, the kernel (inet_frag_queue_insert): what a
receiver accepts as a datagram is one here too. All times are ns of one clock, passed in as `now`.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.wire import frames
from harness.wire.frames import Transport
from harness.wire.messages import FRAGMENT, NANOSECONDS

if TYPE_CHECKING:
    from harness.wire.frames import Contents, Fragment
    from harness.wire.messages import Message

# A sender puts all fragments on the link at once.
TIMEOUT: Final = 1 * NANOSECONDS
# The kernel waits longer (net.ipv4.ipfrag_time); so does a capture, which holds nothing up.
KERNEL_TIMEOUT: Final = 30 * NANOSECONDS
INCOMPLETE, OVERLAPPING, NOT_UNDERSTOOD = "incomplete", "overlapping", "not understood"
INCOMPLETE_FRAGMENT: Final = f"{FRAGMENT} ({INCOMPLETE})"
# Datagrams that wait for fragments at the same time, and bytes of their fragments together.
MOST_DATAGRAMS: Final = 64
MOST_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A fragment that has arrived. number: given by the caller of `Fragments.arrive`."""

    frame: bytes = field(repr=False)
    place: Fragment
    number: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a rule decides about: one frame, or the fragments of one IP datagram in their order of arrival.

    frame: the frame, or one with the whole datagram. contents: of `frame`, from `frames.read`. pieces: the fragments,
    empty for one frame. trouble: why the fragments make no datagram, such as INCOMPLETE. is_gone: the wire
    has already forwarded the fragments.
    """

    frame: bytes = field(repr=False)
    contents: Contents
    pieces: tuple[Piece, ...] = ()
    trouble: str = ""
    is_gone: bool = False

    @property
    def frames(self) -> tuple[bytes, ...]:
        """The frames that have arrived."""
        return tuple(piece.frame for piece in self.pieces) if self.pieces else (self.frame,)

    def message(self, time: int) -> Message:
        """Return the datagram as a message, or what has arrived instead; time: ns of wall time."""
        message = frames.message(self.frame, self.contents, time)
        return replace(message, sort=FRAGMENT, detail=self.trouble) if self.trouble else message

    def changed(self, payload: bytes, *, port: int | None = None) -> tuple[bytes, ...]:
        """Return the frames with another UDP payload of the same length; port: new source port.

        A datagram in fragments is cut as it was. UsageError for anything but a UDP datagram.
        """
        datagram = self._datagram()
        return self._cut(frames.changed(self.frame, datagram, payload, port=port))

    def reflected(self, *, port: int | None = None) -> tuple[bytes, ...]:
        """Return the frames with source and destination exchanged; port: another source port. Errors as `changed`."""
        datagram = self._datagram()
        new = frames.reflected(self.frame, datagram)
        if port is not None:
            new = frames.changed(new, datagram, datagram.payload(self.frame), port=port)
        return self._cut(new)

    def _datagram(self) -> Transport:
        if not isinstance(self.contents, Transport) or self.contents.protocol != socket.IPPROTO_UDP:
            raise UsageError(f"{self.message(0)}: there is no UDP datagram to change")
        return self.contents

    def _cut(self, new: bytes) -> tuple[bytes, ...]:
        likes = [(piece.frame, piece.place) for piece in self.pieces]
        return tuple(frames.fragmented(new, likes)) if likes else (new,)

    def notes(self, name: str) -> tuple[str, ...]:
        """Name each fragment for the comments of a capture; name: of the message. One frame has an empty note."""
        if not self.pieces:
            return ("",)
        if self.trouble:
            return (name,) * len(self.pieces)
        offsets = sorted({piece.place.offset for piece in self.pieces})
        places = [offsets.index(piece.place.offset) + 1 for piece in self.pieces]
        return tuple(f"fragment {place} of {len(offsets)} of {name}" for place in places)


@dataclass(slots=True)
class _Partial:
    """A datagram of which fragments have arrived. data: by offset. size: bytes of all data, None until the last one."""

    deadline: int
    pieces: list[Piece] = field(default_factory=list)
    data: dict[int, bytes] = field(default_factory=dict)
    size: int | None = None
    is_gone: bool = False

    def insert(self, piece: Piece) -> bool:
        """Add a fragment; return False if it contradicts the others, and the datagram can never be complete."""
        self.pieces.append(piece)
        place = piece.place
        if place.is_last and self.size not in {None, place.stop}:
            return False
        if place.is_last:
            self.size = place.stop
        spans = self._spans()
        if any(start <= place.offset and place.stop <= stop for start, stop in spans):
            # A duplicate: the kernel keeps the first bytes.
            return True
        if any(start < place.stop and place.offset < stop for start, stop in spans):
            # RFC 8200, 4.5 and RFC 5722: an overlap makes the whole datagram invalid; the kernel says so for IPv4 too.
            return False
        self.data[place.offset] = piece.frame[place.start : place.end]
        return self.size is None or max(start + len(data) for start, data in self.data.items()) <= self.size

    def _spans(self) -> list[tuple[int, int]]:
        """Return (start, stop) of the bytes that have arrived, neighbours joined."""
        spans: list[tuple[int, int]] = []
        for offset, data in sorted(self.data.items()):
            start = spans.pop()[0] if spans and spans[-1][1] == offset else offset
            spans.append((start, offset + len(data)))
        return spans

    def arrival(self, trouble: str) -> Arrival:
        """Return the whole datagram; trouble: why there is none."""
        pieces = tuple(self.pieces)
        if trouble:
            return Arrival(pieces[0].frame, pieces[0].place, pieces, trouble, self.is_gone)
        first = next(piece for piece in pieces if piece.place.offset == 0)
        data = b"".join(data for _, data in sorted(self.data.items()))
        whole = frames.reassembled(first.frame, first.place, data)
        contents = frames.read(whole)
        return Arrival(whole, contents, pieces, "" if isinstance(contents, Transport) else NOT_UNDERSTOOD, self.is_gone)

    @property
    def is_complete(self) -> bool:
        """True once all bytes have arrived."""
        return self._spans() == [(0, self.size)]


class Fragments:
    """The datagrams of which some fragments have arrived."""

    def __init__(self, timeout: int = TIMEOUT) -> None:
        """Start without any. timeout: ns that a datagram waits for its fragments."""
        self._timeout = timeout
        # The oldest first.
        self._partials: dict[tuple[int, bytes], _Partial] = {}
        self._bytes = 0

    def arrive(self, piece: Piece, side: int, now: int, *, is_gone: bool = False) -> list[tuple[int, Arrival]]:
        """Add a fragment from end `side`; return (side, arrival) of the datagrams that wait no longer.

        That is the fragment's own one if it is complete or never can be, and older ones for which there is no room.
        is_gone: the fragment has been forwarded; what counts is the first one of a datagram.
        """
        key = side, piece.place.key
        partial = self._partials.setdefault(key, _Partial(now + self._timeout, is_gone=is_gone))
        self._bytes += len(piece.frame)
        if not partial.insert(piece):
            return [self._take(key, OVERLAPPING)]
        if partial.is_complete:
            return [self._take(key)]
        out = []
        while len(self._partials) > MOST_DATAGRAMS or self._bytes > MOST_BYTES:
            out.append(self._take(next(iter(self._partials)), INCOMPLETE))
        return out

    def is_gone(self, piece: Piece, side: int) -> bool | None:
        """Return whether the earlier fragments of its datagram have been forwarded; None if there are none."""
        partial = self._partials.get((side, piece.place.key))
        return None if partial is None else partial.is_gone

    def _take(self, key: tuple[int, bytes], trouble: str = "") -> tuple[int, Arrival]:
        partial = self._partials.pop(key)
        self._bytes -= sum(len(piece.frame) for piece in partial.pieces)
        return key[0], partial.arrival(trouble)

    @property
    def waiting(self) -> int:
        """Number of datagrams that wait for fragments."""
        return len(self._partials)

    def next_deadline(self) -> int | None:
        """Return when `due` must be called next; None if no datagram waits."""
        return next((partial.deadline for partial in self._partials.values()), None)

    def due(self, now: int) -> list[tuple[int, Arrival]]:
        """Return (side, arrival) of the datagrams that have waited too long."""
        keys = [key for key, partial in self._partials.items() if partial.deadline <= now]
        return [self._take(key, INCOMPLETE) for key in keys]
