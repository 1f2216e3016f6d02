"""Print which requirements and bugs are covered: `wg-interop coverage`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TextIO

from harness import suite
from harness.cli.terminal import OK
from harness.report.citations import read_citations
from harness.report.conformance import read_conformance
from harness.report.coverage import (
    RECORD,
    citations_of,
    cover,
    document,
    merge,
    read_record,
    record_of,
    record_text,
    total,
)
from harness.report.results import in_words, read_results, write_in_one_step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.report.coverage import Covered

_KINDS: Final = {"must": "musts", "should": "shoulds", "bug": "bugs"}


def show(results: Sequence[Path], out: TextIO, *, as_json: bool, everything: bool, record: bool) -> int:
    """Print the coverage by the record and these files of results; returns the exit status.

    results: empty for every results.json below `report` of the workplace. everything: print what is covered, too.
    record: first add the results to the record of the suite. Raises UsageError for a malformed file.
    """
    root = suite.root()
    chosen = list(results) or sorted((suite.workplace() / "report").rglob("results.json"))
    known, cited = read_record(root / RECORD), read_citations(root)
    for path in chosen:
        run = read_results(path)
        merge(known, record_of(run, f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d}"))
        for name, tests in citations_of(run).items():
            cited.setdefault(name, set()).update(tests)
    if record:
        write_in_one_step(root / RECORD, record_text(known))
    every = cover(read_conformance(root), cited, known)
    if as_json:
        out.write(json.dumps(document(every), indent=1) + "\n")
        return OK
    lines = [*_totals(every), *_uncovered(every), *(_table(every) if everything else ())]
    if record:
        lines += ["", f"record: {root / RECORD}, from {len(chosen)} files of results"]
    out.write("".join(f"{text}\n" for text in lines))
    return OK


def _totals(every: Sequence[Covered]) -> list[str]:
    lines = []
    for kind, word in _KINDS.items():
        figures = total(every, kind)
        seen = "" if kind == "bug" else f", {figures.seen_to_fail} seen to fail"
        lines.append(
            f"{word:<8} {figures.covered:>3} of {figures.of:>3} covered: {figures.cited} cited, "
            f"{figures.passed} passed on two implementations{_of_one(figures.passed_on_one_program)}{seen}"
        )
    return lines


def _of_one(count: int) -> str:
    return f" ({count} of them on two versions of one program)" if count else ""


def _uncovered(every: Sequence[Covered]) -> list[str]:
    lines = []
    for kind, word in _KINDS.items():
        if left := [each for each in every if each.kind == kind and not each.counts]:
            lines += ["", f"{word} not covered:"]
            lines += [f"  {each.entry.id:<6} {each.entry.title}: {'; '.join(each.missing)}" for each in left]
    return lines


def _table(every: Sequence[Covered]) -> list[str]:
    """Return a line for each entry that a test cites, with what its tests did on each implementation."""
    lines = ["", "requirement x implementation:"]
    for each in every:
        if not each.tests:
            continue
        outcomes: dict[str, list[str]] = {}
        for (name, lane), cell in each.cells.items():
            states = "/".join(in_words(state) for state in (cell.state, *cell.also))
            outcomes.setdefault(name, []).append(f"{states} ({lane})")
        words = [f"{name}: {', '.join(found)}" for name, found in outcomes.items()]
        seen = [f"seen to fail: {each.entry.seen_to_fail}"] if each.entry.seen_to_fail else []
        lines.append(f"  {each.entry.id:<6} {'; '.join([*(words or ['no recorded run']), *seen])}")
    return lines
