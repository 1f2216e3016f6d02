"""Run the benchmarks in interleaved rounds, and print medians and ratios."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from bench import guest
from bench.catalogue import FULL, IN_GUEST, MEASUREMENTS, QUICK, Task, chosen, measured_by
from bench.figures import Results, document, shown, table
from bench.flame import find_py_spy, flame_graphs
from bench.processes import cores
from harness import HarnessError, Registry, Unavailable, UsageError
from harness.install.progress import Step
from harness.plugin.guests import TIMEOUT_SCALE
from harness.vm import kernels
from harness.wait import set_timeout_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.catalogue import Effort, Measurement
    from bench.figures import Figure
    from harness import Manifest

ROUNDS: Final = 5
DEFAULT: Final = ("refwg", "wireguard-go")
KERNEL: Final = "kernel"
INSIDE: Final = "guest_"  # begins the names of figures and ratios that were measured in a guest
HELP: Final = """\
Measure WireGuard implementations against each other. Both ends of a tunnel run the same program, each in a namespace
of its own, and a veth pair connects them. In each round every program is measured in turn, A B A
B, so that all share the load of the machine. A ratio always compares values of the same round.

  ./bench/run --quick                                            short rounds of the main figures
  ./bench/run --impl refwg+simple --impl wireguard-go --json figures.json    also writes the page figures.html
  ./bench/run --impl refwg --impl mine=/tmp/build/wg --only tcp1,udp1400 --rounds 9
  ./bench/run --impl refwg --guest                               also refwg beside the kernel's driver, in a guest
  ./bench/run --impl refwg --only tcp1 --flame /tmp/flames       also flame graphs of both ends of refwg
"""
EXIT_STATUS: Final = """\
Ctrl-C ends the run; what was measured until then is printed and written.

exit status: 0 all was measured, 1 a measurement failed, 2 wrong usage, 125 could not measure, 130 interrupted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the command line asks for. asked: the implementations; inside: those that a guest measures, if any."""

    asked: tuple[Manifest, ...]
    measurements: tuple[Measurement, ...]
    rounds: int
    effort: Effort
    baseline: str
    inside: tuple[str, ...] = ()
    kernel: str = ""
    only_inside: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the implementations, in the order of the command line."""
        return [manifest.name for manifest in self.asked]

    @property
    def figures(self) -> list[Figure]:
        """The figures of all measurements, in order."""
        return [figure for measurement in self.measurements for figure in measurement.figures]

    def steps(self, number: int) -> list[tuple[Measurement, Manifest]]:
        """Return what a round measures, in order; the first round has number 1."""
        return [
            (measurement, manifest)
            for measurement in self.measurements
            if not measurement.most_rounds or number <= measurement.most_rounds
            for manifest in measured_by(measurement, self.asked)
        ]


