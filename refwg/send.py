"""Build datagrams: handshake messages, keepalives, and data with padding and counters.

Mirrors send.c of the driver; sections 5.4.6 and 6.2 of the paper. Every function returns what is to be transmitted.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, TypeVar

from refwg import ip
from refwg.boundary import Transmit
from refwg.errors import Refused
from refwg.messages import (
    HANDSHAKE_DSCP,
    KEY_LENGTH,
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    Data,
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
# Of data the receiver's index follows, of the first two messages the sender's.
_TYPE_AND_INDEX: Final = Struct("<L L")


def handshake_initiation(peer: Peer, now: int, *, is_retry: bool = False) -> list[Transmit[Peer]]:
    """Ask for a new session, but not more often than every five seconds, whoever wants it.

    A series of retries ends after twenty; anything but a retry starts a new one.
    """
    if not is_retry:
        peer.timers.handshake_attempts = 0
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
    datagram = peer.cookie.add_macs(message.to_bytes(), now)
    _any_authenticated_packet_sent(peer, now)
    peer.timers.handshake_initiated(now, shared.jitter)
    shared.note(now, "initiation", peer, attempt=peer.timers.handshake_attempts)
    return _to_peer(peer, datagram, HANDSHAKE_DSCP)


def handshake_response(peer: Peer, now: int) -> list[Transmit[Peer]]:
    """Answer the initiation that was consumed; the session may be used once something comes in on it."""
    peer.last_sent_handshake = now
    random_bytes = peer.shared.environment.random_bytes
    message = _create(
        peer,
        now,
        lambda index: peer.handshake.create_response(ephemeral=random_bytes(KEY_LENGTH), sender_index=index),
    )
    if message is None:
        return []
    datagram = peer.cookie.add_macs(message.to_bytes(), now)
    peer.begin_session(now)
    _any_authenticated_packet_sent(peer, now)
    peer.shared.note(now, "response", peer)
    return _to_peer(peer, datagram, HANDSHAKE_DSCP)


def cookie_reply(
    shared: Shared, message: bytes, sender_index: int, endpoint: Endpoint, now: int
) -> list[Transmit[Peer]]:
    """Answer a handshake message by a cookie; the reply uses the addresses of the message and concerns no peer."""
    reply = shared.cookie_checker.create_reply(message, sender_index, endpoint.address, endpoint.port, now)
    shared.note(now, "cookie reply", None, endpoint=endpoint)
    return [Transmit(reply.to_bytes(), endpoint, 0, None)]


def keepalive(peer: Peer, now: int) -> list[Transmit[Peer]]:
    """Send an empty packet, unless packets are waiting: those will do as well."""
    if not peer.staged:
        peer.staged.stage([StagedPacket(b"", 0)])
    return staged_packets(peer, now)


def staged_packets(peer: Peer, now: int) -> list[Transmit[Peer]]:
    """Send everything that is staged, or keep it and ask for a session if there is none to send it on."""
    packets = peer.staged.take()
    if not packets:
        return []
    keypair = peer.keypairs.current
    if keypair is None or not _can_send(keypair, len(packets), now):
        peer.staged.restage(packets)
        return handshake_initiation(peer, now)
    first = keypair.sending_counter
    keypair.sending_counter += len(packets)
    _any_authenticated_packet_sent(peer, now)
    effects: list[Transmit[Peer]] = []
    for counter, staged in enumerate(packets, first):
        inner = staged.packet
        traffic_class = ip.encapsulated_ecn(ip.ecn(inner)) if inner else 0
        effects += _to_peer(peer, seal(keypair, counter, staged), traffic_class, carries_data=bool(inner))
    return effects + _keep_key_fresh(peer, keypair, now)


def seal(keypair: Keypair, counter: int, staged: StagedPacket) -> bytes:
    """Make a data message of a packet."""
    length = len(staged.packet)
    plaintext = staged.packet + bytes(padded_length(length, staged.mtu) - length)
    header = Data.HEADER.pack(MessageType.DATA, keypair.remote_index, counter)
    return header + keypair.sending.seal(counter, plaintext)


def is_own_datagram(packet: bytes, peer: Peer, listen_port: int) -> bool:
    """Whether a packet for `peer` is a datagram of ours to the endpoint of the same peer, so that it would loop.

    Behind us others may use the same ports to speak to the same host: ours is only what we have made for this peer.
    """
    if peer.endpoint is None:
        return False
    addresses = ip.udp_addresses(packet)
    return (
        addresses is not None
        and addresses.source_port == listen_port
        and addresses.destination_port == peer.endpoint.port
        and addresses.destination == peer.endpoint.address
        and _is_message_to(peer, ip.upper_layer(packet)[1][_UDP_HEADER_LENGTH:])
    )


def _is_message_to(peer: Peer, datagram: bytes) -> bool:
    """Whether it begins like a message to the peer on one of its sessions, or of a handshake that it knows."""
    if len(datagram) < _TYPE_AND_INDEX.size:
        return False
    kind, index = _TYPE_AND_INDEX.unpack_from(datagram)
    if kind == MessageType.DATA:
        sessions = (peer.keypairs.previous, peer.keypairs.current, peer.keypairs.next)
        return any(keypair is not None and keypair.remote_index == index for keypair in sessions)
    entry = peer.shared.indices.lookup(index)
    return kind in {MessageType.INITIATION, MessageType.RESPONSE} and entry is not None and entry.peer is peer


def _can_send(keypair: Keypair, packets: int, now: int) -> bool:
    if not keypair.is_valid_for_sending:
        return False
    if keypair.has_expired(REJECT_AFTER_TIME, now) or keypair.sending_counter + packets > REJECT_AFTER_MESSAGES:
        keypair.is_valid_for_sending = False
    return keypair.is_valid_for_sending


def _keep_key_fresh(peer: Peer, keypair: Keypair, now: int) -> list[Transmit[Peer]]:
    """After sending: time for a new session? By count either side asks for it, by age only who began this one."""
    is_worn = keypair.sending_counter > REKEY_AFTER_MESSAGES
    if is_worn or (keypair.i_am_the_initiator and keypair.has_expired(REKEY_AFTER_TIME, now)):
        return handshake_initiation(peer, now)
    return []


def _create(peer: Peer, now: int, create: Callable[[int], MessageT]) -> MessageT | None:
    """Create a handshake message under a new index; the index of what was under way before is given free."""
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
    if shared.watcher is not None and shared.identity is not None:
        shared.watcher.keys(
            shared.identity.private, peer.public_key, handshake.ephemeral_private, handshake.preshared_key
        )


def _any_authenticated_packet_sent(peer: Peer, now: int) -> None:
    peer.timers.any_authenticated_packet_traversal(now)
    peer.timers.any_authenticated_packet_sent()


def _to_peer(peer: Peer, datagram: bytes, traffic_class: int, *, carries_data: bool = False) -> list[Transmit[Peer]]:
    """A peer without an endpoint gets nothing, however its timers fire."""
    if peer.endpoint is None:
        return []
    return [Transmit(datagram, peer.endpoint, traffic_class, peer, carries_data)]
