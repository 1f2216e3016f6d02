"""Check that datagrams leave from the address that the peer sent to (`direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import DATA, V4_OF_A, V4_OF_B, Capture, Endpoint, add_veth, ping, stopped

if TYPE_CHECKING:
    from harness import Tunnel

V4 = ("10.0.0.1", "10.0.0.2")
V6 = ("fd00:aa::1", "fd00:aa::2")
# Repeated, because a program may fail only sometimes when the family changes.
ALTERNATING = (V4[0], V6[0], V4[1], V6[1]) * 3
# B's address, A's address, and the one that replaces A's.
CHANGES = (("10.0.0.2", "10.0.0.1/24", "10.0.0.10/24"), ("fd00:aa::2", "fd00:aa::1/96", "fd00:aa::10/96"))
# Routes that come and go: with a message for each, many times what a netlink socket's buffer takes.
STORM = 30_000
# The driver reads no messages about routes: it looks whether any route has changed since its last datagram.
STORM_FOR_DRIVER = 300


@pytest.mark.core
@pytest.mark.scenario("N26")
@pytest.mark.requirement("RT-05", "RT-11")
@pytest.mark.bug("IB-38")
@pytest.mark.capability("sticky-source", "ipv6-underlay")
@pytest.mark.parametrize("addresses", [V4, V6, ALTERNATING], ids=["v4", "v6", "alternating"])
def test_reply_source_is_local_address_that_peer_sent_to(direct: Tunnel, addresses: tuple[str, ...]) -> None:
    direct.nodes["ns1"].add_address("veth1", *(f"{address}/24" for address in V4), *(f"{address}/96" for address in V6))
    direct.nodes["ns2"].add_address("veth2", "10.0.0.3/24", "fd00:aa::3/96")
    for address in addresses:
        endpoint = Endpoint(address, 1)
        direct.b.set_peer(direct.pub_a, endpoint=endpoint)
        direct.must_ping("ns2", V4_OF_A)
        seen = direct.seen_by_b().endpoint
        assert seen == endpoint, f"B addressed A at {endpoint}, and the answer came from {seen}"


@pytest.mark.scenario("N25")
@pytest.mark.requirement("RT-12")
@pytest.mark.bug("IB-39")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("changes", [CHANGES, CHANGES[1:]], ids=["v4-then-v6", "v6"])
def test_source_address_changes_when_current_one_is_removed(
    direct: Tunnel, changes: tuple[tuple[str, str, str], ...]
) -> None:
    ns1 = direct.nodes["ns1"]
    ns1.add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    for host, before, after in changes:
        direct.a.set_peer(direct.pub_b, endpoint=Endpoint(host, 2))
        direct.must_ping("ns1", V4_OF_B)
        assert direct.seen_by_b().endpoint == Endpoint(before.partition("/")[0], 1)
        ns1.add_address("veth1", after)
        ns1.delete_address("veth1", before)
        direct.must_ping("ns1", V4_OF_B)
        assert direct.seen_by_b().endpoint == Endpoint(after.partition("/")[0], 1)


@pytest.mark.bug("IB-75")
@pytest.mark.scenario("N25")
@pytest.mark.requirement("RT-12")
@pytest.mark.capability("ipv6-underlay", "update-peer")
@pytest.mark.parametrize("order", ["added-first", "deleted-first"])
@pytest.mark.parametrize("change", CHANGES, ids=["v4", "v6"])
def test_removed_source_is_replaced_where_any_may_be_bound(
    direct: Tunnel, change: tuple[str, str, str], order: str
) -> None:
    ns1, (host, first, second) = direct.nodes["ns1"], change
    for family in ("ipv4", "ipv6"):
        ns1.sysctl(f"net.{family}.ip_nonlocal_bind", 1)
    ns1.add_address("veth1", first)
    direct.nodes["ns2"].add_address("veth2", f"{host}/{first.partition('/')[2]}")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint(host, 2))
    direct.must_ping("ns1", V4_OF_B)
    direct.must_ping("ns2", V4_OF_A)
    for before, after in ((first, second), (second, first)):
        must_be_seen_at(direct, before)
        if order == "added-first":
            # In topology `direct` the kernel promotes the second address of a network when the first one is deleted.
            ns1.add_address("veth1", after)
            ns1.delete_address("veth1", before)
        else:
            ns1.delete_address("veth1", before)
            ns1.add_address("veth1", after)
        must_reach_b(direct, f"its address {before} was replaced by {after}")
        must_be_seen_at(direct, after)
        direct.must_ping("ns2", V4_OF_A)


def must_reach_b(direct: Tunnel, since: str) -> None:
    """Check that the next ping of A is answered. since: what happened before it."""
    pings = ping(direct.nodes["ns1"], V4_OF_B)
    name = direct.a.manifest.name
    assert not pings.lost, f"A ({name}) does not reach B, since {since}: ping {pings}: {direct.diagnosis()}"


def must_be_seen_at(direct: Tunnel, address: str) -> None:
    """Check that B reports this address (ADDRESS/LENGTH) of A as its endpoint."""
    expected, seen = Endpoint(address.partition("/")[0], 1), direct.seen_by_b().endpoint
    assert seen == expected, f"A ({direct.a.manifest.name}) sends from {seen}, expected {expected}"


@pytest.mark.bug("IB-75")
@pytest.mark.requirement("RT-11", "RT-12")
@pytest.mark.capability("sticky-source", "ipv6-underlay", "update-peer")
@pytest.mark.parametrize(
    ("outer", "moving", "length"),
    [
        pytest.param(("10.0.0.1/24", "10.0.0.2/24"), "10.0.0.7", 32, id="v4"),
        pytest.param(("fd00:aa::1/96", "fd00:aa::2/96"), "fd00:aa::7", 128, id="v6"),
    ],
)
def test_source_stays_when_its_address_moves_to_other_device(
    direct: Tunnel, outer: tuple[str, str], moving: str, length: int
) -> None:
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    add_veth(ns1, "unused1", ns1, "unused2")
    ns1.add_address("veth1", outer[0], f"{moving}/{length}")
    ns2.add_address("veth2", outer[1])
    # IPv6 needs a gateway: neighbour discovery answers only for addresses of the same interface.
    gateway = outer[0].partition("/")[0] if ":" in moving else None
    ns2.add_route(f"{moving}/{length}", dev="veth2", via=gateway)
    direct.b.set_peer(direct.pub_a, endpoint=Endpoint(moving, 1))
    direct.must_ping("ns2", V4_OF_A)
    must_be_seen_at(direct, moving)
    ns1.delete_address("veth1", f"{moving}/{length}")
    ns1.add_address("unused1", f"{moving}/{length}")
    direct.must_ping("ns2", V4_OF_A)
    must_be_seen_at(direct, moving)
    ns1.delete_address("unused1", f"{moving}/{length}")
    must_reach_b(direct, f"{moving} was removed from its last device")
    must_be_seen_at(direct, outer[0])


@pytest.mark.bug("IB-75")
@pytest.mark.requirement("RT-13", "RT-12")
@pytest.mark.capability("update-peer")
def test_tunnel_follows_address_that_moves_with_its_route(direct: Tunnel) -> None:
    add_second_link(direct)
    ns1 = direct.nodes["ns1"]
    ns1.sysctl("net.ipv4.ip_nonlocal_bind", 1)
    # A's addresses on both links, without a route: 10.0.0.1 on veth1, 10.0.0.3 on veth3.
    ns1.add_route("10.0.0.0/24", dev="veth1", src="10.0.0.1")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.must_ping("ns1", V4_OF_B)
    must_be_seen_at(direct, "10.0.0.1")
    ns1.delete_address("veth1", "10.0.0.1/32")
    ns1.add_address("veth3", "10.0.0.1/32")
    ns1.add_route("10.0.0.0/24", dev="veth3", src="10.0.0.1")
    with Capture(ns1, "veth3") as wire:
        must_reach_b(direct, "10.0.0.1 and the route moved to veth3")
        must_be_seen_at(direct, "10.0.0.1")
        sent = wire.messages(kind=DATA)
    assert sent, f"A ({direct.a.manifest.name}) sent no data by veth3, which has its address and the route"


@pytest.mark.scenario("N27")
@pytest.mark.requirement("RT-11")
@pytest.mark.capability("sticky-source", "ipv6-underlay")
@pytest.mark.parametrize(
    ("elsewhere", "network"), [("10.50.0.1/24", "10.50.0.0/24"), ("fd00:50::1/96", "fd00:50::/96")], ids=["v4", "v6"]
)
def test_reply_source_can_be_address_on_other_interface(direct: Tunnel, elsewhere: str, network: str) -> None:
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    ns1.add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    ns2.add_address("veth2", "10.0.0.3/24", "fd00:aa::3/96")
    add_veth(ns1, "unused1", ns1, "unused2")
    ns1.add_address("unused1", elsewhere)
    # IPv6 needs a gateway: neighbour discovery answers only for addresses of the same interface.
    ns2.add_route(network, dev="veth2", via="fd00:aa::1" if ":" in network else None)
    endpoint = Endpoint(elsewhere.partition("/")[0], 1)
    direct.b.set_peer(direct.pub_a, endpoint=endpoint)
    direct.must_ping("ns2", V4_OF_A)
    seen = direct.seen_by_b().endpoint
    assert seen == endpoint, f"B addressed A at {endpoint}, and the answer came from {seen}"


@pytest.mark.scenario("N28")
@pytest.mark.requirement("RT-13")
@pytest.mark.bug("IB-39")
def test_better_route_is_used_with_its_source_address(direct: Tunnel) -> None:
    add_second_link(direct)
    ns1 = direct.nodes["ns1"]
    ns1.add_route("10.0.0.0/24", dev="veth1", src="10.0.0.1", metric=2)
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.must_ping("ns1", V4_OF_B)
    assert str(direct.seen_by_b().endpoint) == "10.0.0.1:1"
    ns1.add_route("10.0.0.0/24", dev="veth3", src="10.0.0.3", metric=1)
    direct.must_ping("ns1", V4_OF_B)
    seen = str(direct.seen_by_b().endpoint)
    assert seen == "10.0.0.3:1", f"A's datagrams come from {seen}, expected 10.0.0.3:1 by the better route, veth3"


@pytest.mark.bug("IB-84")
@pytest.mark.scenario("N28")
@pytest.mark.requirement("RT-13")
def test_better_route_is_used_after_storm_of_routes(direct: Tunnel) -> None:
    add_second_link(direct)
    ns1, pid = direct.nodes["ns1"], direct.a.pid
    ns1.add_route("10.0.0.0/24", dev="veth1", src="10.0.0.1", metric=2)
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.must_ping("ns1", V4_OF_B)
    must_be_seen_at(direct, "10.0.0.1")
    count = STORM_FOR_DRIVER if pid is None else STORM
    prefixes = [f"10.{100 + number // 256}.{number % 256}.0/24" for number in range(count)]
    # A program that does not run receives no event, and the kernel drops those that its buffer cannot take.
    with stopped(pid):
        for action in ("add", "del"):
            batch = "".join(f"route {action} {prefix} dev veth1 table 7\n" for prefix in prefixes)
            ns1.run(["ip", "-batch", "-"], stdin=batch, deadline=30.0)
        ns1.add_route("10.0.0.0/24", dev="veth3", src="10.0.0.3", metric=1)
    direct.must_ping("ns1", V4_OF_B)
    must_be_seen_at(direct, "10.0.0.3")


@pytest.mark.scenario("N28")
@pytest.mark.requirement("RT-13")
@pytest.mark.capability("sticky-source")
def test_second_route_is_used_with_its_source_when_link_is_down(direct: Tunnel) -> None:
    add_second_link(direct)
    ns1 = direct.nodes["ns1"]
    for device in ("veth1", "veth3"):
        # The kernel reports the loss of a link's IPv6 routes; for IPv4 it reports only that the link is down.
        ns1.sysctl(f"net.ipv6.conf.{device}.disable_ipv6", 1)
    ns1.add_route("10.0.0.0/24", dev="veth1", src="10.0.0.1", metric=1)
    ns1.add_route("10.0.0.0/24", dev="veth3", src="10.0.0.3", metric=2)
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.must_ping("ns1", V4_OF_B)
    assert str(direct.seen_by_b().endpoint) == "10.0.0.1:1"
    # B answers by the remaining link, whatever address A's datagrams come from.
    direct.nodes["ns2"].add_route("10.0.0.0/24", dev="veth4", src="10.0.0.2", metric=9)
    direct.nodes["ns2"].set_link("veth2", up=False)
    ns1.set_link("veth1", up=False)
    direct.must_ping("ns1", V4_OF_B)
    seen = str(direct.seen_by_b().endpoint)
    assert seen == "10.0.0.3:1", f"A's datagrams come from {seen}, expected 10.0.0.3:1 by the remaining link, veth3"


def add_second_link(direct: Tunnel) -> None:
    """Give A a second address on a second link to B; both sides accept packets from either link."""
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    add_veth(ns1, "veth3", ns2, "veth4")
    for node, *devices in ((ns1, "veth1", "veth3"), (ns2, "veth2", "veth4")):
        for device in ("all", *devices):
            node.sysctl(f"net.ipv4.conf.{device}.rp_filter", 0)
    # /32, so that no connected route is added.
    ns1.add_address("veth1", "10.0.0.1/32")
    ns1.add_address("veth3", "10.0.0.3/32")
    ns2.add_address("veth2", "10.0.0.2/24")
