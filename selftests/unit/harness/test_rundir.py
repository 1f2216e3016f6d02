"""Check the run directory: a later run removes that of a dead run, not of a living one."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness.plugin.rundir import RunDirectory, remove_abandoned

if TYPE_CHECKING:
    from pathlib import Path

HOLD = """
from harness.plugin.rundir import RunDirectory
print(RunDirectory().path, flush=True)
input()
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parent of all run directories."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wg-interop" / "runs"


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_directory_of_killed_run_is_removed_by_next_run(runs: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with run, RunDirectory() as first:
        assert run.stdout is not None
        killed = run.stdout.readline().strip().rpartition("/")[2]
        assert names(runs) == sorted([first.path.name, killed])
        run.kill()
        run.wait()
        with RunDirectory() as second:
            assert names(runs) == sorted([first.path.name, second.path.name])


def test_closed_run_leaves_nothing(runs: Path) -> None:
    with RunDirectory() as run:
        (run.path / "deep").mkdir()
    assert names(runs) == []


def test_owner_file_begins_with_user_id(runs: Path) -> None:
    with RunDirectory() as run:
        assert run.path.parent == runs
        assert (run.path / "owner").read_text().startswith("uid ")


def test_directory_without_owner_is_removed_but_not_file_or_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    runs = tmp_path / "runs"
    for directory in (elsewhere, runs, runs / "dead"):
        directory.mkdir()
    (runs / "file").touch()
    (runs / "link").symlink_to(elsewhere)
    assert remove_abandoned(runs) == [runs / "dead"]
    assert names(runs) == ["file", "link"]
    assert elsewhere.exists()
