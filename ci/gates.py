"""Run all gates: set-up, lint, types, tests lane by lane; print what failed in one table."""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ci.junit import Counts, read_counts
from ci.setup_checkout import EXIT_COULD_NOT, EXIT_INTERRUPTED, ROOT, State, StepResult, prepare, run_program
from harness.errors import HarnessError
from harness.install.tools import exit_on_sigterm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Seconds for one gate, less than CI's own limit: so the table can name a gate that hangs. And for one of the night.
DEADLINE: Final = 2400
LONG_DEADLINE: Final = 7200
VM_PAIRS: Final = ("kernel~kernel", "kernel~wireguard-go", "wireguard-go~kernel")
VM_PAIRS_BY_DAY: Final = ("kernel~kernel", "wireguard-go~kernel")
# refwg is slow under emulation: its core scenarios run for every change, the others only with --nightly.
SLOW_PAIRS: Final = ("kernel~refwg", "refwg~kernel")
WARP_PAIRS: Final = ("kernel~kernel", "kernel~wireguard-go")
SLOW_WARP_PAIRS: Final = ("kernel~refwg", "refwg~kernel", "wireguard-go~refwg", "boringtun~refwg")
OTHER_KERNEL: Final = "6.12"
# Pairs of these four run here, some only with --nightly, as those of the Rust programs with refwg; the rest:
# CONTRIBUTING.md.
IMPLEMENTATIONS: Final = ("kernel", "refwg", "wireguard-go", "wireguard-go-debian")
RUST: Final = ("boringtun", "gotatun")
PAIR: Final = "wireguard-go~wireguard-go-debian"  # the only pair of --quick
NAMED: Final = 5  # failed tests that the table names at most
REPORTS: Final = ROOT / "report" / "junit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One check that must pass before a change is merged.

    quick: arguments added with --quick; None: --quick leaves the gate out. full: arguments added without --quick.
    least, least_quick: minimum number of tests that must run (passed or failed); fewer is a failure. Without it, a
    renamed folder or marker would make the gate smaller, and it would still pass. nightly: only --nightly has it.
    """

    name: str
    command: tuple[str, ...]
    lane: str = ""  # gates without a lane always run
    quick: tuple[str, ...] | None = ()
    full: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()  # programs under test that the gate needs, besides those that are always installed
    nightly: bool = False
    least: int = 0
    least_quick: int = 0

    @property
    def deadline(self) -> int:
        """Seconds after which it is stopped, and has failed."""
        return LONG_DEADLINE if self.nightly else DEADLINE

    @property
    def junit(self) -> Path | None:
        """The JUnit file with the results of its tests; None for a gate without tests."""
        return REPORTS / f"{self.name.replace(' ', '-')}.xml" if "pytest" in self.command else None


# Folders of tests that need neither namespaces nor a guest.
_UNIT: Final = ("selftests/unit", "selftests/properties", "selftests/vectors")
_UNIT_TESTS: Final = 7000
# Tests of implementations, and tests of the lab itself, which do not depend on implementation or kernel.
_SCENARIOS: Final = "selftests/netns"
_LAB: Final = "selftests/lab"
# Tests of single requirements, each of one implementation. The Rust programs and Debian's wireguard-go: by night.
_CONFORMANCE: Final = "selftests/conformance"
_CONFORMING: Final = ("refwg", "wireguard-go")
_CONFORMING_BY_NIGHT: Final = ("wireguard-go-debian", *RUST)
_WARP_CONFORMING: Final = ("kernel", "refwg")
_WARP_CONFORMING_BY_NIGHT: Final = ("wireguard-go", "wireguard-go-debian", *RUST)
_TIMER_TESTS: Final = 23
# The engines of refwg: by day what is about superframes and batches, by night everything.
_ENGINES: Final = ("refwg+batch", "refwg+simple", "refwg+workers")
_SUPERFRAMES: Final = (
    f"{_SCENARIOS}/test_superframes.py",
    f"{_CONFORMANCE}/test_batches.py",
    f"{_CONFORMANCE}/test_coalescing.py",
)
_BATCHES: Final = ("refwg+batch~refwg+batch", "refwg+workers~refwg+workers")
_ENGINE_PAIRS: Final = ("refwg+batch~refwg+simple", "refwg+batch~wireguard-go", "wireguard-go~refwg+batch")
# Without hypothesispytest: each worker would import Hypothesis at its end, and no test here uses it. worksteal: tests
# take from 0.01 to 10 seconds, so a worker without tests takes some from another.
_SPREAD: Final = ("-p", "no:hypothesispytest", "--dist", "worksteal")
NETNS: Final = (_SCENARIOS, _LAB, *_SPREAD)
_SHUFFLED: Final = ("-n", "2", "--random-order")
# Every change is tested with all pairs of these three, and with Debian's wireguard-go beside refwg.
_THREE: Final = ("kernel", "refwg", "wireguard-go")
DEBIAN: Final = "wireguard-go-debian"
_BY_DAY_HERE: Final = (
    *(f"--pair={a}~{b}" for a in _THREE for b in _THREE),
    *(f"--pair={pair}" for pair in (f"{DEBIAN}~refwg", f"refwg~{DEBIAN}")),
)
_BY_NIGHT_HERE: Final = tuple(
    f"--pair={a}~{b}"
    for a in IMPLEMENTATIONS
    for b in IMPLEMENTATIONS
    if DEBIAN in {a, b} and f"--pair={a}~{b}" not in _BY_DAY_HERE
)
_RUST: Final = tuple(f"--pair={pair}" for name in RUST for pair in (f"{name}~refwg", f"refwg~{name}"))
_VM_FAULTS: Final = "selftests/faults/test_vm.py"
_FAULTS: Final = ("selftests/faults", "selftests/mutants", "-n", "2", f"--ignore={_VM_FAULTS}")
_MUTANTS: Final = ("wg-interop", "mutants")
# Tests that take minutes under emulation run only with --nightly.
_BY_DAY: Final = ("-m", "not long_in_guest")
# pytest's own option: the tests marked `nightly`, and as much volume as the catalogue of requirements asks.
_LONG: Final = "--nightly"
_WARP: Final = (_SCENARIOS, "--lane", "warp", "-n", "2")


def _pairs(pairs: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"--pair={pair}" for pair in pairs)


def _vm(pairs: Sequence[str], *selection: str) -> tuple[str, ...]:
    return _SCENARIOS, *selection, "--lane", "vm", "-n", "2", *_pairs(pairs)


def _conformance(names: Sequence[str]) -> tuple[str, ...]:
    """Return the command of the conformance tests of these implementations; most of the time they wait."""
    return "pytest", _CONFORMANCE, *_SPREAD, "-n", "4", *(f"--impl={name}" for name in names)


def _conformance_of_kernel(*selection: str) -> tuple[str, ...]:
    """Return the command of the conformance tests of the kernel, in a guest."""
    return "pytest", _CONFORMANCE, *selection, "--lane", "vm", "-n", "2", "--impl", "kernel"


def _conformance_over_time(names: Sequence[str]) -> tuple[str, ...]:
    """Return the command of the conformance tests in which minutes pass."""
    return "pytest", _CONFORMANCE, "--lane", "warp", "-n", "2", *(f"--impl={name}" for name in names)


def _results(name: str) -> tuple[str, str]:
    """Return options that give a gate its own folder for results and evidence."""
    return "--results", str(ROOT / "report" / name / "results.json")


def all_gates() -> tuple[Gate, ...]:
    """Return every gate, in the order in which they run."""
    return (
        Gate(name="ruff check", command=("ruff", "check", ".")),
        Gate(name="ruff format", command=("ruff", "format", "--check", ".")),
        Gate(name="mypy", command=("mypy",)),
        Gate(name="workflows", command=("python", "-m", "ci.workflows"), quick=None),
        *_unit_gates(_fully_covered()),
        Gate(
            name="netns tests",
            # Three at a time: most tests wait for a while.
            command=("pytest", *NETNS, "-n", "3", "--random-order"),
            lane="netns",
            quick=("--pair", PAIR),
            full=_BY_DAY_HERE,
            least=1400,
            least_quick=330,
        ),
        Gate(
            name="conformance tests",
            command=(*_conformance(_CONFORMING), *_results("conformance")),
            lane="netns",
            quick=None,
            least=700,
        ),
        Gate(
            name="superframe tests",
            command=("pytest", *_SUPERFRAMES, *_SPREAD, "-n", "3", *_pairs(_BATCHES), *_results("frames")),
            lane="netns",
            quick=None,
            least=80,
        ),
        Gate(
            name="long superframe tests",
            command=(
                *("pytest", _SUPERFRAMES[0], *_SPREAD, "-n", "2", _LONG),
                *(*_pairs(_BATCHES + _ENGINE_PAIRS), *_results("long-frames")),
            ),
            lane="netns",
            quick=None,
            nightly=True,
            least=100,
        ),
        Gate(
            name="engine netns tests",
            command=("pytest", _SCENARIOS, *_SPREAD, *_SHUFFLED, *_pairs(_ENGINE_PAIRS), *_results("engine-netns")),
            lane="netns",
            quick=None,
            nightly=True,
            least=900,
        ),
        Gate(
            name="engine conformance tests",
            command=(*_conformance(_ENGINES), *_results("engine-conformance")),
            lane="netns",
            quick=None,
            nightly=True,
            least=1200,
        ),
        Gate(
            name="other conformance tests",
            command=(*_conformance(_CONFORMING_BY_NIGHT), _LONG, *_results("other-conformance")),
            lane="netns",
            quick=None,
            peers=RUST,
            nightly=True,
            least=900,
        ),
        Gate(
            name="long conformance tests",
            command=(*_conformance(_CONFORMING), _LONG, *_results("long-conformance")),
            lane="netns",
            quick=None,
            nightly=True,
            least=700,
        ),
        Gate(
            name="long netns tests",
            command=(
                *("pytest", _SCENARIOS, *_SPREAD, "-n", "3", *_BY_DAY_HERE),
                *("-m", "nightly", _LONG, *_results("long-netns")),
            ),
            lane="netns",
            quick=None,
            nightly=True,
            least=20,
        ),
        Gate(
            name="other netns tests",
            command=("pytest", _SCENARIOS, *_SPREAD, *_SHUFFLED, *_BY_NIGHT_HERE, *_results("other-netns")),
            lane="netns",
            quick=None,
            nightly=True,
            least=300,
        ),
        Gate(
            name="rust netns tests",
            command=("pytest", _SCENARIOS, *_SPREAD, *_SHUFFLED, *_RUST, *_results("rust")),
            lane="netns",
            quick=None,
            peers=RUST,
            nightly=True,
            least=450,
        ),
        Gate(
            name="fault tests", command=("pytest", *_FAULTS, *_results("faults")), lane="netns", quick=None, least=112
        ),
        # Not gates of pytest: the command starts one for each mutant.
        # refwg chooses the simple engine in most tests, so the other one gets a run of its own.
        Gate(name="all mutants", command=_MUTANTS, lane="netns", quick=None, nightly=True),
        Gate(name="batch mutants", command=(*_MUTANTS, "--engine=batch"), lane="netns", quick=None, nightly=True),
        Gate(name="kernel defects", command=("wg-interop", "kernel-defects"), lane="vm", quick=None, nightly=True),
        Gate(
            name="vm tests",
            command=("pytest", *_vm(VM_PAIRS_BY_DAY, *_BY_DAY), *_results("vm")),
            lane="vm",
            quick=None,
            least=380,
        ),
        Gate(
            name="other vm tests",
            command=("pytest", *_vm(VM_PAIRS), *_results("other-vm")),
            lane="vm",
            quick=None,
            nightly=True,
            least=600,
        ),
        Gate(
            name="vm conformance tests",
            command=(*_conformance_of_kernel(*_BY_DAY), *_results("vm-conformance")),
            lane="vm",
            quick=None,
            least=150,
        ),
        Gate(
            name="long vm conformance tests",
            command=(*_conformance_of_kernel(_LONG), *_results("long-vm-conformance")),
            lane="vm",
            quick=None,
            nightly=True,
            least=150,
        ),
        Gate(
            name="vm refwg tests",
            command=("pytest", *_vm(SLOW_PAIRS, "-m", "core"), *_results("vm-refwg")),
            lane="vm",
            quick=None,
            least=36,
        ),
        Gate(
            name="warp tests",
            command=("pytest", *_WARP, *_pairs(WARP_PAIRS), *_results("warp")),
            lane="warp",
            quick=None,
            least=30,
        ),
        Gate(
            name="slow warp tests",
            command=("pytest", *_WARP, *_pairs(SLOW_WARP_PAIRS), *_results("slow-warp")),
            lane="warp",
            quick=None,
            peers=("boringtun",),
            nightly=True,
            least=50,
        ),
        Gate(
            name="warp conformance tests",
            command=(*_conformance_over_time(_WARP_CONFORMING), *_results("warp-conformance")),
            lane="warp",
            quick=None,
            least=_TIMER_TESTS * len(_WARP_CONFORMING),
        ),
        Gate(
            name="other warp conformance tests",
            command=(*_conformance_over_time(_WARP_CONFORMING_BY_NIGHT), *_results("other-warp-conformance")),
            lane="warp",
            quick=None,
            peers=RUST,
            nightly=True,
            # Known failures do not count; the Rust programs have twenty-two of them.
            least=60,
        ),
        Gate(name="vm fault tests", command=("pytest", _VM_FAULTS), lane="vm", quick=None, least=10),
        *(_on_other_kernel(*gate) for gate in _BY_NIGHT),
        Gate(name="vagrant box", command=("python", "-m", "ci.vagrant_box"), lane="netns", quick=None, nightly=True),
    )


_BY_NIGHT: Final = (
    ("vm tests", ("pytest", *_vm(VM_PAIRS + SLOW_PAIRS)), 600),
    ("vm conformance tests", _conformance_of_kernel(*_BY_DAY), 150),
    ("warp tests", ("pytest", *_WARP, *_pairs(WARP_PAIRS + SLOW_WARP_PAIRS)), 80),
)


def _on_other_kernel(name: str, command: Sequence[str], least: int) -> Gate:
    """Return the gate `name` with the other kernel; the first word of the name is the lane."""
    name = f"{name} {OTHER_KERNEL}"
    command = (*command, "--kernel", OTHER_KERNEL, *_results(name.replace(" ", "-")))
    return Gate(name=name, command=command, lane=name.split()[0], quick=None, nightly=True, least=least)


def _unit_gates(covered: Sequence[str]) -> tuple[Gate, ...]:
    command = ("pytest", *_UNIT, "-n", "3")
    if not covered:
        return (Gate(name="unit tests", command=command, lane="core", least=_UNIT_TESTS, least_quick=_UNIT_TESTS),)
    report = ("coverage", "report", f"--include={','.join(covered)}", "--fail-under=100")
    return (
        Gate(
            name="unit tests",
            command=("python", "-m", "ci.measured", *command),
            lane="core",
            least=_UNIT_TESTS,
            least_quick=_UNIT_TESTS,
        ),
        Gate(name="coverage", command=report, lane="core"),
    )


def _fully_covered() -> list[str]:
    """Return the files that unit tests must cover completely: [tool.wg-interop] fully-covered in pyproject.toml."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files: list[str] = tables["tool"].get("wg-interop", {}).get("fully-covered", [])
    return files


