"""Check that a complete report replaces the last one, and that no other file is touched."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness.cli import commands
from harness.errors import UsageError
from harness.plugin.publish import NewReport, check_place, publish, recover
from harness.plugin.rundir import RunDirectory
from harness.sandbox.launcher import INSIDE, REFUSED

if TYPE_CHECKING:
    from collections.abc import Sequence

pytest_plugins = ["pytester"]

NAME: Final = "results.json"
ALL: Final = ("index.html", "evidence", "pytest.log")


def write(directory: Path, word: str, files: Sequence[str] = ALL) -> None:
    """Write a report in which every file contains `word`."""
    (directory / NAME).write_text(json.dumps({"schema": 1, "files": list(files), "results": [word]}))
    for name in set(files) - {"evidence"}:
        (directory / name).write_text(word)
    if "evidence" in files:
        (directory / "evidence" / word).mkdir(parents=True)


def words(directory: Path) -> dict[str, str]:
    """Return the content of each entry of a report; empty without a report."""
    entries = [directory / name for name in (*ALL, NAME) if (directory / name).exists()]
    return {
        path.name: next(path.iterdir()).name
        if path.is_dir()
        else path.read_text()
        if path.name != NAME
        else json.loads(path.read_text())["results"][0]
        for path in entries
    }


def whole(word: str, files: Sequence[str] = ALL) -> dict[str, str]:
    return dict.fromkeys([name for name in ALL if name in files] + [NAME], word)


def make(place: Path, word: str, files: Sequence[str] = ALL) -> None:
    """Make a report as a complete run does."""
    with closing(NewReport(place / NAME)) as report:
        write(report.directory, word, files)
        publish(report.directory, report.results)


def tree(place: Path) -> dict[str, tuple[int, bytes]]:
    """Return inode and content of every file below a directory."""
    paths = [path for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): (path.stat().st_ino, path.read_bytes()) for path in paths}


def test_report_takes_place_of_last_one_which_becomes_previous(tmp_path: Path) -> None:
    place = tmp_path / "report"
    for word in ("first", "second", "third"):
        make(place, word)
    assert (words(place), words(place / "previous")) == (whole("third"), whole("second"))
    assert sorted(path.name for path in place.iterdir()) == sorted([*ALL, NAME, "previous"])


@pytest.mark.parametrize("files", [ALL, ("index.html",)])
def test_report_without_evidence_leaves_none_of_older_reports(tmp_path: Path, files: Sequence[str]) -> None:
    make(tmp_path, "first")
    make(tmp_path, "second", files)
    make(tmp_path, "third", ("index.html",))
    assert words(tmp_path) == whole("third", ("index.html",))
    assert words(tmp_path / "previous") == whole("second", files)


def test_unpublished_report_leaves_place_as_it_was(tmp_path: Path) -> None:
    make(tmp_path, "first")
    before = tree(tmp_path)
    with closing(NewReport(tmp_path / NAME)) as report:
        write(report.directory, "second")
    assert tree(tmp_path) == before


def test_directories_made_for_unpublished_report_are_removed(tmp_path: Path) -> None:
    NewReport(tmp_path / "a" / "b" / NAME).close()
    assert list(tmp_path.iterdir()) == []


def test_reports_of_two_runs_side_by_side_both_stay(tmp_path: Path) -> None:
    with closing(NewReport(tmp_path / NAME)) as first, closing(NewReport(tmp_path / NAME)) as second:
        write(first.directory, "first")
        write(second.directory, "second")
        publish(second.directory, second.results)
        publish(first.directory, first.results)
    assert (words(tmp_path), words(tmp_path / "previous")) == (whole("first"), whole("second"))


CHANGES: Final = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"})


def kill_before(change: int, place: Path, files: Sequence[str]) -> int:
    """Make a report in a child that is killed before the n-th change of `publish`; return the wait status."""
    child = os.fork()
    if not child:
        left = change

        def count(event: str, _: object) -> None:
            nonlocal left
            left -= event in CHANGES
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        report = NewReport(place / NAME)
        write(report.directory, "new", files)
        sys.addaudithook(count)
        publish(report.directory, report.results)
        report.close()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_before_each(place: Path, files: Sequence[str]) -> None:
    """Print for each change, as JSON, the two reports after the next run's clean-up, and the other entries."""
    for change in itertools.count(1):
        here = place / str(change)
        make(here, "older")
        make(here, "old")
        status = kill_before(change, here, files)
        recover(here)
        others = sorted({path.name for path in here.iterdir()} - {*ALL, NAME})
        sys.stdout.write(json.dumps([words(here), words(here / "previous"), others]) + "\n")
        if not status:
            return


@pytest.mark.parametrize("files", [ALL, ("index.html",)], ids=["with evidence", "without"])
def test_run_killed_at_any_rename_leaves_whole_reports(tmp_path: Path, files: tuple[str, ...]) -> None:
    # A separate process has only one thread, so it may fork.
    code = f"from {__name__} import *; kill_before_each(Path({str(tmp_path)!r}), {files})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3], timeout=100)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    before, after = [whole("old"), whole("older"), ["previous"]], [whole("new", files), whole("old"), ["previous"]]
    # Once the plan is written, the next run carries out the rest.
    assert outcomes == [before] * outcomes.count(before) + [after] * outcomes.count(after)
    assert outcomes.count(before) >= 1
    assert outcomes.count(after) > 8


