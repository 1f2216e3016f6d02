"""Check against scripted peers what a device does with sessions, cookies and handshakes that grow old."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from harness import CookieReply, Data, Endpoint, Initiation, Response, differs, let_pass, poll_until, twin
from selftests.support.ageing import (
    LONGEST_RETRY,
    SECOND,
    data,
    initiations,
    live_session,
    live_sessions,
    longest,
    must_be_right,
)
from selftests.support.target import is_delivered, mac2, sending_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import ScriptedPeer, Session, Target
    from harness.scripted.received import ReceivedData, ReceivedInitiation, ReceivedResponse
    from selftests.support.ageing import Live

pytestmark = pytest.mark.waiting

KEEPALIVE_TIMEOUT = 10
REKEY_AFTER_TIME = 120
# An initiator whose session is so old initiates when it receives: 180 s, less 10 s and 5 s.
LAST_MINUTE_REKEY = 165
REJECT_AFTER_TIME = 180
ERASURE = 3 * REJECT_AFTER_TIME
# Seconds after which a peer begins the next session, before the last one is refused.
RENEWED = 170
# The timer wheel of Linux may be an eighth of a duration late.
COARSE = 1 / 8
# Seconds after which a series of retries has certainly ended.
GIVEN_UP = 21 * LONGEST_RETRY
# Seconds in which a device reacts to a message.
AT_ONCE = 1.0
# Seconds between two messages of a peer that sends all the time.
STEP = 2.5
COOKIE = b"c" * 16
# Seconds: a cookie is used for at least the first and never after the second (CK-08); the driver stops in between.
COOKIE_IS_USED, COOKIE_ENDS, COOKIE_OF_DRIVER_ENDS = 110, 120, 115
# Ages of the cookie, in seconds, at which the device has to respond.
AGES_OF_RESPONSES = (1, 30, 60, 90, 109, 114, 117, 119.5, 120.5, 126)


def begun_at(live: Live) -> list[float]:
    """Return the ages of a session, in seconds, at which the device has initiated another one."""
    return [(one.time - live.since) / SECOND for one in initiations(live.peer, live.since + SECOND)]


# Rekey


@pytest.mark.requirement("TM-07", "TM-08")
@pytest.mark.capability("persistent-keepalive")
def test_initiator_alone_rekeys_when_it_sends_after_120_s(target: Target) -> None:
    lives = {"data": live_sessions(target), "passive keepalive": live_sessions(target)}
    lives["persistent keepalive"] = live_sessions(target, persistent_keepalive=7)
    start = lives["data"][0]
    start.let_age(REKEY_AFTER_TIME - 8, "the sessions grow old")
    for live in lives["passive keepalive"]:
        live.peer.send(live.session.data(target.packet(live.peer)))
    start.let_age(REKEY_AFTER_TIME - 4.5, "the sessions grow old")
    for _ in range(14):
        for live in lives["data"]:
            target.send(live.peer)
        let_pass(1, "until the next packet")
    faults = [wrong_rekey(live, kind) for kind, each in lives.items() for live in each]
    must_be_right(faults)


def wrong_rekey(live: Live, kind: str) -> str:
    """Return what is wrong with the device's initiation after it has sent on a session that is 120 s old."""
    begun = begun_at(live)
    if live.role == "responder":
        return f"as responder the device initiated {begun[0]:.3f} s after the handshake" if begun else ""
    if begun and begun[0] < REKEY_AFTER_TIME:
        return f"the device initiated {begun[0]:.3f} s after its handshake, before 120 s"
    ages = [(one.time - live.since) / SECOND for one in data(live.peer)]
    due = [age for age in ages if age >= REKEY_AFTER_TIME]
    if not due:
        return f"the device sent no {kind} after 120 s; its data came at {ages}"
    # A message that comes within half a second of the limit may lead to an initiation.
    sent = next((age for age in due if age > REKEY_AFTER_TIME + 0.5), due[0])
    if begun and begun[0] <= sent + AT_ONCE:
        return ""
    return f"the device sent {kind} {sent:.3f} s after its handshake, and initiated at: {begun or 'never'}"


