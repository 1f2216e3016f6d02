"""Check what all messages of a device have in common: forms, fresh values, timestamps, and what they hide."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from harness import (
    COOKIE_REPLY,
    DATA,
    INITIATION,
    RESPONSE,
    Capture,
    CookieReply,
    Data,
    Initiation,
    Response,
    differs,
    effort,
    let_pass,
    poll_until,
    twin,
)
from harness.scripted.received import ReceivedCookieReply, ReceivedData
from selftests.support.target import PORT, begin, is_delivered, next_data, set_down, set_up

if TYPE_CHECKING:
    from harness import Message, ScriptedPeer, Session, Target
    from harness.scripted.received import ReceivedInitiation, ReceivedResponse

SECOND = 1_000_000_000
# Seconds: REKEY_TIMEOUT, with the jitter and a timer's lateness.
RETRY_WITHIN = 7.0
PEERS = 8
# Lengths of the messages of MSG-01 to MSG-03; data has a header of 16 bytes and a tag of as many.
LENGTHS = {INITIATION: 148, RESPONSE: 92, COOKIE_REPLY: 64}
LEAST_DATA = 32
# The label of a TAI64N timestamp for the epoch: the paper's 10 s ahead of UTC, and the 37 s that TAI is ahead today.
BASES = {10: 0x400000000000000A, 37: 0x4000000000000025}
# Nanoseconds: the step of the paper's whitening (5.1), 2^24.
WHITENING = 1 << 24
# Seconds, more than that.
STEP = 0.025
# mac2 of a message without a cookie.
NO_COOKIE = bytes(16)
# Equal bytes at the same place of two messages: four in a row are a chance of 1 in 10^7 for a message.
RUN = 4
# Fields of an initiation that look random; the index before them is the subject of MSG-16.
RANDOM_PART = slice(8, 132)
# Indices that MSG-16 is judged by; with so many each bit is set in 35 to 65 percent but for a chance of 1 in 10^9.
INDICES = 500
BALANCE = (0.35, 0.65)
# Equal steps between successive random indices: even two are a chance of 1 in 10^5.
MOST_EQUAL_STEPS = 3


def next_initiation(target: Target, peer: ScriptedPeer, *, family: int = 4) -> ReceivedInitiation:
    """Remove a peer and add it again, and let the device begin a handshake with it, which need not wait then."""
    target.remove(peer)
    target.configure(peer, endpoint=True)
    target.send(peer, family=family)
    return peer.expect(Initiation)


def initiations(target: Target, number: int) -> list[ReceivedInitiation]:
    """Return initiations of the device to several peers, in turn."""
    peers = [target.peer(endpoint=True) for _ in range(PEERS)]
    return [next_initiation(target, peers[turn % PEERS]) for turn in range(number)]


def responses(target: Target, number: int) -> list[ReceivedResponse]:
    """Return responses of the device to several peers, in turn."""
    peers = [target.peer() for _ in range(PEERS)]
    came = []
    for turn in range(number):
        peer = peers[turn % PEERS]
        peer.send(Initiation())
        if poll_until(peer.drain, bool, 5.0) and isinstance(peer.inbox[0], ReceivedCookieReply):
            # Some programs take a hundred handshakes a second for a flood; the next initiation has the cookie.
            peer.expect(CookieReply)
            peer.send(Initiation())
        came.append(peer.expect(Response))
    return came


def twice(values: list[bytes]) -> list[str]:
    """Return the values that occur more than once, in hexadecimal."""
    return [value.hex() for value, count in Counter(values).items() if count > 1]


# Fresh values


@pytest.mark.requirement("CR-16")
def test_every_handshake_message_has_fresh_ephemeral(target: Target) -> None:
    silent = [target.peer(endpoint=True) for _ in range(PEERS)]
    for peer in silent:
        target.send(peer)
    first = [peer.expect(Initiation) for peer in silent]
    came: list[ReceivedInitiation | ReceivedResponse] = [*first, *initiations(target, effort(50, 200))]
    came += responses(target, effort(60, 200))
    # No peer has answered its first initiation, so the device sends another one.
    retries = [peer.expect(Initiation, within=RETRY_WITHIN) for peer in silent]
    for before, retry in zip(first, retries, strict=True):
        came.append(retry)
        assert retry.datagram != before.datagram, "the device sent the same initiation again when nobody answered"
    ephemerals = twice([one.ephemeral for one in came])
    assert not ephemerals, f"the device used {len(ephemerals)} ephemerals more than once, such as {ephemerals[0]}"
    indices = twice([one.datagram[4:8] for one in came])
    assert not indices, f"the device used {len(indices)} sender indices more than once, such as {indices[0]}"


@pytest.mark.requirement("MSG-16")
@pytest.mark.bug("IB-70")
def test_sender_indices_are_random(target: Target) -> None:
    begun, answered = initiations(target, INDICES // 5), responses(target, INDICES - INDICES // 5)
    wrong = []
    for role, came in (("initiations", begun), ("responses", answered)):
        equal = equal_steps([one.sender_index for one in came])
        if equal > MOST_EQUAL_STEPS:
            wrong.append(f"{equal} times the same difference between the indices of two successive {role}")
    indices = [one.sender_index for one in begun] + [one.sender_index for one in answered]
    if len(set(indices)) < len(indices):
        wrong.append(f"{len(indices) - len(set(indices))} of {len(indices)} indices had been used before")
    if biased := biased_bits(indices):
        wrong.append(f"the share of indices in which a bit is set, by bit: {biased}")
    if wrong:
        differs("; ".join(wrong), requirement="MSG-16", by=[target.implementation.name])


def equal_steps(indices: list[int]) -> int:
    """Return how often the most common difference between the indices of a peer's successive messages occurs."""
    steps = Counter((after - before) % 2**32 for before, after in zip(indices, indices[PEERS:], strict=False))
    steps += Counter((after - before) % 2**32 for before, after in pairwise(indices))
    return max(steps.values())


