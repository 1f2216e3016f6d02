"""Read what the kernel logs while a test runs, and note in its log which test runs.

In a guest the WireGuard driver logs what it does, so the evidence of a failed test has the driver's words. Source:
Documentation/ABI/testing/dev-kmsg of the Linux source.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from harness.vm.kernel_log import TEST

_KMSG: Final = Path("/dev/kmsg")
_RECORD: Final = 8192  # bytes; the kernel refuses a shorter buffer than a record needs
_MOST: Final = 1 << 20  # bytes of a text
_MICROSECONDS: Final = 1_000_000


class KernelLog:
    """The kernel's log from now on; empty where the kernel or its settings do not let us read it."""

    def __init__(self, path: Path = _KMSG) -> None:
        self.lines: list[tuple[int, str]] = []
        """What `text` has returned so far: each line with its time, ns of wall time."""
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def text(self) -> str:
        """Return the new lines since the last call, each with the seconds since boot, as dmesg(1) shows them."""
        lines: list[str] = []
        size = 0
        while self._descriptor >= 0 and size < _MOST:
            try:
                record = os.read(self._descriptor, _RECORD)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:
                    break
                # The ring has no room for them any more; the next read returns the oldest record that is left.
                lines.append("[older lines are lost]")
                continue
            if not record:
                break
            size += len(record)
            lines.append(line_of(text := record.decode(errors="replace")))
            self.lines.append((time_of(text), lines[-1]))
        return "".join(f"{line}\n" for line in lines)

    def close(self) -> None:
        """Stop reading."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def line_of(record: str) -> str:
    """Return a record, `LEVEL,NUMBER,MICROSECONDS,FLAGS;TEXT` and lines with details, as dmesg(1) shows it."""
    head, _, text = record.partition(";")
    fields = head.split(",")
    seconds, rest = divmod(int(fields[2]), _MICROSECONDS)
    return f"[{seconds:5d}.{rest:06d}] {text.partition(chr(10))[0]}"


def time_of(record: str) -> int:
    """Return the wall time of a record in ns, as near as the kernel's clock for its log follows CLOCK_MONOTONIC."""
    since_boot = int(record.split(",", 3)[2]) * 1000
    return time.time_ns() - time.monotonic_ns() + since_boot


def note_test(test: str, *, level: int) -> None:
    """Write to the kernel's log that a test begins; level: of syslog(2), 4 for a warning."""
    with suppress(OSError):
        descriptor = os.open(_KMSG, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"<{level}>{TEST}{test}\n".encode())
        finally:
            os.close(descriptor)
