"""Check what a device delivers of authentic data: lengths, versions, padding, and the marks of the outer header."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness import (
    DATA,
    V4_OF_B,
    Capture,
    Data,
    Endpoint,
    Keepalive,
    differs,
    effort,
    poll_until,
    tcp_stream,
    twin,
)
from harness.scripted.packets import ip_packet
from harness.scripted.received import ReceivedData

if TYPE_CHECKING:
    from harness import ScriptedPeer, Session, Target, Tunnel

INNER4, INNER6 = "192.168.241.1", "fd00::1"
HEADER = {4: 20, 6: 40}
ETHERTYPE = {4: 0x0800, 6: 0x86DD}
NO_NEXT_HEADER = 59  # RFC 8200, 4.7
PORT = 1
# Bytes of a data message around its plaintext; the least number of full segments in a stream of 1 MiB.
HEADER_AND_TAG, FULL_SEGMENTS = 32, 100
# Lengths that end in a padding of 15 to 0 bytes, each with both families.
LENGTHS = range(41, 57)
# The outer ECN field, the inner one, and the inner one that RFC 6040 delivers where it differs (4.2, figure 4).
CHANGED_BY_ECN = {(1, 2): 1, (3, 1): 3, (3, 2): 3}


@pytest.fixture
def peer(target: Target) -> ScriptedPeer:
    """A peer of the device."""
    return target.peer()


@pytest.fixture
def session(peer: ScriptedPeer) -> Session:
    """A confirmed session of that peer."""
    return peer.connect()


def inner(peer: ScriptedPeer, family: int, length: int, tos: int = 0) -> bytes:
    """An inner UDP packet of this length from the peer to the device's node, to a port that is silent."""
    source, destination = (peer.inner4, INNER4) if family == 4 else (peer.inner6, INNER6)
    payload = bytes(i & 255 for i in range(length - HEADER[family] - 8))
    return ip_packet(source, destination, struct.pack(">HHHH", 9, 9, 8 + len(payload), 0) + payload, tos=tos)


def with_flow_label(packet: bytes) -> bytes:
    """The packet with a flow label that has bits in all its bytes, if it is IPv6."""
    return packet if packet[0] >> 4 == 4 else bytes([packet[0], packet[1] & 0xF0 | 0x0A]) + b"\xbc\xde" + packet[4:]


def without_traffic_class(packet: bytes) -> bytes:
    """The packet without its traffic class, and without an IPv4 header's checksum, which covers that."""
    if packet[0] >> 4 == 4:
        return packet[:1] + packet[2:10] + packet[12:]
    return bytes([packet[0] & 0xF0, packet[1] & 0x0F]) + packet[2:]


