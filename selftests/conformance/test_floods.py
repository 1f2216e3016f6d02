"""Flood a device: peers connect, data arrives, memory stays bounded, and nothing changes."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from harness import (
    Initiation,
    ProgramInterface,
    Response,
    Target,
    Unexpected,
    effort,
    let_pass,
    not_reached,
    poll_until,
    twin,
)
from harness.scripted.received import ReceivedCookieReply, ReceivedResponse
from harness.wire.messages import with_mac1
from selftests.support.floods import cpu_seconds
from selftests.support.load import NO_MAC2, first_response, handshake_answers, open_descriptors, resident
from selftests.support.target import is_inside

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Lab, Manifest, PeerState, ScriptedPeer, Session
    from harness.scripted.load import Flood

pytestmark = pytest.mark.alone

MEBIBYTE = 1 << 20
# MiB. wireguard-go keeps each of 1024 waiting messages in a buffer of 64 KiB, and its heap may be twice as large.
MOST_GROWTH = 192
# MiB that peers may leave behind: the room of a garbage collector.
MOST_KEPT = 16
# Descriptors of requests that the program has not closed yet.
MOST_DESCRIPTORS = 4
# More than may wait: 4096 in the queue of the driver; 4000 in that of gotatun, and up to 32 000 in its socket's buffer.
MOST_WAITING, MOST_WAITING_AT_FULL_RATE = 24_000, 64_000
# Forged initiations per second: load for all programs, and few enough for a busy machine; and what one core sends.
RATE, FULL_RATE = 4_000, 64_000
# IB-28: seconds within which a peer that uses its cookie has a session.
CONNECTS_WITHIN = 12.0
# Seconds after which a peer sends its initiation again: REKEY_TIMEOUT and some jitter.
RETRY = 5.1
WITH_COOKIE = 40
# A share of a CPU below which the result is that of a slower machine.
FULL_SHARE = 0.8
# Seconds for one answer in a flood, and between two initiations with a valid mac2: less would use up the tokens.
FOR_AN_ANSWER = 0.25
SPACING = 0.06
# Times that something is tried until the load has lasted all the while.
TRIES = 10
# Datagrams that are sent before the device is asked for a sign of life: less than an eighth of any queue.
AT_ONCE = 50
# Nanoseconds.
MILLISECOND, A_DAY = 1_000_000, 86_400_000_000_000


def require_load(flood: Flood) -> None:
    """End the test as not reached if the flood, which is over, got no cookie reply."""
    if not flood.replies:
        not_reached(f"no cookie reply to {flood.sent} initiations, {flood.rate:.0f} a second")


def connects(peer: ScriptedPeer, within: float) -> float | None:
    """Send initiations as a correct peer does, each with the last cookie; return the seconds until a response."""
    began = time.monotonic()
    for _ in range(round(within / FOR_AN_ANSWER)):
        peer.inbox.clear()
        peer.send(Initiation())
        # A correct peer would wait for five seconds; the flood lasts as long as all peers need.
        answers = poll_until(lambda: handshake_answers(peer), bool, FOR_AN_ANSWER, what=f"an answer to {peer}")
        if any(isinstance(one, ReceivedResponse) and not one.wrong for one in answers):
            return time.monotonic() - began
    return None


@pytest.mark.requirement("DOS-04")
@pytest.mark.bug("IB-28")
def test_peers_connect_during_flood(target: Target) -> None:
    peers = [target.peer() for _ in range(5)]
    with target.load() as load:
        with load.flood(RATE) as flood:
            took = {peer.name: connects(peer, CONNECTS_WITHIN) for peer in peers}
        require_load(flood)
    missing = [name for name, seconds in took.items() if seconds is None]
    assert not missing, (
        f"during {flood.rate:.0f} forged initiations a second no response within {CONNECTS_WITHIN:g} s came to "
        f"{', '.join(missing)}, which use their cookies"
    )


@pytest.mark.requirement("DOS-08")
@pytest.mark.bug("IB-28")
def test_session_carries_data_during_flood(target: Target) -> None:
    peer = target.peer()
    session = peer.connect()
    count = effort(50, 500)
    with target.load() as load:
        with load.flood(RATE) as flood:
            lost = sum(not arrives(target, peer, session) for _ in range(count))
        require_load(flood)
    assert lost * 10 <= count, (
        f"{lost} of {count} data messages were lost in {flood.rate:.0f} forged initiations a second"
    )
    late = sum(not arrives(target, peer, session) for _ in range(20))
    assert not late, f"{late} of 20 data messages were lost after the flood"


@pytest.mark.requirement("DOS-08")
def test_session_carries_data_under_load(target: Target) -> None:
    peer = target.peer()
    session = peer.connect()
    with target.load() as load:
        for number in range(TRIES):
            packet = target.packet(peer, b"packet %d" % number)
            lasted = load.during(partial(peer.send, session.data(packet)))
            came = poll_until(partial(is_inside, target, packet), bool, 2.0)
            # Whether there was load all the time is known afterwards only.
            if lasted:
                assert came, "under load the device did not deliver data of a session"
                return
    not_reached(f"the load ended {TRIES} times before the device had processed data")


def arrives(target: Target, peer: ScriptedPeer, session: Session) -> bool:
    """Send data on a session; return whether the device delivers it within a second."""
    packet = target.packet(peer, f"packet {session.counter}".encode())
    peer.send(session.data(packet))
    return poll_until(partial(is_inside, target, packet), bool, 1.0, what="data to be delivered")


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.requirement("DOS-04", "DOS-03")
@pytest.mark.bug("IB-28")
def test_valid_mac2_keeps_its_place_in_full_flood(lab: Lab, implementation: Manifest) -> None:
    # In the lab programs log each event, and the flood would measure the log.
    quiet = replace(implementation, env={**implementation.env, "LOG_LEVEL": "error", "WG_LOG_LEVEL": "error"})
    target = Target(lab, quiet)
    peer = target.peer()
    with target.load() as load:
        with load.flood(FULL_RATE) as flood:
            peer.cookie = cookie_in(peer)
            began, used = time.monotonic(), cpu_time(target)
            connected = is_answered(peer, RETRY) or is_answered(peer, FOR_AN_ANSWER)
            answered = sum(is_answered(peer, FOR_AN_ANSWER) for _ in range(WITH_COOKIE))
            share = (cpu_time(target) - used) / (time.monotonic() - began)
        require_load(flood)
    is_good = connected and answered * 2 >= WITH_COOKIE
    if flood.rate < FULL_RATE * 0.9 or (not is_good and share < FULL_SHARE):
        not_reached(f"the machine is busy: {flood.rate:.0f} initiations a second, the program had {share:.0%} of a CPU")
    assert connected, f"a peer with a cookie got no response to an initiation and one retry after {RETRY} s"
    assert answered * 2 >= WITH_COOKIE, f"{answered} of {WITH_COOKIE} initiations with a valid mac2 were answered"


def cpu_time(target: Target) -> float:
    """Return the seconds of CPU that the program has used; for the kernel the time itself: it takes what it needs."""
    is_program = isinstance(target.interface, ProgramInterface)
    return cpu_seconds(target.interface) if is_program else time.monotonic()


def cookie_in(peer: ScriptedPeer) -> bytes:
    """Send initiations without mac2 in a flood until one is answered; return the cookie, b"" if none is needed.

    A program that counts the messages of each source needs none of this peer.
    """
    for _ in range(100):
        peer.inbox.clear()
        peer.send(Initiation(mac2=NO_MAC2))
        answers = poll_until(lambda: handshake_answers(peer), bool, FOR_AN_ANSWER, what="an answer in the flood")
        if answers:
            return answers[0].cookie if isinstance(answers[0], ReceivedCookieReply) else b""
    return not_reached("no answer to 100 initiations in a flood")


def is_answered(peer: ScriptedPeer, within: float) -> bool:
    """Send an initiation with mac2; return whether a response comes within so many seconds."""
    peer.inbox.clear()
    peer.send(Initiation())
    try:
        peer.expect(Response, within=within)
    except Unexpected:
        return False
    let_pass(SPACING, "a source may send 20 initiations per second under load")
    return True


# Memory and state


@pytest.mark.requirement("DOS-07")
@pytest.mark.bug("IB-59")
def test_queue_and_memory_are_bounded_during_flood(target: Target) -> None:
    peer = target.peer()
    before = resident(target)
    most = effort(MOST_WAITING, MOST_WAITING_AT_FULL_RATE)
    with target.load() as load:
        with load.flood(effort(16_000, FULL_RATE)) as flood:
            let_pass(effort(4, 10), "the flood goes on")
            flood.stop()
            grown = (resident(target) - before) / MEBIBYTE
            late = flood.late_replies(most)
        require_load(flood)
    assert late <= most, (
        f"more than {most} of {flood.sent} initiations were answered after the flood, which waited until then: "
        "the queue of handshake messages has no bound"
    )
    assert grown <= MOST_GROWTH, f"memory grew by {grown:.1f} MiB in {flood.sent} initiations"
    first_response(peer)


def flood_with(peer: ScriptedPeer, count: int, make: Callable[[], bytes]) -> None:
    """Send datagrams to the device from another port of the peer, none of which may be answered."""
    stranger = peer.socket()
    for number in range(count):
        stranger.throw(make())
        if number % AT_ONCE == AT_ONCE - 1:
            # The device need not have room for all of them, but should look at most of them.
            peer.expect_silence(after=f"{number + 1} datagrams that nobody sealed")


def assert_same_state(before: PeerState, after: PeerState, what: str) -> None:
    """Assert that the device reports a peer as before.

    Some programs report how long ago the last handshake was, or compute its time from that.
    """
    is_age = after.latest_handshake < A_DAY
    grown = after.latest_handshake - before.latest_handshake
    assert grown >= 0 if is_age else abs(grown) < MILLISECOND, f"{what} changed the time of the last handshake"
    same = replace(after, latest_handshake=before.latest_handshake)
    assert same == before, f"{what} changed {before} to {after}"


@pytest.mark.requirement("ROB-01", "DOS-06")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sizes", "bodies"])
def test_random_datagrams_get_no_answer_and_change_nothing(target: Target, kind: str) -> None:
    peer = target.peer(endpoint=True)
    session = peer.connect()
    draw = target.lab.random
    target.round_trip()
    before = target.seen(peer)

    def datagram() -> bytes:
        if kind == "sizes":
            return draw.randbytes(draw.randrange(1500))
        # Real indices lead further.
        index = draw.choice([session.remote_index.to_bytes(4, "little"), draw.randbytes(4)])
        typed, length = draw.choice([(1, 148), (2, 92), (3, 64), (4, 32), (4, 16 + 16 * draw.randrange(1, 90))])
        return bytes([typed, 0, 0, 0]) + (index + draw.randbytes(length - 8))

    flood_with(peer, effort(4_000, 100_000), datagram)
    assert_same_state(before, target.seen(peer), "random datagrams")
    with twin("the session and new handshakes work"):
        assert arrives(target, peer, session), "data on the session was lost"
        peer.handshake()


@pytest.mark.requirement("DOS-10", "DOS-07")
@pytest.mark.timeout(900)
def test_bad_handshake_messages_change_no_state(target: Target) -> None:
    peer, stranger = target.peer(endpoint=True), target.peer(is_known=False)
    session = peer.connect()
    replay = peer.sent[0]
    foreign = [stranger.send(Initiation(timestamp=stranger.next_timestamp())).datagram for _ in range(50)]
    draw = target.lab.random.randbytes
    target.round_trip()
    before, memory = target.seen(peer), resident(target)
    kinds: list[Callable[[], bytes]] = [
        lambda: replay,
        lambda: with_mac1(b"\1\0\0\0" + draw(128) + bytes(16), target.public_key.raw),
        lambda: with_mac1(b"\2\0\0\0" + draw(72) + bytes(16), target.public_key.raw),
        lambda: foreign[draw(1)[0] % len(foreign)],
        lambda: b"\3\0\0\0" + draw(60),
    ]
    count = effort(4_000, 100_000)
    elsewhere = peer.socket(target.address("192.168.1.77"))
    for number in range(count):
        elsewhere.throw(kinds[number % len(kinds)]())
        if number % AT_ONCE == AT_ONCE - 1:
            target.round_trip()
    grown = (resident(target) - memory) / MEBIBYTE
    peer.drain()
    responses = [str(one) for one in peer.inbox if isinstance(one, ReceivedResponse)]
    assert not responses, f"a bad initiation was answered: {responses[0]}"
    assert_same_state(before, target.seen(peer), "bad handshake messages")
    assert grown <= MOST_GROWTH, f"memory grew by {grown:.1f} MiB in {count} bad handshake messages"
    with twin("the session and new handshakes work"):
        assert arrives(target, peer, session), "data on the session was lost"
        first_response(peer)


def make_session(peer: ScriptedPeer) -> Session:
    """Make a handshake; some programs take so many of them in a second for load, and ask for a cookie."""
    for _ in range(8):
        peer.inbox.clear()
        peer.send(Initiation())
        answers = poll_until(lambda: handshake_answers(peer), bool, 5.0, what=f"an answer to {peer}")
        if answers and isinstance(answers[0], ReceivedResponse):
            return answers[0].session
    raise AssertionError(f"the device answered no initiation of {peer}, also none with a cookie")


@pytest.mark.bug("IB-59")
@pytest.mark.timeout(1200)
def test_removed_peers_leave_nothing_behind(target: Target) -> None:
    peers = [target.peer(is_known=False) for _ in range(10)]
    # In a guest an effort is an eighth.
    rounds = max(effort(12, 500), 4)
    # The first rounds may make buffers that stay.
    warm_up = max(2, rounds // 10)
    memory = descriptors = 0
    for number in range(rounds):
        for peer in peers:
            target.configure(peer)
        # Three sessions of each peer, of which data confirms the last one.
        for _ in range(3):
            sessions = [make_session(peer) for peer in peers]
        for peer, session in zip(peers, sessions, strict=True):
            assert arrives(target, peer, session), f"data of {peer} on its last session was lost"
        target.inside.forget()
        for peer in peers:
            target.remove(peer)
        if number == warm_up:
            memory, descriptors = resident(target), open_descriptors(target)
    grown = (resident(target) - memory) / MEBIBYTE
    count = (rounds - warm_up) * len(peers)
    left = open_descriptors(target) - descriptors
    assert left <= MOST_DESCRIPTORS, f"{count} peers that were removed left {left} descriptors open"
    assert grown <= MOST_KEPT, f"memory grew by {grown:.1f} MiB with {count} peers that were removed"
