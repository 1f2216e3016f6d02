"""Check which messages of a scripted peer move its endpoint at the device, and which do not."""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING

import pytest

from harness import Capture, Data, DeviceConfig, Initiation, Response, add_veth, differs, let_pass, poll_until, twin
from harness.wire.messages import with_mac1
from selftests.support.target import PORT, begin, established, is_delivered, next_data

if TYPE_CHECKING:
    from harness import PeerSocket, ScriptedPeer, Session, Target

pytestmark = pytest.mark.capability("roaming")

ELSEWHERE = {4: "192.168.1.77", 6: "fd00:aa::77"}
FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
MOVED_WITHIN = 2.0
FIRST_ADDRESS, SECOND_ADDRESS = "192.168.1.1", "192.168.1.200"
SECOND_IPV6 = "fd00:aa::58"
# Seconds, and with the jitter and a timer's lateness.
REKEY_TIMEOUT, RETRY_WITHIN, SILENT_WITHIN = 5.1, 7.0, 17.0
# Enough that the device has a first one, a last one, and one between.
PEERS = 3
OTHER_PORT = 9998


def elsewhere(target: Target, peer: ScriptedPeer, family: int = 4) -> PeerSocket:
    """Open a socket of the peer at another address."""
    return peer.socket(target.address(ELSEWHERE[family]))


def is_at(target: Target, peer: ScriptedPeer, place: PeerSocket) -> bool:
    """Return whether the device reports this address and port as the peer's endpoint."""
    endpoint = target.seen(peer).endpoint
    return endpoint is not None and (endpoint.host, endpoint.port) == (place.address, place.port)


def assert_moved(target: Target, peer: ScriptedPeer, place: PeerSocket, by: str) -> None:
    """Assert that the endpoint is soon at this place."""
    moved = poll_until(lambda: is_at(target, peer, place), bool, MOVED_WITHIN)
    assert moved, f"{by} from {place!r} did not move the endpoint, it is {target.seen(peer).endpoint}"


# Handshake messages


@pytest.mark.requirement("RT-01", "HS-01")
@FAMILIES
def test_initiation_moves_endpoint_to_its_source(target: Target, family: int) -> None:
    peer = target.peer(family=family)
    places = [peer.main, peer.socket(), elsewhere(target, peer, family)]
    for place in places:
        peer.send(Initiation(), via=place)
        response = peer.expect(Response)
        assert response.at == (place.address, place.port), f"the response went to {response.at}, not to {place!r}"
        assert_moved(target, peer, place, "an initiation")


@pytest.mark.requirement("RT-02")
@pytest.mark.bug("IB-35")
@FAMILIES
@pytest.mark.parametrize("what", ["port", "address"])
def test_response_moves_endpoint_to_its_source(target: Target, family: int, what: str) -> None:
    peer = target.peer(endpoint=True, family=family)
    target.send(peer, b"first")
    initiation = peer.expect(Initiation)
    assert initiation.at == (peer.main.address, peer.main.port)
    place = peer.socket() if what == "port" else elsewhere(target, peer, family)
    peer.send(Response(to=initiation), via=place)
    first = peer.expect(Data)
    assert first.at == (place.address, place.port), f"the first data went to {first.at}, not to {place!r}"
    assert_moved(target, peer, place, "a response")


# Data


@pytest.mark.requirement("RT-03", "RT-07")
@pytest.mark.bug("IB-35")
@pytest.mark.parametrize("kind", ["data", "keepalive"])
@pytest.mark.parametrize("slot", ["current", "previous", "next"])
@FAMILIES
def test_data_on_any_session_moves_endpoint(target: Target, slot: str, kind: str, family: int) -> None:
    peer = target.peer(family=family)
    sessions = {"previous": established(target, peer), "current": established(target, peer)}
    if slot == "next":
        sessions["next"] = peer.handshake()
    assert is_delivered(target, peer, sessions["current"])
    place = elsewhere(target, peer, family)
    packet = target.packet(peer, b"from elsewhere") if kind == "data" else b""
    peer.send(sessions[slot].data(packet), via=place)
    assert_moved(target, peer, place, f"{kind} on the {slot} session")
    data = next_data(target, peer)
    assert data.at == (place.address, place.port), f"data for the peer went to {data.at}, not to {place!r}"


