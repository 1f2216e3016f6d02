"""Compute how late a timer of the kernel may fire; it never fires early.

The delay grows with the duration: level n of the timer wheel has a granularity of 8^n jiffies and holds timers up to
63 * 8^n jiffies ahead (kernel/time/timer.c).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

# Seconds of CPU time that an implementation may need from a timer to its datagram on a slow machine.
WORK: Final = 0.25
_LEVELS: Final = 9
_SLOTS: Final = 63
_USUAL_HZ: Final = (100, 250, 300, 1000)


def granularity(seconds: float, hz: int) -> float:
    """Return the granularity in seconds of the wheel level for a timer of this duration; hz: ticks per second."""
    jiffies = seconds * hz
    level = next(n for n in range(_LEVELS) if jiffies <= _SLOTS * 8**n or n == _LEVELS - 1)
    return float(8**level) / hz


def slack(seconds: float, hz: int | None = None) -> float:
    """Return how many seconds late a timer of this duration may fire; hz: None for that of the running kernel."""
    choices = (hz,) if hz else configured_hz()
    return max(granularity(seconds, each) + 1 / each for each in choices) + WORK


def configured_hz() -> tuple[int, ...]:
    """Return HZ of the running kernel from /boot/config-*; all usual values if there is no such file."""
    path = Path("/boot") / f"config-{Path('/proc/sys/kernel/osrelease').read_text().strip()}"
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("CONFIG_HZ="):
                return (int(line.partition("=")[2]),)
    return _USUAL_HZ
