"""Read every field of a tunnel's messages on the wire: layout, indices, ports (`wired`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import DATA, INITIATION, RESPONSE, V4_OF_A, V4_OF_B, DeviceConfig, Endpoint, udp_message
from harness.wire.messages import FIELDS, KEEPALIVE_SIZE, SIZES, counter_of, with_mac1
from selftests.support.initiations import opened
from selftests.support.peers import renew

if TYPE_CHECKING:
    from harness import Key, Sighting, Tunnel, Wire

# TAI64N: 2^62 + 10 s before 1970, seconds in 8 bytes, nanoseconds in 4 (5.1).
EPOCH = (1 << 62) + 10
TIMESTAMP = 12
DISCARD = 9


def field(sighting: Sighting, name: str) -> bytes:
    """Return a field of a message."""
    return sighting.message.payload[slice(*FIELDS[sighting.message.payload[0]][name])]


@pytest.mark.requirement("MSG-01", "MSG-02", "MSG-04")
@pytest.mark.parametrize("initiator", ["ns1", "ns2"])
def test_messages_have_layout_of_their_type(wired: Tunnel, wire: Wire, initiator: str) -> None:
    responder = {"ns1": "ns2", "ns2": "ns1"}[initiator]
    keys = {"ns1": wired.key_a, "ns2": wired.key_b}
    address = V4_OF_B if initiator == "ns1" else V4_OF_A
    udp_message(wired.nodes[initiator], address, DISCARD, b"begin a session")
    initiation = wire.wait_for("initiation", f"an initiation of {SIZES[INITIATION]} bytes", sender=initiator)
    assert_layout(initiation, INITIATION, keys[responder])
    static, timestamp = opened(initiation.message.payload, keys[responder])
    assert static == keys[initiator].public().raw, f"the initiation carries the static key {static.hex()}"
    assert len(timestamp) == TIMESTAMP
    assert int.from_bytes(timestamp[:8]) >= EPOCH, f"the timestamp {timestamp.hex()} is before 1970"
    response = wire.wait_for("response", f"a response of {SIZES[RESPONSE]} bytes", sender=responder)
    assert_layout(response, RESPONSE, keys[initiator])
    wired.must_ping(initiator, address)
    for sender in (initiator, responder):
        payload = wire.wait_for("data", f"data of {sender}", sender=sender).message.payload
        assert payload[:4] == bytes([DATA, 0, 0, 0]), f"a data message begins with {payload[:4].hex()}"
        assert len(payload) >= KEEPALIVE_SIZE, f"a data message has {len(payload)} bytes"


def assert_layout(sighting: Sighting, kind: int, receiver: Key) -> None:
    """Check type, length and the place of mac1 of a handshake message to this private key."""
    payload, name = sighting.message.payload, sighting.message.name
    assert (payload[:4], len(payload)) == (bytes([kind, 0, 0, 0]), SIZES[kind]), f"{name}: {payload.hex()}"
    assert payload == with_mac1(payload, receiver.public().raw), f"the {name} has no mac1 at its place"


@pytest.mark.requirement("MSG-11", "CR-15")
@pytest.mark.parametrize("initiator", ["ns1", "ns2"])
def test_receiver_index_is_sender_index_of_other_side(wired: Tunnel, wire: Wire, initiator: str) -> None:
    wired.must_ping(initiator, V4_OF_B if initiator == "ns1" else V4_OF_A, count=3)
    initiation, response, *data = wire.sightings()
    assert field(response, "receiver") == field(initiation, "sender"), "the response has another receiver index"
    chosen = {initiator: field(response, "sender"), response.sender: field(initiation, "sender")}
    for sender, index in chosen.items():
        sent = [s for s in data if s.sender == sender]
        used = {field(s, "receiver").hex() for s in sent}
        assert used == {index.hex()}, f"{sender} sends data to the indices {used}, its peer has chosen {index.hex()}"
        counters = [counter_of(s.message.payload) for s in sent]
        assert counters == list(range(len(sent))), f"{sender} counts {counters}"


@pytest.mark.requirement("MSG-19")
@pytest.mark.capability("ipv6-underlay", "listen-port-change")
@pytest.mark.parametrize("hosts", [("192.168.1.1", "192.168.1.2"), ("fd00:aa::1", "fd00:aa::2")], ids=["v4", "v6"])
def test_every_datagram_leaves_from_listen_port(wired: Tunnel, wire: Wire, hosts: tuple[str, str]) -> None:
    ports = {"ns1": 4001, "ns2": 4002}
    wired.a.set(DeviceConfig(listen_port=ports["ns1"]))
    wired.b.set(DeviceConfig(listen_port=ports["ns2"]))
    assert {"ns1": wired.a.get().listen_port, "ns2": wired.b.get().listen_port} == ports
    # Each side initiates once.
    renew(wired.a, wired.pub_b, endpoint=Endpoint(hosts[1], ports["ns2"]))
    wired.must_ping("ns1", V4_OF_B)
    assert_ports(wire, ports)
    renew(wired.b, wired.pub_a, endpoint=Endpoint(hosts[0], ports["ns1"]))
    wired.must_ping("ns2", V4_OF_A)
    assert_ports(wire, ports)
    kinds = {(s.sender, s.message.name) for s in wire.sightings()}
    expected = {(sender, name) for sender in ports for name in ("initiation", "response", "data")}
    assert kinds >= expected, f"the test proved nothing: it saw {sorted(kinds)}"


def assert_ports(wire: Wire, ports: dict[str, int]) -> None:
    """Check that every message so far has left from the listen port of its sender."""
    wrong = {
        (s.sender, s.message.name, s.message.source[1])
        for s in wire.sightings()
        if s.message.source[1] != ports[s.sender]
    }
    assert not wrong, f"messages that leave from another port than the listen port {ports}: {wrong}"