@pytest.mark.requirement("RT-07")
@pytest.mark.bug("IB-35")
def test_late_data_in_window_moves_endpoint(target: Target) -> None:
    peer = target.peer()
    session = peer.connect()
    session.counter = 500
    assert is_delivered(target, peer, session)
    place = elsewhere(target, peer)
    peer.send(session.data(target.packet(peer, b"late"), counter=100), via=place)
    assert_moved(target, peer, place, "late data in the window")


@pytest.mark.requirement("RT-07", "RT-03")
def test_last_message_decides_endpoint(target: Target) -> None:
    peer = target.peer()
    sessions = [established(target, peer), established(target, peer)]
    places = [peer.main, peer.socket(), elsewhere(target, peer)]
    for number in range(6):
        peer.send(sessions[number % 2].keepalive(), via=places[number % 3])
        assert_moved(target, peer, places[number % 3], "a keepalive")


@pytest.mark.requirement("RT-04", "DT-03")
@pytest.mark.bug("IB-35", "IB-33")
@pytest.mark.parametrize("wrong", ["replay", "too old", "tag", "initiation", "response"])
def test_refused_message_does_not_move_endpoint(target: Target, wrong: str) -> None:
    peer = target.peer(endpoint=True)
    session = begin(target, peer).session
    assert session is not None
    session.counter = 100_000
    assert is_delivered(target, peer, session)
    response = peer.sent[0]
    peer.handshake()
    old, initiation = peer.sent[1], peer.sent[-1]
    place = elsewhere(target, peer)
    match wrong:
        case "replay":
            peer.send(old, via=place)
        case "too old":
            peer.send(session.data(target.packet(peer, b"too old"), counter=1), via=place)
        case "tag":
            peer.send(session.data(ciphertext=bytes(48)), via=place)
        case "initiation":
            peer.keep_spacing()
            peer.send(initiation, via=place)
        case "response":
            peer.send(response, via=place)
    # Data of another session, so that it is not the marker that moves the endpoint back.
    target.round_trip()
    data = next_data(target, peer)
    assert data.at == (peer.main.address, peer.main.port), f"a refused message ({wrong}) moved data to {data.at}"
    assert is_at(target, peer, peer.main), f"a refused message ({wrong}) moved the endpoint"
    with twin("valid data moves the endpoint"):
        peer.send(session.data(target.packet(peer, b"valid")), via=place)
        assert_moved(target, peer, place, "valid data")


@pytest.mark.requirement("RT-04", "HS-07")
@pytest.mark.bug("IB-32")
@pytest.mark.parametrize("has_session", [False, True], ids=["no-session", "session"])
def test_garbage_with_valid_mac1_has_no_effect(target: Target, has_session: bool) -> None:
    peer = target.peer(endpoint=True)
    stranger = peer.socket(target.address(ELSEWHERE[4]))
    session = begin(target, peer).session if has_session else None
    index = session.remote_index if session else 0x01020304
    public = target.public_key.raw
    before = target.seen(peer)
    for datagram in (
        with_mac1(struct.pack("<II", 1, index) + bytes(140), public),
        with_mac1(struct.pack("<III", 2, index, index) + bytes(80), public),
        struct.pack("<II", 3, index) + bytes(56),
        struct.pack("<IIQ", 4, index, 7) + bytes(16),
        struct.pack("<IIQ", 4, index ^ 1, 7) + bytes(48),
    ):
        peer.send(datagram, via=stranger)
    peer.expect_silence(after="garbage of all message types")
    assert target.seen(peer).endpoint == before.endpoint, f"garbage moved the endpoint to {target.seen(peer).endpoint}"
    assert target.seen(peer).rx_bytes == before.rx_bytes, "garbage is counted as received"
    target.send(peer, b"after the garbage")
    with twin("the device sends to the endpoint that it has"):
        came = peer.expect(Data if has_session else Initiation)
        assert came.at == (peer.main.address, peer.main.port)


# Source address


