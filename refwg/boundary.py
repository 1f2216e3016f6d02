"""Define the core's boundary: the interfaces it calls, and the effects it returns.

The driver has no such file: it reads the clock and random bytes and calls the network stack in place. The core gets
both through `Environment` and `Sockets`. It returns what must be sent or delivered as an effect.

Records that are made for each packet are named tuples: they are made in half the time of a frozen dataclass, and
compared and hashed in a tenth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from refwg.ip import IcmpError

PeerT = TypeVar("PeerT")


class Environment(Protocol):
    """Random bytes and the time of day. Tests use a seeded one: the same seed gives the same run, byte for byte."""

    def random_bytes(self, length: int) -> bytes:
        """Return `length` bytes for keys, indices, nonces and jitter; cryptographically secure outside tests."""

    def wall_clock(self) -> int:
        """Return nanoseconds since 1970, for TAI64N timestamps and `latest handshake` only; all else uses `now`."""


class Sockets(Protocol):
    """The part of a device's UDP sockets that its configuration controls."""

    def open(self, port: int) -> int:
        """Bind both families to `port` (0: any free one) and return the port, or raise ConfigError.

        Sockets that were open before are closed if this succeeds, and stay open if it fails.
        """

    def close(self) -> None:
        """Close both sockets; datagrams that were not yet read are lost."""

    def set_fwmark(self, fwmark: int) -> None:
        """Mark all later datagrams (SO_MARK; 0: no mark), also those of sockets opened later; raises ConfigError."""

    def interface_index(self, name: str) -> int:
        """Return the index of an interface in the sockets' namespace: the scope id of a link-local address.

        Raises ConfigError (EINVAL) if the interface does not exist.
        """


class Watcher(Protocol):
    """Receives every event of a device, for a trace or a key log; must not change the device."""

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        """Record one decision. peer: the public key of the peer that it is about, empty for the device."""

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        """Record the secrets of a handshake, 32 bytes each; with them Wireshark can decrypt the session."""


class LocalAddress(NamedTuple):
    """The address that received a peer's last datagram, and for IPv4 the index of its interface (0: not known)."""

    address: bytes
    interface: int = 0


class Endpoint(NamedTuple):
    """The destination of a peer's datagrams: address in network order, UDP port, IPv6 scope id.

    source: the local address to send from, learned from the peer's last datagram; None lets routing choose.
    """

    address: bytes
    port: int
    scope_id: int = 0
    source: LocalAddress | None = None

    def without_source(self) -> Self:
        """Return this endpoint with `source` None, so that routing chooses the local address."""
        return self._replace(source=None)


class Transmit(NamedTuple, Generic[PeerT]):
    """Send a datagram, then call `sent` or `send_failed` of the device.

    traffic_class: TOS byte or IPv6 traffic class. peer: the receiver, None for a cookie reply.
    carries_data: True for transport data that is not a keepalive.
    """

    datagram: bytes
    endpoint: Endpoint
    traffic_class: int
    peer: PeerT | None
    carries_data: bool = False


class Deliver(NamedTuple, Generic[PeerT]):
    """Write a decrypted packet to the interface; peer: its sender."""

    packet: bytes
    peer: PeerT


class Unreachable(NamedTuple):
    """Send an ICMP error, in the interface's namespace, to the sender of a packet that has no peer or no endpoint."""

    error: IcmpError