def biased_bits(indices: list[int]) -> dict[int, float]:
    """Return the bits that are set too rarely or too often, with the share of indices in which they are."""
    shares = {bit: sum(index >> bit & 1 for index in indices) / len(indices) for bit in range(32)}
    return {bit: round(share, 3) for bit, share in shares.items() if not BALANCE[0] <= share <= BALANCE[1]}


@pytest.mark.requirement("HS-39")
def test_initiations_hide_identity_and_share_no_bytes(target: Target) -> None:
    peer = target.peer(endpoint=True)
    with Capture(target.node, "veth1") as wire:
        came = [next_initiation(target, peer) for _ in range(effort(20, 100))]
        peer.connect()
        next_data(target, peer)
        with twin("the capture has both handshake messages and data"):
            sent = wire.messages(port=PORT)
            assert {INITIATION, RESPONSE, DATA} <= {message.kind for message in sent}
    for name, key in (("the device's", target.public_key), ("the peer's", peer.public_key)):
        shown = [message for message in sent if key.raw in message.payload]
        assert not shown, f"{name} static public key is in clear in {len(shown)} messages, such as {shown[0]}"
    for before, after in pairwise(came):
        run, place = longest_run(before.datagram[RANDOM_PART], after.datagram[RANDOM_PART])
        assert run < RUN, (
            f"two initiations to one peer have {run} bytes in common, from byte {RANDOM_PART.start + place} on"
        )


def longest_run(one: bytes, other: bytes) -> tuple[int, int]:
    """Return the length of the longest run of equal bytes at the same place, and its place."""
    best = (0, 0)
    length = 0
    for place, (left, right) in enumerate(zip(one, other, strict=True), 1):
        length = length + 1 if left == right else 0
        best = max(best, (length, place - length))
    return best


# Forms


@pytest.mark.requirement("MSG-15", "MSG-05")
def test_only_known_messages_with_zero_reserved_bytes_leave(target: Target) -> None:
    peer, silent = target.peer(endpoint=True, persistent_keepalive=1), target.peer(endpoint=True)
    with Capture(target.node, "veth1") as wire:
        target.send(silent)
        begin(target, peer)
        session = peer.connect()
        exchange(target, peer, session)
        provoke(target, peer, session)
        next_data(target, peer)
        wire.wait_for(lambda message: len(message.payload) == LEAST_DATA, 5.0, "a keepalive")
        set_down(target)
        set_up(target)
        with twin("a session works after all of it"):
            peer.connect()
            next_data(target, peer)
        silent.expect(Initiation)
        sent = wire.messages(port=PORT)
    with twin("initiations, responses, keepalives and data were sent"):
        assert {INITIATION, RESPONSE, DATA} <= {message.kind for message in sent}
    wrong = [
        f"{message.payload[:8].hex()} of {len(message.payload)} bytes" for message in sent if not is_known(message)
    ]
    assert not wrong, f"{len(wrong)} of {len(sent)} datagrams are not one of the four messages: {wrong[:5]}"


def is_known(message: Message) -> bool:
    """Return whether a datagram has the type, reserved bytes and length of one of the four messages."""
    length = len(message.payload)
    if message.payload[1:4] != bytes(3):
        return False
    return length >= LEAST_DATA if message.kind == DATA else LENGTHS.get(message.payload[0]) == length


def exchange(target: Target, peer: ScriptedPeer, session: Session) -> None:
    """Pass data of many lengths in both directions, and of both families."""
    for family in (4, 6):
        for size in (0, 1, 15, 16, 17, 500, 1300):
            payload = bytes(i & 255 for i in range(size))
            target.send(peer, payload, family=family)
            peer.expect(Data, where=lambda data: bool(data.packet))
            peer.send(session.data(target.packet(peer, payload, family=family)))


