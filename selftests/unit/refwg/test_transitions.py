"""Every row of the driver's two tables: what an event does to the sessions of a peer, and what to its timers.

The peer looked at is always B, as A knows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from refwg import send
from refwg.messages import REKEY_TIMEOUT_JITTER_MAX, SECOND, Data, MessageType
from refwg.timers import PeerTimers, Timer
from selftests.support.pair import Pair, private_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.noise import Keypair
    from selftests.support.pair import Side

    Event = Callable[[Pair], None]

INITIATION, RESPONSE, DATA = MessageType.INITIATION, MessageType.RESPONSE, MessageType.DATA
INTERVAL: Final = 25  # of the persistent keepalive


def shake_hands(pair: Pair, initiator: Side) -> None:
    """A whole handshake; what would confirm it to A is lost."""
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
    """B says something on one of the sessions; `keypair` is A's half of it."""
    assert keypair is not None
    (other,) = (
        one
        for one in (pair.b.peer.keypairs.previous, pair.b.peer.keypairs.current, pair.b.peer.keypairs.next)
        if one is not None and one.remote_index == keypair.local_index
    )
    counter, other.sending_counter = other.sending_counter, other.sending_counter + 1
    message = Data(
        receiver_index=keypair.local_index, counter=counter, ciphertext=other.sending.seal(counter, plaintext)
    )
    pair.inject(pair.a, message.to_bytes())


def slots(pair: Pair) -> list[Keypair | None]:
    keypairs = pair.a.peer.keypairs
    return [keypairs.previous, keypairs.current, keypairs.next]


# Sessions. Before and after: previous, current, next; "new" is one that was not there, "x" one that must not send.

BEFORE: Final[dict[str, tuple[Event, ...]]] = {
    "- - -": (),
    "- c -": (a_initiates,),
    "p c -": (a_initiates, a_initiates),
    "- - n": (b_initiates,),
    "- c n": (a_initiates, b_initiates),
}


def on(slot: int) -> Event:
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
    pair.a.device.forget_keys(pair.now)


def new_private_key(pair: Pair) -> None:
    pair.a.device.set_private_key(private_key("another"), pair.now)


def clone_of_the_machine(pair: Pair) -> None:
    pair.a.device.distrust_sessions(pair.now)


SESSIONS: Final[list[tuple[str, Event, str]]] = [
    ("- - -", a_initiates, "- new -"),
    ("- c -", a_initiates, "c new -"),
    ("p c -", a_initiates, "c new -"),
    ("- - n", a_initiates, "n new -"),
    ("- c n", a_initiates, "n new -"),
    ("- - -", b_initiates, "- - new"),
    ("- c -", b_initiates, "- c new"),
    ("p c -", b_initiates, "- c new"),
    ("- - n", b_initiates, "- - new"),
    ("- c n", b_initiates, "- c new"),
    ("- - n", on(2), "- n -"),
    ("- c n", on(2), "c n -"),
    ("- c n", forged_on_next, "- c n"),
    ("p c -", on(0), "p c -"),
    ("- c n", on(1), "- c n"),
    *((before, event, "- - -") for event in (link_down, wait_540_seconds, sleep) for before in BEFORE),
    *(
        (before, event, after)
        for event in (new_private_key, clone_of_the_machine)
        for before, after in (
            ("p c -", "p xc -"),
            ("- c n", "- xc xn"),
            ("- - n", "- - xn"),
        )
    ),
]


@pytest.mark.requirement("DT-14", "DT-15", "DT-18")
@pytest.mark.parametrize(("before", "event", "after"), SESSIONS)
def test_each_event_moves_keypairs_as_in_driver(before: str, event: Event, after: str) -> None:
    pair = without_confirmation()
    for step in BEFORE[before]:
        step(pair)
    named = {name: slot for name, slot in zip(before.split(), slots(pair), strict=True) if slot is not None}
    assert [*named] == [name for name in before.split() if name != "-"]
    event(pair)
    for name, slot in zip(after.split(), slots(pair), strict=True):
        if name == "new":
            assert slot not in {None, *named.values()}
        else:
            assert slot is named.get(name.removeprefix("x"))
        assert slot is None or slot.is_valid_for_sending is not name.startswith("x")
    alive = {slot.local_index for slot in slots(pair) if slot is not None}
    indices = pair.a.peer.shared.indices
    assert all((indices.lookup(old.local_index) is not None) is (old.local_index in alive) for old in named.values())


# Timers: what an event does to each, if all five were set a second before. What is not named keeps its deadline.

STOPPED: Final = None
JITTER: Final = 10**15  # stands in a deadline that has a random part
RETRANSMIT, KEEPALIVE, NEW_HANDSHAKE, ZERO_KEYS, PERSISTENT = Timer


def set_all(pair: Pair) -> None:
    timers, now = pair.a.peer.timers, pair.now
    timers.persistent_keepalive_interval = INTERVAL
    timers.session_derived(now)
    timers.handshake_initiated(now, 0)
    timers.data_received(now)
    timers.data_sent(now, int)
    timers.any_authenticated_packet_traversal(now)


def session(pair: Pair) -> None:
    a_initiates(pair)
    set_all(pair)


def session_without_unanswered_data(pair: Pair) -> None:
    session(pair)
    pair.a.peer.timers.any_authenticated_packet_received()


