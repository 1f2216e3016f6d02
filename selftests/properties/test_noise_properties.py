"""Check the handshake against noiseprotocol, and its messages with any bit flipped."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from noise.connection import Keypair as NoiseKeypair
from noise.connection import NoiseConnection

from refwg.crypto import Aead
from refwg.errors import DropReason, Refused
from refwg.messages import INITIATION_SPACING, MILLISECOND, SECOND, Initiation, Response
from refwg.noise import (
    CONSTRUCTION,
    IDENTIFIER,
    Handshake,
    Keypair,
    Keypairs,
    StaticIdentity,
    open_initiation,
    static_static,
    timestamp,
)
from selftests.support.strategies import exactly, flip, indices, keys
from selftests.vectors import witness

if TYPE_CHECKING:
    from collections.abc import Callable

M = TypeVar("M", Initiation, Response)

# noiseprotocol warns of ephemerals that are set from outside, which only tests may do.
pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")

# A handshake takes eight Diffie-Hellman operations on each side.
slow = settings(max_examples=30)
# Wall-clock times up to the year 2106.
wall_clocks = st.integers(0, 2**32 * SECOND)
# The step of a timestamp in nanoseconds (CR-12): the driver clears the last 24 bits.
WHITENED: Final = 2**24


@dataclass(frozen=True)
class Setting:
    """All inputs of one handshake."""

    initiator: StaticIdentity
    responder: StaticIdentity
    initiator_ephemeral: bytes
    responder_ephemeral: bytes
    preshared_key: bytes
    initiator_index: int
    responder_index: int
    timestamp: bytes

    def initiator_handshake(self) -> Handshake:
        secret = static_static(self.initiator, self.responder.public)
        return Handshake(self.responder.public, self.preshared_key, secret)

    def responder_handshake(self) -> Handshake:
        secret = static_static(self.responder, self.initiator.public)
        return Handshake(self.initiator.public, self.preshared_key, secret)

    def initiate(self, handshake: Handshake) -> Initiation:
        return handshake.create_initiation(
            self.initiator,
            ephemeral=self.initiator_ephemeral,
            timestamp=self.timestamp,
            sender_index=self.initiator_index,
        )

    def consume(self, handshake: Handshake, message: Initiation) -> None:
        opened = open_initiation(self.responder, message)
        assert opened.remote_static == self.initiator.public
        handshake.consume_initiation(opened, 0)

    def respond(self, handshake: Handshake) -> Response:
        return handshake.create_response(ephemeral=self.responder_ephemeral, sender_index=self.responder_index)

    def noise(self, static: StaticIdentity, ephemeral: bytes) -> Any:
        """One side, played by noiseprotocol; it has not started."""
        noise = NoiseConnection.from_name(CONSTRUCTION)
        noise.set_prologue(IDENTIFIER)
        noise.set_psks(self.preshared_key)
        noise.set_keypair_from_private_bytes(NoiseKeypair.STATIC, static.private)
        noise.set_keypair_from_private_bytes(NoiseKeypair.EPHEMERAL, ephemeral)
        return noise


identities = keys.map(StaticIdentity.from_private)
handshake_settings = st.builds(
    Setting,
    initiator=identities,
    responder=identities,
    initiator_ephemeral=keys,
    responder_ephemeral=keys,
    preshared_key=keys,
    initiator_index=indices,
    responder_index=indices,
    timestamp=exactly(12).filter(any),
)


def reason_of(action: Callable[[], object]) -> DropReason:
    with pytest.raises(Refused) as refusal:
        action()
    return refusal.value.reason


@slow
@pytest.mark.requirement("HS-03", "CR-15", "CR-17")
@given(handshake_settings, st.binary(max_size=40))
def test_handshake_and_session_are_those_of_noiseprotocol(setting: Setting, packet: bytes) -> None:
    initiator, responder = setting.initiator_handshake(), setting.responder_handshake()
    their_initiator = setting.noise(setting.initiator, setting.initiator_ephemeral)
    their_initiator.set_keypair_from_public_bytes(NoiseKeypair.REMOTE_STATIC, setting.responder.public)
    their_initiator.set_as_initiator()
    their_initiator.start_handshake()
    their_responder = setting.noise(setting.responder, setting.responder_ephemeral)
    their_responder.set_as_responder()
    their_responder.start_handshake()

    initiation = setting.initiate(initiator)
    written = initiation.ephemeral + initiation.encrypted_static + initiation.encrypted_timestamp
    assert written == their_initiator.write_message(setting.timestamp)
    assert their_responder.read_message(written) == setting.timestamp
    setting.consume(responder, initiation)
    response = setting.respond(responder)
    assert response.ephemeral + response.encrypted_nothing == their_responder.write_message()
    assert (response.sender_index, response.receiver_index) == (setting.responder_index, setting.initiator_index)

    initiator.consume_response(setting.initiator, response)
    ours, theirs = initiator.begin_session(0), responder.begin_session(0)
    assert (ours.local_index, ours.remote_index) == (setting.initiator_index, setting.responder_index)
    assert (theirs.local_index, theirs.remote_index) == (setting.responder_index, setting.initiator_index)
    assert their_responder.decrypt(ours.sending.seal(0, packet)) == theirs.receiving.open(
        0, ours.sending.seal(0, packet)
    )
    sealed = their_responder.encrypt(packet)
    assert (sealed, ours.receiving.open(0, sealed)) == (theirs.sending.seal(0, packet), packet)


def flipped(message: M, fields: tuple[str, ...], data: st.DataObject) -> M:
    """Change one bit of one of these fields."""
    name = data.draw(st.sampled_from(fields))
    value: bytes = getattr(message, name)
    changes: dict[str, Any] = {name: flip(value, data.draw(st.integers(0, 8 * len(value) - 1)))}
    return replace(message, **changes)


@slow
@pytest.mark.requirement("HS-07", "HS-08")
@given(handshake_settings, st.data())
def test_initiation_with_any_bit_flipped_leaves_no_trace(setting: Setting, data: st.DataObject) -> None:
    responder = setting.responder_handshake()
    genuine = setting.initiate(setting.initiator_handshake())
    forged = flipped(genuine, ("ephemeral", "encrypted_static", "encrypted_timestamp"), data)
    before = deepcopy(responder)
    assert reason_of(lambda: setting.consume(responder, forged)) is DropReason.INVALID_TAG
    assert responder == before
    setting.consume(responder, genuine)
    assert responder.latest_timestamp == setting.timestamp


@slow
@pytest.mark.requirement("HS-18")
@given(handshake_settings, st.data())
def test_response_with_any_bit_flipped_leaves_no_trace(setting: Setting, data: st.DataObject) -> None:
    initiator, responder = setting.initiator_handshake(), setting.responder_handshake()
    setting.consume(responder, setting.initiate(initiator))
    genuine = setting.respond(responder)
    forged = flipped(genuine, ("ephemeral", "encrypted_nothing"), data)
    before = deepcopy(initiator)
    assert reason_of(lambda: initiator.consume_response(setting.initiator, forged)) is DropReason.INVALID_TAG
    assert initiator == before
    initiator.consume_response(setting.initiator, genuine)
    assert responder.begin_session(0).receiving.open(0, initiator.begin_session(0).sending.seal(0, b"packet"))


@slow
@pytest.mark.requirement("HS-20")
@given(handshake_settings, st.integers(0, 255))
def test_preshared_keys_that_differ_in_one_bit_yield_no_session(setting: Setting, bit: int) -> None:
    initiator, responder = setting.initiator_handshake(), setting.responder_handshake()
    responder.preshared_key = flip(setting.preshared_key, bit)
    setting.consume(responder, setting.initiate(initiator))
    response = setting.respond(responder)
    assert reason_of(lambda: initiator.consume_response(setting.initiator, response)) is DropReason.INVALID_TAG


# Timestamps that fall back, repeat and advance, and pauses around the least spacing of initiations.
steps = st.integers(-1, 2)
pauses = st.sampled_from([0, INITIATION_SPACING - 1, INITIATION_SPACING, SECOND])


@settings(max_examples=60)
@pytest.mark.requirement("HS-08", "HS-12", "HS-13")
@given(handshake_settings, st.lists(st.tuples(steps, pauses), max_size=8))
def test_initiation_is_accepted_only_if_newer_and_20_ms_later(
    setting: Setting, initiations: list[tuple[int, int]]
) -> None:
    responder, number, now = setting.responder_handshake(), 10, 0
    accepted: list[tuple[int, int]] = []
    for step, pause in initiations:
        number, now = number + step, now + pause
        opening = replace(setting, timestamp=number.to_bytes(12), initiator_index=number)
        message = opening.initiate(setting.initiator_handshake())
        opened = open_initiation(setting.responder, message)
        is_newer = all(number > earlier for earlier, _ in accepted)
        is_later = all(now - time >= 20 * MILLISECOND for _, time in accepted)
        if is_newer and is_later:
            responder.consume_initiation(opened, now)
            accepted.append((number, now))
            continue
        before = deepcopy(responder)
        with pytest.raises(Refused) as refusal:
            responder.consume_initiation(opened, now)
        assert refusal.value.reason is (DropReason.INITIATION_FLOOD if is_newer else DropReason.OLD_TIMESTAMP)
        assert responder == before


@pytest.mark.requirement("CR-11", "CR-12")
@given(wall_clocks, wall_clocks)
def test_timestamp_is_tai64n_and_keeps_order(first: int, second: int) -> None:
    first, second = sorted((first, second))
    assert timestamp(first) == witness.tai64n(first)
    assert timestamp(first) <= timestamp(second)
    assert second - first < WHITENED or timestamp(first) < timestamp(second)


class KeypairsHoldEachSessionOnce(RuleBasedStateMachine):
    """Each session is in one slot or was returned as destroyed, once; `next` never sends."""

    @initialize()
    def begin(self) -> None:
        self.keypairs = Keypairs()
        self.added: list[Keypair] = []
        self.destroyed: list[Keypair] = []
        self.confirmed: list[Keypair] = []

    def slots(self) -> list[Keypair]:
        slots = (self.keypairs.previous, self.keypairs.current, self.keypairs.next)
        return [session for session in slots if session is not None]

    @rule(i_am_the_initiator=st.booleans())
    def add_new(self, i_am_the_initiator: bool) -> None:
        aead = Aead(bytes(32))
        session = Keypair(i_am_the_initiator, len(self.added), 0, aead, aead, birthdate=0)
        current = self.keypairs.current
        self.destroyed += self.keypairs.add_new(session)
        self.added.append(session)
        # HS-24: a responder sends nothing on a session before the initiator has.
        assert self.keypairs.current is (session if i_am_the_initiator else current)
        if i_am_the_initiator:
            self.confirmed.append(session)

    @rule(slot=st.sampled_from(["previous", "current", "next"]))
    def receive(self, slot: str) -> None:
        session = getattr(self.keypairs, slot)
        if session is None:
            return
        current = self.keypairs.current
        is_confirmed, destroyed = self.keypairs.received_with(session)
        self.destroyed += destroyed
        self.confirmed.append(session)
        assert is_confirmed is (slot == "next")
        assert self.keypairs.current is (session if slot == "next" else current)
        # The session used until now still receives packets in flight.
        assert slot != "next" or self.keypairs.previous is current

    @rule()
    def forbid_sending(self) -> None:
        self.keypairs.forbid_sending()
        slots = (self.keypairs.current, self.keypairs.next)
        assert not any(session.is_valid_for_sending for session in slots if session is not None)

    @precondition(lambda self: len(self.added) > 3)
    @rule()
    def clear(self) -> None:
        self.destroyed += self.keypairs.clear()
        assert self.slots() == []

    @invariant()
    def each_session_is_held_or_destroyed_once(self) -> None:
        sessions = [session.local_index for session in self.slots() + self.destroyed]
        assert sorted(sessions) == [session.local_index for session in self.added]

    @invariant()
    def data_goes_out_only_on_confirmed_sessions(self) -> None:
        assert self.keypairs.current is None or self.keypairs.current in self.confirmed


KeypairsHoldEachSessionOnce.TestCase.settings = settings(max_examples=30, stateful_step_count=15)
TestKeypairs = pytest.mark.requirement("HS-24", "HS-37")(KeypairsHoldEachSessionOnce.TestCase)
