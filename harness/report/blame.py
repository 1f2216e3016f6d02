"""Name the program to blame for a failed test, by reruns with a referee for A or B.

The referee is a program that passes the tests: refwg, or another one if refwg itself is A or B. Nothing here runs a
test; harness/plugin/reruns.py does, and writes what `judge` returns into the results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from harness.tables import Table

_T = TypeVar("_T")
# States of a first result that is run again; an expected failure is not, and no program is to blame for an xpass.
RUN_AGAIN: Final = frozenset({"failed", "error", "blocked", "not_reached"})
_FAILS: Final = RUN_AGAIN | {"xfailed"}
_HOLDS: Final = frozenset({"passed", "differs"})

# Verdicts, as results.json has them.
FLAKY: Final = "flaky"
A_DEVIATES: Final = "a_deviates"
B_DEVIATES: Final = "b_deviates"
B_DOES_NOT_TOLERATE: Final = "b_does_not_tolerate"
BOTH_DEVIATE: Final = "both_deviate"
ONLY_TOGETHER: Final = "only_together"
TEST_OR_MACHINE: Final = "test_or_machine"
UNDECIDED: Final = "undecided"
WORDS: Final = {
    FLAKY: "flaky",
    A_DEVIATES: "A deviates",
    B_DEVIATES: "B deviates",
    B_DOES_NOT_TOLERATE: "B does not tolerate it",
    BOTH_DEVIATE: "A and B deviate",
    ONLY_TOGETHER: "only together",
    TEST_OR_MACHINE: "the test or the machine",
    UNDECIDED: "undecided",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """One test that was run again. pair: `A~B`, or `A` for one implementation. artifacts: as in a result."""

    pair: str
    state: str
    seconds: float = 0.0
    message: str = ""
    artifacts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What the reruns of a failed test show.

    verdict: a key of WORDS. programs: whom it names; none for a flaky or undecided test, and if the test or the machine
    is at fault. first: the state of the first run. text: the reason, in one sentence. wire: the first difference on the
    wire between the failing pair and the referee with itself; empty if it is not known. inferred: the test was not run
    again, and the verdict is that of the other tests of its cause.
    """

    verdict: str
    programs: tuple[str, ...] = ()
    first: str = "failed"
    text: str = ""
    wire: str = ""
    reruns: tuple[Rerun, ...] = ()
    inferred: bool = False

    @property
    def words(self) -> str:
        """The verdict as people write it."""
        return WORDS.get(self.verdict, self.verdict)

    @property
    def settled(self) -> tuple[str, ...] | None:
        """The programs to blame, none if the test or the machine is; None if that is not decided."""
        return None if self.verdict in {FLAKY, UNDECIDED} else self.programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The implementations of a failed test, and the program that takes their place in its reruns.

    b: None for a test of one implementation. referee: neither A nor B.
    """

    a: str
    b: str | None
    referee: str

    @property
    def again(self) -> str:
        """The pair as it was."""
        return _pair(self.a, self.b)

    @property
    def reference(self) -> str:
        """The pair of the referee with itself; for a test of one implementation, the referee."""
        return _pair(self.referee, self.referee if self.b else None)

    @property
    def a_with_referee(self) -> str:
        """The pair in which the referee has the place of B."""
        return _pair(self.a, self.referee)

    @property
    def b_with_referee(self) -> str:
        """The pair in which the referee has the place of A."""
        return _pair(self.referee, self.b)

    @property
    def swapped(self) -> str:
        """The pair with A in B's place, and B in A's."""
        return _pair(self.b or self.a, self.a)

    @property
    def pairs(self) -> list[str]:
        """The pairs to run, in order, each once."""
        if self.b is None:
            return [self.again, self.reference]
        every = [self.again, self.a_with_referee, self.b_with_referee, self.reference, self.swapped]
        return list(dict.fromkeys(every))


def _pair(a: str, b: str | None) -> str:
    return f"{a}~{b}" if b else a


def judge(trial: Trial, reruns: Mapping[str, Rerun], first: str = "failed", missing: str = "") -> Blame:
    """Name the program to blame. reruns: by pair; first: the state of the first run; missing: why one is missing."""
    verdict, programs, text = _verdict(trial, reruns, missing)
    ran = tuple(reruns[pair] for pair in trial.pairs if pair in reruns)
    return Blame(verdict=verdict, programs=programs, first=first, text=text, reruns=ran)


def undecided(first: str, why: str) -> Blame:
    """Return the blame of a test that was not run again, with the reason."""
    return Blame(verdict=UNDECIDED, first=first, text=f"not run again: {why}")


def like_others(a: str, b: str, own: Blame, others: Iterable[Blame]) -> Blame:
    """Return the verdict of the other tests of a cause for one that was not run again; its own blame if they disagree.

    a, b: the implementations of the test; b is empty if it has only one. others: undecided ones do not count.
    """
    decided = [other for other in others if other.verdict != UNDECIDED]
    verdicts = {other.verdict for other in decided}
    if FLAKY in verdicts or len({frozenset(other.programs) for other in decided}) != 1:
        return own
    programs = tuple(name for name in dict.fromkeys((a, b)) if name in decided[0].programs)
    if verdicts <= {A_DEVIATES, B_DOES_NOT_TOLERATE} and a != b:
        # The same program has the other role in some tests.
        verdicts = {A_DEVIATES if programs == (a,) else B_DOES_NOT_TOLERATE}
    if len(verdicts) > 1 or len(programs) != len(decided[0].programs):
        return own
    (verdict,) = verdicts
    text = (
        f"{_CHARGES[verdict].format(' and '.join(programs))}, like the other tests of this cause; not run again itself"
    )
    return replace(own, verdict=verdict, programs=programs, text=text, inferred=True)


# What a verdict says of its programs.
_CHARGES: Final = {
    A_DEVIATES: "{} deviates",
    B_DOES_NOT_TOLERATE: "{} does not tolerate it",
    BOTH_DEVIATE: "to blame: {}",
    ONLY_TOGETHER: "only together: {}",
    TEST_OR_MACHINE: "the test or the machine is at fault",
}


def of_sender(a: str, b: str, role: str) -> Blame:
    """Return the blame for a datagram that breaks an invariant: its sender is to blame, and nothing is run again.

    role: `a` or `b`, that of the sender.
    """
    verdict, program = (B_DEVIATES, b) if role == "b" else (A_DEVIATES, a)
    return Blame(verdict=verdict, programs=(program,), text=f"{program} deviates: it has sent the datagram")


_Verdict = tuple[str, tuple[str, ...], str]


def _verdict(trial: Trial, reruns: Mapping[str, Rerun], missing: str) -> _Verdict:
    fails = {pair: rerun.state in _FAILS for pair, rerun in reruns.items() if rerun.state in _FAILS | _HOLDS}
    if fails.get(trial.again) is False:
        return FLAKY, (), f"{trial.again} failed at first, and passed when it was run again with the same seed"
    if pair := _not_known(trial, reruns, fails):
        return _undecided(pair, reruns, missing)
    if fails[trial.reference]:
        return TEST_OR_MACHINE, (), f"{trial.reference} fails, too: the test or the machine is at fault"
    if trial.b is None:
        return A_DEVIATES, (trial.a,), f"{trial.a} deviates: {trial.referee} passes the same test"
    verdict, programs, text = _of_pair(trial, trial.b, fails[trial.a_with_referee], fails[trial.b_with_referee])
    if trial.swapped in fails and trial.swapped != trial.again:
        text += f"; {trial.swapped} {'fails' if fails[trial.swapped] else 'passes'}"
    return verdict, programs, text


def _not_known(trial: Trial, reruns: Mapping[str, Rerun], fails: Mapping[str, bool]) -> str:
    """Return the first pair without which there is no verdict; empty if there is none."""
    if trial.again not in fails:
        return trial.again
    if fails.get(trial.reference):
        # A known failure of the referee shows nothing about the test.
        return trial.reference if reruns[trial.reference].state == "xfailed" else ""
    needed = (trial.a_with_referee, trial.b_with_referee, trial.reference) if trial.b else (trial.reference,)
    return next((pair for pair in needed if pair not in fails), "")


def _of_pair(trial: Trial, b: str, a_fails: bool, b_fails: bool) -> _Verdict:
    """Return the verdict on a pair that fails again, and whose referee passes with itself."""
    a, referee, both = trial.a, trial.referee, tuple(dict.fromkeys((trial.a, b)))
    if a_fails and b_fails:
        text = f"{' and '.join(both)} deviate{'s' * (len(both) == 1)}: A and B fail with {referee}, each"
        return BOTH_DEVIATE, both, text
    if a_fails:
        return A_DEVIATES, (a,), f"{a} deviates: {trial.a_with_referee} fails, too, and {trial.b_with_referee} passes"
    if b_fails:
        text = f"{b} does not tolerate it: {trial.b_with_referee} fails, too, and {trial.a_with_referee} passes"
        return B_DOES_NOT_TOLERATE, (b,), text
    text = f"{' and '.join(both)} fail{'s' * (len(both) == 1)} only together: each side passes with {referee}"
    return ONLY_TOGETHER, both, text


def _undecided(pair: str, reruns: Mapping[str, Rerun], missing: str) -> _Verdict:
    if pair in reruns:
        rerun = reruns[pair]
        reason = f": {first_line(rerun.message)}" if rerun.message else ""
        return UNDECIDED, (), f"{pair} is {rerun.state.replace('_', ' ')}{reason}"
    return UNDECIDED, (), f"{pair} was not run again: {missing or 'it has no result'}"


def first_line(message: str) -> str:
    """Return the first line of a message: the clue."""
    return message.strip().partition("\n")[0]


def choose_referee(a: str, b: str | None, candidates: Iterable[str]) -> str:
    """Return the first candidate that is neither A nor B; empty if there is none."""
    return next((name for name in candidates if name not in {a, b}), "")


def by_turns(causes: Sequence[Sequence[_T]]) -> list[_T]:
    """Order the witnesses of causes so that each cause has its first witness before any has its second."""
    longest = max(map(len, causes), default=0)
    return [witnesses[n] for n in range(longest) for witnesses in causes if n < len(witnesses)]


def other_id(identity: str, pair: str, other: str) -> str:
    """Return the id of a test with another pair; empty if the id does not begin its parameters with the pair."""
    name, bracket, parameters = identity.partition("[")
    rest = parameters.removeprefix(pair)
    if not bracket or rest == parameters or rest[:1] not in {"-", "]"}:
        return ""
    return f"{name}[{other}{rest}"


def read_blame(entry: Table) -> Blame | None:
    """Read the blame of a result; None if it has none."""
    if not entry.rest():
        return None
    return Blame(
        verdict=entry.text("verdict", UNDECIDED),
        programs=entry.words("programs", ()),
        first=entry.text("first", "failed"),
        text=entry.text("text", ""),
        wire=entry.text("wire", ""),
        inferred=entry.flag("inferred", default=False),
        reruns=tuple(
            Rerun(
                pair=rerun.text("pair"),
                state=rerun.text("state"),
                seconds=rerun.decimal("seconds", 0.0),
                message=rerun.text("message", ""),
                artifacts=rerun.text("artifacts", ""),
            )
            for rerun in entry.tables("reruns", "rerun")
        ),
    )
