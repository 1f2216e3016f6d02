"""Changes in the midst of traffic: nothing crashes, and what is left works (`direct`)."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_A, V4_OF_B, DeviceConfig, Endpoint, PeerConfig, allowed_ips, let_pass

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from harness import NetNS, Tunnel

PORT = 1111
ROUNDS = 20
BREATH = 0.001
ENDPOINT_OF_A = Endpoint("10.0.0.1", 1)


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with a session; each knows where the other is."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.b.set_peer(direct.pub_a, endpoint=ENDPOINT_OF_A)
    direct.must_ping("ns1", V4_OF_B)
    return direct


@contextmanager
def traffic_both_ways(tunnel: Tunnel) -> Iterator[None]:
    """Datagrams in both directions, as many as one thread sends that leaves the others some time."""
    over = threading.Event()
    ends = [bound(tunnel.nodes["ns1"], V4_OF_B), bound(tunnel.nodes["ns2"], V4_OF_A)]

    def send() -> None:
        while not over.is_set():
            for end in ends:
                # The interface may be down, or gone.
                with suppress(OSError):
                    end.send(bytes(1000))
            let_pass(BREATH, "the programs and the test need some time, too")

    sender = threading.Thread(target=send, name="traffic")
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        for end in ends:
            end.close()


def bound(node: NetNS, address: str) -> socket.socket:
    """A socket that is there for what comes back, too: a closed port would answer each datagram."""
    made = node.socket(2, 2)
    made.bind(("", PORT))
    made.connect((address, PORT))
    return made


@pytest.mark.requirement("ROB-06")
def test_tunnel_survives_peer_key_and_link_changes_under_traffic(connected: Tunnel) -> None:
    other = connected.lab.key("other").public()
    with traffic_both_ways(connected):
        for number in range(ROUNDS):
            connected.a.set_peer(
                other, endpoint=Endpoint("10.0.0.2", 9), allowed_ips=allowed_ips(f"10.9.{number}.0/24")
            )
            connected.a.set_peer(connected.pub_b, allowed_ips=allowed_ips(f"10.8.{number}.0/24"))
            connected.a.set(DeviceConfig(private_key=connected.lab.key(f"key of round {number}")))
            connected.nodes["ns1"].set_link("wg0", up=number % 4 != 3)
            connected.a.set_peer(other, remove=True)
        connected.nodes["ns1"].set_link("wg0", up=True)
        connected.a.set(DeviceConfig(private_key=connected.key_a))
    connected.a.up()
    connected.must_ping("ns1", V4_OF_B)
    assert [peer.public_key for peer in connected.a.get().peers] == [connected.pub_b]


@pytest.mark.requirement("ROB-07")
def test_interface_is_deleted_under_traffic(connected: Tunnel) -> None:
    with traffic_both_ways(connected):
        connected.lab.end(connected.a)
        assert not connected.nodes["ns1"].has_link("wg0")
        connected.b.set_peer(connected.pub_a, persistent_keepalive=1)
    assert connected.seen_by_b().persistent_keepalive == 1


@pytest.mark.requirement("ROB-13")
def test_restarted_peer_resumes_at_once_when_it_initiates(connected: Tunnel) -> None:
    before, lab = connected.b.get(), connected.lab
    lab.end(connected.b)
    connected.b = lab.interface("wg0", connected.b.manifest, connected.nodes["ns2"])
    a = PeerConfig(
        public_key=connected.pub_a,
        preshared_key=connected.psk,
        endpoint=ENDPOINT_OF_A,
        allowed_ips=before.peer(connected.pub_a).allowed_ips,
    )
    connected.b.set(DeviceConfig(private_key=connected.key_b, listen_port=2, peers=(a,)))
    connected.b.up(f"{V4_OF_B}/24")
    connected.must_ping("ns2", V4_OF_A)
    connected.must_ping("ns1", V4_OF_B)
