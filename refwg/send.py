"""Build datagrams: handshake messages, keepalives, and data with padding and counters.

Mirrors send.c of the driver; sections 5.4.6 and 6.2 of the paper. Every function returns `Transmit` effects and sends
nothing.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, TypeVar

from refwg import ip
from refwg.boundary import Transmit
from refwg.errors import Refused
from refwg.messages import (
    DATA_HEADER,
    HANDSHAKE_DSCP,
    KEY_LENGTH,
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    Initiation,
    MessageType,
    Response,
    padded_length,
)
from refwg.noise import timestamp
from refwg.peer import IndexEntry, StagedPacket

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.boundary import Endpoint
    from refwg.noise import Keypair
    from refwg.peer import Peer, Shared

MessageT = TypeVar("MessageT", Initiation, Response)

_UDP_HEADER_LENGTH: Final = 8
# The type word, then the receiver index (data) or the sender index (initiation, response).
_TYPE_AND_INDEX: Final = Struct("<L L")


def handshake_initiation(peer: Peer, now: int, *, is_retry: bool = False) -> list[Transmit[Peer]]:
    """Send an initiation, unless a handshake message was sent to the peer in the last five seconds.

    is_retry: the retransmission timer asks for it. Every other call starts the count of attempts again.
    """
    # 6.4: a new packet starts the count of attempts again (wg_packet_send_queued_handshake_initiation)
    if not is_retry:
        peer.timers.handshake_attempts = 0
    # 6.1: never more than one initiation in REKEY_TIMEOUT
    if not peer.may_initiate(now):
        return []
    peer.last_sent_handshake = now
    shared, random_bytes = peer.shared, peer.shared.environment.random_bytes
    message = _create(
        peer,
        now,
        lambda index: peer.handshake.create_initiation(
            shared.identity,
            ephemeral=random_bytes(KEY_LENGTH),
            timestamp=timestamp(shared.environment.wall_clock()),
            sender_index=index,
        ),
    )
    if message is None:
        return []
    # 5.4.4: mac1 always, mac2 if there is a fresh cookie
    datagram = peer.cookie.add_macs(message.to_bytes(), now)
    peer.timers.any_authenticated_packet_sent(now)
    peer.timers.handshake_initiated(now, shared.jitter)
    shared.note(now, "initiation", peer, attempt=peer.timers.handshake_attempts)
    return _to_peer(peer, datagram, HANDSHAKE_DSCP)


def handshake_response(peer: Peer, now: int) -> list[Transmit[Peer]]:
    """Send the response to an accepted initiation; its session waits in `next` for a first packet."""
    # wg_packet_send_handshake_response: a response also delays the next initiation by REKEY_TIMEOUT
    peer.last_sent_handshake = now
    random_bytes = peer.shared.environment.random_bytes
    message = _create(
        peer,
        now,
        lambda index: peer.handshake.create_response(ephemeral=random_bytes(KEY_LENGTH), sender_index=index),
    )
    if message is None:
        return []
    # 5.4.5: the keys are derived when the response is made, before it is sent
    datagram = peer.cookie.add_macs(message.to_bytes(), now)
    peer.begin_session(now)
    peer.timers.any_authenticated_packet_sent(now)
    peer.shared.note(now, "response", peer)
    return _to_peer(peer, datagram, HANDSHAKE_DSCP)


def cookie_reply(
    shared: Shared, message: bytes, sender_index: int, endpoint: Endpoint, now: int
) -> list[Transmit[Peer]]:
    """Reply to a handshake message with a cookie.

    The reply goes to the address that sent the message, from the one that received it. No peer and no timer changes,
    because the sender is not authenticated.
    """
    # 5.4.7: the receiver index is the sender index of the message
    reply = shared.cookie_checker.create_reply(message, sender_index, endpoint.address, endpoint.port, now)
    shared.note(now, "cookie reply", None, endpoint=endpoint)
    return [Transmit(reply.to_bytes(), endpoint, 0, None)]


def keepalive(peer: Peer, now: int) -> list[Transmit[Peer]]:
    """Send an empty packet; if packets are staged, send those instead."""
    # 6.5: a keepalive is a data message with an empty packet
    # wg_packet_send_keepalive: it is staged like data, so without a session it starts a handshake
    if not peer.staged:
        peer.staged.stage([StagedPacket(b"", 0)])
    return staged_packets(peer, now)


def staged_packets(peer: Peer, now: int) -> list[Transmit[Peer]]:
    """Send all staged packets on `current`; without a usable session keep them and send an initiation."""
    packets = peer.staged.take()
    if not packets:
        return []
    # 6.4: without a session the packets stay staged, and a handshake begins
    keypair = peer.keypairs.current
    if keypair is None or not _can_send(keypair, len(packets), now):
        peer.staged.restage(packets)
        return handshake_initiation(peer, now)
    # 5.4.6: consecutive counters, none is used twice
    first = keypair.sending_counter
    keypair.sending_counter += len(packets)
    peer.timers.any_authenticated_packet_sent(now)
    effects: list[Transmit[Peer]] = []
    for counter, staged in enumerate(packets, first):
        # wg_packet_send_staged_packets: only the ECN bits of the inner traffic class go into the outer header
        inner = staged.packet
        traffic_class = ip.encapsulated_ecn(inner) if inner else 0
        effects += _to_peer(peer, seal(keypair, counter, staged), traffic_class, carries_data=bool(inner))
    return effects + keep_key_fresh(peer, keypair, now)


def reserve_counters(peer: Peer, count: int, now: int) -> tuple[Keypair, int] | None:
    """Take counters for packets that the caller seals and sends together; returns the session and the first counter.

    None if they must go through `staged_packets` one by one: packets wait already, there is no session, or it has too
    few counters left. After sending, the caller calls `keep_key_fresh`.
    """
    keypair = peer.keypairs.current
    # 6.2: nothing beyond REJECT_AFTER_MESSAGES; one by one, those that still have a counter are sent
    if peer.staged or keypair is None or keypair.sending_counter + count > REJECT_AFTER_MESSAGES:
        return None
    if not _can_send(keypair, count, now):
        return None
    first = keypair.sending_counter
    keypair.sending_counter += count
    peer.timers.any_authenticated_packet_sent(now)
    return keypair, first


def seal(keypair: Keypair, counter: int, staged: StagedPacket) -> bytes:
    """Return the data message for a packet: header, then the padded and encrypted packet with its tag."""
    # 5.4.6: zeros up to a multiple of 16 bytes, but not beyond the MTU (calculate_skb_padding)
    plaintext = staged.packet.ljust(padded_length(len(staged.packet), staged.mtu), b"\0")
    header = DATA_HEADER.pack(MessageType.DATA, keypair.remote_index, counter)
    return header + keypair.sending.seal(counter, plaintext)


def is_own_datagram(packet: bytes, peer: Peer, listen_port: int) -> bool:
    """Return True if a packet for `peer` is our own datagram to the endpoint of the same peer: a routing loop.

    Addresses and ports are not enough: a host that we route for may use the same ports to reach the same host. So the
    payload must begin like a message that was made for this peer.
    """
    # 7.5: a route to the endpoint through the tunnel is a loop; since Linux 5.7 the driver has no such check
    if peer.endpoint is None or ip.destination(packet) != peer.endpoint.address:
        return False
    if ip.udp_ports(packet) != (listen_port, peer.endpoint.port):
        return False
    return _is_message_to(peer, ip.upper_layer(packet)[1][_UDP_HEADER_LENGTH:])


def _is_message_to(peer: Peer, datagram: bytes) -> bool:
    """Return True if a payload has the type and index of a message on one of the peer's sessions or handshakes."""
    # 5.4: the index after the type word is the receiver's in data, the sender's in an initiation or response
    if len(datagram) < _TYPE_AND_INDEX.size:
        return False
    kind, index = _TYPE_AND_INDEX.unpack_from(datagram)
    if kind == MessageType.DATA:
        sessions = (peer.keypairs.previous, peer.keypairs.current, peer.keypairs.next)
        return any(keypair is not None and keypair.remote_index == index for keypair in sessions)
    entry = peer.shared.indices.lookup(index)
    return kind in {MessageType.INITIATION, MessageType.RESPONSE} and entry is not None and entry.peer is peer


