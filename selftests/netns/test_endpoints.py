"""Check that endpoints survive a down link, and follow refused packets (`direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import (
    INITIATION,
    V4_OF_A,
    V4_OF_B,
    Capture,
    DeviceConfig,
    Endpoint,
    PeerConfig,
    allowed_ips,
    poll_until,
    udp_message,
)

if TYPE_CHECKING:
    from harness import Tunnel

OTHER_OF_B = "192.168.241.3"
DISCARD = 9


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with outer addresses; B has the endpoint of A."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24")
    direct.b.set_peer(direct.pub_a, endpoint=Endpoint("10.0.0.1", 1))
    return direct


@pytest.mark.requirement("RT-08")
def test_learned_endpoint_survives_link_down_and_up(connected: Tunnel) -> None:
    connected.must_ping("ns2", V4_OF_A)
    assert connected.seen_by_a().endpoint == Endpoint("10.0.0.2", 2)
    for up in (False, True):
        connected.nodes["ns1"].set_link("wg0", up=up)
        assert connected.seen_by_a().endpoint == Endpoint("10.0.0.2", 2)
    connected.a.up()
    connected.must_ping("ns1", V4_OF_B)


@pytest.mark.requirement("RT-20")
def test_peers_at_same_address_keep_separate_endpoints(connected: Tunnel) -> None:
    ns2, key3 = connected.nodes["ns2"], connected.lab.key("key3")
    wg1 = connected.lab.interface("wg1", connected.b.manifest, ns2)
    a = PeerConfig(public_key=connected.pub_a, endpoint=Endpoint("10.0.0.1", 1), allowed_ips=allowed_ips("10.7.7.1/32"))
    wg1.set(DeviceConfig(private_key=key3, listen_port=3, peers=(a,)))
    wg1.up("10.7.7.3/24")
    connected.nodes["ns1"].add_address("wg0", "10.7.7.1/24")
    connected.a.set_peer(key3.public(), endpoint=Endpoint("10.0.0.2", 3), allowed_ips=allowed_ips("10.7.7.3/32"))
    for _ in range(3):
        connected.must_ping("ns1", "10.7.7.3")
        connected.must_ping("ns2", V4_OF_A)
    assert str(connected.seen_by_a().endpoint) == "10.0.0.2:2"
    assert str(connected.a.peer(key3.public()).endpoint) == "10.0.0.2:3"
    connected.a.set_peer(key3.public(), remove=True)
    connected.must_ping("ns1", V4_OF_B)


@pytest.mark.requirement("DT-27")
def test_packet_with_refused_inner_source_confirms_session(connected: Tunnel) -> None:
    ns1, ns2 = connected.nodes["ns1"], connected.nodes["ns2"]
    ns2.add_address("wg0", f"{OTHER_OF_B}/24")
    with Capture(ns1, "veth1") as from_a, Capture(ns2, "veth2") as from_b:
        udp_message(ns2, V4_OF_A, DISCARD, b"refused", source=OTHER_OF_B)
        confirmed = poll_until(lambda: connected.seen_by_a().latest_handshake, bool, 5.0)
        sent = [message for message in from_b.messages() if message.kind != INITIATION]
        assert confirmed, f"no packet of B confirmed the session at A; B sent {', '.join(map(str, sent))}"
        assert not any(message.is_keepalive for message in sent), "a keepalive may have confirmed the session"
        connected.must_ping("ns1", V4_OF_B)
        assert not from_a.messages(kind=INITIATION), "A initiated another session before it sent data"
