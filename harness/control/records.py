"""Define the records of a configuration: keys, endpoints, allowed-ips, peers, devices.

The same over UAPI and generic netlink. Names follow the driver's uapi header (include/uapi/linux/wireguard.h) and
wg(8). A record's repr is what a failed assertion prints: short, in the words of `wg show`, and without whole keys.
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypedDict

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

KEY_SIZE: Final = 32
# Characters of a key that a repr shows: 48 bits tell keys apart, and no secret is revealed.
_KEY_SHOWN: Final = 8
# Entries of a list that a repr shows. pytest cuts a repr of more than 240 characters in its middle.
_ENTRIES_SHOWN: Final = 3
_NANOSECONDS: Final = 1_000_000_000
_WIDTH: Final = {4: 32, 16: 128}


@dataclass(frozen=True, slots=True)
class Key:
    """A Curve25519 key or preshared key: 32 bytes; printed in base64 as `wg` does, shortened in its repr."""

    raw: bytes

    # Not the generated one: pytest explains a difference of such records field by field, which prints whole keys.
    def __eq__(self, other: object) -> bool:
        return self.raw == other.raw if isinstance(other, Key) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.raw)

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
        """Make the private key of these 32 bytes, clamped (RFC 7748, section 5)."""
        return cls(bytes([raw[0] & 248, *raw[1:31], raw[31] & 127 | 64]))

    def public(self) -> Key:
        """The public key that belongs to this private key."""
        # Imported late, so that reading a configuration does not import a crypto library.
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: PLC0415

        return Key(X25519PrivateKey.from_private_bytes(self.raw).public_key().public_bytes_raw())

    @property
    def short(self) -> str:
        """`j0DFrbaP...=`: long enough to tell keys apart, too short to reveal a secret."""
        return f"{str(self)[:_KEY_SHOWN]}...="

    def __str__(self) -> str:
        return base64.b64encode(self.raw).decode()

    def __repr__(self) -> str:
        return f"Key({self.short})"


ZERO_KEY: Final = Key(bytes(KEY_SIZE))


class AllowedIP(NamedTuple):
    """One entry of allowed-ips. A tuple, because a device may have 130 560 of them.

    address: 4 or 16 bytes in network order, host bits as given. length: prefix length in bits.
    remove: remove this prefix from the peer instead of adding it (Linux 6.16, wireguard-go of May 2025).
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
        """AF_INET or AF_INET6."""
        return socket.AF_INET if len(self.address) == 4 else socket.AF_INET6  # noqa: PLR2004

    def __str__(self) -> str:
        """Print what `parse` reads."""
        sign = "-" if self.remove else ""
        return f"{sign}{socket.inet_ntop(self.family, self.address)}/{self.length}"

    def __repr__(self) -> str:
        return f"AllowedIP({self})"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A peer's endpoint: an IP address in canonical notation, a UDP port, an IPv6 scope id.

    scope: the index of an interface, or its name, in the node where the sockets of the WireGuard interface are.
    `Interface.set` resolves a name. States have an index: compare with `Endpoint.parse(text, node.index)`.
    """

    host: str
    port: int
    scope: int | str = 0

    @classmethod
    def parse(cls, text: str, scope_index: Callable[[str], int] | None = None) -> Self:
        """Read `1.2.3.4:5`, `[fe80::1%3]:5` or `[fe80::1%eth0]:5`, as `wg show` prints it.

        scope_index: returns the index of an interface, such as `node.index`; None keeps the name. Raises UsageError.
        """
        host, _, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        address, percent, scope = bare.partition("%")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            # An address has many spellings: use that of inet_ntop, as genl.py does for the kernel's answers.
            usual = socket.inet_ntop(family, socket.inet_pton(family, address))
            endpoint = cls(usual, int(port))
        except (ValueError, OSError) as error:
            raise UsageError(f"endpoint {text!r}: want ADDRESS:PORT, [ADDRESS]:PORT or [ADDRESS%SCOPE]:PORT") from error
        if not percent:
            return endpoint
        if family == socket.AF_INET or not scope:
            complaint = "an IPv4 address has no scope" if scope else "after % want an interface or its index"
            raise UsageError(f"endpoint {text!r}: {complaint}")
        scoped = replace(endpoint, scope=int(scope) if scope.isdecimal() else scope)
        return scoped if scope_index is None else scoped.resolve(scope_index)

    def resolve(self, scope_index: Callable[[str], int]) -> Self:
        """Return the endpoint with the index of the interface that its scope names; raises UsageError if unknown."""
        if isinstance(self.scope, int):
            return self
        try:
            return replace(self, scope=scope_index(self.scope))
        except (LookupError, OSError, ValueError) as error:
            raise UsageError(f"endpoint {self}: no interface {self.scope}") from error
        except UsageError as error:
            raise UsageError(f"endpoint {self}: {error}") from error

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def __str__(self) -> str:
        if self.family == socket.AF_INET:
            return f"{self.host}:{self.port}"
        return f"[{self.host}{f'%{self.scope}' if self.scope else ''}]:{self.port}"

    def __repr__(self) -> str:
        return f"Endpoint({self})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """Changes to one peer; None leaves a field as it is.

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

    def __repr__(self) -> str:
        changes = keyword_changes(self) | {"public_key": None}
        return f"PeerConfig({'; '.join([f'peer {self.public_key.short}', *_words(changes)])})"


