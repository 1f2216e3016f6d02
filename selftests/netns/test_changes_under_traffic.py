"""Change peers, keys and links under traffic; the tunnel works afterwards (`direct`)."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from harness import (
    DATA,
    INITIATION,
    RESPONSE,
    V4_OF_A,
    V4_OF_B,
    Capture,
    DeviceConfig,
    Endpoint,
    PeerConfig,
    allowed_ips,
    let_pass,
    ping,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from harness import NetNS, Tunnel

PORT = 1111
ROUNDS = 20
SEND_INTERVAL = 0.001
ENDPOINT_OF_A = Endpoint("10.0.0.1", 1)
# ns between two initiations of A, within which B may refuse the second one. HS-12 says 20 ms, measured at B; a busy
# machine delays datagrams on the way.
TOO_EARLY = 100_000_000


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with a session; each side has the endpoint of the other."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.b.set_peer(direct.pub_a, endpoint=ENDPOINT_OF_A)
    direct.must_ping("ns1", V4_OF_B)
    return direct


@contextmanager
def traffic_both_ways(tunnel: Tunnel) -> Iterator[None]:
    """Send datagrams in both directions from a thread, 1 ms apart, while the block runs."""
    over = threading.Event()
    ends = [bound(tunnel.nodes["ns1"], V4_OF_B), bound(tunnel.nodes["ns2"], V4_OF_A)]

    def send() -> None:
        while not over.is_set():
            for end in ends:
                # The interface may be down, or gone.
                with suppress(OSError):
                    end.send(bytes(1000))
            let_pass(SEND_INTERVAL, "the programs and the test need CPU time too")

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
    """Return a bound socket: a closed port would answer each datagram by an ICMP error."""
    sock = node.socket(2, 2)
    sock.bind(("", PORT))
    sock.connect((address, PORT))
    return sock


def change_under_traffic(tunnel: Tunnel) -> None:
    """Change A's peers, prefixes, key and link under traffic, and restore key and link at the end."""
    other = tunnel.lab.key("other").public()
    with traffic_both_ways(tunnel):
        for number in range(ROUNDS):
            tunnel.a.set_peer(other, endpoint=Endpoint("10.0.0.2", 9), allowed_ips=allowed_ips(f"10.9.{number}.0/24"))
            tunnel.a.set_peer(tunnel.pub_b, allowed_ips=allowed_ips(f"10.8.{number}.0/24"))
            tunnel.a.set(DeviceConfig(private_key=tunnel.lab.key(f"key of round {number}")))
            tunnel.nodes["ns1"].set_link("wg0", up=number % 4 != 3)
            tunnel.a.set_peer(other, remove=True)
        tunnel.nodes["ns1"].set_link("wg0", up=True)
        tunnel.a.set(DeviceConfig(private_key=tunnel.key_a))


def session_of_replaced_initiation(by_a: Capture, by_b: Capture) -> bytes | None:
    """Return B's index of the session for an initiation that A replaced too early; None if there is none.

    A new key lifts the rule of one initiation in 5 s (`wg_noise_expire_current_peer_keypairs`). The driver and
    wireguard-go may have begun an initiation then. It leaves with the new key, and the next packet causes another one.
    B refuses the second: its timestamp is not greater, or the first is less than 20 ms old (HS-08, HS-12).
    """
    sessions = {response.payload[8:12]: response.payload[4:8] for response in by_b.messages(kind=RESPONSE)}
    replaced = (
        sessions.get(first.payload[4:8])
        for first, second in pairwise(by_a.messages(kind=INITIATION))
        if second.payload[4:8] not in sessions and second.time - first.time < TOO_EARLY
    )
    return next(filter(None, replaced), None)


@pytest.mark.requirement("ROB-06")
def test_tunnel_survives_peer_key_and_link_changes_under_traffic(connected: Tunnel) -> None:
    with Capture(connected.nodes["ns1"], "veth1") as by_a, Capture(connected.nodes["ns2"], "veth2") as by_b:
        change_under_traffic(connected)
        connected.a.up()
        ping_start = time.time_ns()
        if ping(connected.nodes["ns1"], V4_OF_B).lost:
            session = session_of_replaced_initiation(by_a, by_b)
            assert session, f"no answer, and B has not refused an initiation as too early; {connected.diagnosis()}"
            used = [m for m in by_a.messages(kind=DATA) if m.time > ping_start and m.payload[4:8] == session]
            assert not used, "A has taken the response to an initiation that it had replaced"
            # A initiates for the third time while this ping waits: 5 s after the second (TM-01).
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
