"""Connect two devices of refwg by a wire in virtual time; every run is the same.

    A 10.0.0.1:1 -------- wire: latency, loss, reordering, a filter -------- B 10.0.0.2:2
      192.168.241.1, fd00::1                                                   192.168.241.2, fd00::2

`settle` lets everything in flight arrive; `run` lets time pass, so that timers run out.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from hashlib import blake2s
from heapq import heappop, heappush
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from refwg.allowedips import Prefix
from refwg.boundary import Deliver, Endpoint, LocalAddress, Transmit, Unreachable
from refwg.device import Device
from refwg.errors import ConfigError
from refwg.messages import MILLISECOND, SECOND, MessageType
from refwg.queueing import LastUnderLoad
from selftests.support.packets import ip_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from refwg.device import Effect
    from refwg.ip import IcmpError
    from refwg.peer import Peer

START = 1_700_000_000 * SECOND


class SeededEnvironment:
    """Random bytes from a seed, and a wall clock that follows the virtual time."""

    def __init__(self, seed: int, clock: Callable[[], int]) -> None:
        self._stream = random.Random(seed)  # noqa: S311 - not a secret
        self._clock = clock

    def random_bytes(self, length: int) -> bytes:
        return self._stream.randbytes(length)

    def wall_clock(self) -> int:
        return START + self._clock()


class FakeSockets:
    """Sockets that only store what is set; ports in `taken` cannot be opened."""

    def __init__(self) -> None:
        self.port: int | None = None
        self.fwmark = 0
        self.taken: set[int] = set()

    def open(self, port: int) -> int:
        if port in self.taken:
            raise ConfigError(f"port {port} is taken", errno.EADDRINUSE)
        self.port = port or 40000
        return self.port

    def close(self) -> None:
        self.port = None

    def set_fwmark(self, fwmark: int) -> None:
        self.fwmark = fwmark

    def interface_index(self, name: str) -> int:
        if name != "eth0":
            raise ConfigError(f"no interface {name}", errno.EINVAL)
        return 7


class Sent(NamedTuple):
    """A datagram that a side has sent."""

    time: int
    sender: str
    datagram: bytes
    endpoint: Endpoint
    traffic_class: int

    @property
    def type(self) -> MessageType:
        return MessageType(self.datagram[0])


def private_key(name: str) -> bytes:
    return blake2s(name.encode()).digest()


class Side:
    """A device with its environment, and everything that it has sent or delivered.

    ephemerals: the private ephemeral keys of all handshakes, in order. births: the time at which each session
    was derived, by the receiver index of the side's messages in it.
    """

    def __init__(self, name: str, number: int, clock: Callable[[], int], seed: int) -> None:
        self.name = name
        self.environment = SeededEnvironment(seed, clock)
        self.sockets = FakeSockets()
        self.last_under_load = LastUnderLoad()
        self.ephemerals: list[bytes] = []
        self.births: dict[int, int] = {}
        self.device = Device(
            self.environment, self.sockets, now=clock(), last_under_load=self.last_under_load, watcher=self
        )
        self.device.set_listen_port(number)
        self.device.set_private_key(private_key(name), clock())
        self.endpoint = Endpoint(ip_address(f"10.0.0.{number}").packed, number)
        self.inner = {4: f"192.168.241.{number}", 6: f"fd00::{number}"}
        self.delivered: list[bytes] = []
        self.icmp: list[IcmpError] = []

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        """Record when a session was derived: the wire does not show it."""
        del details
        derived = self.device.peer(peer) if event == "session derived" else None
        if derived is not None:
            newest = derived.keypairs.next or derived.keypairs.current
            assert newest is not None
            self.births[newest.remote_index] = now

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        del static_private, remote_static, preshared
        self.ephemerals.append(ephemeral_private)

    @property
    def public_key(self) -> bytes:
        identity = self.device.identity
        assert identity is not None
        return identity.public

    @property
    def peer(self) -> Peer:
        return next(self.device.peers)

    def add_peer(self, other: Side, now: int) -> Peer:
        peer = self.device.add_peer(other.public_key, now)
        assert peer is not None
        for address in other.inner.values():
            self.device.insert_allowed_ip(peer, host_prefix(address))
        return peer


def host_prefix(address: str) -> Prefix:
    packed = ip_address(address).packed
    return Prefix(packed, 8 * len(packed))


@dataclass
class Wire:
    """The faults of the wire between the sides; `filter` returns whether a datagram may pass."""

    latency: int = 10 * MILLISECOND
    loss: float = 0
    duplication: float = 0
    reordering: int = 0
    filter: Callable[[Sent], bool] = field(default=lambda _: True)


class Pair:
    """Two sides that have each other as peer and a wire between them.

    up, endpoints: False leaves the devices down, or the peers without endpoints.
    """

    def __init__(self, *, seed: int = 1, up: bool = True, endpoints: bool = True) -> None:
        self.now = 0
        self.wire = Wire()
        self.log: list[Sent] = []
        self._fate = random.Random(seed)  # noqa: S311 - not a secret
        self._under_way: list[tuple[int, int, Side, Sent]] = []
        self._order = 0
        self.a, self.b = (Side(name, number, lambda: self.now, seed + number) for name, number in (("A", 1), ("B", 2)))
        for side, other in ((self.a, self.b), (self.b, self.a)):
            peer = side.add_peer(other, self.now)
            if endpoints:
                peer.set_endpoint(other.endpoint, self.now)
            if up:
                side.device.up(self.now)

    def carry_out(self, side: Side, effects: Sequence[Effect]) -> None:
        """Carry out the effects that a device returned."""
        for effect in effects:
            if isinstance(effect, Transmit):
                self._transmit(side, effect)
            elif isinstance(effect, Deliver):
                side.delivered.append(effect.packet)
            elif isinstance(effect, Unreachable):
                side.icmp.append(effect.error)

    def send(self, side: Side, payload: bytes = b"payload", *, version: int = 4) -> bytes:
        """Send a packet from a side to the other side's inner address; returns the packet."""
        other = self.b if side is self.a else self.a
        packet = ip_packet(side.inner[version], other.inner[version], payload)
        self.carry_out(side, side.device.send_packet(packet, 1420, self.now))
        return packet

    def inject(self, side: Side, datagram: bytes, *, source: Endpoint | None = None, ecn: int = 0) -> None:
        """Deliver a datagram to a side, by default from the other side's address."""
        sender = source or (self.b if side is self.a else self.a).endpoint
        device = side.device
        self.carry_out(side, device.receive_datagram(datagram, arrived_at(sender, side), ecn, self.now))
        self.carry_out(side, device.process_handshakes(self.now))

    def connect(self) -> None:
        """Establish a session that A initiates and that is confirmed at B."""
        self.send(self.a)
        self.settle()
        assert self.b.delivered
        self.forget()

    def forget(self) -> None:
        """Clear the log and all that was delivered and answered so far."""
        self.log.clear()
        for side in (self.a, self.b):
            side.delivered.clear()
            side.icmp.clear()

    def settle(self) -> None:
        """Let everything in flight arrive, and everything that is sent because of it."""
        while self._under_way:
            self._step(self._under_way[0][0])

    def run(self, duration: int) -> None:
        """Let time pass: datagrams arrive and timers run out."""
        end = self.now + duration
        while (moment := self._next_moment()) is not None and moment <= end:
            self._step(max(moment, self.now))
        self.now = end

    def sent(self, side: Side, kind: MessageType) -> list[Sent]:
        """The messages of one type that a side has sent."""
        return [sent for sent in self.log if sent.sender == side.name and sent.type is kind]

    def _next_moment(self) -> int | None:
        moments = [self.a.device.next_deadline(), self.b.device.next_deadline()]
        moments += [self._under_way[0][0]] if self._under_way else []
        return min((moment for moment in moments if moment is not None), default=None)

    def _step(self, moment: int) -> None:
        self.now = moment
        while self._under_way and self._under_way[0][0] <= moment:
            _, _, side, sent = heappop(self._under_way)
            sender = self.a if side is self.b else self.b
            self.inject(side, sent.datagram, source=sender.endpoint, ecn=sent.traffic_class & 3)
        for side in (self.a, self.b):
            self.carry_out(side, side.device.expire_timers(moment))

    def _transmit(self, side: Side, effect: Transmit[Peer]) -> None:
        sent = Sent(self.now, side.name, effect.datagram, effect.endpoint, effect.traffic_class)
        self.log.append(sent)
        side.device.sent(effect, self.now)
        other = self.b if side is self.a else self.a
        is_lost = self._fate.random() < self.wire.loss
        to_other = (effect.endpoint.address, effect.endpoint.port) == (other.endpoint.address, other.endpoint.port)
        if to_other and not is_lost and self.wire.filter(sent):
            self._deliver_later(other, sent)
            if self.wire.duplication and self._fate.random() < self.wire.duplication:
                self._deliver_later(other, sent)

    def _deliver_later(self, other: Side, sent: Sent) -> None:
        delay = self.wire.latency + self._fate.randint(0, self.wire.reordering)
        self._order += 1
        heappush(self._under_way, (self.now + delay, self._order, other, sent))


def connected() -> Pair:
    """Return a pair with a session that A has initiated, and with an empty log."""
    pair = Pair()
    pair.connect()
    return pair


def arrived_at(sender: Endpoint, side: Side) -> Endpoint:
    """The sender's endpoint of a datagram, with the side's address as the one to answer from."""
    return Endpoint(sender.address, sender.port, sender.scope_id, LocalAddress(side.endpoint.address, 3))
