"""Print a run: progress, the matrix of A and B, failures, skips by reason, the conclusion.

On a terminal the progress is a bar and the matrix so far, drawn in place; elsewhere it is a line every few seconds.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TextIO

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness import suite
from harness.report.causes import CITED, find_causes, fingerprint, tally_by_program, tally_of_causes
from harness.report.conformance import read_conformance
from harness.report.results import GATING, STATES, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import RenderableType

    from harness.report.blame import Blame
    from harness.report.causes import Cause
    from harness.report.conformance import Conformance
    from harness.report.results import Result


OK, FAILED, USAGE, COULD_NOT = 0, 1, 2, 125
PYTEST_USAGE, PYTEST_NO_TESTS = 4, 5  # exit statuses, pytest.ExitCode
PACE: Final = 3.0  # seconds between two lines of progress without a terminal
FRAME: Final = 0.1  # seconds between two pictures on a terminal
RECENT: Final = 3  # finished tests that the live view names
MESSAGE_LINES: Final = (50, 10)  # lines from the start and the end of a long message; the page has all
WITNESSES: Final = 10  # tests of a cause that are named; the page has all of them
WIDTH: Final = 200  # columns without a terminal, so that tables are not folded
ALONE: Final = "(alone)"  # the column of tests with one implementation
_STYLES: Final = {"passed": "green", "skipped": "dim"} | dict.fromkeys(GATING, "bold red")
_OTHER_STYLE: Final = "yellow"
# States that are listed by reason, not by test.
_WITH_REASON: Final = frozenset({"differs", "unsupported", "skipped"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one test. pair: `A~B`, `A` or empty. artifacts: relative to the report directory."""

    id: str
    pair: str = ""
    state: str = "passed"
    seconds: float = 0.0
    message: str = ""
    artifacts: str = ""
    lane: str = ""
    kernel: str = ""
    requirements: Sequence[str] = ()
    bugs: Sequence[str] = ()
    blame: Blame | None = None

    @property
    def blamed(self) -> tuple[str, ...] | None:
        """The programs to blame by its reruns; None if they have not decided that."""
        return self.blame.settled if self.blame else None

    @property
    def is_inferred(self) -> bool:
        """Whether it was blamed like the other tests of its cause, without reruns of its own."""
        return self.blame is not None and self.blame.inferred

    @property
    def identity(self) -> tuple[str, str, str]:
        """The id with lane and kernel: a test may run in several lanes and on several kernels."""
        return self.id, self.lane, self.kernel

    @property
    def name(self) -> str:
        """The test's function with its parameters."""
        return self.id.rpartition("/")[2].partition("::")[2] or self.id


class Events:
    """Reads pytest's events from a pipe, without waiting."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._rest = b""
        self.ended = False

    def lines(self) -> list[bytes]:
        """Return the whole lines received since the last call."""
        with suppress(BlockingIOError):
            while chunk := os.read(self.descriptor, 1 << 16):
                self._rest += chunk
            self.ended = True
        *lines, self._rest = self._rest.split(b"\n")
        return lines


@dataclass(slots=True)
class Tally:
    """The outcomes so far, by test, lane and kernel.

    total: the number of tests; None before it is known. note: what pytest does when all tests have ended. remarks: what
    to print below the results.
    """

    total: int | None = None
    note: str = ""
    remarks: list[str] = field(default_factory=list)
    outcomes: dict[tuple[str, str, str], Outcome] = field(default_factory=dict)

    def take(self, line: bytes) -> Outcome | None:
        """Read one event of the plugin's Reporter; returns the outcome, or None for any other line."""
        try:
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "collected":
                self.total = max(self.total or 0, int(event["count"]))
                return None
            if kind == "note":
                self.note = str(event["text"])
                return None
            if kind == "remark":
                self.remarks.append(str(event["text"]))
                return None
            outcome = Outcome(**event)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        self.outcomes[outcome.identity] = outcome
        return outcome

    def replace(self, results: Iterable[Result]) -> None:
        """Replace the outcomes by those of results.json, which also have the path of the evidence.

        A passed result is left out if no event reported the end of its test: then the test was interrupted.
        """
        whole = [_from_result(result) for result in results]
        ended = self.outcomes
        self.outcomes = {each.identity: each for each in whole if each.state != "passed" or each.identity in ended}

    def counts(self) -> Counter[str]:
        """Count the tests in each state."""
        return Counter(outcome.state for outcome in self.outcomes.values())

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total}"
        return ", ".join([f"{len(self.outcomes)}{total} tests", *_counted(self.counts())])


