"""Run a WireGuard device as a sans-I/O state machine: input and time in, effects out.

Mirrors device.c of the driver, and the functions of netlink.c that change a device. The caller of a device

- passes it datagrams (`receive_datagram`) and packets (`send_packet`), and carries out the returned effects;
- reports each `Transmit` as taken (`sent`) or refused (`send_failed`) by the network stack;
- calls `process_handshakes` while `has_waiting_handshakes` is True;
- calls `expire_timers` at `next_deadline`.

`now` is a time in nanoseconds that never decreases and includes the time asleep (CLOCK_BOOTTIME).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from refwg import ip, receive, send
from refwg.boundary import Deliver, Endpoint, Transmit, Unreachable
from refwg.cookie import CookieChecker, MacState
from refwg.crypto import is_zero
from refwg.errors import ConfigError, DropReason, MalformedMessage, Refused
from refwg.messages import (
    MAX_PEERS_PER_DEVICE,
    MINIMUM_DATA_LENGTH,
    REJECT_AFTER_TIME,
    CookieReply,
    Data,
    has_macs,
    parse,
    parse_with_macs,
)
from refwg.noise import StaticIdentity
from refwg.peer import Peer, Shared, StagedPacket
from refwg.queueing import HandshakeQueue, LastUnderLoad
from refwg.ratelimiter import RateLimiter
from refwg.receive import CookieRequired, Dropped, FollowUp
from refwg.timers import Action, TimerHeap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from refwg.allowedips import Prefix
    from refwg.boundary import Environment, Sockets, Watcher
    from refwg.noise import Keypair
    from refwg.peer import Statistics
    from refwg.receive import Consumed

Effect = Transmit[Peer] | Deliver[Peer] | Unreachable
# An initiation or response as it was received, or a cookie reply; its sender; whether mac2 was valid.
Queued = tuple[bytes | CookieReply, Endpoint, bool]

_FOLLOW_UPS: Final[dict[FollowUp, Callable[[Peer, int], list[Transmit[Peer]]]]] = {
    FollowUp.RESPONSE: send.handshake_response,
    FollowUp.CONFIRMATION: send.keepalive,
    FollowUp.STAGED_PACKETS: send.staged_packets,
    FollowUp.INITIATION: send.handshake_initiation,
}
# A firewall (EPERM; SELinux: ECONNREFUSED), a full queue, or a link that went down.
_LOST_AFTER_ROUTING: Final = frozenset({"EPERM", "ECONNREFUSED", "ENOBUFS", "ENOMEM", "EAGAIN", "ENETDOWN"})


@dataclass(frozen=True, slots=True)
class Reserved:
    """Counters for packets to one peer: its endpoint, its session, the first counter, the ECN bits of the datagrams."""

    peer: Peer
    endpoint: Endpoint
    keypair: Keypair
    first_counter: int
    ecn: int


class Device:
    """A WireGuard interface without its I/O.

    ratelimiter: shared by all devices of a network namespace. last_under_load: shared by all devices of the system.
    watcher: receives every event.
    """

    def __init__(
        self,
        environment: Environment,
        sockets: Sockets,
        *,
        now: int,
        ratelimiter: RateLimiter | None = None,
        last_under_load: LastUnderLoad | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self._shared = Shared(
            environment=environment,
            cookie_checker=CookieChecker(environment.random_bytes, now),
            ratelimiter=RateLimiter() if ratelimiter is None else ratelimiter,
            watcher=watcher,
        )
        self._sockets = sockets
        self._handshakes: HandshakeQueue[Queued] = HandshakeQueue(last_under_load or LastUnderLoad())
        self._timer_heap: TimerHeap[Peer] = TimerHeap()
        self.is_up = False
        self.listen_port = 0
        self.fwmark = 0

    # State.

    @property
    def identity(self) -> StaticIdentity | None:
        """The static keypair; None if no private key is configured."""
        return self._shared.identity

    @property
    def statistics(self) -> Statistics:
        """Counters of the whole device, removed peers included."""
        return self._shared.statistics

    @property
    def peers(self) -> Iterator[Peer]:
        """All peers, in the order in which they were added; peers may be removed while iterating."""
        return iter(self._shared.peers)

    def peer(self, public_key: bytes) -> Peer | None:
        """Return the peer with this public key of 32 bytes, None if there is none."""
        return self._shared.peers.lookup(public_key)

    def allowed_ips(self, peer: Peer) -> Iterator[Prefix]:
        """Yield the peer's prefixes in the order of their last insertion."""
        return self._shared.allowedips.prefixes_of(peer)

    # Packets and datagrams.

    def send_packet(self, packet: bytes, mtu: int, now: int) -> Sequence[Effect]:
        """Encrypt a packet from the interface, or stage it until there is a session.

        A packet without a peer or endpoint is dropped, and its sender gets an ICMP error. mtu: the MTU of the packet's
        route, in bytes; 0: no limit.
        """
        if not self.is_up:
            return self._refuse(now, DropReason.INTERFACE_DOWN)
        # wg_xmit: not IP, no peer and no endpoint in this order; only the last two get an ICMP error
        destination = ip.destination(packet)
        if not destination:
            return self._refuse(now, DropReason.NOT_IP)
        # 2: the peer is the owner of the longest prefix that contains the destination
        peer = self._shared.allowedips.lookup(destination)
        if peer is None:
            return self._refuse(now, DropReason.NO_PEER, packet)
        if peer.endpoint is None:
            return self._refuse(now, DropReason.NO_ENDPOINT, packet, peer)
        if peer.endpoint.address == destination and send.is_own_datagram(packet, peer, self.listen_port):
            return self._refuse(now, DropReason.ROUTING_LOOP, None, peer)
        pushed_out = peer.staged.stage((StagedPacket(packet, mtu),))
        if pushed_out:
            self._shared.drop(now, DropReason.QUEUE_OVERFLOW, peer, pushed_out)
        effects = send.staged_packets(peer, now)
        self._schedule(peer)
        return effects

    def receive_datagram(self, datagram: bytes, endpoint: Endpoint, ecn: int, now: int) -> Sequence[Effect]:
        """Process a data message, or queue a handshake message.

        endpoint: the sender, with the local address that received it. ecn: the two ECN bits of the outer IP header.
        """
        if not self.is_up:
            self._shared.drop(now, DropReason.INTERFACE_DOWN)
            return []
        if has_macs(datagram):
            self._admit(datagram, endpoint, now)
            return []
        # 5.1: no reply to anything that is not a message
        try:
            message = parse(datagram)
        except MalformedMessage:
            self._shared.drop(now, DropReason.MALFORMED)
            return []
        if isinstance(message, Data):
            return self._follow_up(receive.data(self._shared, message, endpoint, ecn, now), now)
        # Initiations and responses have macs.
        self._admit_cookie_reply(cast("CookieReply", message), endpoint, now)
        return []

    def _admit(self, datagram: bytes, endpoint: Endpoint, now: int) -> None:
        """Queue an initiation or response, unless its macs show already that nothing will come of it.

        The driver checks macs when a worker takes the message out of the queue (`wg_receive_handshake_packet`), and is
        fast enough for that. Here forged messages would fill the queue, and valid ones would find no place.
        """
        is_under_load = self._handshakes.is_under_load(now)
        mac_state = receive.check_macs(self._shared, datagram, endpoint, now=now, is_under_load=is_under_load)
        if isinstance(mac_state, Dropped):
            self._shared.drop(now, mac_state.reason)
            return
        # 5.3: mac2 proves that the sender receives at its address, so others cannot take its place
        self._queue((datagram, endpoint, mac_state is MacState.VALID_MAC_WITH_COOKIE), now)

    def _admit_cookie_reply(self, message: CookieReply, endpoint: Endpoint, now: int) -> None:
        """Queue a cookie reply that answers a message of ours: who cannot read our messages has to guess its index."""
        # wg_cookie_message_consume: the index of a handshake or of a session
        if self._shared.indices.lookup(message.receiver_index) is None:
            self._shared.drop(now, DropReason.UNKNOWN_INDEX)
            return
        self._queue((message, endpoint, True), now)

    def _queue(self, queued: Queued, now: int) -> None:
        # 7.2: handshake messages have a queue of their own, so that data need not wait for them
        if not self._handshakes.put(queued, is_proven=queued[2]):
            self._shared.drop(now, DropReason.HANDSHAKE_QUEUE_FULL)

    # Packets of one flow that an engine seals, sends, opens and delivers together.

    def reserve(self, packet: bytes, count: int, now: int) -> Reserved | None:
        """Take counters for packets of one flow from the interface; None: pass each to `send_packet`.

        packet: the first, or its headers. The device is up. The caller seals and sends the packets, and calls
        `sent_together`.
        """
        peer = self._shared.allowedips.lookup(ip.destination(packet))
        # A packet to the address of the endpoint may be our own datagram, and has to be looked at by itself.
        if peer is None or peer.endpoint is None or peer.endpoint.address == ip.destination(packet):
            return None
        taken = send.reserve_counters(peer, count, now)
        if taken is None:
            return None
        return Reserved(peer, peer.endpoint, *taken, ip.encapsulated_ecn(packet))

    def sent_together(self, reserved: Reserved, length: int, now: int) -> Sequence[Effect]:
        """Count messages that the network stack took, start timers, and renew the session if that is due.

        length: of all messages together, in bytes; 0: none was sent, or they were reported one by one.
        """
        peer = reserved.peer
        if length:
            peer.count_sent(length)
            peer.timers.data_sent(now, self._shared.jitter)
        effects = send.keep_key_fresh(peer, reserved.keypair, now)
        self._schedule(peer)
        return effects

    def session(self, index: int, now: int) -> tuple[Peer, Keypair] | None:
        """Return the session of a receiver index, with its peer; None if nothing may be received on it.

        The caller then passes each message to `receive_datagram`, which counts the reason.
        """
        entry = self._shared.indices.lookup(index)
        if not self.is_up or entry is None or entry.keypair is None:
            return None
        if entry.keypair.has_expired(REJECT_AFTER_TIME, now) or entry.keypair.receiving_counter.is_exhausted:
            return None
        return entry.peer, entry.keypair

    def received_together(
        self, peer: Peer, keypair: Keypair, endpoint: Endpoint, count: int, now: int
    ) -> Sequence[Effect]:
        """Update session and timers after authenticated messages of one session; returns what must be sent first.

        count: how many messages; none is a keepalive. `receive.data` does the same for one message.
        """
        follow_up = receive.authenticated(peer, keypair, endpoint, now)
        peer.timers.data_received(now)
        effects = [] if follow_up is None else _FOLLOW_UPS[follow_up](peer, now)
        if count > 1:
            peer.timers.any_authenticated_packet_received(now)
        # A second one while the timer runs asks for one more keepalive; a third changes nothing.
        for _ in range(min(2, count - 1)):
            peer.timers.data_received(now)
        self._schedule(peer)
        return effects

    def accept_packet(self, peer: Peer, plaintext: bytes, ecn: int, now: int) -> bytes | None:
        """Check the packet in an authenticated message and count it; None if it was dropped.

        plaintext: not empty. ecn: of the outer header. Timers are not changed: `received_together` has done that.
        """
        try:
            packet = receive.inner_packet(self._shared, peer, plaintext, ecn)
        except Refused as refusal:
            self._shared.drop(now, refusal.reason, peer)
            return None
        peer.count_received(MINIMUM_DATA_LENGTH + len(plaintext))
        return packet

    def is_source_allowed(self, peer: Peer, address: bytes) -> bool:
        """Return True if packets from this inner address may come from this peer."""
        return receive.is_source_allowed(self._shared, peer, address)

    @property
    def has_waiting_handshakes(self) -> bool:
        """True if handshake messages are queued, so that `process_handshakes` must be called now."""
        return len(self._handshakes) > 0

    def process_handshakes(self, now: int, limit: int | None = None) -> list[Effect]:
        """Process the queued handshake messages, at most `limit` of them (None: all)."""
        effects: list[Effect] = []
        while self._handshakes and (limit is None or limit > 0):
            effects += self._process_handshake(*self._handshakes.next_message(), now)
            self._handshakes.done()
            limit = None if limit is None else limit - 1
        return effects

    def sent(self, transmit: Transmit[Peer], now: int) -> None:
        """Count a datagram that the network stack took, and start the timer that waits for an answer."""
        peer = transmit.peer
        if peer is None:
            return
        peer.count_sent(len(transmit.datagram))
        # wg_packet_create_data_done: only after data that was sent, not after a keepalive
        if transmit.carries_data:
            peer.timers.data_sent(now, self._shared.jitter)
            self._schedule(peer)

    def drop(self, reason: DropReason, peer: Peer | None, now: int) -> None:
        """Count a packet that the caller could not send or deliver; peer: None if it is not known."""
        self._shared.drop(now, reason, peer)

    def send_failed(self, transmit: Transmit[Peer], now: int, error: str) -> None:
        """Count a datagram that was lost in this host; without a route for it, no timer waits for an answer.

        error: the name of the errno of sendmsg(2).
        """
        # send4, send6: they report a failed route lookup only, and nothing of what happens to the datagram after it
        if error in _LOST_AFTER_ROUTING:
            self.sent(transmit, now)
        self._shared.drop(now, DropReason.SEND_FAILED, transmit.peer)
        self._shared.note(now, "send failed", transmit.peer, error=error)

    def _process_handshake(
        self, datagram: bytes | CookieReply, endpoint: Endpoint, is_proven: bool, now: int
    ) -> list[Effect]:
        if isinstance(datagram, CookieReply):
            return self._follow_up(receive.cookie_reply(self._shared, datagram, now), now)
        outcome = receive.handshake_message(
            self._shared,
            parse_with_macs(datagram),
            datagram,
            endpoint,
            now=now,
            is_under_load=self._handshakes.is_under_load(now),
            is_proven=is_proven,
        )
        if isinstance(outcome, CookieRequired):
            self._shared.drop(now, DropReason.COOKIE_REQUIRED)
            return [*send.cookie_reply(self._shared, datagram, outcome.sender_index, endpoint, now)]
        return self._follow_up(outcome, now)

    def _follow_up(self, outcome: Consumed | Dropped, now: int) -> list[Effect]:
        """Turn the outcome of a received message into effects; what must be sent comes before what is delivered."""
        if isinstance(outcome, Dropped):
            self._shared.drop(now, outcome.reason, outcome.peer)
            return []
        peer, follow_up, packet, dropped = outcome
        effects: list[Effect] = []
        if follow_up is not None:
            effects += _FOLLOW_UPS[follow_up](peer, now)
        if dropped is not None:
            self._shared.drop(now, dropped, peer)
        if packet is not None:
            effects.append(Deliver(packet, peer))
        self._schedule(peer)
        return effects

    def _refuse(
        self, now: int, reason: DropReason, packet: bytes | None = None, peer: Peer | None = None
    ) -> list[Effect]:
        """Drop a packet from the interface; packet: given if its sender must get an ICMP error."""
        self._shared.drop(now, reason, peer)
        error = None if packet is None else ip.unreachable(packet)
        return [] if error is None else [Unreachable(error)]

    # Time.

    def next_deadline(self) -> int | None:
        """Return when `expire_timers` must be called, in nanoseconds; None: never.

        It may be early: `expire_timers` then returns nothing and sets a later deadline.
        """
        deadline, sweep = self._timer_heap.next_deadline(), self._shared.ratelimiter.next_sweep()
        if deadline is None or sweep is None:
            return sweep if deadline is None else deadline
        return min(deadline, sweep)

    def expire_timers(self, now: int) -> list[Effect]:
        """Carry out the actions of expired timers, and remove stale entries of the rate limiter."""
        effects: list[Effect] = []
        while (peer := self._timer_heap.pop_due(now)) is not None:
            while (action := peer.timers.expire(now)) is not None:
                effects += self._act(peer, action, now)
            # Whether or not a timer was set: the heap has no entry of this peer now, and others may still run.
            self._timer_heap.schedule(peer, peer.timers.next_deadline())
        self._shared.ratelimiter.sweep(now)
        return effects

    def _act(self, peer: Peer, action: Action, now: int) -> list[Transmit[Peer]]:
        self._shared.note(now, "timer", peer, action=action.name)
        # wg_expired_retransmit_handshake: after the last retry staged packets are dropped
        if action is Action.GIVE_UP:
            peer.purge_staged_packets(now)
            return []
        if action is Action.ZERO_KEY_MATERIAL:
            peer.clear_keys()
            return []
        if action in {Action.SEND_KEEPALIVE, Action.SEND_PERSISTENT_KEEPALIVE}:
            return send.keepalive(peer, now)
        # wg_expired_new_handshake: the source address may be why no answer arrives, so routing chooses again
        peer.clear_endpoint_source()
        return send.handshake_initiation(peer, now, is_retry=action is Action.RETRY_HANDSHAKE)

    def _schedule(self, peer: Peer) -> None:
        """Put the peer's next deadline into the heap; called at the end of every input that sets a peer's timers."""
        if not peer.timers.is_scheduled:
            peer.timers.is_scheduled = True
            self._timer_heap.schedule(peer, peer.timers.next_deadline())

    # Link state.

    def up(self, now: int) -> list[Effect]:
        """Open the sockets and start the timers; raises ConfigError if the listen port cannot be bound.

        Call it when the interface was set up. Returns staged packets, and a keepalive for each peer with an interval.
        """
        if self.is_up:
            return []
        self.listen_port = self._sockets.open(self.listen_port)
        self.is_up = True
        self._shared.note(now, "up", None, listen_port=self.listen_port)
        # wg_open: every peer sends its staged packets, and a keepalive if an interval is configured
        effects: list[Effect] = []
        for peer in self._shared.peers:
            peer.timers.start()
            effects += self._wake(peer, now, wants_keepalive=peer.timers.persistent_keepalive_interval > 0)
        return effects

    def down(self, now: int) -> None:
        """Close the sockets, erase sessions and timers, and drop staged packets; the configuration stays.

        Call it when the interface was set down.
        """
        for peer in self._shared.peers:
            self._stop(peer, now)
        self._handshakes.clear()
        self.is_up = False
        self._sockets.close()
        self._shared.note(now, "down", None)

    def clear_keys(self, now: int) -> None:
        """Erase all keys after suspend: they stayed in RAM while the machine slept.

        The driver does this before suspend (`wg_pm_notification`). Its `wg_vm_notification` has no counterpart here:
        refwg cannot detect that its virtual machine was cloned.
        """
        for peer in self._shared.peers:
            peer.clear_keys()
            peer.timers.keys_cleared()
        self._shared.note(now, "keys cleared", None)

    # Configuration.

    def set_private_key(self, private_key: bytes, now: int) -> list[Effect]:
        """Change the private key (32 zero bytes: none); sessions stop sending, but still receive.

        A peer with the new public key is removed. If the device had no key before, peers with staged packets initiate.
        """
        # wg_set_device: the same key again changes nothing
        identity = None if is_zero(private_key) else StaticIdentity.from_private(private_key)
        if identity == self._shared.identity:
            return []
        # wg_set_device: a device is not its own peer
        own_peer = None if identity is None else self.peer(identity.public)
        if own_peer is not None:
            self.remove_peer(own_peer, now)
        is_first = self._shared.identity is None and identity is not None
        self._shared.identity = identity
        self._shared.cookie_checker.set_public_key(None if identity is None else identity.public)
        self._shared.note(now, "identity", None)
        effects: list[Effect] = []
        for peer in self._shared.peers:
            peer.precompute_static_static()
            peer.expire_current_keypairs()
            if is_first and self.is_up:
                effects += self._wake(peer, now)
        return effects

    def set_listen_port(self, port: int) -> None:
        """Change the listen port (0: any free one); raises ConfigError, and the old port then stays in use."""
        # set_port: the same port again changes nothing; a new one makes routing choose source addresses again
        if port == self.listen_port:
            return
        self.clear_endpoint_sources()
        self.listen_port = self._sockets.open(port) if self.is_up else port

    def set_fwmark(self, fwmark: int) -> None:
        """Change the mark of all datagrams (SO_MARK; 0: none); raises ConfigError if that is not permitted."""
        self._sockets.set_fwmark(fwmark)
        self.fwmark = fwmark
        # wg_set_device: the mark may change the route, so routing chooses source addresses again
        self.clear_endpoint_sources()

    def clear_endpoint_sources(self) -> None:
        """Let routing choose the source address for every peer again."""
        for peer in self._shared.peers:
            peer.clear_endpoint_source()

    def add_peer(self, public_key: bytes, now: int) -> Peer | None:
        """Add a peer with this public key; raises ConfigError (ENOMEM) beyond 2^20 peers.

        Returns None for the device's own public key, so that all devices may get the same configuration.
        """
        # set_peer: our own public key is skipped without an error
        if self._shared.identity is not None and public_key == self._shared.identity.public:
            return None
        if len(self._shared.peers) >= MAX_PEERS_PER_DEVICE:
            raise ConfigError(f"peer limit reached: a device has at most {MAX_PEERS_PER_DEVICE} peers", errno.ENOMEM)
        peer = Peer(self._shared, public_key)
        if self.is_up:
            peer.timers.start()
        self._shared.peers.add(public_key, peer)
        self._shared.note(now, "peer added", peer)
        return peer

    def remove_peer(self, peer: Peer, now: int) -> None:
        """Remove a peer with its sessions, timers, staged packets and prefixes (`wg_peer_remove`)."""
        self._stop(peer, now)
        self._shared.allowedips.remove_by_peer(peer)
        self._shared.peers.remove(peer.public_key)
        self._shared.note(now, "peer removed", peer)

    def remove_all_peers(self, now: int) -> None:
        """Remove every peer (`wg_peer_remove_all`)."""
        for peer in self._shared.peers:
            self.remove_peer(peer, now)

    def insert_allowed_ip(self, peer: Peer, prefix: Prefix) -> None:
        """Give a prefix to a peer; a peer that had exactly this prefix loses it."""
        self._shared.allowedips.insert(prefix, peer)

    def remove_allowed_ip(self, peer: Peer, prefix: Prefix) -> None:
        """Remove exactly this prefix from a peer; does nothing if the peer does not have it (Linux 6.16)."""
        self._shared.allowedips.remove(prefix, peer)

    def remove_allowed_ips(self, peer: Peer) -> None:
        """Remove all prefixes of a peer; the peer stays."""
        self._shared.allowedips.remove_by_peer(peer)

    def set_persistent_keepalive(self, peer: Peer, seconds: int) -> bool:
        """Change the interval in seconds (0: off); returns True if this turns it on: a keepalive is due at once.

        The caller passes that to `peer_configured` as `wants_keepalive`.
        """
        is_turned_on = seconds > 0 and peer.timers.persistent_keepalive_interval == 0
        peer.timers.persistent_keepalive_interval = seconds
        return is_turned_on

    def peer_configured(self, peer: Peer, now: int, *, wants_keepalive: bool = False) -> Sequence[Effect]:
        """Send staged packets, or a keepalive, after all settings of a peer are made.

        They may have given the peer its endpoint. wants_keepalive: the persistent keepalive was just turned on.
        """
        return self._wake(peer, now, wants_keepalive=wants_keepalive) if self.is_up else []

    def _wake(self, peer: Peer, now: int, *, wants_keepalive: bool = False) -> Sequence[Effect]:
        effects = send.keepalive(peer, now) if wants_keepalive else send.staged_packets(peer, now)
        self._schedule(peer)
        return effects

    def _stop(self, peer: Peer, now: int) -> None:
        peer.stop(now)
        self._timer_heap.remove(peer)
