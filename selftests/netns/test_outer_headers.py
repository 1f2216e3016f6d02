"""What the headers around WireGuard's messages say, and what becomes of a message when they lie."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from harness import (
    COOKIE_REPLY,
    DATA,
    INITIATION,
    RESPONSE,
    V4_OF_B,
    Datagram,
    Drop,
    Endpoint,
    Flip,
    UdpStream,
    differs,
    twin,
    wait_for,
)
from harness.net.checksum import checksum
from harness.wire import frames
from harness.wire.messages import (
    FIELDS,
    SIZES,
    kind_of,
    with_mac1,
)

if TYPE_CHECKING:
    from harness import Tunnel, Wire
    from harness.wire.frames import Transport

ETH_P_ALL = 3
DEADLINE = 5.0
PORT_OF_A, PORT_OF_B = 1, 2
# DSCP AF41, no ECN: handshakes shall not be the first to be lost.
MARKED, PLAIN = 0x88, 0
DONT_FRAGMENT = 0x40
SENDER, RECEIVER = slice(*FIELDS[RESPONSE]["sender"]), slice(*FIELDS[DATA]["receiver"])
# All of a response but its macs.
BODY = FIELDS[RESPONSE]["mac1"][0]


@dataclass(frozen=True, slots=True)
class Outer:
    """A datagram and what its IP header says. ports: from and to; mark: TOS or traffic class; hops: those left."""

    kind: int
    ports: tuple[int, int]
    mark: int
    hops: int
    has_options: bool
    may_be_fragmented: bool


def outer(packet: bytes) -> Outer:
    """Read an IP packet that carries a datagram."""
    if packet[0] >> 4 == 4:
        start = (packet[0] & 15) * 4
        mark, hops, has_options, may_be_fragmented = packet[1], packet[8], start > 20, not packet[6] & DONT_FRAGMENT
    else:
        start = 40
        mark, hops = int.from_bytes(packet[:2]) >> 4 & 0xFF, packet[7]
        has_options, may_be_fragmented = packet[6] != socket.IPPROTO_UDP, True
    ports = int.from_bytes(packet[start : start + 2]), int.from_bytes(packet[start + 2 : start + 4])
    return Outer(kind_of(packet[start + 8 :]), ports, mark, hops, has_options, may_be_fragmented)


@pytest.fixture
def sent(direct: Tunnel, host: str) -> list[Outer]:
    """The first four datagrams of a tunnel over IPv4 or IPv6: the handshake, a ping and its answer."""
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    ns1.add_address("veth1", "10.0.0.1/24", "fd00:aa::1/96")
    ns2.add_address("veth2", "10.0.0.2/24", "fd00:aa::2/96")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint(host, PORT_OF_B))
    with ns1.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as wire:
        wire.bind(("veth1", ETH_P_ALL))
        direct.must_ping("ns1", V4_OF_B)
        from_a, from_b = PORT_OF_A.to_bytes(2), PORT_OF_B.to_bytes(2)
        ports = {from_a + from_b, from_b + from_a}
        is_ours = Datagram(wire, lambda packet: packet[20:24] in ports or packet[40:44] in ports)
        return [outer(wait_for(is_ours, DEADLINE, "four datagrams")[0]) for _ in range(4)]


@pytest.mark.requirement("MSG-17", "MSG-20", "MTU-07")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("host", ["10.0.0.2", "fd00:aa::2"], ids=["v4", "v6"])
def test_outer_headers_set_af41_for_handshakes_and_never_df(direct: Tunnel, sent: list[Outer]) -> None:
    assert [one.kind for one in sent] == [INITIATION, RESPONSE, DATA, DATA]
    assert {one.ports for one in sent} == {(PORT_OF_A, PORT_OF_B), (PORT_OF_B, PORT_OF_A)}
    assert {(one.hops, one.has_options) for one in sent} == {(64, False)}
    assert {one.mark for one in sent if one.kind == DATA} == {PLAIN}
    handshake = [one for one in sent if one.kind != DATA]
    assert {one.mark for one in handshake} <= {MARKED, PLAIN}
    plain = senders(direct, [one for one in handshake if one.mark == PLAIN])
    whole = senders(direct, [one for one in sent if not one.may_be_fragmented])
    said = [f"handshakes of {' and '.join(plain)} leave with a traffic class of 0, not 0x88"] if plain else []
    said += [f"datagrams of {' and '.join(whole)} leave with DF set"] if whole else []
    if said:
        differs("; ".join(said), by=plain + whole)


def senders(direct: Tunnel, found: list[Outer]) -> list[str]:
    """Who has sent these datagrams."""
    return sorted({(direct.a if one.ports[0] == PORT_OF_A else direct.b).manifest.name for one in found})


@pytest.mark.requirement("ERR-08")
def test_data_packet_with_wrong_udp_length_is_dropped(wired: Tunnel, wire: Wire) -> None:
    with UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B) as to_b:
        to_b.send()
        to_b.wait_for(1)
        wire.apply(Drop(message="data", sender="ns1", nth="1-4"))
        to_b.send(4)
        held = [wire.wait_for("data", "A's messages", sender="ns1", nth=nth).frame for nth in range(1, 5)]
        for frame, lie in zip(held, (-(1 << 16), -1, 1), strict=False):
            wire.inject(with_lengths(frame, udp=lie), sender="ns1")
        with twin("what follows after the end of a datagram is no part of it"):
            wire.inject(with_lengths(held[3], ip=4), sender="ns1")
            to_b.wait_for(2)
        to_b.send()
        to_b.wait_for(3)
        assert to_b.arrivals().numbers == (0, 4, 5)


@pytest.mark.requirement("MSG-07", "MSG-09", "ROB-10")
def test_response_of_wrong_type_or_length_is_ignored(wired: Tunnel, wire: Wire) -> None:
    wire.apply(Drop(message="response", nth=1))
    with UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B) as to_b:
        to_b.send()
        response = wire.wait_for("response", "B's response, which is lost", sender="ns2")
        for payload in no_responses(response.message.payload, wired.pub_a.raw):
            wire.inject(with_payload(response.frame, payload), sender="ns2")
        with twin("the response, as it was, is taken if none of the others was"):
            wire.replay(response)
            confirmation = wire.wait_for("transport", "A's datagram on the new session", sender="ns1")
        index = confirmation.message.payload[RECEIVER]
        assert index == response.message.payload[SENDER], "A has taken what is no response, by the index that it gives"
        to_b.wait_for(1)
    assert len(wire.sightings("handshake")) == 2, "there was an answer to what is no initiation"


def no_responses(response: bytes, recipient: bytes) -> list[bytes]:
    """What is a response but for its length or its type; mac1 is right.

    Each gives another index, which nothing but mac1 protects: by that one sees whether it was taken.
    """
    marked = with_mac1(Flip(message="response", field="sender").apply(response), recipient)
    body, macs = marked[:BODY], marked[BODY:]
    return [
        marked[:-1],
        marked + b"\0",
        # For whoever looks for the macs before the end.
        with_mac1(body + b"\0" + macs, recipient),
        *(
            with_mac1(bytes([kind]) + marked[1:], recipient)
            for kind in (0, INITIATION, COOKIE_REPLY, DATA, 5, 130, 255)
        ),
        with_mac1(bytes([INITIATION]) + body[1:].ljust(SIZES[INITIATION] - 1 - len(macs), b"\0") + macs, recipient),
    ]


def with_payload(frame: bytes, payload: bytes) -> bytes:
    """The frame of a datagram that carries this instead."""
    found = frames.udp(frame)
    assert found is not None
    return labelled(frame[: found.end - len(found.payload(frame))] + payload, found, 8 + len(payload))


def with_lengths(frame: bytes, *, udp: int = 0, ip: int = 0) -> bytes:
    """The frame with so many bytes more at its end, and with a UDP length that is so much more, at least 7."""
    found = frames.udp(frame)
    assert found is not None
    return labelled(frame + bytes(ip), found, max(7, found.end - found.start + udp))


def labelled(frame: bytes, found: Transport, length: int) -> bytes:
    """The frame with this as its UDP length, and an IP length up to its end."""
    new = bytearray(frame)
    # Without a checksum, which would give a lie away.
    new[found.start + 4 : found.start + 8] = length.to_bytes(2) + bytes(2)
    header = new[found.network : found.start]
    header[2:4] = (len(frame) - found.network).to_bytes(2)
    header[10:12] = bytes(2)
    header[10:12] = checksum(bytes(header)).to_bytes(2)
    new[found.network : found.start] = header
    return bytes(new)
