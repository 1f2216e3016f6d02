"""Run calls in threads that are in other network and mount namespaces.

A thread, not a process, is in a network and a mount namespace (setns(2), unshare(2)). A socket, file or program that a
thread opens or starts belongs to that thread's namespaces; any other thread may use it afterwards.
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
_CALL_DEADLINE = 20.0  # seconds


def setns(descriptor: int, kind: int) -> None:
    """Move the calling thread into another namespace (setns(2)); Python has os.setns only since 3.12.

    descriptor: of a file of that namespace. kind: CLONE_NEW*. Raises OSError.
    """
    if _libc.setns(descriptor, kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def unmount(path: Path) -> None:
    """Detach a mount at once, even if it is in use (MNT_DETACH of umount2(2)). Raises OSError."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"umount: {os.strerror(number)}", str(path))


class NamespaceThread:
    """One thread that runs functions in namespaces of its own."""

    def __init__(self, name: str, enter: Callable[[], None]) -> None:
        """Start the thread. name: begins error messages. enter: called in the thread, to enter its namespaces."""
        self.name = name
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.call(enter)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in the thread and return its result, or raise its error.

        Keep it short: calls of one thread wait for each other. Raises DeadlineExceeded after 20 seconds, scaled.
        """
        future = self._pool.submit(function, *args, **kwargs)
        try:
            return future.result(scaled(_CALL_DEADLINE))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self.name}: {function.__qualname__} still runs after {scaled(_CALL_DEADLINE):g} s"
            ) from error

    def close(self) -> None:
        """End the thread; the kernel destroys its namespaces if nothing else uses them."""
        self._pool.shutdown(wait=True)


def enter_new_network(handle: Path) -> None:
    """Create a network namespace, move the calling thread into it and bind it to a path, as `ip netns add` does.

    Raises OSError.
    """
    unshare(CLONE_NEWNET)
    handle.touch(0o444, exist_ok=False)
    mount("/proc/thread-self/ns/net", str(handle), None, 0x1000)


def enter_network(handle: Path) -> None:
    """Move the calling thread into the network namespace that is bound to a path. Raises OSError."""
    descriptor = os.open(handle, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)


def enter_new_mounts(private: Path) -> None:
    """Move the calling thread into a new mount namespace in which the directory `private` is empty. Raises OSError."""
    unshare(CLONE_NEWNS)
    mount("none", "/", None, 0x4000 | 0x40000)
    cover(private)


def cover(directory: Path) -> None:
    """Put an empty file system over a directory, in the calling thread's mount namespace."""
    mount("tmpfs", str(directory), "tmpfs", 0x2 | 0x4, "mode=0755")
