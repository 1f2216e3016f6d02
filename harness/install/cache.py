"""Keep the cache directory: files that are slow to fetch or build, and safe to delete.

A directory in it exists only once it is complete, and two runs never build the same one at the same time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.install.progress import OnLine

REMEDY = "set XDG_CACHE_HOME to a directory that you may write to"


class Area(StrEnum):
    """The folders of the cache."""

    PEERS = "peers"  # programs under test: peers/NAME/VERSION/
    TOOLCHAINS = "toolchains"  # compilers and their caches: toolchains/go-VERSION/
    KERNELS = "kernels"  # kernels and guest images, by hash
    ROOTS = "roots"  # bare Debian roots as archives: roots/RELEASE-WEEK-PACKAGES/
    RUNS = "runs"  # temporary files of running tests; the next run removes those of a killed run


def cache_root() -> Path:
    """Return the path of the cache, which need not exist yet; Unavailable for a user without a home directory."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory Specification says to ignore a relative path.
    if Path(configured).is_absolute():
        return Path(configured, "wg-interop")
    try:
        return Path.home() / ".cache" / "wg-interop"
    except RuntimeError as error:
        raise Unavailable(f"no home directory for the cache; {REMEDY}") from error


def directory(area: Area) -> Path:
    """Return the directory of one area, created if it does not exist; Unavailable if that fails."""
    path = cache_root() / area
    _make(path)
    return path


@contextmanager
def locked(target: Path, on_line: OnLine = lambda _: None) -> Iterator[None]:
    """Hold the lock of `target` for the length of the block; the kernel releases it if the process dies (flock(2)).

    Raises Unavailable if the lock file cannot be written.
    """
    _make(target.parent)
    with _opened(target.with_name(f".{target.name}.lock")) as lock:
        wait_for_lock(lock, target, on_line)
        yield


def wait_for_lock(descriptor: int, target: Path, on_line: OnLine) -> None:
    """Lock an open file or directory; report by `on_line` if another process holds the lock of `target`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_line(f"waiting for another run that uses {target}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield an empty directory, and rename it to `target` when the block ends without an exception.

    The caller holds the lock of `target`. Partial directories of killed builds are removed first.
    """
    _make(target.parent)
    for leftover in target.parent.glob(f".{target.name}.*.part"):
        remove(leftover)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        # mkdtemp creates it with mode 700; other users may read a shared cache.
        part.chmod(0o755)
        yield part
        _replace(part, target)
    finally:
        remove(part)


def remove(tree: Path) -> None:
    """Delete a directory tree, read-only directories too; do nothing if it does not exist."""
    for path, _, _ in os.walk(tree):
        with suppress(OSError):
            Path(path).chmod(0o700)
    shutil.rmtree(tree, ignore_errors=True)


def _replace(part: Path, target: Path) -> None:
    # rename(2) cannot replace a directory that is not empty, so the old one is renamed first. If this process is killed
    # then, the next `building` removes it by its name.
    if target.exists():
        target.rename(Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")))
    part.rename(target)
    for old in target.parent.glob(f".{target.name}.*.part"):
        remove(old)


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot create {path}: {error.strerror}; {REMEDY}") from error


@contextmanager
def _opened(lock: Path) -> Iterator[int]:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Unavailable(f"cannot write {lock}: {error.strerror}; {REMEDY}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
