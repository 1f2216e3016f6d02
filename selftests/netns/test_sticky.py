"""Answers leave from the address that was addressed (topology `direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import traffic
from harness.control.records import Endpoint
from harness.tunnel import V4_OF_A

if TYPE_CHECKING:
    from harness.tunnel import Tunnel

ADDRESSES_OF_A = ("10.0.0.1", "fd00:aa::1", "10.0.0.2", "fd00:aa::2")


@pytest.mark.scenario("N26")
@pytest.mark.requirement("RT-11")
@pytest.mark.capability("sticky-source", "ipv6-underlay")
def test_answers_leave_from_the_address_that_was_addressed(direct: Tunnel) -> None:
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24", "10.0.0.2/24", "fd00:aa::1/96", "fd00:aa::2/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.3/24", "fd00:aa::3/96")
    for address in ADDRESSES_OF_A:
        endpoint = Endpoint(address, 1)
        direct.b.set_peer(direct.pub_a, endpoint=endpoint)
        traffic.must_ping(direct.nodes["ns2"], V4_OF_A)
        assert direct.seen_by_b().endpoint == endpoint
