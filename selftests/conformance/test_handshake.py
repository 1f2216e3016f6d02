"""Check the handshake against a scripted peer: what is answered, what is refused, and why."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from harness import LOW_ORDER_POINTS, Data, Initiation, Response, differs, later, let_pass, poll_until, twin
from harness.scripted.received import ReceivedData, ReceivedResponse
from refwg.noise import timestamp
from selftests.support.target import begin, configure_with_key, is_delivered, next_data, set_down, set_up

if TYPE_CHECKING:
    from harness import ScriptedPeer, Target

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
# Nanoseconds: an initiation within 20 ms of the last one is refused; by a coarse clock, within 16 ms.
SPACING, SURELY_TOO_SOON = 20_000_000, 16_000_000
ATTEMPTS = 10
# Initiations, each within 20 ms of the one before, for much longer than that.
STEADY, EACH, SERIES = 12, 0.004, 2
# The limit of the token buckets is five messages, then 20 a second (ratelimiter.h): it applies only under load.
MANY = 40
# A constant low bit of this many whitened timestamps, or a constant bit of this many indices, is not chance.
INITIATIONS, INDICES, ALL_BITS = 20, 50, 2**32 - 1
TIMESTAMP_WHITENING = 1 << 24
COPIES, SOCKETS, ROUNDS = 2, 8, 20
# Copies of a response are processed at once now and then only: in 1 to 6 of 100 handshakes of such a program.
RESPONSES = 200


def responses(peer: ScriptedPeer) -> list[ReceivedResponse]:
    """Return the responses that came and that no expectation has taken, authentic or not."""
    return [one for one in peer.drain() if isinstance(one, ReceivedResponse)]


# Timestamps


@pytest.mark.requirement("HS-08")
@pytest.mark.parametrize("step", [-SECOND, -1, 0], ids=["second", "nanosecond", "equal"])
def test_initiation_with_older_timestamp_is_refused(target: Target, step: int) -> None:
    peer = target.peer()
    peer.handshake()
    peer.keep_spacing()
    peer.send(Initiation(timestamp=later(peer.timestamp, step)))
    peer.expect_silence(after="an initiation whose timestamp is not later than that of the last one")
    with twin("an initiation whose timestamp is one nanosecond later is answered"):
        peer.keep_spacing()
        peer.handshake(Initiation(timestamp=later(peer.timestamp, 1)))


@pytest.mark.requirement("HS-10")
def test_greatest_timestamp_survives_link_down_and_up(target: Target) -> None:
    peer = target.peer()
    peer.connect()
    recorded = peer.sent[0]
    set_down(target)
    set_up(target)
    peer.send(recorded)
    peer.expect_silence(after="a recorded initiation after its link was down and up")
    with twin("a later initiation is answered"):
        peer.handshake()


@pytest.mark.requirement("HS-10", "HS-36")
def test_greatest_timestamp_is_forgotten_with_peer(target: Target) -> None:
    peer = target.peer()
    with twin("an initiation is answered, and the same again is not"):
        peer.connect()
        peer.keep_spacing()
        peer.send(peer.sent[0])
        peer.expect_silence(after="the same initiation again")
    target.remove(peer)
    target.configure(peer)
    peer.send(peer.sent[0])
    assert responses_within(peer), "the device refused an old initiation of a peer that was removed and added again"


@pytest.mark.requirement("HS-11", "CR-11")
def test_timestamp_of_next_hour_is_accepted(target: Target) -> None:
    peer = target.peer()
    future = later(peer.next_timestamp(), HOUR)
    peer.handshake(Initiation(timestamp=future))
    peer.timestamp = bytes(12)
    peer.send(Initiation())
    peer.expect_silence(after="an initiation of now, after one whose timestamp is an hour ahead")
    with twin("an initiation is answered whose timestamp is later still"):
        peer.keep_spacing()
        peer.handshake(Initiation(timestamp=later(future)))


@pytest.mark.requirement("HS-11", "CR-11")
@pytest.mark.parametrize("value", [bytes(11) + b"\1", timestamp(0), b"\xff" * 12], ids=["least", "epoch", "greatest"])
def test_implausible_first_timestamp_is_accepted(target: Target, value: bytes) -> None:
    peer = target.peer()
    with twin("a timestamp of now is accepted"):
        target.round_trip()
    peer.send(Initiation(timestamp=value))
    session = peer.expect(Response).session
    assert is_delivered(target, peer, session), f"no data is delivered after an initiation with timestamp {value.hex()}"


@pytest.mark.requirement("HS-12", "HS-13")
def test_initiation_within_20_ms_is_dropped_without_trace(target: Target) -> None:
    for _ in range(ATTEMPTS):
        # The device does not know the peer when the messages are made, which may take longer than 20 ms.
        peer = target.peer(is_known=False)
        stamp = peer.next_timestamp()
        first, second = (peer.send(Initiation(timestamp=later(stamp, step * SECOND))).datagram for step in (1, 2))
        peer.expect_silence(after="an initiation of an unknown peer")
        target.configure(peer)
        for datagram in (first, second):
            peer.send(datagram)
        target.round_trip()
        came = responses_within(peer)
        # A program with several workers may take the second one first; then the first is too old.
        if len(came) == 1 and came[0].receiver_index == int.from_bytes(first[4:8], "little"):
            break
        if len(came) == 1:
            continue
        gap = came[1].time - came[0].time
        assert gap > SURELY_TOO_SOON, f"the device answered two initiations within {gap / 1e6:.1f} ms"
    else:
        pytest.fail(f"the device never processed two initiations within {SPACING / 1e6:.0f} ms, in {ATTEMPTS} attempts")
    peer.expect(Response)
    peer.keep_spacing()
    peer.send(second)
    assert responses_within(peer), "the device refused an initiation that it had dropped before because of the 20 ms"


@pytest.mark.requirement("HS-12")
def test_refused_initiations_do_not_extend_20_ms(target: Target) -> None:
    with twin("a single initiation is answered"):
        target.round_trip()
    # On a busy machine some come too late to be refused.
    for _ in range(SERIES):
        # The device does not know the peer when the messages are made, which may take longer than they may be apart.
        peer = target.peer(is_known=False)
        stamp = peer.next_timestamp()
        initiations = [Initiation(timestamp=later(stamp, step * SECOND)) for step in range(1, STEADY + 1)]
        datagrams = [peer.send(initiation).datagram for initiation in initiations]
        peer.expect_silence(after="an initiation of an unknown peer")
        target.configure(peer)
        for datagram in datagrams:
            peer.send(datagram)
            let_pass(EACH, "each initiation comes within 20 ms of the one before")
        target.round_trip()
        came = len(responses_within(peer))
        assert came > 1, f"of {STEADY} initiations, each within 20 ms of the one before, the device answered {came}"


@pytest.mark.requirement("HS-09")
@pytest.mark.bug("IB-47")
def test_copies_of_one_initiation_get_one_response(target: Target) -> None:
    peer = target.peer()
    sockets = [peer.socket() for _ in range(SOCKETS)]
    answered: Counter[int] = Counter()
    with ThreadPoolExecutor(SOCKETS) as threads:
        for _ in range(ROUNDS):
            peer.keep_spacing()
            initiation = peer.send(Initiation()).datagram
            list(threads.map(lambda one, data=initiation: [one.throw(data) for _ in range(COPIES)], sockets))
            # A program that takes these for a flood answers by cookie replies, and the next initiation has that cookie.
            poll_until(peer.drain, bool, 2.0)
            answered += taken(peer)
    target.round_trip()
    answered += taken(peer)
    with twin("most initiations are answered"):
        assert len(answered) > ROUNDS // 2, f"of {ROUNDS} initiations {len(answered)} were answered"
    twice = sum(count > 1 for count in answered.values())
    assert not twice, (
        f"of {ROUNDS} initiations that came {SOCKETS * COPIES + 1} times {twice} were answered more than once"
    )


@pytest.mark.requirement("HS-19")
@pytest.mark.bug("IB-85")
def test_copies_of_one_response_begin_one_session(target: Target) -> None:
    peer = target.peer(endpoint=True)
    sockets = [peer.socket() for _ in range(SOCKETS)]
    completed = 0
    reused: list[str] = []
    with ThreadPoolExecutor(SOCKETS) as threads:
        for number in range(RESPONSES):
            target.send(peer, b"first %d" % number)
            response = peer.send(Response(to=peer.expect(Initiation)))
            list(threads.map(lambda one, data=response.datagram: one.throw(data), sockets))
            completed += is_sent(target, peer, b"second %d" % number)
            # Again from the beginning: the device has never had this peer.
            target.remove(peer)
            messages = [one for one in peer.drain() if isinstance(one, ReceivedData) and not one.wrong]
            first: dict[tuple[int, int], ReceivedData] = {}
            for one in messages:
                other = first.setdefault((one.receiver_index, one.counter), one)
                if other.datagram != one.datagram:
                    reused.append(f"handshake {number}: counter {one.counter}")
            peer.inbox.clear()
            target.configure(peer, endpoint=True)
    with twin("most handshakes are completed"):
        assert completed > RESPONSES // 2, f"of {RESPONSES} handshakes {completed} were completed"
    assert not reused, (
        f"the device used a counter twice with one key, for different messages, in {len(reused)} of {RESPONSES} "
        f"handshakes whose response came {SOCKETS + 1} times: {reused[0]}"
    )


def is_sent(target: Target, peer: ScriptedPeer, payload: bytes) -> bool:
    """Let the device send a packet to a peer; return whether it came, and leave it in the inbox."""
    target.send(peer, payload)
    return poll_until(
        lambda: any(isinstance(one, ReceivedData) and payload in one.plaintext for one in peer.drain()), bool, 2.0
    )


def taken(peer: ScriptedPeer) -> Counter[int]:
    """Take all messages out of the inbox; return the number of responses to each initiation, by its index."""
    came, peer.inbox[:] = responses(peer), []
    return Counter(one.receiver_index for one in came)


@pytest.mark.requirement("CR-12")
def test_timestamps_are_rounded_down(target: Target) -> None:
    peers = [target.peer(endpoint=True) for _ in range(INITIATIONS)]
    for peer in peers:
        target.send(peer)
    fractions = [int.from_bytes(peer.expect(Initiation).timestamp[8:]) for peer in peers]
    assert all(0 <= fraction < SECOND for fraction in fractions), f"nanoseconds of timestamps: {fractions}"
    exact = [fraction for fraction in fractions if fraction % TIMESTAMP_WHITENING]
    if exact:
        differs(f"timestamps are exact: {exact[0]} ns, not rounded to 2^24 ns", by=[target.implementation.name])


@pytest.mark.requirement("MSG-16")
def test_indices_are_random(target: Target) -> None:
    peer = target.peer()
    indices = [peer.handshake().remote_index for _ in range(INDICES)]
    assert len(set(indices)) == INDICES, f"the device used an index twice: {sorted(indices)}"
    varied = 0
    for index in indices:
        varied |= index ^ indices[0]
    if varied != ALL_BITS:
        differs(
            f"these bits of {INDICES} indices never changed: {varied ^ ALL_BITS:#010x}", by=[target.implementation.name]
        )


# Spacing and load


@pytest.mark.requirement("RL-06")
def test_many_peers_at_one_address_are_answered_without_load(target: Target) -> None:
    peers = [target.peer(address="192.168.1.9") for _ in range(MANY)]
    with twin("a single initiation is answered"):
        target.round_trip()
    for peer in peers:
        peer.send(Initiation())
    poll_until(lambda: sum(len(responses(peer)) for peer in peers), lambda count: count == MANY, 2.0)
    answered = [peer for peer in peers if responses(peer)]
    came = sum(len(responses(peer)) for peer in peers)
    assert len(answered) == MANY == came, (
        f"of {MANY} valid initiations from one address {came} were answered, without load"
    )


@pytest.mark.requirement("RL-06", "HS-12")
def test_initiations_of_one_peer_are_answered_every_25_ms(target: Target) -> None:
    peer = target.peer()
    for number in range(MANY):
        peer.send(Initiation())
        assert peer.expect(Response), f"initiation {number} was not answered"


@pytest.mark.requirement("HS-05")
def test_mac2_of_initiation_is_ignored_without_load(target: Target) -> None:
    peer = target.peer()
    for mac2 in (b"\xff" * 16, bytes(15) + b"\1", bytes(16)):
        peer.send(Initiation(mac2=mac2))
        assert responses_within(peer), f"the device refused an initiation with mac2 {mac2.hex()}, without load"
        peer.expect(Response)
    peer.send(Initiation(cookie=b"stale cookie, 16"))
    assert responses_within(peer), (
        "the device refused an initiation whose mac2 is made with an unknown cookie, without load"
    )


@pytest.mark.requirement("HS-05")
@pytest.mark.parametrize("mac2", [b"\xff" * 16, bytes(15) + b"\1"], ids=["ones", "one"])
def test_mac2_of_response_is_ignored_without_load(target: Target, mac2: bytes) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer, b"first")
    session = peer.send(Response(to=peer.expect(Initiation), mac2=mac2)).made()
    data = peer.expect(Data, where=lambda one: b"first" in one.plaintext)
    assert data.session is session


def responses_within(peer: ScriptedPeer, seconds: float = 2.0) -> list[ReceivedResponse]:
    """Wait until a response has come; return all that came, none after the deadline."""
    return poll_until(lambda: responses(peer), bool, seconds)


# Points of low order


@pytest.mark.requirement("HS-35")
@pytest.mark.bug("IB-69")
@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=lambda point: point.hex()[:8])
def test_initiation_with_low_order_ephemeral_is_refused(target: Target, point: bytes) -> None:
    peer = target.peer()
    peer.send(Initiation(ephemeral=point))
    peer.expect_silence(after=f"an initiation whose ephemeral {point.hex()} is a point of low order")
    with twin("an initiation with another ephemeral is answered"):
        peer.send(Initiation())
        peer.expect(Response)


@pytest.mark.requirement("HS-35", "HS-18")
@pytest.mark.bug("IB-69")
@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=lambda point: point.hex()[:8])
def test_response_with_low_order_ephemeral_is_refused(target: Target, point: bytes) -> None:
    peer = target.peer(endpoint=True)
    target.send(peer, b"first")
    initiation = peer.expect(Initiation)
    peer.send(Response(to=initiation, ephemeral=point))
    peer.expect_silence(after=f"a response whose ephemeral {point.hex()} is a point of low order")
    with twin("a response with another ephemeral completes the handshake"):
        peer.send(Response(to=initiation))
        peer.expect(Data)


# Keys


@pytest.mark.requirement("HS-03", "CR-15", "CR-17")
@pytest.mark.parametrize("role", ["initiator", "responder"])
@pytest.mark.parametrize("key", [None, bytes(32), bytes(range(32))], ids=["absent", "zero", "given"])
def test_handshake_yields_keys_of_both_directions(target: Target, role: str, key: bytes | None) -> None:
    peer = target.peer(preshared_key=key or bytes(32), is_known=False)
    configure_with_key(target, peer, key)
    if role == "initiator":
        first = begin(target, peer)
        session = first.session
    else:
        session = peer.connect()
        first = next_data(target, peer)
    assert session is not None
    assert first.session is session, "the device's first data is not on the session that the handshake has made"
    assert first.counter == 0, f"the device's first message on a session has counter {first.counter}"
    packet = target.packet(peer, b"to the device")
    peer.send(session.data(packet))
    target.inside.expect(packet, what="data sealed with the key of its direction")
