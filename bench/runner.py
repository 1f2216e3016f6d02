"""Run the benchmarks in interleaved rounds, and print medians and ratios.

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

from bench import configuration, floods, topologies, tunnels
from bench.guest import first_verdict
from harness import HarnessError, Registry

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK, FULL = 5, 15
GUEST_ROUNDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    quick = f"{QUICK} rounds instead of {FULL}, and no guest, large configuration or flood"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, help="so many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK if arguments.quick else FULL)
    if rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        measured = measure(rounds, guest=not arguments.quick)
    except HarnessError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        return 125
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


def measure(rounds: int, *, guest: bool) -> dict[str, object]:
    """Measure all; returns `runs`, every figure by name in seconds, and `ratios`, medians over medians."""
    registry = Registry()
    ours, theirs = registry.get("refwg"), registry.get("wireguard-go")
    benchmarks: dict[str, Callable[[], float]] = {
        "nat_topology_by_lab": lambda: topologies.by_lab(theirs),
        "nat_topology_by_shell": lambda: topologies.by_shell(theirs),
        "tcp_mebibyte_refwg": lambda: tunnels.seconds_per_mebibyte(ours),
        "tcp_mebibyte_wireguard_go": lambda: tunnels.seconds_per_mebibyte(theirs),
        "start_refwg": lambda: tunnels.start_up(ours),
        "start_wireguard_go": lambda: tunnels.start_up(theirs),
    }
    figures: dict[str, list[float]] = {name: [] for name in benchmarks}
    for number in range(rounds):
        for name, benchmark in benchmarks.items():
            figures[name].append(benchmark())
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    if guest:
        figures |= configuration.measured(ours, GUEST_ROUNDS) | floods.measured(GUEST_ROUNDS)
        figures["guest_first_verdict"] = [first_verdict() for _ in range(GUEST_ROUNDS)]
    return report(figures)


def report(figures: dict[str, list[float]]) -> dict[str, object]:
    """Print medians and ratios and return them in the format that other programs rely on."""
    median = {name: statistics.median(values) for name, values in figures.items()}
    for name, values in figures.items():
        print(f"{name}: median {median[name] * 1000:.0f} ms, fastest {min(values) * 1000:.0f} ms")
    ratios = {
        "nat_topology_lab_over_shell": median["nat_topology_by_lab"] / median["nat_topology_by_shell"],
        # Rates, so the inverse of the seconds.
        "tcp1_refwg_over_wireguard_go": median["tcp_mebibyte_wireguard_go"] / median["tcp_mebibyte_refwg"],
        "start_refwg_over_wireguard_go": median["start_refwg"] / median["start_wireguard_go"],
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    runs = [{"name": name, "seconds": [round(value, 4) for value in values]} for name, values in figures.items()]
    return {
        "time": int(time.time()),
        "runs": runs,
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
