"""Check the primitives against RFC 7693, 7748 and 8439 written out, and OpenSSL."""

from __future__ import annotations

from struct import pack, unpack
from typing import Final

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import BLAKE2s, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.scripted.intents import LOW_ORDER_POINTS
from refwg.crypto import Aead, blake2s_hash, clamp, dh, hchacha20, kdf, mac, public_key_of, xopen, xseal
from refwg.errors import LowOrderPoint, NotAuthentic
from selftests.support.strategies import exactly, flip, keys
from selftests.vectors import witness

# The primes of Curve25519 (RFC 7748, 4.1) and of Poly1305 (RFC 8439, 2.5).
P_25519: Final = 2**255 - 19
P_1305: Final = 2**130 - 5
A24: Final = 121665
BASE_POINT: Final = (9).to_bytes(32, "little")
# RFC 7693, 2.6 and 2.7.
BLAKE2S_IV: Final = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
BLAKE2S_BLOCK: Final = 64
SIGMA: Final = (
    "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
    "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
)  # fmt: skip
WORD: Final = 2**32 - 1

# Pure Python takes a millisecond for a block or a point.
slow = settings(max_examples=25)
texts = st.binary(max_size=150)


def blake2s(message: bytes, key: bytes = b"", size: int = 32) -> bytes:
    """RFC 7693, 3.3."""
    data = (key.ljust(BLAKE2S_BLOCK, b"\0") if key else b"") + message
    blocks = [data[at : at + BLAKE2S_BLOCK] for at in range(0, len(data), BLAKE2S_BLOCK)] or [b""]
    state = [BLAKE2S_IV[0] ^ 0x0101_0000 ^ len(key) << 8 ^ size, *BLAKE2S_IV[1:]]
    for number, block in enumerate(blocks, 1):
        is_last = number == len(blocks)
        state = blake2s_compress(state, block, len(data) if is_last else number * BLAKE2S_BLOCK, is_last=is_last)
    return pack("<8L", *state)[:size]


def blake2s_compress(state: list[int], block: bytes, offset: int, *, is_last: bool) -> list[int]:
    """RFC 7693, 3.2."""
    words = unpack("<16L", block.ljust(BLAKE2S_BLOCK, b"\0"))
    v = [*state, *BLAKE2S_IV]
    v[12] ^= offset
    v[14] ^= WORD if is_last else 0
    for row in SIGMA:
        order = [words[int(digit, 16)] for digit in row]
        for number, (a, b, c, d) in enumerate(witness.COLUMNS_AND_DIAGONALS):
            for word, (right, left) in zip(order[2 * number : 2 * number + 2], ((16, 12), (8, 7)), strict=True):
                v[a] = (v[a] + v[b] + word) & WORD
                v[d] = rotated(v[d] ^ v[a], right)
                v[c] = (v[c] + v[d]) & WORD
                v[b] = rotated(v[b] ^ v[c], left)
    return [old ^ low ^ high for old, low, high in zip(state, v[:8], v[8:], strict=True)]


def rotated(word: int, bits: int) -> int:
    return (word >> bits | word << 32 - bits) & WORD


def scalar_of(private: bytes) -> int:
    """RFC 7748, 5: decodeScalar25519."""
    return int.from_bytes(private, "little") % 2**254 // 8 * 8 + 2**254


def x25519(private: bytes, public: bytes) -> bytes:
    """RFC 7748, 5: the Montgomery ladder."""
    scalar = scalar_of(private)
    x1 = int.from_bytes(public, "little") & (1 << 255) - 1
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in range(254, -1, -1):
        if scalar >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a % P_25519, c * b % P_25519
        x3, z3 = (da + cb) ** 2 % P_25519, x1 * (da - cb) ** 2 % P_25519
        x2, z2 = aa * bb % P_25519, (aa - bb) * (aa + A24 * (aa - bb)) % P_25519
        if scalar >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, P_25519 - 2, P_25519) % P_25519).to_bytes(32, "little")


