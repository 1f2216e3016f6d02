"""Connect two devices of refwg by a wire in virtual time, the same every time.

    A 10.0.0.1:1 -------- wire: latency, loss, reordering, a filter -------- B 10.0.0.2:2
      192.168.241.1, fd00::1                                                   192.168.241.2, fd00::2

`settle` lets everything arrive that is under way; `run` lets time pass, and timers with it.
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
    """Random bytes from a seed, and a wall clock that goes with the virtual time."""

    def __init__(self, seed: int, clock: Callable[[], int]) -> None:
        self._stream = random.Random(seed)  # noqa: S311 - not a secret
        self._clock = clock

    def random_bytes(self, length: int) -> bytes:
        return self._stream.randbytes(length)

    def wall_clock(self) -> int:
        return START + self._clock()


class FakeSockets:
    """Sockets that only remember; ports in `taken` cannot be opened."""

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
    """A datagram as it left a side."""

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
    """A device with all it needs, and everything it has let out.

    ephemerals: the private ones of all handshakes, in order. births: when each session was derived, by the index that
    the side puts into its messages.
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
        """We watch our own device for what cannot be seen on the wire."""
        del details
        known = self.device.peer(peer) if event == "session derived" else None
        if known is not None:
            newest = known.keypairs.next or known.keypairs.current
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
    """What happens between the sides; `filter` is asked for every datagram whether it may pass."""

    latency: int = 10 * MILLISECOND
    loss: float = 0
    duplication: float = 0
    reordering: int = 0
    filter: Callable[[Sent], bool] = field(default=lambda _: True)


class Pair:
    """Both sides know each other's key and endpoint, and are up, unless told otherwise."""

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
        """Do what a device asks for."""
        for effect in effects:
            if isinstance(effect, Transmit):
                self._transmit(side, effect)
            elif isinstance(effect, Deliver):
                side.delivered.append(effect.packet)
            elif isinstance(effect, Unreachable):
                side.icmp.append(effect.error)

    def send(self, side: Side, payload: bytes = b"payload", *, version: int = 4) -> bytes:
        """Let a side send a packet to the other one's inner address; returns the packet."""
        other = self.b if side is self.a else self.a
        packet = ip_packet(side.inner[version], other.inner[version], payload)
        self.carry_out(side, side.device.send_packet(packet, 1420, self.now))
        return packet

    def inject(self, side: Side, datagram: bytes, *, source: Endpoint | None = None, ecn: int = 0) -> None:
        """Let a datagram arrive at a side, by default from the other side's address."""
        sender = source or (self.b if side is self.a else self.a).endpoint
        device = side.device
        self.carry_out(side, device.receive_datagram(datagram, arrived_at(sender, side), ecn, self.now))
        self.carry_out(side, device.process_handshakes(self.now))

    def connect(self) -> None:
        """Make a session that A has begun and B has seen confirmed."""
        self.send(self.a)
        self.settle()
        assert self.b.delivered
        self.forget()

    def forget(self) -> None:
        """Start a new page: what was delivered, answered and sent is of no more interest."""
        self.log.clear()
        for side in (self.a, self.b):
            side.delivered.clear()
            side.icmp.clear()

    def settle(self) -> None:
        """Let everything arrive that is under way, and what is sent because of it, as fast as the wire allows."""
        while self._under_way:
            self._step(self._under_way[0][0])

    def run(self, duration: int) -> None:
        """Let time pass."""
        end = self.now + duration
        while (moment := self._next_moment()) is not None and moment <= end:
            self._step(max(moment, self.now))
        self.now = end

    def sent(self, side: Side, kind: MessageType) -> list[Sent]:
        """What a side has sent of one type."""
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


def arrived_at(sender: Endpoint, side: Side) -> Endpoint:
    """The endpoint of a datagram as a side sees it: with its own address as the one to answer from."""
    return Endpoint(sender.address, sender.port, sender.scope_id, LocalAddress(side.endpoint.address, 3))
