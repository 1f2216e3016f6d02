"""Check message overhead, fragments, and errors for packets that are too long (`direct`)."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness import (
    DATA,
    V4_OF_A,
    V4_OF_B,
    V6_OF_B,
    Capture,
    Datagram,
    DeadlineExceeded,
    Endpoint,
    add_veth,
    error_for,
    ping,
    poll_until,
    tcp_stream,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.traffic.icmp_errors import Error

if TYPE_CHECKING:
    from harness import NetNS, Tunnel

OUTER = [pytest.param("10.0.0.2", 20, id="over-v4"), pytest.param("fd00:aa::2", 40, id="over-v6")]
MTU = 1420
UDP = 8
MESSAGE = 32
DEADLINE = 5.0
AT_ONCE = 1.0
# UDP payload over IPv4, and what an inner packet may have of it: a multiple of 16.
LONGEST_OUTSIDE = 65507
LONGEST_INSIDE = (LONGEST_OUTSIDE - MESSAGE) // 16 * 16
NARROW = 1280
UDP_SEGMENT = 103
# Datagrams of one batch, and the bytes of each.
BATCH, BATCHED = 10, 1300
# Seconds for a TCP stream of 1 MiB, if it takes less than a third of that without the narrow link.
PATIENCE = 10.0


def connect(direct: Tunnel, host: str = "10.0.0.2") -> None:
    """Give both nodes outer addresses, and A the endpoint of B."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint(host, 2))


@pytest.mark.requirement("MTU-02", "MTU-14")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize(("host", "header"), OUTER)
def test_encapsulation_adds_60_bytes_over_ipv4_and_80_over_ipv6(direct: Tunnel, host: str, header: int) -> None:
    connect(direct, host)
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    with Capture(ns1, "veth1") as wire, udp_receiver(ns2, V4_OF_B, 1111) as receiver:
        for inner, outer in ((1280, 1320 + header), (MTU, 1460 + header)):
            udp_message(ns1, V4_OF_B, 1111, bytes(inner - 20 - UDP))
            wait_for(Datagram(receiver), DEADLINE, f"the packet of {inner} bytes")
            lengths = [len(message.payload) + UDP + header for message in wire.messages(kind=DATA)]
            assert lengths[-1] == outer, f"a packet of {inner} bytes made a datagram of {lengths[-1]}, not {outer}"
    # The stack of the sender refuses the packet; no program gets it.
    send_errno, error = error_for(ns1, V4_OF_B, size=MTU + 1 - 20 - UDP)
    assert (send_errno, error.errno, error.information) == (errno.EMSGSIZE, errno.EMSGSIZE, MTU)


@pytest.mark.requirement("MTU-08")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize(("host", "header"), OUTER)
def test_packets_longer_than_path_mtu_arrive_in_fragments(direct: Tunnel, host: str, header: int) -> None:
    connect(direct, host)
    for node in direct.nodes.values():
        node.set_link("wg0", mtu=9000)
    device = "veth1"
    before = direct.nodes["ns1"].links()[device]["tx_bytes"]
    assert ping(direct.nodes["ns1"], V4_OF_B, size=8000).lost == 0, f"8000 bytes: no answer: {direct.diagnosis()}"
    sent = direct.nodes["ns1"].links()[device]["tx_bytes"] - before
    # A handshake, and six fragments with a header each where one datagram would have had one.
    assert sent > 8000 + 5 * header
    assert direct.nodes["ns1"].links()[device]["mtu"] == 1500


@pytest.mark.requirement("ROB-08")
def test_longest_datagrams_do_no_harm(direct: Tunnel) -> None:
    connect(direct)
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    direct.must_ping("ns1", V4_OF_B)
    for node in (ns1, ns2):
        node.set_link("wg0", mtu=LONGEST_INSIDE)
    with udp_receiver(ns1, "10.0.0.1", 9) as stranger:
        # 65 504 bytes outside: the inner packet, padded, and the header and tag of a message. It may be dropped.
        ping(ns1, V4_OF_B, size=LONGEST_INSIDE - 20 - UDP, timeout=AT_ONCE)
        ping(ns2, V4_OF_A, size=LONGEST_INSIDE - 20 - UDP, timeout=AT_ONCE)
        for kind in (0, 1, 2, 3, 4, 255):
            stranger.sendto(bytes([kind]).ljust(LONGEST_OUTSIDE, b"\0"), ("10.0.0.2", 2))
    for node in (ns1, ns2):
        node.set_link("wg0", mtu=MTU)
    direct.must_ping("ns1", V4_OF_B)
    direct.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("MTU-09", "MTU-10")