@pytest.mark.requirement("RT-15")
@pytest.mark.capability("sticky-source")
def test_retry_forgets_remembered_source_address(target: Target) -> None:
    target.node.add_address("veth1", f"{SECOND_ADDRESS}/24")
    peer = target.peer()
    peer.main.target = (SECOND_ADDRESS, 1)
    peer.handshake()
    let_pass(REKEY_TIMEOUT, "the device does not initiate within 5 s of its response")
    target.send(peer)
    first = peer.expect(Initiation)
    with twin("the device's first initiation comes from the address that the peer has sent to"):
        assert first.source[0] == SECOND_ADDRESS, f"it comes from {first.source[0]}"
    retry = peer.expect(Initiation, within=RETRY_WITHIN)
    if retry.source[0] != FIRST_ADDRESS:
        differs(f"a retry comes from {retry.source[0]} still", by=[target.implementation.name])


@pytest.mark.requirement("RT-15")
@pytest.mark.waiting
@pytest.mark.capability("sticky-source")
def test_initiation_to_silent_peer_forgets_source_address(target: Target) -> None:
    target.node.add_address("veth1", f"{SECOND_ADDRESS}/24")
    peer = target.peer()
    peer.main.target = (SECOND_ADDRESS, 1)
    peer.connect()
    with twin("the device's data comes from the address that the peer has sent to"):
        source = next_data(target, peer).source[0]
        assert source == SECOND_ADDRESS, f"it comes from {source}"
    # 15 s after data that nothing has answered, with jitter.
    initiation = peer.expect(Initiation, within=SILENT_WITHIN)
    if initiation.source[0] != FIRST_ADDRESS:
        differs(
            f"its initiation to a silent peer comes from {initiation.source[0]} still", by=[target.implementation.name]
        )


@pytest.mark.requirement("RT-16")
@pytest.mark.capability("sticky-source")
@pytest.mark.parametrize("change", ["listen-port", pytest.param("fwmark", marks=pytest.mark.capability("fwmark"))])
def test_change_forgets_source_address_of_every_peer(target: Target, change: str) -> None:
    target.node.add_address("veth1", f"{SECOND_ADDRESS}/24")
    peers = [target.peer() for _ in range(PEERS)]
    for peer in peers:
        peer.main.target = (SECOND_ADDRESS, 1)
        session = peer.connect()
        with twin("the device's data comes from the address that the peer has sent to"):
            source = poll_until(partial(source_of_answer, target, peer, session), SECOND_ADDRESS.__eq__, MOVED_WITHIN)
            assert source == SECOND_ADDRESS, f"it comes from {source}"
    target.interface.set(DeviceConfig(fwmark=7) if change == "fwmark" else DeviceConfig(listen_port=OTHER_PORT))
    kept = [number for number, peer in enumerate(peers, 1) if next_data(target, peer).source[0] != FIRST_ADDRESS]
    if kept:
        differs(
            f"after a change of the {change} it keeps the source address for the peers {kept} of {PEERS}",
            by=[target.implementation.name],
        )


def source_of_answer(target: Target, peer: ScriptedPeer, session: Session) -> str:
    """Return where the device's data comes from once it has received some.

    A program may hear late of a route that an address has brought, and then forget all source addresses again.
    """
    assert is_delivered(target, peer, session)
    return next_data(target, peer).source[0]


@pytest.mark.requirement("RT-14")
@pytest.mark.capability("sticky-source", "ipv6-underlay")
def test_ipv6_source_is_kept_when_route_leaves_by_other_link(target: Target) -> None:
    node, other = target.node, target.peers_node
    node.add_address("veth1", f"{SECOND_IPV6}/96")
    # A deprecated address is no source by default.
    node.run(["ip", "address", "change", f"{SECOND_IPV6}/96", "dev", "veth1", "preferred_lft", "0"])
    add_veth(node, "veth3", other, "veth4")
    node.add_address("veth3", "fd00:cc::1/96")
    other.add_address("veth4", "fd00:cc::2/96")
    peer = target.peer(family=6)
    peer.main.target = (SECOND_IPV6, 1)
    session = peer.connect()
    assert is_delivered(target, peer, session)
    with twin("the device's data comes from the address that the peer has sent to"):
        source = next_data(target, peer).source[0]
        assert source == SECOND_IPV6, f"it comes from {source}"
    node.add_route(f"{peer.main.address}/128", via="fd00:cc::2")
    with Capture(node, "veth3") as wire:
        source = next_data(target, peer).source[0]
        assert wire.messages(port=PORT), "the test proved nothing: the device's data has not left by the other link"
    if source != SECOND_IPV6:
        differs(
            f"data leaves from {source} once its route is by another link",
            requirement="RT-14",
            by=[target.implementation.name],
        )