def _from_result(result: Result) -> Outcome:
    return Outcome(
        id=result.id,
        pair=result.pair,
        state=result.state,
        seconds=result.seconds,
        message=result.message,
        artifacts=result.artifacts,
        lane=result.lane,
        kernel=result.kernel,
        requirements=tuple(result.requirements),
        bugs=tuple(result.bugs),
        blame=result.blame,
    )


def _counted(counts: Counter[str]) -> list[str]:
    """Format counts as `14 passed`, `2 failed`, in the order of STATES."""
    return [f"{counts[state]} {in_words(state)}" for state in STATES if counts[state]]


def console(stream: TextIO) -> Console:
    """Make a console that draws on a terminal, and writes plain text elsewhere even with FORCE_COLOR."""
    terminal = stream.isatty()
    made = Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )
    return plain_console(stream, made.width) if not terminal or made.is_dumb_terminal else made


def plain_console(stream: TextIO, width: int = WIDTH) -> Console:
    """A console that writes plain text and draws nothing, also on a terminal."""
    return Console(file=stream, color_system=None, force_terminal=False, width=width, markup=False)


def complain(message: str, status: int) -> int:
    """Print an error as one line on stderr; returns the exit status that was given."""
    click.echo(f"wg-interop: {' '.join(message.split())}", err=True)
    return status


def line(out: Console, text: str = "", style: str = "") -> None:
    """Print a line without folding it, so that paths in it can be copied."""
    out.print(Text(text, style=style), soft_wrap=True)


# While it runs


