"""Remove from the cache what killed runs left there: `wg-interop clean`."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from harness.cli import terminal
from harness.cli.terminal import OK
from harness.errors import HarnessError
from harness.install import cache
from harness.plugin import rundir

if TYPE_CHECKING:
    from pathlib import Path


def clean_cache(*, everything: bool) -> int:
    """Remove the directories of dead runs, and everything else too if no run is in progress."""
    root = cache.cache_root()
    running = _clean_runs(root / cache.Area.RUNS)
    if everything and running:
        raise HarnessError(f"the rest of {root} was not removed: run {running[0].name} uses it; end that run first")
    if everything and root.is_dir():
        for path in sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name != cache.Area.RUNS):
            _remove_area(path)
    return OK


def _clean_runs(runs: Path) -> list[Path]:
    """Remove the directories of dead runs and print them; return those of runs in progress."""
    if not runs.is_dir():
        click.echo(f"nothing to remove: {runs} does not exist")
        return []
    with cache.locked(runs):
        sizes = {path: _size(path) for path in runs.iterdir() if path.is_dir()}
        removed = rundir.remove_abandoned(runs)
    for path in removed:
        click.echo(f"removed {path} ({terminal.human(sizes.get(path, 0))})")
    running = [path for path in sizes if path.exists()]
    for path in running:
        click.echo(f"not removed, still running: {path} ({_owner(path)})")
    click.echo(f"{len(removed)} dead runs removed, {terminal.human(sum(sizes.get(path, 0) for path in removed))}")
    return running


def _owner(run: Path) -> str:
    with suppress(OSError):
        return (run / "owner").read_text().strip()
    return "of another user"


def _remove_area(path: Path) -> None:
    busy = next((lock for lock in path.rglob(".*.lock") if _is_locked(lock)), None)
    if busy is not None:
        raise HarnessError(f"{path} was not removed: an installation into {busy.parent} is running; wait until it ends")
    size = _size(path)
    cache.remove(path)
    click.echo(f"removed {path} ({terminal.human(size)})")


def _is_locked(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _size(tree: Path) -> int:
    total = 0
    for path in tree.rglob("*"):
        # A running test may have removed the file.
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total
