"""Read how much memory a process uses, and decide whether it grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

# Bytes by which a program may grow while it is fuzzed.
MAY_GROW: Final = 96 << 20


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes (proc(5), /proc/PID/statm)."""
    pages = Path("/proc", str(pid), "statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


class Growth:
    """Compares each measurement with the greatest of the first seconds."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self.greatest = 0

    def grown(self, size: int, *, is_warm: bool) -> bool:
        """Add a measurement in bytes; returns True if it is too great. is_warm: the first seconds are over."""
        self.greatest = max(self.greatest, size)
        if not is_warm or not self._first:
            self._first.append(size)
        return size > max(self._first) + MAY_GROW

    def __str__(self) -> str:
        return f"from {max(self._first, default=0) >> 20} to {self.greatest >> 20} MB"