class Run:
    """One run of the benchmarks. results: what was measured so far; interrupted: by Ctrl-C or SIGTERM."""

    def __init__(self, plan: Plan, *, json_file: Path | None, html_file: Path | None) -> None:
        self.results = Results()
        self.interrupted = False
        self._plan = plan
        self._files = {"json": json_file, "html": html_file}
        self._started = time.time()
        self._loads: list[float] = []
        self._inside: dict[str, Any] = {}

    def measure(self) -> None:
        """Run all rounds, and write the results after each."""
        began, longest = time.monotonic(), 0.0
        for number in range(1, self._plan.rounds + 1):
            started = time.monotonic()
            self._loads.append(round(os.getloadavg()[0], 2))
            for measurement, manifest in self._plan.steps(number):
                self._measure_one(number, measurement, manifest)
            self.write()
            longest = max(longest, time.monotonic() - started)
            left = longest * (self._plan.rounds - number)
            what = f"about {left / 60:.0f} min left" if left else f"{(time.monotonic() - began) / 60:.0f} min in all"
            print(f"round {number} of {self._plan.rounds} is measured, {what}", flush=True)
        if self._plan.inside:
            self._measure_inside()
            self.write()

    def _measure_one(self, number: int, measurement: Measurement, manifest: Manifest) -> None:
        name = "" if measurement.lab else manifest.name
        label = f"{number}/{self._plan.rounds} {measurement.name} {name}"
        try:
            with Step(label.ljust(34)) as step:
                task = Task(
                    manifest=manifest,
                    effort=self._plan.effort,
                    guess=self.results.last(measurement.name, name),
                    note=step.on_line,
                )
                figures = measurement.run(task)
                step.note = _in_short(measurement, figures)
        except (HarnessError, AssertionError, OSError) as error:
            print(f"  {error}", flush=True)
            self.results.fail(number, measurement.name, name, str(error))
        else:
            self.results.add(number, name, figures)

    def _measure_inside(self) -> None:
        """Measure in a guest; a failure there is noted like any other."""
        plan = self._plan
        words = [word for name in plan.inside for word in ("--impl", name)]
        words += ["--rounds", str(plan.rounds), "--only", ",".join(plan.only_inside), "--baseline", KERNEL]
        words += ["--timeout-scale", f"{TIMEOUT_SCALE:g}"]
        words += ["--quick"] if plan.effort is QUICK else []
        steps = plan.rounds * len(plan.inside) * len(plan.only_inside)
        try:
            with Step("guest".ljust(34)) as step:
                self._inside = guest.measured_inside(words, kernel=plan.kernel, steps=steps, on_line=step.on_line)
        except HarnessError as error:
            print(f"  {error}", flush=True)
            self.results.fail(0, "guest", KERNEL, str(error))
        self.results.failures += [
            {**failure, "measurement": INSIDE + failure["measurement"]} for failure in self._inside.get("failures", ())
        ]

    def draw_flames(self, folder: Path) -> None:
        """Write flame graphs of each refwg of the run."""
        for manifest in self._plan.asked:
            if (manifest.base or manifest.name) == "refwg":
                with Step(f"flame graphs {manifest.name}".ljust(34)) as step:
                    step.note = ", ".join(map(str, flame_graphs(manifest, folder)))

    def document(self) -> dict[str, Any]:
        """Return the content of the file that --json writes."""
        facts = {
            "time": int(self._started),
            "seconds": round(time.time() - self._started),
            "rounds": self._plan.rounds,
            "interrupted": self.interrupted,
            "baseline": self._plan.baseline,
            "host": host(self._loads),
            "implementations": [{"name": made.name, "version": made.version()} for made in self._plan.asked],
        }
        content = document(self.results, self._plan.figures, self._plan.names, facts)
        if self._inside:
            content["guest"] = self._inside
            content["runs"] += [{**run, "name": INSIDE + run["name"], "guest": True} for run in self._inside["runs"]]
            content["ratios"] |= {INSIDE + name: ratio for name, ratio in self._inside["ratios"].items()}
        return content

    def write(self) -> None:
        """Write the files that the command line asks for, with what was measured so far."""
        content = self.document()
        if target := self._files["json"]:
            _replace(target, json.dumps(content, indent=1) + "\n")
        if target := self._files["html"]:
            from bench.page import page  # noqa: PLC0415 - importing jinja2 takes time

            _replace(target, page(content))

    def show(self) -> None:
        """Print the medians and the ratios, and what failed."""
        baseline = f" (and ratios to {self._plan.baseline} within a round)" if len(self._plan.asked) > 1 else ""
        print(f"\nmedians of {len(self._loads)} rounds{baseline}")
        print(table(self.results, self._plan.figures, self._plan.names, self._plan.baseline))
        for name, ratio in self._inside.get("ratios", {}).items():
            print(f"{INSIDE}{name}: {ratio:.3f}")
        for failure in self.results.failures:
            where = f"round {failure['round']}, {failure['measurement']}, {failure['impl']}"
            print(f"FAILED: {where}: {failure['message']}")
        for target in self._files.values():
            if target:
                print(target)


