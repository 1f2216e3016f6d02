"""Hold one peer: its handshake, keypairs, timers, staged packets, cookie and endpoint.

`Shared` holds what all peers of a device have in common. Mirrors peer.c of the driver, and the functions of socket.c
that set a peer's endpoint.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from refwg.allowedips import AllowedIPs
from refwg.cookie import CookieJar
from refwg.errors import DropReason
from refwg.messages import REKEY_TIMEOUT
from refwg.noise import Handshake, Keypairs, static_static
from refwg.peerlookup import IndexTable, KeyTable
from refwg.queueing import StagedQueue
from refwg.timers import PeerTimers, jitter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refwg.boundary import Endpoint, Environment, Watcher
    from refwg.cookie import CookieChecker
    from refwg.noise import Keypair, StaticIdentity
    from refwg.ratelimiter import RateLimiter

_FRAME_ERRORS: Final = (DropReason.INNER_PROTOCOL, DropReason.SOURCE_NOT_ALLOWED)
_LENGTH_ERRORS: Final = (DropReason.INNER_LENGTH,)
# ROUTING_LOOP is left out: since Linux 5.7 the driver has no check for loops, so it counts no error.
_TRANSMIT_ERRORS: Final = (DropReason.NOT_IP, DropReason.NO_PEER, DropReason.NO_ENDPOINT)
_TRANSMIT_DROPS: Final = (DropReason.QUEUE_OVERFLOW, DropReason.QUEUE_PURGED)


@dataclass(slots=True)
class Statistics:
    """Counters of a peer or of the whole device.

    rx_bytes, tx_bytes: bytes of whole messages, without UDP and IP headers. drops: dropped packets by reason. The
    properties are the driver's error counters; each is a sum over some of the reasons.
    """

    rx_bytes: int = 0
    tx_bytes: int = 0
    drops: Counter[DropReason] = field(default_factory=Counter)

    @property
    def rx_frame_errors(self) -> int:
        """Inner packets that are not IP, or whose source address does not belong to the peer."""
        return self._total(_FRAME_ERRORS)

    @property
    def rx_length_errors(self) -> int:
        """Inner packets whose length field does not fit the packet."""
        return self._total(_LENGTH_ERRORS)

    @property
    def rx_errors(self) -> int:
        """Sum of frame and length errors; packets that fail authentication are not counted, as in the driver."""
        return self.rx_frame_errors + self.rx_length_errors

    @property
    def tx_errors(self) -> int:
        """Packets from the interface that are not IP, or have no peer or no endpoint (`wg_xmit`)."""
        return self._total(_TRANSMIT_ERRORS)

    @property
    def tx_dropped(self) -> int:
        """Packets removed from staging queues: the queue was full, or it was purged."""
        return self._total(_TRANSMIT_DROPS)

    def _total(self, reasons: Iterable[DropReason]) -> int:
        return sum(self.drops[reason] for reason in reasons)


class IndexEntry(NamedTuple):
    """What an index names: a session of a peer, or the peer's handshake if `keypair` is None."""

    peer: Peer
    keypair: Keypair | None = None


@dataclass(slots=True, kw_only=True)
class Shared:
    """State that all peers of a device share: identity, lookup tables, rate limiter, counters.

    identity: None if the device has no private key. watcher: receives every event, None: no trace.
    """

    environment: Environment
    cookie_checker: CookieChecker
    ratelimiter: RateLimiter
    watcher: Watcher | None = None
    identity: StaticIdentity | None = None
    peers: KeyTable[Peer] = field(default_factory=KeyTable)
    indices: IndexTable[IndexEntry] = field(default_factory=IndexTable)
    allowedips: AllowedIPs[Peer] = field(default_factory=AllowedIPs)
    statistics: Statistics = field(default_factory=Statistics)

    def jitter(self) -> int:
        """Return a new random delay of 0 to 333 ms, in nanoseconds."""
        return jitter(self.environment.random_bytes)

    def note(self, now: int, event: str, peer: Peer | None, **details: object) -> None:
        """Pass an event to the watcher, if there is one; peer: None for an event of the device."""
        if self.watcher is not None:
            self.watcher.note(now, event, b"" if peer is None else peer.public_key, **details)

    def drop(self, now: int, reason: DropReason, peer: Peer | None = None, count: int = 1) -> None:
        """Count dropped packets for the device, and for the peer if it is known."""
        self.statistics.drops[reason] += count
        if peer is not None:
            peer.statistics.drops[reason] += count
        self.note(now, "drop", peer, reason=reason.name, count=count)


class StagedPacket(NamedTuple):
    """A packet from the interface, empty for a keepalive; mtu: the limit on its padded length in bytes, 0: none."""

    packet: bytes
    mtu: int


