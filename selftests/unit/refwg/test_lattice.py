"""Run many devices in one process, in virtual time; bench/lattice.py measures the seconds."""

from __future__ import annotations

import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from bench.lattice import Lattice
from refwg.messages import MessageType

if TYPE_CHECKING:
    from types import FrameType

NEIGHBOURS = 8


@pytest.mark.requirement("ROB-11", "Q-07")
@pytest.mark.timeout(600)
def test_thousand_devices_handshake_with_all_their_neighbours() -> None:
    lattice = Lattice(1000)
    lattice.talk()
    links = len(lattice.links)
    assert links == 1000 * NEIGHBOURS // 2
    assert all(node.delivered == {"ping": NEIGHBOURS // 2, "pong": NEIGHBOURS // 2} for node in lattice.nodes)
    # Ping, pong, and ten seconds later a keepalive of the side that received the pong.
    assert lattice.messages == {
        MessageType.INITIATION: links,
        MessageType.RESPONSE: links,
        MessageType.DATA: 3 * links,
    }
    assert all(not node.device.statistics.drops for node in lattice.nodes)


def calls_until_all_are_answered(devices: int) -> int:
    """Return the number of Python calls until all pings are answered: equal in every run."""
    lattice, calls = Lattice(devices), 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        lattice.talk()
    finally:
        sys.setprofile(None)
    return calls


def bytes_when_all_are_answered(devices: int) -> int:
    tracemalloc.start()
    try:
        lattice = Lattice(devices)
        lattice.talk()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.requirement("ROB-11")
def test_work_is_in_proportion_to_links() -> None:
    assert calls_until_all_are_answered(60) / calls_until_all_are_answered(20) == pytest.approx(3, rel=0.02)


@pytest.mark.requirement("ROB-11")
def test_memory_is_in_proportion_to_links() -> None:
    bytes_when_all_are_answered(10)
    assert bytes_when_all_are_answered(60) / bytes_when_all_are_answered(20) == pytest.approx(3, rel=0.1)
