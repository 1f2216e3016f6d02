"""Ask a device under test what it accepts, where it sends, and set its link down and up."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from harness import Data, Endpoint, Initiation, Key, Response, Unexpected, allowed_ips, poll_until

if TYPE_CHECKING:
    from harness import ScriptedPeer, Session, Target
    from harness.scripted.received import ReceivedData

PORT = 1
# Seconds. A program learns of a change of its link by netlink, and a machine may be busy.
NOTICED_WITHIN = 5.0
# Seconds after which a program that keeps its socket open while its link is down is taken for one that always does.
CLOSED_WITHIN = 2.0


def is_delivered(target: Target, peer: ScriptedPeer, session: Session, marker: Session | None = None) -> bool:
    """Send data on a session, then valid data on the marker's; return whether the first was delivered too.

    marker: default: the same session. Data of one peer is delivered in the order in which it came.
    """
    probe, end = (target.packet(peer, f"{word} {len(peer.sent)}".encode()) for word in ("probe", "end"))
    peer.send(session.data(probe))
    peer.send((marker or session).data(end))
    target.inside.expect(end, what="valid data that followed")
    return probe in target.inside.packets()


def is_inside(target: Target, packet: bytes) -> bool:
    """Return whether the device has delivered a packet so far."""
    return packet in target.inside.packets()


def established(target: Target, peer: ScriptedPeer) -> Session:
    """Make a handshake, and confirm it by data that the device has delivered; return the session.

    A keepalive would not do: the device may process the next initiation before it, and then the session is lost.
    """
    session = peer.handshake()
    packet = target.packet(peer, f"confirms {session.local_index:08x}".encode())
    peer.send(session.data(packet))
    target.inside.expect(packet, what="the first data on a session")
    return session


def next_data(target: Target, peer: ScriptedPeer) -> ReceivedData:
    """Let the device send a packet to a peer; return the message in which it came."""
    payload = f"packet {len(peer.exchange.lines)}".encode()
    target.send(peer, payload)
    return peer.expect(Data, where=lambda one: payload in one.plaintext)


def sending_session(target: Target, peer: ScriptedPeer) -> Session | None:
    """Let the device send a packet to a peer; return the session on which it came."""
    return next_data(target, peer).session


def begin(target: Target, peer: ScriptedPeer, payload: bytes = b"first") -> ReceivedData:
    """Let the device begin a handshake by a packet for the peer, and answer it; return the device's first data."""
    target.send(peer, payload)
    session = peer.send(Response(to=peer.expect(Initiation))).made()
    first = peer.expect(Data)
    assert first.session is session, "the device's first data is not on the session that its handshake has made"
    if payload not in first.plaintext:
        # Some programs confirm the session by a keepalive, and then send what was staged.
        peer.expect(Data, where=lambda one: payload in one.plaintext)
    return first


def configure_with_key(target: Target, peer: ScriptedPeer, preshared_key: bytes | None) -> None:
    """Add a peer, with its endpoint, to the device; a preshared key of None is left out, one of zero bytes is given."""
    target.interface.set_peer(
        peer.public_key,
        preshared_key=None if preshared_key is None else Key(preshared_key),
        allowed_ips=allowed_ips(f"{peer.inner4}/32", f"{peer.inner6}/128"),
        endpoint=Endpoint(peer.main.address, peer.main.port),
    )


def mac2(datagram: bytes, cookie: bytes) -> bytes:
    """Compute the mac2 of a handshake message (5.4.4), without the code that the scripted peers use."""
    return hashlib.blake2s(datagram[:-16], digest_size=16, key=cookie).digest()


def set_down(target: Target) -> bool:
    """Set the link down, and wait until the device has closed its sockets; return whether it has."""
    target.node.set_link("wg0", up=False)
    return poll_until(lambda: PORT not in target.node.udp_ports(), bool, CLOSED_WITHIN, what="the port to be closed")


def set_up(target: Target) -> None:
    """Set the link up, and wait until the device answers an initiation."""
    target.node.set_link("wg0", up=True)
    assert handshake_soon(target.peer()), "the device answers no initiation after its link was set up"


def handshake_soon(peer: ScriptedPeer) -> Session | None:
    """Send initiations until one is answered by a response, for a device that notices late or asks for a cookie."""

    def answered() -> Session | None:
        try:
            return peer.handshake(within=0.2)
        except Unexpected:
            return None

    return poll_until(answered, bool, NOTICED_WITHIN, what="a response to an initiation")