def session_without_data_to_confirm(pair: Pair) -> None:
    session(pair)
    pair.a.peer.timers.any_authenticated_packet_sent()


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


Changes = dict[Timer, int | None]
SENT: Final[Changes] = {KEEPALIVE: STOPPED, PERSISTENT: INTERVAL * SECOND}
RECEIVED: Final[Changes] = {NEW_HANDSHAKE: STOPPED, PERSISTENT: INTERVAL * SECOND}
NEW_SESSION: Final[Changes] = {ZERO_KEYS: 540 * SECOND}
COMPLETE: Final[Changes] = {RETRANSMIT: STOPPED}
TIMERS: Final[list[tuple[Event, Event, Changes]]] = [
    (session, initiation_sent, SENT | {RETRANSMIT: 5 * SECOND + JITTER}),
    (session, initiation_answered, RECEIVED | SENT | NEW_SESSION),
    (response_on_the_way, response_consumed, RECEIVED | SENT | NEW_SESSION | COMPLETE),
    (unconfirmed_session, on(2), RECEIVED | COMPLETE),
    (session, data_sent, SENT),
    (session_without_unanswered_data, data_sent, SENT | {NEW_HANDSHAKE: 15 * SECOND + JITTER}),
    (session, keepalive_sent, SENT),
    (session_without_unanswered_data, keepalive_sent, SENT),
    (session, data_received, RECEIVED),
    (session_without_data_to_confirm, data_received, RECEIVED | {KEEPALIVE: 10 * SECOND}),
    (session, on(1), RECEIVED),
    (session_without_data_to_confirm, on(1), RECEIVED),
    (unconfirmed_session, forged_on_next, {}),
    (session, cookie_received, {}),
    (session, new_private_key, {}),
    (session, clone_of_the_machine, {}),
    (session, sleep, {ZERO_KEYS: STOPPED}),
    (session, link_down, dict.fromkeys(Timer, STOPPED)),
    (link_that_is_down, link_up, {RETRANSMIT: 5 * SECOND + JITTER, PERSISTENT: INTERVAL * SECOND}),
]


@pytest.mark.requirement("TM-12", "TM-18", "TM-21")
@pytest.mark.parametrize(("before", "event", "changes"), TIMERS)
def test_each_event_sets_and_stops_timers_as_in_driver(before: Event, event: Event, changes: Changes) -> None:
    pair = without_confirmation()
    before(pair)
    timers = pair.a.peer.timers
    expected = {timer: timers.deadline_of(timer) for timer in Timer}
    pair.now += SECOND
    expected |= {timer: deadline if deadline is None else pair.now + deadline for timer, deadline in changes.items()}
    event(pair)
    for timer, deadline in expected.items():
        found = timers.deadline_of(timer)
        if found is None or deadline is None or deadline < JITTER:
            assert found == deadline, timer
        else:
            assert 0 <= found - (deadline - JITTER) <= REKEY_TIMEOUT_JITTER_MAX, timer


# Timers: what happens when one of them runs out. After: what was sent, attempts, whether the source is remembered.

SET_ALONE: Final[dict[Timer, Callable[[PeerTimers, int], None]]] = {
    RETRANSMIT: lambda timers, now: timers.handshake_initiated(now, 0),
    KEEPALIVE: PeerTimers.data_received,
    NEW_HANDSHAKE: lambda timers, now: timers.data_sent(now, int),
    ZERO_KEYS: PeerTimers.session_derived,
    PERSISTENT: PeerTimers.any_authenticated_packet_traversal,
}
FIRING: Final = [
    (RETRANSMIT, 0, [INITIATION], 1, False),
    (RETRANSMIT, 18, [INITIATION], 19, False),
    (RETRANSMIT, 19, [], 19, True),
    (KEEPALIVE, 7, [DATA], 7, True),
    (NEW_HANDSHAKE, 7, [INITIATION], 0, False),
    (ZERO_KEYS, 7, [], 7, True),
    (PERSISTENT, 7, [DATA], 7, True),
]


@pytest.mark.requirement("TM-03", "TM-16", "RT-15")
@pytest.mark.parametrize(("timer", "attempts", "sent", "attempts_after", "is_source_kept"), FIRING)
def test_each_timer_acts_as_in_driver_when_it_expires(
    timer: Timer, attempts: int, sent: list[MessageType], attempts_after: int, is_source_kept: bool
) -> None:
    pair = without_confirmation()
    session(pair)
    peer, timers = pair.a.peer, pair.a.peer.timers
    peer.last_sent_handshake = None
    timers.handshake_attempts = attempts
    pair.forget()
    timers.stop()
    timers.start()
    SET_ALONE[timer](timers, pair.now)
    pair.a.device.peer_configured(peer, pair.now)
    deadline = timers.deadline_of(timer)
    assert deadline is not None
    pair.carry_out(pair.a, pair.a.device.expire_timers(deadline - 1))
    assert pair.log == []
    pair.now = deadline
    pair.carry_out(pair.a, pair.a.device.expire_timers(deadline))
    assert [message.type for message in pair.log] == sent
    assert timers.handshake_attempts == attempts_after
    assert peer.endpoint is not None
    assert (peer.endpoint.source is not None) is is_source_kept
    assert (peer.keypairs.current is None) is (timer is ZERO_KEYS)
