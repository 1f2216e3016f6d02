"""List what each event does to a peer's handshake, sessions and timers, as in the driver.

selftests/unit/refwg/test_transitions.py checks refwg against every row; `python -m ci.drawings` draws them. The peer is
always B; its state is that in A.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from refwg.messages import SECOND, MessageType
from refwg.noise import HandshakeState
from refwg.timers import Action, Timer

INTERVAL: Final = 25  # persistent keepalive, in seconds


class Event(Enum):
    """An event; its value is the text in the drawings."""

    INITIATION_SENT = "initiation sent"
    INITIATION_ANSWERED = "initiation answered"
    RESPONSE_RECEIVED = "response received"
    COOKIE_RECEIVED = "cookie reply received"
    DATA_SENT = "data sent"
    KEEPALIVE_SENT = "keepalive sent"
    DATA_RECEIVED = "data received"
    KEEPALIVE_RECEIVED = "keepalive received"
    RECEIVED_ON_PREVIOUS = "packet received on previous"
    RECEIVED_ON_NEXT = "packet received on next"
    FORGED_ON_NEXT = "forged packet on next"
    LINK_UP = "link up (interval set)"
    LINK_DOWN = "link down"
    KEY_CHANGED = "new private key"
    SLEPT = "machine slept"
    TOO_OLD = "540 s without a new session"


# Handshake: state before, method of refwg.noise.Handshake, state after. None: refused, the state does not change.

HANDSHAKE: Final[list[tuple[HandshakeState, str, HandshakeState | None]]] = [
    *((state, "create_initiation", HandshakeState.CREATED_INITIATION) for state in HandshakeState),
    *((state, "consume_initiation", HandshakeState.CONSUMED_INITIATION) for state in HandshakeState),
    (HandshakeState.CONSUMED_INITIATION, "create_response", HandshakeState.CREATED_RESPONSE),
    (HandshakeState.CREATED_INITIATION, "consume_response", HandshakeState.CONSUMED_RESPONSE),
    *((state, "consume_response", None) for state in HandshakeState if state is not HandshakeState.CREATED_INITIATION),
    (HandshakeState.CREATED_RESPONSE, "begin_session", HandshakeState.ZEROED),
    (HandshakeState.CONSUMED_RESPONSE, "begin_session", HandshakeState.ZEROED),
    *((state, "clear", HandshakeState.ZEROED) for state in HandshakeState),
]


# Sessions: the slots previous, current, next before and after an event. "-" is an empty slot, "new" a new session,
# "x" a session that must not send.

STATES: Final = ("- - -", "- c -", "p c -", "- - n", "- c n")
SESSIONS: Final[list[tuple[str, Event, str]]] = [
    ("- - -", Event.RESPONSE_RECEIVED, "- new -"),
    ("- c -", Event.RESPONSE_RECEIVED, "c new -"),
    ("p c -", Event.RESPONSE_RECEIVED, "c new -"),
    ("- - n", Event.RESPONSE_RECEIVED, "n new -"),
    ("- c n", Event.RESPONSE_RECEIVED, "n new -"),
    ("- - -", Event.INITIATION_ANSWERED, "- - new"),
    ("- c -", Event.INITIATION_ANSWERED, "- c new"),
    ("p c -", Event.INITIATION_ANSWERED, "- c new"),
    ("- - n", Event.INITIATION_ANSWERED, "- - new"),
    ("- c n", Event.INITIATION_ANSWERED, "- c new"),
    ("- - n", Event.RECEIVED_ON_NEXT, "- n -"),
    ("- c n", Event.RECEIVED_ON_NEXT, "c n -"),
    ("- c n", Event.FORGED_ON_NEXT, "- c n"),
    ("p c -", Event.RECEIVED_ON_PREVIOUS, "p c -"),
    ("- c n", Event.KEEPALIVE_RECEIVED, "- c n"),
    *((before, event, "- - -") for event in (Event.LINK_DOWN, Event.TOO_OLD, Event.SLEPT) for before in STATES),
    ("p c -", Event.KEY_CHANGED, "p xc -"),
    ("- c n", Event.KEY_CHANGED, "- xc xn"),
    ("- - n", Event.KEY_CHANGED, "- - xn"),
]


# Timers: what an event does to each. A timer that is not named keeps its deadline.

RETRANSMIT, KEEPALIVE, NEW_HANDSHAKE, ZERO_KEYS, PERSISTENT = Timer
STOPPED: Final = None
JITTER: Final = 10**15  # added to a deadline that has a random part


class Situation(Enum):
    """The state of A before the event."""

    ALL_SET = "all five timers were set a second ago"
    ALL_BUT_NEW_HANDSHAKE = "all were set, and a packet has come in since"
    ALL_BUT_KEEPALIVE = "all were set, and a packet has gone out since"
    UNCONFIRMED = "all were set; the session is in slot next"
    RESPONSE_ON_THE_WAY = "all were set; the response to A's initiation has not arrived"
    LINK_IS_DOWN = "the link is down, and no timer is set"


Changes = dict[Timer, int | None]
SENT: Final[Changes] = {KEEPALIVE: STOPPED, PERSISTENT: INTERVAL * SECOND}
RECEIVED: Final[Changes] = {NEW_HANDSHAKE: STOPPED, PERSISTENT: INTERVAL * SECOND}
NEW_SESSION: Final[Changes] = {ZERO_KEYS: 540 * SECOND}
COMPLETE: Final[Changes] = {RETRANSMIT: STOPPED}
TIMERS: Final[list[tuple[Situation, Event, Changes]]] = [
    (Situation.ALL_SET, Event.INITIATION_SENT, SENT | {RETRANSMIT: 5 * SECOND + JITTER}),
    (Situation.ALL_SET, Event.INITIATION_ANSWERED, RECEIVED | SENT | NEW_SESSION),
    (Situation.RESPONSE_ON_THE_WAY, Event.RESPONSE_RECEIVED, RECEIVED | SENT | NEW_SESSION | COMPLETE),
    (Situation.UNCONFIRMED, Event.RECEIVED_ON_NEXT, RECEIVED | COMPLETE),
    (Situation.ALL_SET, Event.DATA_SENT, SENT),
    (Situation.ALL_BUT_NEW_HANDSHAKE, Event.DATA_SENT, SENT | {NEW_HANDSHAKE: 15 * SECOND + JITTER}),
    (Situation.ALL_SET, Event.KEEPALIVE_SENT, SENT),
    (Situation.ALL_BUT_NEW_HANDSHAKE, Event.KEEPALIVE_SENT, SENT),
    (Situation.ALL_SET, Event.DATA_RECEIVED, RECEIVED),
    (Situation.ALL_BUT_KEEPALIVE, Event.DATA_RECEIVED, RECEIVED | {KEEPALIVE: 10 * SECOND}),
    (Situation.ALL_SET, Event.KEEPALIVE_RECEIVED, RECEIVED),
    (Situation.ALL_BUT_KEEPALIVE, Event.KEEPALIVE_RECEIVED, RECEIVED),
    (Situation.UNCONFIRMED, Event.FORGED_ON_NEXT, {}),
    (Situation.ALL_SET, Event.COOKIE_RECEIVED, {}),
    (Situation.ALL_SET, Event.KEY_CHANGED, {}),
    (Situation.ALL_SET, Event.SLEPT, {ZERO_KEYS: STOPPED}),
    (Situation.ALL_SET, Event.LINK_DOWN, dict.fromkeys(Timer, STOPPED)),
    (Situation.LINK_IS_DOWN, Event.LINK_UP, {RETRANSMIT: 5 * SECOND + JITTER, PERSISTENT: INTERVAL * SECOND}),
]


# Timers: what happens when a timer runs out.


class Expiry(NamedTuple):
    """A timer that runs out after some handshake attempts, and what follows."""

    timer: Timer
    attempts: int
    action: Action
    sent: tuple[MessageType, ...]
    attempts_after: int
    is_source_kept: bool


INITIATION, DATA = MessageType.INITIATION, MessageType.DATA
EXPIRIES: Final = (
    Expiry(RETRANSMIT, 0, Action.RETRY_HANDSHAKE, (INITIATION,), 1, is_source_kept=False),
    Expiry(RETRANSMIT, 18, Action.RETRY_HANDSHAKE, (INITIATION,), 19, is_source_kept=False),
    Expiry(RETRANSMIT, 19, Action.GIVE_UP, (), 19, is_source_kept=True),
    Expiry(KEEPALIVE, 7, Action.SEND_KEEPALIVE, (DATA,), 7, is_source_kept=True),
    Expiry(NEW_HANDSHAKE, 7, Action.NEW_HANDSHAKE, (INITIATION,), 0, is_source_kept=False),
    Expiry(ZERO_KEYS, 7, Action.ZERO_KEY_MATERIAL, (), 7, is_source_kept=True),
    Expiry(PERSISTENT, 7, Action.SEND_PERSISTENT_KEEPALIVE, (DATA,), 7, is_source_kept=True),
)
