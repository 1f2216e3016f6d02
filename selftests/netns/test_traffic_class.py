"""Check which bits of the traffic class pass between inner and outer headers (`direct`, `wired`)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    V6_OF_A,
    V6_OF_B,
    Datagram,
    Drop,
    Endpoint,
    differs,
    twin,
    udp_receiver,
    wait_for,
)
from harness.net.checksum import checksum
from harness.wire import frames
from harness.wire.messages import DATA, KEEPALIVE_SIZE, kind_of
from selftests.support.inner import Inside
from selftests.support.packets import ip_packet, udp
from selftests.support.peers import renew

if TYPE_CHECKING:
    from harness import NetNS, Tunnel, Wire

ETH_P_ALL = 3
IPV4_HEADER, IPV6_HEADER, UDP_HEADER = 20, 40, 8
PORT = 1111
DEADLINE = 5.0
ECN = 0b11
# EF with each ECN, CE alone, and every bit of the DSCP.
MARKS = (0xB8, 0xB9, 0xBA, 0xBB, 0x03, 0xFC)
# Inner ECN to outer ECN (DT-28); (outer, inner) to the ECN that is delivered, where that is not the inner one (DT-29).
ENCAPSULATED = {0: 0, 1: 1, 2: 2, 3: 2}
DECAPSULATED = {(1, 2): 1, (3, 1): 3, (3, 2): 3}
UDP_SEGMENT = 103
SEGMENT, SEGMENTS = 200, 40
FAMILIES = [pytest.param(V4_OF_A, V4_OF_B, id="inner-v4"), pytest.param(V6_OF_A, V6_OF_B, id="inner-v6")]


def traffic_class(packet: bytes) -> int:
    """Return the TOS or the traffic class of an IP packet."""
    return packet[1] if packet[0] >> 4 == 4 else int.from_bytes(packet[:2]) >> 4 & 0xFF


def outbound(wire: socket.socket) -> list[int]:
    """Take what A has sent from a packet socket; returns the traffic classes of data messages, without keepalives."""
    classes: list[int] = []
    while True:
        try:
            packet, address = wire.recvfrom(1 << 17)
        except BlockingIOError:
            return classes
        payload = packet[(IPV4_HEADER if packet[0] >> 4 == 4 else IPV6_HEADER) + UDP_HEADER :]
        if address[2] == socket.PACKET_OUTGOING and kind_of(payload) == DATA and len(payload) > KEEPALIVE_SIZE:
            classes.append(traffic_class(packet))


def tap(node: NetNS, device: str) -> socket.socket:
    """Open a packet socket on a link."""
    wire = node.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    wire.bind((device, ETH_P_ALL))
    wire.setblocking(False)
    return wire


def connect(direct: Tunnel, host: str = "10.0.0.2") -> None:
    """Give both nodes outer addresses, A the endpoint of B, and both a session."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    renew(direct.a, direct.pub_b, endpoint=Endpoint(host, 2))
    direct.must_ping("ns1", V4_OF_B)


def outer_of_single(direct: Tunnel, source: str, address: str, mark: int) -> int:
    """Send one inner packet with this traffic class; returns that of the message."""
    packet = ip_packet(source, address, udp(PORT, PORT), tos=mark)
    with tap(direct.nodes["ns1"], "veth1") as wire, Inside(direct.nodes["ns1"]) as at_a:
        with udp_receiver(direct.nodes["ns2"], "::", PORT), Inside(direct.nodes["ns2"]) as at_b:
            at_a.send(packet)
            at_b.wait_for(packet, DEADLINE, "the packet at B")
        (outer,) = outbound(wire)
    return outer


@pytest.mark.requirement("DT-30")
@pytest.mark.bug("IB-81")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("host", ["10.0.0.2", "fd00:aa::2"], ids=["outer-v4", "outer-v6"])
@pytest.mark.parametrize(("source", "address"), FAMILIES)
def test_inner_dscp_is_not_copied_to_outer_header(direct: Tunnel, host: str, source: str, address: str) -> None:
    connect(direct, host)
    outer = {mark: outer_of_single(direct, source, address, mark) for mark in MARKS}
    shown = {f"{mark:#04x}": f"{seen:#04x}" for mark, seen in outer.items() if seen & ~ECN}
    assert not shown, f"outer traffic classes that show the inner DSCP, by inner traffic class: {shown}"


