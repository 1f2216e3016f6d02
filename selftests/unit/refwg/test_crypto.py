from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from harness.scripted.intents import LOW_ORDER_POINTS
from refwg import crypto
from refwg.crypto import Aead, PrivateKey, clamp, dh, hmac_blake2s, is_zero, kdf, mac, public_key_of, same, xopen, xseal
from refwg.errors import LowOrderPoint, NotAuthentic
from selftests.support.sandbox import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = bytes(range(32))


@pytest.mark.requirement("CR-18")
def test_clamping_sets_and_clears_bits_of_rfc_7748() -> None:
    assert clamp(b"\xff" * 32).hex() == "f8" + "ff" * 30 + "7f"
    assert clamp(bytes(32)).hex() == "00" * 31 + "40"
    assert public_key_of(clamp(KEY)) == public_key_of(KEY)


def test_private_keys_are_equal_when_their_scalars_are() -> None:
    assert {PrivateKey(KEY), PrivateKey(clamp(KEY))} == {PrivateKey(KEY)}
    assert PrivateKey(KEY) not in {PrivateKey(bytes(32)), KEY}


@pytest.mark.requirement("CR-09")
@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=bytes.hex)
def test_low_order_point_is_refused(point: bytes) -> None:
    with pytest.raises(LowOrderPoint):
        dh(KEY, point)


@pytest.mark.requirement("CR-07", "CR-14")
def test_aead_ciphertext_depends_on_counter_and_can_be_opened() -> None:
    counter, nonce = 0x0807060504030201, bytes(4) + bytes([1, 2, 3, 4, 5, 6, 7, 8])
    sealed = Aead(KEY).seal(counter, b"text")
    assert sealed == ChaCha20Poly1305(KEY).encrypt(nonce, b"text", None)
    assert Aead(KEY).open(counter, sealed) == b"text"
    assert len(sealed) == 4 + 16


@pytest.mark.requirement("DT-13")
@pytest.mark.parametrize("at", [0, 3, 4, 19])
def test_changed_ciphertext_bit_fails_authentication(at: int) -> None:
    sealed = bytearray(Aead(KEY).seal(7, b"text", b"data"))
    sealed[at] ^= 1
    with pytest.raises(NotAuthentic):
        Aead(KEY).open(7, bytes(sealed), b"data")


@pytest.mark.requirement("CR-08", "CK-11")
def test_xaead_binds_nonce_and_associated_data() -> None:
    sealed = xseal(KEY, bytes(24), b"cookie", b"mac1")
    assert xopen(KEY, bytes(24), sealed, b"mac1") == b"cookie"
    for nonce, data in ((bytes(23) + b"\1", b"mac1"), (b"\1" + bytes(23), b"mac1"), (bytes(24), b"mac2")):
        with pytest.raises(NotAuthentic):
            xopen(KEY, nonce, sealed, data)


def test_xaead_nonce_of_wrong_length_raises_value_error() -> None:
    with pytest.raises(ValueError, match="nonce of 12 bytes"):
        xseal(KEY, bytes(12), b"", b"")


@pytest.mark.requirement("CR-05", "CR-06")
def test_each_kdf_output_feeds_next_output() -> None:
    secret = hmac_blake2s(KEY, b"input")
    first = hmac_blake2s(secret, b"\1")
    second = hmac_blake2s(secret, first + b"\2")
    assert kdf(3, KEY, b"input") == (first, second, hmac_blake2s(secret, second + b"\3"))
    assert kdf(1, KEY, b"input") == (first,)


@pytest.mark.requirement("CR-04")
def test_mac_takes_keys_of_16_and_32_bytes() -> None:
    assert len(mac(KEY, b"a", b"b")) == len(mac(KEY[:16], b"ab")) == 16
    assert mac(KEY, b"a", b"b") == mac(KEY, b"ab") != mac(KEY[:16], b"ab")


def test_zero_key_is_distinguished_from_other_keys() -> None:
    assert is_zero(bytes(32))
    assert not is_zero(KEY)


def test_same_compares_every_byte_and_length() -> None:
    assert same(KEY, bytes(KEY))
    for at in range(32):
        assert not same(KEY, KEY[:at] + bytes([KEY[at] ^ 1]) + KEY[at + 1 :])
    assert not same(KEY, KEY[:31])


# Prints the modules that a session imports, beyond those imported when refwg serves its interface.
IMPORTS_OF_A_SESSION = """
import sys
from refwg import crypto, loop
from selftests.support.pair import Pair

if len(sys.argv) > 1:
    crypto.load()
before = set(sys.modules)
pair = Pair()
pair.connect()
print(*sorted(set(sys.modules) - before))
"""


def test_no_module_is_imported_after_load() -> None:
    def late(*words: str) -> list[str]:
        command = [sys.executable, "-c", IMPORTS_OF_A_SESSION, *words]
        completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return completed.stdout.split()

    assert "cryptography.hazmat.backends" in late()
    assert late("load") == []


def test_load_uses_curve_cipher_and_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"dh", "public_key_of", "xseal", "xopen", "mac", "kdf"}
    used: set[str] = set()

    def recorded(name: str) -> Callable[..., object]:
        function = getattr(crypto, name)

        def call(*words: object) -> object:
            used.add(name)
            return function(*words)

        return call

    for name in names:
        monkeypatch.setattr(crypto, name, recorded(name))
    crypto.load()
    assert used == names
