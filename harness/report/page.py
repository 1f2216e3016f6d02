"""Define what the report's page shows, as records: tests, tables, sums of their states.

`gather.py` makes them from results, `report.html.j2` draws them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from harness.report.causes import judged_side
from harness.report.results import GATING, in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.report.agreement import Disagreement
    from harness.report.bench import Bench
    from harness.report.blame import Rerun
    from harness.report.conformance import Conformance
    from harness.report.evidence import Text
    from harness.report.expectations import Expectation
    from harness.report.results import Invocation, Result

# From the worst to the mildest. The page has no history, so every flaky test counts as a new one.
_RANK: Final = (
    "failed", "error", "xpassed", "flaky", "blocked", "not_reached", "differs", "xfailed", "passed", "unsupported",
    "skipped",
)  # fmt: skip
BAD: Final = GATING
_KNOWN: Final = frozenset({"differs", "xfailed"})
# Tests in these states show nothing about the program.
DID_NOT_RUN: Final = frozenset({"unsupported", "skipped", "blocked", "not_reached"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One file of results. path: as the page names it; folder: where the evidence is read."""

    path: Path
    folder: Path
    seed: int
    host: Mapping[str, object]
    results: Sequence[Result]
    written: str
    invocation: Invocation
    bench: Bench | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One result as the page shows it.

    sentence: the test's name in words. rest: its parameters without the implementations. again: the command that runs
    it again. texts: its evidence. reruns: what `--blame` has run again, each with the link to its evidence.
    """

    result: Result
    anchor: str
    file: str
    sentence: str
    rest: str
    message: str
    again: str
    texts: Sequence[Text]
    expectation: Expectation | None
    reruns: Sequence[tuple[Rerun, str]] = ()

    @property
    def state(self) -> str:
        """The result's state."""
        return self.result.state

    @property
    def bad(self) -> bool:
        """True if it fails the run, or is flaky."""
        return self.state in BAD

    @property
    def tone(self) -> str:
        """The colour of its state."""
        return tone([self.state])

    @property
    def first_line(self) -> str:
        """The first line of the message: the clue."""
        return self.message.strip().split("\n", 1)[0]

    @property
    def rest_of_message(self) -> str:
        """The message without its first line; empty if it has only one."""
        return self.message.strip().partition("\n")[2]

    @property
    def names(self) -> list[str]:
        """The implementations that the result is about, each once."""
        sides = [self.result.a, self.result.b][judged_side(self.result.id)]
        return list(dict.fromkeys(side["impl"] for side in sides if side))

    @property
    def against(self) -> list[str]:
        """The programs that it counts for or against: if it failed, those to blame; an empty name for none."""
        blamed = self.result.blamed if self.bad else None
        return list(self.names if blamed is None else blamed) or [""]

    @property
    def is_shared(self) -> bool:
        """Whether it failed, and any of several programs may be to blame."""
        return self.bad and len(self.against) > 1

    @property
    def link(self) -> str:
        """The link of its expectation if that is a web address; else empty."""
        link = self.expectation.link if self.expectation else ""
        return link if link.startswith(("https://", "http://")) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCause:
    """Tests that failed by one cause: the program to blame, the test whose message is shown, and all of them.

    proof: the test whose reruns name the program; None if those of no test do.
    """

    anchor: str
    blame: str
    typical: Shown
    proof: Shown | None
    tests: Sequence[Shown]
    requirements: Sequence[str]
    bugs: Sequence[str]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """The number of its tests in each state, the worst state first."""
        return count(test.state for test in self.tests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Tests that are shown together: of a pair, of one implementation, or of a file."""

    anchor: str
    title: str
    where: str
    tests: Sequence[Shown]

    @property
    def tone(self) -> str:
        """The colour of its tests' states."""
        return tone(test.state for test in self.tests)

    @property
    def counts(self) -> list[tuple[str, int]]:
        """The number of its tests in each state, the worst state first."""
        return count(test.state for test in self.tests)

    @property
    def seconds(self) -> float:
        """The seconds that its tests took."""
        return sum(test.result.seconds for test in self.tests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a table: a configuration test, a scenario, requirement or bug. cells: its results per column.

    by_program: each column is one program, so a failure of a pair may be that of the other program.
    """

    id: str
    title: str
    level: str = ""
    cells: Sequence[Sequence[Shown]]
    by_program: bool = False

    @property
    def marks(self) -> list[tuple[str, list[tuple[str, int]], Shown | None]]:
        """The colour, the counts and the worst test of each cell."""
        return [
            (self._tone(cell), count(test.state for test in cell), min(cell, key=rank, default=None))
            for cell in self.cells
        ]

    def _tone(self, cell: Sequence[Shown]) -> str:
        shared = self.by_program and is_only_shared(cell)
        return "shared" if shared else tone(test.state for test in cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The results of one lane on one kernel, as tables.

    matrix: A x B. scenarios: scenario x pair. sides: the columns of `scenarios` as (A, B); B is empty for one
    implementation, both for none. configuration: test x implementation. others: tests of no implementation, by file.
    """

    lane: str
    kernel: str
    names: Sequence[str]
    versions: Sequence[str]
    matrix: Mapping[tuple[str, str], Panel]
    scenarios: Sequence[Row]
    sides: Sequence[tuple[str, str]]
    alone: Mapping[str, Panel]
    configuration: Sequence[Row]
    others: Sequence[Panel]

    @property
    def rows(self) -> list[str]:
        """The implementations that are A in the matrix."""
        return [name for name in self.names if any(a == name for a, _ in self.matrix)]

    @property
    def columns(self) -> list[str]:
        """The implementations that are B in the matrix."""
        return [name for name in self.names if any(b == name for _, b in self.matrix)]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The columns of `scenarios` grouped by A: (name of A, number of columns)."""
        return [(a, len(list(same))) for a, same in groupby(a if b else "" for a, b in self.sides)]

    @property
    def panels(self) -> list[Panel]:
        """All panels, in the order of the page."""
        return [*self.matrix.values(), *self.alone.values(), *self.others]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The share of a catalogue that an implementation's tests cover; tests that did not run cover nothing.

    bad: entries with a failure that counts against this implementation. shared: the other ones with a failure that
    counts against it or another.
    """

    covered: int
    of: int
    bad: int
    shared: int = 0

    @property
    def percents(self) -> tuple[float, float, float]:
        """The percentages that are covered without a failure, with one, and with one that is shared."""
        parts = (self.covered - self.bad - self.shared, self.bad, self.shared)
        well, bad, shared = (round(100 * part / max(self.of, 1), 1) for part in parts)
        return well, bad, shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Scenarios, requirements and bugs per implementation. unknown: ids that tests cite and no catalogue has."""

    names: Sequence[str]
    scenarios: Sequence[Row]
    areas: Mapping[str, Sequence[Row]]
    bugs: Sequence[Row]
    shares: Mapping[str, Mapping[str, Share]]
    unknown: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A reason why tests did not run."""

    state: str
    reason: str
    remedy: str
    count: int
    names: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that the page shows.

    tally: the numbers of failures and causes in words, then the same for each program to blame. complaint: why the run
    failed, if not by its tests. disagreements: tests that pass in one lane or on one kernel, and fail in another.
    """

    runs: Sequence[Run]
    tests: Sequence[Shown]
    groups: Sequence[Group]
    causes: Sequence[ShownCause]
    tally: Sequence[str]
    known: Sequence[Sequence[Shown]]
    skips: Sequence[Skip]
    coverage: Coverage
    slowest: Sequence[Shown]
    complaint: str
    conformance: Conformance
    disagreements: Sequence[Disagreement]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """The number of results in each state, the worst state first."""
        return count(test.state for test in self.tests)

    @property
    def headline(self) -> tuple[str, str]:
        """`good` or `bad`, and the reason in a few words."""
        bad = [f"{number} {in_words(state)}" for state, number in self.counts if state in BAD]
        passed = dict(self.counts).get("passed", 0)
        if bad or self.complaint:
            return "bad", ", ".join([*bad, *filter(None, [self.complaint])])
        if not passed:
            return "bad", "no test passed"
        return "good", f"{passed} passed"

    @property
    def seconds(self) -> float:
        """The seconds that all tests took."""
        return sum(test.result.seconds for test in self.tests)


def is_only_shared(tests: Sequence[Shown]) -> bool:
    """Whether some of these tests failed, and each of those may be the fault of several programs."""
    bad = [test for test in tests if test.bad]
    return bool(bad) and all(test.is_shared for test in bad)


def rank(test: Shown) -> int:
    """Return the rank of a test's state: 0 for the worst."""
    return rank_of(test.state)


def rank_of(state: str) -> int:
    """Return the rank of a state: 0 for the worst, and for an unknown one."""
    return _RANK.index(state) if state in _RANK else 0


def tone(states: Iterable[str]) -> str:
    """Choose the colour: `bad` if a state fails a run, `good` or `mixed` if one is `passed`, else `known`, `none`."""
    distinct = set(states)
    if distinct & BAD or distinct - set(_RANK):
        return "bad"
    if "passed" in distinct:
        return "mixed" if distinct & _KNOWN else "good"
    return "known" if distinct & _KNOWN else "none"


def count(states: Iterable[str]) -> list[tuple[str, int]]:
    """Count the states, the worst first."""
    return sorted(Counter(states).items(), key=lambda entry: rank_of(entry[0]))


def seconds(value: float) -> str:
    """Format a duration: `0.25 s`, `59.9 s`, `1 min 1 s`."""
    if value < 60:  # noqa: PLR2004 - a minute
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"
