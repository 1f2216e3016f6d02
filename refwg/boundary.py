"""Define the core's boundary: what it asks of the world, and what it wants done there.

No kernel file has this: the driver reads clock and randomness and calls the network stack in place. Here they come in
through `Environment` and `Sockets`, and what is to be sent or delivered goes out as an `Effect`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from refwg.ip import IcmpError

PeerT = TypeVar("PeerT")


class Environment(Protocol):
    """Chance and the time of day. Tests seed it, and a run with the same seed is the same byte for byte."""

    def random_bytes(self, length: int) -> bytes: ...

    def wall_clock(self) -> int:
        """Nanoseconds since 1970. Only timestamps and `latest handshake` use it; all else uses `now`."""


class Sockets(Protocol):
    """The UDP sockets of a device, as far as its configuration decides about them."""

    def open(self, port: int) -> int:
        """Bind both families to `port` (0: any free one) and return the port, or raise ConfigError.

        Sockets that were open before stay as they are if this fails, and are closed if it succeeds.
        """

    def close(self) -> None: ...

    def set_fwmark(self, fwmark: int) -> None:
        """Mark what is sent from now on, also from sockets opened later; raises ConfigError."""

    def interface_index(self, name: str) -> int:
        """Number of an interface where the sockets are, for the scope of a link-local address; raises ConfigError."""


class Watcher(Protocol):
    """Somebody who wants to know what is going on: a trace, a key log. It must not change anything."""

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        """Something was decided about the peer with this public key (empty: about no peer)."""

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        """The secrets of a handshake; with them Wireshark reads the session."""


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """Where a datagram of a peer arrived: the address it was sent to, and for IPv4 the interface (0: not known)."""

    address: bytes
    interface: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer's datagrams go to: address in network order, UDP port, IPv6 scope id.

    source: the local address to send from, learned from what the peer has sent; None lets routing choose.
    """

    address: bytes
    port: int
    scope_id: int = 0
    source: LocalAddress | None = None

    def without_source(self) -> Self:
        return replace(self, source=None)


@dataclass(frozen=True, slots=True, eq=False)
class Transmit(Generic[PeerT]):
    """Send a datagram, then call `sent` or `send_failed` of the device.

    traffic_class: TOS byte or IPv6 traffic class. peer: whom it is for, None for a cookie reply.
    carries_data: it is transport data and no keepalive.
    """

    datagram: bytes
    endpoint: Endpoint
    traffic_class: int
    peer: PeerT | None
    carries_data: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Deliver(Generic[PeerT]):
    """Give a packet to the interface's network stack."""

    packet: bytes
    peer: PeerT


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Send an ICMP error where the interface is, to a sender whose packet nobody takes."""

    error: IcmpError
