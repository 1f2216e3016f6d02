from __future__ import annotations

import hmac
from dataclasses import astuple, replace
from hashlib import blake2s
from struct import pack
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from harness.scripted.intents import LOW_ORDER_POINTS
from refwg.errors import DropReason, Refused
from refwg.messages import MILLISECOND, SECOND, ZERO_KEY
from refwg.noise import (
    INITIAL_HASH,
    Handshake,
    HandshakeState,
    Keypairs,
    StaticIdentity,
    Transcript,
    open_initiation,
    static_static,
    timestamp,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.messages import Initiation, Response
    from refwg.noise import Keypair

ALICE = StaticIdentity.from_private(b"a" * 32)
BOB = StaticIdentity.from_private(b"b" * 32)
NOBODY = StaticIdentity.from_private(b"n" * 32)
WALL = 1_700_000_000 * SECOND


def handshake(identity: StaticIdentity, remote: StaticIdentity) -> Handshake:
    return Handshake(remote.public, precomputed_static_static=static_static(identity, remote.public))


def initiation(sender: Handshake, *, wall: int = WALL, index: int = 1) -> Initiation:
    return sender.create_initiation(ALICE, ephemeral=b"e" * 32, timestamp=timestamp(wall), sender_index=index)


def consume(receiver: Handshake, message: Initiation, now: int = 0) -> None:
    receiver.consume_initiation(open_initiation(BOB, message), now)


def exchange() -> tuple[Handshake, Handshake, Response]:
    """Alice's and Bob's handshake, and Bob's response, which Alice has not consumed yet."""
    alice, bob = handshake(ALICE, BOB), handshake(BOB, ALICE)
    consume(bob, initiation(alice))
    return alice, bob, bob.create_response(ephemeral=b"f" * 32, sender_index=2)


def reason_of(action: Callable[[], object]) -> DropReason:
    with pytest.raises(Refused) as refusal:
        action()
    return refusal.value.reason


@pytest.mark.requirement("CR-12", "CR-11")
@pytest.mark.parametrize(
    ("nanoseconds", "whitened"), [(0, 0), (2**24 - 1, 0), (2**24, 2**24), (999_999_999, 59 * 2**24)]
)
def test_timestamps_are_whitened(nanoseconds: int, whitened: int) -> None:
    stamp = timestamp(5 * SECOND + nanoseconds)
    assert stamp == (2**62 + 15).to_bytes(8) + whitened.to_bytes(4)


@pytest.mark.requirement("CR-18")
def test_private_key_of_identity_is_clamped() -> None:
    assert StaticIdentity.from_private(b"\xff" * 32).private == b"\xf8" + b"\xff" * 30 + b"\x7f"


@pytest.mark.requirement("CR-02", "CR-03")
def test_transcript_hash_covers_responder_key_and_mixed_data() -> None:
    transcript = Transcript.start(BOB.public)
    assert transcript.hash == (first := blake2s(INITIAL_HASH + BOB.public).digest())
    transcript.mix_hash(b"data")
    assert transcript.hash == blake2s(first + b"data").digest()


@pytest.mark.requirement("CR-15", "CR-06")
def test_session_keys_are_derived_from_chaining_key_alone() -> None:
    alice, _, response = exchange()
    alice.consume_response(ALICE, response)
    secret = hmac.digest(alice.transcript.chaining_key, b"", blake2s)
    first = hmac.digest(secret, b"\1", blake2s)
    second = hmac.digest(secret, first + b"\2", blake2s)
    session = alice.begin_session(0)
    assert session.sending.seal(3, b"x") == ChaCha20Poly1305(first).encrypt(pack("<LQ", 0, 3), b"x", None)
    assert session.receiving.seal(3, b"x") == ChaCha20Poly1305(second).encrypt(pack("<LQ", 0, 3), b"x", None)


@pytest.mark.requirement("HS-03", "CR-15")
def test_handshake_gives_both_sides_same_keys() -> None:
    alice, bob, response = exchange()
    alice.consume_response(ALICE, response)
    ours, theirs = alice.begin_session(5), bob.begin_session(6)
    assert theirs.receiving.open(0, ours.sending.seal(0, b"to bob")) == b"to bob"
    assert ours.receiving.open(0, theirs.sending.seal(0, b"to alice")) == b"to alice"
    assert (ours.local_index, ours.remote_index, ours.birthdate, ours.i_am_the_initiator) == (1, 2, 5, True)
    assert (theirs.local_index, theirs.remote_index, theirs.birthdate, theirs.i_am_the_initiator) == (2, 1, 6, False)


@pytest.mark.requirement("HS-26", "HS-27")
def test_handshake_is_refused_without_identity() -> None:
    alice, _, response = exchange()
    message = initiation(alice)
    assert reason_of(lambda: open_initiation(None, message)) is DropReason.NO_IDENTITY
    assert reason_of(lambda: alice.consume_response(None, response)) is DropReason.NO_IDENTITY
    start = {"ephemeral": b"e" * 32, "timestamp": timestamp(WALL)}
    assert reason_of(lambda: alice.create_initiation(None, **start, sender_index=1)) is DropReason.NO_IDENTITY
    assert static_static(None, ALICE.public) is None


@pytest.mark.requirement("HS-34")
@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=bytes.hex)
def test_handshake_with_low_order_public_key_is_refused(point: bytes) -> None:
    handshake = Handshake(point, precomputed_static_static=static_static(ALICE, point))
    assert reason_of(lambda: initiation(handshake)) is DropReason.LOW_ORDER_POINT
    opened = open_initiation(BOB, initiation(Handshake(BOB.public, precomputed_static_static=ZERO_KEY)))
    assert reason_of(lambda: handshake.consume_initiation(opened, 0)) is DropReason.LOW_ORDER_POINT


