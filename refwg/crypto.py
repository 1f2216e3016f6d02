"""Wrap the primitives of the protocol; no other file imports `cryptography`.

Mirrors what the driver takes from lib/crypto; section 5.4 of the paper. BLAKE2s and HMAC come from the standard
library; HChaCha20, which `cryptography` does not offer, is taken from the keystream of ChaCha20.
"""

from __future__ import annotations

import hmac
from hashlib import blake2s
from struct import Struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from refwg.errors import LowOrderPoint, NotAuthentic
from refwg.messages import COOKIE_LENGTH, COOKIE_NONCE_LENGTH, ZERO_KEY

_NONCE: Final = Struct("<LQ")
_CHACHA_STATE: Final = Struct("<16L")
_CHACHA_CONSTANTS: Final = Struct("<4L").unpack(b"expand 32-byte k")
_HCHACHA_NONCE_LENGTH: Final = 16


def blake2s_hash(*parts: bytes) -> bytes:
    """HASH of the paper, over the concatenation of `parts`."""
    state = blake2s()
    for part in parts:
        state.update(part)
    return state.digest()


def mac(key: bytes, *parts: bytes) -> bytes:
    """MAC of the paper: BLAKE2s in its own keyed mode, 16 bytes long; not HMAC, not a longer digest cut short."""
    state = blake2s(key=key, digest_size=COOKIE_LENGTH)
    for part in parts:
        state.update(part)
    return state.digest()


def same(left: bytes, right: bytes) -> bool:
    """Compare secrets in a time that does not depend on where they differ."""
    return hmac.compare_digest(left, right)


def hmac_blake2s(key: bytes, data: bytes) -> bytes:
    """HMAC of the paper; used inside the key derivation and nowhere else."""
    return hmac.new(key, data, blake2s).digest()


def kdf(outputs: int, key: bytes, data: bytes) -> tuple[bytes, ...]:
    """KDF1 to KDF3 of the paper (HKDF with `key` as salt and no info): the first `outputs` keys."""
    secret = hmac_blake2s(key, data)
    keys: list[bytes] = []
    for number in range(1, outputs + 1):
        previous = keys[-1] if keys else b""
        keys.append(hmac_blake2s(secret, previous + bytes([number])))
    return tuple(keys)


def clamp(private_key: bytes) -> bytes:
    """Make 32 random bytes a scalar as RFC 7748 wants it."""
    key = bytearray(private_key)
    key[0] &= 0b1111_1000
    key[31] = key[31] & 0b0111_1111 | 0b0100_0000
    return bytes(key)


def public_key_of(private_key: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def dh(private_key: bytes, public_key: bytes) -> bytes:
    """X25519; a result of 32 zero bytes raises LowOrderPoint, because the other side could force it."""
    try:
        return X25519PrivateKey.from_private_bytes(private_key).exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:
        raise LowOrderPoint("the shared secret is zero") from error


class Aead:
    """ChaCha20-Poly1305 under one key; for all but cookies the nonce is four zero bytes and the counter."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)

    def seal(self, counter: int, plaintext: bytes, associated_data: bytes | None = None) -> bytes:
        return self.seal_with(_NONCE.pack(0, counter), plaintext, associated_data)

    def open(self, counter: int, ciphertext: bytes, associated_data: bytes | None = None) -> bytes:
        return self.open_with(_NONCE.pack(0, counter), ciphertext, associated_data)

    def seal_with(self, nonce: bytes, plaintext: bytes, associated_data: bytes | None) -> bytes:
        return self._cipher.encrypt(nonce, plaintext, associated_data)

    def open_with(self, nonce: bytes, ciphertext: bytes, associated_data: bytes | None) -> bytes:
        try:
            return self._cipher.decrypt(nonce, ciphertext, associated_data)
        except InvalidTag as error:
            raise NotAuthentic("the tag does not verify") from error


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """Derive a subkey from a key and 16 bytes of nonce.

    ChaCha20 adds its initial state to the permuted one; HChaCha20 is the permuted state without that addition, so
    the eight words wanted are had by taking it away again: those where constants (first row) and nonce (last) stood.
    """
    block = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(_CHACHA_STATE.size))
    words = _CHACHA_STATE.unpack(block)
    initial = _CHACHA_CONSTANTS + Struct("<4L").unpack(nonce)
    permuted = words[:4] + words[12:]
    return Struct("<8L").pack(*((word - start) & 0xFFFF_FFFF for word, start in zip(permuted, initial, strict=True)))


def xseal(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    """XAEAD of the paper: XChaCha20-Poly1305, whose 24 bytes of nonce may be drawn at random."""
    subkey, inner_nonce = _extended(key, nonce)
    return Aead(subkey).seal_with(inner_nonce, plaintext, associated_data)


def xopen(key: bytes, nonce: bytes, ciphertext: bytes, associated_data: bytes) -> bytes:
    subkey, inner_nonce = _extended(key, nonce)
    return Aead(subkey).open_with(inner_nonce, ciphertext, associated_data)


def _extended(key: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    if len(nonce) != COOKIE_NONCE_LENGTH:
        raise ValueError(f"nonce of {len(nonce)} bytes: XChaCha20 takes {COOKIE_NONCE_LENGTH}")
    return hchacha20(key, nonce[:_HCHACHA_NONCE_LENGTH]), bytes(4) + nonce[_HCHACHA_NONCE_LENGTH:]


def load() -> None:
    """Use every primitive once: `cryptography` imports its parts at their first use, which may come too late.

    A process that has become another user may not be able to read them any more.
    """
    key = bytes(range(32))
    dh(key, public_key_of(key))
    xopen(key, bytes(24), xseal(key, bytes(24), b"", b""), b"")
    mac(key, b"")
    kdf(1, key, b"")


def is_zero(key: bytes) -> bool:
    """Whether a configured key means "none"."""
    return same(key, ZERO_KEY)
