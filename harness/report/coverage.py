"""Decide which requirements and bugs count as covered: cited, passed, seen to fail.

Three figures are kept apart, because each alone says little. A citation may be nominal. A test may pass only on the
implementation that it was written with. A test that was never seen to fail may be unable to.

The outcomes of runs are kept in the record, a file of the checkout: for each id, implementation and lane the newest
day's outcome. So a coverage can be read from a fresh clone, and a run of one lane does not erase the others.

Two versions of a program are two implementations here: kernels 6.1 and 6.12, wireguard-go and Debian's wireguard-go.
What has passed on versions of one program only is counted apart.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Final, Literal

from harness.report.conformance import FOLDER
from harness.report.results import in_words
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.report.conformance import Conformance, Entry
    from harness.report.results import Result, RunResults
    from harness.tables import Table

# Folders of selftests/ whose tests see nothing of an implementation but its packets and its control interface.
BLACK_BOX: Final = ("netns", "faults", "mutants", "interop", "conformance")
RECORD: Final = FOLDER / "record.toml"
# A requirement that only a unit test can observe is not counted.
_OBSERVABLE: Final = frozenset({"wire", "config", "tunnel"})
# Outcomes from the best to the worst. Of several tests that cite one id, the best one counts.
_BEST_FIRST: Final = ("passed", "differs", "xfailed", "not_reached", "blocked", "flaky", "xpassed", "error", "failed")
# Implementations on which a requirement must have passed. One of them is not refwg, which the tests are written with.
_LEAST: Final = 2
_OURS: Final = "refwg"
_KERNEL: Final = "kernel"
# Version of a kernel's source in its release: `6.12` of `6.12.117+deb12-cloud-amd64`.
_SERIES: Final = re.compile(r"\d+\.\d+")
# How the catalogue of bugs writes the name of a program, where it is not the lab's.
_WRITTEN: Final = {"kernel": "linux"}
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_HEAD: Final = """\
# Outcomes of the black-box tests that cite each id, by implementation and lane; of each, those of the newest day.
# Written by `wg-interop coverage --record`. Do not edit it by hand.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the tests that cite one id did with one implementation in one lane.

    state: the best outcome. also: the outcomes of other tests, if they differ. version, kernel: of the implementation,
    and the release of the kernel it ran on. date: the day of the run, `2026-11-30`.
    """

    state: str
    also: tuple[str, ...] = ()
    version: str = ""
    kernel: str = ""
    date: str = ""

    def merged(self, other: Cell) -> Cell:
        """Return the newer one of two; of the same day, one with the outcomes of both."""
        if self.date != other.date:
            return max(self, other, key=lambda cell: cell.date)
        best, *rest = sorted({self.state, *self.also, other.state, *other.also}, key=_BEST_FIRST.index)
        return Cell(state=best, also=tuple(rest), version=other.version, kernel=other.kernel, date=self.date)


# Id, implementation, lane.
Key = tuple[str, str, str]
Record = dict[Key, Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """One requirement or bug, with the three figures.

    tests: the black-box tests that cite it. cells: by implementation and lane, what they did.
    """

    kind: Literal["must", "should", "bug"]
    entry: Entry
    tests: Sequence[str]
    cells: Mapping[tuple[str, str], Cell]

    @property
    def passed(self) -> dict[str, list[str]]:
        """The lanes in which a test passed, by implementation."""
        lanes: dict[str, list[str]] = {}
        for (name, lane), cell in self.cells.items():
            if cell.state == "passed":
                lanes.setdefault(name, []).append(lane)
        return lanes

    @property
    def has_passed(self) -> bool:
        """Whether tests passed on two implementations; one of them is then not refwg."""
        return len(self.passed) >= _LEAST

    @property
    def has_passed_on_one_program(self) -> bool:
        """Whether the implementations on which tests passed are versions of one program, for example two kernels."""
        return self.has_passed and len({program(name) for name in self.passed}) == 1

    @property
    def was_seen_to_fail(self) -> bool:
        """Whether a deliberate defect, or for a bug one of its programs, failed a test that cites it."""
        return bool(self.entry.seen_to_fail) or bool(self.failed_as_expected)

    @property
    def failed_as_expected(self) -> list[str]:
        """The implementations that had the bug by its catalogue, and fail its test as expected; none for the others."""
        if self.kind != "bug":
            return []
        text = self.entry.source.lower()
        failing = (name for (name, _), cell in self.cells.items() if "xfailed" in {cell.state, *cell.also})
        return [name for name in dict.fromkeys(failing) if _WRITTEN.get(program(name), program(name)) in text]

    @property
    def counts(self) -> bool:
        """Whether it is covered.

        A requirement is if it is cited, has passed on two implementations, and was seen to fail. A bug is if it is
        cited, and either passed on two implementations, or a program that has it fails as expected and another passes.
        """
        if not self.tests:
            return False
        if self.kind == "bug":
            others = self.passed.keys() - set(self.failed_as_expected)
            return self.has_passed or bool(self.failed_as_expected and others)
        return self.has_passed and self.was_seen_to_fail

    @property
    def missing(self) -> list[str]:
        """What is missing of the three, in words; empty if it counts."""
        if self.counts:
            return []
        if not self.tests:
            return ["not cited"]
        words = []
        if not self.has_passed:
            where = ", ".join(f"{name} ({', '.join(lanes)})" for name, lanes in self.passed.items())
            other = ", ".join(
                f"{name} {in_words(cell.state)} ({lane})"
                for (name, lane), cell in self.cells.items()
                if name not in self.passed
            )
            words.append(f"passed only on {where}" if where else "passed nowhere")
            words += [other] if other else []
        if self.kind != "bug" and not self.was_seen_to_fail:
            words.append("never seen to fail")
        return words


@dataclass(frozen=True, slots=True)
class Total:
    """The figures of all musts, all shoulds or all bugs; passed_on_one_program: on two versions of it, and no other."""

    of: int
    cited: int
    passed: int
    passed_on_one_program: int
    seen_to_fail: int
    covered: int


def is_black_box(test: str) -> bool:
    """Return whether this test, named by its id or path, is in one of the folders of black-box tests."""
    parts = PurePath(test.partition("::")[0]).parts
    return len(parts) > _LEAST and parts[0] == "selftests" and parts[1] in BLACK_BOX


def record_of(run: RunResults, date: str) -> Record:
    """Return the outcomes of a run by the ids that its black-box tests cite. date: if its file has none.

    The outcome of a test with one pair is the worst of its rows that cite the id: a test passed if all of them did.
    Tests that did not run, and programs given by path or manifest or built with a mutant, are left out: such a program
    is not the implementation whose name it has.
    """
    tests: dict[tuple[str, str, str, str, str], list[Result]] = {}
    for result in run.results:
        if result.state in _BEST_FIRST and is_black_box(result.id):
            for entry in (*result.requirements, *result.bugs):
                test = (entry, result.id.partition("[")[0], result.pair, result.lane, result.kernel)
                tests.setdefault(test, []).append(result)
    record: Record = {}
    for (entry, *_), rows in tests.items():
        worst = max(rows, key=lambda result: _BEST_FIRST.index(result.state))
        for side in filter(None, (worst.a, worst.b)):
            if not _is_variant(side, run):
                cell = Cell(
                    state=worst.state,
                    version=side.get("version", ""),
                    kernel=worst.kernel,
                    date=run.date[:10] or date,
                )
                merge(record, {(entry, implementation(side["impl"], worst.kernel), worst.lane): cell})
    return record


def implementation(name: str, release: str) -> str:
    """Return the name in the record; the kernel's has its version: `kernel 6.12`. release: of the kernel."""
    series = _SERIES.match(release)
    return f"{name} {series[0]}" if name == _KERNEL and series else name


