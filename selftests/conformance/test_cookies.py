"""Check what a device does with cookie replies, which scripted peers send to its handshake messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import CookieReply, Data, Initiation, Response, differs, twin
from selftests.support.target import established, mac2, next_data

if TYPE_CHECKING:
    from harness import PeerState, ScriptedPeer, Target
    from harness.scripted.received import ReceivedInitiation, ReceivedResponse

COOKIE, OTHER_COOKIE = b"the first cookie", b"the other cookie"
NONE = bytes(16)
# Seconds: REKEY_TIMEOUT, and with the jitter and a timer's lateness.
RETRY, RETRY_WITHIN = 5.0, 7.0
NANOSECONDS = 1_000_000_000
INVALID = ["index", "tag", "mac1", "issuer", "length"]


def send_invalid(peer: ScriptedPeer, to: ReceivedInitiation | ReceivedResponse, kind: str) -> None:
    """Send a cookie reply that a device must ignore, with another cookie than COOKIE."""
    value = OTHER_COOKIE
    peer.send(
        {
            "index": CookieReply(to=to, value=value, receiver_index=to.sender_index ^ 0x5A5A5A5A),
            "tag": CookieReply(to=to, encrypted_cookie=bytes(32)),
            "mac1": CookieReply(to=to, value=value, mac1=bytes([to.mac1[0] ^ 1]) + to.mac1[1:]),
            "issuer": CookieReply(to=to, value=value, issuer=bytes(range(32))),
            "length": CookieReply(to=to, value=value, suffix=b"\0"),
        }[kind]
    )


def next_response(peer: ScriptedPeer) -> ReceivedResponse:
    """Make a handshake with a new initiation; return its response."""
    peer.send(Initiation())
    return peer.expect(Response)


def assert_mac2(message: ReceivedInitiation | ReceivedResponse, cookie: bytes, what: str) -> None:
    """Assert that mac2 of a message is made with the cookie, or is zero for b""."""
    expected = mac2(message.datagram, cookie) if cookie else NONE
    names = {
        NONE: "zero",
        mac2(message.datagram, COOKIE): "made with the first cookie",
        mac2(message.datagram, OTHER_COOKIE): "made with the other cookie",
    }
    assert message.mac2 == expected, (
        f"mac2 of {what} is {names.get(message.mac2, 'made with neither cookie')}, expected {names[expected]}"
    )


# The device's responses


@pytest.mark.requirement("CK-03", "CK-13")
@pytest.mark.bug("IB-31")
def test_response_has_mac2_of_cookie_for_last_response(target: Target) -> None:
    peer = target.peer()
    response = next_response(peer)
    assert_mac2(response, b"", "a response before there was a cookie")
    peer.send(CookieReply(to=response, value=COOKIE))
    peer.expect_silence(after="a cookie reply to its response")
    for number in (2, 3):
        assert_mac2(next_response(peer), COOKIE, f"response {number}")
    with twin("the session of such a response works"):
        session = peer.connect()
        assert next_data(target, peer).session is session


@pytest.mark.requirement("CK-11")
@pytest.mark.bug("IB-31")
@pytest.mark.parametrize("kind", INVALID)
def test_invalid_cookie_reply_to_response_is_ignored(target: Target, kind: str) -> None:
    peer = target.peer()
    response = next_response(peer)
    send_invalid(peer, response, kind)
    peer.expect_silence(after=f"a cookie reply with a wrong {kind}")
    response = next_response(peer)
    assert_mac2(response, b"", f"a response after a cookie reply with a wrong {kind}")
    with twin("a valid cookie reply is taken"):
        peer.send(CookieReply(to=response, value=COOKIE))
        response = next_response(peer)
        assert_mac2(response, COOKIE, "a response after a valid cookie reply")
    send_invalid(peer, response, kind)
    assert_mac2(next_response(peer), COOKIE, f"a response after a valid cookie reply, and one with a wrong {kind}")


@pytest.mark.requirement("CK-11")
def test_cookie_reply_to_earlier_response_is_ignored(target: Target) -> None:
    peer = target.peer()
    earlier, last = next_response(peer), next_response(peer)
    peer.send(CookieReply(to=earlier, value=OTHER_COOKIE))
    peer.send(CookieReply(to=last, value=OTHER_COOKIE, mac1=earlier.mac1))
    last = next_response(peer)
    assert_mac2(last, b"", "a response after a cookie reply to an earlier one")
    with twin("a cookie reply to the last response is taken"):
        peer.send(CookieReply(to=last, value=COOKIE))
        assert_mac2(next_response(peer), COOKIE, "a response after a valid cookie reply")


@pytest.mark.requirement("CK-12")
def test_second_cookie_for_one_message_is_ignored(target: Target) -> None:
    peer = target.peer()
    response = next_response(peer)
    peer.send(CookieReply(to=response, value=COOKIE))
    peer.send(CookieReply(to=response, value=OTHER_COOKIE))
    response = next_response(peer)
    if response.mac2 == mac2(response.datagram, OTHER_COOKIE):
        differs("the second of two cookies for one message counts", by=[target.implementation.name])
    assert_mac2(response, COOKIE, "a response after two cookie replies")


@pytest.mark.requirement("CK-12", "CK-03")
def test_new_cookie_for_next_message_replaces_first(target: Target) -> None:
    peer = target.peer()
    peer.send(CookieReply(to=next_response(peer), value=COOKIE))
    response = next_response(peer)
    assert_mac2(response, COOKIE, "a response after a cookie reply")
    peer.send(CookieReply(to=response, value=OTHER_COOKIE))
    assert_mac2(next_response(peer), OTHER_COOKIE, "a response after a second cookie reply")


@pytest.mark.requirement("CK-14")
@pytest.mark.bug("IB-34")
def test_cookie_reply_to_response_changes_nothing_else(target: Target) -> None:
    peer = target.peer()
    session = established(target, peer)
    response = next_response(peer)
    elsewhere = peer.socket(target.address("192.168.1.77"))
    before = target.seen(peer)
    for _ in range(3):
        peer.send(CookieReply(to=response, value=COOKIE), via=elsewhere)
        peer.send(peer.sent[-1], via=elsewhere)
    peer.expect_silence(after="cookie replies from another address")
    assert_unchanged(target, peer, before)
    with twin("the cookie was taken"):
        assert_mac2(next_response(peer), COOKIE, "the next response")
    data = next_data(target, peer)
    assert (data.session, data.at) == (session, (peer.main.address, peer.main.port)), "a cookie reply moved data"


def assert_unchanged(target: Target, peer: ScriptedPeer, before: PeerState) -> None:
    """Assert that the device reports the same endpoint and counters of the peer as before."""
    after = target.seen(peer)
    assert after.endpoint == before.endpoint, f"a cookie reply moved the endpoint to {after.endpoint}"
    grown = after.rx_bytes - before.rx_bytes
    assert not grown, f"a cookie reply is counted as {grown} received bytes"


# The device's initiations


@pytest.mark.requirement("CK-03", "CK-10", "CK-14")
@pytest.mark.bug("IB-31", "IB-34")
def test_cookie_is_used_by_next_retry_and_changes_nothing_else(target: Target) -> None:
    peer = target.peer(endpoint=True)
    elsewhere = peer.socket(target.address("192.168.1.77"))
    target.send(peer, b"first")
    first = peer.expect(Initiation)
    assert_mac2(first, b"", "the first initiation")
    before = target.seen(peer)
    peer.send(CookieReply(to=first, value=COOKIE), via=elsewhere)
    peer.send(peer.sent[-1], via=elsewhere)
    peer.expect_silence(after="a cookie reply at once")
    assert_unchanged(target, peer, before)
    second = peer.expect(Initiation, within=RETRY_WITHIN)
    gap = (second.time - first.time) / NANOSECONDS
    assert gap >= RETRY, f"after a cookie reply the device sent another initiation within {gap:.3f} s"
    assert_mac2(second, COOKIE, "the initiation after a cookie reply")
    assert second.at == (peer.main.address, peer.main.port), f"a cookie reply moved the next initiation to {second.at}"
    assert second.ephemeral != first.ephemeral, "the initiation after a cookie reply has the ephemeral of the first"
    with twin("a response to it makes a session"):
        session = peer.send(Response(to=second)).made()
        assert peer.expect(Data, where=lambda one: b"first" in one.plaintext).session is session


@pytest.mark.requirement("CK-11")
@pytest.mark.bug("IB-31")
def test_invalid_cookie_reply_to_initiation_is_ignored(target: Target) -> None:
    # All wait for the retry together: one peer for each kind, without a cookie before it and with one.
    peers = {(kind, cookie): target.peer(endpoint=True) for kind in INVALID for cookie in (b"", COOKIE)}
    for (kind, cookie), peer in peers.items():
        target.send(peer)
        first = peer.expect(Initiation)
        if cookie:
            peer.send(CookieReply(to=first, value=cookie))
        send_invalid(peer, first, kind)
    retries = {of: peer.expect(Initiation, within=RETRY_WITHIN) for of, peer in peers.items()}
    for (kind, cookie), retry in retries.items():
        after = "a valid cookie reply and one" if cookie else "a cookie reply"
        assert_mac2(retry, cookie, f"the initiation after {after} with a wrong {kind}")


@pytest.mark.requirement("CK-02", "CK-13")
@pytest.mark.bug("IB-31")
def test_cookies_of_peers_are_separate(target: Target) -> None:
    peer, other = target.peer(), target.peer()
    peer.send(CookieReply(to=next_response(peer), value=COOKIE))
    with twin("the peer's own cookie is used"):
        assert_mac2(next_response(peer), COOKIE, "a response to the peer with a cookie")
    assert_mac2(next_response(other), b"", "a response to a peer without a cookie")