@pytest.mark.parametrize(
    ("address", "network", "too_big"),
    [pytest.param(V4_OF_B, "10.3.0.{}/24", (3, 4), id="v4"), pytest.param(V6_OF_B, "fd00:33::{}/96", (2, 0), id="v6")],
)
def test_oversized_forwarded_packet_gets_icmp_error_with_mtu(
    direct: Tunnel, address: str, network: str, too_big: tuple[int, int]
) -> None:
    ns1, ns3 = direct.nodes["ns1"], direct.lab.node("ns3")
    is_v6 = ":" in address
    ns1.sysctl("net.ipv6.conf.all.forwarding" if is_v6 else "net.ipv4.ip_forward", 1)
    add_veth(ns3, "veth5", ns1, "veth6")
    ns3.add_address("veth5", network.format(3))
    ns1.add_address("veth6", network.format(1))
    router = network.format(1).partition("/")[0]
    ns3.add_route(f"{address}/{128 if is_v6 else 32}", via=router)
    send_errno, error = error_for(ns3, address, size=MTU + 1 - (40 if is_v6 else 20) - UDP)
    assert (send_errno, error) == (0, Error(errno.EMSGSIZE, too_big, router, MTU))


@pytest.mark.bug("IB-71")
@pytest.mark.requirement("MTU-08")
@pytest.mark.capability("ipv6-underlay", "update-peer")
@pytest.mark.parametrize(("host", "header"), OUTER)
def test_batch_longer_than_path_mtu_arrives_whole(direct: Tunnel, host: str, header: int) -> None:
    connect(direct, host)
    direct.must_ping("ns1", V4_OF_B)
    rate = tcp_stream(direct.nodes["ns1"], direct.nodes["ns2"], V4_OF_B)
    narrow(direct)
    for sender, receiver, address in (("ns1", "ns2", V4_OF_B), ("ns2", "ns1", V4_OF_A)):
        name = (direct.a if sender == "ns1" else direct.b).manifest.name
        arrived = send_batch(direct.nodes[sender], direct.nodes[receiver], address)
        size = BATCHED + 20 + UDP + MESSAGE + header + UDP
        assert arrived == BATCH, (
            f"{name} sent {arrived} of a batch of {BATCH} as datagrams of {size} bytes, MTU {NARROW}"
        )
    tcp_stream(direct.nodes["ns1"], direct.nodes["ns2"], V4_OF_B, deadline=max(3 * (1 << 20) / rate, PATIENCE))


def narrow(direct: Tunnel) -> None:
    """Set both ends of the link to the smallest MTU of IPv6."""
    direct.nodes["ns1"].set_link("veth1", mtu=NARROW)
    direct.nodes["ns2"].set_link("veth2", mtu=NARROW)


def send_batch(sender: NetNS, receiver: NetNS, address: str) -> int:
    """Send datagrams by one system call (UDP_SEGMENT, udp(7)); returns how many arrive."""
    numbers = [bytes([number]) for number in range(BATCH)]
    with udp_receiver(receiver, address, 1111) as arrivals, sender.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, BATCHED)
        sock.sendto(b"".join(number.ljust(BATCHED, b"\0") for number in numbers), (address, 1111))
        missing = set(numbers)
        with suppress(DeadlineExceeded):
            while missing:
                data, _ = wait_for(Datagram(arrivals), DEADLINE, "a datagram of the batch")
                missing.discard(data[:1])
    return BATCH - len(missing)


@pytest.mark.bug("IB-84")
@pytest.mark.requirement("MTU-08")
@pytest.mark.capability("ipv6-underlay", "update-peer")
@pytest.mark.parametrize(
    ("network", "length"), [pytest.param("10.{}.0.{}", 24, id="over-v4"), pytest.param("fd00:{}::{}", 64, id="over-v6")]
)
def test_narrow_path_behind_router_costs_one_datagram(direct: Tunnel, network: str, length: int) -> None:
    ns1, ns2, router = direct.nodes["ns1"], direct.nodes["ns2"], direct.lab.node("ns3")
    router.sysctl("net.ipv6.conf.all.forwarding" if ":" in network else "net.ipv4.ip_forward", 1)
    for number, (node, device) in enumerate(((ns1, "veth5"), (ns2, "veth6")), start=1):
        add_veth(node, device, router, f"to{number}")
        node.add_address(device, f"{network.format(number, 9)}/{length}")
        router.add_address(f"to{number}", f"{network.format(number, 1)}/{length}")
        node.add_route(f"{network.format(3 - number, 9)}/{128 if length > 32 else 32}", via=network.format(number, 1))
    # New links of a busy machine lose what comes first, and an initiation is repeated after five seconds only.
    is_there = poll_until(
        lambda: ping(ns1, network.format(2, 9)).lost == 0, bool, 10.0, what="a way through the router"
    )
    assert is_there, "the router forwards nothing"
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint(network.format(2, 9), 2))
    direct.must_ping("ns1", V4_OF_B)
    router.set_link("to2", mtu=NARROW)
    ns2.set_link("veth6", mtu=NARROW)
    lost = [ping(ns1, V4_OF_B, size=MTU - 28).lost for _ in range(5)]
    assert sum(lost) <= 1, f"behind a router with MTU {NARROW} {sum(lost)} of 5 packets were lost: {direct.diagnosis()}"
