"""Answers leave from the address that was addressed (topology `direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.control.records import Endpoint
from harness.tunnel import V4_OF_A

if TYPE_CHECKING:
    from harness.tunnel import Tunnel

V4 = ("10.0.0.1", "10.0.0.2")
V6 = ("fd00:aa::1", "fd00:aa::2")
# Back and forth, because a program may go wrong at a change of family only now and then.
ALTERNATING = (V4[0], V6[0], V4[1], V6[1]) * 3


@pytest.mark.scenario("N26")
@pytest.mark.requirement("RT-05", "RT-11")
@pytest.mark.capability("sticky-source", "ipv6-underlay")
@pytest.mark.parametrize("addresses", [V4, V6, ALTERNATING], ids=["v4", "v6", "alternating"])
def test_answers_leave_from_the_address_that_was_addressed(direct: Tunnel, addresses: tuple[str, ...]) -> None:
    direct.nodes["ns1"].add_address("veth1", *(f"{address}/24" for address in V4), *(f"{address}/96" for address in V6))
    direct.nodes["ns2"].add_address("veth2", "10.0.0.3/24", "fd00:aa::3/96")
    for address in addresses:
        endpoint = Endpoint(address, 1)
        direct.b.set_peer(direct.pub_a, endpoint=endpoint)
        direct.must_ping("ns2", V4_OF_A)
        seen = direct.seen_by_b().endpoint
        assert seen == endpoint, f"B addressed A at {endpoint}, and the answer came from {seen}"