class Peer:
    """A peer, with all state that ends when the peer is removed.

    last_sent_handshake: when an initiation or response was last sent, in nanoseconds; None: never, or reset.
    latest_handshake: when a handshake was last completed, in nanoseconds since 1970; 0: never.
    """

    __slots__ = (
        "cookie",
        "endpoint",
        "handshake",
        "keypairs",
        "last_sent_handshake",
        "latest_handshake",
        "shared",
        "staged",
        "statistics",
        "timers",
    )

    def __init__(self, shared: Shared, public_key: bytes) -> None:
        self.shared = shared
        self.handshake = Handshake(public_key)
        self.keypairs = Keypairs()
        self.timers = PeerTimers()
        self.staged: StagedQueue[StagedPacket] = StagedQueue()
        self.cookie = CookieJar(public_key)
        self.statistics = Statistics()
        self.endpoint: Endpoint | None = None
        self.last_sent_handshake: int | None = None
        self.latest_handshake = 0
        self.precompute_static_static()

    @property
    def public_key(self) -> bytes:
        """The static public key, 32 bytes, which identifies the peer."""
        return self.handshake.remote_static

    def precompute_static_static(self) -> None:
        """Compute the Diffie-Hellman result of both static keys again; call it when the device's key changes."""
        self.handshake.precomputed_static_static = static_static(self.shared.identity, self.public_key)

    def set_endpoint(self, endpoint: Endpoint, now: int) -> None:
        """Send to this endpoint from now on (`wg_socket_set_peer_endpoint`).

        Called with a configured endpoint, and with the sender of each authenticated message.
        """
        if endpoint != self.endpoint:
            self.endpoint = endpoint
            self.shared.note(now, "endpoint", self, endpoint=endpoint)

    def clear_endpoint_source(self) -> None:
        """Let routing choose the source address again (`wg_socket_clear_peer_endpoint_src`)."""
        if self.endpoint is not None:
            self.endpoint = self.endpoint.without_source()

    def may_initiate(self, now: int) -> bool:
        """Return True if no initiation or response was sent to this peer within REKEY_TIMEOUT (5 s)."""
        # 6.1: at most one initiation in REKEY_TIMEOUT
        return self.last_sent_handshake is None or now >= self.last_sent_handshake + REKEY_TIMEOUT

    def count_received(self, length: int) -> None:
        """Add a message of `length` bytes to `rx_bytes` of the peer and the device."""
        self.statistics.rx_bytes += length
        self.shared.statistics.rx_bytes += length

    def count_sent(self, length: int) -> None:
        """Add a message of `length` bytes to `tx_bytes` of the peer and the device."""
        self.statistics.tx_bytes += length
        self.shared.statistics.tx_bytes += length

    def handshake_complete(self, now: int) -> None:
        """Stop retries, and record the wall-clock time that `wg show` prints as latest handshake."""
        self.timers.handshake_complete()
        self.latest_handshake = self.shared.environment.wall_clock()
        self.shared.note(now, "handshake complete", self)

    def begin_session(self, now: int) -> None:
        """Derive the session of a finished handshake under the same index; destroys sessions that lose their slot."""
        # 5.4.5: transport keys are derived, and the state of the handshake is erased
        keypair = self.handshake.begin_session(now)
        self.shared.indices.replace(keypair.local_index, IndexEntry(self, keypair))
        self._destroy(self.keypairs.add_new(keypair))
        self.timers.session_derived(now)
        self.shared.note(now, "session derived", self, initiator=keypair.i_am_the_initiator)

    def received_with(self, keypair: Keypair) -> bool:
        """Rotate the sessions after an authenticated packet; returns True if it was the first packet on `next`."""
        is_confirmed, destroyed = self.keypairs.received_with(keypair)
        self._destroy(destroyed)
        return is_confirmed

    def clear_keys(self) -> None:
        """Erase all sessions and the handshake; the greatest timestamp stays, against replays."""
        self._destroy(self.keypairs.clear())
        self.clear_handshake()

    def clear_handshake(self) -> None:
        """Erase the handshake in progress, if any, and free its index (`wg_noise_handshake_clear`)."""
        if self.handshake.local_index is not None:
            self.shared.indices.remove(self.handshake.local_index)
        self.handshake.clear()

    def expire_current_keypairs(self) -> None:
        """Stop sending on all sessions, and let a new handshake start at once (the private key has changed)."""
        # wg_noise_expire_current_peer_keypairs: received packets are still accepted
        self.clear_handshake()
        self.keypairs.forbid_sending()
        self.last_sent_handshake = None

    def purge_staged_packets(self, now: int) -> None:
        """Drop all staged packets and count them under QUEUE_PURGED (`wg_packet_purge_staged_packets`)."""
        dropped = len(self.staged.take())
        if dropped:
            self.shared.drop(now, DropReason.QUEUE_PURGED, self, dropped)

    def stop(self, now: int) -> None:
        """Drop staged packets, timers and keys: the interface goes down, or the peer is removed."""
        # wg_stop: the five-second limit on initiations ends too
        self.purge_staged_packets(now)
        self.timers.stop()
        self.clear_keys()
        self.last_sent_handshake = None

    def _destroy(self, keypairs: Iterable[Keypair]) -> None:
        for keypair in keypairs:
            self.shared.indices.remove(keypair.local_index)
