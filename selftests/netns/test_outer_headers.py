"""Check outer headers, and send messages with wrong headers, types and lengths."""

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
    poll_until,
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
# Traffic classes: handshakes have DSCP AF41 and no ECN, data has 0.
MARKED, PLAIN = 0x88, 0
DONT_FRAGMENT = 0x40
SENDER, RECEIVER = slice(*FIELDS[RESPONSE]["sender"]), slice(*FIELDS[DATA]["receiver"])
# Length of a response without its macs.
BODY = FIELDS[RESPONSE]["mac1"][0]


@dataclass(frozen=True, slots=True)
class Outer:
    """Type and outer headers of a message. ports: source, destination; mark: TOS or traffic class; hops: TTL."""

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
    """The first four datagrams of a tunnel over IPv4 or IPv6: the handshake, a ping and its reply."""
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
    assert [datagram.kind for datagram in sent] == [INITIATION, RESPONSE, DATA, DATA]
    assert {datagram.ports for datagram in sent} == {(PORT_OF_A, PORT_OF_B), (PORT_OF_B, PORT_OF_A)}
    assert {(datagram.hops, datagram.has_options) for datagram in sent} == {(64, False)}
    assert {datagram.mark for datagram in sent if datagram.kind == DATA} == {PLAIN}
    handshake = [datagram for datagram in sent if datagram.kind != DATA]
    assert {datagram.mark for datagram in handshake} <= {MARKED, PLAIN}
    plain = senders(direct, [datagram for datagram in handshake if datagram.mark == PLAIN])
    whole = senders(direct, [datagram for datagram in sent if not datagram.may_be_fragmented])
    differences = [f"handshakes of {' and '.join(plain)} leave with a traffic class of 0, not 0x88"] if plain else []
    differences += [f"datagrams of {' and '.join(whole)} leave with DF set"] if whole else []
    if differences:
        differs("; ".join(differences), by=plain + whole)


def senders(direct: Tunnel, datagrams: list[Outer]) -> list[str]:
    """Return the names of the programs that sent these datagrams."""
    return sorted({(direct.a if datagram.ports[0] == PORT_OF_A else direct.b).manifest.name for datagram in datagrams})


@pytest.mark.requirement("ERR-08")
def test_data_packet_with_wrong_udp_length_is_dropped(wired: Tunnel, wire: Wire) -> None:
    with UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B) as to_b:
        to_b.send()
        to_b.wait_for(1)
        wire.apply(Drop(message="data", sender="ns1", nth="1-5"))
        to_b.send(5)
        held = [wire.wait_for("data", "A's messages", sender="ns1", nth=nth).frame for nth in range(1, 6)]
        for frame, difference in zip(held, (-(1 << 16), -1, 1), strict=False):
            wire.inject(with_lengths(frame, udp=difference), sender="ns1")
        wire.inject(with_lengths(held[3], ip=4), sender="ns1")
        with twin("a message that was held is accepted as it is"):
            wire.inject(held[4], sender="ns1")
            poll_until(lambda: to_b.arrivals().numbers, lambda numbers: 5 in numbers, DEADLINE)
            assert 5 in to_b.arrivals().numbers
        assert to_b.arrivals().numbers != (0, 5), "B refused a datagram with four bytes of IP payload behind its end"
        assert to_b.arrivals().numbers == (0, 4, 5), "B accepted a datagram with a wrong UDP length"


@pytest.mark.requirement("MSG-07", "MSG-09", "ROB-10")
def test_response_of_wrong_type_or_length_is_ignored(wired: Tunnel, wire: Wire) -> None:
    wire.apply(Drop(message="response", nth=1))
    with UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B) as to_b:
        to_b.send()
        response = wire.wait_for("response", "B's response, which is lost", sender="ns2")
        for payload in malformed_responses(response.message.payload, wired.pub_a.raw):
            wire.inject(with_payload(response.frame, payload), sender="ns2")
        with twin("the unchanged response is accepted after the malformed ones"):
            wire.replay(response)
            confirmation = wire.wait_for("transport", "A's datagram on the new session", sender="ns1")
        index = confirmation.message.payload[RECEIVER]
        assert index == response.message.payload[SENDER], "A accepted a malformed response"
        to_b.wait_for(1)
    assert len(wire.sightings("handshake")) == 2, "a malformed message was answered"


def malformed_responses(response: bytes, recipient: bytes) -> list[bytes]:
    """Return messages that are a response but for length or type, with a valid mac1.

    Each has another sender index, which only mac1 protects. The index that A uses shows whether one was accepted.
    """
    marked = with_mac1(Flip(message="response", field="sender").apply(response), recipient)
    body, macs = marked[:BODY], marked[BODY:]
    return [
        marked[:-1],
        marked + b"\0",
        # A program may look for the macs at the end of the message.
        with_mac1(body + b"\0" + macs, recipient),
        *(
            with_mac1(bytes([kind]) + marked[1:], recipient)
            for kind in (0, INITIATION, COOKIE_REPLY, DATA, 5, 130, 255)
        ),
        with_mac1(bytes([INITIATION]) + body[1:].ljust(SIZES[INITIATION] - 1 - len(macs), b"\0") + macs, recipient),
    ]


def with_payload(frame: bytes, payload: bytes) -> bytes:
    """Return the frame of a datagram with another payload."""
    datagram = frames.udp(frame)
    assert datagram is not None
    return labelled(frame[: datagram.end - len(datagram.payload(frame))] + payload, datagram, 8 + len(payload))


def with_lengths(frame: bytes, *, udp: int = 0, ip: int = 0) -> bytes:
    """Return the frame with `ip` bytes more at its end, and `udp` added to its UDP length, which is at least 7."""
    datagram = frames.udp(frame)
    assert datagram is not None
    return labelled(frame + bytes(ip), datagram, max(7, datagram.end - datagram.start + udp))


def labelled(frame: bytes, datagram: Transport, length: int) -> bytes:
    """Return the frame with this UDP length, and an IP length up to its end."""
    new = bytearray(frame)
    # Without a UDP checksum, which would not match the new length.
    new[datagram.start + 4 : datagram.start + 8] = length.to_bytes(2) + bytes(2)
    header = new[datagram.network : datagram.start]
    header[2:4] = (len(frame) - datagram.network).to_bytes(2)
    header[10:12] = bytes(2)
    header[10:12] = checksum(bytes(header)).to_bytes(2)
    new[datagram.network : datagram.start] = header
    return bytes(new)
