"""Run a tunnel through a tunnel (`loopback`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import LOOPBACK, OUTER, V4_OF_A, V4_OF_B, V6_OF_A, V6_OF_B, Tunnel, must_carry_everything
from selftests.support.transfer import at_rest

if TYPE_CHECKING:
    from harness import Lab, Pair


@pytest.fixture
def outer(lab: Lab, pair: Pair) -> Tunnel:
    """A tunnel with other inner addresses, so that the tunnel through it can have the common ones."""
    return Tunnel(lab, LOOPBACK, pair.a, pair.b, plan=OUTER)


@pytest.mark.scenario("N17")
@pytest.mark.requirement("ROB-05")
@pytest.mark.capability("ipv6-underlay")
def test_pings_pass_through_nested_tunnel(outer: Tunnel) -> None:
    inner = outer.inside()
    for sender, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A), ("ns1", V6_OF_B), ("ns2", V6_OF_A)):
        inner.must_ping(sender, address)
    within, around = at_rest(inner.seen_by_a), at_rest(outer.seen_by_a)
    # Each message of A's inner tunnel is a packet in A's outer tunnel, which adds 32 bytes and headers.
    assert around.tx_bytes > within.tx_bytes > 0, f"{around.tx_bytes} bytes around {within.tx_bytes}"


@pytest.mark.scenario("N18")
@pytest.mark.requirement("ROB-05")
@pytest.mark.capability("ipv6-underlay")
def test_traffic_set_passes_through_nested_tunnel(outer: Tunnel) -> None:
    must_carry_everything(outer.inside())
