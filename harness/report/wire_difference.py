"""Find the first message in which the captures of two runs differ, without keys.

What is compared can be seen without keys: who sends, the type and length of each message, where it goes, the counter of
data, and the time since the message before, to a second. The contents differ in every run.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.wire.compare import read_messages
from harness.wire.messages import (
    COOKIE_REPLY,
    DATA,
    INITIATION,
    NANOSECONDS,
    RESPONSE,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from harness.wire.messages import Message

A, B = "A", "B"
# The ports of A, also of a device that scripted peers talk to, and of B, until a test changes them.
_PORTS: Final = {1: A, 2: B}
_OTHER: Final = {A: B, B: A}
# Offset of the receiver index; an initiation has none.
_RECEIVER: Final = {RESPONSE: 8, COOKIE_REPLY: 4, DATA: 4}
_MAC2: Final = 16
# Seconds by which the time between two messages may differ, and the factor.
_SLACK: Final = 1.0
_FACTOR: Final = 1.5
# Seconds in which two messages of opposite directions may cross.
_CROSSING: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One message as it is seen from outside.

    side: A or B, its sender; empty if unknown. name: its kind in words. size: bytes of the UDP payload. path: numbers
    of its source and its destination, in the order in which these appear: random ports differ in every run. way: both
    as text. counter: of a data message, else None. has_mac2: of an initiation or response. after: seconds since the
    message before. is_again: an initiation of a side that has sent one before, to which no response has come.
    type_word: its first four bytes.
    """

    side: str
    name: str
    size: int
    path: tuple[int, int] = (0, 1)
    way: str = ""
    counter: int | None = None
    has_mac2: bool = False
    after: float = 0.0
    is_again: bool = False
    type_word: str = ""

    @property
    def kind(self) -> tuple[str, str, bool]:
        """What a first look shows: the sender, the type, and whether it is sent again."""
        return self.side, self.name, self.is_again

    def in_words(self) -> str:
        """Return what its sender does: `A sends an initiation`."""
        side = self.side or "a third side"
        if self.name == "initiation":
            return f"{side} sends the initiation again" if self.is_again else f"{side} sends an initiation"
        if self.name == "data":
            return f"{side} sends data"
        if self.name == "unknown":
            return f"{side} sends {self.size} bytes with type word {self.type_word}, which are not a WireGuard message"
        return f"{side} sends a {self.name}"


def difference(reference: Path, failing: Path, *, named: str, b: str = B) -> str:
    """Compare the captures in two directories of evidence; returns the first difference in one sentence.

    named: what the message calls the reference, `refwg~refwg`. b: what it calls B. Returns an empty string if there is
    nothing to compare, or if the failing run only ends earlier: then the assertion has ended it.
    """
    both = [path for path in sorted(failing.glob("*.pcapng")) if (reference / path.name).is_file()]
    compared = []
    ended_early = False
    for path in both:
        try:
            expected, seen = look(read_messages(reference / path.name)), look(read_messages(path))
        except (OSError, ValueError):
            continue
        if found := compare(expected, seen, named=named):
            return (f"{path.stem}: {found}" if len(both) > 1 else found).replace(f"{B} sends", f"{b} sends")
        if len(seen) < len(expected):
            ended_early = True
        elif expected:
            compared.append(len(expected))
    if ended_early:
        return ""
    count = max(compared, default=0)
    return f"no difference that shows without keys in {count} message{'s' * (count != 1)}" if count else ""


def look(messages: Iterable[Message]) -> list[Sight]:
    """Describe messages as they are seen from outside."""
    senders = _Senders()
    numbers: dict[tuple[str, int], int] = {}
    sights: list[Sight] = []
    unanswered: set[str] = set()
    before = 0
    for message in messages:
        side = senders.of(message)
        kind = message.kind
        ends = message.source, message.destination
        sights.append(
            Sight(
                side=side,
                name=message.name,
                size=len(message.payload),
                path=(numbers.setdefault(ends[0], len(numbers)), numbers.setdefault(ends[1], len(numbers))),
                way=f"from {_address(*ends[0])} to {_address(*ends[1])}",
                counter=message.counter,
                has_mac2=kind in {INITIATION, RESPONSE} and any(message.payload[-_MAC2:]),
                after=(message.time - before) / NANOSECONDS if before else 0.0,
                is_again=kind == INITIATION and side in unanswered,
                type_word=message.payload[:4].hex(),
            )
        )
        if kind == INITIATION:
            unanswered.add(side)
        elif kind == RESPONSE:
            unanswered.discard(_OTHER.get(side, ""))
        before = message.time
    return sights


