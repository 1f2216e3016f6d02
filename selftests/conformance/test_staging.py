"""Check what a device keeps for a peer without a session, and what it sends when there is one."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness import Data, DeviceConfig, Initiation, Keepalive, PeerConfig, Response, differs, let_pass, twin
from harness.scripted.received import ReceivedData
from selftests.support.target import begin, next_data, set_down, set_up

if TYPE_CHECKING:
    from harness import ScriptedPeer, Target

# MAX_STAGED_PACKETS of the driver, which adds a packet after it has made room for it.
STAGED, KEPT_BY_DRIVER = 128, 129
SENT, MOST = 300, 256
# Seconds: two persistent keepalives are due, and the initiation is still pending.
TWO_KEEPALIVES = 2.5
SECOND = 1_000_000_000


def number_of(message: ReceivedData) -> int:
    """Return the number in the payload of a UDP datagram over IPv4."""
    return int(struct.unpack_from(">I", message.packet, 28)[0])


def stage(target: Target, peer: ScriptedPeer, count: int = SENT) -> None:
    """Let the device's node send numbered datagrams to a peer; return when the device has read them all."""
    for number in range(count):
        target.send(peer, struct.pack(">I", number))
    # A program that is slow still reads them when its initiation is out. It reads the last packet last.
    last = target.peer(endpoint=True)
    target.send(last)
    last.expect(Initiation)


def sent_after_handshake(target: Target, peer: ScriptedPeer) -> list[ReceivedData]:
    """Answer the device's initiation; return all messages of the session, up to one whose packet follows the others."""
    session = peer.respond()
    first = peer.expect(Data)
    target.send(peer, struct.pack(">I", SENT))
    last = peer.expect(Data, where=lambda one: bool(one.packet) and number_of(one) == SENT)
    came = [first, *(one for one in peer.drain() if isinstance(one, ReceivedData))]
    assert {one.session for one in [*came, last]} == {session}
    return came


@pytest.mark.requirement("Q-01", "Q-03")
def test_staged_packets_are_bounded_and_sent_in_order(target: Target) -> None:
    peer = target.peer(endpoint=True)
    stage(target, peer)
    came = sent_after_handshake(target, peer)
    numbers = [number_of(one) for one in came if one.packet]
    assert STAGED <= len(numbers) <= MOST, f"of {SENT} packets {len(numbers)} were staged, expected {STAGED} to {MOST}"
    assert numbers == sorted(numbers), f"staged packets were sent in another order: {numbers}"
    counters = [one.counter for one in came]
    assert counters == list(range(len(came))), f"the counters of staged packets are not consecutive: {counters}"


@pytest.mark.requirement("Q-02")
def test_oldest_staged_packets_are_dropped_first(target: Target) -> None:
    peer = target.peer(endpoint=True)
    stage(target, peer)
    numbers = [number_of(one) for one in sent_after_handshake(target, peer) if one.packet]
    assert numbers, "no staged packet was sent"
    if numbers != list(range(SENT - KEPT_BY_DRIVER, SENT)):
        differs(
            f"of {SENT} packets {len(numbers)} were kept, from {numbers[0]} to {numbers[-1]}",
            by=[target.implementation.name],
        )


@pytest.mark.requirement("Q-08")
@pytest.mark.bug("IB-68")
def test_staged_packets_are_discarded_on_link_down(target: Target) -> None:
    peer = target.peer(endpoint=True)
    with twin("a staged packet is sent after the handshake"):
        other = target.peer(endpoint=True)
        begin(target, other)
    target.send(peer, b"staged before")
    peer.expect(Initiation)
    set_down(target)
    set_up(target)
    assert_only_new(target, peer)


@pytest.mark.requirement("Q-08")
def test_staged_packets_are_discarded_with_peer(target: Target) -> None:
    peer = target.peer(endpoint=True)
    with twin("a staged packet is sent after the handshake"):
        other = target.peer(endpoint=True)
        begin(target, other)
    target.send(peer, b"staged before")
    peer.expect(Initiation)
    target.remove(peer)
    target.configure(peer, endpoint=True)
    assert_only_new(target, peer)


def assert_only_new(target: Target, peer: ScriptedPeer) -> None:
    """Let the device begin another handshake; assert that no packet comes but a new one."""
    target.send(peer, b"staged after")
    session = peer.respond()
    peer.expect(Data, where=lambda one: b"staged after" in one.plaintext)
    came = [one for one in peer.drain() if isinstance(one, ReceivedData)]
    old = [one for one in came if one.session is session and b"before" in one.plaintext]
    assert not old, "the device sent a packet that it had to discard"


@pytest.mark.requirement("Q-10", "MSG-13")
@pytest.mark.capability("persistent-keepalive")
def test_one_keepalive_at_most_waits_for_session(target: Target) -> None:
    peer = target.peer(endpoint=True, persistent_keepalive=1)
    initiation = peer.expect(Initiation)
    let_pass(TWO_KEEPALIVES, "persistent keepalives are due, one each second")
    peer.send(Response(to=initiation))
    first = peer.expect(Data)
    assert first.is_keepalive, f"expected a keepalive, got {first}"
    assert first.counter == 0
    target.round_trip()
    more = [one for one in peer.drain() if isinstance(one, ReceivedData)]
    # The next one is due a second after the first, so it is not among what came until now.
    late = [one for one in more if one.time - first.time < SECOND // 2]
    assert not late, f"{1 + len(late)} keepalives had waited for the session, expected one"


@pytest.mark.requirement("Q-10")
@pytest.mark.capability("persistent-keepalive", "update-peer")
def test_keepalive_is_not_queued_behind_staged_data(target: Target) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer, b"staged")
    initiation = peer.expect(Initiation)
    target.interface.set_peer(peer.public_key, persistent_keepalive=1)
    let_pass(TWO_KEEPALIVES, "persistent keepalives are due, one each second")
    peer.send(Response(to=initiation))
    first = peer.expect(Data)
    assert b"staged" in first.plaintext, f"the device sent {first} in front of its data"
    assert first.counter == 0
    target.round_trip()
    more = [one for one in peer.drain() if isinstance(one, ReceivedData) and one.time - first.time < SECOND // 2]
    assert not more, f"the device sent {len(more)} keepalives behind the data that had waited for the session"


@pytest.mark.requirement("TM-22")
@pytest.mark.bug("IB-86")
@pytest.mark.capability("persistent-keepalive", "update-peer")
def test_interval_of_one_peer_sends_nothing_to_others(target: Target) -> None:
    peers = [target.peer() for _ in range(3)]
    for peer in peers:
        peer.connect()
    before, one, after = peers
    configs = [PeerConfig(public_key=peer.public_key) for peer in peers]
    configs[1] = replace(configs[1], persistent_keepalive=600)
    target.interface.set(DeviceConfig(peers=tuple(configs)))
    with twin("the peer whose interval was set gets a keepalive at once"):
        one.expect(Keepalive, within=2.0)
    for peer, place in ((before, "before"), (after, "after")):
        # A session keeps order: a keepalive for the change would leave before this packet.
        next_data(target, peer)
        early = [str(message) for message in peer.drain() if message.name == "keepalive"]
        assert not early, (
            f"the device sent a keepalive to the peer that was configured {place} the one with an interval"
        )
