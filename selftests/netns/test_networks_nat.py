"""Check tunnels through NATs of each kind, and what no peer can do behind them (harness/lab/networks.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import (
    INITIATION,
    V4_OF_A,
    V4_OF_B,
    DeviceConfig,
    Endpoint,
    must_ping,
    ping,
    poll_until,
    twin,
)
from harness.lab.networks import (
    ADDRESS_RESTRICTED,
    BOTH_SIDES,
    BOTH_SYMMETRIC,
    BOTH_UNKNOWN,
    DOUBLE,
    FULL_CONE,
    HAIRPIN,
    NO_HAIRPIN,
    ONE_TO_ONE,
    PORT_RESTRICTED,
    SYMMETRIC,
    expire_mappings,
)
from selftests.support.networks import (
    LONGEST,
    REFUSED,
    SOON,
    count,
    have_handshake,
    must_be_data_only,
    must_have_learned,
    must_refuse_b,
    name_of,
    outer_source,
    sent_to_b,
    source_of,
    try_in_vain,
)
from selftests.support.peers import renew

if TYPE_CHECKING:
    from harness import Topology, Tunnel

pytestmark = pytest.mark.capability("roaming")

# These admit a datagram from outside although no mapping exists.
OPEN = (FULL_CONE, ONE_TO_ONE)


def by_night(*topologies: Topology) -> list[object]:
    """Return the topologies as parameters of tests that run with --nightly only."""
    return [pytest.param(topology, marks=pytest.mark.nightly) for topology in topologies]


@pytest.mark.requirement("RT-01", "RT-10")
@pytest.mark.parametrize(
    "topology",
    [FULL_CONE, PORT_RESTRICTED, SYMMETRIC, ONE_TO_ONE, DOUBLE, *by_night(ADDRESS_RESTRICTED)],
    ids=name_of,
)
def test_peer_behind_nat_is_reached_once_it_has_sent(tunnel: Tunnel) -> None:
    endpoint = tunnel.seen_by_b().endpoint
    assert endpoint is None, f"the test proves nothing: B has the endpoint {endpoint} for A"
    tunnel.must_ping("ns1", V4_OF_B)
    must_have_learned(tunnel)
    tunnel.must_ping("ns2", V4_OF_A)
    for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
        must_ping(tunnel.nodes[node], address, size=LONGEST)
    assert count(tunnel, "opened") > 0, "the test proved nothing: no datagram passed the NAT"


@pytest.mark.requirement("RT-19", "RT-06")
@pytest.mark.parametrize("topology", [SYMMETRIC, *by_night(PORT_RESTRICTED, ADDRESS_RESTRICTED, DOUBLE)], ids=name_of)
def test_peer_behind_nat_is_lost_from_expiry_until_it_sends(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    with twin("B reaches A while the mapping lives"):
        tunnel.must_ping("ns2", V4_OF_A)
    expire_mappings(topology, tunnel.nodes)
    must_refuse_b(tunnel)
    tunnel.must_ping("ns1", V4_OF_B)
    must_have_learned(tunnel)
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("RT-19")
@pytest.mark.parametrize("topology", by_night(*OPEN), ids=name_of)
def test_peer_behind_open_nat_is_reached_after_expiry(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    expire_mappings(topology, tunnel.nodes)
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("RT-19", "RT-03", "RT-06")
@pytest.mark.parametrize("topology", [SYMMETRIC], ids=name_of)
def test_changed_mapping_is_followed_without_handshake(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    before = must_have_learned(tunnel)
    sent = sent_to_b(tunnel)
    for _ in range(3):
        expire_mappings(topology, tunnel.nodes)
        tunnel.must_ping("ns1", V4_OF_B)
        # The NAT chooses at random, and may choose the same port again.
        if outer_source(tunnel) != before:
            break
    after = must_have_learned(tunnel)
    assert after != before, f"the test proved nothing: the NAT mapped to {before} four times"
    tunnel.must_ping("ns2", V4_OF_A)
    must_be_data_only(tunnel, since=sent)


@pytest.mark.requirement("RT-03", "RT-06")
@pytest.mark.capability("listen-port-change")
@pytest.mark.parametrize(
    "topology",
    [SYMMETRIC, FULL_CONE, *by_night(ADDRESS_RESTRICTED, PORT_RESTRICTED, ONE_TO_ONE, DOUBLE)],
    ids=name_of,
)
def test_peer_behind_nat_is_followed_to_its_new_port(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    before = must_have_learned(tunnel)
    tunnel.a.set(DeviceConfig(listen_port=9998))
    tunnel.must_ping("ns1", V4_OF_B)
    after = must_have_learned(tunnel)
    assert topology is SYMMETRIC or after == Endpoint(before.host, 9998), f"A left the NAT as {after}, not by port 9998"
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("RT-03", "TM-20")
@pytest.mark.capability("persistent-keepalive")
@pytest.mark.parametrize(
    "topology",
    [SYMMETRIC, *by_night(PORT_RESTRICTED, ADDRESS_RESTRICTED, ONE_TO_ONE, FULL_CONE, DOUBLE)],
    ids=name_of,
)
def test_keepalive_reopens_expired_mapping(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.keep_alive(1)
    tunnel.must_ping("ns1", V4_OF_B)
    expire_mappings(topology, tunnel.nodes)
    before = count(tunnel, "opened")
    opened = poll_until(lambda: count(tunnel, "opened"), lambda seen: seen > before, SOON, interval=0.05)
    assert opened > before, f"A sent no keepalive in {SOON:g} s at an interval of 1 s: {tunnel.diagnosis()}"
    must_have_learned(tunnel)
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("RT-01", "RT-06")
@pytest.mark.parametrize("topology", [BOTH_SIDES], ids=name_of)
def test_peers_behind_two_nats_meet_when_both_send(tunnel: Tunnel) -> None:
    meet(tunnel)
    seen = str(tunnel.seen_by_a().endpoint), str(tunnel.seen_by_b().endpoint)
    assert seen == ("10.0.0.2:2", "10.0.0.1:1"), f"A's endpoint for B is {seen[0]}, B's for A is {seen[1]}"


@pytest.mark.long_in_guest
@pytest.mark.parametrize("topology", [BOTH_SYMMETRIC], ids=name_of)
def test_peers_behind_two_symmetric_nats_never_meet(tunnel: Tunnel) -> None:
    outside_b = tunnel.lab.capture(tunnel.nodes["nat2"], "veth2")
    try_in_vain(tunnel)
    must_be_apart(tunnel, refused=2)
    # B sends to A from this port, which takes only what comes from A's port 1; but A's datagrams come from another.
    mapped = source_of(outside_b.messages(kind=INITIATION)[-1])
    renew(tunnel.a, tunnel.pub_b, endpoint=mapped)
    try_in_vain(tunnel)
    must_be_apart(tunnel, refused=3)
    with twin("the same peers meet behind NATs that keep ports"):
        for node, rules in BOTH_SIDES.firewall.items():
            tunnel.nodes[node].nft(f"flush ruleset\n{rules}")
            tunnel.nodes[node].forget_connections()
        renew(tunnel.a, tunnel.pub_b, endpoint=Endpoint("10.0.0.2", 2))
        renew(tunnel.b, tunnel.pub_a, endpoint=Endpoint("10.0.0.1", 1))
        meet(tunnel)


@pytest.mark.requirement("TM-26")
@pytest.mark.long_in_guest
@pytest.mark.parametrize("topology", [BOTH_UNKNOWN], ids=name_of)
def test_peers_behind_nats_send_nothing_without_endpoints(tunnel: Tunnel) -> None:
    try_in_vain(tunnel)
    assert count(tunnel, "opened") == 0, f"a datagram left for a peer without an endpoint: {tunnel.diagnosis()}"
    must_be_apart(tunnel, refused=0)
    with twin("the same peers meet once each has the endpoint of the other"):
        # New peers: a program may count its vain try as an initiation, and make the next one five seconds later.
        renew(tunnel.a, tunnel.pub_b, endpoint=Endpoint("10.0.0.2", 2))
        renew(tunnel.b, tunnel.pub_a, endpoint=Endpoint("10.0.0.1", 1))
        meet(tunnel)


@pytest.mark.requirement("RT-01", "RT-06")
@pytest.mark.parametrize("topology", [HAIRPIN], ids=name_of)
def test_peers_behind_one_nat_meet_by_hairpin(tunnel: Tunnel) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.must_ping("ns2", V4_OF_A)
    seen = str(tunnel.seen_by_a().endpoint), str(tunnel.seen_by_b().endpoint)
    assert seen == ("10.0.0.1:2", "10.0.0.1:1"), f"A's endpoint for B is {seen[0]}, B's for A is {seen[1]}"


@pytest.mark.long_in_guest
@pytest.mark.parametrize("topology", [NO_HAIRPIN], ids=name_of)
def test_peers_behind_nat_without_hairpin_need_inner_endpoint(tunnel: Tunnel) -> None:
    try_in_vain(tunnel)
    must_be_apart(tunnel, refused=2)
    renew(tunnel.a, tunnel.pub_b, endpoint=Endpoint("192.168.2.100", 2))
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.must_ping("ns2", V4_OF_A)


def must_be_apart(tunnel: Tunnel, *, refused: int) -> None:
    """Check that NATs have refused at least this number of datagrams, and that no side has a handshake."""
    __tracebackhide__ = True
    seen = poll_until(lambda: count(tunnel, "refused"), lambda number: number >= refused, SOON)
    assert seen >= refused, f"{seen} datagrams were refused, expected {refused}: {tunnel.diagnosis()}"
    shaken = have_handshake(tunnel)
    assert shaken == (False, False), f"handshake at A: {shaken[0]}, at B: {shaken[1]}: {tunnel.diagnosis()}"


def meet(tunnel: Tunnel) -> None:
    """Let A open its NAT by an initiation that B's refuses; then let B ping A."""
    __tracebackhide__ = True
    before = count(tunnel, "refused")
    ping(tunnel.nodes["ns1"], V4_OF_B, timeout=REFUSED)
    assert count(tunnel, "refused") > before, "B's NAT let A's initiation in, or A sent none"
    tunnel.must_ping("ns2", V4_OF_A)
    tunnel.must_ping("ns1", V4_OF_B)
