"""Run calls in threads that live in other network and mount namespaces.

Network and mount namespaces belong to a thread, not to a process (setns(2), unshare(2)): sockets made, files opened and
programs started by a thread belong where that thread is, and may be used from anywhere afterwards.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from harness.errors import DeadlineExceeded
from harness.sandbox.launcher import CLONE_NEWNET, CLONE_NEWNS, mount, unshare
from harness.wait import scaled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_CALL_DEADLINE = 20.0


def setns(descriptor: int, kind: int) -> None:
    """Move the calling thread into the namespace behind a descriptor; os.setns exists from Python 3.12 only."""
    if _libc.setns(descriptor, kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def unmount(path: Path) -> None:
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"umount: {os.strerror(number)}", str(path))


class NamespaceThread:
    """One thread in namespaces of its own; `call` runs a function there and returns what it returns."""

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        self.name = name
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.call(enter)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the function in the thread; it should be short, because calls of one thread wait for each other."""
        future = self._pool.submit(function, *args, **kwargs)
        try:
            return future.result(scaled(_CALL_DEADLINE))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self.name}: {function.__qualname__} still runs after {scaled(_CALL_DEADLINE):g} s"
            ) from error

    def close(self) -> None:
        """End the thread; namespaces that nothing else holds go with it."""
        self._pool.shutdown(wait=True)


def enter_new_network(handle: Path) -> None:
    """Make a network namespace for the calling thread and bind it to a path, as `ip netns add` does."""
    unshare(CLONE_NEWNET)
    handle.touch(0o444, exist_ok=False)
    mount("/proc/thread-self/ns/net", str(handle), None, 0x1000)


def enter_network(handle: Path) -> None:
    """Move the calling thread into a network namespace that has a path."""
    descriptor = os.open(handle, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)


def enter_new_mounts(private: Path) -> None:
    """Give the calling thread a mount namespace of its own with an empty `private` directory in it."""
    unshare(CLONE_NEWNS)
    mount("none", "/", None, 0x4000 | 0x40000)
    mount("tmpfs", str(private), "tmpfs", 0x2 | 0x4, "mode=0755")
