"""Read the CPU time and the memory of programs, and choose their CPUs."""

from __future__ import annotations

import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Interface

MEBIBYTE: Final = 1 << 20
# clock_getcpuclockid(3): the CPU clock of a process has the complement of its pid above three bits; 2: nanoseconds
# from the scheduler, of all threads, also of those that have ended. /proc/PID/stat counts in steps of 10 ms.
_CPUCLOCK_SCHED: Final = 2


def cpu_seconds(side: Interface) -> float | None:
    """Return the CPU seconds of an interface's program, user and system; None for the driver, which has no process."""
    return None if side.pid is None else time.clock_gettime(~side.pid << 3 | _CPUCLOCK_SCHED)


def peak_memory(side: Interface) -> float | None:
    """Return the greatest resident memory of the program so far, in MiB (proc(5), VmHWM); None for the driver."""
    if side.pid is None:
        return None
    status = Path("/proc", str(side.pid), "status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 / MEBIBYTE if found else None


def cores() -> list[int]:
    """Return the numbers of the CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread on one CPU during the block, with the threads and processes that it starts there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