@pytest.mark.requirement("TM-30", "DT-21", "Q-12")
def test_session_carries_data_until_it_is_180_s_old(target: Target) -> None:
    lives = live_sessions(target)
    lives[0].let_age(REKEY_AFTER_TIME - 4, "the sessions grow old")
    while (age := lives[0].age) < REJECT_AFTER_TIME - 4:
        for live in lives:
            must_carry(target, live, age)
        let_pass(3, "until the next packet")
    initiator, responder = map(begun_at, lives)
    assert len(initiator) > 5, f"the test proved nothing: the initiator tried {len(initiator)} times to rekey"
    assert not responder, f"as responder the device initiated {responder[0]:.3f} s after the handshake"
    lives[0].let_age(REJECT_AFTER_TIME + 1, "the sessions expire")
    for live in lives:
        target.send(live.peer, b"too late")
    third = {
        live.role: [live.peer.expect(Initiation, within=LONGEST_RETRY, where=is_new(live)) for _ in range(3)][-1]
        for live in lives
    }
    for live in lives:
        late = [one for one in data(live.peer) if (one.time - live.since) / SECOND > REJECT_AFTER_TIME + 0.5]
        assert not late, f"as {live.role} the device sent {late[0]} on a session older than 180 s"
        session = live.peer.send(Response(to=third[live.role])).made()
        first = live.peer.expect(Data, where=lambda one: b"too late" in one.plaintext)
        assert first.session is session, f"as {live.role} the device sent the staged packet on another session"


def is_new(live: Live) -> Callable[[ReceivedInitiation], bool]:
    """Return a condition for initiations that came when the session had expired."""
    return lambda one: one.time > live.since + REJECT_AFTER_TIME * SECOND


def must_carry(target: Target, live: Live, age: float) -> None:
    """Check that the session carries data in both directions."""
    payload = f"at {age:.3f} s".encode()
    target.send(live.peer, payload)
    came = live.peer.expect(Data, within=AT_ONCE, where=lambda one: payload in one.plaintext)
    assert came.session is live.session
    assert is_delivered(target, live.peer, live.session), (
        f"as {live.role} the device refused data {age:.1f} s after the handshake"
    )


@pytest.mark.requirement("TM-09", "TM-08")
@pytest.mark.bug("IB-07")
def test_initiator_alone_rekeys_when_it_receives_after_165_s(target: Target) -> None:
    initiator, responder, streaming = lives = live_sessions(target, ("initiator", "responder", "initiator"))
    packets: list[bytes] = []
    before = time.time_ns()
    initiator.let_age(4.25, "messages come at other ages than those of the limits")
    for _ in range(round((200 - initiator.age) / STEP)):
        for live in (initiator, responder):
            live.peer.send(live.session.keepalive())
        packets.append(target.packet(streaming.peer, f"packet {len(packets)}".encode()))
        streaming.peer.send(streaming.session.data(packets[-1]))
        let_pass(STEP, "until the next message")
        # wireguard-go repeats an initiation whose response comes at once, which is not what this test is about.
        since, before = before, time.time_ns() - SECOND // 2
        for live in lives:
            answer_initiations(live, since, before)
    begun = begun_at(responder)
    assert not begun, f"as responder the device initiated {begun[0]:.3f} s after the handshake"
    last = LAST_MINUTE_REKEY + STEP + AT_ONCE
    for what, live, first in (("keepalives", initiator, LAST_MINUTE_REKEY), ("data", streaming, REKEY_AFTER_TIME)):
        begun = begun_at(live)
        is_right = len(begun) == 1 and first <= begun[0] <= last
        assert is_right, f"receiving {what}, the device initiated at {begun} s, expected once from {first} to {last} s"
    lost = set(packets) - set(target.inside.packets())
    assert not lost, (
        f"of {len(packets)} packets that the peer sent before, during and after the rekey {len(lost)} are lost"
    )


