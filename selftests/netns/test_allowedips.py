"""Crypto-key routing: an inner source address belongs to one peer (topology `loopback`)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness import traffic
from harness.control.records import DeviceConfig, Endpoint, allowed_ips
from harness.errors import DeadlineExceeded
from harness.tunnel import V4_OF_A, V4_OF_B
from harness.wait import Datagram, wait_for

if TYPE_CHECKING:
    import socket

    from harness.tunnel import Tunnel

PORT = 1111


@pytest.mark.scenario("N15")
@pytest.mark.requirement("AIP-02", "AIP-03", "RT-03")
@pytest.mark.capability("ipv6-underlay", "listen-port-change")
def test_inner_source_of_another_peer_is_refused_and_the_endpoint_learned(loopback: Tunnel) -> None:
    a, b = loopback.a, loopback.b
    a.set_peer(
        loopback.pub_b,
        endpoint=Endpoint.parse("[::1]:2"),
        replace_allowed_ips=True,
        allowed_ips=allowed_ips("192.168.241.0/24"),
    )
    b.set_peer(loopback.pub_a, endpoint=Endpoint.parse("[::1]:1"))
    stranger = loopback.lab.key("key3").public()
    with traffic.udp_receiver(loopback.nodes["ns1"], V4_OF_A, PORT) as receiver:
        traffic.udp_message(loopback.nodes["ns2"], V4_OF_A, PORT, b"mine")
        wait_for(Datagram(receiver), 2.0, "the datagram from an address that is B's")
        a.set_peer(stranger, allowed_ips=allowed_ips(f"{V4_OF_B}/32"))
        b.set(DeviceConfig(listen_port=9997))
        traffic.udp_message(loopback.nodes["ns2"], V4_OF_A, PORT, b"not mine")
        let_in = arrives(receiver, 1.0)
        assert not let_in, f"A let a datagram in whose source, {V4_OF_B}, is another peer's allowed ip"
    a.set_peer(stranger, remove=True)
    assert str(loopback.seen_by_a().endpoint) == "[::1]:9997"


def arrives(receiver: socket.socket, seconds: float) -> bool:
    """Whether a datagram comes within so many seconds."""
    with suppress(DeadlineExceeded):
        return bool(wait_for(Datagram(receiver), seconds, "a datagram"))
    return False
