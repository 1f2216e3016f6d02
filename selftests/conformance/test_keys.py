"""Check what follows from preshared keys, private keys and removed peers, against a scripted peer."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness import (
    ZERO_KEY,
    Data,
    DeviceConfig,
    Initiation,
    Keepalive,
    Key,
    Response,
    differs,
    let_pass,
    poll_until,
    twin,
)
from harness.scripted.received import ReceivedInitiation, ReceivedResponse
from selftests.support.target import begin, is_delivered, sending_session

if TYPE_CHECKING:
    from harness import ScriptedPeer, Target

PSK, OTHER_PSK = bytes(range(32)), bytes(range(32, 64))
SECOND = 1_000_000_000
# Seconds for the effect of a message that no marker can follow, because the device answers nobody.
EFFECT_WAIT = 0.2
# Seconds, with an interval of one second.
KEEPALIVE_IS_DUE = 1.5


def refused_response(peer: ScriptedPeer) -> ReceivedResponse:
    """Send an initiation, and return its response, which must not authenticate with the peer's preshared key."""
    peer.send(Initiation())
    came = poll_until(lambda: [one for one in peer.drain() if isinstance(one, ReceivedResponse)], bool, 2.0)
    assert came, "the device did not answer an initiation; the preshared key is not a part of it"
    assert came[0].wrong, "the device's response authenticates with another preshared key"
    peer.inbox.remove(came[0])
    return came[0]


# Preshared keys


@pytest.mark.requirement("HS-20")
@pytest.mark.parametrize(
    ("key", "other"),
    [(PSK, OTHER_PSK), (PSK, bytes(32)), (bytes(32), PSK)],
    ids=["other", "absent-here", "absent-there"],
)
def test_responder_with_other_preshared_key_makes_no_session(target: Target, key: bytes, other: bytes) -> None:
    peer = target.peer(preshared_key=key)
    peer.preshared_key = other
    refused_response(peer)
    peer.preshared_key = key
    with twin("the right preshared key makes a session"):
        assert is_delivered(target, peer, peer.handshake())


@pytest.mark.requirement("HS-20", "HS-18")
@pytest.mark.parametrize("key", [PSK, bytes(32)], ids=["given", "absent"])
def test_initiator_refuses_response_with_other_preshared_key(target: Target, key: bytes) -> None:
    peer = target.peer(preshared_key=key, endpoint=True)
    target.send(peer, b"first")
    initiation = peer.expect(Initiation)
    wrong = peer.send(Response(to=initiation, preshared_key=OTHER_PSK)).made()
    peer.send(wrong.data(target.packet(peer, b"no session")))
    peer.expect_silence(after="a response with another preshared key")
    with twin("a response with the right one completes the same handshake"):
        session = peer.send(Response(to=initiation)).made()
        data = peer.expect(Data, where=lambda one: b"first" in one.plaintext)
        assert data.session is session
        assert is_delivered(target, peer, session)
    assert target.packet(peer, b"no session") not in target.inside.packets(), "the device took data of no session"


@pytest.mark.requirement("HS-21", "HS-20")
@pytest.mark.bug("IB-23")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize(
    ("old", "new"), [(PSK, OTHER_PSK), (PSK, bytes(32)), (bytes(32), PSK)], ids=["change", "clear", "set"]
)
def test_new_preshared_key_counts_from_next_handshake_of_peer(target: Target, old: bytes, new: bytes) -> None:
    peer = target.peer(preshared_key=old)
    session = peer.connect()
    target.interface.set_peer(peer.public_key, preshared_key=Key(new))
    assert is_delivered(target, peer, session), "the device refused data on its session after the preshared key changed"
    assert sending_session(target, peer) is session, "the device left its session after the preshared key changed"
    refused_response(peer)
    peer.preshared_key = new
    with twin("the new preshared key makes a session"):
        assert is_delivered(target, peer, peer.handshake())


@pytest.mark.requirement("HS-21", "HS-20")
@pytest.mark.bug("IB-23")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize(
    ("old", "new"), [(PSK, OTHER_PSK), (PSK, bytes(32)), (bytes(32), PSK)], ids=["change", "clear", "set"]
)
def test_new_preshared_key_counts_from_next_initiation(target: Target, old: bytes, new: bytes) -> None:
    peer = target.peer(preshared_key=old, endpoint=True)
    target.interface.set_peer(peer.public_key, preshared_key=Key(new))
    target.send(peer, b"first")
    initiation = peer.expect(Initiation)
    peer.send(Response(to=initiation, preshared_key=old))
    peer.expect_silence(after="a response with the preshared key that was replaced")
    with twin("a response with the new preshared key makes a session"):
        session = peer.send(Response(to=initiation, preshared_key=new)).made()
        data = peer.expect(Data, where=lambda one: b"first" in one.plaintext)
        assert data.session is session


