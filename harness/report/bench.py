"""Read what bench/run has measured: medians, spreads and ratios for results.json and page.

`wg-interop report --bench FILE` adds a file of `bench/run --json` to a report. A run adds `bench.json` that lies beside
its results. bench/README.md describes the file.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Final

from harness.report.evidence import clean
from harness.tables import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from harness.tables import Table

# The file that a run looks for beside its results.
FILE: Final = "bench.json"
# From here on, three digits and more are before the point.
_HUNDREDS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure of one implementation over all rounds.

    ratio, ratio_least, ratio_most: to the first implementation, each value to that of the same round; None for the
    first one itself, or if no round has both.
    """

    figure: str
    title: str
    unit: str
    more_is_better: bool
    impl: str
    rounds: int
    median: float
    least: float
    most: float
    ratio: float | None = None
    ratio_least: float | None = None
    ratio_most: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The results of a run of bench/run.

    file: as it was named. date: of its start, UTC. machine: its CPU, cores and kernel. versions: by implementation;
    the first one is what ratios compare with. interrupted: not all rounds were measured.
    """

    file: str
    date: str
    machine: str
    versions: Mapping[str, str]
    interrupted: bool
    values: Sequence[Measured]

    @property
    def figures(self) -> list[list[Measured]]:
        """The values of each figure, in the order in which the figures were measured."""
        return [list(same) for _, same in groupby(self.values, key=lambda value: value.figure)]


def beside(results: Path) -> Bench | None:
    """Return the measurements in the file beside these results; None without that file. Raises UsageError."""
    path = results.with_name(FILE)
    return read_file(path) if path.is_file() else None


def read_file(path: Path) -> Bench:
    """Read a file of `bench/run --json`, without figures that its terminal hides; raises UsageError if it is none."""
    document = read_json(path, f"bench {path}")
    host = document.table("host")
    made = document.tables("implementations", "implementation")
    versions = {clean(entry.text("name")): clean(entry.text("version", "")) for entry in made}
    figures = {entry.text("name"): entry for entry in document.tables("figures", "figure")}
    shown = {name for name, entry in figures.items() if not entry.flag("is_detail", default=False)}
    runs = [entry for entry in document.tables("runs", "run") if not entry.flag("guest", default=False)]
    rows = {(run.text("figure"), clean(run.text("impl"))): _by_round(run) for run in runs}
    if not rows:
        raise document.wrong("no figure was measured")
    first = next(iter(versions), "")
    titles = {name: _heading(figures[name]) for name in shown}
    return Bench(
        file=clean(str(path)),
        date=datetime.fromtimestamp(document.number("time"), UTC).isoformat(timespec="seconds"),
        machine=clean(f"{host.text('cpu')}, {host.number('cores')} cores, Linux {host.text('kernel')}"),
        versions=versions,
        interrupted=document.flag("interrupted", default=False),
        values=[
            _measured(name, titles[name], impl, values, rows.get((name, first), {}) if impl != first else {})
            for (name, impl), values in rows.items()
            if name in shown and values
        ],
    )


def _heading(figure: Table) -> tuple[str, str, bool]:
    return clean(figure.text("title")), clean(figure.text("unit")), figure.flag("more_is_better")


def _by_round(run: Table) -> dict[int, float]:
    """Return the values of a figure by the number of the round."""
    rounds, values = run.take("rounds"), run.take("values")
    if not (isinstance(rounds, list) and isinstance(values, list) and len(rounds) == len(values)):
        raise run.wrong("rounds and values: want two lists of the same length")
    if not all(isinstance(number, int) for number in rounds):
        raise run.wrong("rounds: want integers")
    if not all(isinstance(value, int | float) for value in values):
        raise run.wrong("values: want numbers")
    return dict(zip(rounds, map(float, values), strict=True))


def _measured(
    name: str, heading: tuple[str, str, bool], impl: str, values: Mapping[int, float], first: Mapping[int, float]
) -> Measured:
    title, unit, more_is_better = heading
    every = list(values.values())
    ratios = [_rounded(values[number] / first[number]) for number in values if first.get(number)]
    return Measured(
        figure=clean(name),
        title=title,
        unit=unit,
        more_is_better=more_is_better,
        impl=impl,
        rounds=len(every),
        median=_rounded(statistics.median(every)),
        least=_rounded(min(every)),
        most=_rounded(max(every)),
        ratio=_rounded(statistics.median(ratios)) if ratios else None,
        ratio_least=min(ratios, default=None),
        ratio_most=max(ratios, default=None),
    )


def figure(value: float) -> str:
    """Format a number with three significant digits, without an exponent: `2290`, `22.6`, `0.383`."""
    return f"{value:.0f}" if abs(value) >= _HUNDREDS else f"{value:#.3g}".rstrip(".") if value else "0"


def _rounded(value: float) -> float:
    """Round to six significant digits: no measurement is more exact."""
    return float(f"{value:.6g}")


def read_bench(table: Table) -> Bench | None:
    """Read the key `bench` of a file of results; None if it has no measurements."""
    if not table.rest():
        return None
    return Bench(
        file=table.text("file"),
        date=table.text("date"),
        machine=table.text("machine"),
        versions=table.strings("versions"),
        interrupted=table.flag("interrupted"),
        values=[_read_measured(entry) for entry in table.tables("values", "value")],
    )


def _read_measured(entry: Table) -> Measured:
    names = ("ratio", "ratio_least", "ratio_most")
    ratio, least, most = (entry.decimal(name) if name in entry else None for name in names)
    return Measured(
        figure=entry.text("figure"),
        title=entry.text("title"),
        unit=entry.text("unit"),
        more_is_better=entry.flag("more_is_better"),
        impl=entry.text("impl"),
        rounds=entry.number("rounds"),
        median=entry.decimal("median"),
        least=entry.decimal("least"),
        most=entry.decimal("most"),
        ratio=ratio,
        ratio_least=least,
        ratio_most=most,
    )