@pytest.mark.requirement("HS-35", "CR-09")
@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=bytes.hex)
def test_low_order_ephemeral_is_refused(point: bytes) -> None:
    alice, bob, response = exchange()
    message = replace(initiation(handshake(ALICE, BOB)), ephemeral=point)
    assert reason_of(lambda: open_initiation(BOB, message)) is DropReason.LOW_ORDER_POINT
    forged = replace(response, ephemeral=point)
    assert reason_of(lambda: alice.consume_response(ALICE, forged)) is DropReason.LOW_ORDER_POINT
    bob.remote_ephemeral = point
    assert reason_of(lambda: bob.create_response(ephemeral=b"f" * 32, sender_index=3)) is DropReason.LOW_ORDER_POINT


@pytest.mark.requirement("HS-07", "CR-13")
def test_corrupt_initiation_leaves_handshake_unchanged() -> None:
    message, bob = initiation(handshake(ALICE, BOB)), handshake(BOB, ALICE)
    before = astuple(bob)
    for forged in (replace(message, encrypted_static=bytes(48)), replace(message, encrypted_timestamp=bytes(28))):
        with pytest.raises(Refused, match=DropReason.INVALID_TAG.value):
            consume(bob, forged)
    assert astuple(bob) == before
    consume(bob, message)


@pytest.mark.requirement("HS-08", "HS-09", "HS-11")
@pytest.mark.parametrize(("step", "is_taken"), [(-(2**24), False), (0, False), (2**24, True), (3600 * SECOND, True)])
def test_timestamps_must_increase(step: int, is_taken: bool) -> None:
    bob = handshake(BOB, ALICE)
    consume(bob, initiation(handshake(ALICE, BOB)))
    later = initiation(handshake(ALICE, BOB), wall=WALL + step)
    if is_taken:
        consume(bob, later, now=SECOND)
    else:
        assert reason_of(lambda: consume(bob, later, now=SECOND)) is DropReason.OLD_TIMESTAMP


@pytest.mark.requirement("HS-12", "HS-13")
def test_two_initiations_must_be_twenty_milliseconds_apart() -> None:
    bob = handshake(BOB, ALICE)
    consume(bob, initiation(handshake(ALICE, BOB)), now=7)
    second = initiation(handshake(ALICE, BOB), wall=WALL + SECOND)
    early = 7 + 20 * MILLISECOND - 1
    assert reason_of(lambda: consume(bob, second, now=early)) is DropReason.INITIATION_FLOOD
    consume(bob, second, now=early + 1)


@pytest.mark.requirement("HS-17", "HS-19", "HS-23")
@pytest.mark.parametrize("state", [state for state in HandshakeState if state is not HandshakeState.CREATED_INITIATION])
def test_response_is_refused_unless_initiation_is_outstanding(state: HandshakeState) -> None:
    alice, _, response = exchange()
    alice.state = state
    assert reason_of(lambda: alice.consume_response(ALICE, response)) is DropReason.UNEXPECTED_RESPONSE


@pytest.mark.requirement("HS-18", "HS-20")
def test_corrupt_response_leaves_handshake_unchanged() -> None:
    alice, _, response = exchange()
    before = astuple(alice)
    forged = replace(response, encrypted_nothing=bytes(16))
    assert reason_of(lambda: alice.consume_response(ALICE, forged)) is DropReason.INVALID_TAG
    assert astuple(alice) == before
    alice.consume_response(ALICE, response)