def program(name: str) -> str:
    """Return the program of which this is a version: `kernel` of `kernel 6.12`, `wireguard-go` of Debian's."""
    return name.partition(" ")[0].removesuffix("-debian")


def _is_variant(side: Mapping[str, str], run: RunResults) -> bool:
    """Return whether a program is not the implementation of its name: given by path or manifest, or a mutant."""
    name = side["impl"]
    if name == _KERNEL and run.invocation.kernel_modules:
        return True
    return name in run.invocation.programs or name in run.invocation.manifests or "+" in name or "like" in side


def citations_of(run: RunResults) -> dict[str, set[str]]:
    """Return the black-box tests of a run by the ids that they cite."""
    cited: dict[str, set[str]] = {}
    for result in run.results:
        if is_black_box(result.id):
            for entry in (*result.requirements, *result.bugs):
                cited.setdefault(entry, set()).add(result.id.partition("[")[0])
    return cited


def merge(record: Record, more: Record) -> None:
    """Add outcomes to a record; a newer day replaces an older one."""
    for key, cell in more.items():
        record[key] = record[key].merged(cell) if key in record else cell


def cover(conformance: Conformance, cited: Mapping[str, Iterable[str]], record: Record) -> list[Covered]:
    """Return all observable requirements, and all bugs, in the order of their catalogues.

    cited: the black-box tests by the ids that they cite.
    """
    cells: dict[str, dict[tuple[str, str], Cell]] = {}
    for (name, implementation, lane), cell in sorted(record.items()):
        cells.setdefault(name, {})[implementation, lane] = cell

    def covered(kind: Literal["must", "should", "bug"], entry: Entry) -> Covered:
        tests = sorted(cited.get(entry.id, ()))
        return Covered(kind=kind, entry=entry, tests=tests, cells=cells.get(entry.id, {}))

    levels: tuple[Literal["must", "should"], ...] = ("must", "should")
    demanded = [
        covered(level, entry)
        for level in levels
        for entry in conformance.requirements.values()
        if entry.level == level and entry.observe in _OBSERVABLE
    ]
    return demanded + [covered("bug", entry) for entry in conformance.bugs.values()]


