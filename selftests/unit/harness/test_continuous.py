"""Check `wg-interop run` in CI: KTAP on stdout, GitHub's commands and summary, baseline."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness import suite
from harness.lanes import EVENTS
from selftests.support.ktap import parse_ktap

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """
def test_good(): pass
def test_bad():
    print("::error::from the test")
    assert "moon" == "::set-env name=PATH::evil"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with tests of its own, as a step on GitHub sees it."""
    (tmp_path / "selftests").mkdir()
    (tmp_path / "selftests" / "test_few.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(suite.SUITE, str(tmp_path))
    monkeypatch.delenv(EVENTS, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", "run", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def commands_of(output: str) -> list[str]:
    """Return the commands that GitHub's runner would obey, by the rules of its ActionCommandManager."""
    token, obeyed = "", []
    for line in output.splitlines():
        found = re.match(r"\s*::([\w-]+)(?: .*?)?::(.*)", line) or re.search(r"##\[(\w+)[^]]*\](.*)", line)
        if found is None:
            continue
        if token:
            token = "" if found[1] == token else token
        elif found[1] == "stop-commands":
            token = found[2]
        else:
            obeyed.append(found[1])
    assert not token, "commands stay switched off"
    return obeyed


def test_step_on_github_has_annotation_group_and_summary(project: Path) -> None:
    done = run()
    assert done.returncode == 1
    assert commands_of(done.stdout) == ["group", "endgroup", "error"]
    assert "::error file=selftests/test_few.py,title=wg-interop%3A failed::assert 'moon' == '::set-env " in done.stdout
    # The summary of this step may hold something already.
    first = (project / "summary.md").read_text()
    assert first.startswith("## ❌ wg-interop: 1 passed, 1 failed\n")
    run("-k", "moon")
    assert (project / "summary.md").read_text() == (
        f"{first}## ❌ wg-interop: no test ran\n\n**could not test: no test was selected**\n\n"
    )


def test_summary_counts_what_step_has_written(project: Path) -> None:
    path = project / "summary.md"
    path.write_text("x" * (1024 * 1024 - 100))
    run()
    assert 1024 * 1024 - 100 < path.stat().st_size <= 1024 * 1024
    assert path.read_text().endswith("more parts do not fit here; the report has them\n")


@pytest.mark.usefixtures("project")
def test_option_switches_github_off() -> None:
    done = run("--no-github", "-k", "good")
    assert (done.returncode, commands_of(done.stdout)) == (0, [])
    assert "::group::" not in done.stdout


def test_ktap_on_stdout_leaves_rest_to_stderr(project: Path) -> None:
    done = run("--ktap", "-", "--no-github")
    assert done.returncode == 1
    (file,) = parse_ktap(done.stdout)
    assert [(leaf.name, leaf.ok) for leaf in file.subtests[0].subtests] == [("test_good", True), ("test_bad", False)]
    assert "results: report/results.json" in done.stderr
    done = run("--ktap", "-", "-k", "moon")
    assert (done.returncode, parse_ktap(done.stdout)[0].directive) == (125, "ERROR")
    assert commands_of(done.stderr) == ["group", "endgroup", "error"]
    run("--ktap", "out/few.ktap", "-k", "good")
    assert parse_ktap((project / "out" / "few.ktap").read_text())[0].ok


def test_unwritable_ktap_file_is_named(project: Path) -> None:
    (project / "full").write_text("")
    done = run("--ktap", "full/few.ktap", "-k", "good", "--no-github")
    assert done.returncode == 125
    assert "wg-interop: --ktap full/few.ktap: " in done.stderr


def test_baseline_decides_status_of_run(project: Path) -> None:
    assert run("--baseline", "known.toml").returncode == 2
    done = run("--baseline", "known.toml", "--update-baseline")
    assert done.returncode == 0
    assert "baseline known.toml is written: 1 added, 0 removed, 0 kept\n" in done.stdout
    done = run("--baseline", "known.toml")
    assert done.returncode == 0
    assert "baseline known.toml: 1 known failure, 0 new\n" in done.stdout
    assert "baseline known.toml: 1 known failure, 0 new" in (project / "summary.md").read_text()
    (project / "selftests" / "test_few.py").write_text(TESTS.replace("moon", "soup"))
    assert run("--baseline", "known.toml").returncode == 1


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("selected", ["good", "bad", "moon"])
def test_missing_implementation_exits_with_1_and_reason(selected: str) -> None:
    done = run("--must-include", "refwg", "-k", selected)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "wg-interop: --must-include refwg: no test of refwg ran"
    assert "::error title=wg-interop::--must-include refwg: no test of refwg ran\n" in done.stdout
