"""Check the gates of ci/test: which are run, and how their results are counted and judged."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from ci import gates
from ci.gates import (
    Gate,
    chosen,
    exit_status,
    run_gate,
    state_of,
    state_of_program,
)
from ci.junit import (
    Counts,
    read_counts,
)
from ci.setup_checkout import State, StepResult

SELFTESTS = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite>
<testcase classname="selftests.a" name="good"/>
<testcase classname="selftests.a" name="bad"><failure message="no"/></testcase>
<testcase classname="selftests.a" name="bad"><error message="nor its teardown"/></testcase>
<testcase classname="a" file="selftests/a.py" name="worse"><error message="no"/></testcase>
<testcase classname="selftests.a" name="late"/>
<testcase classname="selftests.a" name="late"><error message="teardown"/></testcase>
<testcase classname="selftests.a" name="later"><skipped message="why"/></testcase>
</testsuite></testsuites>"""


def names(*, quick: bool = False, nightly: bool = False) -> set[str]:
    return {gate.name for gate in chosen(quick=quick, nightly=nightly, lanes=[])}


def test_quick_run_omits_only_fault_guest_and_workflow_gates() -> None:
    assert names() - names(quick=True) == {
        "conformance tests", "superframe tests", "fault tests", "vm tests", "vm refwg tests", "warp tests",
        "warp conformance tests", "vm conformance tests", "vm fault tests", "workflows",
    }  # fmt: skip


def test_nightly_run_adds_rust_slow_second_kernel_and_box_gates() -> None:
    others = {
        "all mutants",
        "batch mutants",
        "kernel defects",
        "other conformance tests",
        "other netns tests",
        "engine conformance tests",
        "engine netns tests",
        "long conformance tests",
        "long superframe tests",
        "long netns tests",
        "long vm conformance tests",
        "other vm tests",
        "vm tests 6.12",
        "vm conformance tests 6.12",
        "warp tests 6.12",
        "other warp conformance tests",
        "vagrant box",
    }
    assert names(nightly=True) - names() == {"rust netns tests", "slow warp tests", *others}


@pytest.mark.parametrize(
    ("lanes", "tests"),
    [
        (["core"], {"unit tests"}),
        (["netns"], {"netns tests", "conformance tests", "superframe tests", "fault tests"}),
        (["core", "netns"], {"unit tests", "netns tests", "conformance tests", "superframe tests", "fault tests"}),
    ],
)
def test_lane_chooses_tests_and_keeps_lint_and_types(lanes: list[str], tests: set[str]) -> None:
    picked = {gate.name for gate in chosen(quick=False, lanes=lanes)}
    assert picked - {"coverage"} == {"ruff check", "ruff format", "mypy", "workflows"} | tests


def test_named_gates_are_run_alone_by_day_and_night() -> None:
    assert [gate.name for gate in chosen(quick=False, lanes=[], names=["vagrant box", "mypy"])] == [
        "mypy",
        "vagrant box",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "fault test"], "argument --gate: invalid choice: 'fault test' (choose from 'ruff check',"),
        (["--gate", "mypy", "--quick"], "argument --gate: not allowed with --quick, --nightly or --lane"),
    ],
)
def test_wrong_gate_is_refused_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ci/test", *arguments])
    monkeypatch.setattr(gates, "prepare", lambda _: pytest.fail("it began to set up the checkout"))
    with pytest.raises(SystemExit, match="2"):
        gates.main()
    assert message in capsys.readouterr().err


def test_rust_programs_are_built_only_for_rust_gate() -> None:
    building = [gate.name for gate in chosen(quick=False, nightly=True, lanes=[]) if "gotatun" in gate.peers]
    assert building == ["other conformance tests", "rust netns tests", "other warp conformance tests"]
    assert not any(gate.peers for gate in chosen(quick=False, lanes=[]))


def test_tests_marked_nightly_have_gates_in_each_lane() -> None:
    """Without pytest's own --nightly a gate leaves them out, also in a nightly run."""
    marked = {path for path in SELFTESTS.rglob("test_*.py") if "mark.nightly" in path.read_text()}
    long = [gate for gate in chosen(quick=False, nightly=True, lanes=[]) if "--nightly" in gate.command]
    for folder in {f"selftests/{path.relative_to(SELFTESTS).parts[0]}" for path in marked} - {"selftests/unit"}:
        assert any(folder in gate.command for gate in long), folder
    assert {gate.lane for gate in long} == {"netns", "vm"}
    assert all(gate.nightly for gate in long)


def test_files_that_need_full_coverage_get_coverage_gate() -> None:
    unit, coverage = gates._unit_gates(["refwg/messages.py", "refwg/noise.py"])  # noqa: SLF001
    assert unit.command[:4] == ("python", "-m", "ci.measured", "pytest")
    assert {"--include=refwg/messages.py,refwg/noise.py", "--fail-under=100"} <= set(coverage.command)


