"""Run the steps of action.yml on another project, without network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

import pytest

from harness.install.cache import cache_root
from selftests.support.github_action import Action

ROOT: Final = Path(__file__).parents[2]
# The implementation that is always there, under another name: its source is in the checkout.
PROGRAM: Final = f"""\
#!/bin/sh
exec {ROOT}/.venv/bin/python -m refwg "$@"
"""
TEST: Final = "test_both_sides_ping_over_ipv4_and_ipv6"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The checkout of a project whose build has made a program, and that has a `selftests` of its own."""
    place = tmp_path / "project"
    (place / "selftests").mkdir(parents=True)
    (place / "selftests" / "test_theirs.py").write_text("def test_theirs(): assert 0\n")
    (place / "wireguard").write_text(PROGRAM)
    (place / "wireguard").chmod(0o755)
    return place


def test_action_tests_program_of_other_project(workspace: Path) -> None:
    if os.geteuid() != 0 and shutil.which("sudo"):
        pytest.skip("the action would call sudo; run as root")
    action = Action(ROOT)
    summary = workspace.parent / "summary.md"
    environ = {"GITHUB_STEP_SUMMARY": str(summary), "XDG_CACHE_HOME": str(cache_root().parent)}
    inputs = {
        "impl": "mine=./wireguard\n",
        "pair": "mine~mine",
        "must-include": "mine",
        "args": "-k 'ping and counters'",
    }
    installed, ran = (action.run(step, workspace, inputs, environ) for step in action.scripts)
    assert installed.returncode == 0, installed.stderr
    assert "the lab is installed: " in installed.stdout
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads((workspace / "wg-interop-report" / "results.json").read_text())["results"]
    assert {result["a"]["impl"] for result in results} == {"mine"}
    assert "passed" in {result["state"] for result in results}
    assert summary.read_text().startswith("## ✅ wg-interop: ")
    assert "| **mine** | ✅ " in summary.read_text()
    assert "::group::wg-interop run\n" in ran.stdout


def test_action_fails_and_annotates_program_that_fails(workspace: Path) -> None:
    (workspace / "wireguard").write_text("#!/bin/sh\necho 'cannot start' >&2\nexit 3\n")
    action = Action(ROOT)
    summary = workspace.parent / "summary.md"
    environ = {"GITHUB_STEP_SUMMARY": str(summary), "XDG_CACHE_HOME": str(cache_root().parent)}
    inputs = {"impl": "mine=./wireguard", "pair": "mine~mine", "args": "-k ping_and_counters", "report": "out"}
    ran = action.run(action.scripts[-1], workspace, inputs, environ)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "\n::error title=mine%3A " in ran.stdout
    assert "cannot start" in (workspace / "out" / "results.json").read_text()
    assert summary.read_text().startswith("## ❌ wg-interop: ")
