"""Check endpoints with a scope: set, learned, reported, and followed to other addresses (`link-local`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import INITIATION, RESPONSE, V4_OF_A, V4_OF_B, Capture, Endpoint, let_pass

if TYPE_CHECKING:
    from harness import Interface, NetNS, Tunnel

# Seconds: the driver accepts 50 initiations of a peer in a second (INITIATIONS_PER_SECOND of messages.h).
BETWEEN_INITIATIONS = 1 / 50

pytestmark = pytest.mark.capability("ipv6-underlay", "roaming")


@pytest.mark.bug("IB-79")
@pytest.mark.requirement("RT-18")
@pytest.mark.parametrize("link", [("veth1", "veth2"), ("veth3", "veth4")], ids=["first", "second"])
def test_link_local_endpoint_keeps_scope_in_both_roles(link_local: Tunnel, link: tuple[str, str]) -> None:
    ns1, ns2 = link_local.nodes["ns1"], link_local.nodes["ns2"]
    endpoints = [
        Endpoint.parse(f"[fe80::2%{link[0]}]:2", ns1.index),
        Endpoint.parse(f"[fe80::1%{link[1]}]:1", ns2.index),
    ]
    link_local.a.set_peer(link_local.pub_b, endpoint=Endpoint("fe80::2", 2, link[0]))
    must_report(link_local.a, endpoints[0], ns1, "set")
    with Capture(ns1, link[0]) as from_a, Capture(ns2, link[1]) as from_b:
        link_local.must_ping("ns1", V4_OF_B)
        calls, answers = from_a.messages(kind=INITIATION), from_b.messages(kind=RESPONSE)
    assert calls, f"{link_local.a.manifest.name} sent no initiation for {endpoints[0]} by {link[0]}"
    assert answers, f"{link_local.b.manifest.name} received an initiation by {link[1]} and answered by another link"
    must_report(link_local.a, endpoints[0], ns1, "learned from the response")
    must_report(link_local.b, endpoints[1], ns2, "learned from the initiation")
    link_local.must_ping("ns2", V4_OF_A)


def must_report(side: Interface, endpoint: Endpoint, node: NetNS, how: str) -> None:
    """Check the endpoint of the only peer over UAPI or netlink, and by wg(8), which may print the scope's name."""
    (peer,) = side.get().peers
    assert peer.endpoint == endpoint, f"{side.manifest.name} reports {peer.endpoint}, {how} as {endpoint}"
    by_wg = side.wg("show", side.name, "endpoints").stdout.split()[1]
    assert Endpoint.parse(by_wg, node.index) == endpoint, f"wg(8) prints {by_wg}, {how} as {endpoint}"


@pytest.mark.bug("IB-79")
@pytest.mark.requirement("RT-18", "RT-06")
def test_endpoint_follows_peer_to_other_link_and_global_address(link_local: Tunnel) -> None:
    ns1, ns2 = link_local.nodes["ns1"], link_local.nodes["ns2"]
    for endpoint, source in (("[fe80::2%veth1]:2", "[fe80::1%veth2]:1"), ("[fe80::2%veth3]:2", "[fe80::1%veth4]:1")):
        must_be_followed(link_local, endpoint, source)
    ns1.add_address("veth3", "fe80::3/64")
    ns1.delete_address("veth3", "fe80::1/64")
    must_be_followed(link_local, "[fe80::2%veth3]:2", "[fe80::3%veth4]:1")
    ns1.add_address("veth1", "fd00:aa::1/96")
    ns2.add_address("veth2", "fd00:aa::2/96")
    must_be_followed(link_local, "[fd00:aa::2]:2", "[fd00:aa::1]:1")


def must_be_followed(link_local: Tunnel, endpoint: str, source: str) -> None:
    """Send from A to an endpoint of B; B must then report the source, with its own scope, and answer to it."""
    # A program may begin another session when its peer is changed.
    let_pass(BETWEEN_INITIATIONS, "B refuses initiations that follow each other faster (HS-12)")
    link_local.a.set_peer(link_local.pub_b, endpoint=Endpoint.parse(endpoint))
    link_local.must_ping("ns1", V4_OF_B)
    expected = Endpoint.parse(source, link_local.nodes["ns2"].index)
    seen = link_local.seen_by_b().endpoint
    names = link_local.a.manifest.name, link_local.b.manifest.name
    assert seen == expected, f"A ({names[0]}) sent to {endpoint}, and B ({names[1]}) reports {seen}, not {expected}"
    link_local.must_ping("ns2", V4_OF_A)
