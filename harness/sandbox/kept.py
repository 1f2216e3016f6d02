"""Register what this process keeps open between tests, so that it is not reported.

harness/lab/leaks.py asks here. The owners register: the fork servers, the thread that stamps the lines of logs, the
socket that keeps the kernel's time stamps on, and the directories of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_descriptors: dict[tuple[int, str], str] = {}
_processes: dict[int, str] = {}
_threads: dict[int, str] = {}
_KEPT: Final[Mapping[str, Mapping[Any, str]]] = {
    "descriptor": _descriptors,
    "process": _processes,
    "thread": _threads,
}


def keep_descriptor(descriptor: int, name: str) -> None:
    """Keep a descriptor open; name: what it is. A later file of the same number is another one."""
    _descriptors[descriptor, target_of(descriptor)] = name


def keep_process(pid: int, name: str) -> None:
    """Keep a process; name: what it is."""
    _processes[pid] = name


def keep_thread(native_id: int, name: str) -> None:
    """Keep a thread of this process; name: what it is."""
    _threads[native_id] = name


def is_kept(kind: str, thing: Any) -> bool:
    """Return whether a thing is registered. kind: `descriptor` (number and target), `process`, `thread`."""
    return thing in _KEPT.get(kind, {})


def target_of(descriptor: int) -> str:
    """Return what a descriptor of this process refers to, as /proc/self/fd shows it (proc(5)). Raises OSError."""
    return str(Path("/proc/self/fd", str(descriptor)).readlink())