@pytest.mark.parametrize("by", ["clean", "run elsewhere", "run here"])
def test_unfinished_report_of_killed_run_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "report"
    make(place, "old")
    before = tree(place)
    code = (
        "import os, pathlib, signal\n"
        "from harness.plugin.publish import NewReport\n"
        "from harness.plugin.rundir import RunDirectory\n"
        f"place = pathlib.Path({str(place)!r})\n"
        "RunDirectory().note_report(place)\n"
        "report = NewReport(place / 'results.json')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert tree(place).keys() > before.keys()
    if by == "clean":
        with pytest.raises(SystemExit):
            commands.main(["clean"])
        assert "1 dead runs removed" in capsys.readouterr().out
    elif by == "run elsewhere":
        RunDirectory().close()
    else:
        NewReport(place / NAME).close()
    assert tree(place) == before


@pytest.mark.parametrize(
    ("there", "name", "complaint"),
    [
        ("index.html", NAME, "/index.html is not part of the report of /*; choose another directory: --results D*"),
        ("evidence/x", NAME, "/evidence is not part of the report of /*; choose another directory: --results D*"),
        ("previous/pytest.log", NAME, "/previous/pytest.log is not part of the report of /*"),
        ("pyproject.toml", "pyproject.toml", "--results /*/pyproject.toml: is not a file of results; choose another*"),
        ("x/y", "x", "--results /*/x: is a directory; name a file: --results /*/x/results.json"),
        ("z", "evidence", "--results /*/evidence: a report uses this name otherwise; name the file results.json"),
    ],
)
def test_place_with_foreign_file_is_refused(tmp_path: Path, there: str, name: str, complaint: str) -> None:
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("[tool.theirs]\n")
    before = tree(tmp_path)
    for check in (check_place, NewReport):
        with pytest.raises(UsageError) as refusal:
            check(tmp_path / name)
        pytest.LineMatcher([str(refusal.value).removeprefix(str(tmp_path))]).fnmatch_lines([f"{complaint}*"])
    assert tree(tmp_path) == before


def test_foreign_files_beside_reports_stay(tmp_path: Path) -> None:
    (tmp_path / "junit").mkdir()
    (tmp_path / "junit" / "tests.xml").write_text("theirs")
    make(tmp_path, "first")
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "notes.txt").write_text("theirs")
    for word in ("second", "third"):
        make(tmp_path, word)
    assert (tmp_path / "junit" / "tests.xml").read_text() == "theirs"
    assert (tmp_path / "previous" / "notes.txt").read_text() == "theirs"


def test_report_is_kept_when_foreign_page_appears_meanwhile(tmp_path: Path) -> None:
    with closing(NewReport(tmp_path / NAME)) as report:
        write(report.directory, "new")
        (tmp_path / "index.html").write_text("theirs")
        with pytest.raises(UsageError, match=r"index\.html is not part of the report") as refusal:
            publish(report.directory, report.results)
    assert (tmp_path / "index.html").read_text() == "theirs"
    kept = Path(str(refusal.value).rpartition("this run's report: ")[2])
    recover(tmp_path)
    assert words(kept) == whole("new")


def test_device_is_not_replaced_by_results() -> None:
    before = os.lstat(os.devnull)
    with pytest.raises(UsageError, match="is not a file of results"):
        NewReport(Path(os.devnull))
    assert os.lstat(os.devnull) == before


# Runs of pytest

RESULTS: Final = "--results=report/results.json"

TESTS: Final = """
import os, signal, subprocess, sys
import pytest

def test_good(): pass
def test_bad(): assert "moon" == "cheese"
def test_lab(lab): pass
@pytest.mark.skip(reason="decided at setup, which --setup-plan does")
def test_skipped(): pass
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_interrupted(): os.kill(os.getpid(), signal.SIGINT)
def test_other_run():
    words = ["-k", "bad", "--results=report/results.json", __file__]
    assert subprocess.run([sys.executable, "-m", "pytest", *words]).returncode == 1
"""