@pytest.mark.requirement("TM-09")
def test_initiator_renews_second_session_when_it_receives(target: Target) -> None:
    live = live_session(target, "initiator")
    for number in ("first", "second"):
        live.let_age(LAST_MINUTE_REKEY + STEP, f"the {number} session grows old")
        before = time.time_ns()
        live.peer.send(live.session.keepalive())
        let_pass(AT_ONCE, "the device initiates at once, and has started its timers")
        came = initiations(live.peer, before)
        assert came, f"the device received on its {number} session, {live.age:.0f} s old, and did not initiate"
        live.since = time.time_ns()
        live.session = live.peer.send(Response(to=came[0])).made()
        live.peer.expect(Data, where=partial(is_on, live.session))


def answer_initiations(live: Live, since: int, before: int) -> None:
    """Answer initiations that came between two times; the peer then sends on the new session."""
    for initiation in initiations(live.peer, since):
        if initiation.time <= before:
            session = live.peer.send(Response(to=initiation)).made()
            # A responder may send only after the first message on the session.
            live.peer.expect(Data, where=partial(is_on, session))
            live.session = session


def is_on(session: Session, one: ReceivedData) -> bool:
    """Return whether data came on this session."""
    return one.session is session


# Rejection


@pytest.mark.requirement("DT-20")
@pytest.mark.bug("IB-19", "IB-20")
def test_data_is_refused_on_session_older_than_180_s(target: Target) -> None:
    lives = live_sessions(target)
    lives[0].let_age(REJECT_AFTER_TIME - 2, "the sessions grow old")
    with twin("data is delivered two seconds before"):
        for live in lives:
            assert is_delivered(target, live.peer, live.session)
    elsewhere = {live.role: live.peer.socket(target.address(f"192.168.1.{77 + at}")) for at, live in enumerate(lives)}
    refused = {}
    for age in (REJECT_AFTER_TIME + 1, REJECT_AFTER_TIME + 5, REJECT_AFTER_TIME + 20):
        lives[1].let_age(age, "the sessions expire")
        for live in lives:
            packet = refused[live.role, age] = target.packet(live.peer, f"{age} s".encode())
            live.peer.send(live.session.data(packet), via=elsewhere[live.role])
    let_pass(longest(KEEPALIVE_TIMEOUT), "a keepalive would answer data that was accepted")
    delivered = target.inside.packets()
    accepted = [
        f"as {role} the device accepted data {age} s after the handshake"
        for (role, age), packet in refused.items()
        if packet in delivered
    ]
    must_be_right(accepted)
    for live in lives:
        here, endpoint = live.peer.main, target.seen(live.peer).endpoint
        moved = f"as {live.role} the device sends to {endpoint} after data on an expired session"
        assert endpoint == Endpoint(here.address, here.port), moved
        answers = [one for one in live.peer.drain() if one.at != (here.address, here.port)]
        assert not answers, f"as {live.role} the device answered data on an expired session by {answers[0]}"
        with twin("data on a new session is delivered"):
            assert is_delivered(target, live.peer, live.peer.connect())


# Erasure


@pytest.mark.requirement("TM-27")
def test_keys_are_erased_540_s_after_last_session(target: Target) -> None:
    live = live_session(target, "responder")
    with twin("a response to an initiation that is a minute old completes the handshake"):
        early = target.peer(endpoint=True)
        target.send(early, b"no response comes")
        let_pass(60, "the initiation grows old")
        assert is_completed(early)
    live.let_age(ERASURE - GIVEN_UP - LONGEST_RETRY, "the session expires, and its keys are not erased")
    peers = {"540 s after its last session": live.peer, "540 s after it had given up": target.peer(endpoint=True)}
    for peer in peers.values():
        target.send(peer, b"no response comes")
    # The end of a series does not postpone an erasure that is due.
    live.let_age(longest_erasure() + AT_ONCE, "the device gives up, and erases the keys of the first")
    faults = []
    for name, peer in peers.items():
        if peer is not live.peer:
            let_pass(GIVEN_UP + longest_erasure() - ERASURE * COARSE, "the device erases the handshake of the other")
        faults.append(f"a response completes its handshake more than {name}" if is_completed(peer) else "")
    must_be_right(faults)