# Latest handshake


@pytest.mark.requirement("HS-25")
def test_responder_reports_handshake_when_data_confirms_it(target: Target) -> None:
    peer = target.peer()
    assert target.seen(peer).latest_handshake == 0, "the device reports a handshake before there was one"
    session = peer.handshake()
    assert target.seen(peer).latest_handshake == 0, "the device reports a handshake that no data has confirmed"
    before = time.time_ns()
    peer.send(session.keepalive())
    reported = poll_until(lambda: target.seen(peer).latest_handshake, bool, 2.0)
    assert_is_now(reported, before)


@pytest.mark.requirement("HS-25")
def test_initiator_reports_handshake_when_response_comes(target: Target) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer)
    initiation = peer.expect(Initiation)
    assert target.seen(peer).latest_handshake == 0, "the device reports a handshake that no response has completed"
    before = time.time_ns()
    peer.send(Response(to=initiation))
    peer.expect(Data)
    assert_is_now(target.seen(peer).latest_handshake, before)


def assert_is_now(reported: int, before: int) -> None:
    """Assert that a reported time, ns, is not before the message was sent, and not after now."""
    now = time.time_ns()
    # Some programs report the age of the handshake by a clock that they read four times a second.
    assert before - SECOND // 4 <= reported <= now, (
        f"the latest handshake is reported {(reported - before) / 1e9:+.3f} s after it was completed"
    )


# Identity


@pytest.mark.requirement("HS-26")
@pytest.mark.parametrize("identity", ["cleared", "zero", "public-of-zero"])
def test_device_without_private_key_answers_no_initiation(target: Target, identity: str) -> None:
    peer = target.peer()
    with twin("an initiation is answered while there is a key"):
        peer.handshake()
    key = target.key
    target.interface.set(DeviceConfig(private_key=ZERO_KEY))
    # A program may compute with a key of zeros as if it were one.
    peer.device = {"cleared": peer.device, "zero": ZERO_KEY, "public-of-zero": ZERO_KEY.public()}[identity]
    peer.send(Initiation())
    let_pass(EFFECT_WAIT, "without a key the device answers no marker either")
    came = ", ".join(map(str, peer.drain()))
    assert not came, f"without a private key the device answered an initiation: {came}"
    with twin("an initiation is answered when there is a key again"):
        target.set_private_key(key)
        peer.handshake()


@pytest.mark.requirement("CK-16")
def test_mac1_for_old_identity_is_refused_after_key_change(target: Target) -> None:
    peer = target.peer()
    peer.handshake()
    old = target.public_key
    target.set_private_key(target.lab.key("another identity"))
    peer.send(Initiation(mac1_recipient=old.raw))
    peer.expect_silence(after="an initiation to its new identity whose mac1 is made for the old one")
    with twin("the same with a mac1 for the new identity is answered"):
        peer.handshake()


@pytest.mark.requirement("CK-16")
def test_old_identity_is_gone_after_key_change(target: Target) -> None:
    peer = target.peer()
    peer.handshake()
    old = target.public_key
    target.set_private_key(target.lab.key("another identity"))
    new, peer.device = target.public_key, old
    peer.send(Initiation())
    peer.expect_silence(after="an initiation to the identity that it had before")
    peer.send(Initiation(mac1_recipient=new.raw))
    peer.expect_silence(after="an initiation to its old identity whose mac1 is made for the new one")
    with twin("an initiation to the new identity is answered"):
        peer.device = new
        peer.handshake()


@pytest.mark.requirement("CK-16", "HS-29")
@pytest.mark.parametrize("is_new", [False, True], ids=["old", "new"])
def test_initiation_has_new_identity_at_once_after_key_change(target: Target, is_new: bool) -> None:
    peer = target.peer(endpoint=True)
    session = begin(target, peer).session if is_new else None
    with twin("the device initiates with its key"):
        target.send(peer)
        peer.expect(Data if session else Initiation)
    target.set_private_key(target.lab.key("another identity"))
    target.send(peer, b"after the change")
    peer.expect(Initiation, within=1.0)


@pytest.mark.requirement("HS-29")
def test_unconfirmed_session_never_sends_after_key_change(target: Target) -> None:
    peer = target.peer()
    peer.send(Initiation())
    waiting = peer.expect(Response).session
    target.set_private_key(target.lab.key("another identity"))
    # The first data on it would make it the current session: a device may take it, but must not send on it.
    peer.send(waiting.data(target.packet(peer, b"confirms the session of the old identity")))
    target.send(peer, b"after the change")
    initiation = poll_until(lambda: [one for one in peer.drain() if isinstance(one, ReceivedInitiation)], bool, 1.0)
    early = [str(one) for one in peer.inbox if one.name in {"data", "keepalive"}]
    assert not early, f"after a new private key the device sent on a session of the old one: {early[0]}"
    assert initiation, "after a new private key the device did not initiate for the next packet"