@pytest.fixture
def project(pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with the report of an earlier run."""
    monkeypatch.delenv(INSIDE, raising=False)
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pytester.makepyfile(test_it=TESTS)
    pytester.runpytest_subprocess(RESULTS, "-k", "good or bad")
    assert states(pytester.path / "report") == {"good": "passed", "bad": "failed"}
    return pytester


def states(place: Path) -> dict[str, str]:
    results = json.loads((place / NAME).read_text())["results"]
    return {each["id"].partition("::test_")[2]: each["state"] for each in results}


@pytest.mark.parametrize(
    "options",
    [
        "--fixtures", "--fixtures-per-test", "--setup-plan", f"--setup-only -k skipped {RESULTS}",
        "--lane=netns -k nothing", f"{RESULTS} -k nothing", f"{RESULTS} -k nothing -n 2",
        "--collect-only", f"{RESULTS} --collect-only", "--version", "--markers", "--help",
        f"--cache-show {RESULTS}", "--no-such-option", "--impl=nope", f"{RESULTS} no_such_file.py",
    ],
)  # fmt: skip
def test_run_that_executes_no_test_leaves_report_as_it_was(project: pytest.Pytester, options: str) -> None:
    before = tree(project.path / "report")
    project.runpytest_subprocess("-p", "cacheprovider", *options.split())
    assert tree(project.path / "report") == before
    assert sorted(path.name for path in (project.path / "report").iterdir()) == ["history", "index.html", NAME]


@pytest.mark.parametrize("option", ["--fixtures", "--setup-plan", "--collect-only"])
def test_run_that_only_lists_lane_exits_with_0(project: pytest.Pytester, option: str) -> None:
    assert project.runpytest_subprocess("--lane=netns", "-k", "lab", option).ret == pytest.ExitCode.OK


def test_run_killed_in_test_leaves_report_as_it_was(project: pytest.Pytester) -> None:
    report = project.path / "report"
    before = tree(report)
    project.runpytest_subprocess(RESULTS, "-k", "good or killed")
    assert {name: now for name, now in tree(report).items() if not name.startswith(".")} == before
    assert len(list(report.glob(".wg-interop-*"))) == 1
    project.runpytest_subprocess(RESULTS, "-k", "good")
    assert (states(report), states(report / "previous")) == ({"good": "passed"}, {"good": "passed", "bad": "failed"})
    assert list(report.glob(".wg-interop-*")) == []


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_interrupted_run_leaves_its_results_as_report(project: pytest.Pytester, workers: list[str]) -> None:
    report = project.path / "report"
    # Without it the tests run in the order of the file, under xdist, too.
    shutil.rmtree(report / "history")
    project.runpytest_subprocess(RESULTS, "-k", "good or interrupted", *workers)
    assert states(report / "previous") == {"good": "passed", "bad": "failed"}
    assert states(report)["good"] == "passed"
    if not workers:
        assert "interrupted" in (report / "index.html").read_text()


def test_results_are_kept_when_page_has_defect(project: pytest.Pytester) -> None:
    project.makeconftest("from harness.report import gather\ngather.gather = lambda *_, **__: 1 / 0\n")
    run = project.runpytest_subprocess(RESULTS, "-k", "good")
    run.stdout.fnmatch_lines(["report: none, because of a defect in wg-interop: ZeroDivisionError(*"])
    assert states(project.path / "report") == {"good": "passed"}


def test_run_beside_another_keeps_report_of_both(project: pytest.Pytester) -> None:
    project.runpytest_subprocess(RESULTS, "-k", "other_run")
    report = project.path / "report"
    assert (states(report), states(report / "previous")) == ({"other_run": "passed"}, {"bad": "failed"})


AGAIN: Final = """
def test_alone(implementation): assert implementation.program is None
def test_pair(pair): assert pair.b.program is None
def test_good(): pass
"""


@pytest.mark.parametrize(("name", "options"), [("test_alone", []), ("test_pair", ["--timeout-scale=2"])])
@pytest.mark.parametrize("given", ["program", "like", "manifest"])
def test_command_of_page_runs_its_one_test_again(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], given: str
) -> None:
    program = project.makefile("", program="#!/bin/sh\n")
    program.chmod(0o755)
    project.makefile(".toml", mine='name="mine"\nkind="uapi"\n[program]\npath="program"')
    project.mkdir("below").joinpath("test_again.py").write_text(AGAIN)
    named = ["--impl-manifest=../mine.toml"] if given == "manifest" else ["--impl=mine=../program"]
    named += ["--like=wireguard-go-debian"] if given == "like" else []
    # All paths are relative to this directory; test ids are relative to the root.
    project.makeini("[pytest]")
    monkeypatch.chdir(project.mkdir("elsewhere"))
    project.runpytest_subprocess("../below", *named, "--impl=wireguard-go-debian", "--seed=7", *options)
    before = tree(project.path / "report")
    page = (project.path / "report" / "index.html").read_text()
    commands = [html.unescape(text) for text in re.findall(r'<code class="command">(.*?)</code>', page)]
    (command,) = (text for text in commands if text.startswith("cd ") and f"{name}[" in text and "mine" in text
                  and "wireguard-go-debian~" not in text and "~wireguard-go-debian" not in text)  # fmt: skip
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(["sh", "-c", command], cwd="/", check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    after = tree(project.path / "report")
    assert {path: now for path, now in after.items() if not path.startswith("again/")} == before
    document = json.loads((project.path / "report" / "again" / NAME).read_text())
    (result,) = document["results"]
    assert f"{name}[mine" in result["id"]
    assert result["a"].get("like") == ("wireguard-go-debian" if given == "like" else None)
    assert (document["seed"], document["run"]["timeout_scale"]) == (7, 2.0 if options else 1.0)