def test_files_that_need_full_coverage_exist_and_are_measured() -> None:
    """Coverage reports 0 % of a file that no test imports, but only inside its `source`."""
    root = SELFTESTS.parent
    sources = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["coverage"]["run"]["source"]
    for file in gates._fully_covered():  # noqa: SLF001
        assert (root / file).is_file()
        assert any(file.startswith(f"{source}/") for source in sources)


def test_results_are_counted_once_per_test(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(JUNIT)
    failed = ("selftests.a::bad", "selftests.a::late", "selftests/a.py::worse")
    assert read_counts(tmp_path / "x.xml") == Counts(passed=1, failed=3, skipped=1, names=failed)


@pytest.mark.parametrize("text", [None, "", "<testsuites><testsuite>"])
def test_absent_or_broken_results_are_counted_as_zero(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "x.xml").write_text(text)
    assert read_counts(tmp_path / "x.xml") == Counts()


@pytest.mark.parametrize(
    ("status", "counts", "state", "note"),
    [
        (0, Counts(passed=3), State.OK, "3 passed, 0 failed, 0 skipped"),
        (0, Counts(skipped=3), State.COULD_NOT, "no test could run: 0 passed, 0 failed, 3 skipped"),
        (0, Counts(), State.COULD_NOT, "no test could run: 0 passed, 0 failed, 0 skipped"),
        (1, Counts(passed=2, failed=1, names=("a::b",)), State.FAILED, "2 passed, 1 failed, 0 skipped: a::b"),
        (1, Counts(passed=2), State.FAILED, "exit status 1: 2 passed, 0 failed, 0 skipped"),
        (5, Counts(), State.FAILED, "exit status 5: 0 passed, 0 failed, 0 skipped"),
        (-9, Counts(passed=2), State.FAILED, "exit status -9: 2 passed, 0 failed, 0 skipped"),
        (125, Counts(skipped=1), State.COULD_NOT, "0 passed, 0 failed, 1 skipped"),
        (None, Counts(passed=1), State.FAILED, "did not end in time: 1 passed, 0 failed, 0 skipped"),
    ],
)
def test_gate_verdict_follows_exit_status_and_tally(
    status: int | None, counts: Counts, state: State, note: str
) -> None:
    assert state_of(status, counts) == (state, note)


def test_gate_fails_when_fewer_tests_ran_than_it_must_run() -> None:
    state, note = state_of(0, Counts(passed=9, skipped=5), 10)
    assert state is State.FAILED
    assert note.startswith("9 passed, 0 failed, 5 skipped: expected at least 10 tests")
    assert state_of(0, Counts(passed=10), 10)[0] is State.OK


def test_every_gate_of_tests_names_its_least_number() -> None:
    tests = [gate for gate in gates.all_gates() if gate.junit]
    assert [gate.name for gate in tests if not gate.least] == []
    assert [gate.name for gate in tests if gate.quick is not None and not gate.least_quick] == []


def test_every_test_folder_has_its_gate() -> None:
    words = {word for gate in gates.all_gates() for word in gate.command}
    folders = {f"selftests/{path.relative_to(SELFTESTS).parts[0]}" for path in SELFTESTS.rglob("test_*.py")}
    assert {folder for folder in folders if not any(word.startswith(folder) for word in words)} == set()


def test_gate_note_names_only_first_five_failed_tests() -> None:
    _, note = state_of(1, Counts(failed=7, names=tuple("abcdefg")))
    assert note.endswith(": a, b, c, d, e and 2 more")


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([State.OK, State.OK], 0),
        ([State.OK, State.COULD_NOT], 125),
        ([State.COULD_NOT, State.FAILED, State.OK], 1),
    ],
)
def test_failed_gate_outweighs_gate_that_could_not_run(states: list[State], status: int) -> None:
    assert exit_status([StepResult(name="x", state=state, seconds=0.0) for state in states]) == status


@pytest.mark.parametrize(("status", "state"), [(0, State.OK), (1, State.FAILED), (125, State.COULD_NOT)])
def test_program_is_judged_by_its_exit_status(status: int, state: State) -> None:
    gate = Gate(name="x", command=(sys.executable, "-c", f"raise SystemExit({status})"))
    assert run_gate(gate, quick=False).state is state_of_program(status)[0] is state


@pytest.mark.parametrize(("quick", "state"), [(True, State.OK), (False, State.FAILED)])
def test_gate_receives_arguments_of_quick_or_full_run(quick: bool, state: State) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit(sys.argv[1:] != ['short'])")
    assert run_gate(Gate(name="x", command=command, quick=("short",), full=("whole",)), quick=quick).state is state


@pytest.mark.parametrize(("limit", "nightly"), [("DEADLINE", False), ("LONG_DEADLINE", True)])
def test_gate_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch, limit: str, nightly: bool) -> None:
    monkeypatch.setattr(gates, limit, 0.2)
    gate = Gate(name="x", command=(sys.executable, "-c", "import signal; signal.pause()"), nightly=nightly)
    result = run_gate(gate, quick=False)
    assert result.state is State.FAILED
    assert result.seconds < 10
