"""Hold one peer: its handshake, keypairs, timers, staged packets, cookie and endpoint.

`Shared` is what all peers of a device have in common. Mirrors peer.c of the driver, and from socket.c how a peer's
endpoint is set.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

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
# A routing loop is none: the driver finds it only when the datagram is to be routed, and counts nothing then.
_TRANSMIT_ERRORS: Final = (DropReason.NOT_IP, DropReason.NO_PEER, DropReason.NO_ENDPOINT)
_TRANSMIT_DROPS: Final = (DropReason.QUEUE_OVERFLOW, DropReason.QUEUE_PURGED)


@dataclass(slots=True)
class Statistics:
    """Counters, of a peer or of the whole device.

    Bytes are those of whole messages, as on the wire without UDP and IP headers. The driver's error counters are sums
    over the reasons for which packets were dropped.
    """

    rx_bytes: int = 0
    tx_bytes: int = 0
    drops: Counter[DropReason] = field(default_factory=Counter)

    @property
    def rx_frame_errors(self) -> int:
        return self._total(_FRAME_ERRORS)

    @property
    def rx_length_errors(self) -> int:
        return self._total(_LENGTH_ERRORS)

    @property
    def rx_errors(self) -> int:
        return self.rx_frame_errors + self.rx_length_errors

    @property
    def tx_errors(self) -> int:
        return self._total(_TRANSMIT_ERRORS)

    @property
    def tx_dropped(self) -> int:
        return self._total(_TRANSMIT_DROPS)

    def _total(self, reasons: Iterable[DropReason]) -> int:
        return sum(self.drops[reason] for reason in reasons)


@dataclass(frozen=True, slots=True, eq=False)
class IndexEntry:
    """What an index names: a session of a peer, or (keypair None) its handshake."""

    peer: Peer
    keypair: Keypair | None = None


@dataclass(slots=True, kw_only=True)
class Shared:
    """What all peers of a device share."""

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
        return jitter(self.environment.random_bytes)

    def note(self, now: int, event: str, peer: Peer | None, **details: object) -> None:
        if self.watcher is not None:
            self.watcher.note(now, event, b"" if peer is None else peer.public_key, **details)

    def drop(self, now: int, reason: DropReason, peer: Peer | None = None, count: int = 1) -> None:
        """Count packets that go no further, on the peer as well if it is known."""
        self.statistics.drops[reason] += count
        if peer is not None:
            peer.statistics.drops[reason] += count
        self.note(now, "drop", peer, reason=reason.name, count=count)


@dataclass(frozen=True, slots=True)
class StagedPacket:
    """A packet from the interface, and the MTU of its route; an empty one stands for a keepalive."""

    packet: bytes
    mtu: int


class Peer:
    """A peer and everything that must go when it goes.

    last_sent_handshake: when an initiation or a response was last sent; None: never, or the limit was lifted.
    latest_handshake: nanoseconds since 1970 of the last handshake that was completed, 0 if there was none.
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
        return self.handshake.remote_static

    def precompute_static_static(self) -> None:
        """Call when the device has a new identity."""
        self.handshake.precomputed_static_static = static_static(self.shared.identity, self.public_key)

    def set_endpoint(self, endpoint: Endpoint, now: int) -> None:
        """Send to this endpoint from now on (`wg_socket_set_peer_endpoint`).

        Call it with a configured endpoint, and with the one from which an authentic message came.
        """
        if endpoint != self.endpoint:
            self.endpoint = endpoint
            self.shared.note(now, "endpoint", self, endpoint=endpoint)

    def clear_endpoint_source(self) -> None:
        """Let routing choose the source address again."""
        if self.endpoint is not None:
            self.endpoint = self.endpoint.without_source()

    def may_initiate(self, now: int) -> bool:
        return self.last_sent_handshake is None or now >= self.last_sent_handshake + REKEY_TIMEOUT

    def count_received(self, length: int) -> None:
        self.statistics.rx_bytes += length
        self.shared.statistics.rx_bytes += length

    def count_sent(self, length: int) -> None:
        self.statistics.tx_bytes += length
        self.shared.statistics.tx_bytes += length

    def any_authenticated_packet_received(self, now: int) -> None:
        self.timers.any_authenticated_packet_received()
        self.timers.any_authenticated_packet_traversal(now)

    def handshake_complete(self, now: int) -> None:
        self.timers.handshake_complete()
        self.latest_handshake = self.shared.environment.wall_clock()
        self.shared.note(now, "handshake complete", self)

    def begin_session(self, now: int) -> None:
        """The handshake is done: its index passes to the session, the oldest session has to go."""
        keypair = self.handshake.begin_session(now)
        self.shared.indices.replace(keypair.local_index, IndexEntry(self, keypair))
        self._destroy(self.keypairs.add_new(keypair))
        self.timers.session_derived(now)
        self.shared.note(now, "session derived", self, initiator=keypair.i_am_the_initiator)

    def received_with(self, keypair: Keypair) -> bool:
        """Something authentic came in on this session; True if that has confirmed it."""
        is_confirmed, destroyed = self.keypairs.received_with(keypair)
        self._destroy(destroyed)
        return is_confirmed

    def clear_keys(self) -> None:
        """Forget all sessions and the handshake, but not the greatest timestamp."""
        self._destroy(self.keypairs.clear())
        self.clear_handshake()

    def clear_handshake(self) -> None:
        if self.handshake.local_index is not None:
            self.shared.indices.remove(self.handshake.local_index)
        self.handshake.clear()

    def expire_current_keypairs(self) -> None:
        """Send nothing more on what there is, and let a new handshake start at once."""
        self.clear_handshake()
        self.keypairs.forbid_sending()
        self.last_sent_handshake = None

    def purge_staged_packets(self, now: int) -> None:
        dropped = len(self.staged.take())
        if dropped:
            self.shared.drop(now, DropReason.QUEUE_PURGED, self, dropped)

    def stop(self, now: int) -> None:
        """The interface goes down, or the peer goes away."""
        self.purge_staged_packets(now)
        self.timers.stop()
        self.clear_keys()
        self.last_sent_handshake = None

    def _destroy(self, keypairs: Iterable[Keypair]) -> None:
        for keypair in keypairs:
            self.shared.indices.remove(keypair.local_index)
