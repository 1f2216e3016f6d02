"""Compare the kernel's netns.sh with our kernel~kernel suite in one guest: ratio of times.

    ./bench/suite /path/to/linux/tools/testing/selftests/wireguard/netns.sh

The script is not part of this project: it comes with every source of Linux (Debian: package linux-source-6.1). What it
needs beside our guest's programs is unpacked into the cache, and the machine stays as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.suite_inside import FIGURES
from ci.setup_checkout import ROOT
from harness import HarnessError
from harness.install.cache import Area, building, directory, locked
from harness.install.debian import unpack
from harness.install.progress import Step
from harness.plugin.guests import FIRST_PID_NAMESPACE
from harness.vm import boot, kernels

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGES: Final = ("iptables", "iperf3", "ncat")
MODULES: Final = ("nft_compat", "xt_length", "xt_mark", "xt_nat")
SCRIPT: Final = "/lab/netns.sh"
DEADLINE: Final = 3000.0
# What the script checks, and nothing else: each test that cites one of its scenarios.
OURS: Final = (
    "-m", "pytest", "-q", "--impl", "kernel", "--pair", "kernel~kernel", "--lane", "netns",
    "-m", "scenario and not waiting", "--timeout-scale", "4", "--durations", "10",
    "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:random_order",
)  # fmt: skip


def main() -> int:
    """Run both and print the ratio; the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("script", type=Path, metavar="NETNS.SH")
    parser.add_argument("--kernel", default=kernels.CATALOGUE.default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    if not arguments.script.is_file():
        parser.error(
            f"{arguments.script}: no such file; it is in a source of Linux, tools/testing/selftests/wireguard/"
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
    """Boot a guest that runs both; how each ended and how long it took."""
    started = time.monotonic()
    # As in lane vm: half of the tests each, for the workers of xdist take ten seconds to begin under emulation.
    suites = {"script": (1, ["bash", SCRIPT]), "ours": (2, ["python", *OURS, *tests()])}
    result = boot.boot(
        kernel,
        ["python", "-m", "bench.suite_inside", boot.RESULTS_IN_GUEST, json.dumps(suites)],
        deadline=DEADLINE,
        modules=MODULES,
        files=[(script, SCRIPT), *((path, f"/{path.name}") for path in sorted(programs().iterdir()) if path.is_dir())],
        environment={"WG_INTEROP_SANDBOX": FIRST_PID_NAMESPACE, "PYTHONDONTWRITEBYTECODE": "1"},
        show=lambda data: print(data.decode(errors="replace"), end="", flush=True),
    )
    if result.ending is not boot.Ending.EXITED:
        raise HarnessError(boot.explain(result))
    print(f"logs: {result.results}; {time.monotonic() - started:.0f} s in all, {result.accelerator}, {result.kernel}")
    figures: dict[str, dict[str, float]] = json.loads((result.results / FIGURES).read_text())
    return figures


def tests() -> list[str]:
    """The files with tests of scenarios: to collect the others as well takes seconds where Python is emulated."""
    files = sorted((ROOT / "selftests/netns").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.scenario(" in file.read_text()]


def programs() -> Path:
    """The directory in which the script's programs are unpacked, at the paths they have below /."""
    place = directory(Area.TOOLCHAINS) / "netns.sh"
    with Step("programs of netns.sh") as step, locked(place, step.on_line):
        if not place.exists():
            with building(place) as part:
                unpack(PACKAGES, part, step.on_line)
                # Its name comes from Debian's alternatives, which only an installation makes.
                (part / "usr/sbin/iptables").symlink_to("iptables-nft")
                # And Debian's ping has no second name.
                (part / "usr/bin/ping6").symlink_to(shutil.which("ping") or "/usr/bin/ping")
    return place


def on_line(figures: Mapping[str, Mapping[str, float]], target: Path | None) -> int:
    """Print the figures and their ratio; 1 if either suite failed."""
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