def with_length(packet: bytes, value: int) -> bytes:
    """The packet with another value in its length field, and a correct checksum of an IPv4 header."""
    if packet[0] >> 4 == 6:
        return packet[:4] + struct.pack(">H", value) + packet[6:]
    rebuilt = packet[:2] + struct.pack(">H", value) + packet[4:10] + b"\0\0" + packet[12:20]
    total = sum(struct.unpack(">10H", rebuilt))
    total = (total & 0xFFFF) + (total >> 16)
    return rebuilt[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + packet[12:]


def delivered(target: Target, peer: ScriptedPeer, session: Session, *plaintexts: bytes) -> list[bytes]:
    """Send data with these plaintexts, then a good packet; return what was delivered before that packet."""
    target.inside.forget()
    marker = inner(peer, 4, 100)
    for plaintext in plaintexts:
        peer.send(session.data(plaintext=plaintext))
    peer.send(session.data(marker))
    with twin("good data on the same session is delivered after it"):
        # A program that keeps the padding delivers more than the marker.
        target.inside.expect(lambda packet: packet.startswith(marker), what="good data that was sent afterwards")
    return target.inside.packets()[:-1]


@pytest.mark.requirement("MSG-14", "DT-22")
@pytest.mark.bug("IB-50")
@pytest.mark.parametrize("family", [4, 6])
def test_padding_of_any_length_and_content_is_removed(
    target: Target, peer: ScriptedPeer, session: Session, family: int
) -> None:
    packets = [inner(peer, family, HEADER[family] + 13)] * 8
    fillers = [b"", b"\0", bytes(8), bytes(15), bytes(16), bytes(500), b"\xff" * 40, b"\x45" * 17]
    plaintexts = [packet + filler for packet, filler in zip(packets, fillers, strict=True)]
    came = delivered(target, peer, session, *plaintexts)
    sizes = [len(packet) for packet in came]
    assert came == packets, (
        f"packets of {len(packets[0])} bytes behind fillers of several lengths were delivered as {sizes}"
    )


@pytest.mark.requirement("MSG-12")
@pytest.mark.bug("IB-50")
@pytest.mark.parametrize("family", [4, 6])
def test_sent_data_is_padded_by_zeros_to_multiple_of_16(target: Target, family: int) -> None:
    peer = target.peer(endpoint=True)
    session = peer.connect()
    wrong = {}
    for size in range(16):
        target.send(peer, bytes(size), family=family)
        data = peer.expect(Data, where=lambda data: bool(data.packet))
        assert data.session is session
        padded = -(-len(data.packet) // 16) * 16
        assert not any(data.plaintext[len(data.packet) :]), "the padding is not zero"
        if len(data.plaintext) != padded:
            wrong[len(data.packet)] = len(data.plaintext)
    if wrong:
        how = f"packets of these lengths were sealed as so many bytes: {wrong}"
        differs(how, by=[target.implementation.name])


@pytest.mark.requirement("CR-14")
def test_data_is_sealed_without_additional_data(target: Target) -> None:
    peer = target.peer(endpoint=True)
    session = peer.connect()
    target.send(peer, bytes(30), family=4)
    # A peer opens data without additional data, as the protocol demands.
    data = peer.expect(Data, where=lambda data: bool(data.packet))
    assert (data.session, data.counter) == (session, 0), "the device sealed its first data otherwise"


@pytest.mark.requirement("DT-23")
@pytest.mark.bug("IB-55")
@pytest.mark.parametrize("length", [0, 19, 49, 2000, 65535])
def test_inner_ipv4_packet_with_wrong_length_is_dropped(
    target: Target, peer: ScriptedPeer, session: Session, length: int
) -> None:
    came = delivered(target, peer, session, with_length(inner(peer, 4, 48), length))
    assert came == [], f"delivered {came[0].hex()}: total length {length} in a plaintext of 48 bytes"


@pytest.mark.requirement("DT-23")
def test_inner_ipv4_packet_of_header_only_is_delivered(target: Target, peer: ScriptedPeer, session: Session) -> None:
    packet = with_length(inner(peer, 4, 48), 20)
    came = delivered(target, peer, session, packet)
    assert came == [packet[:20]], "a packet whose total length is 20, its header, was not delivered as these 20 bytes"


@pytest.mark.requirement("DT-24")
@pytest.mark.bug("IB-55")
@pytest.mark.parametrize("length", [25, 5000, 65495, 65496, 65500, 65515, 65534, 65535])
def test_inner_ipv6_packet_with_wrong_length_is_dropped(
    target: Target, peer: ScriptedPeer, session: Session, length: int
) -> None:
    came = delivered(target, peer, session, with_length(inner(peer, 6, 64), length))
    assert came == [], f"delivered {len(came[0])} bytes: payload length {length} in a plaintext of 64 bytes"


@pytest.mark.bug("IB-55")
@pytest.mark.parametrize("length", [65495, 65496, 65535])
def test_good_packets_around_wrong_length_are_delivered(
    target: Target, peer: ScriptedPeer, session: Session, length: int
) -> None:
    good = [inner(peer, 6, 60 + number) for number in range(16)]
    bad = with_length(inner(peer, 6, 64), length)
    came = delivered(target, peer, session, *good[:8], bad, *good[8:])
    assert came == good, f"around a packet with payload length {length} {len(came)} packets came, not the 16 good ones"


@pytest.mark.requirement("DT-25")
@pytest.mark.parametrize("nibble", [0, 1, 5, 7, 15])
def test_inner_packet_of_other_version_is_dropped(
    target: Target, peer: ScriptedPeer, session: Session, nibble: int
) -> None:
    # Everything else about each packet is right, whatever version a program takes it for.
    wrong = [bytes([nibble << 4 | p[0] & 15]) + p[1:] for p in (inner(peer, 4, 48), inner(peer, 6, 64))]
    came = delivered(target, peer, session, *wrong, bytes([nibble << 4]) * 16)
    assert came == [], f"delivered a packet of version {nibble}"


@pytest.mark.requirement("DT-26")
@pytest.mark.bug("IB-54")
@pytest.mark.parametrize("family", [4, 6])
def test_truncated_inner_header_is_dropped(target: Target, peer: ScriptedPeer, session: Session, family: int) -> None:
    packet = inner(peer, family, 60)
    sizes = sorted({1, 2, 4, 19, HEADER[family] - 1})
    cut = [with_length(packet, size if family == 4 else 0)[:size] for size in sizes if size < HEADER[family]]
    came = delivered(target, peer, session, *cut)
    assert came == [], f"delivered {len(came[0])} bytes of IPv{family}, less than its header"


@pytest.mark.bug("IB-54")
def test_keepalives_are_not_delivered(target: Target, peer: ScriptedPeer, session: Session) -> None:
    came = delivered(target, peer, session, *[b""] * 100)
    assert came == [], f"delivered {came} for keepalives"


@pytest.mark.requirement("DT-27")
@pytest.mark.parametrize("kind", ["version", "length", "source"])
def test_dropped_inner_packet_still_authenticates_its_sender(
    target: Target, peer: ScriptedPeer, session: Session, kind: str
) -> None:
    packet = inner(peer, 4, 48)
    plaintext = {
        "version": b"\x55" + packet[1:],
        "length": with_length(packet, 2000),
        "source": packet[:12] + bytes([10, 9, 8, 7]) + packet[16:],
    }[kind]
    other = peer.socket()
    with twin("the device knows the peer by its first address"):
        assert delivered(target, peer, session) == []
        assert target.seen(peer).endpoint == Endpoint(peer.main.address, peer.main.port)
    peer.send(session.data(plaintext=plaintext), via=other)
    moved = Endpoint(other.address, other.port)
    seen = poll_until(lambda: target.seen(peer).endpoint, lambda endpoint: endpoint == moved, 1.0)
    assert seen == moved, f"data that was dropped for the {kind} of its packet has not moved the endpoint"


@pytest.mark.requirement("DT-28")
@pytest.mark.bug("IB-56")
@pytest.mark.parametrize("family", [4, 6])
def test_keepalive_has_no_outer_marks(target: Target, family: int) -> None:
    peer = target.peer(persistent_keepalive=1, endpoint=True, family=family)
    peer.respond()
    keepalive = peer.expect(Keepalive)
    assert keepalive.tos == 0, f"a keepalive has the outer TOS {keepalive.tos:#04x}"


@pytest.mark.requirement("DT-29")
@pytest.mark.bug("IB-56")
@pytest.mark.parametrize("family", [4, 6])
def test_outer_ecn_marks_inner_packet_by_rfc6040(target: Target, family: int) -> None:
    peer = target.peer()
    session = peer.connect()
    wrong = {}
    for outer in range(4):
        for ecn in range(4):
            target.inside.forget()
            packet = with_flow_label(inner(peer, family, 80, tos=0xB8 | ecn))
            peer.send(session.data(packet, tos=outer))
            came = target.inside.expect(lambda _: True, what=f"a packet with the outer ECN {outer} and the inner {ecn}")
            tos = came[1] if family == 4 else (came[0] << 4 | came[1] >> 4) & 255
            assert tos & ~3 == 0xB8, f"the inner DSCP became {tos >> 2:#x}"
            assert without_traffic_class(came) == without_traffic_class(packet), "the ECN changed another field, too"
            if tos & 3 != CHANGED_BY_ECN.get((outer, ecn), ecn):
                wrong[outer, ecn] = tos & 3
    if wrong:
        differs(f"RFC 6040 wants another inner ECN for these (outer, inner): {wrong}", by=[target.implementation.name])


@pytest.mark.requirement("ROB-02")
def test_random_plaintexts_deliver_nothing_foreign(target: Target, peer: ScriptedPeer, session: Session) -> None:
    stream = random.Random(target.lab.seed)  # noqa: S311 - reproducible on purpose
    own = {bytes(inner(peer, 4, 40)[12:16]), bytes(inner(peer, 6, 60)[8:24])}
    for _ in range(effort(2000, 100_000) // 100):
        plaintexts = []
        for _ in range(100):
            body = stream.randbytes(stream.randrange(1400))
            first = stream.choice([0x45, 0x46, 0x60, 0x6F, 0x4F, stream.randrange(256)])
            plaintexts.append(bytes([first]) + body)
        came = delivered(target, peer, session, *plaintexts)
        foreign = [p for p in came if (p[12:16] if p[0] >> 4 == 4 else p[8:24]) not in own]
        assert foreign == [], f"delivered a packet whose source the peer may not use: {foreign[0][:40].hex()}"
    assert target.interface.peer(peer.public_key).latest_handshake


@pytest.mark.requirement("ROB-02")
@pytest.mark.parametrize("family", [4, 6])
def test_packet_without_payload_is_delivered(target: Target, peer: ScriptedPeer, session: Session, family: int) -> None:
    source, destination = (peer.inner4, INNER4) if family == 4 else (peer.inner6, INNER6)
    packet = ip_packet(source, destination, b"", protocol=NO_NEXT_HEADER)
    assert delivered(target, peer, session, packet) == [packet], "a packet that is only its header was not delivered"


# What the device's node sends


@pytest.mark.requirement("ERR-05")
@pytest.mark.parametrize("nibble", [0, 5, 15])
def test_packet_of_other_version_is_not_sent(target: Target, nibble: int) -> None:
    peer = target.peer()
    peer.connect()
    # A program that takes every packet for one of either version would send it to the peer.
    to_peer = {
        ETHERTYPE[family]: bytes([nibble << 4 | good[0] & 15]) + good[1:]
        for family, good in (
            (4, ip_packet(INNER4, peer.inner4, bytes(40))),
            (6, ip_packet(INNER6, peer.inner6, bytes(40))),
        )
    }
    before = unreachables(target)
    with target.node.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sender:
        for ethertype, packet in to_peer.items():
            # EPROTONOSUPPORT of the driver.
            with suppress(OSError):
                sender.sendto(packet, ("wg0", ethertype))
    target.send(peer, b"the end")
    with twin("an IPv4 packet is sent to the peer after them"):
        peer.expect(Data, where=lambda one: b"the end" in one.plaintext)
    sent = [one for one in peer.drain() if isinstance(one, ReceivedData) and one.plaintext]
    if sent:
        differs(
            f"a packet of version {nibble} was sent to the peer: {sent[0].plaintext[:8].hex()}",
            requirement="ERR-05",
            by=[target.implementation.name],
        )
    assert unreachables(target) == before, f"a packet of version {nibble} was answered by an ICMP error"


def unreachables(target: Target) -> list[int]:
    """Return how many ICMP and ICMPv6 errors "unreachable" the device's node has sent."""
    lines = [line.split() for line in target.node.run(["cat", "/proc/net/snmp", "/proc/net/snmp6"]).stdout.splitlines()]
    names, values = [line for line in lines if line[0] == "Icmp:"]
    of_ipv6 = dict(line for line in lines if len(line) == 2)
    return [int(dict(zip(names, values, strict=True))["OutDestUnreachs"]), int(of_ipv6["Icmp6OutDestUnreachs"])]


@pytest.mark.requirement("Q-11")
def test_long_segments_are_split_to_mtu(loopback: Tunnel) -> None:
    ns1, ns2 = loopback.nodes["ns1"], loopback.nodes["ns2"]
    mtu = ns1.links()["wg0"]["mtu"]
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        tcp_stream(ns1, ns2, V4_OF_B)
        lengths = [len(message.payload) for message in wire.messages(kind=DATA, port=PORT)]
    with twin("the stream was sent in full segments"):
        assert sum(length >= mtu for length in lengths) > FULL_SEGMENTS
    longest = max(lengths) - HEADER_AND_TAG
    # Some programs pad beyond the MTU (MTU-03).
    if longest > -(-mtu // 16) * 16:
        differs(
            f"a message of the stream carries {longest} bytes; the MTU is {mtu}",
            requirement="Q-11",
            by=[loopback.a.manifest.name],
        )
