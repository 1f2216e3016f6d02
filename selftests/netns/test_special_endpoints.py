"""Check that a broadcast or multicast endpoint finds the peer, which answers from an own address (`direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import INITIATION, RESPONSE, V4_OF_A, V4_OF_B, Capture, Endpoint, ping

if TYPE_CHECKING:
    from harness import Tunnel


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with outer addresses, and routes to the addresses that reach every host of the link."""
    for name, device, number in (("ns1", "veth1", 1), ("ns2", "veth2", 2)):
        node = direct.nodes[name]
        node.add_address(device, f"10.0.0.{number}/24", f"fe80::{number}/64")
        node.add_route("255.255.255.255/32", dev=device)
        node.add_route("224.0.0.0/4", dev=device)
    return direct


@pytest.mark.bug("IB-73", "IB-74")
@pytest.mark.requirement("RT-02")
@pytest.mark.capability("roaming")
@pytest.mark.parametrize(
    "endpoint",
    [
        pytest.param("10.0.0.255:2", id="broadcast"),
        pytest.param("255.255.255.255:2", id="limited-broadcast"),
        # All hosts of a link belong to these groups (RFC 1112; RFC 4291, 2.7.1).
        pytest.param("224.0.0.1:2", id="multicast"),
        pytest.param("[ff02::1%veth1]:2", id="v6-multicast", marks=pytest.mark.capability("ipv6-underlay")),
    ],
)
def test_peer_is_found_by_endpoint_that_reaches_all_hosts(connected: Tunnel, endpoint: str) -> None:
    a, b = connected.a.manifest.name, connected.b.manifest.name
    connected.a.set_peer(connected.pub_b, endpoint=Endpoint.parse(endpoint))
    with Capture(connected.nodes["ns1"], "veth1") as from_a, Capture(connected.nodes["ns2"], "veth2") as from_b:
        ping(connected.nodes["ns1"], V4_OF_B)
        calls, answers = from_a.messages(kind=INITIATION), from_b.messages(kind=RESPONSE)
    assert calls, f"A ({a}) sent no initiation to {endpoint}"
    assert answers, f"B ({b}) did not answer the initiation that A ({a}) sent to {endpoint}"
    connected.must_ping("ns1", V4_OF_B)
    connected.must_ping("ns2", V4_OF_A)
    source, seen = answers[-1].source, connected.seen_by_a().endpoint
    assert seen is not None
    assert (seen.host, seen.port) == source, f"B answered from {source}, and the endpoint of A ({a}) for B is {seen}"