def _can_send(keypair: Keypair, packets: int, now: int) -> bool:
    # 6.2: no sending at REJECT_AFTER_TIME or beyond REJECT_AFTER_MESSAGES
    # wg_packet_send_staged_packets: a session with too few counters left for all packets becomes invalid
    if not keypair.is_valid_for_sending:
        return False
    if keypair.has_expired(REJECT_AFTER_TIME, now) or keypair.sending_counter + packets > REJECT_AFTER_MESSAGES:
        keypair.is_valid_for_sending = False
    return keypair.is_valid_for_sending


def keep_key_fresh(peer: Peer, keypair: Keypair, now: int) -> list[Transmit[Peer]]:
    """Send an initiation after data if the session is due for renewal.

    It is due after REKEY_AFTER_MESSAGES packets on either side, and after REKEY_AFTER_TIME on the initiator only.
    """
    # 6.2: only the initiator renews by age, so that both sides do not start at once (keep_key_fresh)
    is_worn = keypair.sending_counter > REKEY_AFTER_MESSAGES
    if is_worn or (keypair.i_am_the_initiator and keypair.has_expired(REKEY_AFTER_TIME, now)):
        return handshake_initiation(peer, now)
    return []


def _create(peer: Peer, now: int, create: Callable[[int], MessageT]) -> MessageT | None:
    """Create a handshake message with a new random index, and free the index of the handshake before it.

    create: takes the new index and returns the message, or raises Refused. Returns None if it raised.
    """
    # 5.4.2: a new random sender index for each message (wg_index_hashtable_insert)
    indices, old_index = peer.shared.indices, peer.handshake.local_index
    index = indices.insert(IndexEntry(peer), peer.shared.environment.random_bytes)
    try:
        message = create(index)
    except Refused as refusal:
        indices.remove(index)
        peer.shared.note(now, "handshake impossible", peer, reason=refusal.reason.name)
        return None
    if old_index is not None:
        indices.remove(old_index)
    _share_keys(peer)
    return message


def _share_keys(peer: Peer) -> None:
    shared, handshake = peer.shared, peer.handshake
    if shared.watcher is not None and shared.identity is not None and handshake.ephemeral_key is not None:
        shared.watcher.keys(
            shared.identity.private, peer.public_key, handshake.ephemeral_key.raw, handshake.preshared_key
        )


def _to_peer(peer: Peer, datagram: bytes, traffic_class: int, *, carries_data: bool = False) -> list[Transmit[Peer]]:
    """Address a datagram to a peer; nothing is sent if the peer has no endpoint.

    carries_data: True for transport data that is not a keepalive.
    """
    # wg_socket_send_skb_to_peer: without an endpoint the datagram is dropped
    if peer.endpoint is None:
        return []
    return [Transmit(datagram, peer.endpoint, traffic_class, peer, carries_data)]
