"""Check and decrypt received datagrams; return packets, follow-ups or the reason to drop.

Mirrors receive.c of the driver; sections 5.3 and 5.4.6 of the paper. Nothing is sent from here: `Consumed` tells the
device what must follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from refwg import ip
from refwg.cookie import MacState
from refwg.errors import DropReason, NotAuthentic, Refused
from refwg.messages import (
    INITIATION_LENGTH,
    LAST_MINUTE_REKEY,
    MINIMUM_DATA_LENGTH,
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    RESPONSE_LENGTH,
    Initiation,
)
from refwg.noise import open_initiation

if TYPE_CHECKING:
    from refwg.boundary import Endpoint
    from refwg.messages import (
        CookieReply,
        Data,
        Response,
    )
    from refwg.noise import Keypair
    from refwg.peer import Peer, Shared


class FollowUp(Enum):
    """What must be sent because of what was received."""

    RESPONSE = "answer the initiation"
    CONFIRMATION = "use the new session at once, so that the responder may use it too"
    STAGED_PACKETS = "our new session is confirmed: send what was waiting for it"
    INITIATION = "the session gets old: ask for a new one"


@dataclass(frozen=True, slots=True)
class Consumed:
    """Something authentic was received from `peer`; packet: what to deliver; dropped: why there is nothing."""

    peer: Peer
    follow_up: FollowUp | None = None
    packet: bytes | None = None
    dropped: DropReason | None = None


@dataclass(frozen=True, slots=True)
class CookieRequired:
    """A handshake message came under load without a valid mac2: its sender gets a cookie."""

    sender_index: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nothing has changed, and nothing is sent; peer: whom the message named, if it got as far as that."""

    reason: DropReason
    peer: Peer | None = None


_REFUSED_MACS: Final = {
    MacState.INVALID_MAC: DropReason.INVALID_MAC1,
    MacState.VALID_MAC_WITH_COOKIE_BUT_RATELIMITED: DropReason.RATE_LIMITED,
}


def handshake_message(
    shared: Shared,
    message: Initiation | Response,
    datagram: bytes,
    endpoint: Endpoint,
    *,
    now: int,
    is_under_load: bool,
) -> Consumed | CookieRequired | Dropped:
    """Check the macs, cheapest first, then let the handshake go on."""
    mac_state = shared.cookie_checker.validate(
        datagram,
        endpoint.address,
        endpoint.port,
        now=now,
        allow=shared.ratelimiter.allow if is_under_load else None,
    )
    if mac_state in _REFUSED_MACS:
        return Dropped(_REFUSED_MACS[mac_state])
    if is_under_load and mac_state is MacState.VALID_MAC_BUT_NO_COOKIE:
        return CookieRequired(message.sender_index)
    try:
        if isinstance(message, Initiation):
            return _initiation(shared, message, endpoint, now)
        return _response(shared, message, endpoint, now)
    except Refused as refusal:
        return Dropped(refusal.reason)


def cookie_reply(shared: Shared, message: CookieReply, now: int) -> Consumed | Dropped:
    """Keep a cookie for the next handshake message; it changes neither endpoint nor timers nor counters."""
    entry = shared.indices.lookup(message.receiver_index)
    if entry is None:
        return Dropped(DropReason.UNKNOWN_INDEX)
    try:
        entry.peer.cookie.consume_reply(message, now)
    except Refused as refusal:
        return Dropped(refusal.reason, entry.peer)
    return Consumed(entry.peer)


def data(shared: Shared, message: Data, endpoint: Endpoint, outer_ecn: int, now: int) -> Consumed | Dropped:
    """Open a data message and see what is in it."""
    entry = shared.indices.lookup(message.receiver_index)
    if entry is None or entry.keypair is None:
        return Dropped(DropReason.UNKNOWN_INDEX)
    peer = entry.peer
    try:
        plaintext = open_data(entry.keypair, message, now)
    except Refused as refusal:
        return Dropped(refusal.reason, peer)
    follow_up = _authenticated(peer, entry.keypair, endpoint, now)
    if not plaintext:
        peer.count_received(MINIMUM_DATA_LENGTH)
        return Consumed(peer, follow_up)
    peer.timers.data_received(now)
    try:
        packet = inner_packet(shared, peer, plaintext, outer_ecn)
    except Refused as refusal:
        return Consumed(peer, follow_up, dropped=refusal.reason)
    peer.count_received(MINIMUM_DATA_LENGTH + len(plaintext))
    return Consumed(peer, follow_up, packet)