@pytest.mark.requirement("HS-21")
def test_preshared_key_can_be_set_before_response_is_created() -> None:
    alice, bob = handshake(ALICE, BOB), handshake(BOB, ALICE)
    consume(bob, initiation(alice))
    bob.preshared_key = b"p" * 32
    response = bob.create_response(ephemeral=b"f" * 32, sender_index=2)
    for other in (ZERO_KEY, b"q" * 32):
        alice.preshared_key = other
        assert reason_of(lambda: alice.consume_response(ALICE, response)) is DropReason.INVALID_TAG
    alice.preshared_key = b"p" * 32
    alice.consume_response(ALICE, response)
    assert alice.state is HandshakeState.CONSUMED_RESPONSE


@pytest.mark.requirement("HS-10")
def test_cleared_handshake_keeps_timestamp_and_consumption_time() -> None:
    _, bob, _ = exchange()
    latest = bob.latest_timestamp
    bob.clear()
    assert bob == replace(handshake(BOB, ALICE), latest_timestamp=latest, last_initiation_consumption=0)
    assert bob.latest_timestamp == latest != bytes(12)


def test_session_does_not_begin_before_its_handshake() -> None:
    with pytest.raises(AssertionError, match=r"^a session begins only after a response$"):
        handshake(ALICE, BOB).begin_session(0)


def keypair(number: int, *, initiator: bool, birthdate: int = 0) -> Keypair:
    finished = Handshake(b"")
    finished.local_index = number
    finished.state = HandshakeState.CONSUMED_RESPONSE if initiator else HandshakeState.CREATED_RESPONSE
    return finished.begin_session(birthdate)


def numbers(*keypairs: Keypair | None) -> list[int | None]:
    return [None if slot is None else slot.local_index for slot in keypairs]


@pytest.mark.requirement("DT-14", "DT-15", "DT-18")
@pytest.mark.parametrize(
    ("before", "initiator", "after", "destroyed"),
    [
        ((None, None, None), True, [None, 9, None], []),
        ((1, 2, None), True, [2, 9, None], [1]),
        ((None, 2, None), True, [2, 9, None], []),
        ((1, 2, 3), True, [3, 9, None], [1, 2]),
        ((None, None, 3), True, [3, 9, None], []),
        ((None, None, None), False, [None, None, 9], []),
        ((1, 2, None), False, [None, 2, 9], [1]),
        ((1, 2, 3), False, [None, 2, 9], [1, 3]),
    ],
)
def test_new_keypair_takes_its_slot(
    before: tuple[int | None, ...], initiator: bool, after: list[int | None], destroyed: list[int]
) -> None:
    slots = Keypairs(*(None if number is None else keypair(number, initiator=False) for number in before))
    assert numbers(*slots.add_new(keypair(9, initiator=initiator))) == destroyed
    assert numbers(slots.previous, slots.current, slots.next) == after


@pytest.mark.requirement("DT-16", "DT-19", "DT-33")
@pytest.mark.parametrize(
    ("before", "received", "after", "destroyed"),
    [
        ((1, 2, 3), 3, [2, 3, None], [1]),
        ((None, None, 3), 3, [None, 3, None], []),
        ((1, 2, 3), 2, [1, 2, 3], []),
        ((1, 2, 3), 1, [1, 2, 3], []),
    ],
)
def test_keypairs_move_only_when_next_keypair_receives_data(
    before: tuple[int | None, ...], received: int, after: list[int | None], destroyed: list[int]
) -> None:
    slots = Keypairs(*(None if number is None else keypair(number, initiator=False) for number in before))
    by_number = {slot.local_index: slot for slot in (slots.previous, slots.current, slots.next) if slot is not None}
    is_confirmed, gone = slots.received_with(by_number[received])
    assert (is_confirmed, numbers(*gone)) == (received == 3, destroyed)
    assert numbers(slots.previous, slots.current, slots.next) == after


@pytest.mark.requirement("HS-29", "HS-30")
def test_sending_is_forbidden_on_current_and_next() -> None:
    slots = Keypairs(*(keypair(number, initiator=True) for number in (1, 2, 3)))
    slots.forbid_sending()
    assert [slot is not None and slot.is_valid_for_sending for slot in (slots.previous, slots.current, slots.next)] == [
        True,
        False,
        False,
    ]
    Keypairs().forbid_sending()
    assert numbers(*slots.clear()) == [1, 2, 3]
    assert slots.clear() == []


@pytest.mark.requirement("DT-20", "TM-31")
@pytest.mark.parametrize(("now", "has_expired"), [(1179, False), (1180, True)])
def test_keypair_expires_at_given_age(now: int, has_expired: bool) -> None:
    assert keypair(1, initiator=True, birthdate=1000).has_expired(180, now) is has_expired
