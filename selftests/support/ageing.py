"""Make sessions in both roles of a device under test, and judge when its messages come."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness import Data, Initiation, Response, let_pass, slack
from harness.scripted.received import ReceivedData, ReceivedInitiation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness import ScriptedPeer, Session, Target
    from harness.scripted.received import Received

SECOND = 1_000_000_000
ROLES = ("initiator", "responder")
REKEY_TIMEOUT = 5
MAX_JITTER = 1 / 3
# Seconds by which a stamp may be wrong. A timer is never early.
PRECISION = 0.01
# Seconds until a program has started its timers for what it has sent: wireguard-go does so after it has sent, and an
# answer that comes before that stops nothing.
TIMERS_STARTED = 1.0
# Seconds after which a program that reads its clock four times a second takes a message for a later one.
NEXT_TICK = 0.5


@dataclass(slots=True)
class Live:
    """A session of the device with a peer. role: of the device. since: just before its keys were derived, in ns."""

    role: str
    peer: ScriptedPeer
    session: Session
    since: int

    @property
    def age(self) -> float:
        """Its age in seconds."""
        return (time.time_ns() - self.since) / SECOND

    def let_age(self, seconds: float, why: str) -> None:
        """Let time pass until it is as old as this; it is an error of the test if it is older."""
        left = seconds - self.age
        assert left > 0, f"the test is late: the session is {self.age:.3f} s old, and it should be {seconds:g} s"
        let_pass(left, why)


def live_sessions(
    target: Target, roles: Iterable[str] = ROLES, *, persistent_keepalive: int | None = None
) -> list[Live]:
    """Make one session for each role, each with a peer of its own; none of their timers runs afterwards.

    persistent_keepalive: an interval in seconds, whose timer does run.
    """
    lives = [_begin(target, role, persistent_keepalive) for role in roles]
    let_pass(TIMERS_STARTED, "the device has started its timers")
    for live in lives:
        live.peer.send(live.session.keepalive())
    let_pass(NEXT_TICK, "what follows is later than the last message by any clock")
    return lives


def live_session(target: Target, role: str) -> Live:
    """Make one session, none of whose timers runs afterwards."""
    return live_sessions(target, [role])[0]


def _begin(target: Target, role: str, persistent_keepalive: int | None) -> Live:
    is_initiator = role == "initiator"
    peer = target.peer(endpoint=is_initiator, persistent_keepalive=persistent_keepalive)
    if not is_initiator:
        since = time.time_ns()
        return Live(role, peer, peer.connect(), since)
    target.send(peer, b"first")
    initiation = peer.expect(Initiation)
    since = time.time_ns()
    session = peer.send(Response(to=initiation)).made()
    # Some programs confirm the session by a keepalive, and then send what was staged.
    peer.expect(Data, where=lambda one: b"first" in one.plaintext)
    return Live(role, peer, session, since)


def device_sends(target: Target, peers: Sequence[ScriptedPeer], payload: bytes = b"unanswered") -> list[ReceivedData]:
    """Let the device send a packet to each of these peers; return the messages in which they came."""
    for peer in peers:
        target.send(peer, payload)
    return [peer.expect(Data, where=lambda one: payload in one.plaintext) for peer in peers]


def initiations(peer: ScriptedPeer, after: int = 0) -> list[ReceivedInitiation]:
    """Return the device's initiations to a peer that came after a time, without waiting."""
    return [one for one in peer.drain() if isinstance(one, ReceivedInitiation) and _is_later(one, after)]


def data(peer: ScriptedPeer, after: int = 0) -> list[ReceivedData]:
    """Return the device's data and keepalives to a peer that came after a time, without waiting."""
    return [one for one in peer.drain() if isinstance(one, ReceivedData) and _is_later(one, after)]


def keepalives(peer: ScriptedPeer, after: int = 0) -> list[ReceivedData]:
    """Return the device's keepalives to a peer that came after a time, without waiting."""
    return [one for one in data(peer, after) if one.is_keepalive]


def _is_later(one: Received, after: int) -> bool:
    return one.time > after and not one.wrong


def longest(seconds: float, jitter: float = 0.0) -> float:
    """Return the seconds after which a timer with this duration and jitter has certainly fired."""
    return seconds + jitter + slack(seconds + jitter)


# An initiation and its retry are at most this far apart, in seconds (TM-01).
LONGEST_RETRY = longest(REKEY_TIMEOUT, MAX_JITTER)


def wrong_delay(
    who: str, came: Sequence[Received], since: int, seconds: float, *, jitter: float = 0.0, what: str
) -> str:
    """Return what is wrong with the delay of the first message; "" if it came in time.

    since: the event, in ns of the wall clock. seconds, jitter: of the timer. what: `the keepalive came {} after data`.
    """
    expected = f"expected {seconds:g} to {longest(seconds, jitter):.2f} s"
    if not came:
        return f"{who}: {what.format('not at all')}, {expected}"
    delay = (came[0].time - since) / SECOND
    if seconds - PRECISION <= delay <= longest(seconds, jitter):
        return ""
    return f"{who}: {what.format(f'{delay:.3f} s')}, {expected}"


def must_be_right(faults: Iterable[str]) -> None:
    """Fail with all faults; empty ones are none."""
    found = [fault for fault in faults if fault]
    assert not found, "; ".join(found)
