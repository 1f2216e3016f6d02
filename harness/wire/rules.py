"""Apply a fault script to frames, without I/O; the time is passed in.

The caller passes in each frame with the end it came from, and gets deliveries: frames to send now to the other end. A
delivery has a comment for the capture, which names the rule and what it did.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.wire import frames
from harness.wire.fragments import Arrival
from harness.wire.messages import NANOSECONDS
from harness.wire.script import Delay, Duplicate, Flip, Hold, Replay, is_a, ranges

if TYPE_CHECKING:
    from harness.wire.messages import Message
    from harness.wire.script import Rule, Script

ENDS: Final = (0, 1)
_NO_NOTES: Final = ("",)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A frame to send now. side: the end it came from; it leaves by the other. comment: what a rule did to it."""

    frame: bytes = field(repr=False)
    side: int
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The script's decision about a frame, or about a datagram in fragments, on its arrival.

    message: the UDP datagram in it, or what it is instead. did: `passed`, `dropped`, `held`, `delayed`, `duplicated`,
    `replayed` or `flipped`. rule: number of the rule that took it, 1 for the first; None if no rule did. comments: for
    the capture, one for each frame that arrived.
    """

    message: Message
    did: str
    rule: int | None = None
    comments: tuple[str, ...] = ("",)

    @property
    def comment(self) -> str:
        """The comment on the first frame."""
        return self.comments[0]


@dataclass(slots=True)
class _Waiting:
    """A message that is held.

    frames: with the message, or its fragments; notes: on each, see `Arrival.notes`. rule: number of its rule. what: the
    message in words. behind: how many messages must still pass in its direction. word: `released`, `delayed` or
    `replayed`, for the comment.
    """

    frames: tuple[bytes, ...]
    notes: tuple[str, ...]
    side: int
    rule: int
    what: str
    behind: int = 0
    word: str = ""

    def deliveries(self, word: str) -> list[Delivery]:
        """Return the frames to send. word: what the rule did."""
        return _deliveries(self.frames, self.side, self.comments(word))

    def comments(self, word: str) -> tuple[str, ...]:
        """Return a comment on each frame."""
        return tuple(f"{word}: {self.what}" + f"; {note}" * bool(note) for note in self.notes)


@dataclass(slots=True)
class _RuleState:
    """Run-time state of one rule: its match count (`seen`), and a random generator per direction (`chance`).

    matched: how many messages met all conditions but `share`. With one generator for both directions, the decisions
    would depend on how the two directions interleave.
    """

    rule: Rule
    chance: tuple[random.Random, random.Random]
    seen: int = 0
    matched: int = 0
    nth: tuple[tuple[int, int | None], ...] | None = field(init=False)
    counters: tuple[tuple[int, int | None], ...] | None = field(init=False)

    def __post_init__(self) -> None:
        self.nth = ranges("nth", self.rule.nth)
        self.counters = ranges("counters", self.rule.counters)

    def takes(self, message: Message, sender: str, side: int) -> bool:
        """Decide whether the rule takes this message, and count it if it meets the conditions before `nth`."""
        rule = self.rule
        if not is_a(message, rule.message) or rule.sender not in {None, sender}:
            return False
        if self.counters is not None and (message.counter is None or not _within(message.counter, self.counters)):
            return False
        self.seen += 1
        if self.nth is not None and not _within(self.seen, self.nth):
            return False
        self.matched += 1
        return rule.share == 1 or self.chance[side].random() < rule.share


def _within(number: int, spans: tuple[tuple[int, int | None], ...]) -> bool:
    return any(first <= number and (last is None or number <= last) for first, last in spans)


class Rules:
    """Run-time state of one script on one wire. All times are ns of one monotonic clock, passed in as `now`."""

    def __init__(self, script: Script, nodes: tuple[str, str], *, seed: int) -> None:
        """Start the script.

        nodes: names of the nodes at the two ends. seed: used if the script has none. Raises UsageError for a rule whose
        sender is not one of the nodes.
        """
        seed = seed if script.seed is None else script.seed
        for number, rule in enumerate(script.rules, 1):
            if rule.sender not in {None, *nodes}:
                names = " and ".join(nodes)
                raise UsageError(
                    f"rule {number} ({rule}): sender: this wire has no node {rule.sender}; it connects {names}"
                )
        self._nodes = nodes
        self._states = [_rule_state(rule, seed, number) for number, rule in enumerate(script.rules, 1)]
        # Held frames by order of arrival; the keys of those that wait for others to pass; and a heap of (time, key).
        self._held: dict[int, _Waiting] = {}
        self._behind: set[int] = set()
        self._timed: list[tuple[int, int]] = []
        self._order = count()

    def arrive(self, frame: bytes, side: int, now: int, time: int = 0) -> tuple[Decision, list[Delivery]]:
        """Decide about a frame that has arrived from end `side`; time: its time stamp, for the record."""
        return self.decide(Arrival(frame, frames.read(frame)), side, now, time)

    def decide(self, arrival: Arrival, side: int, now: int, time: int = 0) -> tuple[Decision, list[Delivery]]:
        """Decide about a frame, or about all fragments of a datagram at once; arguments as for `arrive`."""
        message = arrival.message(time)
        notes = arrival.notes(message.name) if arrival.pieces else _NO_NOTES
        for number, state in enumerate(self._states, 1):
            if not arrival.is_gone and state.takes(message, self._nodes[side], side):
                what = f"{message.name} {state.seen} (rule {number}: {state.rule})"
                taken = _Waiting(arrival.frames, notes, side, number, what)
                return self._carry_out(taken, state, arrival, message, now)
        out = [] if arrival.is_gone else _deliveries(arrival.frames, side, notes)
        return Decision(message, "passed", comments=notes), [*out, *self._passed(message, side)]

    def may_take(self, side: int) -> bool:
        """Return whether any rule may take a message from end `side`."""
        return any(state.rule.sender in {None, self._nodes[side]} for state in self._states)

    def unmatched(self) -> list[str]:
        """Return the rules whose conditions no message has met, but for those that are optional."""
        return [
            f"rule {number} ({state.rule})"
            for number, state in enumerate(self._states, 1)
            if not state.matched and not state.rule.optional
        ]

    def _carry_out(
        self, taken: _Waiting, state: _RuleState, arrival: Arrival, message: Message, now: int
    ) -> tuple[Decision, list[Delivery]]:
        rule, side = state.rule, taken.side
        whole = _deliveries(taken.frames, side, taken.notes)
        out: list[Delivery] = []
        match rule:
            case Flip():
                did = "flipped"
                taken.frames = arrival.changed(rule.apply(message.payload))
                out = [*taken.deliveries(did), *self._passed(message, side)]
            case Duplicate():
                did = "duplicated"
                out = [*whole, *taken.deliveries("copy") * rule.copies, *self._passed(message, side)]
            case Delay():
                did = "delayed"
                delay = rule.seconds + rule.jitter * state.chance[side].random()
                self._wait(taken, "delayed", None, delay, now)
            case Replay():
                did = "replayed"
                out = [*whole, *self._passed(message, side)]
                if rule.port is not None:
                    taken.frames = arrival.changed(message.payload, port=rule.port)
                self._wait(taken, "replayed", rule.behind, rule.seconds, now)
            case Hold():
                did = "held"
                self._wait(taken, "released", rule.behind, rule.seconds, now)
                out = self._gathered(rule, taken.rule)
            case _:
                did = "dropped"
        return Decision(message, did, taken.rule, taken.comments(did)), out

    def _gathered(self, rule: Hold, number: int) -> list[Delivery]:
        """Release the messages that a rule holds, once there are as many as it gathers."""
        gathered = [key for key, waiting in self._held.items() if waiting.rule == number]
        return self._let_go(gathered) if rule.gather is not None and len(gathered) >= rule.gather else []

    def _wait(self, waiting: _Waiting, word: str, behind: int | None, seconds: float | None, now: int) -> None:
        waiting.word, waiting.behind = word, behind or 0
        key = next(self._order)
        self._held[key] = waiting
        if behind is not None:
            self._behind.add(key)
        if seconds is not None:
            heapq.heappush(self._timed, (now + int(seconds * NANOSECONDS), key))

    def _passed(self, message: Message, side: int) -> list[Delivery]:
        """Count a WireGuard message that has passed from end `side`, and release the frames that waited for it."""
        if not message.kind:
            return []
        ready = []
        for key in sorted(self._behind):
            waiting = self._held[key]
            if waiting.side == side:
                waiting.behind -= 1
                if waiting.behind == 0:
                    ready.append(key)
        return self._let_go(ready)

    def _let_go(self, keys: list[int]) -> list[Delivery]:
        self._behind.difference_update(keys)
        ready = [self._held.pop(key) for key in keys]
        return [delivery for waiting in ready for delivery in waiting.deliveries(waiting.word)]

    def release(self) -> list[Delivery]:
        """Release all held frames, oldest first."""
        return self._let_go(list(self._held))

    @property
    def holds(self) -> int:
        """Number of held messages."""
        return len(self._held)

    def next_deadline(self) -> int | None:
        """Return when `due` must be called next; None if no frame waits for a time."""
        while self._timed and self._timed[0][1] not in self._held:
            heapq.heappop(self._timed)
        return self._timed[0][0] if self._timed else None

    def due(self, now: int) -> list[Delivery]:
        """Release the frames whose time has come."""
        ready = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            ready += self._let_go([heapq.heappop(self._timed)[1]])
        return ready


def _deliveries(whole: tuple[bytes, ...], side: int, comments: tuple[str, ...]) -> list[Delivery]:
    return [Delivery(frame, side, comment) for frame, comment in zip(whole, comments, strict=True)]


def _rule_state(rule: Rule, seed: int, number: int) -> _RuleState:
    first, second = (random.Random(f"{seed} {number} {side}") for side in ENDS)  # noqa: S311 - reproducible on purpose
    return _RuleState(rule, (first, second))
