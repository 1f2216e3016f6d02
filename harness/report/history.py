"""Keep the states and durations of the last runs, and tell what changes from run to run.

`report/history/runs.jsonl` has a line of JSON for each run, the newest last; it is bounded in lines and in bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

from harness.report.results import GATING, write_in_one_step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from harness.report.results import Result

FOLDER: Final = "history"
FILE: Final = "runs.jsonl"
MOST_RUNS: Final = 100
MOST_BYTES: Final = 8 << 20
_RECENT: Final = 5  # runs that a trend compares with those before
_SETTLED: Final = frozenset({"passed", "differs", "xfailed"}) | GATING


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run. commit: of the tree under test, empty if it is not known. versions: of the implementations.

    results: (state, seconds) of each test, by `LANE ID`.
    """

    date: str
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def tree(self) -> str:
        """What tells one tree from another: the commit, or the versions if it is not known."""
        return self.commit or ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))


def run_of(results: Iterable[Result], date: str, commit: str) -> Run:
    """Return the record of a run."""
    decided = [result for result in results if result.state]
    sides = [side for result in decided for side in (result.a, result.b) if side]
    return Run(
        date=date,
        commit=commit,
        versions={side["impl"]: side["version"] for side in sides},
        results={f"{result.lane} {result.id}": (result.state, round(result.seconds, 2)) for result in decided},
    )


def add(path: Path, run: Run) -> None:
    """Add a run to the file, and drop the oldest ones that exceed its bounds; raises OSError."""
    lines = [json.dumps(asdict(each)) for each in [*read(path), run]][-MOST_RUNS:]
    while len(lines) > 1 and sum(map(len, lines)) > MOST_BYTES:
        del lines[0]
    write_in_one_step(path, "".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[Run]:
    """Read all runs, the oldest first; a line that is not one is left out, and a missing file has none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [run for line in lines if (run := _parse(line)) is not None]


def _parse(line: str) -> Run | None:
    try:
        entry = json.loads(line)
        results = {name: (str(state), float(seconds)) for name, (state, seconds) in entry["results"].items()}
        return Run(date=entry["date"], commit=entry["commit"], versions=dict(entry["versions"]), results=results)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def durations(runs: Sequence[Run]) -> dict[str, float]:
    """Return the seconds that each test took in the last run that has it, by the id of the test."""
    return {name.partition(" ")[2]: seconds for run in runs for name, (_, seconds) in run.results.items()}


def longest_first(ids: Sequence[str], known: Mapping[str, float], *, parts: int = 1) -> list[int]:
    """Return the order in which tests are run, as indexes: the longest first, those that are not known before all.

    parts: into which the scheduler cuts the list at the start; each part then begins with long ones, and takes as long
    as the others. Ties keep their order.
    """
    ranked = sorted(range(len(ids)), key=lambda index: -known.get(ids[index], float("inf")))
    return [index for part in range(parts) for index in ranked[part::parts]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """What the runs say of one test.

    flaky: of the runs on trees where it both passed and failed, the share that failed. since: the first run of the
    present state, by date and tree. seconds, before: the median of the last five runs, and of those before (0: none).
    """

    test: str
    runs: int
    failed: int
    flaky: float
    state: str
    since: str
    seconds: float
    before: float

    def line(self) -> str:
        """Return the line for the terminal."""
        change = f" (before {self.before:.1f} s)" if self.before and abs(self.seconds / self.before - 1) > 1 / 4 else ""
        flaky = f", flaky {self.flaky:.0%}" if self.flaky else ""
        times = f"{self.failed} of {self.runs} failed{flaky}; {self.seconds:.1f} s{change}"
        return f"{self.state} since {self.since}: {self.test}: {times}"


def trends(runs: Sequence[Run]) -> list[Trend]:
    """Return the trend of each test of the last runs: the flaky ones first, then those that fail, then by time."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    found = [_trend(name, [run for run in runs if name in run.results]) for name in names]
    return sorted(found, key=lambda trend: (-trend.flaky, trend.state not in GATING, -trend.seconds))


def _trend(name: str, runs: Sequence[Run]) -> Trend:
    states = [run.results[name][0] for run in runs]
    times = [run.results[name][1] for run in runs]
    begin = next((index + 1 for index in range(len(states) - 2, -1, -1) if states[index] != states[-1]), 0)
    before = times[:-_RECENT]
    return Trend(
        test=name,
        runs=len(runs),
        failed=sum(state in GATING for state in states),
        flaky=_flaky(runs, name),
        state=states[-1],
        since=f"{runs[begin].date[:10]} {runs[begin].tree[:12]}".rstrip(),
        seconds=round(median(times[-_RECENT:]), 2),
        before=round(median(before), 2) if before else 0.0,
    )


def _flaky(runs: Sequence[Run], name: str) -> float:
    """Return the share of failures in the runs on trees where this test both passed and failed."""
    trees: dict[str, list[bool]] = {}
    for run in runs:
        if (state := run.results[name][0]) in _SETTLED:
            trees.setdefault(run.tree, []).append(state in GATING)
    mixed = [failed for outcomes in trees.values() if len(set(outcomes)) > 1 for failed in outcomes]
    return sum(mixed) / len(mixed) if mixed else 0.0
