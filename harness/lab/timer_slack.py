"""Compute how late a timer may fire: Linux's timer wheel is late, never early.

The delay grows with the duration. Source: kernel/time/timer.c: level n of the wheel has a granularity of 8^n jiffies
and takes timers up to 63 * 8^n away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

# CPU time that an implementation may need between a timer and its datagram, on a slow machine, in seconds.
WORK: Final = 0.25
_LEVELS: Final = 9
_SLOTS: Final = 63
_USUAL_HZ: Final = (100, 250, 300, 1000)


def granularity(seconds: float, hz: int) -> float:
    """The granularity, in seconds, of the wheel's level that a timer of this duration is on, at HZ ticks a second."""
    jiffies = seconds * hz
    level = next(n for n in range(_LEVELS) if jiffies <= _SLOTS * 8**n or n == _LEVELS - 1)
    return float(8**level) / hz


def slack(seconds: float, hz: int | None = None) -> float:
    """By how many seconds a timer of this duration may be late; with HZ unknown, for the coarsest usual one."""
    choices = (hz,) if hz else configured_hz()
    return max(granularity(seconds, each) + 1 / each for each in choices) + WORK


def configured_hz() -> tuple[int, ...]:
    """HZ of the running kernel, if it tells; else all usual ones."""
    path = Path("/boot") / f"config-{Path('/proc/sys/kernel/osrelease').read_text().strip()}"
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("CONFIG_HZ="):
                return (int(line.partition("=")[2]),)
    return _USUAL_HZ
