"""Define what a scripted peer sends: one record per message, whose fields are overrides.

A record without overrides is what a correct peer sends. Fields have the names of section 5.4 of the whitepaper. Each
record can also change the bytes as a whole: `prefix` replaces the first bytes, `cut` and `suffix` change the length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

if TYPE_CHECKING:
    from refwg.noise import Keypair, Transcript

# All encodings of points of small order, from https://cr.yp.to/ecdh.html#validate: 0, 1, the two of order 8, p-1, p
# and p+1. A Diffie-Hellman result with one of them is 32 zero bytes, whatever the private key is.
LOW_ORDER_POINTS: Final = tuple(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


class Answerable(Protocol):
    """A handshake message of the device, to which a cookie reply may be sent."""

    @property
    def sender_index(self) -> int:
        """The index that the device has chosen."""

    @property
    def mac1(self) -> bytes:
        """To which the reply is bound."""


class Opened(Answerable, Protocol):
    """An initiation of the device, decrypted: what a response needs of it."""

    @property
    def ephemeral(self) -> bytes:
        """The device's ephemeral public key."""

    @property
    def static(self) -> bytes:
        """The device's static public key."""

    @property
    def transcript(self) -> Transcript:
        """The state after the initiation."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Outgoing:
    """What all messages have in common.

    prefix: bytes that replace the first ones, such as type and reserved bytes; the macs cover them.
    cut: the length to which the whole message is cut. suffix: bytes added at its end. tos: the outer
    IPv4 TOS or IPv6 traffic class, DSCP and ECN together.
    """

    prefix: bytes = b""
    cut: int | None = None
    suffix: bytes = b""
    tos: int = 0

    def __repr__(self) -> str:
        """`Initiation(timestamp, mac1)`: the names of its overrides."""
        return f"{type(self).__name__}({', '.join(self.overrides())})"

    def overrides(self) -> list[str]:
        """Return the names of the fields that a correct peer would not set."""
        return [
            item.name
            for item in fields(self)
            if item.name not in {"to", "keypair", "plaintext", "counter", "tos"}
            and getattr(self, item.name) not in (None, b"")
        ]

    def correct(self) -> Self:
        """Return the record of what a correct peer would send in its place."""
        without: dict[str, Any] = {name: b"" if name in {"prefix", "suffix"} else None for name in self.overrides()}
        return replace(self, **without)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Handshake(Outgoing):
    """What both handshake messages have in common.

    ephemeral_private: 32 bytes, clamped like those of a correct peer. ephemeral: the public key that is sent, whatever
    the private one is; a point of low order makes the peer compute with the zero results that a receiver without the
    check would get. sender_index: of this handshake. static_private: 32 bytes, in place of the peer's own.
    mac1, mac2: 16 bytes sent as they are. mac1_recipient: the public key for whose owner mac1 is made. cookie: 16 bytes
    with which mac2 is made, in place of a cookie that the peer has; `b""` keeps the peer's own rule.
    """

    ephemeral_private: bytes | None = None
    ephemeral: bytes | None = None
    static_private: bytes | None = None
    sender_index: int | None = None
    mac1: bytes | None = None
    mac2: bytes | None = None
    mac1_recipient: bytes | None = None
    cookie: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Initiation(_Handshake):
    """First message of a handshake (5.4.2).

    timestamp: 12 bytes, see `timestamp`. static: the public key that is encrypted, in place of that of the private key.
    hash: 32 bytes, in place of the transcript hash after the responder's key. responder_static: the public key to which
    the transcript belongs. es, ss: 32 bytes in place of a Diffie-Hellman result. encrypted_static,
    encrypted_timestamp: 48 and 28 bytes sent as they are.
    """

    timestamp: bytes | None = None
    static: bytes | None = None
    hash: bytes | None = None
    responder_static: bytes | None = None
    es: bytes | None = None
    ss: bytes | None = None
    encrypted_static: bytes | None = None
    encrypted_timestamp: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Response(_Handshake):
    """Second message of a handshake (5.4.3), and what to expect after an initiation.

    to: the initiation of the device that it answers. receiver_index, preshared_key, hash (after the initiation): in
    place of the right ones. ee, se: 32 bytes in place of a Diffie-Hellman result. payload: bytes in place of the empty
    payload. encrypted_nothing: 16 bytes sent as they are.
    """

    to: Opened
    receiver_index: int | None = None
    preshared_key: bytes | None = None
    hash: bytes | None = None
    ee: bytes | None = None
    se: bytes | None = None
    payload: bytes | None = None
    encrypted_nothing: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CookieReply(Outgoing):
    """Answer to a handshake message under load (5.4.7), and what to expect when the device is under load.

    to: the device's message that it answers. value: the cookie, 16 bytes; default: random. receiver_index, nonce (24
    bytes): in place of the right ones. mac1: the associated data, in place of the mac1 of `to`. issuer: the public key
    of whose owner the reply pretends to be. encrypted_cookie: 32 bytes sent as they are.
    """

    to: Answerable
    value: bytes | None = None
    receiver_index: int | None = None
    nonce: bytes | None = None
    mac1: bytes | None = None
    issuer: bytes | None = None
    encrypted_cookie: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Data(Outgoing):
    """Transport data (5.4.6); made by `Session.data`, and what to expect on a session.

    plaintext: what is encrypted, padding included. counter: of the header and of the nonce. nonce: the counter of the
    nonce, if that of the header is another. receiver_index: in place of the session's. ciphertext: sent as it is.
    """

    keypair: Keypair
    plaintext: bytes
    counter: int
    nonce: int | None = None
    receiver_index: int | None = None
    ciphertext: bytes | None = None

    def __repr__(self) -> str:
        """`Data(counter 5, 32 bytes)`, with the names of its overrides."""
        words = [f"counter {self.counter}", f"{len(self.plaintext)} bytes", *self.overrides()]
        return f"{type(self).__name__}({', '.join(words)})"


class Keepalive(Data):
    """What to expect: transport data with an empty plaintext; `Session.keepalive` makes one."""
