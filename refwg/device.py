"""Run a WireGuard device as a sans-I/O state machine: input and time in, effects out.

Mirrors device.c of the driver, and of netlink.c what changes a device. Whoever drives a device

- gives it datagrams (`receive_datagram`) and packets (`send_packet`), and carries out the effects that come back;
- reports each `Transmit` that the network stack took (`sent`) or refused (`send_failed`);
- calls `process_handshakes` while `has_waiting_handshakes`;
- calls `expire_timers` when `next_deadline` has come.

`now` is a number of nanoseconds that never goes back and counts time asleep.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from refwg import ip, receive, send
from refwg.boundary import Deliver, Endpoint, Transmit, Unreachable
from refwg.cookie import CookieChecker
from refwg.crypto import is_zero
from refwg.errors import ConfigError, DropReason, MalformedMessage
from refwg.messages import MAX_PEERS_PER_DEVICE, CookieReply, Data, Initiation, Response, parse
from refwg.noise import StaticIdentity
from refwg.peer import Peer, Shared, StagedPacket
from refwg.queueing import HandshakeQueue, LastUnderLoad
from refwg.ratelimiter import RateLimiter
from refwg.receive import CookieRequired, Dropped, FollowUp
from refwg.timers import Action, TimerHeap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refwg.allowedips import Prefix
    from refwg.boundary import Environment, Sockets, Watcher
    from refwg.peer import Statistics
    from refwg.receive import Consumed

Effect = Transmit[Peer] | Deliver[Peer] | Unreachable
Queued = tuple[Initiation | Response | CookieReply, bytes, Endpoint]

_FOLLOW_UPS: Final[dict[FollowUp, Callable[[Peer, int], list[Transmit[Peer]]]]] = {
    FollowUp.RESPONSE: send.handshake_response,
    FollowUp.CONFIRMATION: send.keepalive,
    FollowUp.STAGED_PACKETS: send.staged_packets,
    FollowUp.INITIATION: send.handshake_initiation,
}


class Device:
    """A WireGuard interface.

    ratelimiter: one for all devices of a network namespace. last_under_load: one for all devices of the system.
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

    # What it is.

    @property
    def identity(self) -> StaticIdentity | None:
        return self._shared.identity

    @property
    def statistics(self) -> Statistics:
        return self._shared.statistics

    @property
    def peers(self) -> Iterator[Peer]:
        """All peers, in the order in which they were added."""
        return iter(self._shared.peers)

    def peer(self, public_key: bytes) -> Peer | None:
        return self._shared.peers.lookup(public_key)

    def allowed_ips(self, peer: Peer) -> Iterator[Prefix]:
        return self._shared.allowedips.prefixes_of(peer)

    # Packets and datagrams.

    def send_packet(self, packet: bytes, mtu: int, now: int) -> list[Effect]:
        """Take a packet from the interface; mtu: of its route, or of the interface if that is all one knows."""
        if not self.is_up:
            return self._refuse(now, DropReason.INTERFACE_DOWN)
        if not ip.version(packet):
            return self._refuse(now, DropReason.NOT_IP)
        peer = self._shared.allowedips.lookup(ip.destination(packet))
        if peer is None:
            return self._refuse(now, DropReason.NO_PEER, packet)
        if peer.endpoint is None:
            return self._refuse(now, DropReason.NO_ENDPOINT, packet, peer)
        if send.is_own_datagram(packet, peer, self.listen_port):
            return self._refuse(now, DropReason.ROUTING_LOOP, None, peer)
        pushed_out = peer.staged.stage([StagedPacket(packet, mtu)])
        if pushed_out:
            self._shared.drop(now, DropReason.QUEUE_OVERFLOW, peer, pushed_out)
        return self._done_with(peer, send.staged_packets(peer, now))

    def receive_datagram(self, datagram: bytes, endpoint: Endpoint, ecn: int, now: int) -> list[Effect]:
        """Take a datagram from the network; endpoint: who sent it, and to which of our addresses."""
        if not self.is_up:
            self._shared.drop(now, DropReason.INTERFACE_DOWN)
            return []
        try:
            message = parse(datagram)
        except MalformedMessage:
            self._shared.drop(now, DropReason.MALFORMED)
            return []
        if isinstance(message, Data):
            return self._follow_up(receive.data(self._shared, message, endpoint, ecn, now), now)
        if not self._handshakes.put((message, datagram, endpoint)):
            self._shared.drop(now, DropReason.HANDSHAKE_QUEUE_FULL)
        return []

    @property
    def has_waiting_handshakes(self) -> bool:
        return len(self._handshakes) > 0

    def process_handshakes(self, now: int, limit: int | None = None) -> list[Effect]:
        """Look at handshake messages that wait, all or `limit` of them; data need not wait for these."""
        effects: list[Effect] = []
        while self._handshakes and (limit is None or limit > 0):
            effects += self._process_handshake(*self._handshakes.next_message(), now)
            self._handshakes.done()
            limit = None if limit is None else limit - 1
        return effects

    def sent(self, transmit: Transmit[Peer], now: int) -> None:
        """The network stack took a datagram."""
        peer = transmit.peer
        if peer is None:
            return
        peer.count_sent(len(transmit.datagram))
        if transmit.carries_data:
            peer.timers.data_sent(now, self._shared.jitter)
            self._timer_heap.schedule(peer, peer.timers.next_deadline())

    def drop(self, reason: DropReason, peer: Peer, now: int) -> None:
        """Count a packet that was lost outside."""
        self._shared.drop(now, reason, peer)

    def send_failed(self, transmit: Transmit[Peer], now: int, error: str) -> None:
        """The network stack refused a datagram: it is lost, and no timer waits for an answer to it."""
        self._shared.drop(now, DropReason.SEND_FAILED, transmit.peer)
        self._shared.note(now, "send failed", transmit.peer, error=error)

    def _process_handshake(
        self, message: Initiation | Response | CookieReply, datagram: bytes, endpoint: Endpoint, now: int
    ) -> list[Effect]:
        if isinstance(message, CookieReply):
            return self._follow_up(receive.cookie_reply(self._shared, message, now), now)
        outcome = receive.handshake_message(
            self._shared,
            message,
            datagram,
            endpoint,
            now=now,
            is_under_load=self._handshakes.is_under_load(now),
        )
        if isinstance(outcome, CookieRequired):
            self._shared.drop(now, DropReason.COOKIE_REQUIRED)
            return [*send.cookie_reply(self._shared, datagram, outcome.sender_index, endpoint, now)]
        return self._follow_up(outcome, now)

    def _follow_up(self, outcome: Consumed | Dropped, now: int) -> list[Effect]:
        """Do what must follow on a message, send before deliver."""
        if isinstance(outcome, Dropped):
            self._shared.drop(now, outcome.reason, outcome.peer)
            return []
        effects: list[Effect] = []
        if outcome.follow_up is not None:
            effects += _FOLLOW_UPS[outcome.follow_up](outcome.peer, now)
        if outcome.dropped is not None:
            self._shared.drop(now, outcome.dropped, outcome.peer)
        if outcome.packet is not None:
            effects.append(Deliver(outcome.packet, outcome.peer))
        return self._done_with(outcome.peer, effects)

    def _refuse(
        self, now: int, reason: DropReason, packet: bytes | None = None, peer: Peer | None = None
    ) -> list[Effect]:
        """Drop a packet from the interface, and tell its sender if `packet` is given."""
        self._shared.drop(now, reason, peer)
        error = None if packet is None else ip.unreachable(packet)
        return [] if error is None else [Unreachable(error)]

    # Time.

    def next_deadline(self) -> int | None:
        """When `expire_timers` must be called; it may turn out that nothing is to be done then."""
        deadlines = (self._timer_heap.next_deadline(), self._shared.ratelimiter.next_sweep())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def expire_timers(self, now: int) -> list[Effect]:
        effects: list[Effect] = []
        while (peer := self._timer_heap.pop_due(now)) is not None:
            while (action := peer.timers.expire(now)) is not None:
                effects += self._act(peer, action, now)
            self._done_with(peer, [])
        self._shared.ratelimiter.sweep(now)
        return effects

    def _act(self, peer: Peer, action: Action, now: int) -> list[Transmit[Peer]]:
        self._shared.note(now, "timer", peer, action=action.name)
        if action is Action.GIVE_UP:
            peer.purge_staged_packets(now)
            return []
        if action is Action.ZERO_KEY_MATERIAL:
            peer.clear_keys()
            return []
        if action in {Action.SEND_KEEPALIVE, Action.SEND_PERSISTENT_KEEPALIVE}:
            return send.keepalive(peer, now)
        # The address we send from may be the cause of the silence.
        peer.clear_endpoint_source()
        return send.handshake_initiation(peer, now, is_retry=action is Action.RETRY_HANDSHAKE)

    def _done_with(self, peer: Peer, effects: list[Effect] | list[Transmit[Peer]]) -> list[Effect]:
        """Schedule the peer's next deadline; every input that concerns a peer ends here."""
        self._timer_heap.schedule(peer, peer.timers.next_deadline())
        return [*effects]

    # Up and down.

    def up(self, now: int) -> list[Effect]:
        """The interface was set up; raises ConfigError if the listen port cannot be had."""
        if self.is_up:
            return []
        self.listen_port = self._sockets.open(self.listen_port)
        self.is_up = True
        self._shared.note(now, "up", None, listen_port=self.listen_port)
        effects: list[Effect] = []
        for peer in self._shared.peers:
            peer.timers.start()
            effects += self._wake(peer, now, wants_keepalive=peer.timers.persistent_keepalive_interval > 0)
        return effects

    def down(self, now: int) -> None:
        """The interface was set down: no socket, no session, no timer, nothing staged; the configuration stays."""
        for peer in self._shared.peers:
            self._stop(peer, now)
        self._handshakes.clear()
        self.is_up = False
        self._sockets.close()
        self._shared.note(now, "down", None)

    def clear_keys(self, now: int) -> None:
        """Erase all keys after suspend: they stayed in RAM while the machine slept.

        The driver does this before suspend (`wg_pm_notification`). There is no counterpart of its
        `wg_vm_notification`: refwg does not notice that its machine was cloned.
        """
        for peer in self._shared.peers:
            peer.clear_keys()
            peer.timers.keys_cleared()
        self._shared.note(now, "keys cleared", None)

    # Configuration.

    def set_private_key(self, private_key: bytes, now: int) -> list[Effect]:
        """Take a new identity; zero means none. Sessions are used no more, but what is under way still comes in."""
        identity = None if is_zero(private_key) else StaticIdentity.from_private(private_key)
        if identity == self._shared.identity:
            return []
        itself = None if identity is None else self.peer(identity.public)
        if itself is not None:
            self.remove_peer(itself, now)
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
        """Change the port (0: any free one); on an interface that is up, a failure leaves the old one open."""
        if port == self.listen_port:
            return
        self.clear_endpoint_sources()
        self.listen_port = self._sockets.open(port) if self.is_up else port

    def set_fwmark(self, fwmark: int) -> None:
        self._sockets.set_fwmark(fwmark)
        self.fwmark = fwmark
        self.clear_endpoint_sources()

    def clear_endpoint_sources(self) -> None:
        for peer in self._shared.peers:
            peer.clear_endpoint_source()

    def add_peer(self, public_key: bytes, now: int) -> Peer | None:
        """Make a new peer; the device's own key makes none, so that one configuration may serve all sides."""
        if self._shared.identity is not None and public_key == self._shared.identity.public:
            return None
        if len(self._shared.peers) >= MAX_PEERS_PER_DEVICE:
            raise ConfigError(f"more than {MAX_PEERS_PER_DEVICE} peers", errno.ENOMEM)
        peer = Peer(self._shared, public_key)
        if self.is_up:
            peer.timers.start()
        self._shared.peers.add(public_key, peer)
        self._shared.note(now, "peer added", peer)
        return peer

    def remove_peer(self, peer: Peer, now: int) -> None:
        self._stop(peer, now)
        self._shared.allowedips.remove_by_peer(peer)
        self._shared.peers.remove(peer.public_key)
        self._shared.note(now, "peer removed", peer)

    def remove_all_peers(self, now: int) -> None:
        for peer in self._shared.peers:
            self.remove_peer(peer, now)

    def insert_allowed_ip(self, peer: Peer, prefix: Prefix) -> None:
        self._shared.allowedips.insert(prefix, peer)

    def remove_allowed_ip(self, peer: Peer, prefix: Prefix) -> None:
        self._shared.allowedips.remove(prefix, peer)

    def remove_allowed_ips(self, peer: Peer) -> None:
        self._shared.allowedips.remove_by_peer(peer)

    def set_persistent_keepalive(self, peer: Peer, seconds: int) -> bool:
        """Change the interval; True if there was none, so that `peer_configured` has to be told of it."""
        is_turned_on = seconds > 0 and peer.timers.persistent_keepalive_interval == 0
        peer.timers.persistent_keepalive_interval = seconds
        return is_turned_on

    def peer_configured(self, peer: Peer, now: int, *, wants_keepalive: bool = False) -> list[Effect]:
        """Call when all settings of a peer are made: it may have become reachable, or be waiting for a keepalive."""
        return self._wake(peer, now, wants_keepalive=wants_keepalive) if self.is_up else []

    def _wake(self, peer: Peer, now: int, *, wants_keepalive: bool = False) -> list[Effect]:
        effects = send.keepalive(peer, now) if wants_keepalive else send.staged_packets(peer, now)
        return self._done_with(peer, effects)

    def _stop(self, peer: Peer, now: int) -> None:
        peer.stop(now)
        self._timer_heap.remove(peer)
