"""Open handshake messages with static keys, by code that shares nothing with refwg's.

The oracle judges refwg too, so it must not compute with refwg's code. Sources: the whitepaper, sections 5.4.1 to 5.4.7;
the Noise specification, revision 34; draft-irtf-cfrg-xchacha-03, section 2.2, for HChaCha20.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from functools import cache
from hashlib import blake2s
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from harness.wire.messages import FIELDS, INITIATION, RESPONSE

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHAINING_KEY: Final = blake2s(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s").digest()
_HASH: Final = blake2s(_CHAINING_KEY + b"WireGuard v1 zx2c4 Jason@zx2c4.com").digest()
_NONCE: Final = bytes(12)
_MAC: Final = 16
_XNONCE: Final = 16
_WORDS: Final = struct.Struct("<16L")
_SIGMA: Final = b"expand 32-byte k"
# Initiations whose contents are remembered.
_MOST_OPENED: Final = 1024


def fields(kind: int, payload: bytes) -> Mapping[str, bytes]:
    """Return the fields of a message of this type by their names in FIELDS."""
    return {name: payload[start:end] for name, (start, end) in FIELDS[kind].items()}


def index(payload: bytes) -> int:
    """Return the first index of a message: the receiver's in data and cookie replies, else the sender's."""
    return int.from_bytes(payload[4:8], "little")


def receiver(response: bytes) -> int:
    """Return the index of a response that the initiator has chosen."""
    return int.from_bytes(response[8:12], "little")


def mac(key: bytes, data: bytes) -> bytes:
    """MAC(key, data): keyed BLAKE2s of 16 bytes (5.4)."""
    return blake2s(data, key=key, digest_size=_MAC).digest()


@cache
def mac1_key(recipient: bytes) -> bytes:
    """Return the key of mac1 in messages to this public key (5.4.4)."""
    return blake2s(b"mac1----" + recipient).digest()


def has_mac1(payload: bytes, recipient: bytes) -> bool:
    """Return whether mac1 of an initiation or response is the one for this public key (5.4.4)."""
    return mac(mac1_key(recipient), payload[: -2 * _MAC]) == payload[-2 * _MAC : -_MAC]


def has_mac2(payload: bytes, cookie: bytes) -> bool:
    """Return whether mac2 of an initiation or response is the one with this cookie (5.4.4)."""
    return mac(cookie, payload[:-_MAC]) == payload[-_MAC:]


def kdf(key: bytes, data: bytes, count: int) -> list[bytes]:
    """KDF1, KDF2 or KDF3 (5.4): HKDF with HMAC-BLAKE2s."""
    secret = hmac.digest(key, data, "blake2s")
    made: list[bytes] = []
    for number in range(1, count + 1):
        made.append(hmac.digest(secret, (made[-1] if made else b"") + bytes([number]), "blake2s"))
    return made


@dataclass(frozen=True, slots=True)
class Opened:
    """What an initiation says under encryption, and the chaining key and hash after it.

    static: the initiator's public key. timestamp: 12 bytes; None if it does not authenticate.
    """

    static: bytes
    timestamp: bytes | None
    chaining_key: bytes = b""
    hash: bytes = b""


class Static:
    """A static private key, with its public key.

    `shared` is cached: a lab has few pairs of static keys. So are the last initiations, which a flood may repeat.
    """

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()
        self._shared: dict[bytes, bytes] = {}
        self._opened: dict[bytes, Opened | None] = {}

    def exchange(self, public: bytes) -> bytes:
        """DH(private, public): X25519; 32 zero bytes for a point of low order."""
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            return bytes(32)

    def shared(self, public: bytes) -> bytes:
        """Return `exchange` with another static key, from a cache."""
        if public not in self._shared:
            self._shared[public] = self.exchange(public)
        return self._shared[public]

    def open_initiation(self, payload: bytes) -> Opened | None:
        """Open an initiation to this key (5.4.2); None if its static key does not authenticate."""
        if payload not in self._opened:
            if len(self._opened) >= _MOST_OPENED:
                del self._opened[next(iter(self._opened))]
            self._opened[payload] = self._open_initiation(payload)
        return self._opened[payload]

    def _open_initiation(self, payload: bytes) -> Opened | None:
        message = fields(INITIATION, payload)
        ephemeral, sealed = message["ephemeral"], message["static"]
        digest = blake2s(blake2s(_HASH + self.public).digest() + ephemeral).digest()
        (chain,) = kdf(_CHAINING_KEY, ephemeral, 1)
        chain, key = kdf(chain, self.exchange(ephemeral), 2)
        static = open_sealed(key, sealed, digest)
        if static is None:
            return None
        digest = blake2s(digest + sealed).digest()
        chain, key = kdf(chain, self.shared(static), 2)
        timestamp = open_sealed(key, message["timestamp"], digest)
        return Opened(static, timestamp, chain, blake2s(digest + message["timestamp"]).digest())


@cache
def static_key(private: bytes) -> Static:
    """Return the key of these 32 bytes; the same object for equal bytes."""
    return Static(private)


def open_response(
    opened: Opened, payload: bytes, shared: tuple[bytes, bytes], preshared_key: bytes
) -> tuple[bytes, bytes] | None:
    """Open the response to an initiation (5.4.3, 5.4.5); None if its empty field does not authenticate.

    opened: the initiation. shared: the secrets that the responder's ephemeral key has with the initiator's ephemeral
    and with its static key; either side can compute them. Returns the transport keys from initiator to responder, and
    back.
    """
    message = fields(RESPONSE, payload)
    (chain,) = kdf(opened.chaining_key, message["ephemeral"], 1)
    for secret in shared:
        (chain,) = kdf(chain, secret, 1)
    chain, mixed, key = kdf(chain, preshared_key, 3)
    digest = blake2s(blake2s(opened.hash + message["ephemeral"]).digest() + mixed).digest()
    if open_sealed(key, message["nothing"], digest) is None:
        return None
    to_responder, to_initiator = kdf(chain, b"", 2)
    return to_responder, to_initiator


def open_cookie_reply(payload: bytes, issuer: bytes, mac1: bytes) -> bytes | None:
    """Return the cookie of a cookie reply (5.4.7); None if it does not authenticate.

    issuer: the public key of its sender. mac1: of the message that it answers.
    """
    nonce, sealed = payload[8:32], payload[32:]
    subkey = _hchacha20(blake2s(b"cookie--" + issuer).digest(), nonce[:_XNONCE])
    return open_sealed(subkey, sealed, mac1, bytes(4) + nonce[_XNONCE:])


def open_sealed(key: bytes, sealed: bytes, data: bytes, nonce: bytes = _NONCE) -> bytes | None:
    """Decrypt by ChaCha20-Poly1305 with additional data (5.4); None if it does not authenticate."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, data)
    except InvalidTag:
        return None


def _hchacha20(key: bytes, nonce: bytes) -> bytes:
    """HChaCha20: a block of ChaCha20 without the addition of the first state at its end (2.2)."""
    block = Cipher(ChaCha20(key, nonce), None).encryptor().update(bytes(64))
    start = _WORDS.unpack(_SIGMA + key + nonce)
    words = [(after - before) & 0xFFFF_FFFF for after, before in zip(_WORDS.unpack(block), start, strict=True)]
    return struct.pack("<8L", *words[:4], *words[12:])
