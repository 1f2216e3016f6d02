"""Time the kernel's netns.sh and our kernel~kernel suite in one guest, and print the ratio.

The script needs programs that our guest lacks. They are unpacked into the cache, not installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.guest import BENCH
from bench.suite_inside import FIGURES
from ci.setup_checkout import ROOT
from harness import HarnessError
from harness.install.cache import Area, building, directory, locked
from harness.install.debian import unpack
from harness.install.progress import Step
from harness.lanes import LANE
from harness.plugin.guests import FIRST_PID_NAMESPACE
from harness.sandbox.launcher import INSIDE
from harness.vm import boot, kernels

if TYPE_CHECKING:
    from collections.abc import Mapping

HELP: Final = """\
Time the kernel's netns.sh and our kernel~kernel suite, one after the other in one guest. Prints the seconds of each and
ours_over_script, the ratio: below 1, our suite is faster. Our suite has the tests that cite a scenario of the script.

You provide the script. It is in the source of Linux, which Debian has as package linux-source-6.1:

  ./bench/suite /path/to/linux/tools/testing/selftests/wireguard/netns.sh

Nothing is installed on this machine: the programs that the script needs are unpacked into the cache.
"""
EXIT_STATUS: Final = "exit status: 0 both passed, 1 one failed, 2 wrong usage, 125 could not measure, 130 interrupted"
PACKAGES: Final = ("iptables", "iperf3", "ncat")  # programs of the script that the guest lacks
MODULES: Final = ("nft_compat", "xt_length", "xt_mark", "xt_nat")  # for the script's iptables
SCRIPT: Final = "/lab/netns.sh"  # in the guest
DEADLINE: Final = 3000.0  # seconds for the whole guest
# Our suite: the tests that cite a scenario of the script, but not those that need lane warp.
OURS: Final = (
    "-m", "pytest", "-q", "--impl", "kernel", "--pair", "kernel~kernel", "--lane", "netns",
    "-m", "scenario and not waiting", "--timeout-scale", "4", "--durations", "10",
    "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:random_order",
)  # fmt: skip


def main() -> int:
    """Run both suites and print their times; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/suite", description=HELP, epilog=EXIT_STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path, metavar="NETNS.SH", help="the kernel's script")
    parser.add_argument(
        "--kernel", default=kernels.CATALOGUE.default, metavar="VERSION|PATH",
        help="kernel of the guest: a version, a bzImage or a build tree (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()
    if not arguments.script.is_file():
        parser.error(
            f"{arguments.script}: no such file; the source of Linux has it in tools/testing/selftests/wireguard/"
        )
    try:
        figures = measure(arguments.script, arguments.kernel)
    except (HarnessError, OSError) as error:
        print(f"bench/suite: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130
    return on_line(figures, arguments.json)


def measure(script: Path, kernel: str) -> dict[str, dict[str, float]]:
    """Boot a guest that runs both suites; return `status` and `seconds` of each, by its name `script` or `ours`.

    Raises HarnessError if the guest does not run to its end.
    """
    started = time.monotonic()
    # As in lane vm, two processes run half of our tests each: workers of xdist take ten seconds to start if emulated.
    suites = {"script": (1, ["bash", SCRIPT]), "ours": (2, ["python", *OURS, *tests()])}
    result = boot.boot(
        kernel,
        ["python", "-m", "bench.suite_inside", boot.RESULTS_IN_GUEST, json.dumps(suites)],
        deadline=DEADLINE,
        modules=MODULES,
        files=[
            (script, SCRIPT),
            BENCH,
            *((path, f"/{path.name}") for path in sorted(programs().iterdir()) if path.is_dir()),
        ],
        # Of this lane: streams carry as much as in the guests of a run (harness/lab/trafficset.py).
        environment={INSIDE: FIRST_PID_NAMESPACE, LANE: "vm", "PYTHONDONTWRITEBYTECODE": "1"},
        show=lambda data: print(data.decode(errors="replace"), end="", flush=True),
    )
    if result.ending is not boot.Ending.EXITED:
        raise HarnessError(boot.explain(result))
    print(f"logs: {result.results}; {time.monotonic() - started:.0f} s in all, {result.accelerator}, {result.kernel}")
    figures: dict[str, dict[str, float]] = json.loads((result.results / FIGURES).read_text())
    return figures


def tests() -> list[str]:
    """Return the test files that cite scenarios; collecting the others too would take seconds under emulation."""
    files = sorted((ROOT / "selftests/netns").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.scenario(" in file.read_text()]


def programs() -> Path:
    """Unpack the script's programs into the cache if they are missing; return the directory that stands for /."""
    place = directory(Area.TOOLCHAINS) / "netns.sh"
    with Step("programs of netns.sh") as step, locked(place, step.on_line):
        if not place.exists():
            with building(place) as part:
                unpack(PACKAGES, part, step.on_line)
                # An installation would make this link (update-alternatives).
                (part / "usr/sbin/iptables").symlink_to("iptables-nft")
                # The script calls ping6. Debian has it as a link, which the guest's image lacks.
                (part / "usr/bin/ping6").symlink_to(shutil.which("ping") or "/usr/bin/ping")
    return place


def on_line(figures: Mapping[str, Mapping[str, float]], target: Path | None) -> int:
    """Print the figures and their ratio, and write them to `target`; return 1 if either suite failed, else 0."""
    ratio = figures["ours"]["seconds"] / figures["script"]["seconds"]
    for name, figure in figures.items():
        print(f"{name}: {figure['seconds']:.1f} s, status {figure['status']:g}")
    print(f"ours_over_script: {ratio:.3f}")
    if target:
        target.write_text(
            json.dumps({"runs": figures, "ratios": {"ours_over_script": round(ratio, 4)}}, indent=1) + "\n"
        )
    return 1 if any(figure["status"] for figure in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
