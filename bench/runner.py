"""Runs the benchmarks in interleaved rounds and reports medians, as ratios taken in one run.

Machines are noisy: a figure in seconds says little, the ratio of two that were measured in turns says more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import topologies
from harness.errors import HarnessError
from harness.implementation import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK, FULL = 5, 15


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {FULL}")
    parser.add_argument("--rounds", type=int, help="so many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK if arguments.quick else FULL)
    if rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        report = measure(rounds)
    except HarnessError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        return 125
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(rounds: int) -> dict[str, object]:
    """Measure all; returns `runs`, every figure by name, and `ratios`, medians over medians."""
    manifest = Registry().get("wireguard-go")
    benchmarks: dict[str, Callable[[], float]] = {
        "nat_topology_by_lab": lambda: topologies.by_lab(manifest),
        "nat_topology_by_shell": lambda: topologies.by_shell(manifest),
    }
    figures: dict[str, list[float]] = {name: [] for name in benchmarks}
    for number in range(rounds):
        for name, benchmark in benchmarks.items():
            figures[name].append(benchmark())
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for name, values in figures.items():
        print(f"{name}: median {statistics.median(values) * 1000:.0f} ms, fastest {min(values) * 1000:.0f} ms")
    ratio = statistics.median(figures["nat_topology_by_lab"]) / statistics.median(figures["nat_topology_by_shell"])
    print(f"nat_topology_lab_over_shell: {ratio:.2f}")
    runs = [{"name": name, "seconds": [round(v, 4) for v in values]} for name, values in figures.items()]
    return {"time": int(time.time()), "runs": runs, "ratios": {"nat_topology_lab_over_shell": round(ratio, 3)}}


if __name__ == "__main__":
    sys.exit(main())
