"""Compare by how much the rx_bytes of a side grow with a fault and without it.

A program may count a message by another length than the driver does. The tests of IF-11 and IF-12 report that. Other
tests ask only whether a message was counted, so they compare a side's counter with itself.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness import poll_until, twin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import PeerState

# Seconds for which the counters must stand still: a program may count a message a moment after it has passed it on.
STILL: Final = 0.05
DEADLINE: Final = 1.0


@dataclass(slots=True)
class Received:
    """growth: the bytes by which rx_bytes has grown; 0 until the block of `received` ends."""

    growth: int = 0


@contextmanager
def received(look: Callable[[], PeerState]) -> Iterator[Received]:
    """Measure by how many bytes a side's rx_bytes grow in this block; look: `Tunnel.seen_by_a` or `seen_by_b`."""
    measured = Received()
    before = at_rest(look).rx_bytes
    yield measured
    measured.growth = at_rest(look).rx_bytes - before


def at_rest(look: Callable[[], PeerState]) -> PeerState:
    """Return the state of a peer once its counters have stood still for STILL seconds, or as it is after DEADLINE."""
    states: list[PeerState] = []

    def latest_two() -> list[PeerState]:
        states.append(look())
        return states[-2:]

    def stand_still(latest: list[PeerState]) -> bool:
        return len(latest) == 2 and _counters(latest[0]) == _counters(latest[1])

    return poll_until(latest_two, stand_still, DEADLINE, interval=STILL)[-1]


def _counters(peer: PeerState) -> tuple[int, int]:
    return peer.rx_bytes, peer.tx_bytes


def assert_equal_growth(with_fault: Received, without: Received, payload: int, fault: str) -> None:
    """Check that a fault did not change by how much rx_bytes grow; payload: bytes that must be counted at least."""
    with twin("rx_bytes grow by at least the payload of packets that are received"):
        assert without.growth >= payload, f"they grew by {without.growth} for {payload} bytes of payload"
    assert with_fault.growth == without.growth, (
        f"{fault}: rx_bytes grew by {with_fault.growth}, and by {without.growth} for the same packets without it"
    )
