"""Check cryptokey routing: an inner source address belongs to one peer (`loopback`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    Datagram,
    DeviceConfig,
    Endpoint,
    allowed_ips,
    poll_until,
    twin,
    udp_message,
    udp_receiver,
    wait_for,
)

if TYPE_CHECKING:
    from harness import Tunnel

PORT = 1111
NEIGHBOUR_OF_B = "192.168.241.3"
NOBODY = "127.0.0.1:9"
# Addresses of B: covered by the default route alone, and by another peer's prefix too.
ANYWHERE, OF_ANOTHER = ("198.51.100.7/32", "2001:db8:7::7/128"), ("203.0.113.7/32", "2001:db8:8::7/128")


@pytest.mark.core
@pytest.mark.scenario("N15")
@pytest.mark.requirement("AIP-02", "AIP-03", "RT-03")
@pytest.mark.bug("IB-40")
@pytest.mark.capability("ipv6-underlay", "listen-port-change")
def test_packet_with_foreign_source_is_dropped_but_sets_endpoint(loopback: Tunnel) -> None:
    a, b, ns2 = loopback.a, loopback.b, loopback.nodes["ns2"]
    a.set_peer(
        loopback.pub_b,
        endpoint=Endpoint.parse("[::1]:2"),
        replace_allowed_ips=True,
        allowed_ips=allowed_ips("192.168.241.0/24"),
    )
    b.set_peer(loopback.pub_a, endpoint=Endpoint.parse("[::1]:1"))
    ns2.add_address("wg0", f"{NEIGHBOUR_OF_B}/24")
    stranger = loopback.lab.key("key3").public()
    with udp_receiver(loopback.nodes["ns1"], V4_OF_A, PORT) as receiver:
        with twin("a datagram from this address is delivered while the address is B's"):
            udp_message(ns2, V4_OF_A, PORT, b"mine", source=V4_OF_B)
            wait_for(Datagram(receiver), 5.0, "the datagram from an address that is B's")
        a.set_peer(stranger, allowed_ips=allowed_ips(f"{V4_OF_B}/32"))
        b.set(DeviceConfig(listen_port=9997))
        udp_message(ns2, V4_OF_A, PORT, b"not mine", source=V4_OF_B)
        # The refused datagram was authentic, so A learns B's endpoint from it.
        seen = poll_until(
            lambda: loopback.seen_by_a().endpoint, lambda endpoint: endpoint == Endpoint.parse("[::1]:9997"), 1.0
        )
        assert str(seen) == "[::1]:9997", f"A's endpoint for B is {seen}, expected [::1]:9997"
        # Datagrams of one peer stay in order: if the refused one were delivered, it would arrive before this one.
        udp_message(ns2, V4_OF_A, PORT, b"mine too", source=NEIGHBOUR_OF_B)
        with twin("a datagram from another address of B is delivered"):
            data, (source, _) = wait_for(Datagram(receiver), 5.0, "a datagram from another address of B")
    assert data == b"mine too", f"A delivered a datagram whose source {source} is another peer's allowed ip"


@pytest.mark.core
@pytest.mark.requirement("AIP-06")
def test_longer_allowed_ip_wins_over_default_route_of_other_peer(loopback: Tunnel) -> None:
    ns1, ns2 = loopback.nodes["ns1"], loopback.nodes["ns2"]
    loopback.a.set_peer(loopback.pub_b, replace_allowed_ips=True, allowed_ips=allowed_ips("0.0.0.0/0", "::/0"))
    another = loopback.lab.key("key3").public()
    # Nothing listens there, but the driver refuses to send to a peer without an endpoint.
    loopback.a.set_peer(
        another, endpoint=Endpoint.parse(NOBODY), allowed_ips=allowed_ips("203.0.113.0/24", "2001:db8:8::/48")
    )
    for prefix in (*ANYWHERE, *OF_ANOTHER):
        ns2.add_address("wg0", prefix)
        ns1.add_route(prefix, dev="wg0")
    for anywhere, of_another in zip(ANYWHERE, OF_ANOTHER, strict=True):
        there, elsewhere = anywhere.partition("/")[0], of_another.partition("/")[0]
        with udp_receiver(ns2, "::", PORT) as receiver:
            udp_message(ns1, elsewhere, PORT, b"to another")
            udp_message(ns1, there, PORT, b"to B")
            data, _ = wait_for(Datagram(receiver), 5.0, f"the datagram to {there}")
        assert data == b"to B", f"B received the datagram for {elsewhere}, which another peer's prefix covers"
        loopback.must_ping("ns1", there)