class PeerChanges(TypedDict, total=False):
    """The fields of PeerConfig besides the key, as keyword arguments."""

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
    """Changes to a device; None leaves a field as it is.

    A private key of 32 zero bytes clears it; a listen port of 0 means a random one; a fwmark of 0 turns it off.
    """

    private_key: Key | None = None
    listen_port: int | None = None
    fwmark: int | None = None
    replace_peers: bool = False
    peers: tuple[PeerConfig, ...] = ()

    def __repr__(self) -> str:
        return f"DeviceConfig({'; '.join(_words(keyword_changes(self)))})"


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

    def __repr__(self) -> str:
        """`PeerState(peer j0DFrbaP...=; endpoint 127.0.0.1:2; transfer 92 B received, 148 B sent)`."""
        handshake, transfer = self.latest_handshake, (self.rx_bytes, self.tx_bytes)
        values = {
            "preshared_key": self.preshared_key,
            "endpoint": self.endpoint,
            "allowed_ips": self.allowed_ips or None,
            "latest_handshake": f"{handshake / _NANOSECONDS:.3f}" if handshake else None,
            "transfer": f"{transfer[0]} B received, {transfer[1]} B sent" if any(transfer) else None,
            "persistent_keepalive": self.persistent_keepalive or None,
            "protocol_version": self.protocol_version if self.protocol_version != 1 else None,
        }
        return f"PeerState({'; '.join([f'peer {self.public_key.short}', *_words(values)])})"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A device as the implementation reports it; `peers` in the order of the answer."""

    private_key: Key | None = None
    public_key: Key | None = None
    listen_port: int = 0
    fwmark: int = 0
    peers: tuple[PeerState, ...] = ()

    def __repr__(self) -> str:
        """`DeviceState(interface: public key j0DFrbaP...=; listening port 51820; peers hPg1Fr41...=)`."""
        values = {
            "private_key": self.private_key,
            "public_key": self.public_key,
            "listening_port": self.listen_port or None,
            "fwmark": self.fwmark or None,
            "peers": self.peers or None,
        }
        return f"DeviceState(interface: {'; '.join(_words(values)) or '(none)'})"

    def peer(self, public_key: Key) -> PeerState:
        """Return the peer with this public key; raises UsageError that lists the keys of all peers."""
        for peer in self.peers:
            if peer.public_key == public_key:
                return peer
        known = ", ".join(str(peer.public_key) for peer in self.peers) or "none"
        raise UsageError(f"no peer {public_key}; there are: {known}")


def allowed_ips(*texts: str) -> tuple[AllowedIP, ...]:
    """Read several allowed-ips at once: `allowed_ips("10.0.0.0/8", "fd00::/112")`."""
    return tuple(AllowedIP.parse(text) for text in texts)


def keyword_changes(record: DeviceConfig | PeerConfig) -> dict[str, object]:
    """Return the fields of a configuration record that change something, by name."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    # By identity: 0 equals False, but a listen port of 0 is a change.
    return {name: value for name, value in values.items() if value is not None and value is not False and value != ()}


def _words(values: Mapping[str, object]) -> list[str]:
    """Format the fields that are not None in the words of `wg show`."""
    return [_word(name, value) for name, value in values.items() if value is not None]


def _word(name: str, value: object) -> str:
    field = name.replace("_", " ")
    match value:
        case True:
            return field
        case Key():
            return f"{field} {value.short}"
        case tuple():
            texts = [entry.public_key.short if isinstance(entry, PeerConfig | PeerState) else entry for entry in value]
            more = f" and {len(texts) - _ENTRIES_SHOWN} more" if len(texts) > _ENTRIES_SHOWN else ""
            return f"{field} {', '.join(map(str, texts[:_ENTRIES_SHOWN]))}{more}"
    if name == "fwmark":
        return f"fwmark 0x{value:x}"
    return f"{field} every {value} seconds" if name == "persistent_keepalive" and value else f"{field} {value}"
