"""Draw the results of bench/run as one self-contained HTML page with plots.

`python -m bench.page FILE.json` prints the page of an earlier run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.figures import identifier, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TEMPLATE: Final = "page.html.j2"
# Sizes of a plot, in units of its view box: the columns of names and of values, and the plot between them.
NAMES, PLOT, VALUES = 150, 330, 170
ROW, HEAD = 24, 6
_STEPS: Final = (1, 2, 2.5, 5, 10)
_MOST_TICKS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation in a plot. ratio: to the baseline, and its spread; None for the baseline itself.

    median, least, most: horizontal positions; dots: those of the rounds. y: vertical position.
    """

    name: str
    ours: bool
    y: float
    dots: tuple[float, ...]
    median: float
    least: float
    most: float
    value: str
    ratio: str
    spread: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure of all implementations. ticks: position and label; baseline: position of its median, if it has one."""

    name: str
    title: str
    unit: str
    hint: str
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    baseline: float | None

    @property
    def height(self) -> int:
        """The height of the view box."""
        return HEAD + ROW * len(self.rows) + ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The figures of one place: this machine, or a guest. details: figures that have no plot."""

    title: str
    host: str
    names: tuple[str, ...]
    baseline: str
    plots: tuple[Plot, ...]
    details: tuple[Plot, ...]


def page(content: Mapping[str, Any]) -> str:
    """Return the page. content: of the file that --json writes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [part("This machine", content)]
    if "guest" in content:
        parts.append(part(f"In a guest ({content['guest'].get('accelerator', 'QEMU')})", content["guest"]))
    return environment.get_template(TEMPLATE).render(
        content=content,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(content["time"])),
        parts=[one for one in parts if one.names or one.plots],
        sizes={"names": NAMES, "plot": PLOT, "width": NAMES + PLOT + VALUES, "row": ROW, "head": HEAD},
    )


def part(title: str, content: Mapping[str, Any]) -> Part:
    """Return the figures of one JSON file as a part of the page."""
    names = tuple(made["name"] for made in content["implementations"])
    baseline = content["baseline"]
    plots = [(figure["is_detail"], _plot(figure, content, baseline)) for figure in content["figures"]]
    host, loads = content["host"], content["host"]["loads"]
    load = f", load average {min(loads):g} to {max(loads):g}" if loads else ""
    return Part(
        title=title,
        host=f"{host['cpu']}, {host['cores']} cores, Linux {host['kernel']}, Python {host['python']}{load}",
        names=names,
        baseline=baseline,
        plots=tuple(plot for is_detail, plot in plots if not is_detail),
        details=tuple(plot for is_detail, plot in plots if is_detail),
    )


def _plot(figure: Mapping[str, Any], content: Mapping[str, Any], baseline: str) -> Plot:
    runs = [run for run in content["runs"] if run["figure"] == figure["name"] and not run.get("guest")]
    scale = Scale.of(value for run in runs for value in run["values"])
    medians = {run["impl"]: run["median"] for run in runs}
    rows = [_row(run, number, scale, _ratios(content, figure["name"], run, runs, baseline))
            for number, run in enumerate(runs)]  # fmt: skip
    return Plot(
        name=figure["name"],
        title=figure["title"],
        unit=figure["unit"],
        hint="more is better" if figure["more_is_better"] else "less is better",
        rows=tuple(rows),
        ticks=tuple((scale.at(tick), f"{tick:g}") for tick in scale.ticks),
        baseline=scale.at(medians[baseline]) if baseline in medians and len(runs) > 1 else None,
    )


def _row(run: Mapping[str, Any], number: int, scale: Scale, ratios: Sequence[float]) -> Row:
    return Row(
        name=run["impl"] or "the lab",
        ours=run["impl"].partition("+")[0] == "refwg" or not run["impl"],
        y=HEAD + ROW * (number + 0.5),
        dots=tuple(map(scale.at, run["values"])),
        median=scale.at(run["median"]),
        least=scale.at(run["least"]),
        most=scale.at(run["most"]),
        value=shown(run["median"]),
        ratio=f"{ratios[0]:.2f} x" if ratios else "",
        spread=f"{shown(run['least'])} to {shown(run['most'])}"
        + (f", ratio {ratios[1]:.2f} to {ratios[2]:.2f}" if ratios else ""),
    )


def _ratios(
    content: Mapping[str, Any], figure: str, run: Mapping[str, Any], runs: Iterable[Mapping[str, Any]], baseline: str
) -> tuple[float, ...]:
    """Return median, least and greatest of the ratios to the baseline within a round; empty for the baseline."""
    if run["impl"] in {"", baseline} or all(other["impl"] != baseline for other in runs):
        return ()
    one, other = identifier(run["impl"]), identifier(baseline)
    key = f"{figure}_{one}_over_{other}"
    if key in content["ratios"]:
        return (content["ratios"][key], *content["ratio_spreads"][key])
    # The file has each pair once, in the order of the command line.
    reverse = f"{figure}_{other}_over_{one}"
    if not content["ratios"].get(reverse) or not all(content["ratio_spreads"][reverse]):
        return ()
    least, most = content["ratio_spreads"][reverse]
    return (1 / content["ratios"][reverse], 1 / most, 1 / least)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale from 0; ticks: round numbers, the last one at or above the greatest value."""

    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """Choose at most `_MOST_TICKS` steps for these values."""
        most = max(values, default=0) or 1.0
        power = 10.0 ** math.floor(math.log10(most / _MOST_TICKS))
        step = next(factor * power for factor in _STEPS if factor * power * _MOST_TICKS >= most)
        return cls(tuple(step * number for number in range(math.ceil(most / step - 1e-9) + 1)))

    def at(self, value: float) -> float:
        """Return the horizontal position of a value, to a tenth."""
        return round(NAMES + PLOT * value / self.ticks[-1], 1)


def main() -> int:
    """Print the page of a JSON file."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and one argument
        print("usage: python -m bench.page FILE.json > FILE.html", file=sys.stderr)
        return 2
    print(page(json.loads(Path(sys.argv[1]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
