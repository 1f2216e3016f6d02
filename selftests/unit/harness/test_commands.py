"""Check the command wg-interop: output, exit status, and that no run leaves anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import suite
from harness.cli import commands, run
from harness.install.cache import Area, locked
from harness.lanes import EVENTS
from harness.plugin.rundir import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = """
import os, signal, pytest
def test_good(): pass
def test_bad(): assert "moon" == "cheese"
@pytest.mark.skip(reason="no x; install x")
def test_skipped(): pass
def test_hang():
    with open("alive", "w"):  # a FIFO: its reader sees that the test runs, and when it ends
        signal.pause()
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with tests of its own."""
    (tmp_path / "selftests").mkdir()
    (tmp_path / "selftests" / "test_few.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(EVENTS, raising=False)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wg-interop"


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of wg-interop in its own process."""
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def status(*arguments: str) -> int:
    """The exit status of the command in this process."""
    with pytest.raises(SystemExit) as left:
        commands.main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def hanging(checkout: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run whose test hangs, and a descriptor that reads end of file once the test is gone."""
    os.mkfifo(checkout / "alive")
    process = start("run", "-k", "good or hang")
    with (checkout / "alive").open("rb", buffering=0) as alive:  # waits for the test
        yield process, alive.fileno()
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("checkout")
def test_passing_run_exits_with_0_and_writes_results() -> None:
    code, stdout, stderr = call("run", "-k", "good or skipped")
    assert (code, stderr) == (0, "")
    assert "1 skipped: no x; install x" in stdout
    assert "2 of 2 tests, 1 passed, 1 skipped in" in stdout
    assert json.loads(Path("report/results.json").read_text())["results"][0]["state"] == "passed"
    assert "2 deselected" in Path("report/pytest.log").read_text()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("checkout")
def test_run_without_selected_test_leaves_last_report() -> None:
    call("run", "-k", "good")
    before = contents(Path("report"))
    assert {path.name for path in before} == {"results.json", "index.html", "pytest.log", "runs.jsonl"}
    code, stdout, _ = call("run", "-k", "moon")
    assert code == 125
    assert contents(Path("report")) == before
    log = Path(stdout.rpartition("pytest's output: ")[2].strip())
    assert "4 deselected" in log.read_text()
    assert log.absolute().parent == Path("wg-interop").absolute()


@pytest.mark.usefixtures("checkout")
def test_second_run_keeps_report_of_first_as_previous() -> None:
    call("run", "-k", "good")
    _, stdout, _ = call("run", "-k", "bad")
    assert "results: report/results.json\npytest's output: report/pytest.log\n" in stdout
    for place, word in (("report", "FAILED"), ("report/previous", "1 passed")):
        assert word in Path(place, "pytest.log").read_text()
        assert Path(place, "index.html").exists()


@pytest.mark.usefixtures("checkout")
def test_failing_run_exits_with_1_and_prints_reason() -> None:
    code, stdout, _ = call("run", "selftests/test_few.py::test_bad", "selftests/test_few.py::test_good")
    assert code == 1
    assert "    assert 'moon' == 'cheese'" in stdout


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("arguments", "expected", "reason"),
    [
        (["-k", "skipped"], 125, "could not test: no test passed"),
        (["-k", "moon"], 125, "could not test: no test was selected"),
        (["--impl", "moon"], 2, "unknown implementation 'moon'"),
        (["--pair", "kernel"], 2, "--pair kernel: want A~B"),
        (["--impl", "moon=/moon"], 2, "--impl moon=/moon: no program /moon"),
        (["--results", "."], 2, "Invalid value for '--results': File '.' is a directory"),
        (["--impl-manifest", "moon.toml"], 2, "manifest moon.toml: No such file or directory"),
        (["--lane", "moon"], 2, "invalid choice: 'moon'"),
        (["--", "--moon"], 2, "unrecognized arguments: --moon"),
    ],
)
def test_invalid_or_empty_run_prints_one_line_on_stderr(arguments: list[str], expected: int, reason: str) -> None:
    code, _, stderr = call("run", *arguments)
    assert (code, stderr.count("\n")) == (expected, 1)
    assert stderr.startswith("wg-interop: ")
    assert reason in stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["moon"], "wg-interop: No such command 'moon'; see wg-interop --help\n"),
        (["run", "--zebra"], "wg-interop: No such option '--zebra'; see wg-interop run --help\n"),
        (["run", "moon.py"], "wg-interop: no test file or directory moon.py\n"),
    ],
)
def test_wrong_argument_is_named_in_error(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/")
    assert status(*arguments) == 2
    assert capsys.readouterr().err == reason


@pytest.mark.parametrize("command", ["run", "coverage", "mutants"])
def test_suite_variable_without_suite_is_named_in_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    assert status(command) == 2
    reason = f"WG_INTEROP_SUITE: {tmp_path} has no directory selftests; correct the variable, or unset it"
    assert capsys.readouterr().err == f"wg-interop: {reason}\n"


def test_unwritable_report_error_names_results_option(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "report").touch()
    assert status("run") == 125
    assert capsys.readouterr().err.endswith("choose a place: --results FILE\n")


def test_root_is_found_from_subdirectory(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = checkout / "docs" / "deep"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert suite.workplace() == checkout
    assert suite.locate("selftests/test_few.py::test_good") == f"{checkout}/selftests/test_few.py::test_good"


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_interrupted_run_prints_results_and_stops_its_tests(
    hanging: tuple[subprocess.Popen[str], int], number: signal.Signals, expected: int
) -> None:
    process, alive = hanging
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (expected, "wg-interop: interrupted\n")
    assert "1 passed" in stdout
    assert os.read(alive, 1) == b""


def test_killed_run_leaves_nothing_running(hanging: tuple[subprocess.Popen[str], int]) -> None:
    process, alive = hanging
    process.kill()
    assert os.read(alive, 1) == b""  # waits until the test, the last to hold the other end, is gone


def test_run_ends_when_reader_of_stdout_is_closed(hanging: tuple[subprocess.Popen[str], int]) -> None:
    process, alive = hanging
    assert process.stdout is not None
    process.stdout.close()
    assert os.read(alive, 1) == b""  # it notices with its next line
    assert process.wait(10) == 1


def test_clean_removes_dead_runs_and_lists_running_ones(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory() as living:
        dead = Path(tempfile.mkdtemp(dir=cache / "runs"))
        (dead / "owner").touch()
        assert status("clean") == 0
        output = capsys.readouterr().out
        assert f"removed {dead}" in output
        assert f"not removed, still running: {living.path} (uid " in output
        assert (dead.exists(), living.path.exists()) == (False, True)


def test_clean_all_removes_rest_of_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for area in (Area.PEERS, Area.TOOLCHAINS):
        (cache / area / "thing").mkdir(parents=True)
    assert status("clean", "--all") == 0
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert f"removed {cache / 'peers'} (" in capsys.readouterr().out


def test_clean_all_keeps_cache_while_run_uses_it(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "peers").mkdir(parents=True)
    with RunDirectory() as living:
        assert status("clean", "--all") == 1
    assert f"was not removed: run {living.path.name} uses it" in capsys.readouterr().err
    assert (cache / "peers").exists()


def test_clean_all_keeps_peer_that_is_being_installed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(cache / "peers" / "thing" / "v1"):
        assert status("clean", "--all") == 1
    assert "thing is running; wait until it ends" in capsys.readouterr().err
    assert (cache / "peers" / "thing").exists()


def test_install_of_unknown_name_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert status("install", "moon") == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "moon: no implementation of this name" in capsys.readouterr().err


def test_command_without_arguments_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert status() == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("run", "doctor", "clean", "install", "Exit status", "First time"))


def test_version_option_prints_program_name_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    assert capsys.readouterr().out.startswith("wg-interop 0.")


@pytest.mark.parametrize(
    ("like", "remark"),
    [
        ((), "mine has no manifest, so all capabilities are assumed; to find out: wg-interop probe --impl mine={}"),
        (("--like", "refwg"), "mine has the capabilities and known failures of refwg (--like), of any version"),
    ],
)
def test_run_says_what_it_assumes_of_program_without_manifest(
    checkout: Path, like: tuple[str, ...], remark: str
) -> None:
    program = checkout / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    _, stdout, _ = call("run", "--impl", f"mine={program}", *like, "-k", "good")
    assert stdout.splitlines()[0] == remark.format(program)
    assert f"wg-interop: {remark.format(program)}" in (checkout / "report" / "pytest.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("suites", "words"),
    [
        ([], ["netns"]),
        (["conformance"], ["conformance", "--suite=conformance"]),
        (["pairs", "conformance"], ["conformance", "netns", "--suite=conformance", "--suite=pairs"]),
        (["all"], ["."]),
    ],
)
def test_suites_choose_folders_of_this_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suites: list[str], words: list[str]
) -> None:
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    home = tmp_path / "selftests"
    for folder in ("netns", "lab", "conformance"):
        (home / folder).mkdir(parents=True)
    chosen = run._tests([], suites)  # noqa: SLF001
    assert chosen == [word if word.startswith("-") else str(home / word) for word in words]
