"""Send bursts: packets keep order, and an unreachable peer delays no other (`direct`)."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from harness import (
    DATA,
    V4_OF_A,
    V4_OF_B,
    Capture,
    Datagram,
    DeadlineExceeded,
    Endpoint,
    allowed_ips,
    ping,
    poll_until,
    set_offloads,
    udp_receiver,
    wait_for,
)
from harness.net.netns import enlarge_receive_buffer
from harness.traffic.ping import PING_TIMEOUT

if TYPE_CHECKING:
    from harness import NetNS, Tunnel

PORT = 1111
BURST = 400
# Datagrams that must arrive: a program may drop some of a burst, but a few arrivals prove nothing about order.
ENOUGH = 100
QUIET = 0.5
OVERLOAD, SIZE = 1000, 1200
# Datagrams: twice the length of the driver's queues.
CARRIED = 2 * 1024
PATIENCE = 5.0
# Lengths of the datagrams of a batch: what a program may join for UDP_SEGMENT, and what it must not. The default
# receive buffer of a socket (208 KiB) holds all of a batch, if the other program does not read meanwhile.
BATCHES = {
    "equal": (1000,) * 60,
    "short-tail": (*(1000,) * 60, 300),
    "alternating": (100, 1392) * 30,
    "ascending": tuple(range(4, 1204, 20)),
    "descending": tuple(range(1200, 0, -20)),
    "smallest": (4,) * 60,
}


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with a session."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    direct.must_ping("ns1", V4_OF_B)
    return direct


def sender_in(node: NetNS, address: str) -> socket.socket:
    """Return a bound socket: a closed port would answer each datagram by an ICMP error."""
    sender = node.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind(("", PORT))
    sender.connect((address, PORT))
    return sender


@pytest.mark.requirement("Q-04", "Q-05")
def test_burst_is_sent_and_delivered_in_order(connected: Tunnel) -> None:
    ns1, ns2 = connected.nodes["ns1"], connected.nodes["ns2"]
    with (
        Capture(ns1, "veth1") as wire,
        udp_receiver(ns2, V4_OF_B, PORT) as receiver,
        sender_in(ns1, V4_OF_B) as sender,
    ):
        for number in range(BURST):
            sender.send(struct.pack("=I", number))
        arrived = numbers(sender, receiver)
        counters = [struct.unpack_from("<Q", m.payload, 8)[0] for m in wire.messages(kind=DATA)]
    assert len(arrived) > ENOUGH, f"of {BURST} datagrams only {len(arrived)} arrived"
    assert all(a < b for a, b in pairwise(counters)), "messages left in another order than their counters"
    assert all(a < b for a, b in pairwise(arrived)), "datagrams were delivered in another order"


def numbers(sender: socket.socket, receiver: socket.socket) -> list[int]:
    """Return the numbers of a burst that arrive before a later datagram, which is sent until it arrives."""
    arrived: list[int] = []
    for _ in range(round(PATIENCE / QUIET)):
        sender.send(struct.pack("=I", BURST))
        with suppress(DeadlineExceeded):
            while BURST not in arrived:
                data, _ = wait_for(Datagram(receiver), QUIET, "another datagram")
                arrived += struct.unpack("=I", data)
        if BURST in arrived:
            break
    return [number for number in arrived if number < BURST]


@pytest.mark.requirement("Q-07")
def test_unreachable_peer_does_not_delay_other_peer(connected: Tunnel) -> None:
    ns1 = connected.nodes["ns1"]
    dead = connected.lab.key("dead").public()
    connected.a.set_peer(dead, endpoint=Endpoint("10.0.0.99", 99), allowed_ips=allowed_ips("192.168.241.99/32"))
    with sender_in(ns1, "192.168.241.99") as sender:
        for _ in range(10):
            for _ in range(BURST):
                sender.send(bytes(1000))
            connected.must_ping("ns1", V4_OF_B)
    assert connected.a.peer(dead).latest_handshake == 0


@pytest.mark.requirement("Q-06")
def test_tunnel_recovers_from_overload_within_ping_timeout(connected: Tunnel) -> None:
    ns1, ns2 = connected.nodes["ns1"], connected.nodes["ns2"]
    before = (connected.seen_by_a(), connected.seen_by_b())
    with sender_in(ns1, V4_OF_B) as there, sender_in(ns2, V4_OF_A) as back:

        def overload() -> int:
            for _ in range(OVERLOAD):
                there.send(bytes(SIZE))
                back.send(bytes(SIZE))
            now = (connected.seen_by_a(), connected.seen_by_b())
            return min(new.tx_bytes - old.tx_bytes for old, new in zip(before, now, strict=True))

        carried = poll_until(overload, lambda sent: sent > CARRIED * SIZE, 10.0)
    assert carried > CARRIED * SIZE, f"only {carried} bytes were carried under load"
    # Queues may drain while one ping waits; the next one must be answered in time.
    poll_until(lambda: ping(ns1, V4_OF_B, timeout=QUIET).answered, bool, deadline=PING_TIMEOUT)
    connected.must_ping("ns1", V4_OF_B)
    connected.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("Q-04", "Q-05", "DT-01")
@pytest.mark.bug("IB-58")
@pytest.mark.parametrize("offload", [True, False], ids=["tx-offload", "no-tx-offload"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_each_packet_of_batch_leaves_once_and_unchanged(
    connected: Tunnel, lengths: tuple[int, ...], offload: bool
) -> None:
    ns1, ns2 = connected.nodes["ns1"], connected.nodes["ns2"]
    if not offload:
        set_offloads(ns1, "veth1", tx=False)
        set_offloads(ns2, "veth2", tx=False)
    payloads = [
        struct.pack(">HH", number, length).ljust(length, bytes([number & 0xFF]))
        for number, length in enumerate(lengths)
    ]
    with (
        Capture(ns1, "veth1") as wire,
        udp_receiver(ns2, V4_OF_B, PORT) as receiver,
        sender_in(ns1, V4_OF_B) as sender,
    ):
        enlarge_receive_buffer(receiver, 8 << 20)
        for payload in payloads:
            sender.send(payload)
        arrived = [wait_for(Datagram(receiver), PATIENCE, f"{len(payloads)} datagrams")[0] for _ in payloads]
        sent = [struct.unpack_from("<Q", m.payload, 8)[0] for m in wire.messages(kind=DATA, port=1)]
    assert [len(data) for data in arrived] == list(lengths), "datagrams arrived with other lengths than they were sent"
    assert arrived == payloads, "datagrams arrived changed, or in another order"
    assert len(sent) >= len(payloads), f"{len(payloads)} packets left in {len(sent)} data messages"
    assert sent == list(range(sent[0], sent[0] + len(sent))), f"A's counters are not consecutive: {sent}"
