"""Generate cases: reach a state by correct steps, then send wrong messages.

A case is fresh, or a case of the corpus with a change. Each message type is sent in each state.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from harness.fuzz import inputs
from harness.fuzz.choices import pick, weighted
from harness.fuzz.grammar import inner_packet, request
from harness.fuzz.inputs import Case, Change, Step
from harness.scripted.intents import LOW_ORDER_POINTS
from harness.wire.messages import COOKIE_REPLY, DATA, FIELDS, INITIATION, RESPONSE, SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.fuzz.choices import Chooser
    from harness.fuzz.grammar import Inner

_INITIATION, _KEEPALIVE = Step(inputs.INITIATION), Step(inputs.DATA)
_TRIGGER, _RESPONSE = Step(inputs.TRIGGER), Step(inputs.RESPONSE)
# The state of the device's handshake and sessions with the hostile peer, and the steps that lead to it.
STATES: Final = {
    "no session": (),
    "initiation sent": (_TRIGGER,),
    "response sent": (_INITIATION,),
    "session as responder": (_INITIATION, _KEEPALIVE),
    "session as initiator": (_TRIGGER, _RESPONSE),
    "session and next session": (_INITIATION, _KEEPALIVE, Step(inputs.WAIT, counter=25), _INITIATION),
    "two sessions": (_INITIATION, _KEEPALIVE, Step(inputs.WAIT, counter=25), _INITIATION, _KEEPALIVE),
    "under load": (Step(inputs.LOAD),),
    "session under load": (_INITIATION, _KEEPALIVE, Step(inputs.LOAD)),
}
# States that a peer cannot reach by messages.
IN_PROCESS_ONLY: Final = frozenset({"under load", "session under load"})
CONFIGURATION: Final = "configuration"
# What a device sends in answer to the correct steps that lead to a state.
_ANSWERS: Final = {inputs.TRIGGER: "initiation", inputs.INITIATION: "response"}
SURFACES: Final = ("packets", "uapi")
# The deepest cases are of 24 hostile steps after those of the state.
_MOST_STEPS: Final = 24
_LONGEST: Final = 2000
_MESSAGE_OF: Final = {
    inputs.INITIATION: INITIATION,
    inputs.RESPONSE: RESPONSE,
    inputs.COOKIE: COOKIE_REPLY,
    inputs.DATA: DATA,
}
_HANDSHAKE: Final = (inputs.INITIATION, inputs.RESPONSE)
# At the edges of the replay window (8192 bits, 64 of them in the word that moves), and of the limits of section 6.
_COUNTERS: Final = (
    0,
    1,
    63,
    64,
    8127,
    8128,
    8192,
    2**32,
    2**60,
    2**64 - 2**13 - 1,
    2**64 - 2**13,
    2**64 - 2,
    2**64 - 1,
)
_TIMESTAMPS: Final = (
    bytes(12),
    b"\xff" * 12,
    bytes.fromhex("4000000000000000ffffffff"),
    bytes.fromhex("3fff" + "ff" * 10),
)
_DATA_FIELDS: Final = (4, 8, 8, 16, 16)


def length_of_way(case: Case) -> int:
    """Return how many of a case's first steps are those that lead to its state; a reduced case may lack some."""
    known = STATES.get(case.state, ())
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(case.steps, known, strict=False)))


def is_reached(state: str, answers: Sequence[str]) -> bool:
    """Return whether the device has answered as it must on the way to a state. answers: by name, in any order."""
    expected = Counter(_ANSWERS[step.kind] for step in STATES.get(state, ()) if step.kind in _ANSWERS)
    return expected <= Counter(answers)


