"""Check the cookie replies of a device under load, and what their cookies are good for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import Data, Initiation, Response, differs, twin
from harness.scripted.received import ReceivedCookieReply, ReceivedInitiation, ReceivedResponse
from selftests.support.load import (
    NO_MAC2,
    assert_accepted,
    assert_refused,
    cookie_reply,
    elsewhere,
    first_response,
    use,
)
from selftests.support.target import PORT, mac2, next_data

if TYPE_CHECKING:
    from harness import ScriptedPeer, Target

pytestmark = pytest.mark.alone

TYPE_AND_RESERVED = b"\3\0\0\0"
LENGTH = 64
FAMILIES = pytest.mark.parametrize("family", [4, pytest.param(6, marks=pytest.mark.capability("ipv6-underlay"))])
# Seconds: the life of a cookie's secret (COOKIE_SECRET_MAX_AGE), and more than that.
SECRET_LIVES, LONGER = 120.0, 125.0


@pytest.mark.requirement("MSG-03", "CK-04")
@pytest.mark.bug("IB-26", "IB-30")
@FAMILIES
def test_cookie_reply_has_fields_of_rejected_initiation(target: Target, family: int) -> None:
    peer, other = target.peer(family=family), target.peer(family=family)
    with target.load(family) as load:
        answer = load.answer(peer, Initiation(sender_index=0x0A0B0C0D))
        datagram = answer.datagram
        assert isinstance(answer, ReceivedCookieReply), f"an initiation without mac2 was answered by a {answer}"
        assert datagram[:4] == TYPE_AND_RESERVED, f"a cookie reply begins with {datagram[:4].hex()}"
        assert len(datagram) == LENGTH, f"a cookie reply has {len(datagram)} bytes, expected {LENGTH}"
        assert answer.receiver_index == 0x0A0B0C0D, (
            f"the receiver index of a cookie reply is {answer.receiver_index:#010x}, "
            "expected that of the initiation's sender"
        )
        assert not answer.wrong, f"a cookie reply does not open with the mac1 of the initiation: {answer.wrong}"
        assert_accepted(use(load, peer, answer.cookie), "an initiation with this cookie")
    # The code for load has not harmed the device.
    assert_accepted(first_response(other), "an initiation after the load")
    assert target.interface.get().peers, "after load the device lists no peer"


@pytest.mark.requirement("CK-16", "CK-04")
def test_cookie_reply_is_sealed_with_new_identity(target: Target) -> None:
    peer = target.peer()
    with twin("the device answers with the key that it had first"):
        peer.handshake()
    target.set_private_key(target.lab.key("another identity"))
    with target.load() as load:
        answer = load.answer(peer, Initiation(mac2=NO_MAC2))
        assert isinstance(answer, ReceivedCookieReply), f"under load an initiation was answered by a {answer}"
        assert not answer.wrong, f"after a change of the private key a cookie reply does not open: {answer.wrong}"


@pytest.mark.requirement("CK-04", "CK-13", "DOS-03")
@pytest.mark.bug("IB-30")
def test_response_without_mac2_gets_cookie_reply(target: Target) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer, b"staged")
    initiation = peer.expect(Initiation)
    with target.load() as load:
        answer = load.answer(peer, Response(to=initiation, sender_index=0x0A0B0C0D))
        assert isinstance(answer, ReceivedCookieReply), f"a response without mac2 was answered by a {answer}"
        assert answer.receiver_index == 0x0A0B0C0D, (
            f"the receiver index of a cookie reply is {answer.receiver_index:#010x}, "
            "expected that of the response's sender"
        )
        assert not answer.wrong, f"a cookie reply does not open with the mac1 of the response: {answer.wrong}"
        early = [str(one) for one in peer.drain() if one.name in {"data", "keepalive"}]
        assert not early, f"under load a response without mac2 made a session: the device sent {', '.join(early)}"
        session = peer.send(Response(to=latest(peer) or initiation, cookie=answer.cookie)).made()
        data = peer.expect(Data, where=lambda one: b"staged" in one.plaintext)
        assert data.session is session, "the device's data is not on the session of the response with a cookie"


def latest(peer: ScriptedPeer) -> ReceivedInitiation | None:
    """Return the last initiation of the device; on a busy machine it may have sent another one."""
    return next((one for one in reversed(peer.drain()) if isinstance(one, ReceivedInitiation)), None)


@pytest.mark.requirement("DOS-04", "CK-04")
@FAMILIES
def test_initiation_with_cookie_is_answered_under_load(target: Target, family: int) -> None:
    peer = target.peer(family=family)
    with target.load(family) as load:
        cookie = cookie_reply(load, peer).cookie
        answer = use(load, peer, cookie)
        assert_accepted(answer, "an initiation with a valid cookie")
        assert isinstance(answer, ReceivedResponse)
        session = answer.session
        packet = target.packet(peer)
        load.renew(peer.main.address)
        peer.send(session.data(packet))
        target.inside.expect(packet, what="data on a session that was made under load")
        assert next_data(target, peer).session is session


@pytest.mark.requirement("CK-05")
@FAMILIES
def test_cookie_is_same_for_one_source_and_other_elsewhere(target: Target, family: int) -> None:
    peer = target.peer(family=family)
    other = peer.socket(elsewhere(target, family), peer.main.port)
    with target.load(family) as load:
        first, second = (cookie_reply(load, peer) for _ in range(2))
        assert first.cookie == second.cookie, "one source got two cookies within seconds"
        moved = cookie_reply(load, peer, other)
        assert moved.cookie != first.cookie, f"{other} got the cookie of {peer.main}"
        assert_refused(use(load, peer, first.cookie, other), f"the cookie of {peer.main} from {other}")
        with twin("each cookie is valid where it was obtained"):
            assert_accepted(use(load, peer, first.cookie), "its own cookie")
            assert_accepted(use(load, peer, moved.cookie, other), "the cookie of the other address")


@pytest.mark.requirement("CK-06")
@pytest.mark.bug("IB-29")
@FAMILIES
def test_cookie_is_refused_from_other_port(target: Target, family: int) -> None:
    peer = target.peer(family=family)
    other = peer.socket()
    with target.load(family) as load:
        cookie = cookie_reply(load, peer).cookie
        with twin("the cookie is valid at the port where it was obtained"):
            assert_accepted(use(load, peer, cookie), "its own cookie")
        answer = use(load, peer, cookie, other)
        if isinstance(answer, ReceivedResponse):
            differs(
                "a cookie is valid from another port of the same address",
                by=[target.implementation.name],
                requirement="CK-06",
            )
        assert_refused(answer, f"the cookie of {peer.main} from {other}")
        moved = cookie_reply(load, peer, other).cookie
        assert moved != cookie, f"{other} got the cookie of {peer.main}"


@pytest.mark.requirement("RT-21")
@FAMILIES
def test_cookie_reply_comes_from_address_that_was_asked(target: Target, family: int) -> None:
    second, length = ("192.168.1.88", 24) if family == 4 else ("fd00:aa::58", 96)
    target.node.add_address("veth1", f"{second}/{length}")
    if family == 6:
        # A deprecated address is no source by default, so that the load's own replies come from the first address.
        target.node.run(["ip", "address", "change", f"{second}/{length}", "dev", "veth1", "preferred_lft", "0"])
    peer = target.peer(family=family)
    session = peer.connect()
    assert next_data(target, peer).session is session
    before = target.seen(peer).endpoint
    other = peer.socket(elsewhere(target, family))
    other.target = (second, PORT)
    with target.load(family) as load:
        answer = cookie_reply(load, peer, other)
    assert target.seen(peer).endpoint == before, "an initiation without mac2 that got a cookie reply moved the endpoint"
    assert answer.at == (other.address, other.port), f"the cookie reply went to {answer.at}, not to the sender"
    if answer.source != (second, PORT):
        differs(
            f"a message to {second} got a cookie reply from {answer.source[0]}",
            requirement="RT-21",
            by=[target.implementation.name],
        )


@pytest.mark.requirement("CK-15")
@FAMILIES
def test_cookie_replies_to_same_initiation_are_fresh(target: Target, family: int) -> None:
    peer = target.peer(family=family)
    with target.load(family) as load:
        first = cookie_reply(load, peer)
        datagram = peer.sent[-1]
        second = load.answer(peer, datagram)
    assert isinstance(second, ReceivedCookieReply), f"the same initiation again was answered by a {second}"
    assert first.nonce != second.nonce, f"two cookie replies have the nonce {first.nonce.hex()}"
    assert first.datagram[32:] != second.datagram[32:], "two cookie replies have the same ciphertext"
    assert first.cookie == second.cookie, "one source got two cookies within seconds"


@pytest.mark.requirement("DOS-03", "CK-05")
def test_wrong_mac2_gets_cookie_reply_under_load(target: Target) -> None:
    peer, other = target.peer(), target.peer()
    with target.load() as load:
        cookie = cookie_reply(load, peer).cookie
        foreign = cookie_reply(load, other).cookie
        for message, what in (
            (Initiation(mac2=bytes(range(16))), "an arbitrary mac2"),
            (Initiation(cookie=foreign), "the cookie of another peer"),
            (Initiation(cookie=bytes(16)), "a cookie of zero bytes"),
            (Initiation(mac2=mac2(peer.sent[-1], cookie)), "the mac2 of an earlier initiation"),
        ):
            assert_refused(load.answer(peer, message), what)
        with twin("the peer's own cookie is valid"):
            assert_accepted(use(load, peer, cookie), "its own cookie")


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.requirement("CK-07")
def test_cookie_is_refused_when_secret_is_older_than_120_s(target: Target) -> None:
    peer = target.peer()
    with target.load() as load:
        cookie = cookie_reply(load, peer).cookie
        load.hold(SECRET_LIVES / 2, peer.main.address)
        with twin("a cookie is valid for a while"):
            if cookie_reply(load, peer).cookie == cookie:
                assert_accepted(use(load, peer, cookie), "a cookie that its source still gets")
        load.hold(LONGER - SECRET_LIVES / 2, peer.main.address)
        answer = use(load, peer, cookie)
        assert_refused(answer, f"a cookie that is {LONGER:g} s old")
        assert isinstance(answer, ReceivedCookieReply)
        assert answer.cookie != cookie, f"after {LONGER:g} s the device gives the same cookie"
        with twin("the new cookie is valid"):
            assert_accepted(use(load, peer, answer.cookie), "a new cookie")
