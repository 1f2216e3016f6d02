"""Check the cache directory: its place, and that only complete directories appear in it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness.errors import Unavailable
from harness.install.cache import Area, building, cache_root, directory, locked, remove

if TYPE_CHECKING:
    from pathlib import Path

WAIT_FOR_LOCK = """
import pathlib, sys
from harness.install.cache import locked
with locked(pathlib.Path(sys.argv[1]), lambda line: print(line, flush=True)):
    print("locked", flush=True)
"""


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize(("chosen", "expected"), [("/x", "/x/wg-interop"), ("x", "~/.cache/wg-interop"), ("", None)])
def test_cache_root_follows_xdg_cache_home_only_when_absolute(
    chosen: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    assert str(cache_root()) == (expected or "~/.cache/wg-interop").replace("~", str(tmp_path))


def test_unusable_cache_error_names_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # not even root can make a directory there
    with pytest.raises(Unavailable, match=r"cannot create /proc/wg-interop/peers: .*; set XDG_CACHE_HOME"):
        directory(Area.PEERS)


def test_built_directory_replaces_old_one_completely(tmp_path: Path) -> None:
    target = tmp_path / "peer"
    for name in ("old", "new"):
        with building(target) as part:
            (part / name).touch()
    assert names(tmp_path) == ["peer"]
    assert names(target) == ["new"]


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), building(tmp_path / "peer") as part:
        (part / "half").touch()
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_directory_appears_only_when_its_build_is_complete(tmp_path: Path) -> None:
    with building(tmp_path / "peer"):
        assert not (tmp_path / "peer").exists()
    assert (tmp_path / "peer").exists()


def test_next_build_removes_leftovers_of_killed_build(tmp_path: Path) -> None:
    (tmp_path / ".peer.killed.part" / "half").mkdir(parents=True)
    (tmp_path / ".other.killed.part").mkdir()
    with building(tmp_path / "peer"):
        pass
    assert names(tmp_path) == [".other.killed.part", "peer"]


def test_removal_deletes_read_only_directories(tmp_path: Path) -> None:
    deep = tmp_path / "tree" / "deep"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    deep.chmod(0o500)
    remove(tmp_path / "tree")
    assert names(tmp_path) == []


def test_second_process_waits_for_lock_and_reports_it(tmp_path: Path) -> None:
    target = tmp_path / "peer"
    command = [sys.executable, "-c", WAIT_FOR_LOCK, str(target)]
    with locked(target):
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == f"waiting for another run that uses {target}\n"
        assert other.poll() is None
    assert other.communicate(timeout=20)[0] == "locked\n"


def test_lock_is_released_after_block(tmp_path: Path) -> None:
    with locked(tmp_path / "peer"):
        pass
    with (tmp_path / ".peer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