class Progress:
    """Print the progress of a run. Call `moved` after each outcome, `tick` at least twice a second."""

    def __init__(self, out: Console, tally: Tally, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._tally = tally
        self._clock = clock
        self._start = self._printed = clock()
        self._recent: list[Outcome] = []
        self._live = Live(console=out, auto_refresh=False, transient=True) if out.is_terminal else None
        self.note = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return self._clock() - self._start

    def moved(self, outcome: Outcome) -> None:
        """Add an outcome to the progress; print it at once if it fails the run."""
        self._recent = [*self._recent, outcome][-RECENT:]
        if outcome.state in GATING:
            line(self._out, f"{in_words(outcome.state)}: {outcome.id}", _style(outcome.state))

    def tick(self) -> None:
        """Draw the progress or print a line of it, unless the last one is less than FRAME or PACE seconds old."""
        if self._clock() - self._printed < (PACE if self._live is None else FRAME):
            return
        self._printed = self._clock()
        if self._live is None:
            line(self._out, self._status())
        else:
            self._live.update(self._picture(), refresh=True)

    def _status(self) -> str:
        what = "collecting tests" if self._tally.total is None else str(self._tally)
        note = self.note or self._tally.note
        return f"{what}, {self.seconds:.0f} s{note and '; '}{note}"

    def _picture(self) -> RenderableType:
        done, total = len(self._tally.outcomes), self._tally.total
        bar = ProgressBar(total=total or 1, completed=done, width=min(40, self._out.width))
        recent = [Text(f"{in_words(outcome.state)} {outcome.name}", _style(outcome.state)) for outcome in self._recent]
        for text in recent:
            text.truncate(self._out.width, overflow="ellipsis")
        table = matrix(self._tally.outcomes.values())
        bottom = Table.grid(padding=(0, 1))
        bottom.add_row(bar, self._status())
        return Group(*recent, *([table] if table else []), bottom)


# The summary at the end


def matrix(outcomes: Iterable[Outcome]) -> Table | None:
    """Make the table of A and B with the states of their tests; None if no test had an implementation."""
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        a, _, b = outcome.pair.partition("~")
        if a:
            cells[a, b or ALONE][outcome.state] += 1
    if not cells:
        return None
    columns = sorted({b for _, b in cells}, key=lambda name: (name == ALONE, name))
    table = Table("A \\ B", *columns, show_lines=True)
    for a in sorted({a for a, _ in cells}):
        table.add_row(Text(a, "bold"), *(_cell(cells.get((a, b), Counter())) for b in columns))
    return table


def _cell(counts: Counter[str]) -> Text:
    lines = [Text(f"{counts[state]} {in_words(state)}", _style(state)) for state in STATES if counts[state]]
    return Text("\n").join(lines)


def _style(state: str) -> str:
    return _STYLES.get(state, _OTHER_STYLE)


def summary(out: Console, tally: Tally, report: Path) -> None:
    """Print the matrix, each cause of failures with its message and evidence, and the reasons of skips."""
    outcomes = list(tally.outcomes.values())
    table = matrix(outcomes)
    if table is not None:
        out.print(table)
    rest = Counter(outcome.state for outcome in outcomes if not outcome.pair)
    if rest:
        line(out, f"without an implementation: {', '.join(_counted(rest))}")
    _show_causes(out, outcomes, report)
    _show_reasons(out, [outcome for outcome in outcomes if outcome.state in _WITH_REASON])
    for text, count in Counter(each.message for each in outcomes if each.state == "passed" and each.message).items():
        line(out, f"{count} passed: {text}", _style("passed"))


def _show_causes(out: Console, outcomes: Sequence[Outcome], report: Path) -> None:
    failed = [outcome for outcome in outcomes if outcome.state in GATING]
    if not failed:
        return
    causes = find_causes(failed, [outcome for outcome in outcomes if outcome.state == "passed"])
    conformance = read_conformance(suite.root())
    line(out)
    line(out, tally_of_causes(len(failed), len(causes)), "bold red")
    for text in tally_by_program(causes) if len(causes) > 1 else ():
        line(out, f"    {text}")
    for cause in causes:
        _show_cause(out, cause, conformance, report)


def _show_cause(out: Console, cause: Cause[Outcome], conformance: Conformance, report: Path) -> None:
    """Print the message of one witness with its evidence, then the other tests, one per line."""
    shown = cause.typical
    line(out)
    line(out, _header(cause), _style(shown.state))
    lines = shown.message.splitlines() or ["no message"]
    head, tail = MESSAGE_LINES
    if len(lines) > head + tail:
        lines = [*lines[:head], f"... {len(lines) - head - tail} more lines; all are in the page", *lines[-tail:]]
    for text in lines:
        line(out, f"    {text}")
    if len(cause.witnesses) == len(cause.programs) == 1 and cause.blame != shown.pair:
        line(out, f"    program: {cause.blame}", "dim")
    _show_blame(out, cause)
    for kind, ids in (("requirement", cause.requirements), ("bug", cause.bugs)):
        for name in ids[:CITED]:
            line(out, f"    {kind}: {conformance.entry(name)}", "dim")
        if len(ids) > CITED:
            line(out, f"    {kind}: and {len(ids) - CITED} more", "dim")
    line(out, f"    test: {shown.id}", "dim")
    if shown.artifacts:
        line(out, f"    evidence: {short(report / shown.artifacts)}", "dim")
    others = [witness for witness in cause.witnesses if witness is not shown]
    for other in others[: WITNESSES - 1]:
        line(out, f"    test: {other.id}", "dim")
    if len(others) >= WITNESSES:
        line(out, f"    ... and {len(others) - WITNESSES + 1} more; all are in the page", "dim")


def _show_blame(out: Console, cause: Cause[Outcome]) -> None:
    """Print what the reruns of a cause show, or why its tests were not run again."""
    blames = [witness.blame for witness in (cause.proof, *cause.witnesses) if witness is not None and witness.blame]
    if blames:
        line(out, f"    blame: {blames[0].text}", "bold")
        if blames[0].wire:
            line(out, f"    on the wire: {blames[0].wire}")


def _header(cause: Cause[Outcome]) -> str:
    """Format `failed: mine~refwg  test_x[mine~refwg]`, or for several tests `12 failed, 1 error: mine`."""
    if len(cause.witnesses) == 1:
        (outcome,) = cause.witnesses
        return f"{in_words(outcome.state)}: {outcome.pair}{outcome.pair and '  '}{outcome.name}"
    counted = ", ".join(f"{count} {in_words(state)}" for state, count in cause.states)
    return f"{counted}: {cause.blame or 'without an implementation'}"


def _show_reasons(out: Console, outcomes: list[Outcome]) -> None:
    if outcomes:
        line(out)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        reasons[outcome.state, _reason(outcome)].append(outcome.message)
    for (state, _), messages in sorted(reasons.items(), key=lambda each: -len(each[1])):
        line(out, f"{len(messages)} {state}: {messages[0]}", _style(state))


def _reason(outcome: Outcome) -> str:
    """Return what is equal for all results with one reason: differences of one program have other numbers each time."""
    if outcome.state != "differs":
        return outcome.message
    return f"{outcome.message.partition(' ')[0]} {fingerprint(outcome)}"


def short(path: Path) -> str:
    """Shorten a path below the current directory to a relative one."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# The conclusion


def usage_error(output: Sequence[str]) -> str:
    """Find the line of pytest's output that names the mistake in the command line."""
    for text in reversed(output):
        for mark in ("pytest: error: ", "ERROR: "):
            if mark in text and "ERROR: usage: " not in text:
                return f"{text.partition(mark)[2]}; see wg-interop run --help"
    return output[-1] if output else "pytest refused the command line and printed no reason"


def uncollected(output: Sequence[str]) -> dict[str, str]:
    """Find the files that pytest could not collect, with the error of each."""
    errors: dict[str, str] = {}
    name = ""
    for text in output:
        if header := re.fullmatch(r"_+ ERROR collecting (.+?) _+", text):
            name = header[1]
            errors[name] = ""
        elif name and text.startswith("E  ") and not errors[name]:
            errors[name] = text[1:].strip()
    return errors


class Conclusion(NamedTuple):
    """The end of a run: exit status, the reason unless the outcomes show it, whether to print the log's end."""

    status: int
    reason: str = ""
    see_log: bool = False


def conclude(status: int, states: set[str], output: Sequence[str]) -> Conclusion:
    """Derive the end of a run from pytest's exit status, the states of its tests, and its output."""
    # The plugin's last lines name what is wrong with a run without a failure.
    complaints = [text.removeprefix("wg-interop: ") for text in output if re.match("wg-interop: (?!.*, seed )", text)]
    missing = complaints[-1] if complaints and complaints[-1].startswith("--must-include") else ""
    if states & GATING or missing:
        return Conclusion(FAILED, missing)
    if status == OK and "passed" in states:
        return Conclusion(OK)
    if uncollected(output):
        return Conclusion(COULD_NOT, "could not test: tests could not be collected")
    reasons = {OK: "no test passed", PYTEST_NO_TESTS: "no test was selected"}
    if complaints:
        reasons[FAILED] = complaints[-1]
    if status in reasons:
        return Conclusion(COULD_NOT, f"could not test: {reasons[status]}")
    return Conclusion(COULD_NOT, f"could not test: pytest ended with status {status}", see_log=True)


# The findings of the doctor


def human(size: float) -> str:
    """Format a number of bytes: `2 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
