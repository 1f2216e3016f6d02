"""Check tunnels over firewalls, bridges, slow and narrow lines, VRFs, bonds, VLANs (harness/lab/networks.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_A, V4_OF_B, DeviceConfig, Endpoint, error_for, must_ping, ping, poll_until, tcp_stream, twin
from harness.lab.networks import (
    BLACK_HOLE,
    BONDED,
    BRIDGED,
    FIREWALL,
    NARROW,
    NARROW_MTU,
    NARROW_V6,
    RATE,
    RATE_LIMITED,
    VLAN,
    VRF,
    VRF_MARK,
    expire_mappings,
)
from selftests.support.networks import (
    LONGEST,
    REFUSED,
    SOON,
    count,
    must_be_data_only,
    must_have_learned,
    must_refuse_b,
    name_of,
    sent_to_b,
)

if TYPE_CHECKING:
    from harness import Topology, Tunnel

# Pings that must be answered after the routers had a reason to report their MTU.
SEVERAL = 3
TWICE = 2
# Bytes of a tunnel's MTU that fits into the narrow line over IPv6: 1280 - 80.
FITS = 1200
# Bytes of a stream that takes a third of a second at RATE.
STREAM = 1 << 18
OVER_IPV6 = pytest.mark.capability("ipv6-underlay")


@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("topology", [FIREWALL], ids=name_of)
def test_ipv6_firewall_admits_peer_once_other_side_sends(tunnel: Tunnel) -> None:
    # The firewall answers B's initiation with an ICMPv6 error.
    must_refuse_b(tunnel)
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.must_ping("ns2", V4_OF_A)
    assert str(must_have_learned(tunnel)) == "[fd00:1::100]:1"


@pytest.mark.requirement("RT-06")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.nightly
@pytest.mark.parametrize("topology", [FIREWALL], ids=name_of)
def test_session_survives_refusals_of_ipv6_firewall(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    sent = sent_to_b(tunnel)
    expire_mappings(topology, tunnel.nodes)
    must_refuse_b(tunnel)
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.must_ping("ns2", V4_OF_A)
    must_be_data_only(tunnel, since=sent)


@pytest.mark.requirement("RT-03", "TM-20")
@pytest.mark.capability("ipv6-underlay", "persistent-keepalive")
@pytest.mark.parametrize("topology", [FIREWALL], ids=name_of)
def test_keepalive_reopens_ipv6_firewall(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.keep_alive(1)
    tunnel.must_ping("ns1", V4_OF_B)
    expire_mappings(topology, tunnel.nodes)
    before = count(tunnel, "opened")
    opened = poll_until(lambda: count(tunnel, "opened"), lambda seen: seen > before, SOON, interval=0.05)
    assert opened > before, f"A sent no keepalive in {SOON:g} s at an interval of 1 s: {tunnel.diagnosis()}"
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("RT-03", "RT-06")
@pytest.mark.capability("listen-port-change", "roaming")
@pytest.mark.nightly
@pytest.mark.parametrize(
    "topology",
    [pytest.param(FIREWALL, marks=OVER_IPV6), BRIDGED, RATE_LIMITED, NARROW, pytest.param(NARROW_V6, marks=OVER_IPV6)],
    ids=name_of,
)
def test_peer_behind_path_is_followed_to_its_new_port(tunnel: Tunnel) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.a.set(DeviceConfig(listen_port=9998))
    tunnel.must_ping("ns1", V4_OF_B)
    port = must_have_learned(tunnel).port
    assert port == 9998, f"A sent from port {port}, expected 9998"
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.parametrize("topology", [BRIDGED], ids=name_of)
def test_peer_is_followed_to_another_port_of_bridge(tunnel: Tunnel) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    ns1 = tunnel.nodes["ns1"]
    ns1.set_link("veth1", up=False)
    ns1.delete_address("veth1", "192.168.1.1/24")
    ns1.add_address("veth3", "192.168.1.1/24")
    # A program may hear a moment later that its link is gone, and lose a datagram.
    lost = poll_until(lambda: ping(ns1, V4_OF_B, size=LONGEST).lost, lambda lost: not lost, SOON)
    assert not lost, "after A had moved to another port of the bridge, no ping of A was answered"
    must_ping(tunnel.nodes["ns2"], V4_OF_A, size=LONGEST)
    assert str(must_have_learned(tunnel)) == "192.168.1.1:1"
    assert tunnel.nodes["switch"].links()["port3"]["rx_bytes"] > LONGEST, "the test proved nothing: A has not moved"


@pytest.mark.parametrize("topology", [RATE_LIMITED], ids=name_of)
def test_stream_arrives_whole_over_line_that_drops(tunnel: Tunnel) -> None:
    ns1, ns2 = tunnel.nodes["ns1"], tunnel.nodes["ns2"]
    tunnel.must_ping("ns1", V4_OF_B)
    rate = 8 * tcp_stream(ns1, ns2, V4_OF_B, size=STREAM)
    assert rate < RATE, f"the line of {RATE} bit/s carried {rate:.0f} bit/s"
    tunnel.must_ping("ns2", V4_OF_A)


@pytest.mark.bug("IB-84")
@pytest.mark.requirement("MTU-08")
@pytest.mark.parametrize("topology", [NARROW, pytest.param(NARROW_V6, marks=OVER_IPV6)], ids=name_of)
def test_narrow_line_costs_one_datagram_each_way(tunnel: Tunnel, topology: Topology) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    for _ in ("A's router reports its MTU about the request", "B's about the answer"):
        ping(tunnel.nodes["ns1"], V4_OF_B, size=LONGEST, timeout=REFUSED)
    for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
        pings = ping(tunnel.nodes[node], address, size=LONGEST, count=SEVERAL)
        assert pings.lost == 0, f"a side has not learned the line's MTU of {NARROW_MTU}: {pings}: {tunnel.diagnosis()}"
    _, error = error_for(tunnel.nodes["ns1"], Endpoint.parse(topology.endpoint_of_b or "").host, size=NARROW_MTU)
    assert error.information == NARROW_MTU, f"the test proved nothing: the path has an MTU of {error.information}"


@pytest.mark.capability("ipv6-underlay")
@pytest.mark.long_in_guest
@pytest.mark.parametrize("topology", [BLACK_HOLE], ids=name_of)
def test_long_packets_vanish_in_pmtu_black_hole(tunnel: Tunnel) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
        pings = ping(tunnel.nodes[node], address, size=LONGEST, count=TWICE, timeout=REFUSED)
        assert pings.lost == TWICE, f"a packet longer than the line passed it: {pings}"
    # A side that had learned the MTU would send fragments, about which no router reports.
    silenced = [tunnel.nodes[router].nft_counters()["silenced"] for router in ("r1", "r2")]
    assert silenced == [TWICE, TWICE], f"the routers dropped {silenced} reports of their MTU, expected {TWICE} each"
    with twin("a smaller MTU of the tunnel is the remedy"):
        for node in ("ns1", "ns2"):
            tunnel.nodes[node].set_link("wg0", mtu=FITS)
        must_ping(tunnel.nodes["ns1"], V4_OF_B, size=FITS - 28)
        must_ping(tunnel.nodes["ns2"], V4_OF_A, size=FITS - 28)


@pytest.mark.requirement("RT-17")
@pytest.mark.capability("fwmark")
@pytest.mark.parametrize("topology", [VRF], ids=name_of)
def test_mark_leads_datagrams_into_vrf(tunnel: Tunnel) -> None:
    tunnel.a.set(DeviceConfig(fwmark=VRF_MARK))
    tunnel.must_ping("ns1", V4_OF_B)
    tunnel.must_ping("ns2", V4_OF_A)
    for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
        must_ping(tunnel.nodes[node], address, size=LONGEST)


@pytest.mark.parametrize("topology", [BONDED], ids=name_of)
def test_session_goes_on_when_bond_changes_its_link(tunnel: Tunnel) -> None:
    tunnel.must_ping("ns1", V4_OF_B)
    sent = sent_to_b(tunnel)
    switch = tunnel.nodes["switch"]
    for lost, back in (("port1", "port3"), ("port3", "port1")):
        switch.set_link(back, up=True)
        switch.set_link(lost, up=False)
        found = poll_until(lambda: ping(tunnel.nodes["ns1"], V4_OF_B, timeout=REFUSED).lost == 0, bool, SOON)
        assert found, f"no answer after the bond's link to {lost} failed: {tunnel.diagnosis()}"
        must_ping(tunnel.nodes["ns2"], V4_OF_A, size=LONGEST)
    must_be_data_only(tunnel, since=sent)


@pytest.mark.parametrize("topology", [VLAN], ids=name_of)
def test_longest_packets_pass_vlan(tunnel: Tunnel) -> None:
    for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
        must_ping(tunnel.nodes[node], address, size=LONGEST)
    endpoint = str(tunnel.seen_by_b().endpoint)
    assert endpoint == "192.168.1.1:1", f"B's endpoint for A is {endpoint}, not the address of A's VLAN"
