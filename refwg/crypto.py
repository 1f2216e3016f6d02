"""Wrap the primitives of the protocol; no other file imports `cryptography`.

Mirrors what the driver uses of lib/crypto; section 5.4 of the paper. BLAKE2s comes from the standard library.
`cryptography` has no HChaCha20, so it is computed from the keystream of ChaCha20.
"""

from __future__ import annotations

import hmac
from hashlib import blake2s
from struct import Struct
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from refwg.errors import InvalidArgument, LowOrderPoint, NotAuthentic
from refwg.messages import COOKIE_LENGTH, COOKIE_NONCE_LENGTH, ZERO_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable

    Buffer = bytes | bytearray | memoryview

_NONCE: Final = Struct("<LQ")
_CHACHA_STATE: Final = Struct("<16L")
_CHACHA_CONSTANTS: Final = Struct("<4L").unpack(b"expand 32-byte k")
_HCHACHA_NONCE_LENGTH: Final = 16
# The two pads of HMAC (RFC 2104), as tables for `bytes.translate`: each byte of the key is combined by exclusive or.
_INNER_PAD: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER_PAD: Final = bytes(byte ^ 0x5C for byte in range(256))


def blake2s_hash(*parts: bytes) -> bytes:
    """HASH of the paper: the 32-byte BLAKE2s digest of the concatenation of `parts`."""
    state = blake2s()
    for part in parts:
        state.update(part)
    return state.digest()


def mac(key: bytes, *parts: bytes) -> bytes:
    """MAC of the paper: keyed BLAKE2s with a 16-byte digest; neither HMAC nor a truncated 32-byte digest."""
    state = blake2s(key=key, digest_size=COOKIE_LENGTH)
    for part in parts:
        state.update(part)
    return state.digest()


def same(left: bytes, right: bytes) -> bool:
    """Return True if both are equal; the time it takes does not depend on where they differ."""
    return hmac.compare_digest(left, right)


def hmac_blake2s(key: bytes, data: bytes) -> bytes:
    """HMAC of the paper: RFC 2104 over BLAKE2s, 32 bytes; only `kdf` uses it, with keys of up to 64 bytes.

    `hmac.new` of the standard library computes the same in twice the time, and a handshake needs it 23 times.
    """
    block = key.ljust(blake2s.MAX_KEY_SIZE * 2, b"\0")
    inner = blake2s(block.translate(_INNER_PAD) + data).digest()
    return blake2s(block.translate(_OUTER_PAD) + inner).digest()


def kdf(outputs: int, key: bytes, data: bytes) -> tuple[bytes, ...]:
    """KDF1 to KDF3 of the paper, HKDF with `key` as salt and no info: the first `outputs` keys of 32 bytes."""
    secret = hmac_blake2s(key, data)
    keys: list[bytes] = []
    for number in range(1, outputs + 1):
        previous = keys[-1] if keys else b""
        keys.append(hmac_blake2s(secret, previous + bytes([number])))
    return tuple(keys)


def clamp(private_key: bytes) -> bytes:
    """Turn 32 random bytes into an X25519 scalar (RFC 7748, section 5)."""
    key = bytearray(private_key)
    key[0] &= 0b1111_1000
    key[31] = key[31] & 0b0111_1111 | 0b0100_0000
    return bytes(key)