HELP: Final = """\
Run every check (gate) that must pass before a change is merged: set-up (ci/setup), lint, types, tests.

A gate that fails does not stop the others. The table at the end names what failed, and the last line counts the tests.
JUnit files with the results are in report/junit/, results and evidence in report/.
"""
EXAMPLES: Final = """\
examples:
  ci/test                 all gates
  ci/test --quick         lint, types, unit tests, and the netns tests of one pair: before a commit
  ci/test --lane core     lint, types, and the tests of one lane
  ci/test --gate mypy --gate "fault tests"
                          only these gates, by the names that the table has, such as those that failed
  ci/test --nightly       all gates, and also: the implementations in Rust, which are built once; protocol time (lane
                          warp) with refwg and boringtun; the tests marked `nightly`, and as much volume as the
                          requirements ask; all mutants of refwg, and defects of the kernel; a second kernel; the
                          Vagrantfile in a fresh Debian root

exit status: 0 all passed, 1 a gate failed, 2 wrong usage, 125 something could not be tested and nothing failed,
130 interrupted
"""


def main() -> int:
    """Set up, run the gates, print the table; return the exit status."""
    options = _parse_arguments()
    exit_on_sigterm()
    results: list[StepResult] = []
    status = EXIT_INTERRUPTED
    try:
        _run_all(options, results)
        status = exit_status(results)
    except (HarnessError, OSError) as error:
        print(f"ci/test: {error}", file=sys.stderr)
        status = EXIT_COULD_NOT
    except KeyboardInterrupt:
        print("ci/test: interrupted", file=sys.stderr)
    _print_summary(results, status)
    return status


