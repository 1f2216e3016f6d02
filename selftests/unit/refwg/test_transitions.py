"""Check refwg against every row of the tables in selftests/support/transitions.py."""

from __future__ import annotations

from copy import deepcopy
from inspect import isfunction
from typing import TYPE_CHECKING, Final

import pytest

from refwg import send
from refwg.errors import DropReason, Refused
from refwg.messages import REKEY_TIMEOUT_JITTER_MAX, SECOND, Data, MessageType, Response
from refwg.noise import Handshake, HandshakeState, StaticIdentity, open_initiation, static_static, timestamp
from refwg.timers import PeerTimers, Timer
from selftests.support.pair import Pair, private_key
from selftests.support.transitions import (
    DATA,
    EXPIRIES,
    HANDSHAKE,
    INITIATION,
    INTERVAL,
    JITTER,
    KEEPALIVE,
    NEW_HANDSHAKE,
    PERSISTENT,
    RETRANSMIT,
    SESSIONS,
    TIMERS,
    ZERO_KEYS,
    Event,
    Situation,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.noise import Keypair
    from selftests.support.pair import Side
    from selftests.support.transitions import Changes, Expiry

    Step = Callable[[Pair], None]

RESPONSE: Final = MessageType.RESPONSE


# Handshake.

A, B = (StaticIdentity.from_private(private_key(name)) for name in "AB")


class TwoHandshakes:
    """Both sides of a handshake. A's side is checked.

    Each method is one step of A, one second after the step before.
    """

    def __init__(self) -> None:
        self.a = Handshake(B.public, precomputed_static_static=static_static(A, B.public))
        self.b = Handshake(A.public, precomputed_static_static=static_static(B, A.public))
        self.response = Response(sender_index=2, receiver_index=1, ephemeral=bytes(32), encrypted_nothing=bytes(16))
        self.now = 0

    def step(self, name: str) -> None:
        self.now += SECOND
        getattr(self, name)()

    def create_initiation(self) -> None:
        stamp = timestamp(self.now)
        message = self.a.create_initiation(A, ephemeral=b"e" * 32, timestamp=stamp, sender_index=1)
        self.b.consume_initiation(open_initiation(B, message), self.now)
        self.response = self.b.create_response(ephemeral=b"f" * 32, sender_index=2)

    def consume_initiation(self) -> None:
        stamp = timestamp(self.now)
        message = self.b.create_initiation(B, ephemeral=b"g" * 32, timestamp=stamp, sender_index=2)
        self.a.consume_initiation(open_initiation(A, message), self.now)

    def create_response(self) -> None:
        self.a.create_response(ephemeral=b"h" * 32, sender_index=1)

    def consume_response(self) -> None:
        self.a.consume_response(A, self.response)

    def begin_session(self) -> None:
        self.a.begin_session(self.now)

    def clear(self) -> None:
        self.a.clear()


STEPS_INTO: Final[dict[HandshakeState, tuple[str, ...]]] = {
    HandshakeState.ZEROED: (),
    HandshakeState.CREATED_INITIATION: ("create_initiation",),
    HandshakeState.CONSUMED_INITIATION: ("consume_initiation",),
    HandshakeState.CREATED_RESPONSE: ("consume_initiation", "create_response"),
    HandshakeState.CONSUMED_RESPONSE: ("create_initiation", "consume_response"),
}


@pytest.mark.parametrize(("before", "step", "after"), HANDSHAKE)
def test_each_step_changes_handshake_state_as_in_driver(
    before: HandshakeState, step: str, after: HandshakeState | None
) -> None:
    handshakes = TwoHandshakes()
    for name in STEPS_INTO[before]:
        handshakes.step(name)
    assert handshakes.a.state is before
    if after is None:
        with pytest.raises(Refused) as refusal:
            handshakes.step(step)
        assert refusal.value.reason is DropReason.UNEXPECTED_RESPONSE
    else:
        handshakes.step(step)
    assert handshakes.a.state is (after or before)


def test_handshake_table_names_every_method() -> None:
    methods = {name for name, value in vars(Handshake).items() if isfunction(value) and not name.startswith("_")}
    assert {step for _, step, _ in HANDSHAKE} == methods


def shake_hands(pair: Pair, initiator: Side) -> None:
    """Complete a handshake that `initiator` starts. The wire drops B's data, so B never confirms a session to A."""
    pair.now += SECOND
    initiator.peer.last_sent_handshake = None
    pair.carry_out(initiator, send.handshake_initiation(initiator.peer, pair.now))
    pair.settle()


def a_initiates(pair: Pair) -> None:
    shake_hands(pair, pair.a)


def b_initiates(pair: Pair) -> None:
    shake_hands(pair, pair.b)


def without_confirmation() -> Pair:
    pair = Pair()
    pair.wire.filter = lambda sent: (sent.type, sent.sender) != (DATA, "B")
    return pair


def from_b(pair: Pair, keypair: Keypair | None, plaintext: bytes) -> None:
    """Send data from B on one of the sessions; `keypair` is A's half of it."""
    assert keypair is not None
    (other,) = (
        keypair_of_b
        for keypair_of_b in (pair.b.peer.keypairs.previous, pair.b.peer.keypairs.current, pair.b.peer.keypairs.next)
        if keypair_of_b is not None and keypair_of_b.remote_index == keypair.local_index
    )
    counter, other.sending_counter = other.sending_counter, other.sending_counter + 1
    message = Data(
        receiver_index=keypair.local_index, counter=counter, ciphertext=other.sending.seal(counter, plaintext)
    )
    pair.inject(pair.a, message.to_bytes())


def slots(pair: Pair) -> list[Keypair | None]:
    keypairs = pair.a.peer.keypairs
    return [keypairs.previous, keypairs.current, keypairs.next]


# Sessions.

BEFORE: Final[dict[str, tuple[Step, ...]]] = {
    "- - -": (),
    "- c -": (a_initiates,),
    "p c -": (a_initiates, a_initiates),
    "- - n": (b_initiates,),
    "- c n": (a_initiates, b_initiates),
}


def on(slot: int) -> Step:
    return lambda pair: from_b(pair, slots(pair)[slot], b"")


def forged_on_next(pair: Pair) -> None:
    keypair = pair.a.peer.keypairs.next
    assert keypair is not None
    pair.inject(pair.a, Data(receiver_index=keypair.local_index, counter=0, ciphertext=bytes(16)).to_bytes())


def link_down(pair: Pair) -> None:
    pair.a.device.down(pair.now)


def wait_540_seconds(pair: Pair) -> None:
    pair.run(540 * SECOND)


def sleep(pair: Pair) -> None:
    pair.a.device.clear_keys(pair.now)


def new_private_key(pair: Pair) -> None:
    pair.a.device.set_private_key(private_key("another"), pair.now)


IN_EVERY_TABLE: Final[dict[Event, Step]] = {
    Event.KEEPALIVE_RECEIVED: on(1),
    Event.RECEIVED_ON_PREVIOUS: on(0),
    Event.RECEIVED_ON_NEXT: on(2),
    Event.FORGED_ON_NEXT: forged_on_next,
    Event.LINK_DOWN: link_down,
    Event.KEY_CHANGED: new_private_key,
    Event.SLEPT: sleep,
}
TO_SESSIONS: Final[dict[Event, Step]] = IN_EVERY_TABLE | {
    Event.RESPONSE_RECEIVED: a_initiates,
    Event.INITIATION_ANSWERED: b_initiates,
    Event.TOO_OLD: wait_540_seconds,
}


@pytest.mark.requirement("DT-14", "DT-15", "DT-18")
@pytest.mark.parametrize(("before", "event", "after"), SESSIONS)
def test_each_event_moves_keypairs_as_in_driver(before: str, event: Event, after: str) -> None:
    pair = without_confirmation()
    for step in BEFORE[before]:
        step(pair)
    named = {name: slot for name, slot in zip(before.split(), slots(pair), strict=True) if slot is not None}
    assert [*named] == [name for name in before.split() if name != "-"]
    TO_SESSIONS[event](pair)
    for name, slot in zip(after.split(), slots(pair), strict=True):
        if name == "new":
            assert slot not in {None, *named.values()}
        else:
            assert slot is named.get(name.removeprefix("x"))
        assert slot is None or slot.is_valid_for_sending is not name.startswith("x")
    alive = {slot.local_index for slot in slots(pair) if slot is not None}
    indices = pair.a.peer.shared.indices
    assert all((indices.lookup(old.local_index) is not None) is (old.local_index in alive) for old in named.values())


# Timers: what an event does to each.


def set_all(pair: Pair) -> None:
    timers, now = pair.a.peer.timers, pair.now
    timers.persistent_keepalive_interval = INTERVAL
    timers.session_derived(now)
    timers.handshake_initiated(now, int)
    timers.data_received(now)
    timers.data_sent(now, int)
    timers.any_authenticated_packet_traversal(now)


def session(pair: Pair) -> None:
    a_initiates(pair)
    set_all(pair)


def session_without_unanswered_data(pair: Pair) -> None:
    session(pair)
    pair.a.peer.timers.any_authenticated_packet_received(pair.now)


def session_without_data_to_confirm(pair: Pair) -> None:
    session(pair)
    pair.a.peer.timers.any_authenticated_packet_sent(pair.now)


def unconfirmed_session(pair: Pair) -> None:
    b_initiates(pair)
    set_all(pair)


def response_on_the_way(pair: Pair) -> None:
    pair.wire.filter = lambda sent: sent.type is INITIATION
    session(pair)


def link_that_is_down(pair: Pair) -> None:
    session(pair)
    link_down(pair)


def initiation_sent(pair: Pair) -> None:
    pair.a.peer.last_sent_handshake = None
    pair.carry_out(pair.a, send.handshake_initiation(pair.a.peer, pair.now))


def initiation_answered(pair: Pair) -> None:
    pair.wire.filter = lambda _: False
    pair.b.peer.last_sent_handshake = None
    pair.carry_out(pair.b, send.handshake_initiation(pair.b.peer, pair.now))
    pair.inject(pair.a, pair.sent(pair.b, INITIATION)[-1].datagram)


def response_consumed(pair: Pair) -> None:
    pair.inject(pair.a, pair.sent(pair.b, RESPONSE)[-1].datagram)


def data_sent(pair: Pair) -> None:
    pair.send(pair.a)


def keepalive_sent(pair: Pair) -> None:
    pair.carry_out(pair.a, send.keepalive(pair.a.peer, pair.now))


def data_received(pair: Pair) -> None:
    from_b(pair, pair.a.peer.keypairs.current, bytes(16))


def cookie_received(pair: Pair) -> None:
    keypair = pair.a.peer.keypairs.current
    assert keypair is not None
    message = pair.sent(pair.a, INITIATION)[-1].datagram
    checker = pair.b.peer.shared.cookie_checker
    reply = checker.create_reply(message, keypair.local_index, bytes(4), 1, pair.now)
    pair.inject(pair.a, reply.to_bytes())


def link_up(pair: Pair) -> None:
    pair.carry_out(pair.a, pair.a.device.up(pair.now))


BEFOREHAND: Final[dict[Situation, Step]] = {
    Situation.ALL_SET: session,
    Situation.ALL_BUT_NEW_HANDSHAKE: session_without_unanswered_data,
    Situation.ALL_BUT_KEEPALIVE: session_without_data_to_confirm,
    Situation.UNCONFIRMED: unconfirmed_session,
    Situation.RESPONSE_ON_THE_WAY: response_on_the_way,
    Situation.LINK_IS_DOWN: link_that_is_down,
}
TO_TIMERS: Final[dict[Event, Step]] = IN_EVERY_TABLE | {
    Event.INITIATION_SENT: initiation_sent,
    Event.INITIATION_ANSWERED: initiation_answered,
    Event.RESPONSE_RECEIVED: response_consumed,
    Event.COOKIE_RECEIVED: cookie_received,
    Event.DATA_SENT: data_sent,
    Event.KEEPALIVE_SENT: keepalive_sent,
    Event.DATA_RECEIVED: data_received,
    Event.LINK_UP: link_up,
}


@pytest.mark.requirement("TM-12", "TM-18", "TM-21")
@pytest.mark.parametrize(("before", "event", "changes"), TIMERS)
def test_each_event_sets_and_stops_timers_as_in_driver(before: Situation, event: Event, changes: Changes) -> None:
    pair = without_confirmation()
    BEFOREHAND[before](pair)
    timers = pair.a.peer.timers
    expected = {timer: timers.deadline_of(timer) for timer in Timer}
    pair.now += SECOND
    expected |= {timer: deadline if deadline is None else pair.now + deadline for timer, deadline in changes.items()}
    TO_TIMERS[event](pair)
    for timer, deadline in expected.items():
        actual = timers.deadline_of(timer)
        if actual is None or deadline is None or deadline < JITTER:
            assert actual == deadline, timer
        else:
            assert 0 <= actual - (deadline - JITTER) <= REKEY_TIMEOUT_JITTER_MAX, timer


# Timers: what happens when a timer runs out.

SET_ALONE: Final[dict[Timer, Callable[[PeerTimers, int], None]]] = {
    RETRANSMIT: lambda timers, now: timers.handshake_initiated(now, int),
    KEEPALIVE: PeerTimers.data_received,
    NEW_HANDSHAKE: lambda timers, now: timers.data_sent(now, int),
    ZERO_KEYS: PeerTimers.session_derived,
    PERSISTENT: PeerTimers.any_authenticated_packet_traversal,
}


@pytest.mark.requirement("TM-03", "TM-16", "RT-15")
@pytest.mark.parametrize("expiry", EXPIRIES, ids=lambda expiry: f"{expiry.timer.name}-{expiry.attempts}")
def test_each_timer_acts_as_in_driver_when_it_expires(expiry: Expiry) -> None:
    pair = without_confirmation()
    session(pair)
    peer, timers = pair.a.peer, pair.a.peer.timers
    peer.last_sent_handshake = None
    timers.handshake_attempts = expiry.attempts
    pair.forget()
    timers.stop()
    timers.start()
    SET_ALONE[expiry.timer](timers, pair.now)
    pair.a.device.peer_configured(peer, pair.now)
    deadline = timers.deadline_of(expiry.timer)
    assert deadline is not None
    pair.carry_out(pair.a, pair.a.device.expire_timers(deadline - 1))
    assert pair.log == []
    assert deepcopy(timers).expire(deadline) is expiry.action
    pair.now = deadline
    pair.carry_out(pair.a, pair.a.device.expire_timers(deadline))
    assert tuple(message.type for message in pair.log) == expiry.sent
    assert timers.handshake_attempts == expiry.attempts_after
    assert peer.endpoint is not None
    assert (peer.endpoint.source is not None) is expiry.is_source_kept
    assert (peer.keypairs.current is None) is (expiry.timer is ZERO_KEYS)
