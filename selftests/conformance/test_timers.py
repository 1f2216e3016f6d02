"""Check against scripted peers when a device initiates, retries, and sends keepalives, in both roles."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from harness import Data, DeviceConfig, Initiation, PeerConfig, Response, let_pass, slack, twin
from selftests.support.ageing import (
    LONGEST_RETRY,
    MAX_JITTER,
    PRECISION,
    REKEY_TIMEOUT,
    SECOND,
    data,
    device_sends,
    initiations,
    keepalives,
    live_session,
    live_sessions,
    longest,
    must_be_right,
    wrong_delay,
)
from selftests.support.target import is_delivered, next_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness import ScriptedPeer, Target
    from harness.scripted.received import Received
    from selftests.support.ageing import Live

pytestmark = pytest.mark.waiting

KEEPALIVE_TIMEOUT = 10
# Seconds after which a side that has sent data and received nothing initiates (TM-16).
NEW_HANDSHAKE = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT
LONGEST_NEW_HANDSHAKE = longest(NEW_HANDSHAKE, MAX_JITTER)
REJECT_AFTER_TIME = 180
INITIATIONS_OF_A_SERIES = 20
# Bounds of the last initiation of a series, in seconds after the first (TM-04): a retry before 90 s, or the twentieth.
LAST_RETRY = (84, 110)
# Seconds after which a series has certainly ended.
ENDED = (INITIATIONS_OF_A_SERIES + 1) * LONGEST_RETRY
ENOUGH_RETRIES = 15
# Seconds of spread of the gaps of a series; without jitter only the time of a system call is left (IB-03).
LEAST_DEVIATION = 0.02
INTERVAL = 3


def gaps(came: Sequence[Received]) -> list[float]:
    """Return the seconds between successive messages."""
    return [(later.time - one.time) / SECOND for one, later in pairwise(came)]


def begin_series(target: Target) -> dict[str, ScriptedPeer]:
    """Let the device initiate to two peers without a session, and one whose session, begun by it, does not answer."""
    live = live_session(target, "responder")
    peers = {"first": target.peer(endpoint=True), "second": target.peer(endpoint=True), "responder": live.peer}
    for peer in peers.values():
        target.send(peer, b"unanswered")
    return peers


# Retries


@pytest.mark.requirement("TM-01", "TM-02", "HS-14")
@pytest.mark.bug("IB-03")
def test_unanswered_initiation_is_retried_after_5_s_and_jitter(target: Target) -> None:
    peers = begin_series(target)
    let_pass(LONGEST_NEW_HANDSHAKE + (ENOUGH_RETRIES + 1) * LONGEST_RETRY, "fifteen retries")
    measured = {name: gaps(initiations(peer))[:ENOUGH_RETRIES] for name, peer in peers.items()}
    for name, each in measured.items():
        assert len(each) == ENOUGH_RETRIES, f"{name}: the device retried {len(each)} times"
        assert min(each) >= REKEY_TIMEOUT - PRECISION, f"{name}: two initiations are {min(each):.3f} s apart"
        assert max(each) <= LONGEST_RETRY, f"{name}: two initiations are {max(each):.3f} s apart"
    deviation = statistics.pstdev(gap for each in measured.values() for gap in each)
    assert deviation > LEAST_DEVIATION, f"retries are not jittered: the gaps deviate by {deviation * 1000:.1f} ms"
    steps = [abs(a - b) for a, b in zip(measured["first"], measured["second"], strict=True)]
    assert max(steps) > LEAST_DEVIATION, "the retries for two peers stay in step"


@pytest.mark.requirement("HS-16")
def test_each_retry_is_new_message_in_both_roles(target: Target) -> None:
    peers = begin_series(target)
    let_pass(LONGEST_NEW_HANDSHAKE + 4 * LONGEST_RETRY, "the first retries")
    for name, peer in peers.items():
        series = initiations(peer)[:4]
        assert len(series) == 4, f"{name}: the device retried {len(series)} times"
        for one, retry in pairwise(series):
            assert retry.sender_index != one.sender_index, f"{name}: a retry has the index of the initiation before it"
            assert retry.ephemeral != one.ephemeral, f"{name}: a retry has the ephemeral of the initiation before it"
            assert retry.timestamp > one.timestamp, f"{name}: the timestamp of a retry is not greater than the last one"


@pytest.mark.requirement("TM-04", "TM-05")
def test_series_ends_and_what_is_staged_is_dropped(target: Target) -> None:
    live = live_session(target, "responder")
    live.let_age(REJECT_AFTER_TIME + 1, "the session expires")
    peers = {"no session": target.peer(endpoint=True), "expired session": live.peer}
    in_time = target.peer(endpoint=True)
    for peer in [*peers.values(), in_time]:
        target.send(peer, b"stale")
    with twin("what is staged is sent if an earlier retry is answered"):
        initiation = [in_time.expect(Initiation, within=LONGEST_RETRY) for _ in range(3)][-1]
        in_time.send(Response(to=initiation))
        in_time.expect(Data, where=lambda one: b"stale" in one.plaintext)
    let_pass(ENDED + 4 * LONGEST_RETRY, "all retries, and some more if they go on")
    for name, peer in peers.items():
        series = initiations(peer)
        last = (series[-1].time - series[0].time) / SECOND
        assert LAST_RETRY[0] <= last <= LAST_RETRY[1], f"{name}: the last retry came {last:.1f} s after the first"
        session = peer.connect()
        with twin("a new packet is sent on the new session"):
            assert next_data(target, peer).session is session
        stale = [one for one in data(peer) if b"stale" in one.plaintext]
        assert not stale, f"{name}: the device sent a packet for which it had given up"


@pytest.mark.requirement("TM-06", "HS-14")
def test_new_packets_keep_series_going_or_begin_one(target: Target) -> None:
    live = live_session(target, "responder")
    live.let_age(REJECT_AFTER_TIME + 1, "the session expires")
    each_second, each_half_minute, once = live.peer, target.peer(endpoint=True), target.peer(endpoint=True)
    target.send(once)
    for second in range(150):
        target.send(each_second)
        if second % 30 == 0:
            target.send(each_half_minute)
        let_pass(1, "until the next packet")
    for name, peer in (("each second", each_second), ("each half minute", each_half_minute)):
        series = initiations(peer)
        apart = gaps(series)
        assert min(apart) >= REKEY_TIMEOUT - PRECISION, f"a packet {name}: initiations are {min(apart):.3f} s apart"
        assert max(apart) <= LONGEST_RETRY, f"a packet {name}: the retries pause for {max(apart):.3f} s"
        assert (series[-1].time - series[0].time) / SECOND > 140, f"a packet {name}: the retries end"
    last = initiations(once)[-1].time
    target.send(once)
    again = once.expect(Initiation, within=1.0, where=lambda one: one.time > last)
    let_pass(3 * LONGEST_RETRY, "the new series goes on")
    assert len(initiations(once, again.time)) >= 2, "a new packet after the end of a series leads to no new series"


@pytest.mark.requirement("TM-33")
def test_completed_handshake_ends_series_and_next_is_whole(target: Target) -> None:
    peers = {"initiator": target.peer(endpoint=True), "responder": target.peer(endpoint=True)}
    for peer in peers.values():
        target.send(peer, b"staged")
    tenth = {
        role: [peer.expect(Initiation, within=LONGEST_RETRY) for _ in range(10)][-1] for role, peer in peers.items()
    }
    peers["initiator"].send(Response(to=tenth["initiator"]))
    peers["responder"].connect()
    sent = {role: peer.expect(Data, where=lambda one: b"staged" in one.plaintext) for role, peer in peers.items()}
    let_pass(1, "the device has started its timer")
    for role, peer in peers.items():
        session = sent[role].session
        assert session is not None
        peer.send(session.keepalive())
    let_pass(4 * LONGEST_RETRY, "no more retries")
    for role, peer in peers.items():
        retries = initiations(peer, sent[role].time)
        assert not retries, f"as {role} the device went on with its retries after the handshake was complete"
    device_sends(target, list(peers.values()))
    let_pass(LONGEST_NEW_HANDSHAKE + ENDED + LONGEST_RETRY, "a series of retries")
    for role, peer in peers.items():
        series = initiations(peer)
        last = (series[-1].time - series[0].time) / SECOND
        assert LAST_RETRY[0] <= last <= LAST_RETRY[1], f"as {role}, the next series lasted {last:.1f} s"


# No answer to data


@pytest.mark.requirement("TM-16")
@pytest.mark.bug("IB-08", "IB-09", "IB-20")
def test_initiation_follows_15_s_after_unanswered_data(target: Target) -> None:
    lives = live_sessions(target)
    peers = [live.peer for live in lives]
    let_pass(40, "nothing comes from either side")
    device_sends(target, peers, b"answered")
    let_pass(2, "the peers take their time")
    for live in lives:
        live.peer.send(live.session.keepalive())
    let_pass(LONGEST_NEW_HANDSHAKE + LONGEST_RETRY, "no initiation may come")
    for live in lives:
        came = initiations(live.peer)
        assert not came, f"as {live.role} the device initiated although its data was answered after 2 s"
    sent = device_sends(target, peers)
    let_pass(LONGEST_NEW_HANDSHAKE + LONGEST_RETRY, "an initiation and its retry")
    faults = []
    for live, one in zip(lives, sent, strict=True):
        came = initiations(live.peer)
        what = "its initiation came {} after the unanswered data"
        faults.append(wrong_delay(live.role, came, one.time, NEW_HANDSHAKE, jitter=MAX_JITTER, what=what))
        what = "its retry came {} after the initiation"
        faults += [wrong_delay(live.role, came[1:], came[0].time, 5, jitter=MAX_JITTER, what=what)] if came else []
    must_be_right(faults)


@pytest.mark.requirement("TM-19", "TM-16")
@pytest.mark.bug("IB-09")
def test_more_data_does_not_postpone_initiation(target: Target) -> None:
    lives = live_sessions(target)
    first = device_sends(target, [live.peer for live in lives])
    for _ in range(NEW_HANDSHAKE + 2):
        let_pass(1, "until the next packet")
        for live in lives:
            target.send(live.peer)
    what = "its initiation came {} after the first unanswered data"
    must_be_right(
        wrong_delay(live.role, initiations(live.peer), one.time, NEW_HANDSHAKE, jitter=MAX_JITTER, what=what)
        for live, one in zip(lives, first, strict=True)
    )


@pytest.mark.requirement("TM-18")
def test_any_authentic_message_in_15_s_counts_as_answer(target: Target) -> None:
    kinds = ("keepalive", "data", "initiation", "nothing")
    lives = {kind: live_sessions(target) for kind in kinds}
    every = [live for each in lives.values() for live in each]
    sent = device_sends(target, [live.peer for live in every])[0]
    let_pass(14, "nothing comes from the peers")
    for kind, each in lives.items():
        for live in each:
            answer(target, live, kind)
    let_pass(NEW_HANDSHAKE - 14 + 4, "an initiation would have come")
    faults = [
        f"as {live.role} the device initiated although a valid {kind} came 14 s after its data"
        for kind in kinds[:-1]
        for live in lives[kind]
        if initiations(live.peer, sent.time)
    ]
    must_be_right(faults)
    with twin("without an answer the device initiates"):
        assert all(initiations(live.peer, sent.time) for live in lives["nothing"])


@pytest.mark.requirement("TM-18")
def test_response_in_15_s_counts_as_answer(target: Target) -> None:
    lives = live_sessions(target)
    device_sends(target, [live.peer for live in lives])
    for live in lives:
        live.peer.expect(Initiation, within=LONGEST_NEW_HANDSHAKE)
    let_pass(1, "the device has started its timer")
    sent = device_sends(target, [live.peer for live in lives])
    retries = [live.peer.expect(Initiation, within=LONGEST_RETRY) for live in lives]
    # Five seconds after its last initiation the device may initiate again, 15 s after its data.
    lives[0].peer.send(Response(to=retries[0]))
    let_pass(LONGEST_NEW_HANDSHAKE, "an initiation would have come")
    came = initiations(lives[0].peer, retries[0].time)
    ages = [(one.time - sent[0].time) / SECOND for one in came]
    assert not came, f"the device initiated {ages[0]:.3f} s after its data although a response had come since"
    with twin("without a response the device initiates again"):
        assert initiations(lives[1].peer, retries[1].time)


def answer(target: Target, live: Live, kind: str) -> None:
    """Send a message of this kind to the device."""
    match kind:
        case "keepalive":
            live.peer.send(live.session.keepalive())
        case "data":
            live.peer.send(live.session.data(target.packet(live.peer)))
        case "initiation":
            live.peer.handshake()


# Passive keepalives


@pytest.mark.requirement("TM-10", "TM-11")
@pytest.mark.bug("IB-12", "IB-13", "IB-20")
def test_keepalive_follows_10_s_after_data_and_no_keepalive(target: Target) -> None:
    milliseconds = (5, 20, 60, 120, 240)
    answered = {each: live_sessions(target) for each in milliseconds}
    others = live_sessions(target)
    at = {}
    for each, lives in answered.items():
        # A program with a coarse clock may take an answer that comes so early for one that came before its data.
        device_sends(target, [live.peer for live in lives])
        let_pass(each / 1000, "the answer of the peers comes so early")
        at[each] = send_data(target, lives)
    since = time.time_ns()
    for live in others:
        live.peer.send(live.session.keepalive())
    let_pass(20, "keepalives for data, and none for keepalives")
    faults = []
    for each, lives in answered.items():
        for live in lives:
            who = f"as {live.role}, data {each} ms after its own"
            came = keepalives(live.peer, at[each])
            faults.append(wrong_delay(who, came, at[each], KEEPALIVE_TIMEOUT, what="its keepalive came {} after it"))
            faults.append(f"{who}: {len(came)} keepalives" if len(came) > 1 else "")
    faults += [
        f"as {live.role}, the device answered a keepalive by {came[0]}"
        for live in others
        if (came := data(live.peer, since))
    ]
    must_be_right(faults)


@pytest.mark.requirement("TM-12")
@pytest.mark.capability("persistent-keepalive")
def test_any_message_in_10_s_replaces_keepalive(target: Target) -> None:
    lives = {kind: live_sessions(target) for kind in ("data", "response", "initiation", "nothing")}
    lives["keepalive"] = live_sessions(target, persistent_keepalive=7)
    device_sends(target, [live.peer for live in lives["initiation"]])
    for live in lives["initiation"]:
        live.peer.expect(Initiation, within=LONGEST_NEW_HANDSHAKE)
    let_pass(1, "the next retry comes in four seconds")
    since = send_data(target, [live for each in lives.values() for live in each])
    let_pass(5, "half of the time until the keepalive")
    device_sends(target, [live.peer for live in lives["data"]])
    for live in lives["response"]:
        live.peer.handshake()
    let_pass(KEEPALIVE_TIMEOUT - 5 + slack(KEEPALIVE_TIMEOUT), "the keepalive would have come")
    due = since + (KEEPALIVE_TIMEOUT * SECOND - SECOND // 2)
    for kind, each in lives.items():
        came = {live.role: bool(keepalives(live.peer, due)) for live in each}
        if kind == "nothing":
            with twin("without such a message the keepalive comes"):
                assert all(came.values()), came
        else:
            assert not any(came.values()), f"a {kind} 5 s after data did not replace the keepalive, by role: {came}"


def send_data(target: Target, lives: list[Live]) -> int:
    """Send data to the device on each session; return when, in ns."""
    now = time.time_ns()
    for live in lives:
        live.peer.send(live.session.data(target.packet(live.peer)))
    return now


@pytest.mark.requirement("TM-13", "TM-14")
def test_keepalives_come_each_10_s_while_data_streams_in(target: Target) -> None:
    lives = live_sessions(target)
    since = send_data(target, lives)
    for _ in range(35):
        let_pass(1, "until the next packet")
        send_data(target, lives)
    faults = []
    for live in lives:
        came = keepalives(live.peer, since)
        what = "its keepalive came {} after the first data"
        faults.append(wrong_delay(live.role, came, since, KEEPALIVE_TIMEOUT, what=what))
        apart = gaps(came)
        most = longest(KEEPALIVE_TIMEOUT) + 1
        if len(came) != 3 or min(apart) < KEEPALIVE_TIMEOUT - PRECISION or max(apart) > most:
            faults.append(f"as {live.role}: {len(came)} keepalives in 35 s, {apart} s apart, expected 3, each 10 s")
    must_be_right(faults)


@pytest.mark.requirement("TM-15")
def test_two_packets_1_s_apart_get_two_keepalives_at_most(target: Target) -> None:
    lives = live_sessions(target)
    since = send_data(target, lives)
    let_pass(1, "until the second packet")
    send_data(target, lives)
    let_pass(32, "one keepalive, and perhaps another one 10 s after it")
    faults = []
    for live in lives:
        came = keepalives(live.peer, since)
        what = "its keepalive came {} after the first data"
        faults.append(wrong_delay(live.role, came[:1], since, KEEPALIVE_TIMEOUT, what=what))
        if len(came) > 2:
            faults.append(f"as {live.role}: {len(came)} keepalives for two packets, {gaps(came)} s apart")
    must_be_right(faults)


@pytest.mark.requirement("TM-29")
def test_idle_session_is_silent(target: Target) -> None:
    lives = live_sessions(target)
    since = send_data(target, lives)
    let_pass(longest(KEEPALIVE_TIMEOUT), "the keepalive for the data")
    with twin("the keepalive for the data comes"):
        assert all(keepalives(live.peer, since) for live in lives)
    for live in lives:
        live.peer.inbox.clear()
    let_pass(60, "nothing may come")
    for live in lives:
        came = live.peer.drain()
        assert not came, f"as {live.role} of an idle session the device sent {', '.join(map(str, came))}"
        with twin("the session works"):
            assert is_delivered(target, live.peer, live.session)
            assert next_data(target, live.peer).session is live.session


# Persistent keepalives


@pytest.mark.requirement("TM-20", "TM-17")
@pytest.mark.capability("persistent-keepalive")
def test_persistent_keepalive_comes_each_interval(target: Target) -> None:
    lives = live_sessions(target, persistent_keepalive=INTERVAL)
    let_pass(longest(NEW_HANDSHAKE, MAX_JITTER) + 2 * INTERVAL, "keepalives, and no initiation for want of an answer")
    faults = []
    for live in lives:
        came = keepalives(live.peer, live.since + 2 * SECOND)
        apart = gaps(came)
        if len(came) < 4 or min(apart) < INTERVAL - PRECISION or max(apart) > longest(INTERVAL):
            faults.append(f"as {live.role}: {len(came)} keepalives in 20 s, {apart} s apart, expected every {INTERVAL}")
        begun = initiations(live.peer)
        faults.append(f"as {live.role}, the device initiated after keepalives alone" if begun else "")
    must_be_right(faults)


@pytest.mark.requirement("TM-21")
@pytest.mark.capability("persistent-keepalive")
def test_traffic_postpones_persistent_keepalive(target: Target) -> None:
    interval = 4
    receiving, sending = (live_sessions(target, persistent_keepalive=interval) for _ in range(2))
    since = time.time_ns()
    # Fifteen seconds after its first data the device initiates.
    for _ in range(5):
        last = time.time_ns()
        for live in receiving:
            live.peer.send(live.session.keepalive())
        device_sends(target, [live.peer for live in sending])
        let_pass(2, "half of the interval")
    for what, lives in (("received", receiving), ("sent", sending)):
        came = {live.role: len(keepalives(live.peer, since)) for live in lives}
        assert not any(came.values()), f"messages {what} every 2 s do not postpone keepalives of {interval} s: {came}"
    let_pass(longest(interval) - 2, "the keepalives that follow")
    must_be_right(
        wrong_delay(
            live.role, keepalives(live.peer, since), last, interval, what="its keepalive came {} after the last message"
        )
        for live in receiving + sending
    )


@pytest.mark.requirement("TM-25")
@pytest.mark.capability("persistent-keepalive", "update-peer")
def test_interval_of_zero_ends_persistent_keepalives(target: Target) -> None:
    lives = live_sessions(target, persistent_keepalive=INTERVAL)
    with twin("keepalives come"):
        for live in lives:
            live.peer.expect(Data, within=longest(INTERVAL), where=lambda one: one.is_keepalive)
    off = tuple(PeerConfig(public_key=live.peer.public_key, persistent_keepalive=0) for live in lives)
    target.interface.set(DeviceConfig(peers=off))
    let_pass(1, "a keepalive that was on its way has come")
    since = time.time_ns()
    let_pass(3 * INTERVAL, "no keepalive may come")
    for live in lives:
        came = data(live.peer, since)
        assert not came, f"as {live.role} the device sent {came[0]} after its interval was set to zero"


@pytest.mark.requirement("TM-24", "HS-14")
@pytest.mark.capability("persistent-keepalive")
def test_persistent_keepalive_retries_handshake_for_ever(target: Target) -> None:
    live = live_sessions(target, ["responder"], persistent_keepalive=7)[0]
    live.let_age(REJECT_AFTER_TIME + 1, "the session expires")
    peers = {"no session": target.peer(endpoint=True, persistent_keepalive=7), "expired session": live.peer}
    let_pass(135, "a series of retries would have ended")
    now = time.time_ns()
    for name, peer in peers.items():
        series = initiations(peer)
        apart = gaps(series)
        since_last = (now - series[-1].time) / SECOND
        assert since_last <= 8, f"{name}: after {len(series)} initiations in 135 s the last is {since_last:.1f} s ago"
        assert max(apart) <= 8, f"{name}: two initiations are {max(apart):.3f} s apart, expected 8 s at most"
        assert min(apart) >= REKEY_TIMEOUT - PRECISION, f"{name}: two initiations are {min(apart):.3f} s apart"
