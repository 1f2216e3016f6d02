"""Make directories that belong to a living process, and find those of dead processes.

The process locks the file `owner` in its directory. The kernel releases the lock when the process ends or is killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from harness.sandbox.kept import keep_descriptor

_LOCK: Final = "owner"


class OwnedDirectory:
    """A new directory of this process; `owner` in it names the user and the start."""

    def __init__(self, parent: Path, prefix: str = "") -> None:
        """Make it below `parent`. The caller holds the lock of `parent`: at first the new directory has none."""
        self.path = Path(tempfile.mkdtemp(dir=parent, prefix=f"{prefix}{datetime.now(UTC):%Y%m%dT%H%M%S}-"))
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        keep_descriptor(self._lock, f"lock of {self.path}")
        os.write(self._lock, f"uid {os.getuid()}, started {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def abandoned(parent: Path, prefix: str = "") -> list[Path]:
    """Return the directories below `parent` whose processes are dead. The caller holds the lock of `parent`."""
    return [
        path
        for path in parent.iterdir()
        if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink() and _is_abandoned(path)
    ]


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