@pytest.mark.requirement("DT-30")
@pytest.mark.bug("IB-81")
@pytest.mark.parametrize("address", [V4_OF_B, V6_OF_B], ids=["inner-v4", "inner-v6"])
def test_inner_dscp_of_batch_is_not_copied_to_outer_header(direct: Tunnel, address: str) -> None:
    connect(direct)
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    is_v6 = ":" in address
    with (
        udp_receiver(ns2, address, PORT) as receiver,
        ns1.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM) as sender,
        tap(ns1, "veth1") as wire,
    ):
        sender.connect((address, PORT))
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT)
        for mark in MARKS:
            if is_v6:
                sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, mark)
            else:
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, mark)
            sender.send(bytes(SEGMENT * SEGMENTS))
            for _ in range(SEGMENTS):
                wait_for(Datagram(receiver), DEADLINE, f"{SEGMENTS} datagrams of traffic class {mark:#04x}")
            classes = outbound(wire)
            assert classes, "the test proved nothing: A sent no data message"
            shown = {f"{seen:#04x}" for seen in classes if seen & ~ECN}
            assert not shown, f"outer traffic classes that show the inner DSCP of {mark:#04x}: {shown}"


@pytest.mark.requirement("DT-28")
@pytest.mark.parametrize(("source", "address"), FAMILIES)
def test_outer_ecn_is_inner_one_without_congestion(direct: Tunnel, source: str, address: str) -> None:
    connect(direct)
    outer = {ecn: outer_of_single(direct, source, address, ecn) for ecn in ENCAPSULATED}
    if outer != ENCAPSULATED:
        differs(f"by inner ECN 0 to 3 the outer one is {list(outer.values())}", by=[direct.a.manifest.name])


@pytest.mark.requirement("DT-29")
@pytest.mark.parametrize(("source", "address"), FAMILIES)
def test_outer_congestion_is_passed_to_inner_packet(wired: Tunnel, wire: Wire, source: str, address: str) -> None:
    pairs = [(outer, inner) for outer in range(4) for inner in range(4)]
    wired.must_ping("ns1", V4_OF_B)
    wire.apply(Drop(message="data", sender="ns1"))
    packets = [ip_packet(source, address, udp(PORT + number, PORT), tos=pair[1]) for number, pair in enumerate(pairs)]
    with Inside(wired.nodes["ns1"]) as at_a, Inside(wired.nodes["ns2"]) as at_b:
        for packet in packets:
            at_a.send(packet)
        wire.wait_for("data", "A's messages", sender="ns1", nth=len(pairs))
        held = [s.frame for s in wire.sightings("data", sender="ns1")]
        marker = ip_packet(source, address, udp(PORT, PORT, b"the last"))
        wire.apply()
        for (outer, _), frame in zip(pairs, held, strict=True):
            wire.inject(with_ecn(frame, outer), sender="ns1")
        with twin("an inner packet is delivered after these"):
            at_a.send(marker)
            arrived = at_b.wait_for(marker, DEADLINE, "the last packet at B")
    assert len(arrived) == len(pairs), f"of {len(pairs)} packets with any outer ECN, {len(arrived)} were delivered"
    seen = {pair: traffic_class(packet) for pair, packet in zip(pairs, arrived, strict=True)}
    expected = {pair: DECAPSULATED.get(pair, pair[1]) for pair in pairs}
    if seen != expected:
        wrong = {pair: ecn for pair, ecn in seen.items() if ecn != expected[pair]}
        differs(f"ECN delivered by (outer, inner): {wrong}", by=[wired.b.manifest.name])


def with_ecn(frame: bytes, ecn: int) -> bytes:
    """Return the frame with this ECN in its IPv4 header."""
    datagram = frames.udp(frame)
    assert datagram is not None
    header = bytearray(frame[datagram.network : datagram.start])
    header[1] = header[1] & ~ECN | ecn
    header[10:12] = bytes(2)
    header[10:12] = checksum(bytes(header)).to_bytes(2)
    return frame[: datagram.network] + bytes(header) + frame[datagram.start :]
