"""Search for the highest rate that a tunnel carries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_LOSS: Final = 0.01  # share of the packets; more is too much
PRECISION: Final = 1.06  # the search ends when the lowest rate that fails is at most so many times the best that passes
_HEAVY_LOSS: Final = 0.2  # share; a loss as high is not an accident, so the rate is not tried again
_SATURATED: Final = 0.95  # a sender below this share of the wanted rate cannot send faster
_MOST_PROBES: Final = 24
_LOWEST: Final = 10.0  # packets per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A rate that was tried. offered: packets per second to send. sent, received: packets. seconds: of sending."""

    offered: float
    sent: int
    received: int
    seconds: float

    @property
    def loss(self) -> float:
        """The share of the packets that did not arrive."""
        return 1 - self.received / self.sent if self.sent else 1.0

    @property
    def rate(self) -> float:
        """Packets received per second."""
        return self.received / self.seconds

    @property
    def passes(self) -> bool:
        """Whether less than MOST_LOSS was lost."""
        return self.loss < MOST_LOSS

    @property
    def saturated(self) -> bool:
        """Whether the sender was too slow for the wanted rate."""
        return self.sent < _SATURATED * self.offered * self.seconds


class NothingPassedError(Exception):
    """No rate was found at which less than MOST_LOSS is lost."""


def highest_rate(probe: Callable[[float], Probe], first: float, growth: float = 2.0) -> Probe:
    """Return the passing probe with the highest rate, to within PRECISION; raises NothingPassedError.

    probe: sends at a rate, in packets per second. first: the rate to begin with. growth: the factor of the first step
    up or down; the factor is squared with each step, until the rate is between one that passes and one that fails.
    """
    best: Probe | None = None
    failing = math.inf
    rate = first
    for _ in range(_MOST_PROBES):
        tried = _tried(probe, rate)
        if tried.passes:
            best = tried
            if tried.saturated:
                break
        else:
            failing = rate
        if failing == math.inf:
            rate, growth = rate * growth, min(growth**2, 4.0)
        elif best is None:
            # Under overload the tunnel still carries about what it can.
            rate, growth = max(min(rate / growth, 0.95 * tried.rate), rate / 16), min(growth**2, 4.0)
        elif failing <= PRECISION * best.offered:
            break
        else:
            rate = math.sqrt(best.offered * failing)
        if rate < _LOWEST:
            break
    if best is None:
        raise NothingPassedError(f"{MOST_LOSS:.0%} or more was lost at {failing:.0f} packets per second, and above")
    return best


def _tried(probe: Callable[[float], Probe], rate: float) -> Probe:
    """Try a rate, and once more if it fails by little: one accident must not end the search below the limit."""
    tried = probe(rate)
    return probe(rate) if MOST_LOSS <= tried.loss < _HEAVY_LOSS else tried