@pytest.mark.requirement("HS-30")
def test_session_still_receives_after_key_change(target: Target) -> None:
    peer = target.peer()
    session = peer.connect()
    with twin("data is delivered before the change"):
        assert is_delivered(target, peer, session)
    target.set_private_key(target.lab.key("another identity"))
    probe = target.packet(peer, b"after the change")
    peer.send(session.data(probe))
    marker = peer.handshake()
    end = target.packet(peer, b"the end")
    peer.send(marker.data(end))
    target.inside.expect(end)
    if probe not in target.inside.packets():
        differs("data on a session from before a new private key is dropped", by=[target.implementation.name])


@pytest.mark.requirement("HS-27", "HS-28")
@pytest.mark.capability("peer-before-key")
def test_device_without_private_key_sends_nothing(target: Target) -> None:
    target.interface.set(DeviceConfig(private_key=ZERO_KEY))
    peer = target.peer(endpoint=True)
    target.send(peer, b"staged")
    let_pass(EFFECT_WAIT, "without a key the device answers no marker")
    early = peer.drain()
    peer.inbox.clear()
    target.set_private_key(target.key)
    if early:
        differs(f"without a private key it sends {early[0]}", by=[target.implementation.name])
    if not poll_until(lambda: [one for one in peer.drain() if isinstance(one, ReceivedInitiation)], bool, 1.0):
        differs("its first private key triggers no initiation", by=[target.implementation.name])
    session = peer.respond()
    data = peer.expect(Data, where=lambda one: b"staged" in one.plaintext)
    assert data.session is session


# Removal


@pytest.mark.requirement("HS-36")
def test_removed_peer_is_forgotten(target: Target) -> None:
    peer, other = target.peer(), target.peer()
    session, marker = peer.connect(), other.connect()
    with twin("data and an initiation of the peer are taken"):
        assert is_delivered(target, peer, session)
        peer.handshake()
    target.remove(peer)
    gone = target.packet(peer, b"of a removed peer")
    peer.send(session.data(gone))
    assert is_delivered(target, other, marker)
    with suppress(OSError):  # ENOKEY of the driver: no peer has this destination
        target.send(peer, b"to a removed peer")
    peer.send(Initiation())
    peer.expect_silence(after="an initiation of a removed peer")
    assert gone not in target.inside.packets(), "the device delivered data of a removed peer"


@pytest.mark.requirement("HS-36")
@pytest.mark.capability("persistent-keepalive")
def test_removed_peer_gets_nothing_more(target: Target) -> None:
    peer = target.peer(endpoint=True, persistent_keepalive=1)
    with twin("the peer gets persistent keepalives"):
        peer.respond()
        for _ in range(2):
            peer.expect(Keepalive)
    target.remove(peer)
    peer.drain()
    peer.inbox.clear()
    let_pass(KEEPALIVE_IS_DUE, "a persistent keepalive would be due")
    peer.expect_silence(after="nothing, after the peer was removed")


@pytest.mark.requirement("HS-36")
def test_peer_that_is_added_again_starts_clean(target: Target) -> None:
    peer = target.peer()
    session = peer.connect()
    with twin("data of the peer is delivered"):
        assert is_delivered(target, peer, session)
    assert target.seen(peer).rx_bytes
    target.remove(peer)
    target.configure(peer)
    seen = target.seen(peer)
    assert (seen.rx_bytes, seen.tx_bytes, seen.latest_handshake, seen.endpoint) == (0, 0, 0, None), (
        f"a peer that was removed and added again has a past: {seen}"
    )
    gone = target.packet(peer, b"of before the removal")
    peer.send(session.data(gone))
    new = peer.connect()
    assert is_delivered(target, peer, new), (
        "the device refused data on the first session after the peer was added again"
    )
    assert gone not in target.inside.packets(), "the device delivered data on a session from before the peer's removal"


@pytest.mark.requirement("HS-36", "HS-17")
def test_response_to_initiation_of_removed_peer_is_refused(target: Target) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer, b"staged")
    initiation = peer.expect(Initiation)
    target.remove(peer)
    target.configure(peer)
    lost = peer.send(Response(to=initiation)).made()
    peer.send(lost.keepalive())
    peer.expect_silence(after="a response to an initiation of before the peer's removal")
    assert target.seen(peer).latest_handshake == 0
    with twin("a handshake of the new peer works"):
        assert is_delivered(target, peer, peer.handshake())
