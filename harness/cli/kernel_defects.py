"""Run the killers of the kernel's defects in a guest: each must fail with its defect only.

The table of defects is in the suite, selftests/conformance/kernel-defects.toml. docs/kernel-defects.md explains it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from harness import suite
from harness.cli.mutants import Finding
from harness.cli.terminal import COULD_NOT, FAILED, OK
from harness.errors import HarnessError, UsageError
from harness.install.cache import cache_root
from harness.lanes import LANE
from harness.plugin.guests import FIRST_PID_NAMESPACE, KERNEL, TIMEOUT_SCALE, UNUSED_PLUGINS
from harness.report.conformance import FOLDER
from harness.report.results import read_results
from harness.sandbox.launcher import INSIDE
from harness.tables import read_toml
from harness.vm import boot, driver
from harness.vm.driver import Replacement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.report.results import Result
    from harness.tables import Table
    from harness.vm.boot import VmResult

TABLE: Final = FOLDER / "kernel-defects.toml"
AREA: Final = "kernel"
# The driver built from the same source without a defect: all killers must pass with it.
UNCHANGED: Final = "unchanged"
_THERE: Final = "/defects"
# Seconds: for the killer of one defect, for all killers without one, and for the guest to boot.
_KILLER: Final = 300
_BOOT: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A row of the table: a text of the driver's source that is replaced, and the test that must fail then."""

    name: str
    requirements: tuple[str, ...]
    change: Replacement
    killer: str


def read_defects(root: Path) -> tuple[str, list[Defect]]:
    """Read the table of a checkout; returns the kernel whose driver has the defects, and these. Raises UsageError."""
    top = read_toml(root / TABLE, TABLE.name)
    kernel = top.text("kernel")
    return kernel, [_defect(row) for row in top.tables("defect")]


def _defect(row: Table) -> Defect:
    change = Replacement(file=row.text("file"), text=row.text("text"), replacement=row.text("replacement"))
    defect = Defect(
        name=row.text("name"), requirements=row.words("requirements"), change=change, killer=row.text("killer")
    )
    row.refuse_rest()
    return defect


def choose(defects: Sequence[Defect], names: Sequence[str]) -> list[Defect]:
    """Return the defects with these names; without names, all. Raises UsageError for an unknown name."""
    known = [defect.name for defect in defects]
    for name in names:
        if name not in known:
            raise UsageError(f"no kernel defect {name}; there are: {', '.join(sorted(known))}")
    return [defect for defect in defects if not names or defect.name in names]


def run_command(root: Path, names: Sequence[str], out: TextIO, *, as_json: bool) -> int:
    """Run the killers of the defects and print the findings: the command `wg-interop kernel-defects`."""
    kernel, all_defects = read_defects(root)
    defects = choose(all_defects, names)
    modules = build(kernel, defects)
    with tempfile.TemporaryDirectory(prefix="wg-interop-kernel-defects-") as scratch:
        result = run_guest(kernel, defects, modules, Path(scratch))
        findings = judge_all(defects, result)
    caught = sum(finding.caught for finding in findings)
    if as_json:
        print(json.dumps({"kernel_defects": [finding.as_json() for finding in findings]}, indent=1), file=out)
    else:
        for finding in findings:
            print(finding.lines(), file=out)
        print(f"{caught} of {len(findings)} kernel defects caught, on Linux {result.kernel}", file=out)
    if any(finding.tested and not finding.caught for finding in findings):
        return FAILED
    return OK if caught == len(findings) else COULD_NOT


def build(kernel: str, defects: Sequence[Defect]) -> dict[str, Path]:
    """Build the driver with each defect, and without one; returns the modules by name."""
    tree = driver.fetch(kernel, cache_root())
    modules = {UNCHANGED: driver.build(tree, (), cache_root())}
    for defect in defects:
        try:
            modules[defect.name] = driver.build(tree, (defect.change,), cache_root())
        except HarnessError as error:
            raise UsageError(f"kernel defect {defect.name}: {error}") from error
    return modules


def run_guest(kernel: str, defects: Sequence[Defect], modules: Mapping[str, Path], scratch: Path) -> VmResult:
    """Run all killers in one guest: first with the driver as it is, then each with its defect."""
    killers = {UNCHANGED: list(dict.fromkeys(defect.killer for defect in defects))}
    killers |= {defect.name: [defect.killer] for defect in defects}
    jobs = [
        {
            "module": f"{_THERE}/{name}.ko",
            "command": _pytest(name, tests),
            "seconds": _KILLER if name != UNCHANGED else _KILLER * len(tests),
        }
        for name, tests in killers.items()
    ]
    listing = scratch / "jobs.json"
    listing.write_text(json.dumps(jobs))
    return boot.boot(
        kernel,
        ["python", "-m", "harness.vm.reload", f"{_THERE}/jobs.json"],
        deadline=_BOOT + 2 * _KILLER * len(defects),
        files=[(listing, f"{_THERE}/jobs.json"), *((path, f"{_THERE}/{name}.ko") for name, path in modules.items())],
        environment={LANE: "vm", INSIDE: FIRST_PID_NAMESPACE, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def _pytest(name: str, tests: Sequence[str]) -> list[str]:
    """Return the command that runs these tests of the driver, with itself as the other end of a pair."""
    without = [f"-pno:{plugin}" for plugin in (*UNUSED_PLUGINS, "xdist")]
    options = ["--lane=netns", "--keep=none", f"--timeout-scale={TIMEOUT_SCALE:g}", f"--impl={KERNEL}"]
    results = f"--results={boot.RESULTS_IN_GUEST}/{name}.json"
    return ["python", "-m", "pytest", "--color=no", "-q", *suite.pytest_options(), *without, *options, results, *tests]


def judge_all(defects: Sequence[Defect], result: VmResult) -> list[Finding]:
    """Judge the results that the guest has left, in the order of the defects."""
    control = _results(result, UNCHANGED)
    lost = "" if result.ending is boot.Ending.EXITED else boot.explain(result)
    return [judge(defect, control, _results(result, defect.name), lost) for defect in defects]


def _results(result: VmResult, name: str) -> list[Result]:
    path = result.results / f"{name}.json"
    return list(read_results(path).results) if path.exists() else []


def judge(defect: Defect, control: Sequence[Result], results: Sequence[Result], lost: str = "") -> Finding:
    """Judge the results of a killer with the defect, and without one (control).

    A defect is caught if a test fails with it, or differs, and all passed without it.

    lost: why there may be no results.
    """
    ours = [result for result in control if result.id.partition("[")[0] == defect.killer]
    failed = [result for result in results if result.state in {"failed", "differs"}]
    tested = True
    if not (results and ours):
        tested, reason = False, lost or f"{defect.killer} did not run"
    elif wrong := [result for result in ours if result.state != "passed"]:
        reason = f"{wrong[0].id} is {wrong[0].state} with the driver as it is, too: {wrong[0].message}"
    elif not failed:
        reason = f"{defect.killer} is {', '.join(sorted({result.state for result in results}))}"
    else:
        reason = ""
    cited = {name for result in failed for name in result.requirements}
    return Finding(
        name=defect.name,
        area=AREA,
        requirements=defect.requirements,
        caught=not reason,
        by=tuple(result.id for result in failed),
        cited=tuple(name for name in defect.requirements if name in cited),
        seconds=round(sum(result.seconds for result in results), 1),
        reason=reason,
        tested=tested,
    )