def open_data(keypair: Keypair, message: Data, now: int) -> bytes:
    """Decrypt, and only then remember the counter: a forged message must not move the window."""
    if keypair.has_expired(REJECT_AFTER_TIME, now) or keypair.receiving_counter.is_exhausted:
        raise Refused(DropReason.SESSION_EXPIRED)
    if not keypair.receiving_counter.is_fresh(message.counter):
        is_too_large = message.counter >= REJECT_AFTER_MESSAGES
        raise Refused(DropReason.COUNTER_LIMIT if is_too_large else DropReason.REPLAY)
    try:
        plaintext = keypair.receiving.open(message.counter, message.ciphertext)
    except NotAuthentic as error:
        raise Refused(DropReason.INVALID_TAG) from error
    keypair.receiving_counter.accept(message.counter)
    return plaintext


def inner_packet(shared: Shared, peer: Peer, plaintext: bytes, outer_ecn: int) -> bytes:
    """Take the packet out of its padding, if it is one that this peer may send."""
    version = ip.version(plaintext)
    if not version:
        raise Refused(DropReason.INNER_PROTOCOL)
    length = ip.claimed_length(plaintext)
    if length < ip.IPV4_HEADER_LENGTH or length > len(plaintext):
        raise Refused(DropReason.INNER_LENGTH)
    if not is_source_allowed(shared, peer, ip.source(plaintext)):
        raise Refused(DropReason.SOURCE_NOT_ALLOWED)
    return ip.decapsulate_ecn(plaintext[:length], outer_ecn)


def is_source_allowed(shared: Shared, peer: Peer, address: bytes) -> bool:
    """Whether the longest prefix that contains the address, of all peers, is one of this peer."""
    return shared.allowedips.lookup(address) is peer


def _initiation(shared: Shared, message: Initiation, endpoint: Endpoint, now: int) -> Consumed | Dropped:
    opened = open_initiation(shared.identity, message)
    peer = shared.peers.lookup(opened.remote_static)
    if peer is None:
        return Dropped(DropReason.UNKNOWN_PEER)
    try:
        peer.handshake.consume_initiation(opened, now)
    except Refused as refusal:
        return Dropped(refusal.reason, peer)
    peer.set_endpoint(endpoint, now)
    peer.count_received(INITIATION_LENGTH)
    peer.any_authenticated_packet_received(now)
    return Consumed(peer, FollowUp.RESPONSE)


def _response(shared: Shared, message: Response, endpoint: Endpoint, now: int) -> Consumed | Dropped:
    entry = shared.indices.lookup(message.receiver_index)
    if entry is None or entry.keypair is not None:
        return Dropped(DropReason.UNKNOWN_INDEX)
    peer = entry.peer
    try:
        peer.handshake.consume_response(shared.identity, message)
    except Refused as refusal:
        return Dropped(refusal.reason, peer)
    peer.set_endpoint(endpoint, now)
    peer.begin_session(now)
    peer.handshake_complete(now)
    peer.count_received(RESPONSE_LENGTH)
    peer.any_authenticated_packet_received(now)
    return Consumed(peer, FollowUp.CONFIRMATION)


def _authenticated(peer: Peer, keypair: Keypair, endpoint: Endpoint, now: int) -> FollowUp | None:
    """What every authentic data message does, whatever is in it."""
    follow_up = None
    peer.set_endpoint(endpoint, now)
    if peer.received_with(keypair):
        peer.handshake_complete(now)
        follow_up = FollowUp.STAGED_PACKETS
    elif _is_last_minute(peer, now):
        peer.timers.sent_lastminute_handshake = True
        follow_up = FollowUp.INITIATION
    peer.any_authenticated_packet_received(now)
    return follow_up


def _is_last_minute(peer: Peer, now: int) -> bool:
    """Who mostly receives has no other moment to notice that its session runs out; once per session is enough."""
    keypair = peer.keypairs.current
    return (
        not peer.timers.sent_lastminute_handshake
        and keypair is not None
        and keypair.is_valid_for_sending
        and keypair.i_am_the_initiator
        and keypair.has_expired(LAST_MINUTE_REKEY, now)
    )
