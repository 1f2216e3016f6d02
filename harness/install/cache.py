"""Keep the cache directory: what is costly to fetch or build, and may be deleted any time.

A directory appears in it whole or not at all, and two runs never build the same one at once.
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
    """The parts of the cache, by what lies in them."""

    PEERS = "peers"  # programs under test: peers/NAME/VERSION/
    TOOLCHAINS = "toolchains"  # compilers and what they keep: toolchains/go-VERSION/
    KERNELS = "kernels"  # kernels and guest images, by hash
    ROOTS = "roots"  # bare Debian roots as archives: roots/RELEASE-WEEK-PACKAGES/
    RUNS = "runs"  # scratch of running tests; a killed run's is removed by the next


def cache_root() -> Path:
    """Where the cache lies; it need not exist yet."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path would mean another cache in every directory; the standard says to ignore it.
    if Path(chosen).is_absolute():
        return Path(chosen, "wg-interop")
    try:
        return Path.home() / ".cache" / "wg-interop"
    except RuntimeError as error:
        raise Unavailable(f"there is no home directory to keep a cache in; {REMEDY}") from error


def directory(area: Area) -> Path:
    """The directory of one area, made if it is not there."""
    path = cache_root() / area
    _make(path)
    return path


@contextmanager
def locked(target: Path, on_line: OnLine = lambda _: None) -> Iterator[None]:
    """Hold the lock that belongs to `target`; it falls with the process, however that ends."""
    _make(target.parent)
    with _opened(target.with_name(f".{target.name}.lock")) as lock:
        wait_for_lock(lock, target, on_line)
        yield


def wait_for_lock(descriptor: int, target: Path, on_line: OnLine) -> None:
    """Lock an open file or directory, and say so if someone else has to finish with `target` first."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_line(f"waiting for another run that works on {target}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` when the block ends without an exception.

    To be used with `target` locked: what a killed build left behind is removed first.
    """
    _make(target.parent)
    for leftover in target.parent.glob(f".{target.name}.*.part"):
        remove(leftover)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        # mkdtemp keeps others out; a cache shared between users is to be readable.
        part.chmod(0o755)
        yield part
        _replace(part, target)
    finally:
        remove(part)


def remove(tree: Path) -> None:
    """Delete a directory and all below it, read-only directories too; one that is not there is fine."""
    for path, _, _ in os.walk(tree):
        with suppress(OSError):
            Path(path).chmod(0o700)
    shutil.rmtree(tree, ignore_errors=True)


def _replace(part: Path, target: Path) -> None:
    # A directory with something in it cannot be renamed over: the old one steps aside, where `building` removes it.
    if target.exists():
        target.rename(Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")))
    part.rename(target)
    for old in target.parent.glob(f".{target.name}.*.part"):
        remove(old)


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot make {path}: {error.strerror}; {REMEDY}") from error


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
