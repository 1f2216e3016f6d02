"""Check the options of the plugin: what they do, and one line and status 4 for wrong usage."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from harness.install.packages import install_command
from harness.wait import scaled
from selftests.support.inner_pytest import (
    DEBIAN,
    FAILED,
    GO,
    IMPLEMENTATION,
    LAB,
    OK,
    USAGE,
    leave_outer_run,
    refuse_sandbox,
)

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

outside = pytest.fixture(leave_outer_run, autouse=True)
refused = pytest.fixture(refuse_sandbox)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--impl", "nope"], "unknown implementation 'nope'; there are: boringtun, *; yours: --impl nope=/path"),
        (["--impl", "mine=/nowhere"], "--impl mine=/nowhere: no program /nowhere"),
        (["--impl-manifest", "/nowhere"], "manifest /nowhere: No such file or directory"),
        (["--pair", "nope~kernel"], "unknown implementation 'nope'; there are: boringtun, *"),
        (["--pair", GO], f"--pair {GO}: want A~B, two implementations with a tilde between"),
        (["--pair", f"{GO}~{DEBIAN}~kernel"], "--pair *: want A~B, two implementations with a tilde between"),
        (["--lane", "fast"], "argument --lane: invalid choice: 'fast' (choose from *"),
        (["--results", "."], "--results /*: is a directory; name a file: --results /*/results.json"),
        (["--results", "/proc/stat/x/y"], "results /proc/stat/x/y: cannot write to /proc/stat; choose a place: *"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--timeout-scale", "slow"], "argument --timeout-scale: invalid float value: 'slow'"),
    ],
)
def test_wrong_usage_exits_with_status_4_and_complaint(
    pytester: pytest.Pytester, options: list[str], complaint: str
) -> None:
    pytester.makepyfile(LAB)
    run = pytester.runpytest_inprocess(*options)
    assert run.ret == USAGE
    run.stderr.fnmatch_lines(f"*{'' if complaint.startswith('argument') else 'ERROR'}: {complaint}")
    assert "Traceback" not in run.stderr.str()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--pause-on-error -n 2", "--pause-on-error stops one test at a time, not several: leave out -n 2"),
        ("--shell ns1 -n auto", "--shell stops one test at a time, not several: leave out -n *"),
        ("--gdb ns1 -n 0", "--gdb needs a terminal, and standard input is not one: run it in one"),
        ("--pause-on-error", "--pause-on-error needs a terminal, and standard input is not one: run it in one"),
        ("--strace ns1 --lane vm", "--strace is for tests on this kernel, not in a guest: leave out --lane vm"),
        ("--shell /run/netns/ns1", "--shell /run/netns/ns1: want the name of a node, such as ns1, or A or B"),
        ("--gdb A --strace ns1", "--gdb A --strace ns1: a program has one tracer; leave one out"),
        ("--strace B", "--strace: strace is not installed; to install it: {}"),
        ("--gdb B", "--gdb: gdb is not installed; to install it: {}"),
        ("--valgrind A --strace ns1", "--strace ns1 --valgrind A: a program has one tracer; leave one out"),
        ("--valgrind B", "--valgrind: valgrind is not installed; to install it: {}"),
        ("--valgrind A --lane vm", "--valgrind is for tests on this kernel, not in a guest: leave out --lane vm"),
    ],
)
def test_option_to_look_at_tests_is_refused_with_remedy(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, complaint: str
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    # A PATH with gdb, or with nothing where it must be missing.
    programs = tmp_path / "programs"
    programs.mkdir()
    if "gdb is not" not in complaint:
        programs.joinpath("gdb").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(programs))
    pytester.makepyfile(LAB)
    run = pytester.runpytest_subprocess(*options.split())
    assert run.ret == USAGE
    remedy = install_command([options.split(maxsplit=1)[0].removeprefix("--")])
    run.stderr.fnmatch_lines(f"ERROR: {complaint.format(remedy)}")


@pytest.mark.usefixtures("refused")
def test_lane_core_alone_passes_and_writes_results(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=LAB)
    run = pytester.runpytest_inprocess("--lane", "core", "--results", "here/mine.json", "--seed", "7")
    assert run.ret == OK
    document = json.loads((pytester.path / "here" / "mine.json").read_text())
    assert document["seed"] == 7
    assert [(entry["id"], entry["state"], entry["lane"]) for entry in document["results"]] == [
        ("test_it.py::test_core", "passed", "core")
    ]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("earlier", [True, False])
def test_evidence_is_cleared_only_when_earlier_results_exist(pytester: pytest.Pytester, *, earlier: bool) -> None:
    pytester.makepyfile("def test_core(): pass\ndef test_lab(lab): pass")
    note = pytester.mkdir("evidence") / "note"
    note.touch()
    if earlier:
        # The first versions wrote it without a list of files.
        (pytester.path / "results.json").write_text('{"schema": 1, "results": []}')
    run = pytester.runpytest_inprocess("--results", "results.json")
    assert (run.ret, note.exists()) == ((OK, False) if earlier else (USAGE, True))
    if earlier:
        assert (pytester.path / "previous" / "evidence" / "note").exists()
    else:
        run.stderr.fnmatch_lines("ERROR: /*/evidence is not part of the report of *; choose another directory: *")


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_seed_zero_is_used_as_given(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    pytester.makepyfile(
        "from harness.plugin.session import state_of_run\n"
        "def test_it(request): assert state_of_run(request.config).seed == 0"
    )
    assert pytester.runpytest_subprocess("--seed", "0", *workers).ret == OK


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("module", "options", "complaint"),
    [
        (LAB, ["--impl", GO, "-k", "pair"], "no test passed"),
        (LAB, ["--lane", "netns", "--impl", GO], "no test passed"),
        (LAB, ["--impl", GO], f"{GO} was asked for and all its tests were skipped"),
        (LAB, ["--lane", "netns", "--lane", "core", "--impl", GO], "lane netns was asked for and did not run"),
        (IMPLEMENTATION, ["--impl", GO], "no test passed"),
    ],
)
def test_run_fails_when_requested_tests_did_not_run(
    pytester: pytest.Pytester, module: str, options: list[str], complaint: str
) -> None:
    pytester.makepyfile(test_it=module)
    run = pytester.runpytest_inprocess(*options)
    assert run.ret == FAILED
    run.stdout.fnmatch_lines([f"wg-interop: {complaint}", "results: */report/results.json"])


def test_inner_run_leaves_timeout_scale_of_outer_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from harness.wait import scaled\ndef test_scale(): assert scaled(1.0) == 3.0")
    before = scaled(1.0)
    pytester.runpytest_inprocess("--timeout-scale", "3").assert_outcomes(passed=1)
    assert scaled(1.0) == before
