"""Run the benchmarks in interleaved rounds, and print medians and ratios.

Compare the ratios over time, not the seconds: two programs that are measured in turns share the machine's load.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench import configuration, floods, topologies, tunnels
from bench.guest import first_verdict
from harness import HarnessError, Registry

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK, FULL = 5, 15  # rounds
GUEST_ROUNDS = 3  # of guest, large configuration and floods, which take long
HELP: Final = """\
Measure the lab's own speed, and refwg's and wireguard-go's: how long topology `nat` takes to set up, how long one MiB
takes through a tunnel, how long a program takes to start. Every round measures each of them once, in turn. Prints the
median and the fastest time of each, and ratios of medians. bench/README.md explains every figure.

Compare the ratios over time, not the seconds: they depend less on the machine and on its load.
"""
EXIT_STATUS: Final = "exit status: 0 measured, 2 wrong usage, 125 could not measure"


def main() -> int:
    """Run the benchmarks that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/run", description=HELP, epilog=EXIT_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true",
        help=f"{QUICK} rounds instead of {FULL}; leave out the guest, the large configuration and the floods",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"number of rounds (default: {FULL}, with --quick {QUICK})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and ratios to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK if arguments.quick else FULL)
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, not {rounds}")
    try:
        measured = measure(rounds, guest=not arguments.quick)
    except HarnessError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        return 125
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


def measure(rounds: int, *, guest: bool) -> dict[str, object]:
    """Run all benchmarks in interleaved rounds; print the figures, and return them as `report` does.

    guest: also run those that take minutes: guest, large configuration, floods.
    """
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
    """Print medians and ratios; return the content of the file that --json writes, whose format stays as it is.

    figures: seconds of each round, by the figure's name. The file has `time` (Unix time), `runs` (the seconds of each
    figure) and `ratios` (of medians).
    """
    median = {name: statistics.median(values) for name, values in figures.items()}
    for name, values in figures.items():
        print(f"{name}: median {median[name] * 1000:.0f} ms, fastest {min(values) * 1000:.0f} ms")
    ratios = {
        "nat_topology_lab_over_shell": median["nat_topology_by_lab"] / median["nat_topology_by_shell"],
        # A ratio of rates, so the seconds are the other way round.
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
