"""Check that endpoints follow a peer's last authentic packet (`loopback`, `nat`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_A, V4_OF_B, V6_OF_B, DeviceConfig, Endpoint, let_pass, ping, twin

if TYPE_CHECKING:
    from harness import Interface, Tunnel

pytestmark = pytest.mark.capability("roaming")

LONGER_THAN_THE_NAT_MAPPING = 3.0
# Replaces the topology's own rule, which keeps the port if possible.
ANOTHER_PORT = """\
flush table ip nat
table ip nat {
    chain postrouting {
        ip saddr 192.168.1.0/24 meta l4proto udp counter snat to 10.0.0.1:4242 comment "moved"
    }
}
"""


@pytest.mark.core
@pytest.mark.scenario("N13")
@pytest.mark.requirement("RT-03", "CFG-22")
@pytest.mark.capability("listen-port-change")
def test_endpoint_follows_peer_to_new_ipv4_address_and_port(loopback: Tunnel) -> None:
    loopback.must_ping("ns1", V6_OF_B)
    underlay = loopback.nodes["ns0"]
    underlay.delete_address("lo", "127.0.0.1/8")
    underlay.add_address("lo", "127.212.121.99/8")
    loopback.a.set(DeviceConfig(listen_port=9999))
    port = loopback.a.get().listen_port
    assert port == 9999, f"A's listen port is {port}, expected 9999"
    loopback.a.set_peer(loopback.pub_b, endpoint=Endpoint.parse("127.0.0.1:2"))
    loopback.must_ping("ns1", V6_OF_B)
    endpoint = str(loopback.seen_by_b().endpoint)
    assert endpoint == "127.212.121.99:9999", f"B's endpoint for A is {endpoint}, expected 127.212.121.99:9999"
    assert endpoint_by_wg(loopback.b) == endpoint


@pytest.mark.core
@pytest.mark.scenario("N14")
@pytest.mark.requirement("RT-05")
@pytest.mark.capability("listen-port-change", "ipv6-underlay")
def test_endpoint_follows_peer_from_ipv4_to_ipv6(loopback: Tunnel) -> None:
    loopback.must_ping("ns1", V4_OF_B)
    loopback.a.set(DeviceConfig(listen_port=9998))
    loopback.a.set_peer(loopback.pub_b, endpoint=Endpoint.parse("[::1]:2"))
    loopback.must_ping("ns1", V4_OF_B)
    assert str(loopback.seen_by_b().endpoint) == "[::1]:9998"
    assert endpoint_by_wg(loopback.b) == "[::1]:9998"


@pytest.mark.core
@pytest.mark.scenario("N20")
@pytest.mark.requirement("RT-19")
@pytest.mark.capability("persistent-keepalive")
def test_persistent_keepalive_keeps_peer_behind_nat_reachable(nat: Tunnel) -> None:
    nat.keep_alive(1)
    nat.must_ping("ns1", V4_OF_B)
    nat.must_ping("ns2", V4_OF_A)
    assert str(nat.seen_by_b().endpoint) == "10.0.0.1:1"
    assert endpoint_by_wg(nat.b) == "10.0.0.1:1"
    assert nat.nodes["ns0"].nft_counters()["snat"] > 0, "the test proved nothing: no datagram passed the NAT"
    before = nat.seen_by_b().rx_bytes
    let_pass(LONGER_THAN_THE_NAT_MAPPING, "the mapping would expire if no keepalive renewed it")
    arrived = nat.seen_by_b().rx_bytes - before
    pings = ping(nat.nodes["ns2"], V4_OF_A)
    received = f"{arrived} bytes of keepalives arrived at B in {LONGER_THAN_THE_NAT_MAPPING:g} s"
    assert pings.lost == 0, f"the NAT mapping expired; {received}: {pings}"


@pytest.mark.core
@pytest.mark.scenario("N20")
@pytest.mark.requirement("RT-19")
def test_silent_peer_behind_nat_is_lost_when_its_mapping_expires(nat: Tunnel) -> None:
    with twin("B reaches A while the mapping lives"):
        nat.must_ping("ns1", V4_OF_B)
        nat.must_ping("ns2", V4_OF_A)
    let_pass(LONGER_THAN_THE_NAT_MAPPING, "the mapping expires")
    pings = ping(nat.nodes["ns2"], V4_OF_A, timeout=0.5)
    assert pings.lost == 1, "the mapping outlived its two seconds, or A sent a packet although it had none to send"
    with twin("the tunnel still works when A sends first"):
        nat.must_ping("ns1", V4_OF_B)


@pytest.mark.core
@pytest.mark.scenario("N20")
@pytest.mark.requirement("RT-19", "RT-06")
@pytest.mark.capability("persistent-keepalive")
def test_endpoint_follows_peer_when_nat_changes_its_port(nat: Tunnel) -> None:
    # Without keepalives the mapping may expire on a slow machine before B uses it.
    nat.keep_alive(1)
    nat.must_ping("ns1", V4_OF_B)
    assert str(nat.seen_by_b().endpoint) == "10.0.0.1:1"
    nat.nodes["ns0"].nft(ANOTHER_PORT)
    nat.nodes["ns0"].forget_connections()
    nat.must_ping("ns1", V6_OF_B)
    nat.must_ping("ns2", V4_OF_A)
    assert str(nat.seen_by_b().endpoint) == "10.0.0.1:4242"
    assert nat.nodes["ns0"].nft_counters()["moved"] > 0, "the test proved nothing: the NAT made no new mapping"


def endpoint_by_wg(side: Interface) -> str:
    """Return the endpoint of the only peer as wg(8) shows it."""
    return side.wg("show", side.name, "endpoints").stdout.split()[1]
