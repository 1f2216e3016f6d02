"""Flood refwg: its memory stays bounded, and peers connect (`loopback`).

bench/floods.py floods at full size.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from harness import V4_OF_A, ping
from harness.lanes import GUESTS, LANE
from selftests.support.floods import (
    CONNECTS_WITHIN,
    FULL_RATE,
    INITIATIONS_WITH_COOKIE,
    MAX_GROWTH,
    Flood,
    answered_with_cookie,
)

if TYPE_CHECKING:
    from harness import Lab

pytestmark = pytest.mark.long_in_guest

# Datagrams, and datagrams per second: slow enough for a busy machine, enough of them for memory to grow.
COUNT, RATE = 20_000, 4_000
# Seconds for three initiations: the first may get only a cookie reply, and any may be lost.
PATIENCE: Final = 12.0
# A share of a CPU below which a result at the full rate is that of a slower machine.
FULL_SHARE: Final = 0.8


@pytest.mark.requirement("ROB-01", "DOS-04", "DOS-07")
@pytest.mark.parametrize("kind", ["garbage", "initiations", "forged"])
def test_peer_connects_during_flood_and_memory_stays_bounded(lab: Lab, kind: str) -> None:
    flood = Flood(lab)
    before = flood.tunnel.seen_by_a()
    outcome = flood.run(kind, COUNT, RATE, patience=PATIENCE)
    assert outcome.connected is not None, outcome
    assert outcome.growth <= MAX_GROWTH, outcome
    assert flood.tunnel.seen_by_a().endpoint == before.endpoint


@pytest.mark.requirement("DOS-08", "DOS-10")
def test_session_survives_flood_of_forged_initiations(lab: Lab) -> None:
    flood = Flood(lab)
    flood.tunnel.must_ping("ns2", V4_OF_A)
    before = flood.tunnel.seen_by_a()
    with flood.attack("forged", COUNT // 2, RATE):
        pings = ping(flood.tunnel.nodes["ns2"], V4_OF_A, count=50)
    assert pings.lost < 25, pings
    after = flood.tunnel.seen_by_a()
    assert (after.latest_handshake, after.endpoint) == (before.latest_handshake, before.endpoint)


@pytest.mark.alone
@pytest.mark.requirement("DOS-03", "DOS-04", "DOS-07")
@pytest.mark.parametrize("rate", [FULL_RATE // 4, pytest.param(FULL_RATE, marks=pytest.mark.nightly)])
def test_valid_mac2_keeps_its_place_in_forged_flood(lab: Lab, rate: int) -> None:
    if os.environ.get(LANE) in GUESTS:
        pytest.skip("an emulated processor sends and receives no flood")
    result = answered_with_cookie(lab, "forged", rate)
    if result.answered * 2 < INITIATIONS_WITH_COOKIE and result.share < FULL_SHARE:
        pytest.skip(f"other programs use this machine: {result}; run it when the machine is idle")
    assert result.answered * 2 >= INITIATIONS_WITH_COOKIE, str(result)
    assert result.connected is not None, str(result)
    assert result.connected <= CONNECTS_WITHIN, str(result)
