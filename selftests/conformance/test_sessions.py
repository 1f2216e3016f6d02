"""Check against a scripted peer which data a device accepts, on which session, and on which it sends."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from harness import Data, Endpoint, Initiation, Response, differs, effort, poll_until, twin
from harness.scripted.received import ReceivedData, ReceivedInitiation
from selftests.support.target import established, is_delivered, is_inside, sending_session

if TYPE_CHECKING:
    from harness import ScriptedPeer, Target

# REJECT_AFTER_MESSAGES of the driver (messages.h), and of the paper (6.1) and wireguard-go: the least counter refused.
LIMIT_OF_DRIVER = 2**64 - 8130
LIMIT_OF_PAPER = 2**64 - 2**13 - 1
# Seconds: KEEPALIVE_TIMEOUT + REKEY_TIMEOUT after the first unanswered data, with the jitter and a timer's lateness.
DEAD_PEER_WITHIN = 18.0
# Bits of the longest replay window (COUNTER_BITS_TOTAL of the driver), and of the blocks by which it moves.
LARGEST_WINDOW, BLOCK = 8192, 64
# Messages between which a device may take its time, and seconds for it.
AT_ONCE, EFFECT_WAIT = 32, 2.0
# Seconds in which both sides have a session after they began at the same moment (ROB-14).
CONVERGED_WITHIN = 15.0


# Counters


@pytest.mark.requirement("DT-08")
@pytest.mark.parametrize(
    "counter", [LIMIT_OF_DRIVER, LIMIT_OF_DRIVER + 1, 2**64 - 1], ids=lambda number: f"-{2**64 - number}"
)
def test_data_with_counter_at_reject_limit_is_refused(target: Target, counter: int) -> None:
    peer = target.peer()
    session = established(target, peer)
    beyond, end = target.packet(peer, b"beyond the limit"), target.packet(peer, b"the end")
    peer.send(session.data(beyond, counter=counter))
    peer.send(session.data(end))
    # If the device has taken the first one, the second is behind its window.
    target.inside.expect(lambda packet: packet in {beyond, end}, what="either packet")
    is_accepted = beyond in target.inside.packets()
    assert not is_accepted, f"the device accepted counter 2^64-{2**64 - counter}"
    with twin("data with the last counter that all programs accept is delivered"):
        last = target.packet(peer, b"the last one")
        peer.send(session.data(last, counter=LIMIT_OF_PAPER - 1))
        target.inside.expect(last)


@pytest.mark.requirement("DT-06", "DT-03")
def test_window_that_came_round_takes_each_counter_once(target: Target) -> None:
    peer = target.peer()
    session = established(target, peer)
    counters = range(BLOCK, 3 * LARGEST_WINDOW, BLOCK)
    packets = {counter: target.packet(peer, b"%d" % counter) for counter in counters}
    for counter, packet in packets.items():
        peer.send(session.data(packet, counter=counter))
        # So that no buffer of the device is full. After a mistake it may deliver no more of them.
        if counter % (AT_ONCE * BLOCK) == 0 or counter == counters[-1]:
            poll_until(partial(is_inside, target, packet), bool, EFFECT_WAIT)
    delivered = Counter(target.inside.packets())
    missing = [counter for counter, packet in packets.items() if not delivered[packet]]
    assert not missing, (
        f"counters in steps of {BLOCK}: the device refused {len(missing)} of {len(packets)}, the first is {missing[0]}"
    )
    session.counter = counters[-1] + 1
    for counter in counters[-AT_ONCE:]:
        peer.send(session.data(packets[counter], counter=counter))
    with twin("data with the next counter is delivered"):
        assert is_delivered(target, peer, session)
    delivered = Counter(target.inside.packets())
    twice = [counter for counter, packet in packets.items() if delivered[packet] > 1]
    assert not twice, f"the device accepted counter {twice[0]} twice"


@pytest.mark.requirement("DT-09")
@pytest.mark.parametrize("counter", [LIMIT_OF_PAPER, LIMIT_OF_DRIVER - 1], ids=lambda number: f"-{2**64 - number}")
def test_counter_between_both_reject_limits_is_accepted(target: Target, counter: int) -> None:
    peer = target.peer()
    session = established(target, peer)
    between, end = target.packet(peer, b"between the limits"), target.packet(peer, b"the end")
    with twin("data with a small counter is delivered"):
        assert is_delivered(target, peer, session)
    peer.send(session.data(between, counter=counter))
    peer.send(session.data(end))
    target.inside.expect(lambda packet: packet in {between, end}, what="either packet")
    if between not in target.inside.packets():
        differs(f"counter 2^64-{2**64 - counter} is refused, as in the paper", by=[target.implementation.name])


@pytest.mark.requirement("DT-10")
def test_session_refuses_all_data_after_last_counter(target: Target) -> None:
    peer = target.peer()
    session, newer = established(target, peer), established(target, peer)
    with twin("an older counter in the window is accepted before the last one"):
        for counter in (LIMIT_OF_PAPER - 2, LIMIT_OF_PAPER - 4):
            packet = target.packet(peer, f"counter {counter}".encode())
            peer.send(newer.data(packet, counter=counter))
            target.inside.expect(packet)
    # The first of these is the last counter for some programs, the second for others.
    for counter in (LIMIT_OF_PAPER - 1, LIMIT_OF_DRIVER - 1):
        peer.send(session.data(target.packet(peer, f"counter {counter}".encode()), counter=counter))
    # The driver decrypts on several processors, and asks for the last counter there: so that one must be done.
    done = target.packet(peer, b"both are done")
    peer.send(newer.data(done, counter=LIMIT_OF_PAPER - 5))
    target.inside.expect(done, what="data on the newer session")
    older, end = target.packet(peer, b"older and unseen"), target.packet(peer, b"the end")
    peer.send(session.data(older, counter=LIMIT_OF_PAPER - 3))
    peer.send(newer.data(end, counter=LIMIT_OF_PAPER - 3))
    target.inside.expect(end, what="data on the newer session")
    if older in target.inside.packets():
        differs("an unseen older counter is accepted after the last one", by=[target.implementation.name])


# Indices


@pytest.mark.requirement("DT-12", "RT-04")
@pytest.mark.bug("IB-32")
@pytest.mark.parametrize("kind", ["random", "zero", "ones", "pending", "removed"])
def test_data_with_unknown_index_has_no_effect(target: Target, kind: str) -> None:
    peer = target.peer(endpoint=True)
    other = target.peer()
    session = established(target, other)
    index = {"random": session.remote_index ^ 0x5A5A5A5A, "zero": 0, "ones": 2**32 - 1}.get(kind)
    if kind == "pending":
        target.send(peer)
        index = peer.expect(Initiation).sender_index
    if kind == "removed":
        index = established(target, peer).remote_index
        target.remove(peer)
        target.configure(peer, endpoint=True)
    with twin("the same data with the right index is delivered"):
        assert is_delivered(target, other, session)
    endpoint, elsewhere = target.seen(peer).endpoint, peer.socket(target.address("192.168.1.77"))
    before = target.seen(other)
    peer.send(session.data(target.packet(other, b"unknown index"), receiver_index=index), via=elsewhere)
    peer.send(session.data(ciphertext=bytes(16), receiver_index=index), via=elsewhere)
    other.send(session.data(target.packet(other, b"the end")))
    target.inside.expect(target.packet(other, b"the end"))
    peer.expect_silence(after=f"data whose receiver index {index:#010x} names no session")
    assert target.packet(other, b"unknown index") not in target.inside.packets(), "the device delivered such data"
    assert target.seen(peer).endpoint == endpoint, "data with an unknown index moved the endpoint"
    assert target.seen(other).endpoint == before.endpoint, "data with an unknown index moved another peer's endpoint"


@pytest.mark.requirement("HS-38", "MSG-11", "DT-02")
@pytest.mark.parametrize("index", [0, 2**32 - 1, None], ids=["zero", "ones", "live"])
def test_responder_takes_any_index_of_initiator(target: Target, index: int | None) -> None:
    if index is None:
        index = target.peer().connect().remote_index
    peer = target.peer()
    with twin("a random index works"):
        established(target, peer)
    session = peer.handshake(Initiation(sender_index=index))
    assert is_delivered(target, peer, session), f"the device delivers no data if the initiator's index is {index:#010x}"
    assert sending_session(target, peer) is session, f"the device does not send to the index {index:#010x}"
    assert session.local_index == index


@pytest.mark.requirement("HS-38", "MSG-11", "DT-02")
@pytest.mark.parametrize("index", [0, 2**32 - 1, None], ids=["zero", "ones", "live"])
def test_initiator_takes_any_index_of_responder(target: Target, index: int | None) -> None:
    if index is None:
        index = target.peer().connect().remote_index
    peer = target.peer(endpoint=True)
    target.send(peer, b"first")
    session = peer.send(Response(to=peer.expect(Initiation), sender_index=index)).made()
    data = peer.expect(Data, where=lambda one: b"first" in one.plaintext)
    assert data.session is session, f"the device does not send to the index {index:#010x}"
    assert is_delivered(target, peer, session), f"the device delivers no data if the responder's index is {index:#010x}"


# Slots


@pytest.mark.requirement("DT-15", "HS-37")
def test_responder_sends_on_current_until_next_is_confirmed(target: Target) -> None:
    peer = target.peer()
    previous, current = established(target, peer), established(target, peer)
    with twin("data on the previous session is delivered before the next handshake"):
        assert is_delivered(target, peer, previous, current)
    unconfirmed = peer.handshake()
    assert not is_delivered(target, peer, previous, current), (
        "the device accepted data on its previous session after it had answered an initiation"
    )
    assert sending_session(target, peer) is current, "the device left its current session before the next was confirmed"
    assert is_delivered(target, peer, current), "the device refused data on its current session"
    assert is_delivered(target, peer, unconfirmed), "the device refused the first data on its next session"
    assert sending_session(target, peer) is unconfirmed, "the device does not send on the session that is confirmed"


@pytest.mark.requirement("DT-19", "DT-16")
@pytest.mark.parametrize("kind", ["data", "keepalive"])
def test_data_on_previous_session_does_not_switch_back(target: Target, kind: str) -> None:
    peer = target.peer()
    previous, current = established(target, peer), established(target, peer)
    with twin("the device sends on the current session"):
        assert is_delivered(target, peer, current)
        assert sending_session(target, peer) is current
    if kind == "keepalive":
        # What is accepted from another port moves the endpoint. Some programs do not count a keepalive in rx_bytes.
        elsewhere = peer.socket()
        peer.send(previous.keepalive(), via=elsewhere)
        there = Endpoint(elsewhere.address, elsewhere.port)
        seen = poll_until(lambda: target.seen(peer).endpoint, lambda one: one == there, 2.0)
        assert seen == there, "the device refused a keepalive on its previous session"
    else:
        assert is_delivered(target, peer, previous), "the device refused data on its previous session"
    assert sending_session(target, peer) is current, f"the device sends on its previous session after a {kind} on it"


@pytest.mark.requirement("DT-33", "DT-16")
@pytest.mark.parametrize("next_is_there", [False, True], ids=["two", "three"])
def test_at_most_three_sessions_accept_data(target: Target, next_is_there: bool) -> None:
    peer = target.peer()
    sessions = [established(target, peer) for _ in range(4)]
    if next_is_there:
        sessions.append(peer.handshake())
    # The last session comes last: the first data on it would be the one that destroys others.
    current = sessions[3]
    with twin("data on the current session is delivered"):
        assert is_delivered(target, peer, current)
    accepted = [number for number, session in enumerate(sessions) if is_delivered(target, peer, session, current)]
    # A session that waits for its confirmation has taken the place of the previous one.
    expected = [3, 4] if next_is_there else [2, 3]
    assert accepted == expected, (
        f"sessions {accepted} accept data, expected {expected}; 0 is the oldest of {len(sessions)}"
    )


@pytest.mark.requirement("DT-14", "HS-37", "TM-16")
def test_initiator_sends_on_new_session_at_once(target: Target) -> None:
    peer = target.peer()
    previous, current = established(target, peer), established(target, peer)
    with twin("data on both sessions is delivered, and the device sends on the newer one"):
        assert is_delivered(target, peer, previous, current)
        assert sending_session(target, peer) is current
    initiation = peer.expect(Initiation, within=DEAD_PEER_WITHIN)
    assert sending_session(target, peer) is current, (
        "the device left its current session after it had sent an initiation"
    )
    assert is_delivered(target, peer, current), "the device refused data on its current session after its initiation"
    early = [one for one in peer.drain() if one.name == "keepalive"]
    assert not early, f"the device sent a keepalive, although it had sent data after all that it received: {early[0]}"
    new = peer.send(Response(to=initiation)).made()
    first = peer.expect(Data)
    assert (first.session, first.counter) == (new, 0), "the device did not send at once on the session that it began"
    assert not is_delivered(target, peer, previous, new), (
        "the device accepted data on a session that is older than its previous one"
    )
    assert is_delivered(target, peer, current, new), "the device refused data on the session before the new one"
    assert sending_session(target, peer) is new, "the device does not send on the session that it began"


@pytest.mark.requirement("DT-14", "TM-16")
def test_next_session_becomes_previous_one_of_initiator(target: Target) -> None:
    peer = target.peer()
    current = established(target, peer)
    peer.send(Initiation())
    waiting = peer.expect(Response).session
    assert sending_session(target, peer) is current, "the device sends on a session that nothing has confirmed"
    # Without an answer to that packet the device initiates, while the other session still waits.
    new = peer.send(Response(to=peer.expect(Initiation, within=DEAD_PEER_WITHIN))).made()
    assert peer.expect(Data).session is new, "the device did not send at once on the session that it began"
    assert is_delivered(target, peer, waiting, new), (
        "the device refused data on the session that waited for its first packet when it began a new one"
    )
    assert not is_delivered(target, peer, current, new), (
        "the device accepted data on the session before the one that waited for its first packet"
    )
    assert sending_session(target, peer) is new, "the device went back to an older session"


# Messages


@pytest.mark.requirement("MSG-13")
def test_keepalive_is_empty_and_takes_next_counter(target: Target) -> None:
    peer = target.peer(endpoint=True, persistent_keepalive=1)
    session = peer.respond()
    target.send(peer)
    came = [peer.expect(Data, within=3.0) for _ in range(4)]
    keepalives = [one for one in came if one.is_keepalive]
    assert len(keepalives) == 3, f"expected one data packet among three keepalives: {', '.join(map(str, came))}"
    assert {len(one.datagram) for one in keepalives} == {32}, "a keepalive is not a message of 32 bytes"
    assert {one.session for one in came} == {session}
    assert [one.counter for one in came] == [0, 1, 2, 3], "a keepalive does not take the next counter of its session"


# Crossing handshakes


@pytest.mark.requirement("ROB-14")
@pytest.mark.bug("IB-04")
@pytest.mark.parametrize("order", ["answers-first", "begins-first"])
def test_crossing_initiations_lead_to_one_working_session(target: Target, order: str) -> None:
    for number in range(effort(3, 20)):
        peer = target.peer(endpoint=True)
        target.send(peer, f"staged {number}".encode())
        initiation = peer.expect(Initiation)
        peer.send(Initiation())
        if order == "answers-first":
            peer.send(Response(to=initiation))
        peer.send(peer.expect(Response, within=CONVERGED_WITHIN).session.keepalive())
        if order == "begins-first":
            peer.send(Response(to=initiation))
        poll_until(lambda: answer_and_look(peer), bool, CONVERGED_WITHIN, what="data after crossing initiations")  # noqa: B023
        came = [one for one in peer.inbox if isinstance(one, ReceivedData) and b"staged" in one.plaintext]
        assert came, f"two initiations crossed, and {CONVERGED_WITHIN:g} s later the device has sent no data"
        for session in (came[0].session, sending_session(target, peer)):
            assert session is not None
            packet = target.packet(peer, f"on {session.local_index:08x}, {len(peer.sent)}".encode())
            peer.send(session.data(packet))
            target.inside.expect(packet, what="data on the session on which it sends")


def answer_and_look(peer: ScriptedPeer) -> bool:
    """Answer the device's initiations, as a correct peer does; return whether the device has sent its staged data."""
    for one in [one for one in peer.drain() if isinstance(one, ReceivedInitiation)]:
        peer.inbox.remove(one)
        peer.send(Response(to=one))
    return any(isinstance(one, ReceivedData) and b"staged" in one.plaintext for one in peer.inbox)
