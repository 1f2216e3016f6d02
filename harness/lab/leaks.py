"""Find what a test's lab has left behind in this process and its sandbox.

An inventory is taken before the lab is made, and another after it was undone and after the fixtures that use it have
ended. What only the second one has is a leak, unless its owner has registered it (harness/sandbox/kept.py).

An inventory has the network namespaces, mounts, network interfaces and control sockets of the sandbox, its processes,
and the threads and descriptors of this process. It takes a fifth of a millisecond.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from harness.errors import HarnessError
from harness.implementations.interface import CONTROL_SOCKETS
from harness.net.netns import HANDLES
from harness.sandbox.kept import is_kept
from harness.wait import poll_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from harness.steps import Recorder

Inventory: TypeAlias = "Mapping[str, frozenset[Any]]"

# Seconds: threads that close inotify watches need 25 ms, and the kernel removes a namespace in a thread of its own.
_SETTLES: Final = 1.0
_PF_KTHREAD: Final = 0x00200000
# Objects that have a descriptor of this number; more than these are not looked at.
_SHOWN: Final = 200
_FRAMES: Final = 8


class LeakError(HarnessError):
    """A lab was undone, and something of its test is left in this process or in the sandbox."""


def take_inventory() -> Inventory:
    """Return what exists now, by kind."""
    return {kind: frozenset(look()) for kind, look in _LOOKS.items()}


def check_leaks(before: Inventory, steps: Recorder) -> None:
    """Raise LeakError if something exists that did not exist before.

    What is about to end gets a second. steps: those of the test; they show where a thing was made.
    """
    if not _left(before):
        return
    # An object without a reference, in a cycle, is not a leak of the lab.
    gc.collect()
    left = poll_until(lambda: _left(before), lambda found: not found, _SETTLES, what="nothing of the test is left")
    if left:
        found = "".join(f"\n  {_describe(kind, thing)}{_made_by(kind, thing, steps)}" for kind, thing in left)
        raise LeakError(f"left behind by this test:{found}{_hint(left)}")


def _left(before: Inventory) -> list[tuple[str, Any]]:
    """Return what exists now and did not exist before, with its kind."""
    now = take_inventory()
    new = [(kind, thing) for kind in now for thing in sorted(now[kind] - before[kind]) if not is_kept(kind, thing)]
    return [(kind, thing) for kind, thing in new if kind != "process" or _is_program(thing)]


# Looking


def _names_in(directory: Path) -> Callable[[], list[str]]:
    def look() -> list[str]:
        with suppress(FileNotFoundError):
            return [path.name for path in directory.iterdir()]
        return []

    return look


def _mounts() -> Iterator[tuple[str, str]]:
    """Yield id and path of each mount of this process (proc(5), /proc/PID/mountinfo)."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        words = line.split(b" ", 5)
        yield words[0].decode(), os.fsdecode(words[4])


def _devices() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _threads() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/task").iterdir()]


def _descriptors() -> Iterator[tuple[int, str]]:
    # Not one by one: the descriptor of the directory itself must be closed by then.
    for path in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):
            yield int(path.name), str(path.readlink())


_LOOKS: Final[Mapping[str, Callable[[], Any]]] = {
    "network namespace": _names_in(HANDLES),
    "mount": _mounts,
    "network interface": _devices,
    "control socket": _names_in(CONTROL_SOCKETS),
    "process": _processes,
    "thread": _threads,
    "descriptor": _descriptors,
}


def _is_program(pid: int) -> bool:
    """Return whether this is a process that still exists, and not a thread of the kernel, as guests have them."""
    with suppress(OSError):
        return not int(_stat(pid)[6]) & _PF_KTHREAD
    return False


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (proc(5)). Raises OSError."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()


# Describing


def _describe(kind: str, thing: Any) -> str:
    match kind:
        case "mount":
            return f"mount at {thing[1]}"
        case "process":
            return f"process {thing}: {_command(thing)}"
        case "thread":
            return f"thread {_thread_name(thing)}"
        case "descriptor":
            return f"descriptor {thing[0]}, {thing[1]}{_owner(thing[0])}"
    return f"{kind} {thing}"


def _command(pid: int) -> str:
    with suppress(OSError):
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        if text := os.fsdecode(b" ".join(words)).strip():
            return text
        name = Path("/proc", str(pid), "comm").read_text().strip()
        return f"{name}, which has ended, but nobody has waited for it"
    return "ended by now"


def _thread_name(native_id: int) -> str:
    """Return the name of a thread; the threads of nodes and programs are called after these."""
    for thread in threading.enumerate():
        if thread.native_id == native_id:
            return repr(thread.name)
    with suppress(OSError):
        name = Path("/proc/self/task", str(native_id), "comm").read_text().strip()
        return f"{native_id}, not one of Python's: {name}"
    return f"{native_id}, ended by now"


def _owner(descriptor: int) -> str:
    """Describe the Python object that has a descriptor, and where it was made if tracemalloc knows."""
    for each in gc.get_objects():
        # Ask nothing of other objects: proxies and mocks answer to everything.
        if not isinstance(each, socket.socket) and type(each).__module__ != "_io":
            continue
        with suppress(Exception):
            if each.fileno() == descriptor and type(each).__name__ in {"socket", "FileIO"}:
                frames = tracemalloc.get_object_traceback(each)
                made = "".join(f"\n    {line}" for line in frames.format(_FRAMES)) if frames else ""
                return f": {repr(each)[:_SHOWN]}{made}"
    return ""


def _made_by(kind: str, thing: Any, steps: Recorder) -> str:
    """Return the step of the test that made a namespace or started a process; empty if none is known."""
    text = {"network namespace": f"ip netns add {thing}"}.get(kind, _command(thing) if kind == "process" else "")
    for step in steps.steps if text else ():
        if text in str(step.text if isinstance(step.text, str) else step.text()):
            return f"; made in {step.node or 'this process'}, {step.section}: {step}"
    return ""


def _hint(left: list[tuple[str, Any]]) -> str:
    if all(kind != "descriptor" for kind, _ in left) or tracemalloc.is_tracing():
        return ""
    return "\nPYTHONTRACEMALLOC=20 in the environment of the run shows where a descriptor was opened"
