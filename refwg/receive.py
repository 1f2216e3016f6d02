"""Check and decrypt received datagrams; return packets, follow-ups or the reason to drop.

Mirrors receive.c of the driver; sections 5.3 and 5.4.6 of the paper. This module sends nothing. It returns `Consumed`,
which names the message that the device must send next.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

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
    """What the device must send next, after the received message."""

    RESPONSE = "answer the initiation"
    CONFIRMATION = "send on the new session at once, so that the responder may use it too"
    STAGED_PACKETS = "the new session is confirmed: send the staged packets"
    INITIATION = "the session is nearly too old: send an initiation"


class Consumed(NamedTuple):
    """The message was authenticated and has changed the state of `peer`.

    packet: the inner packet to deliver. dropped: the reason if the inner packet must be dropped instead.
    """

    peer: Peer
    follow_up: FollowUp | None = None
    packet: bytes | None = None
    dropped: DropReason | None = None


class CookieRequired(NamedTuple):
    """The message was received under load without a valid mac2; its sender gets a cookie reply.

    sender_index: the index in the message, which becomes the receiver index of the reply.
    """

    sender_index: int


class Dropped(NamedTuple):
    """The message was dropped without side effects; peer: the peer that it belongs to, if known by then."""

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
    is_proven: bool = False,
) -> Consumed | CookieRequired | Dropped:
    """Check both macs, the cheap one first, then process the initiation or response.

    datagram: the bytes of `message`, which the macs cover. endpoint: the sender. is_proven: both macs were valid when
    the message arrived, and its token was taken. A Refused of the handshake is returned as Dropped.
    """
    if not is_proven:
        mac_state = check_macs(shared, datagram, endpoint, now=now, is_under_load=is_under_load)
        if isinstance(mac_state, Dropped):
            return mac_state
        # 5.4.7: valid mac1, invalid mac2, under load: a cookie reply
        if is_under_load and mac_state is MacState.VALID_MAC_BUT_NO_COOKIE:
            return CookieRequired(message.sender_index)
    try:
        if isinstance(message, Initiation):
            return _initiation(shared, message, endpoint, now)
        return _response(shared, message, endpoint, now)
    except Refused as refusal:
        return Dropped(refusal.reason)


def check_macs(
    shared: Shared, datagram: bytes, endpoint: Endpoint, *, now: int, is_under_load: bool
) -> MacState | Dropped:
    """Check mac1 and, under load, mac2 and the rate of the source; a message to be dropped without reply is Dropped."""
    # wg_receive_handshake_packet: mac2 and the rate limit are checked only under load
    mac_state = shared.cookie_checker.validate(
        datagram,
        endpoint.address,
        endpoint.port,
        now=now,
        allow=shared.ratelimiter.allow if is_under_load else None,
    )
    # 5.3: an invalid mac1 gets no reply; wg_cookie_validate_packet: neither does a source over its rate
    if mac_state in _REFUSED_MACS:
        return Dropped(_REFUSED_MACS[mac_state])
    return mac_state


def cookie_reply(shared: Shared, message: CookieReply, now: int) -> Consumed | Dropped:
    """Store a cookie for the next handshake message to this peer; endpoint, timers and counters stay as they are."""
    # wg_cookie_message_consume: the index of a handshake or of a session names the peer
    entry = shared.indices.lookup(message.receiver_index)
    if entry is None:
        return Dropped(DropReason.UNKNOWN_INDEX)
    # 5.4.7: the reply must be bound to the last mac1 that we sent to this peer
    try:
        entry.peer.cookie.consume_reply(message, now)
    except Refused as refusal:
        return Dropped(refusal.reason, entry.peer)
    return Consumed(entry.peer)


def data(shared: Shared, message: Data, endpoint: Endpoint, outer_ecn: int, now: int) -> Consumed | Dropped:
    """Decrypt a data message, update the session and the timers, and check the inner packet.

    endpoint: the sender, which becomes the peer's endpoint if the tag verifies. outer_ecn: the two ECN bits of the
    outer IP header.
    """
    # wg_packet_consume_data: the receiver index must name a session, not a handshake
    entry = shared.indices.lookup(message.receiver_index)
    if entry is None or entry.keypair is None:
        return Dropped(DropReason.UNKNOWN_INDEX)
    peer = entry.peer
    try:
        plaintext = open_data(entry.keypair, message, now)
    except Refused as refusal:
        return Dropped(refusal.reason, peer)
    # 3: endpoint, timers and slots change only now that the packet is authenticated
    follow_up = authenticated(peer, entry.keypair, endpoint, now)
    # 6.5: an empty packet is a keepalive, and needs no answer
    if not plaintext:
        peer.count_received(MINIMUM_DATA_LENGTH)
        return Consumed(peer, follow_up)
    # wg_packet_consume_data_done: timers are set even if the inner packet is dropped, but its bytes are not counted
    peer.timers.data_received(now)
    try:
        packet = inner_packet(shared, peer, plaintext, outer_ecn)
    except Refused as refusal:
        return Consumed(peer, follow_up, dropped=refusal.reason)
    peer.count_received(MINIMUM_DATA_LENGTH + len(plaintext))
    return Consumed(peer, follow_up, packet)


def open_data(keypair: Keypair, message: Data, now: int) -> bytes:
    """Return the plaintext of a data message with its padding; raises Refused if the message must be dropped.

    Only an authenticated message moves the replay window.
    """
    # 6.2: nothing is received on a session that is too old, or whose last counter was received (decrypt_packet)
    if keypair.has_expired(REJECT_AFTER_TIME, now) or keypair.receiving_counter.is_exhausted:
        raise Refused(DropReason.SESSION_EXPIRED)
    # 5.4.6: each counter is accepted once; checked before the tag, so that a replay costs no decryption
    if not keypair.receiving_counter.is_fresh(message.counter):
        is_too_large = message.counter >= REJECT_AFTER_MESSAGES
        raise Refused(DropReason.COUNTER_LIMIT if is_too_large else DropReason.REPLAY)
    # 5.4.6: the counter is the nonce, and there is no associated data
    try:
        plaintext = keypair.receiving.open(message.counter, message.ciphertext)
    except NotAuthentic as error:
        raise Refused(DropReason.INVALID_TAG) from error
    # 5.4.6: the window moves only after the tag verifies
    keypair.receiving_counter.accept(message.counter)
    return plaintext


def inner_packet(shared: Shared, peer: Peer, plaintext: bytes, outer_ecn: int) -> bytes:
    """Return the inner packet without its padding; raises Refused if this peer must not send it.

    outer_ecn: the two ECN bits of the outer IP header, which are combined with the inner ones (RFC 6040).
    """
    # 3: a plaintext that is not an IP packet is dropped
    length, source = ip.length_and_source(plaintext)
    if not source:
        raise Refused(DropReason.INNER_PROTOCOL)
    # 5.4.6: the inner header holds the length, padding follows; wg_packet_consume_data_done checks it
    if length < ip.IPV4_HEADER_LENGTH or length > len(plaintext):
        raise Refused(DropReason.INNER_LENGTH)
    # 3: the inner source address must belong to this peer (cryptokey routing)
    if not is_source_allowed(shared, peer, source):
        raise Refused(DropReason.SOURCE_NOT_ALLOWED)
    # RFC 6040: an outer header without ECN bits changes nothing
    return ip.decapsulate_ecn(plaintext[:length], outer_ecn) if outer_ecn else plaintext[:length]


def is_source_allowed(shared: Shared, peer: Peer, address: bytes) -> bool:
    """Return True if a lookup of the address, among the prefixes of all peers, finds this peer."""
    # wg_allowedips_lookup_src: the same table as for sending
    return shared.allowedips.lookup(address) is peer


def _initiation(shared: Shared, message: Initiation, endpoint: Endpoint, now: int) -> Consumed | Dropped:
    # 5.4.2: the static key inside must be that of a configured peer
    opened = open_initiation(shared.identity, message)
    peer = shared.peers.lookup(opened.remote_static)
    if peer is None:
        return Dropped(DropReason.UNKNOWN_PEER)
    try:
        peer.handshake.consume_initiation(opened, now)
    except Refused as refusal:
        return Dropped(refusal.reason, peer)
    # 2.1: the sender of an authenticated message becomes the endpoint
    peer.set_endpoint(endpoint, now)
    peer.count_received(INITIATION_LENGTH)
    peer.timers.any_authenticated_packet_received(now)
    return Consumed(peer, FollowUp.RESPONSE)


def _response(shared: Shared, message: Response, endpoint: Endpoint, now: int) -> Consumed | Dropped:
    # wg_noise_handshake_consume_response: the receiver index must name a handshake, not a session
    entry = shared.indices.lookup(message.receiver_index)
    if entry is None or entry.keypair is not None:
        return Dropped(DropReason.UNKNOWN_INDEX)
    peer = entry.peer
    try:
        peer.handshake.consume_response(shared.identity, message)
    except Refused as refusal:
        return Dropped(refusal.reason, peer)
    # 6.1: the session begins when the response is processed
    peer.set_endpoint(endpoint, now)
    peer.begin_session(now)
    peer.handshake_complete(now)
    peer.count_received(RESPONSE_LENGTH)
    peer.timers.any_authenticated_packet_received(now)
    # 5: the responder may send only after a first packet from the initiator
    return Consumed(peer, FollowUp.CONFIRMATION)


def authenticated(peer: Peer, keypair: Keypair, endpoint: Endpoint, now: int) -> FollowUp | None:
    """Update endpoint, slots and timers after an authenticated data packet, keepalives included."""
    follow_up = None
    # 2.1: the outer source address becomes the endpoint
    peer.set_endpoint(endpoint, now)
    # 6.3: the first packet on next completes the responder's handshake; one on current moves no session
    if keypair is not peer.keypairs.current and peer.received_with(keypair):
        peer.handshake_complete(now)
        follow_up = FollowUp.STAGED_PACKETS
    elif _is_last_minute(peer, now):
        peer.timers.sent_lastminute_handshake = True
        follow_up = FollowUp.INITIATION
    peer.timers.any_authenticated_packet_received(now)
    return follow_up


def _is_last_minute(peer: Peer, now: int) -> bool:
    """Return True if the initiator must renew its session from the receive path, once per session.

    Without this the session of an initiator that only receives would expire.
    """
    # 6.2: REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT, initiator only (keep_key_fresh)
    keypair = peer.keypairs.current
    return (
        not peer.timers.sent_lastminute_handshake
        and keypair is not None
        and keypair.is_valid_for_sending
        and keypair.i_am_the_initiator
        and keypair.has_expired(LAST_MINUTE_REKEY, now)
    )
