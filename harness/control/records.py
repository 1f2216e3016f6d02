"""Define the records of a configuration: keys, endpoints, allowed-ips, peers, devices.

The same over UAPI and generic netlink. Names follow the driver's uapi header (include/uapi/linux/wireguard.h) and
wg(8).
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypedDict

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_SIZE: Final = 32
_WIDTH: Final = {4: 32, 16: 128}


@dataclass(frozen=True, slots=True)
class Key:
    """A Curve25519 key or preshared key: 32 bytes; printed in base64 as `wg` does."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_SIZE:
            raise UsageError(f"a key has {KEY_SIZE} bytes, not {len(self.raw)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read base64 as `wg` prints it (44 characters)."""
        try:
            return cls(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise UsageError(f"key {text!r}: not base64: {error}") from error

    @classmethod
    def generate(cls) -> Self:
        """Make a private key as `wg genkey` does: random, then clamped (RFC 7748, section 5)."""
        return cls.clamped(os.urandom(KEY_SIZE))

    @classmethod
    def clamped(cls, raw: bytes) -> Self:
        """The private key of these 32 bytes, clamped (RFC 7748, section 5)."""
        return cls(bytes([raw[0] & 248, *raw[1:31], raw[31] & 127 | 64]))

    def public(self) -> Key:
        """The public key that belongs to this private key."""
        # Imported late: reading a configuration must not cost the import of a crypto library.
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: PLC0415

        return Key(X25519PrivateKey.from_private_bytes(self.raw).public_key().public_bytes_raw())

    def __str__(self) -> str:
        return base64.b64encode(self.raw).decode()


ZERO_KEY: Final = Key(bytes(KEY_SIZE))


class AllowedIP(NamedTuple):
    """One entry of allowed-ips. A tuple, because a device may have 130 560 of them.

    address: 4 or 16 bytes in network order, host bits as given. length: prefix length in bits.
    remove: take this prefix away from the peer instead of giving it (Linux 6.16, wireguard-go of May 2025).
    """

    address: bytes
    length: int
    remove: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ADDRESS[/LENGTH], with a leading `-` for removal and an ignored leading `+`, as wg(8) does."""
        body = text.removeprefix("+") if text.startswith("+") else text.removeprefix("-")
        address, slash, length = body.partition("/")
        try:
            packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            bits = int(length) if slash else _WIDTH[len(packed)]
        except (OSError, ValueError) as error:
            raise UsageError(f"allowed ip {text!r}: want ADDRESS/LENGTH") from error
        if not 0 <= bits <= _WIDTH[len(packed)]:
            raise UsageError(f"allowed ip {text!r}: a prefix length is 0 to {_WIDTH[len(packed)]}")
        return cls(packed, bits, text.startswith("-"))

    @property
    def family(self) -> int:
        return socket.AF_INET if len(self.address) == 4 else socket.AF_INET6  # noqa: PLR2004

    def __str__(self) -> str:
        """Print what `parse` reads."""
        sign = "-" if self.remove else ""
        return f"{sign}{socket.inet_ntop(self.family, self.address)}/{self.length}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a peer's datagrams go: an IP address in its usual notation, a UDP port, an IPv6 scope id."""

    host: str
    port: int
    scope: int = 0

    @classmethod
    def parse(cls, text: str, scope_index: Callable[[str], int] = socket.if_nametoindex) -> Self:
        """Read `1.2.3.4:5` or `[fe80::1%3]:5`, as `wg show` prints it.

        scope_index: finds the index of an interface named as scope; it has to ask in the right network namespace.
        """
        host, _, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        address, _, scope = bare.partition("%")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            # There and back, because one address has many spellings, and this is the one that netlink's reader uses.
            usual = socket.inet_ntop(family, socket.inet_pton(family, address))
            return cls(usual, int(port), _scope_id(scope, scope_index))
        except (ValueError, OSError) as error:
            raise UsageError(f"endpoint {text!r}: want ADDRESS:PORT or [ADDRESS]:PORT") from error

    @property
    def family(self) -> int:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def __str__(self) -> str:
        if self.family == socket.AF_INET:
            return f"{self.host}:{self.port}"
        return f"[{self.host}{f'%{self.scope}' if self.scope else ''}]:{self.port}"


def _scope_id(text: str, scope_index: Callable[[str], int]) -> int:
    if not text:
        return 0
    return int(text) if text.isdigit() else scope_index(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """What to change of one peer; None means: leave as it is.

    A preshared key of 32 zero bytes clears it; a persistent keepalive of 0 seconds turns it off.
    """

    public_key: Key
    preshared_key: Key | None = None
    endpoint: Endpoint | None = None
    persistent_keepalive: int | None = None
    allowed_ips: tuple[AllowedIP, ...] = ()
    replace_allowed_ips: bool = False
    remove: bool = False
    update_only: bool = False
    protocol_version: int | None = None


class PeerChanges(TypedDict, total=False):
    """The fields of PeerConfig besides the key, as keywords: what to change of one peer."""

    preshared_key: Key | None
    endpoint: Endpoint | None
    persistent_keepalive: int | None
    allowed_ips: tuple[AllowedIP, ...]
    replace_allowed_ips: bool
    remove: bool
    update_only: bool
    protocol_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """What to change of a device; None means: leave as it is.

    A private key of 32 zero bytes clears it; a listen port of 0 means a random one; a fwmark of 0 turns it off.
    """

    private_key: Key | None = None
    listen_port: int | None = None
    fwmark: int | None = None
    replace_peers: bool = False
    peers: tuple[PeerConfig, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """One peer as the implementation reports it.

    latest_handshake: nanoseconds of wall time since 1970, 0 if there was none. rx_bytes, tx_bytes: UDP payload octets.
    A key of None was reported as all zero or not at all.
    """

    public_key: Key
    preshared_key: Key | None = None
    endpoint: Endpoint | None = None
    persistent_keepalive: int = 0
    latest_handshake: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    allowed_ips: tuple[AllowedIP, ...] = ()
    protocol_version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A device as the implementation reports it; `peers` in the order of the answer."""

    private_key: Key | None = None
    public_key: Key | None = None
    listen_port: int = 0
    fwmark: int = 0
    peers: tuple[PeerState, ...] = ()

    def peer(self, public_key: Key) -> PeerState:
        """The peer with this public key."""
        for peer in self.peers:
            if peer.public_key == public_key:
                return peer
        known = ", ".join(str(peer.public_key) for peer in self.peers) or "none"
        raise UsageError(f"no peer {public_key}; there are: {known}")


def allowed_ips(*texts: str) -> tuple[AllowedIP, ...]:
    """Read several allowed-ips at once: `allowed_ips("10.0.0.0/8", "fd00::/112")`."""
    return tuple(AllowedIP.parse(text) for text in texts)


def keyword_changes(record: DeviceConfig | PeerConfig) -> dict[str, object]:
    """The fields of a configuration record that change something, by name; for logs and evidence."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    # By identity: 0 equals False, but a listen port of 0 is a change.
    return {name: value for name, value in values.items() if value is not None and value is not False and value != ()}
