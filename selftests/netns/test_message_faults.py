"""Lose, change, replay and delay single messages of handshakes and sessions (`wired`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import (
    DATA,
    V4_OF_A,
    V4_OF_B,
    Capture,
    Datagram,
    Delay,
    Drop,
    Endpoint,
    Flip,
    Hold,
    UdpStream,
    let_pass,
    ping,
    poll_until,
    slack,
    twin,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.wire import frames
from harness.wire.messages import with_mac1
from selftests.support.initiations import opened
from selftests.support.transfer import assert_equal_growth, received

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Key, Sighting, Tunnel, Wire

SECOND = 1_000_000_000
REKEY_TIMEOUT = 5
MAX_JITTER = 1 / 3
# Seconds for one retry of an initiation, with reserve for a busy machine.
RETRIED = 12.0
LATENCY = 0.3
SPACING = 0.1
# Bytes of an echo request or reply inside the tunnel.
ECHO = 84
# Bytes of payload of each datagram that to_a and to_b send.
DATAGRAM = 256
DISCARD = 9
ELSEWHERE = 7777
PORT_OF_A = 1
ENDPOINT_OF_A, ENDPOINT_OF_B = f"192.168.1.1:{PORT_OF_A}", "192.168.1.2:2"
# Seconds within which a forged response would move the endpoint.
EFFECT_WAIT = 0.05
# Seconds within which a responder would send on a session that is not confirmed, or initiate another one.
RESPONDER_WAIT = 0.2
AT_ONCE = 5.0
LESS_THAN_A_RETRY = 4.5
# With this MTU inside the tunnel, a datagram of 3000 bytes leaves in three fragments on a link of 1500 bytes.
TUNNEL_MTU, LONG = 4000, 3000
FORGED_INITIATIONS = [
    Flip(message="initiation", field=field, bit=bit)
    for field, bit in (("mac1", 0), ("mac1", 127), ("ephemeral", 1), ("static", 0), ("timestamp", 223))
]
FORGED_RESPONSES = [
    pytest.param(Flip(message="response", field=field, bit=bit), marks=marks)
    for field, bit, marks in (
        ("mac1", 0, pytest.mark.requirement("HS-04")),
        ("ephemeral", 1, ()),
        ("nothing", 7, ()),
        ("receiver", 31, pytest.mark.requirement("HS-17")),
    )
]
FORGED_DATA = [Flip(message="data", field=field) for field in ("receiver", "counter", "packet", "tag")]


def field_and_bit(forgery: Flip) -> str:
    return f"{forgery.field}-{forgery.bit}"


def forged(sighting: Sighting, forgery: Flip, recipient: Key) -> bytes:
    """Return the message with one bit changed, and a valid mac1 unless mac1 was changed: anyone can compute it."""
    payload = forgery.apply(sighting.message.payload)
    return payload if forgery.message == "data" or forgery.field == "mac1" else with_mac1(payload, recipient.raw)


@pytest.fixture
def to_b(wired: Tunnel) -> Iterator[UdpStream]:
    """Datagrams from A's node to B's address in the tunnel."""
    with UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B, size=DATAGRAM) as stream:
        yield stream


@pytest.fixture
def to_a(wired: Tunnel) -> Iterator[UdpStream]:
    """Datagrams from B's node to A's address in the tunnel."""
    with UdpStream(wired.nodes["ns2"], wired.nodes["ns1"], V4_OF_A, size=DATAGRAM) as stream:
        yield stream


def names(sightings: list[Sighting]) -> list[str]:
    """Return sender and message name of each sighting."""
    return [f"{s.sender} {s.message.name}" for s in sightings]


def sessions_of(sightings: list[Sighting]) -> set[tuple[str, bytes]]:
    """Return sender and receiver index of all data messages."""
    return {(s.sender, s.message.payload[4:8]) for s in sightings if s.message.name == "data"}


# Handshakes


@pytest.mark.requirement("HS-04", "HS-07")
@pytest.mark.parametrize("forgery", FORGED_INITIATIONS, ids=field_and_bit)
def test_forged_initiation_is_not_answered(wired: Tunnel, wire: Wire, to_b: UdpStream, forgery: Flip) -> None:
    wire.apply(Hold(message="initiation", nth=1))
    to_b.send()
    initiation = wire.wait_for("initiation", "A's initiation", sender="ns1")
    wire.replay(initiation, port=ELSEWHERE, payload=forged(initiation, forgery, wired.pub_b))
    with twin("the same initiation, unchanged, is answered"):
        wire.release()
        response = wire.wait_for("response", "B's response", sender="ns2")
    assert response.message.destination[1] == PORT_OF_A, "B answered the forged initiation"
    to_b.wait_for(1)
    assert len(wire.sightings("response")) == 1


@pytest.mark.requirement("HS-09", "HS-08", "RT-04")
def test_replayed_initiation_is_not_answered_and_endpoint_stays(wired: Tunnel, wire: Wire) -> None:
    with twin("the initiation is answered the first time"):
        wired.must_ping("ns1", V4_OF_B)
        (initiation,) = wire.sightings("initiation")
        assert len(wire.sightings("response")) == 1
    let_pass(SPACING, "20 ms after the first initiation only the timestamp is a reason to refuse it")
    wire.replay(initiation)
    wire.replay(initiation, port=ELSEWHERE)
    send_from_b(wired, wire)
    assert_b_sends_only_to_a(wired, wire)
    let_pass(SPACING, "B refuses a second initiation within 20 ms, and timestamps are coarse")
    recreate_peer(wired)
    with twin("a new initiation is answered"):
        wired.must_ping("ns1", V4_OF_B)
    assert names(wire.sightings("handshake"))[-2:] == ["ns1 initiation", "ns2 response"]
    assert len(wire.sightings("response")) == 2


@pytest.mark.requirement("HS-19", "RT-04")
def test_replayed_response_has_no_effect(wired: Tunnel, wire: Wire) -> None:
    wired.must_ping("ns1", V4_OF_B)
    (response,) = wire.sightings("response")
    with received(wired.seen_by_a) as pings_alone:
        wired.must_ping("ns1", V4_OF_B, count=3)
    wire.apply()
    with received(wired.seen_by_a) as with_replay:
        wire.replay(response, port=ELSEWHERE)
        wired.must_ping("ns1", V4_OF_B, count=3)
    assert {s.message.destination[1] for s in wire.sightings(sender="ns1")} == {2}, "A sent to another port than B's"
    assert names(wire.sightings()) == ["ns1 data", "ns2 data"] * 3
    assert_equal_growth(with_replay, pings_alone, 3 * ECHO, "A counted a replayed response")


@pytest.mark.requirement("HS-18", "RT-04")
@pytest.mark.bug("IB-05")
@pytest.mark.parametrize("forgery", FORGED_RESPONSES, ids=field_and_bit)
def test_forged_response_does_not_disturb_handshake(wired: Tunnel, wire: Wire, to_b: UdpStream, forgery: Flip) -> None:
    wire.apply(Hold(message="response", nth=1))
    to_b.send()
    response = wire.wait_for("response", "B's response", sender="ns2")
    wire.replay(response, port=ELSEWHERE, payload=forged(response, forgery, wired.pub_a))
    # A sends nothing before it has a session, and the response that gives it one restores the endpoint.
    seen = poll_until(lambda: str(wired.seen_by_a().endpoint), lambda endpoint: endpoint != ENDPOINT_OF_B, EFFECT_WAIT)
    assert seen == ENDPOINT_OF_B, "the forged response moved the endpoint"
    wire.release()
    to_b.wait_for(1, LESS_THAN_A_RETRY)
    assert names(wire.sightings()) == ["ns1 initiation", "ns2 response", "ns1 data"]
    assert str(wired.seen_by_a().endpoint) == ENDPOINT_OF_B


@pytest.mark.core
@pytest.mark.requirement("HS-23")
def test_pending_initiation_is_abandoned_when_peer_initiates(wire: Wire, to_b: UdpStream, to_a: UdpStream) -> None:
    wire.apply(Hold(message="initiation", sender="ns1", nth=1))
    to_b.send()
    wire.wait_for("initiation", "A's own initiation, which is late", sender="ns1")
    to_a.send()
    initiation = wire.wait_for("initiation", "B's initiation", sender="ns2")
    to_a.wait_for(1)
    to_b.wait_for(1)
    wire.release()
    wire.wait_for("response", "B's response to the initiation that A has given up", sender="ns2")
    # One after the other, so that A has time to use the abandoned session.
    for number in (2, 3, 4):
        to_b.send()
        to_b.wait_for(number)
    handshakes = ["ns1 initiation", "ns2 initiation", "ns1 response", "ns2 response"]
    assert names(wire.sightings("handshake")) == handshakes
    used = {s.message.payload[4:8].hex() for s in wire.sightings("transport", sender="ns1")}
    assert used == {initiation.message.payload[4:8].hex()}, "A has completed the handshake that it had given up"


@pytest.mark.requirement("HS-24", "HS-15", "DT-16")
@pytest.mark.bug("IB-02")
def test_responder_waits_for_next_data_when_confirmation_is_lost(wire: Wire, to_b: UdpStream, to_a: UdpStream) -> None:
    wire.apply(Drop(message="transport", sender="ns1", nth=1))
    to_b.send()
    wire.wait_for("transport", "A's first datagram, which the wire drops", sender="ns1")
    to_a.send(3)
    # B has data to send, and no session to send it on, unless A confirms it by a second message.
    early = poll_until(lambda: names(wire.sightings(sender="ns2"))[1:], bool, RESPONDER_WAIT)
    is_confirmed = len(wire.sightings("transport", sender="ns1")) > 1
    assert is_confirmed or not early, f"B sent {early[0]} after its response, although A has not confirmed the session"
    to_b.send()
    to_a.wait_for(3)
    assert to_b.wait_for(1).numbers == (1,)
    assert names(wire.sightings()) == ["ns1 initiation", "ns2 response", "ns1 data", "ns1 data", *["ns2 data"] * 3]


@pytest.mark.requirement("HS-02", "HS-24", "TM-22")
@pytest.mark.capability("persistent-keepalive")
def test_next_data_confirms_session_when_keepalive_is_lost(
    wired: Tunnel, wire: Wire, to_b: UdpStream, to_a: UdpStream
) -> None:
    wire.apply(Drop(message="keepalive", sender="ns1", nth=1))
    wired.keep_alive(600)
    wire.wait_for("keepalive", "A to confirm the session, which is lost", sender="ns1")
    to_a.send()
    to_b.send()
    to_b.wait_for(1)
    to_a.wait_for(1)
    sent = names(wire.sightings())
    assert sent == ["ns1 initiation", "ns2 response", "ns1 keepalive", "ns1 data", "ns2 data"], (
        f"after A's keepalive was lost, the messages were {', '.join(sent)}"
    )


@pytest.mark.requirement("HS-02")
def test_staged_packet_confirms_session_with_counter_zero(wire: Wire, to_b: UdpStream) -> None:
    to_b.send()
    to_b.wait_for(1)
    initiation, response, *transport = wire.sightings()
    assert names([initiation, response]) == ["ns1 initiation", "ns2 response"]
    sent = [(s.message.name, s.message.counter) for s in transport if s.sender == "ns1"]
    assert sent == [("data", 0)], f"with one packet staged, A confirms the session by (message, counter): {sent}"


@pytest.mark.requirement("HS-02")
@pytest.mark.capability("persistent-keepalive")
def test_keepalive_confirms_session_with_counter_zero(wired: Tunnel, wire: Wire) -> None:
    wired.keep_alive(600)
    wire.wait_for("transport", "A to confirm the session", sender="ns1")
    wired.must_ping("ns1", V4_OF_B)
    sent = [(s.message.name, s.message.counter) for s in wire.sightings("transport", sender="ns1")]
    assert sent == [("keepalive", 0), ("data", 1)], f"with no packet staged, A sent (message, counter): {sent}"


@pytest.mark.requirement("HS-15")
def test_responder_does_not_initiate_for_five_seconds(wire: Wire, to_b: UdpStream, to_a: UdpStream) -> None:
    wire.apply(Drop(message="transport", sender="ns1"))
    to_b.send()
    response = wire.wait_for("response", "B's response", sender="ns2")
    to_a.send()
    let_pass(LESS_THAN_A_RETRY, "B has a packet staged, and no session that it may use")
    early = [(s.message.time - response.message.time) / SECOND for s in wire.sightings("initiation", sender="ns2")]
    assert not early, f"B initiates {early[0]:.3f} s after its response"
    assert not wire.sightings("data", sender="ns2"), "B sent data on a session that was not confirmed"
    wire.apply()
    with twin("B sends its packet once the session is confirmed"):
        to_b.send()
        to_a.wait_for(1)


@pytest.mark.requirement("DT-17")
def test_unconfirmed_session_is_replaced_by_later_one(wired: Tunnel, wire: Wire, to_b: UdpStream) -> None:
    wire.apply(Hold(message="transport", sender="ns1"))
    with twin("late data is delivered if there is no later session"):
        to_b.send()
        wire.wait_for("data", "A's datagram on the first session", sender="ns1")
        wire.release()
        to_b.wait_for(1)
    for number in (2, 3):
        let_pass(SPACING, "B refuses a second initiation within 20 ms, and timestamps are coarse")
        recreate_peer(wired)
        to_b.send()
        wire.wait_for("data", "A's datagram on a session that is not confirmed", sender="ns1", nth=number)
    wire.release()
    assert to_b.wait_for(2).numbers == (0, 2), "B took data on a session that a later one had replaced"
    assert names(wire.sightings("handshake")) == ["ns1 initiation", "ns2 response"] * 3


@pytest.mark.requirement("DT-16")
def test_late_data_is_accepted_on_previous_session_but_no_older(wired: Tunnel, wire: Wire, to_b: UdpStream) -> None:
    wired.must_ping("ns1", V4_OF_B)
    early, late = send_and_drop(wire, to_b, 2)
    start_confirmed_session(wired, wire)
    wire.replay(early)
    to_b.wait_for(1)
    (newer,) = send_and_drop(wire, to_b, 1)
    start_confirmed_session(wired, wire)
    wire.replay(late)
    with twin("data on the previous session is delivered"):
        wire.replay(newer)
        taken = to_b.wait_for(2).numbers
    assert taken == (0, 2), "B took data on a session of which it has confirmed two later ones"


def send_and_drop(wire: Wire, to_b: UdpStream, count: int) -> list[Sighting]:
    """Send datagrams from A that the wire drops; return their sightings."""
    wire.apply(Drop(message="data", sender="ns1"))
    to_b.send(count)
    wire.wait_for("data", "A's datagrams, which are lost", sender="ns1", nth=count)
    return wire.sightings("data", sender="ns1")


def start_confirmed_session(wired: Tunnel, wire: Wire) -> None:
    """Start another session from A, and confirm it to B by a ping."""
    wire.apply()
    let_pass(SPACING, "B refuses a second initiation within 20 ms, and timestamps are coarse")
    recreate_peer(wired)
    wired.must_ping("ns1", V4_OF_B)
    assert names(wire.sightings("handshake")) == ["ns1 initiation", "ns2 response"]


@pytest.mark.requirement("HS-01")
def test_one_handshake_is_enough_at_high_latency(wired: Tunnel, wire: Wire) -> None:
    wire.apply(Delay(message="any", seconds=LATENCY))
    pings = ping(wired.nodes["ns1"], V4_OF_B, count=2)
    assert pings.lost == 0, str(pings)
    assert pings.answered[0] >= 4 * LATENCY
    assert pings.answered[1] >= 2 * LATENCY
    assert names(wire.sightings("handshake")) == ["ns1 initiation", "ns2 response"]


# Sessions


@pytest.mark.requirement("DT-03", "RT-04")
@pytest.mark.bug("IB-33", "IB-43", "IB-45")
def test_replayed_data_is_dropped_and_endpoint_stays(wired: Tunnel, wire: Wire, to_b: UdpStream) -> None:
    to_b.send(3)
    to_b.wait_for(3)
    sent = wire.sightings("data", sender="ns1")
    # An open port, else A's stack would answer B by ICMP errors, as many as its rate limit allows.
    with received(wired.seen_by_b) as with_replays, udp_receiver(wired.nodes["ns1"], V4_OF_A, DISCARD) as receiver:
        for sighting in sent:
            wire.replay(sighting, port=ELSEWHERE)
        send_from_b(wired, wire, count=3)
        assert_b_sends_only_to_a(wired, wire)
        for _ in range(3):
            wait_for(Datagram(receiver), AT_ONCE, "B's datagram to arrive")
        to_b.send()
        assert to_b.wait_for(4).numbers == (0, 1, 2, 3)
    with received(wired.seen_by_b) as datagram_alone:
        to_b.send()
        to_b.wait_for(5)
    assert_equal_growth(with_replays, datagram_alone, DATAGRAM, "B counted replayed data")


@pytest.mark.requirement("RT-04", "DT-13", "HS-04")
def test_unauthenticated_packet_does_not_move_endpoint(wired: Tunnel, wire: Wire, to_b: UdpStream) -> None:
    wired.must_ping("ns1", V4_OF_B)
    (initiation,) = wire.sightings("initiation")
    # A counter that B has seen is refused before the tag is checked, so this datagram was dropped.
    (fresh,) = send_and_drop(wire, to_b, 1)
    for sighting, forgeries in ((initiation, FORGED_INITIATIONS), (fresh, FORGED_DATA)):
        for forgery in forgeries:
            wire.replay(sighting, port=ELSEWHERE, payload=forged(sighting, forgery, wired.pub_b))
    send_from_b(wired, wire)
    assert_b_sends_only_to_a(wired, wire)
    with twin("the unchanged datagram is delivered"):
        wire.replay(fresh)
        to_b.wait_for(1)


@pytest.mark.requirement("RT-03", "DT-04")
@pytest.mark.capability("roaming")
def test_late_message_from_other_port_moves_endpoint(wired: Tunnel, wire: Wire, to_b: UdpStream) -> None:
    wired.must_ping("ns1", V4_OF_B)
    wire.apply(Drop(message="data", sender="ns1", nth=1))
    to_b.send(2)
    to_b.wait_for(1)
    (lost,) = wire.sightings(did="dropped")
    wire.replay(lost, port=ELSEWHERE)
    to_b.wait_for(2)
    seen = poll_until(lambda: str(wired.seen_by_b().endpoint), lambda endpoint: endpoint.endswith(f":{ELSEWHERE}"), 1.0)
    assert seen == f"192.168.1.1:{ELSEWHERE}"


@pytest.mark.requirement("RT-03")
@pytest.mark.capability("roaming", "persistent-keepalive")
def test_keepalive_from_other_port_moves_endpoint(wired: Tunnel, wire: Wire) -> None:
    wired.must_ping("ns1", V4_OF_B)
    wire.apply(Drop(message="keepalive", sender="ns1", nth=1))
    wired.keep_alive(600)
    lost = wire.wait_for("keepalive", "A's keepalive, which is lost", sender="ns1")
    assert str(wired.seen_by_b().endpoint) == f"192.168.1.1:{PORT_OF_A}"
    wire.replay(lost, port=ELSEWHERE)
    seen = poll_until(lambda: str(wired.seen_by_b().endpoint), lambda endpoint: endpoint.endswith(f":{ELSEWHERE}"), 1.0)
    assert seen == f"192.168.1.1:{ELSEWHERE}", f"a keepalive came from port {ELSEWHERE}, and B's endpoint is {seen}"


@pytest.mark.requirement("ROB-03", "RT-04")
def test_reflected_messages_have_no_effect(wired: Tunnel, wire: Wire, to_b: UdpStream, to_a: UdpStream) -> None:
    wire.apply(Hold(message="handshake"))
    to_b.send()
    for word in ("initiation", "response"):
        # Its sender gets it back before the peer gets it.
        wire.reflect(wire.wait_for(word, f"the {word}"))
        wire.release()
    to_b.wait_for(1)
    to_a.send()
    to_a.wait_for(1)
    assert names(wire.sightings("handshake")) == ["ns1 initiation", "ns2 response"], "a reflected message was answered"
    before, sent = (wired.seen_by_a(), wired.seen_by_b()), wire.sightings()
    with received(wired.seen_by_a) as pings_to_a, received(wired.seen_by_b) as pings_to_b:
        wired.must_ping("ns1", V4_OF_B, count=3)
        wired.must_ping("ns2", V4_OF_A, count=3)
    wire.apply()
    with received(wired.seen_by_a) as reflected_to_a, received(wired.seen_by_b) as reflected_to_b:
        for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
            for sighting in [s for s in sent if s.sender == node]:
                wire.reflect(sighting)
                wire.reflect(sighting, port=ELSEWHERE)
            wired.must_ping(node, address, count=3)
    assert names(wire.sightings()) == ["ns1 data", "ns2 data"] * 3 + ["ns2 data", "ns1 data"] * 3
    # Not the latest handshake: boringtun reports its age, and gotatun computes it at each request.
    assert sessions_of(wire.sightings()) == sessions_of(sent), "a reflected message began another session"
    assert_equal_growth(reflected_to_a, pings_to_a, 6 * ECHO, "A counted a reflected message")
    assert_equal_growth(reflected_to_b, pings_to_b, 6 * ECHO, "B counted a reflected message")
    for old, new in zip(before, (wired.seen_by_a(), wired.seen_by_b()), strict=True):
        assert new.endpoint == old.endpoint
    let_pass(SPACING, "B refuses a second initiation within 20 ms, and timestamps are coarse")
    recreate_peer(wired)
    with twin("a new handshake is answered"):
        wired.must_ping("ns1", V4_OF_B)
    assert names(wire.sightings("handshake")) == ["ns1 initiation", "ns2 response"]


@pytest.mark.requirement("MSG-18")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize(
    ("endpoint", "change"),
    [
        pytest.param(None, 0x0100, id="v4"),
        pytest.param("[fd00:aa::2]:2", 0x0100, id="v6"),
        # Over IPv6 a missing UDP checksum is a wrong one.
        pytest.param("[fd00:aa::2]:2", None, id="v6-none"),
    ],
)
def test_datagram_with_wrong_udp_checksum_is_dropped(
    wired: Tunnel, wire: Wire, to_b: UdpStream, endpoint: str | None, change: int | None
) -> None:
    if endpoint is not None:
        wired.a.set_peer(wired.pub_b, endpoint=Endpoint.parse(endpoint))
    wire.apply(Hold(message="initiation", nth=1), Drop(message="data", sender="ns1", nth=1))
    to_b.send(2)
    initiation = wire.wait_for("initiation", "A's initiation", sender="ns1")
    wire.inject(with_wrong_checksum(initiation.frame, change), sender="ns1")
    with twin("the same initiation with the right checksum is answered"):
        wire.release()
        response = wire.wait_for("response", "B's response", sender="ns2")
    assert response.message.destination[1] == PORT_OF_A, "B answered an initiation with a wrong checksum"
    to_b.wait_for(1)
    (lost,) = wire.sightings(did="dropped")
    wire.inject(with_wrong_checksum(lost.frame, change), sender="ns1")
    to_b.send()
    assert to_b.wait_for(2).numbers == (1, 2), "B delivered a datagram with a wrong checksum"
    with twin("the same datagram with the right checksum is delivered"):
        wire.replay(lost)
        to_b.wait_for(3)


@pytest.mark.bug("IB-82")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.parametrize("endpoint", [None, "[fd00:aa::2]:2"], ids=["over-v4", "over-v6"])
def test_message_in_fragments_is_dropped_as_one_message(wired: Tunnel, wire: Wire, endpoint: str | None) -> None:
    ns1, ns2 = wired.nodes["ns1"], wired.nodes["ns2"]
    if endpoint is not None:
        wired.a.set_peer(wired.pub_b, endpoint=Endpoint.parse(endpoint))
    for node in (ns1, ns2):
        node.set_link("wg0", mtu=TUNNEL_MTU)
    wired.must_ping("ns1", V4_OF_B)
    with UdpStream(ns1, ns2, V4_OF_B, size=LONG) as stream, Capture(ns1, "veth1") as capture:
        wire.apply(Drop(message="data", sender="ns1", nth=1))
        stream.send(2)
        assert stream.wait_for(1).numbers == (1,), "the message that the wire drops arrived"
        (lost,) = wire.sightings("data", sender="ns1", did="dropped")
        with twin("the dropped message arrives when the wire sends it again"):
            wire.replay(lost)
            assert stream.wait_for(2).numbers == (1, 0)
        messages = capture.messages(kind=DATA, port=1)
    sightings = wire.sightings("data", sender="ns1")
    assert [(s.did, len(s.fragments)) for s in sightings] == [("dropped", 3), ("passed", 3)]
    assert [message.payload for message in messages] == [s.message.payload for s in sightings]


def with_wrong_checksum(frame: bytes, change: int | None) -> bytes:
    """Return the datagram from another port with these checksum bits flipped; None: without a checksum."""
    datagram = frames.udp(frame)
    assert datagram is not None
    new = bytearray(frames.changed(frame, datagram, datagram.payload(frame), port=ELSEWHERE))
    offset = datagram.start + 6
    valid = int.from_bytes(new[offset : offset + 2])
    # 0 means no checksum, which is valid over IPv4.
    new[offset : offset + 2] = (0 if change is None else valid ^ change or 1).to_bytes(2)
    return bytes(new)


def send_from_b(wired: Tunnel, wire: Wire, count: int = 3) -> None:
    """Send datagrams from B one after the other, once it has had time for a wrong reaction."""
    # A's answers restore the endpoint, so look first.
    moved = poll_until(lambda: str(wired.seen_by_b().endpoint), lambda endpoint: endpoint != ENDPOINT_OF_A, EFFECT_WAIT)
    assert moved == ENDPOINT_OF_A, f"B's endpoint for A moved to {moved}"
    before = len(wire.sightings("data", sender="ns2"))
    for number in range(1, count + 1):
        udp_message(wired.nodes["ns2"], V4_OF_A, DISCARD, b"where are you?")
        wire.wait_for("data", "B's datagram", sender="ns2", nth=before + number)


def assert_b_sends_only_to_a(wired: Tunnel, wire: Wire) -> None:
    ports = {s.message.destination[1] for s in wire.sightings(sender="ns2")}
    assert ports == {PORT_OF_A}, f"B sent to the ports {ports}, expected {PORT_OF_A} alone"
    assert str(wired.seen_by_b().endpoint) == ENDPOINT_OF_A


def recreate_peer(wired: Tunnel) -> None:
    """Remove B from A's peers and add it again, so that A needs a new session."""
    b = wired.seen_by_a()
    wired.a.set_peer(b.public_key, remove=True)
    wired.a.set_peer(b.public_key, preshared_key=b.preshared_key, endpoint=b.endpoint, allowed_ips=b.allowed_ips)


