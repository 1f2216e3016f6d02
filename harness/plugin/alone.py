"""Keep tests marked `alone` from running beside others, by a lock all workers share.

The lock is in the run directory. Every test of such a run holds it shared, one marked `alone` holds it exclusively
(flock(2)). Guests have a run directory, and so a lock, of their own.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

from harness.plugin.selection import is_alone
from harness.plugin.session import state_of_run

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

_LOCK: Final = "alone.lock"
# Each test takes this lock first, for a moment. A test that waits for the exclusive lock keeps it, so that later tests
# wait behind it.
_QUEUE: Final = "alone.queue"
_DIRECTORY: Final = pytest.StashKey["Path"]()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Use the locks in this run only if a test is marked `alone` (hook)."""
    if any(is_alone(item) for item in session.items) and not session.config.option.collectonly:
        session.config.stash[_DIRECTORY] = state_of_run(session.config).scratch()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold the lock during each test (hook); outermost, so that pytest-timeout does not count the wait."""
    directory = item.config.stash.get(_DIRECTORY, None)
    if directory is None:
        return (yield)
    with held(directory, exclusive=is_alone(item)):
        return (yield)


@contextmanager
def held(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock of this run directory; the kernel releases it if the process dies."""
    lock, queue = (_open(directory / name) for name in (_LOCK, _QUEUE))
    try:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        os.close(queue)
        queue = -1
        yield
    finally:
        os.close(lock)
        if queue >= 0:
            os.close(queue)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