@pytest.mark.requirement("TM-27")
def test_new_session_postpones_erasure_of_keys(target: Target) -> None:
    live = live_session(target, "responder")
    for age in (RENEWED, 2 * RENEWED, 3 * RENEWED):
        live.let_age(age, "the session grows old")
        live.session = live.peer.connect()
    live.let_age(longest_erasure() + AT_ONCE, "the keys of the first session would be erased")
    last = f"the last session, {live.age - 3 * RENEWED:.0f} s old, when the first was {live.age:.0f} s old"
    packet = target.packet(live.peer, b"to a session that is not old")
    live.peer.send(live.session.data(packet))
    is_delivered_soon = poll_until(lambda: packet in target.inside.packets(), bool, AT_ONCE)
    assert is_delivered_soon, f"the device refused data on {last}"
    assert sending_session(target, live.peer) is live.session, f"the device did not send on {last}"


def longest_erasure() -> float:
    """Return the seconds after which the timer of the erasure has fired."""
    return ERASURE * (1 + COARSE)


def is_completed(peer: ScriptedPeer) -> bool:
    """Answer the device's last initiation; return whether the device confirms the session."""
    session = peer.send(Response(to=initiations(peer)[-1])).made()
    let_pass(AT_ONCE, "the device would confirm the session at once")
    return any(one.session is session for one in data(peer))


# Cookies


@pytest.mark.requirement("CK-08", "CK-09")
def test_cookie_is_used_for_two_minutes_at_most(target: Target) -> None:
    initiator, responder = target.peer(endpoint=True), target.peer()
    target.send(initiator)
    first, response = initiator.expect(Initiation), next_response(responder)
    since = time.time_ns()
    initiator.send(CookieReply(to=first, value=COOKIE))
    responder.send(CookieReply(to=response, value=COOKIE))
    responses = []
    for age in AGES_OF_RESPONSES:
        let_pass(age - (time.time_ns() - since) / SECOND, "the cookies grow old")
        # A new packet keeps the retries going.
        target.send(initiator)
        responses.append(next_response(responder))
    faults, longest_use = [], 0.0
    for kind, messages in (("initiation", initiations(initiator, since)), ("response", responses)):
        ages = {(one.time - since) / SECOND: one.mac2 == mac2(one.datagram, COOKIE) for one in messages}
        faults += [
            f"the device used a cookie {age:.2f} s old for its {kind}"
            for age in ages
            if ages[age] and age >= COOKIE_ENDS
        ]
        faults += [
            f"the device did not use a cookie {age:.2f} s old for its {kind}"
            for age in ages
            if not ages[age] and age < COOKIE_IS_USED
        ]
        assert max(ages) >= COOKIE_ENDS, f"the test proved nothing: the last {kind} came after {max(ages):.2f} s"
        longest_use = max(longest_use, *(age for age, is_used in ages.items() if is_used))
    must_be_right(faults)
    assert all(one.mac2 == bytes(16) for one in responses if (one.time - since) / SECOND >= COOKIE_ENDS), (
        "mac2 is not zero"
    )
    if longest_use > COOKIE_OF_DRIVER_ENDS:
        differs(f"a cookie is used for {longest_use:.1f} s", by=[target.implementation.name], requirement="CK-09")


def next_response(peer: ScriptedPeer) -> ReceivedResponse:
    """Make a handshake; return the device's response."""
    peer.send(Initiation())
    return peer.expect(Response)