def chacha20_poly1305(key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
    """RFC 8439, 2.8, over the bare stream cipher of OpenSSL."""

    def stream(block: int, data: bytes) -> bytes:
        return Cipher(ChaCha20(key, pack("<L", block) + nonce), mode=None).encryptor().update(data)

    ciphertext = stream(1, plaintext)
    padded = b"".join(part + bytes(-len(part) % 16) for part in (associated_data, ciphertext))
    authenticated = padded + pack("<QQ", len(associated_data), len(ciphertext))
    one_time_key = stream(0, bytes(32))
    r = int.from_bytes(one_time_key[:16], "little") & 0x0FFFFFFC_0FFFFFFC_0FFFFFFC_0FFFFFFF
    total = 0
    for at in range(0, len(authenticated), 16):
        total = (total + int.from_bytes(authenticated[at : at + 16] + b"\1", "little")) * r % P_1305
    return ciphertext + (total + int.from_bytes(one_time_key[16:], "little") & (1 << 128) - 1).to_bytes(16, "little")


@pytest.mark.requirement("CR-03")
@given(st.lists(texts, max_size=4))
def test_hash_of_parts_is_blake2s_of_their_concatenation(parts: list[bytes]) -> None:
    openssl = Hash(BLAKE2s(32))
    openssl.update(b"".join(parts))
    assert blake2s_hash(*parts) == openssl.finalize()


@slow
@pytest.mark.requirement("CR-03", "CR-04")
@example(b"k" * 32, b"m" * 64, b"")
@given(st.binary(min_size=1, max_size=32), texts, texts)
def test_mac_is_keyed_blake2s_of_rfc_7693(key: bytes, first: bytes, second: bytes) -> None:
    assert mac(key, first, second) == blake2s(first + second, key, 16)
    assert blake2s_hash(first, second) == blake2s(first + second)


@pytest.mark.requirement("CR-05", "CR-06")
@given(st.binary(max_size=100), texts, st.integers(1, 3))
def test_kdf_is_hkdf_of_openssl(key: bytes, data: bytes, outputs: int) -> None:
    expected = HKDF(BLAKE2s(32), length=32 * outputs, salt=key, info=None).derive(data)
    assert kdf(outputs, key, data) == tuple(expected[at : at + 32] for at in range(0, len(expected), 32))


# Includes points of small order, and one at or above the prime, which X25519 reduces.
public_keys = st.one_of(keys, st.sampled_from(LOW_ORDER_POINTS), st.just(b"\xff" * 32))


@slow
@pytest.mark.requirement("CR-09", "CR-18")
@given(keys, public_keys, st.booleans())
def test_dh_is_x25519_of_rfc_7748_and_refuses_zero(private: bytes, public: bytes, is_masked_bit_set: bool) -> None:
    public = flip(public, 255) if is_masked_bit_set else public
    shared = x25519(private, public)
    if any(shared):
        assert dh(private, public) == shared
    else:
        with pytest.raises(LowOrderPoint):
            dh(private, public)


@pytest.mark.requirement("CR-18")
@given(keys)
def test_clamped_key_is_scalar_of_rfc_7748(private: bytes) -> None:
    assert clamp(private) == scalar_of(private).to_bytes(32, "little")


@slow
@pytest.mark.requirement("CR-09", "CR-18")
@given(keys, keys)
def test_public_key_and_shared_secret_do_not_depend_on_clamp(first: bytes, second: bytes) -> None:
    assert public_key_of(first) == public_key_of(clamp(first)) == x25519(first, BASE_POINT)
    assert dh(first, public_key_of(second)) == dh(clamp(second), public_key_of(first))


@pytest.mark.requirement("CR-07")
@given(keys, st.integers(0, 2**64 - 1), texts, st.one_of(st.none(), texts))
def test_aead_is_chacha20_poly1305_of_rfc_8439(
    key: bytes, counter: int, plaintext: bytes, associated_data: bytes | None
) -> None:
    sealed = chacha20_poly1305(key, bytes(4) + pack("<Q", counter), plaintext, associated_data or b"")
    assert Aead(key).seal(counter, plaintext, associated_data) == sealed
    assert Aead(key).open(counter, sealed, associated_data) == plaintext


@pytest.mark.requirement("CR-08")
@given(keys, exactly(24), texts, texts)
def test_xaead_is_xchacha20_poly1305_of_draft(
    key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes
) -> None:
    subkey = witness.hchacha20(key, nonce[:16])
    assert hchacha20(key, nonce[:16]) == subkey
    sealed = chacha20_poly1305(subkey, bytes(4) + nonce[16:], plaintext, associated_data)
    assert xseal(key, nonce, plaintext, associated_data) == sealed
    assert xopen(key, nonce, sealed, associated_data) == plaintext


@pytest.mark.requirement("CR-07", "CR-08")
@given(keys, exactly(24), texts, st.binary(min_size=1, max_size=50), st.data())
def test_seal_with_any_bit_flipped_is_not_authentic(
    key: bytes, nonce: bytes, plaintext: bytes, associated_data: bytes, data: st.DataObject
) -> None:
    inputs = [key, nonce, xseal(key, nonce, plaintext, associated_data), associated_data]
    place = data.draw(st.integers(0, 3))
    inputs[place] = flip(inputs[place], data.draw(st.integers(0, 8 * len(inputs[place]) - 1)))
    with pytest.raises(NotAuthentic):
        xopen(*inputs)