def main() -> int:
    """Run the benchmarks that the command line asks for; return the exit status."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        plan = _plan(arguments)
        if arguments.flame:
            find_py_spy()
    except UsageError as error:
        parser.error(str(error))
    except HarnessError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        return 125
    html_file = arguments.html or (arguments.json.with_suffix(".html") if arguments.json else None)
    set_timeout_scale(arguments.timeout_scale)
    run = Run(plan, json_file=arguments.json, html_file=html_file)
    signal.signal(signal.SIGTERM, _interrupt)
    status = 0
    try:
        run.measure()
        if arguments.flame:
            run.draw_flames(arguments.flame)
    except KeyboardInterrupt:
        # A second one must not end the process before the results are written.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        run.interrupted, status = True, 130
    except HarnessError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        status = 125
    run.write()
    run.show()
    return status or int(bool(run.results.failures))


def _parser() -> argparse.ArgumentParser:
    lines = [
        f"  {measurement.name:<14} {measurement.title}{'' if measurement.in_quick else ' *'}"
        for measurement in MEASUREMENTS
    ]
    measurements = "\n".join(["measurements (those with * are left out by --quick):", *lines, "", EXIT_STATUS])
    parser = argparse.ArgumentParser(
        prog="bench/run", description=HELP, epilog=measurements, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--impl", action="append", default=[], metavar="NAME[=PATH]",
        help=f"measure this implementation; may be repeated; refwg+ENGINE is refwg with this engine (default: "
             f"{', '.join(DEFAULT)})")  # fmt: skip
    add("--impl-manifest", action="append", default=[], type=Path, metavar="FILE", help="measure one by its manifest")
    add("--baseline", metavar="NAME", help="compare with this one (default: wireguard-go, or else the last one)")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help="number of rounds (default: %(default)s)")
    add("--quick", action="store_true", help="measure only the main figures, for a shorter time each")
    add("--only", action="append", default=[], metavar="NAME,...", help="measure only these, also with --quick")
    add("--guest", action="store_true", help="also measure refwg and the kernel's driver in a guest")
    add("--kernel", default=kernels.CATALOGUE.default, metavar="VERSION|PATH",
        help="kernel of the guest (default: %(default)s)")  # fmt: skip
    add("--timeout-scale", type=float, default=1.0, metavar="F", help="multiply all deadlines, on a slow machine")
    add("--flame", type=Path, metavar="DIRECTORY", help="also write flame graphs of each refwg; needs py-spy")
    add("--json", type=Path, metavar="FILE", help="also write all values, medians and ratios to this file")
    add("--html", type=Path, metavar="FILE", help="also write a page with plots (default: beside the JSON file)")
    return parser


def _plan(arguments: argparse.Namespace) -> Plan:
    """Check the command line; raises UsageError, or Unavailable for an implementation that cannot run here."""
    if arguments.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, not {arguments.rounds}")
    only = [name for text in arguments.only for name in text.split(",") if name]
    measurements = tuple(chosen(only, quick=arguments.quick))
    programs = arguments.impl or ([] if arguments.impl_manifest else DEFAULT)
    registry = Registry.of_options(programs, arguments.impl_manifest, ())
    names = [name for name in registry.asked if not (arguments.guest and name == KERNEL)]
    asked = tuple(map(registry.get, names))
    for manifest in asked:
        if why := manifest.why_unavailable():
            remedy = "; --guest measures it in a guest" if manifest.kind == KERNEL else ""
            raise Unavailable(f"{manifest.name}: {why}{remedy}")
    inside = [name for name in names if name.partition("+")[0] == "refwg"] or ["refwg"]
    return Plan(
        asked=asked,
        measurements=measurements,
        rounds=arguments.rounds,
        effort=QUICK if arguments.quick else FULL,
        baseline=_baseline(arguments.baseline, names),
        inside=(*inside, KERNEL) if arguments.guest else (),
        kernel=arguments.kernel,
        only_inside=tuple(measurement.name for measurement in measurements) if only else IN_GUEST,
    )


def _baseline(wanted: str | None, names: Sequence[str]) -> str:
    if wanted and wanted not in names:
        raise UsageError(f"--baseline {wanted}: it is not measured; add --impl {wanted}")
    if wanted or not names:
        return wanted or ""
    return DEFAULT[-1] if DEFAULT[-1] in names else names[-1]


def host(loads: Sequence[float]) -> dict[str, Any]:
    """Describe the machine. loads: its load average (1 min) at the beginning of each round."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "kernel": os.uname().release,
        "cpu": model[1] if model else os.uname().machine,
        "cores": len(cores()),
        "python": sys.version.split()[0],
        "loads": list(loads),
    }


def _in_short(measurement: Measurement, figures: dict[str, float]) -> str:
    """Format the first figures of a measurement for the line of its step."""
    first = [figure for figure in measurement.figures if figure.name in figures and not figure.is_detail][:2]
    return ", ".join(f"{shown(figures[figure.name])} {figure.unit}".rstrip() for figure in first)


def _replace(target: Path, text: str) -> None:
    """Write a file so that it is complete at any time, even if this process is killed."""
    part = target.with_name(f".{target.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(target)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
