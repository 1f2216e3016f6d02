"""Learn, set and lose endpoints, routes and uplinks while a session goes on (`wired`, `direct`)."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from operator import eq
from typing import TYPE_CHECKING

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    Datagram,
    DeviceConfig,
    Drop,
    Endpoint,
    UdpStream,
    add_veth,
    let_pass,
    ping,
    poll_until,
    twin,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.net.checksum import checksum
from harness.wire import frames
from selftests.support.peers import renew

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import NetNS, Sighting, Tunnel, Wire

PORT = 1111
AT_ONCE = 5.0
# Bytes of a datagram that does not fit into the 1280 bytes which a forged "packet too big" names.
LONG = 1300
# Seconds for two retries of an initiation, with reserve for a busy machine.
RETRIED = 12.0
# Seconds within which a client must have changed to its other uplink (one dead-peer detection and a retry).
OTHER_UPLINK = 21.0
OUTAGE = 1.5
MARK = 0xCA6C
WATCHING = f"""\
table inet watching {{
    chain output {{
        type filter hook output priority 0
        oifname "veth1" udp dport 2 meta mark {MARK} counter comment "marked"
        oifname "veth1" udp dport 2 meta mark 0 counter comment "unmarked"
    }}
}}
"""
# How an outage of A's underlay begins and ends: sendto(2) fails with ENETUNREACH or EPERM, or the link drops datagrams.
# Without its route alone, a program that names the interface of its datagrams still sends them.
OUTAGES: dict[str, tuple[Callable[[NetNS], None], Callable[[NetNS], None]]] = {
    "no-address": (
        lambda node: node.delete_address("veth1", "192.168.1.1/24"),
        lambda node: node.add_address("veth1", "192.168.1.1/24"),
    ),
    "refused": (
        lambda node: node.nft(
            "table inet cut {\nchain output {\ntype filter hook output priority 0\nudp dport 2 drop\n}\n}\n"
        ),
        lambda node: node.nft("delete table inet cut"),
    ),
    "link-down": (
        lambda node: node.set_link("veth1", up=False),
        lambda node: node.set_link("veth1", up=True),
    ),
}
# ICMP and ICMPv6 errors about a datagram: (type, code, the 4 bytes behind the checksum).
ERRORS_V4 = (
    *((3, code, b"\0\0\0\0") for code in (0, 1, 2, 3, 9, 10, 13)), (3, 4, struct.pack(">HH", 0, 1280)),
    (11, 0, b"\0\0\0\0"), (12, 0, b"\0\0\0\0"), (4, 0, b"\0\0\0\0"),
)  # fmt: skip
ERRORS_V6 = (
    *((1, code, b"\0\0\0\0") for code in (0, 1, 3, 4)), (2, 0, struct.pack(">L", 1280)), (3, 0, b"\0\0\0\0"),
    (4, 0, b"\0\0\0\0"),
)  # fmt: skip


# Endpoints


@pytest.mark.requirement("RT-01")
@pytest.mark.capability("roaming")
def test_endpoint_is_learned_from_initiation_alone(wired: Tunnel, wire: Wire) -> None:
    renew(wired.b, wired.pub_a, endpoint=None)
    assert wired.seen_by_b().endpoint is None
    # Nothing but initiations reaches B, so the session is never confirmed.
    wire.apply(Drop(message="transport"))
    for port in (1, 7001):
        if port != 1:
            wired.a.set(DeviceConfig(listen_port=port))
            renew(wired.a, wired.pub_b)
            let_pass(0.1, "B refuses a second initiation within 20 ms, and timestamps are coarse")
        udp_message(wired.nodes["ns1"], V4_OF_B, PORT, b"initiate")
        expected = Endpoint("192.168.1.1", port)
        seen = poll_until(lambda: wired.seen_by_b().endpoint, partial(eq, expected), AT_ONCE)
        assert seen == expected, f"A initiated from port {port}; B's endpoint for it is {seen}"
    # B may report the endpoint before A has received its response.
    wire.wait_for("transport", "A's first message of the session, which is lost", sender="ns1")
    assert not wire.sightings("transport", did="passed")


@pytest.mark.requirement("RT-10", "ERR-03")
def test_peer_without_endpoint_is_reachable_after_it_initiates(wired: Tunnel, wire: Wire) -> None:
    renew(wired.b, wired.pub_a, endpoint=None)
    with udp_receiver(wired.nodes["ns1"], V4_OF_A, PORT) as at_a:
        # The driver returns an error to a local sender.
        with suppress(OSError):
            udp_message(wired.nodes["ns2"], V4_OF_A, PORT, b"there is no endpoint")
        assert not wire.sightings(), "B sent to a peer without an endpoint"
        wired.must_ping("ns1", V4_OF_B)
        udp_message(wired.nodes["ns2"], V4_OF_A, PORT, b"now there is one")
        wait_for(Datagram(at_a, lambda data: data == b"now there is one"), AT_ONCE, "B's datagram at A")
    assert wire.sightings()[0].sender == "ns1", "B sent first, to a peer without an endpoint"


@pytest.mark.requirement("RT-09")
@pytest.mark.capability("update-peer")
def test_new_endpoint_applies_to_next_datagram_of_session(direct: Tunnel) -> None:
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    # The routed source is 10.0.0.1; B addresses A at 10.0.0.11, so A remembers that.
    ns1.add_address("veth1", "10.0.0.1/24", "10.0.0.11/24")
    ns2.add_address("veth2", "10.0.0.2/24", "10.0.0.22/24")
    direct.b.set_peer(direct.pub_a, endpoint=Endpoint("10.0.0.11", 1))
    direct.must_ping("ns2", V4_OF_A)
    with ns1.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire, udp_receiver(ns2, V4_OF_B, PORT) as at_b:
        wire.bind(("veth1", 3))
        direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.22", 2))
        udp_message(ns1, V4_OF_B, PORT, b"to the new endpoint")
        wait_for(Datagram(at_b), AT_ONCE, "A's datagram at B")
        packet, _ = wait_for(Datagram(wire, is_from_port_of_a), AT_ONCE, "A's message")
    source, destination = (socket.inet_ntoa(packet[start : start + 4]) for start in (12, 16))
    assert packet[28] == 4, f"A sent a message of type {packet[28]} in its session, not data"
    assert destination == "10.0.0.22", f"A's endpoint is set to 10.0.0.22, and it sends to {destination}"
    assert source == "10.0.0.1", f"A sends from {source}, which it remembers of the endpoint before"


def is_from_port_of_a(packet: bytes) -> bool:
    """Return whether this is an IPv4 packet with a UDP datagram from port 1."""
    return packet[0] == 0x45 and packet[9] == socket.IPPROTO_UDP and packet[20:22] == b"\0\1"


# ICMP errors about the outer datagrams


@pytest.mark.requirement("MTU-15")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("host", ["192.168.1.2", "fd00:aa::2"], ids=["v4", "v6"])
def test_forged_icmp_errors_do_not_disturb_session(wired: Tunnel, wire: Wire, host: str) -> None:
    renew(wired.a, wired.pub_b, endpoint=Endpoint(host, 2))
    wired.must_ping("ns1", V4_OF_B)
    endpoints = wired.seen_by_a().endpoint, wired.seen_by_b().endpoint
    with (
        UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B, size=LONG) as to_b,
        UdpStream(wired.nodes["ns2"], wired.nodes["ns1"], V4_OF_A, size=LONG) as to_a,
    ):
        sessions = wire.sightings()
        for error in ERRORS_V6 if ":" in host else ERRORS_V4:
            for sender, other in (("ns1", "ns2"), ("ns2", "ns1")):
                # About the latest datagram of each side, as a router would send it.
                about = next(s for s in reversed(wire.sightings("data")) if s.sender == sender)
                wire.inject(icmp_error(about, *error), sender=other)
            to_b.send(2)
            to_a.send(2)
            for stream, name in ((to_b, "A"), (to_a, "B")):
                arrived = poll_until(stream.arrivals, lambda so_far: so_far.lost == 0, AT_ONCE)
                assert arrived.lost == 0, f"{name} lost data after the ICMP error {error[:2]}: {arrived}"
    assert len(wire.sightings("handshake")) == 2, f"an ICMP error began a handshake: {wire.sightings('handshake')}"
    assert (wired.seen_by_a().endpoint, wired.seen_by_b().endpoint) == endpoints, "an ICMP error moved an endpoint"
    assert sessions


def icmp_error(about: Sighting, kind: int, code: int, rest: bytes) -> bytes:
    """Build the frame of an ICMP error about a frame, sent by the frame's destination."""
    datagram = frames.udp(about.frame)
    assert datagram is not None
    ethernet, quoted = about.frame[: datagram.network], about.frame[datagram.network : datagram.start + 8]
    turned = ethernet[6:12] + ethernet[:6] + ethernet[12:]
    source, destination = (ip_address(end[0]).packed for end in (about.message.destination, about.message.source))
    body = bytes([kind, code, 0, 0]) + rest + quoted
    if len(source) == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, socket.IPPROTO_ICMP, 0)
        header += source + destination
        header = header[:10] + checksum(header).to_bytes(2) + header[12:]
        value = checksum(body)
    else:
        header = struct.pack(">LHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 64) + source + destination
        value = checksum(source + destination + struct.pack(">LL", len(body), socket.IPPROTO_ICMPV6) + body)
    return turned + header + body[:2] + value.to_bytes(2) + body[4:]


@pytest.mark.requirement("MTU-15")
def test_port_unreachable_of_peer_does_not_end_session(wired: Tunnel, wire: Wire) -> None:
    ns1, ns2 = wired.nodes["ns1"], wired.nodes["ns2"]
    wired.must_ping("ns1", V4_OF_B)
    endpoint = wired.seen_by_a().endpoint
    wire.apply()
    # B's stack answers as if its port were closed.
    ns2.nft("table inet closed {\nchain input {\ntype filter hook input priority 0\n"
            'udp dport 2 counter reject with icmpx port-unreachable comment "refused"\n}\n}\n')  # fmt: skip
    for number in range(1, 6):
        udp_message(ns1, V4_OF_B, PORT, b"refused")
        wire.wait_for("data", "A's datagram", sender="ns1", nth=number)
    refused = poll_until(lambda: ns2.nft_counters()["refused"], lambda count: count >= 5, AT_ONCE)
    assert refused >= 5, f"the test proved nothing: B's stack refused {refused} datagrams"
    ns2.nft("delete table inet closed")
    wired.must_ping("ns1", V4_OF_B)
    assert not wire.sightings("handshake"), "A began another session because the port was unreachable"
    assert wired.seen_by_a().endpoint == endpoint


# Routes and uplinks


@pytest.mark.requirement("ERR-07")
def test_session_begins_once_route_to_endpoint_appears(wired: Tunnel, wire: Wire) -> None:
    ns1 = wired.nodes["ns1"]
    ns1.delete_route("192.168.1.0/24", dev="veth1")
    with udp_receiver(wired.nodes["ns2"], V4_OF_B, PORT) as at_b:
        udp_message(ns1, V4_OF_B, PORT, b"there is no route")
        let_pass(OUTAGE, "A's first initiation finds no route")
        assert not wire.sightings(), "the test proved nothing: A's initiation left"
        ns1.add_route("192.168.1.0/24", dev="veth1")
        data, _ = wait_for(Datagram(at_b), RETRIED, "A's datagram at B, after a retry")
    assert data == b"there is no route"
    sent = [s.message.name for s in wire.sightings() if s.message.name != "keepalive"]
    assert sent[:3] == ["initiation", "response", "data"], f"after the route appeared the two sides sent {sent}"


@pytest.mark.nightly
@pytest.mark.requirement("ERR-07", "TM-25")
@pytest.mark.bug("IB-16")
@pytest.mark.capability("persistent-keepalive")
@pytest.mark.parametrize("cut", sorted(OUTAGES))
def test_persistent_keepalives_resume_after_outage(wired: Tunnel, wire: Wire, cut: str) -> None:
    ns1 = wired.nodes["ns1"]
    wired.keep_alive(1)
    wired.must_ping("ns1", V4_OF_B)
    wire.wait_for("keepalive", "A's keepalive", sender="ns1", nth=2)
    begin, end = OUTAGES[cut]
    begin(ns1)
    wire.apply()
    let_pass(2 * OUTAGE, "three keepalives cannot be sent")
    assert not wire.sightings("any", sender="ns1"), "the test proved nothing: A's datagrams left"
    end(ns1)
    wire.wait_for("keepalive", "A's keepalives to resume", sender="ns1", nth=2, deadline=3.0)
    wired.must_ping("ns2", V4_OF_A)


@pytest.mark.requirement("RT-12", "RT-13")
@pytest.mark.bug("IB-36")
def test_tunnel_goes_on_by_second_uplink_when_first_is_lost(direct: Tunnel) -> None:
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    add_veth(ns1, "veth3", ns2, "veth4")
    for node, *devices in ((ns1, "veth1", "veth3"), (ns2, "veth2", "veth4")):
        for device in ("all", *devices):
            node.sysctl(f"net.ipv4.conf.{device}.rp_filter", 0)
    ns1.add_address("veth1", "10.1.0.1/24")
    ns1.add_address("veth3", "10.2.0.1/24")
    # B answers from the address that A sends to, whether or not it remembers that.
    ns2.add_address("veth2", "10.9.0.1/32", "10.1.0.2/32")
    ns2.add_address("veth4", "10.2.0.2/32")
    ns2.add_route("10.1.0.0/24", dev="veth2", src="10.9.0.1")
    ns2.add_route("10.2.0.0/24", dev="veth4", src="10.9.0.1")
    ns1.add_route("10.9.0.1/32", via="10.1.0.2", metric=100)
    ns1.add_route("10.9.0.1/32", via="10.2.0.2", metric=200)
    renew(direct.a, direct.pub_b, endpoint=Endpoint("10.9.0.1", 2))
    direct.must_ping("ns1", V4_OF_B)
    assert direct.seen_by_b().endpoint == Endpoint("10.1.0.1", 1)
    ns1.delete_address("veth1", "10.1.0.1/24")
    ns1.set_link("veth1", up=False)
    poll_until(lambda: ping(ns1, V4_OF_B, timeout=0.5).answered, bool, OTHER_UPLINK)
    with twin("the second uplink carries datagrams"):
        assert ping(ns1, "10.9.0.1").lost == 0
    direct.must_ping("ns1", V4_OF_B)
    seen = direct.seen_by_b().endpoint
    assert seen == Endpoint("10.2.0.1", 1), f"A has lost 10.1.0.1, and B's endpoint for it is {seen}"


# The mark


@pytest.mark.requirement("RT-17", "CFG-43")
@pytest.mark.bug("IB-62")
@pytest.mark.capability("fwmark", "ipv6-underlay", "listen-port-change")
@pytest.mark.parametrize("host", ["10.0.0.2", "fd00:aa::2"], ids=["v4", "v6"])
def test_fwmark_outlives_change_of_listen_port(direct: Tunnel, host: str) -> None:
    ns1 = direct.nodes["ns1"]
    ns1.add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    ns1.nft(WATCHING)
    direct.a.set(DeviceConfig(fwmark=MARK))
    assert direct.a.get().fwmark == MARK, f"given the mark {MARK:#x}, A reports {direct.a.get().fwmark:#x}"
    renew(direct.a, direct.pub_b, endpoint=Endpoint(host, 2))
    direct.must_ping("ns1", V4_OF_B)
    marked, unmarked = marks(direct)
    assert marked >= 2 > unmarked == 0, f"A's datagrams after the mark is set: {marked} marked, {unmarked} not"
    direct.a.set(DeviceConfig(listen_port=7002))
    direct.must_ping("ns1", V4_OF_B)
    renew(direct.a, direct.pub_b)
    direct.must_ping("ns1", V4_OF_B)
    assert marks(direct)[1] == 0, f"A's (marked, unmarked) datagrams after a change of its port: {marks(direct)}"
    direct.a.set(DeviceConfig(fwmark=0))
    before = marks(direct)
    direct.must_ping("ns1", V4_OF_B)
    after = marks(direct)
    assert after[0] == before[0] < before[0] + after[1], f"(marked, unmarked) {before}, then {after} without a mark"
    assert direct.a.get().fwmark == 0


def marks(direct: Tunnel) -> tuple[int, int]:
    """Return how many of A's datagrams had the mark, and how many had none."""
    counted = direct.nodes["ns1"].nft_counters()
    return counted["marked"], counted["unmarked"]
