"""Print the last results, or what changed over the last runs: `wg-interop report`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click

from harness.cli.terminal import OK
from harness.errors import UsageError
from harness.report import history
from harness.report.bench import read_file
from harness.report.results import GATING, read_results, write_in_one_step

_WORTH_A_LINE: Final = 30


@click.command()
@click.option("--history", "over_time", is_flag=True, help="Print trends and flake rates over the last runs.")
@click.option("--all", "everything", is_flag=True, help="With --history: print every test, not the most notable ones.")
@click.option(
    "--bench", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Add the measurements of `bench/run --json FILE` to the results, and draw the page again.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the trends, or the counts, as JSON, for other programs.")
@click.argument(
    "results", type=click.Path(path_type=Path, dir_okay=False), default=Path("report/results.json"),
    metavar="[RESULTS.json]",
)  # fmt: skip
def report(results: Path, *, bench: Path | None, over_time: bool, everything: bool, as_json: bool) -> int:
    """Print the results of the last run, with --history what changed over the last runs; --bench adds measurements.

    \b
      wg-interop report                                 counts and failures of report/results.json
      wg-interop report --history                       flaky tests, failures since when, the slowest
      wg-interop report --bench report/bench.json       adds what ./bench/run --json has measured
      wg-interop report --history --json | jq '.trends[] | select(.flaky > 0)'

    Each run adds a line to history/runs.jsonl beside its results: the commit of the tree under test, and the state and
    the seconds of each test; the last 100 runs are kept. A test is flaky if it passed and failed on one commit; its
    rate is the share of failures there. The history also lets `-n` start with the longest tests (docs/results.md).

    Exit status: 0 printed, 2 no such file.
    """  # noqa: D301
    if bench is not None:
        page = _add_bench(results, bench)
        click.echo(f"report: {page}", err=as_json)
    lines = _history(results, everything=everything, as_json=as_json) if over_time else _last(results, as_json=as_json)
    click.echo("\n".join(lines))
    return OK


def _add_bench(path: Path, bench: Path) -> Path:
    """Add a file of measurements to a file of results, and draw its page again; returns the page."""
    from harness.report.gather import render  # noqa: PLC0415 - the other uses need no template engine

    contents = read_results(path)
    document = json.loads(path.read_text(encoding="utf-8")) | {"bench": asdict(read_file(bench))}
    write_in_one_step(path, json.dumps(document, indent=1) + "\n")
    return render([path], path.parent, complaint=contents.complaint)


def _last(path: Path, *, as_json: bool) -> list[str]:
    results = read_results(path).results
    counts: dict[str, int] = {}
    for result in results:
        counts[result.state] = counts.get(result.state, 0) + 1
    if as_json:
        return [json.dumps({"tests": len(results), "states": counts}, indent=1)]
    wrong = [result for result in results if result.state in GATING]
    failed = [f"{each.state}: {each.id}: {each.message.partition(chr(10))[0]}" for each in wrong]
    return [f"{len(results)} tests: {', '.join(f'{count} {state}' for state, count in counts.items())}", *failed]


def _history(results: Path, *, everything: bool, as_json: bool) -> list[str]:
    path = results.parent / history.FOLDER / history.FILE
    runs = history.read(path)
    if not runs:
        raise UsageError(f"{path}: no runs there yet; each run adds one")
    found = history.trends(runs)
    if as_json:
        return [json.dumps({"runs": len(runs), "trends": [asdict(trend) for trend in found]}, indent=1)]
    shown = found if everything else found[:_WORTH_A_LINE]
    more = [f"and {len(found) - len(shown)} more: --all"] if len(shown) < len(found) else []
    flaky = sum(trend.flaky > 0 for trend in found)
    return [f"{len(runs)} runs, {len(found)} tests, {flaky} flaky", *(trend.line() for trend in shown), *more]
