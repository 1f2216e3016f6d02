"""For tests that run in a guest under warp: the clock must pass just as much as they waited.

There it jumps to the next timer whenever the guest idles, so a wait for the host (of which a test should have none)
shows as time that nobody asked for.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECOND: Final = 1_000_000_000


class ClockRanOff(HarnessError):
    """More or less time passed than was waited for; what was measured in it means nothing."""


def boottime() -> int:
    """Nanoseconds since the start of the kernel: the clock of WireGuard's timers."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@contextmanager
def passes(expected: int, tolerance: int = SECOND) -> Iterator[None]:
    """The block takes `expected` nanoseconds of CLOCK_BOOTTIME, give or take `tolerance`; else ClockRanOff."""
    started = boottime()
    yield
    passed = boottime() - started
    if abs(passed - expected) > tolerance:
        raise ClockRanOff(f"{passed / SECOND:.3f} s passed on the guest's clock, and not {expected / SECOND:.3f} s")