class PrivateKey:
    """An X25519 private key and its public key, 32 bytes each; `raw` is the private key, clamped.

    OpenSSL computes the public key whenever it reads a private key, which takes as long as `dh`. So a key that is used
    more than once is kept as an object.
    """

    __slots__ = ("_key", "public", "raw")

    def __init__(self, private_key: bytes) -> None:
        self.raw = clamp(private_key)
        self._key = X25519PrivateKey.from_private_bytes(self.raw)
        self.public = self._key.public_key().public_bytes_raw()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrivateKey) and same(self.raw, other.raw)

    def __hash__(self) -> int:
        return hash(self.public)

    def dh(self, public_key: bytes) -> bytes:
        """DH of the paper: X25519, 32 bytes; raises LowOrderPoint if the result is zero (RFC 7748, section 6.1)."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError as error:
            raise LowOrderPoint("the shared secret is zero") from error


def public_key_of(private_key: bytes) -> bytes:
    """Return the X25519 public key of a private key, 32 bytes each."""
    return PrivateKey(private_key).public


def dh(private_key: bytes, public_key: bytes) -> bytes:
    """Return `PrivateKey.dh` for a private key that is used once."""
    return PrivateKey(private_key).dh(public_key)


class Aead:
    """AEAD of the paper: ChaCha20-Poly1305 (RFC 8439) with one 32-byte key.

    A counter becomes the nonce: four zero bytes, then the counter as 64 bits, little-endian. key: kept for workers.
    """

    __slots__ = ("_cipher", "key")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._cipher = ChaCha20Poly1305(key)

    def seal(self, counter: int, plaintext: bytes, associated_data: bytes | None = None) -> bytes:
        """Encrypt; returns the ciphertext with its 16-byte tag. A counter must not be used twice with a key."""
        return self._cipher.encrypt(_NONCE.pack(0, counter), plaintext, associated_data)

    def open(self, counter: int, ciphertext: bytes, associated_data: bytes | None = None) -> bytes:
        """Decrypt; ciphertext: with its tag. Raises NotAuthentic if the tag does not verify."""
        return self.open_with(_NONCE.pack(0, counter), ciphertext, associated_data)

    def seal_each(
        self, nonces: Iterable[Buffer], plaintexts: Iterable[Buffer], ciphertexts: Iterable[memoryview]
    ) -> None:
        """Encrypt many packets, each into a buffer of its length and 16 bytes more, which may begin where it does."""
        encrypt_into = self._cipher.encrypt_into
        for nonce, plaintext, ciphertext in zip(nonces, plaintexts, ciphertexts, strict=False):
            encrypt_into(nonce, plaintext, None, ciphertext)

    def open_each(
        self, nonces: Iterable[Buffer], ciphertexts: Iterable[Buffer], plaintexts: Iterable[memoryview]
    ) -> list[int]:
        """Decrypt many packets, each into a buffer that may be its own; returns which of them do not verify.

        The buffer of a packet that does not verify holds anything.
        """
        decrypt_into = self._cipher.decrypt_into
        failed = []
        for number, (nonce, ciphertext, plaintext) in enumerate(zip(nonces, ciphertexts, plaintexts, strict=False)):
            try:
                decrypt_into(nonce, ciphertext, None, plaintext)
            except InvalidTag:
                failed.append(number)
        return failed

    def seal_with(self, nonce: bytes, plaintext: bytes, associated_data: bytes | None) -> bytes:
        """Encrypt with a nonce of 12 bytes instead of a counter."""
        return self._cipher.encrypt(nonce, plaintext, associated_data)

    def open_with(self, nonce: bytes, ciphertext: bytes, associated_data: bytes | None) -> bytes:
        """Decrypt with a nonce of 12 bytes; raises NotAuthentic if the tag does not verify."""
        try:
            return self._cipher.decrypt(nonce, ciphertext, associated_data)
        except InvalidTag as error:
            raise NotAuthentic("the tag does not verify") from error


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """Derive a 32-byte subkey from a key and a nonce of 16 bytes.

    A ChaCha20 block is the permuted state plus the initial state. HChaCha20 is the first and last row of the permuted
    state alone. So this function subtracts the initial values: the constants in the first row, the nonce in the last.
    """
    block = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(_CHACHA_STATE.size))
    words = _CHACHA_STATE.unpack(block)
    initial = _CHACHA_CONSTANTS + Struct("<4L").unpack(nonce)
    permuted = words[:4] + words[12:]
    return Struct("<8L").pack(*((word - start) & 0xFFFF_FFFF for word, start in zip(permuted, initial, strict=True)))


def xseal(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    """XAEAD of the paper: encrypt with XChaCha20-Poly1305, whose nonce of 24 bytes is long enough to be random."""
    subkey, inner_nonce = _extended(key, nonce)
    return Aead(subkey).seal_with(inner_nonce, plaintext, associated_data)


def xopen(key: bytes, nonce: bytes, ciphertext: bytes, associated_data: bytes) -> bytes:
    """Decrypt what `xseal` has encrypted; raises NotAuthentic if the tag does not verify."""
    subkey, inner_nonce = _extended(key, nonce)
    return Aead(subkey).open_with(inner_nonce, ciphertext, associated_data)


def _extended(key: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    if len(nonce) != COOKIE_NONCE_LENGTH:
        raise InvalidArgument(f"nonce of {len(nonce)} bytes: XChaCha20 needs {COOKIE_NONCE_LENGTH}")
    return hchacha20(key, nonce[:_HCHACHA_NONCE_LENGTH]), bytes(4) + nonce[_HCHACHA_NONCE_LENGTH:]


def load() -> None:
    """Use every primitive once, so that `cryptography` imports all of its parts now.

    It imports some of them on first use. After a change of user the process may not be allowed to read their files.
    """
    key = bytes(range(32))
    dh(key, public_key_of(key))
    xopen(key, bytes(24), xseal(key, bytes(24), b"", b""), b"")
    mac(key, b"")
    kdf(1, key, b"")


def is_zero(key: bytes) -> bool:
    """Return True for 32 zero bytes, which mean "no key" in a configuration."""
    return same(key, ZERO_KEY)