def _address(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class _Senders:
    """Finds the side that has sent a message: by its port, by the port it goes to, by its receiver index."""

    def __init__(self) -> None:
        self._indices: dict[int, str] = {}

    def of(self, message: Message) -> str:
        """Return A, B or an empty string; messages come in their order."""
        kind = message.kind
        side = _PORTS.get(message.source[1]) or _OTHER.get(_PORTS.get(message.destination[1], ""), "")
        if not side and kind in _RECEIVER:
            (receiver,) = struct.unpack_from("<I", message.payload, _RECEIVER[kind])
            side = _OTHER.get(self._indices.get(receiver, ""), "")
        if side and kind in {INITIATION, RESPONSE}:
            (index,) = struct.unpack_from("<I", message.payload, 4)
            self._indices[index] = side
        return side


def compare(expected: Sequence[Sight], seen: Sequence[Sight], *, named: str) -> str:
    """Return the first difference of two sequences in one sentence; empty if there is none.

    It is not a difference that `seen` ends earlier: a failed assertion ends a test.
    """
    number = 0
    while number < len(seen):
        ours = expected[number] if number < len(expected) else None
        theirs = seen[number]
        if _crossed(expected[number : number + 2], seen[number : number + 2]):
            number += 2
            continue
        if found := _differ(ours, theirs):
            return f"message {number + 1}: in {named} {found[0]}, here {found[1]}"
        number += 1
    return ""


def _crossed(expected: Sequence[Sight], seen: Sequence[Sight]) -> bool:
    """Whether the same two messages of opposite directions come in the other order, at nearly the same time."""
    if len(expected) < 2 or len(seen) < 2 or expected[0].side == expected[1].side:  # noqa: PLR2004 - two messages
        return False
    is_close = max(expected[1].after, seen[1].after) < _CROSSING
    return is_close and _key(expected[0]) == _key(seen[1]) and _key(expected[1]) == _key(seen[0])


def _key(sight: Sight) -> tuple[str, str, int, int | None]:
    return sight.side, sight.name, sight.size, sight.counter


def _differ(expected: Sight | None, seen: Sight) -> tuple[str, str] | None:
    """Return both messages in words, if they differ; an expected message that is missing is None."""
    if expected is None:
        return "nothing more is sent", f"{seen.in_words()}{_late(seen)}"
    ours = expected.in_words()
    mac2 = {True: "with a mac2", False: "without a mac2"}
    # Of each property: its two values, and the two messages in words if these differ.
    compared: tuple[tuple[object, object, str, str], ...] = (
        (expected.kind, seen.kind, ours, f"{seen.in_words()}{_late(seen)}"),
        (expected.path, seen.path, f"{ours} {expected.way}", seen.way),
        (expected.size, seen.size, f"{ours} of {expected.size} bytes", f"it has {seen.size} bytes"),
        (expected.counter, seen.counter, f"{ours} with counter {expected.counter}", f"with counter {seen.counter}"),
        (expected.has_mac2, seen.has_mac2, f"{ours} {mac2[expected.has_mac2]}", mac2[seen.has_mac2]),
        (_differ_in_time(expected.after, seen.after), False,
         f"{ours} {expected.after:.1f} s after the message before", f"{seen.after:.1f} s after it"),
    )  # fmt: skip
    return next(((one, other) for value, another, one, other in compared if value != another), None)


def _late(sight: Sight) -> str:
    """Return how long after the message before it comes, if that is longer than the slack."""
    return f" after {sight.after:.1f} s" if sight.after >= _SLACK else ""


def _differ_in_time(one: float, other: float) -> bool:
    short, long = sorted((one, other))
    return long - short > _SLACK and long > short * _FACTOR