class Generator:
    """Generates cases. inner: addresses in the tunnel. surfaces: of SURFACES. states: of STATES."""

    def __init__(self, inner: Inner, surfaces: Sequence[str] = SURFACES, states: Sequence[str] = tuple(STATES)) -> None:
        self._inner = inner
        self._states = tuple(states)
        self._surfaces = [(weight, name) for weight, name in ((4, "packets"), (1, "uapi")) if name in surfaces]

    def case(self, choose: Chooser, corpus: Sequence[Case] = ()) -> Case:
        """Return a fresh case, or one of the corpus with a change."""
        if corpus and choose.below(2):
            return self._varied(choose, pick(choose, corpus))
        if weighted(choose, self._surfaces) == "uapi":
            return Case(CONFIGURATION, tuple(self._request(choose) for _ in range(1 + choose.below(4))))
        state = pick(choose, self._states)
        steps = [self.step(choose) for _ in range(1 + choose.below(_MOST_STEPS))]
        if choose.below(4) == 0:
            at = choose.below(len(steps))
            steps[at:at] = self._burst(choose)
        return Case(state, (*STATES[state], *steps))

    def _burst(self, choose: Chooser) -> list[Step]:
        """Return data messages of one length, as one flow sends them, of which one may be changed."""
        step = Step(inputs.DATA, inner_packet(choose, self._inner))
        burst = [step] * (2 + choose.below(8))
        if choose.below(2):
            burst[choose.below(len(burst))] = replace(step, changes=self._changes(choose, DATA))
        return burst

    def step(self, choose: Chooser) -> Step:
        """Return a hostile step."""
        kind = weighted(
            choose,
            [
                (10, inputs.DATA), (4, inputs.INITIATION), (4, inputs.RESPONSE), (4, inputs.COOKIE), (3, inputs.BYTES),
                (3, inputs.REPLAY), (1, inputs.HOLD), (1, inputs.TRIGGER), (1, inputs.WAIT),
            ],
        )  # fmt: skip
        if kind == inputs.BYTES:
            return Step(kind, self._bytes(choose))
        if kind == inputs.REPLAY:
            return Step(kind, counter=choose.below(8), changes=self._changes(choose, 0) if choose.below(4) == 0 else ())
        if kind in {inputs.HOLD, inputs.TRIGGER}:
            return Step(kind)
        if kind == inputs.WAIT:
            return Step(kind, counter=pick(choose, (1, 25, 1000, 5000, 10000, 15000, 121_000, 181_000)))
        return self.message(choose, kind)

    def message(self, choose: Chooser, kind: str) -> Step:
        """Return a step that sends a message of this kind, mostly changed."""
        argument, counter = b"", None
        if kind == inputs.DATA:
            argument = inner_packet(choose, self._inner)
            counter = pick(choose, _COUNTERS) if choose.below(8) == 0 else None
        elif choose.below(6) == 0:
            length = {inputs.COOKIE: 16, inputs.INITIATION: 12}.get(kind, choose.below(64))
            argument = pick(choose, _TIMESTAMPS) if kind == inputs.INITIATION else choose.content(length)
        # Half of the data keeps its tag, so that its plaintext is reached.
        is_plain = choose.below(2 if kind == inputs.DATA else 6) == 0
        changes = () if is_plain else self._changes(choose, _MESSAGE_OF[kind])
        return Step(kind, argument, counter, changes, is_sealed=choose.below(4) != 0)

    def _bytes(self, choose: Chooser) -> bytes:
        first = pick(choose, (b"", b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\4\0\0\0", b"\0\0\0\0", b"\xff"))
        length = pick(choose, (*SIZES.values(), 0, 1, 4, 31, 32, 33, choose.below(_LONGEST)))
        return (first + choose.content(max(0, length - len(first))))[: max(length, 0)]

    def _request(self, choose: Chooser) -> Step:
        return Step(inputs.UAPI, request(choose))

    def _changes(self, choose: Chooser, kind: int) -> tuple[Change, ...]:
        """Return one to three changes of a message. kind: its type, 0 if it is not known."""
        return tuple(self._change(choose, kind) for _ in range(weighted(choose, [(6, 1), (2, 2), (1, 3)])))

    def _change(self, choose: Chooser, kind: int) -> Change:
        how = weighted(choose, [(8, "field"), (3, "bit"), (2, "head"), (1, "cut"), (1, "append"), (1, "insert")])
        size = SIZES.get(kind, 200)
        if how == "bit":
            return Change(inputs.XOR, choose.below(size), bytes([1 << choose.below(8)]))
        if how == "head":
            # The type, and the reserved bytes after it.
            return Change(inputs.WRITE, choose.below(4), bytes([choose.below(6) or choose.below(256)]))
        if how == "cut":
            return Change(inputs.CUT, choose.below(size + 1))
        if how == "append":
            return Change(inputs.APPEND, 0, choose.content(pick(choose, (1, 15, 16, 32, 148, 1400))))
        if how == "insert":
            return Change(inputs.INSERT, choose.below(size), choose.content(pick(choose, (1, 4, 16))))
        return self._field(choose, kind)

    def _field(self, choose: Chooser, kind: int) -> Change:
        """Overwrite a field by a value that is special for its length."""
        if kind in SIZES:
            start, end = pick(choose, list(FIELDS[kind].values()))
            length = (end or SIZES[kind]) - start
        else:
            start, length = pick(choose, _DATA_FIELDS), pick(choose, (4, 8, 16))
        values = [bytes(length), b"\xff" * length, choose.content(length), bytes([1, *bytes(length - 1)])]
        if length == len(LOW_ORDER_POINTS[0]):
            values += LOW_ORDER_POINTS
        return Change(inputs.WRITE, start, pick(choose, values))

    def _varied(self, choose: Chooser, case: Case) -> Case:
        """Return a case of the corpus with one to four changes."""
        steps = list(case.steps)
        for _ in range(1 + choose.below(4)):
            at = choose.below(len(steps)) if steps else 0
            how = weighted(choose, [(4, "change"), (3, "add"), (1, "remove"), (1, "repeat"), (1, "swap")])
            if how == "add" or not steps:
                steps.insert(at, self._request(choose) if case.state == CONFIGURATION else self.step(choose))
            elif how == "remove":
                del steps[at]
            elif how == "repeat":
                steps.insert(at, steps[at])
            elif how == "swap":
                other = choose.below(len(steps))
                steps[at], steps[other] = steps[other], steps[at]
            else:
                steps[at] = self._changed(choose, steps[at])
        return Case(case.state, tuple(steps[: 2 * _MOST_STEPS]))

    def _changed(self, choose: Chooser, step: Step) -> Step:
        if step.kind in _MESSAGE_OF:
            change = self._change(choose, _MESSAGE_OF[step.kind])
            return replace(step, changes=(*step.changes, change)[-4:], is_sealed=choose.below(4) != 0)
        if step.argument:
            return replace(step, argument=inputs.apply(self._changes(choose, 0), step.argument)[: 2 * _LONGEST])
        return replace(step, counter=choose.below(16)) if step.kind == inputs.REPLAY else step