def _parse_arguments() -> argparse.Namespace:
    lanes = sorted({gate.lane for gate in all_gates() if gate.lane})
    parser = argparse.ArgumentParser(
        prog="ci/test", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="run only lint, types, unit tests, and one pair")
    extent.add_argument("--nightly", action="store_true", help="also run the gates that take too long for every change")
    parser.add_argument(
        "--lane",
        action="append",
        choices=lanes,
        metavar="LANE",
        help=f"run only the tests of this lane, besides lint and types ({', '.join(lanes)}); may be repeated",
    )
    parser.add_argument(
        "--gate",
        action="append",
        choices=[gate.name for gate in all_gates()],
        metavar="GATE",
        help="run only this gate, by day or night; may be repeated; a wrong name prints all",
    )
    options = parser.parse_args()
    if options.gate and (options.quick or options.nightly or options.lane):
        parser.error("argument --gate: not allowed with --quick, --nightly or --lane")
    return options


def _run_all(options: argparse.Namespace, results: list[StepResult]) -> None:
    """Run set-up and gates; each result is appended at once, so that an interrupted run has a table too."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    for old in REPORTS.glob("*.xml"):
        old.unlink()
    gates = chosen(quick=options.quick, nightly=options.nightly, lanes=options.lane or [], names=options.gate or [])
    for result in prepare([name for gate in gates for name in gate.peers]):
        results.append(result)  # noqa: PERF402
    for gate in gates:
        results.append(run_gate(gate, quick=options.quick))  # noqa: PERF401


def chosen(*, quick: bool, lanes: Sequence[str], nightly: bool = False, names: Sequence[str] = ()) -> list[Gate]:
    """Return the gates that the options select; no lanes: the gates of all lanes. names: of gates, by day or night."""
    if names:
        return [gate for gate in all_gates() if gate.name in names]
    gates = [gate for gate in all_gates() if (gate.quick is not None or not quick) and (nightly or not gate.nightly)]
    return [gate for gate in gates if not (gate.lane and lanes) or gate.lane in lanes]


def run_gate(gate: Gate, *, quick: bool) -> StepResult:
    """Run one gate, with its output on ours, and return and print its result."""
    command = [*gate.command, *((gate.quick or ()) if quick else gate.full)]
    print(f"\n== {gate.name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    try:
        status = run_program([*command, f"--junit-xml={gate.junit}"] if gate.junit else command, gate.deadline)
    except KeyboardInterrupt:
        # pytest writes its JUnit file even so, and the interrupted test looks there as if it had passed.
        if gate.junit:
            gate.junit.unlink(missing_ok=True)
        raise
    seconds = time.monotonic() - started
    least = gate.least_quick if quick else gate.least
    state, note = state_of(status, read_counts(gate.junit), least) if gate.junit else state_of_program(status)
    result = StepResult(name=gate.name, state=state, seconds=seconds, note=note)
    print(result.line(), flush=True)
    return result


def state_of(status: int | None, counts: Counts, least: int = 0) -> tuple[State, str]:
    """Return state and note of a gate with tests.

    OK needs exit status 0, at least one passed test, and at least `least` tests that ran. status: None for no end in
    time.
    """
    if status == 0 and counts.passed == 0:
        return State.COULD_NOT, f"no test could run: {counts}"
    if status == 0 and counts.ran < least:
        return State.FAILED, f"{counts}: expected at least {least} tests; if you removed some, change ci/gates.py"
    if status in {0, EXIT_COULD_NOT}:
        return state_of_program(status)[0], str(counts)
    if counts.failed == 0:
        return State.FAILED, f"{state_of_program(status)[1]}: {counts}"
    more = f" and {len(counts.names) - NAMED} more" if len(counts.names) > NAMED else ""
    return State.FAILED, f"{counts}: {', '.join(counts.names[:NAMED])}{more}"


def state_of_program(status: int | None) -> tuple[State, str]:
    """Return state and note of a gate by its exit status alone; status: None for no end in time."""
    if status is None:
        return State.FAILED, "did not end in time"
    states = {0: State.OK, EXIT_COULD_NOT: State.COULD_NOT}
    return states.get(status, State.FAILED), "" if status == 0 else f"exit status {status}"


def exit_status(results: Sequence[StepResult]) -> int:
    """Return the exit status of the run: 1 if a gate failed, else 125 if one could not be tested, else 0."""
    states = {result.state for result in results}
    if State.FAILED in states:
        return 1
    return EXIT_COULD_NOT if State.COULD_NOT in states else 0


def _print_summary(results: Sequence[StepResult], status: int) -> None:
    print("\n== summary")
    for result in results:
        print(result.line())
    bad = [result.name for result in results if result.state is not State.OK]
    problem = f"not passed: {', '.join(bad)}" if bad else "not all gates were run"
    print("all passed" if status == 0 else problem)
    # CI reads from this line how many tests ran; it must be the last.
    print(sum((read_counts(junit) for junit in sorted(REPORTS.glob("*.xml"))), Counts()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