def provoke(target: Target, peer: ScriptedPeer, session: Session) -> None:
    """Send what a device might answer by a message of its own: unknown types, lengths, indices and senders."""
    stranger = target.peer(is_known=False)
    for kind in (0, 5, 6, 127, 128, 255):
        for length in (1, 4, 32, 64, 92, 148, 1400):
            peer.send(bytes([kind]) + bytes(length - 1))
    for message in (Initiation(), Initiation(mac1=bytes(16)), Initiation(cut=147), Initiation(suffix=b"\0")):
        stranger.send(message)
    for prefix in (b"\4\0\0\1", b"\0\0\0\4", b"\1\1\0\0"):
        peer.send(session.data(target.packet(peer), prefix=prefix))
    peer.send(session.data(target.packet(peer), receiver_index=session.remote_index ^ 1))
    peer.send(peer.sent[-1])


@pytest.mark.requirement("CK-02")
@pytest.mark.parametrize("family", [4, pytest.param(6, marks=pytest.mark.capability("ipv6-underlay"))])
def test_mac2_is_zero_without_cookie(target: Target, family: int) -> None:
    peer = target.peer(endpoint=True, family=family)
    target.send(peer)
    first, retry = peer.expect(Initiation), peer.expect(Initiation, within=RETRY_WITHIN)
    peer.send(Initiation())
    for one in (first, retry, peer.expect(Response)):
        assert one.datagram[-16:] == NO_COOKIE, (
            f"mac2 of the {one.name} is {one.datagram[-16:].hex()}, although the peer has never sent a cookie"
        )


# The session that a message is on


@pytest.mark.requirement("DT-02")
@pytest.mark.parametrize("role", ["initiator", "responder"])
def test_data_carries_receiver_index_of_newest_session(target: Target, role: str) -> None:
    peer = target.peer(endpoint=True)
    if role == "initiator":
        begin(target, peer)
    else:
        peer.connect()
    for number in range(4):
        newest = list(peer.sessions.values())[-1]
        assert_on(target, peer, newest, f"after handshake {number + 1}")
        if role == "initiator":
            # A new peer of the device has no session, so it begins a handshake.
            target.remove(peer)
            target.configure(peer, endpoint=True)
            begin(target, peer)
        else:
            peer.connect()


def assert_on(target: Target, peer: ScriptedPeer, session: Session, when: str) -> None:
    """Assert that the device's next data carries the receiver index that this session's handshake has given."""
    with twin("data on the session is delivered, which confirms it"):
        assert is_delivered(target, peer, session)
    peer.drain()
    peer.inbox.clear()
    target.send(peer)
    came = [
        one.receiver_index
        for one in poll_until(peer.drain, bool, 5.0, what="data of the device")
        if isinstance(one, ReceivedData)
    ]
    assert came, f"the device sent no data {when}"
    assert set(came) == {session.local_index}, (
        f"the device's data carries the receiver indices {[f'{index:#010x}' for index in came]} {when}, "
        f"expected {session.local_index:#010x}"
    )
    peer.inbox.clear()


# Timestamps


def seconds_and_nanoseconds(timestamp: bytes) -> tuple[int, int]:
    """Return both fields of a timestamp (5.1)."""
    return int.from_bytes(timestamp[:8]), int.from_bytes(timestamp[8:])


@pytest.mark.requirement("CR-11")
@pytest.mark.bug("IB-48")
def test_timestamp_is_tai64n_of_wall_clock(target: Target) -> None:
    peer = target.peer(endpoint=True)
    earlier = bytes(12)
    for _ in range(effort(40, 100)):
        let_pass(STEP, "a clock that is rounded to 2^24 ns must show another time")
        before = time.time_ns()
        initiation = next_initiation(target, peer)
        seconds, nanoseconds = seconds_and_nanoseconds(initiation.timestamp)
        assert nanoseconds < SECOND, f"a timestamp has {nanoseconds} nanoseconds"
        unix = {offset: (seconds - base) * SECOND + nanoseconds for offset, base in BASES.items()}
        assert any(before - WHITENING <= value <= initiation.time for value in unix.values()), (
            f"the timestamp {initiation.timestamp.hex()} is off from the wall clock by "
            f"{(unix[10] - before) / SECOND:.3f} s, with TAI 10 s ahead of UTC"
        )
        assert initiation.timestamp > earlier, (
            f"the timestamp {initiation.timestamp.hex()} is not greater than {earlier.hex()}, "
            "which the device has sent before it was configured again"
        )
        earlier = initiation.timestamp


@pytest.mark.requirement("CR-12")
@pytest.mark.bug("IB-49")
def test_timestamps_are_rounded_to_16_ms(target: Target) -> None:
    fields = [seconds_and_nanoseconds(one.timestamp)[1] for one in initiations(target, effort(50, 200))]
    exact = [value for value in fields if value % WHITENING]
    if exact:
        differs(
            f"{len(exact)} of {len(fields)} timestamps are no multiple of 2^24 ns, such as {exact[0]} ns",
            requirement="CR-12",
            by=[target.implementation.name],
        )
