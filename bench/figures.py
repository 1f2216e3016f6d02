"""Collect the values of all rounds; compute medians, spreads, ratios within a round."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_DIGITS: Final = 3  # significant digits in tables
_LEFT: Final = 2  # columns of a table that are aligned to the left: name and unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a number means.

    name: in JSON. unit: empty for a ratio. group: the measurement that yields it. more_is_better: False for times.
    is_detail: the terminal does not show it, and the page has it in its last table only.
    """

    name: str
    title: str
    unit: str
    group: str
    more_is_better: bool = False
    is_detail: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize values, of which there is at least one."""
        kept = list(values)
        return cls(median=statistics.median(kept), least=min(kept), most=max(kept))


@dataclass(slots=True)
class Results:
    """The values of a run so far.

    values: by (figure, implementation), then by the number of the round. failures: what could not be measured.
    """

    values: dict[tuple[str, str], dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, implementation: str, figures: Mapping[str, float]) -> None:
        """Add the figures that a measurement of one implementation has yielded in this round."""
        for figure, value in figures.items():
            self.values[figure, implementation][number] = value

    def fail(self, number: int, measurement: str, implementation: str, message: str) -> None:
        """Note that a measurement failed."""
        self.failures.append({"round": number, "measurement": measurement, "impl": implementation, "message": message})

    def spread(self, figure: str, implementation: str) -> Spread | None:
        """Return median and spread of a figure; None if there is no value."""
        values = self.values.get((figure, implementation))
        return Spread.of(values.values()) if values else None

    def last(self, figure: str, implementation: str) -> float | None:
        """Return the value of the last round that has one."""
        values = self.values.get((figure, implementation))
        return values[max(values)] if values else None

    def ratio(self, figure: str, one: str, other: str) -> Spread | None:
        """Return median and spread of the ratio of two implementations.

        Both values of a ratio are of the same round, so that they share the load of the machine. None if no round has
        both.
        """
        mine, theirs = self.values.get((figure, one), {}), self.values.get((figure, other), {})
        ratios = [mine[number] / theirs[number] for number in mine if theirs.get(number)]
        return Spread.of(ratios) if ratios else None

    def figures(self) -> list[str]:
        """Return the names of all figures that have a value, in the order in which they were measured."""
        return list(dict.fromkeys(figure for figure, _ in self.values))

    def implementations(self) -> list[str]:
        """Return the names of all implementations that have a value, in the order in which they were measured."""
        return list(dict.fromkeys(name for _, name in self.values))


def document(
    results: Results, figures: Sequence[Figure], implementations: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the file that --json writes.

    implementations: in the order of the command line; a ratio has the earlier one over the later one. facts: about the
    run, added at the top. bench/README.md describes the format.
    """
    names = [name for name in [*implementations, ""] if any(name == key for _, key in results.values)]
    runs, ratios, spreads = [], {}, {}
    for figure in figures:
        for name in names:
            if spread := results.spread(figure.name, name):
                runs.append(_run(results, figure, name, spread))
                if not figure.unit:
                    ratios[figure.name] = _rounded(spread.median)
                    spreads[figure.name] = [_rounded(spread.least), _rounded(spread.most)]
        for number, one in enumerate(names):
            for other in names[number + 1 :]:
                if ratio := results.ratio(figure.name, one, other):
                    key = f"{figure.name}_{identifier(one)}_over_{identifier(other)}"
                    ratios[key] = _rounded(ratio.median)
                    spreads[key] = [_rounded(ratio.least), _rounded(ratio.most)]
    kept = {run["figure"] for run in runs}
    return {
        **facts,
        "figures": [asdict(figure) for figure in figures if figure.name in kept],
        "runs": runs,
        "ratios": ratios,
        "ratio_spreads": spreads,
        "failures": results.failures,
    }


def _run(results: Results, figure: Figure, implementation: str, spread: Spread) -> dict[str, Any]:
    values = results.values[figure.name, implementation]
    return {
        "name": f"{figure.name}_{identifier(implementation)}" if implementation else figure.name,
        "figure": figure.name,
        "impl": implementation,
        "unit": figure.unit,
        "rounds": list(values),
        "values": [_rounded(value) for value in values.values()],
        "median": _rounded(spread.median),
        "least": _rounded(spread.least),
        "most": _rounded(spread.most),
    }


def identifier(implementation: str) -> str:
    """Return an implementation's name as the keys of the JSON file have it: `wireguard_go`, `refwg_batch`."""
    return "".join(character if character.isalnum() else "_" for character in implementation)


def shown(value: float) -> str:
    """Format a number with three significant digits, without an exponent: `2290`, `22.6`, `0.383`."""
    if not value:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    decimals = max(0, _DIGITS - whole)
    if not whole:
        # 0.0123: zeros after the point do not count.
        text = f"{abs(value):.9f}".split(".")[1]
        decimals = min(9, len(text) - len(text.lstrip("0")) + _DIGITS)
    return f"{value:.{decimals}f}"


def table(results: Results, figures: Sequence[Figure], implementations: Sequence[str], baseline: str) -> str:
    """Return the medians as a table for a terminal, each with its ratio to the baseline of the same rounds.

    A line below it has the figures of the lab, which belong to no implementation.
    """
    names = [name for name in implementations if any(name == key for _, key in results.values)]
    rows, lines = [["", "", *names]], []
    for figure in figures:
        if not figure.is_detail and any(results.values.get((figure.name, name)) for name in names):
            cells = [_cell(results, figure.name, name, baseline) for name in names]
            rows.append([figure.name, figure.unit, *cells])
        if spread := results.spread(figure.name, ""):
            lines.append(f"{figure.name}: {shown(spread.median)} {figure.unit}".rstrip())
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        [cell.ljust(width) if column < _LEFT else cell.rjust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([*("  ".join(cells).rstrip() for cells in aligned if len(rows) > 1), *lines])


def _cell(results: Results, figure: str, implementation: str, baseline: str) -> str:
    spread = results.spread(figure, implementation)
    if spread is None:
        return "-"
    ratio = results.ratio(figure, implementation, baseline) if implementation != baseline else None
    return f"{shown(spread.median)} ({ratio.median:.2f}x)" if ratio else shown(spread.median)


def _rounded(value: float) -> float:
    """Round to six significant digits: no measurement here is more exact."""
    return float(f"{value:.6g}")