# Retries


@pytest.mark.waiting
@pytest.mark.requirement("TM-01", "HS-16", "HS-14")
@pytest.mark.parametrize("message", ["initiation", "response"])
def test_lost_handshake_message_costs_one_retry(wired: Tunnel, wire: Wire, to_b: UdpStream, message: str) -> None:
    wire.apply(Drop(message=message, nth=1))
    to_b.send()
    to_b.wait_for(1, RETRIED)
    first, second = wire.sightings("initiation")
    late = (second.message.time - first.message.time) / SECOND - REKEY_TIMEOUT
    assert 0 <= late <= MAX_JITTER + slack(REKEY_TIMEOUT)
    fields = [(s.message.payload[4:8], s.message.payload[8:40]) for s in (first, second)]
    assert all(old != new for old, new in zip(*fields, strict=True)), "the retry is not a new message"
    stamps = [opened(s.message.payload, wired.key_b)[1].hex() for s in (first, second)]
    assert stamps[0] < stamps[1], f"the timestamp of the retry is not greater: {stamps}"


@pytest.mark.waiting
@pytest.mark.requirement("HS-22")
def test_response_to_superseded_initiation_is_ignored(wire: Wire, to_b: UdpStream) -> None:
    wire.apply(Hold(message="response", gather=2))
    to_b.send()
    to_b.wait_for(1, RETRIED)
    first, second = wire.sightings("initiation")
    confirmation = wire.sightings("transport", sender="ns1")[0]
    chosen = [s for s in wire.sightings("response") if s.message.payload[4:8] == confirmation.message.payload[4:8]]
    answered = [s.message.payload[8:12] for s in chosen]
    assert answered == [second.message.payload[4:8]], "A has confirmed another session than that of its retry"
    assert first.message.payload[4:8] != second.message.payload[4:8]


@pytest.mark.waiting
@pytest.mark.requirement("ROB-14")
@pytest.mark.bug("IB-04")
def test_simultaneous_initiations_lead_to_session(wire: Wire, to_b: UdpStream, to_a: UdpStream) -> None:
    wire.apply(Hold(message="initiation", nth="1-2", gather=2))
    to_b.send()
    to_a.send()
    to_b.wait_for(1, 15.0)
    to_a.wait_for(1, 15.0)
    assert {s.sender for s in wire.sightings("initiation")[:2]} == {"ns1", "ns2"}