def total(every: Sequence[Covered], kind: str) -> Total:
    """Return the figures of all entries of this kind."""
    chosen = [each for each in every if each.kind == kind]
    return Total(
        of=len(chosen),
        cited=sum(bool(each.tests) for each in chosen),
        passed=sum(each.has_passed for each in chosen),
        passed_on_one_program=sum(each.has_passed_on_one_program for each in chosen),
        seen_to_fail=sum(each.was_seen_to_fail for each in chosen),
        covered=sum(each.counts for each in chosen),
    )


def document(every: Sequence[Covered]) -> dict[str, object]:
    """Return the coverage as the document of `wg-interop coverage --json`."""
    kinds = ("must", "should", "bug")
    return {
        **{f"uncovered_{kind}": [e.entry.id for e in every if e.kind == kind and not e.counts] for kind in kinds},
        "totals": {kind: _fields(total(every, kind)) for kind in kinds},
        "by_requirement": {each.entry.id: _shown(each) for each in every if each.kind != "bug"},
        "by_bug": {each.entry.id: _shown(each) for each in every if each.kind == "bug"},
    }


def _fields(figures: Total) -> dict[str, int]:
    return asdict(figures)


def _shown(each: Covered) -> dict[str, object]:
    return {
        "title": each.entry.title,
        "level": each.entry.level,
        "covered": each.counts,
        "missing": each.missing,
        "cited": list(each.tests),
        "passed": each.passed,
        "seen_to_fail": each.entry.seen_to_fail,
        "outcomes": [
            {
                "implementation": name, "lane": lane, "state": cell.state, "also": list(cell.also),
                "version": cell.version, "kernel": cell.kernel, "date": cell.date,
            }
            for (name, lane), cell in each.cells.items()
        ],
    }  # fmt: skip


# The record's file


def read_record(path: Path) -> Record:
    """Read a record; empty if there is no file. Raises UsageError for a mistake in it."""
    if not path.exists():
        return {}
    top = read_toml(path, str(path))
    record: Record = {}
    for entry in top.rest():
        by_name = top.table(entry)
        for name in by_name.rest():
            by_lane = by_name.table(name)
            for lane in by_lane.rest():
                cell = _read_cell(by_lane.table(lane))
                record[entry, implementation(name, cell.kernel), lane] = cell
    return record


def _read_cell(table: Table) -> Cell:
    cell = Cell(
        state=table.text("state"),
        also=table.words("also", ()),
        version=table.text("version", ""),
        kernel=table.text("kernel", ""),
        date=table.text("date"),
    )
    table.refuse_rest()
    for state in (cell.state, *cell.also):
        if state not in _BEST_FIRST:
            raise table.wrong(f"{table.title}state {state!r} is not one of {', '.join(_BEST_FIRST)}")
    return cell


def record_text(record: Record) -> str:
    """Return a record as TOML, sorted, with one line for each outcome."""
    lines = [_HEAD.rstrip("\n")]
    last = ""
    for (entry, name, lane), cell in sorted(record.items()):
        if entry != last:
            lines += ["", f"[{entry}]"]
            last = entry
        also = [f"also = [{', '.join(map(_quoted, cell.also))}]"] if cell.also else []
        texts = {"state": cell.state, "version": cell.version, "kernel": cell.kernel, "date": cell.date}
        words = [f"{key} = {_quoted(text)}" for key, text in texts.items()]
        key = name if _BARE_KEY.fullmatch(name) else _quoted(name)
        lines.append(f"{key}.{lane} = {{{', '.join([words[0], *also, *words[1:]])}}}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a string of TOML; a version may contain any character."""
    plain = "".join(char if char.isprintable() else "?" for char in text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
