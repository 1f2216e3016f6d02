"""Make a run's scratch directory in the cache; the run's end or the next run removes it.

A run holds a lock on its directory; the kernel drops the lock with the process, so that a dead run is known by it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from harness.install.cache import Area, directory, locked

_LOCK = "owner"


class RunDirectory:
    """One run's scratch directory; `owner` in it names the process and the start."""

    def __init__(self) -> None:
        """Make the directory, and remove those of runs that are dead."""
        runs = directory(Area.RUNS)
        # The lock on all of them closes the gap in which a new directory has no lock of its own yet.
        with locked(runs):
            remove_abandoned(runs)
            self.path = Path(tempfile.mkdtemp(dir=runs, prefix=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-"))
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, f"uid {os.getuid()}, started {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned(runs: Path) -> list[Path]:
    """Remove the directories of runs that are dead; returns them. To be called with `runs` locked."""
    removed = []
    for path in runs.iterdir():
        if path.is_dir() and not path.is_symlink() and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
