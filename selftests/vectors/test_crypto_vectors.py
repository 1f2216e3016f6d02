"""Check the primitives against vectors of other projects; README.md names the sources."""

from __future__ import annotations

from struct import pack, unpack
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import BLAKE2s
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from refwg.crypto import Aead, blake2s_hash, clamp, dh, hchacha20, kdf, mac, xopen, xseal
from refwg.errors import LowOrderPoint, NotAuthentic
from selftests.support import vector_files

X25519 = vector_files.wycheproof("Protocol/wycheproof/x25519_test.json")
XCHACHA = vector_files.wycheproof("Cipher/wycheproof/xchacha20_poly1305_test.json")
CHACHA = vector_files.wycheproof("Cipher/wycheproof/chacha20_poly1305_test.json")
OPENSSL = vector_files.nist("ciphers/ChaCha20Poly1305/openssl.txt")
BORINGSSL = vector_files.nist("ciphers/ChaCha20Poly1305/boringssl.txt")

# The error, and its message, for each flag of an invalid case.
ERRORS: dict[str, tuple[type[Exception], str]] = {
    "ModifiedTag": (NotAuthentic, "does not verify"),
    "InvalidNonceSize": (ValueError, "[Nn]once"),
}


def number(case: dict[str, Any]) -> str:
    return str(case["tcId"])


@pytest.mark.requirement("CR-09")
@pytest.mark.parametrize("case", X25519, ids=number)
def test_x25519_agrees_with_wycheproof_and_refuses_zero(case: dict[str, Any]) -> None:
    private, public, shared = (bytes.fromhex(case[name]) for name in ("private", "public", "shared"))
    if "ZeroSharedSecret" in case["flags"]:
        with pytest.raises(LowOrderPoint):
            dh(private, public)
    else:
        assert dh(private, public) == dh(clamp(private), public) == shared


@pytest.mark.requirement("CR-09")
@pytest.mark.parametrize(
    "case", [case for case in vector_files.nist("asymmetric/X25519/rfc7748.txt") if "INPUT_SCALAR" in case]
)
def test_x25519_agrees_with_rfc_7748(case: dict[str, str]) -> None:
    assert dh(bytes.fromhex(case["INPUT_SCALAR"]), bytes.fromhex(case["INPUT_U"])).hex() == case["OUTPUT_U"]


def inputs(case: dict[str, Any]) -> tuple[bytes, ...]:
    """Key, nonce, associated data, plaintext, and ciphertext with tag."""
    texts = (case["key"], case["iv"], case["aad"], case["msg"], case["ct"] + case["tag"])
    return tuple(bytes.fromhex(text) for text in texts)


@pytest.mark.requirement("CR-08")
@pytest.mark.parametrize("case", XCHACHA, ids=number)
def test_xchacha20_poly1305_agrees_with_wycheproof(case: dict[str, Any]) -> None:
    key, nonce, ad, message, sealed = inputs(case)
    if case["result"] == "valid":
        assert xseal(key, nonce, message, ad) == sealed
        assert xopen(key, nonce, sealed, ad) == message
    else:
        error, match = ERRORS[case["flags"][0]]
        with pytest.raises(error, match=match):
            xopen(key, nonce, sealed, ad)


@pytest.mark.requirement("CR-07")
@pytest.mark.parametrize("case", CHACHA, ids=number)
def test_chacha20_poly1305_agrees_with_wycheproof(case: dict[str, Any]) -> None:
    key, nonce, ad, message, sealed = inputs(case)
    if case["result"] == "valid":
        assert Aead(key).seal_with(nonce, message, ad) == sealed
        assert Aead(key).open_with(nonce, sealed, ad) == message
    else:
        error, match = ERRORS[case["flags"][0]]
        with pytest.raises(error, match=match):
            Aead(key).open_with(nonce, sealed, ad)


@pytest.mark.requirement("CR-07")
@pytest.mark.parametrize(
    "case", [case for case in CHACHA if case["iv"].startswith("00000000") and len(case["iv"]) == 24]
)
def test_nonce_is_four_zero_bytes_and_counter(case: dict[str, Any]) -> None:
    key, nonce, ad, message, sealed = inputs(case)
    assert Aead(key).seal(int.from_bytes(nonce[4:], "little"), message, ad)[: len(message)] == sealed[: len(message)]


@pytest.mark.requirement("CR-07")
@pytest.mark.parametrize("case", OPENSSL)
def test_chacha20_poly1305_agrees_with_openssl_and_rfc_8439(case: dict[str, str]) -> None:
    key, nonce, ad, message, ciphertext, tag = (
        bytes.fromhex(case[name]) for name in ("Key", "IV", "AAD", "Plaintext", "Ciphertext", "Tag")
    )
    if "Result" in case:
        with pytest.raises(NotAuthentic):
            Aead(key).open_with(nonce, ciphertext + tag, ad)
    else:
        assert Aead(key).seal_with(nonce, message, ad) == ciphertext + tag


@pytest.mark.requirement("CR-07")
@pytest.mark.parametrize("case", BORINGSSL)
def test_chacha20_poly1305_agrees_with_boringssl_and_rfc_8439(case: dict[str, str]) -> None:
    key, nonce, sealed = (
        bytes.fromhex(text) for text in (case["KEY"], case["NONCE"], case["CT"].strip('"') + case["TAG"])
    )
    message, ad = (vector_files.quoted_or_hexadecimal(case[name]) for name in ("IN", "AD"))
    assert Aead(key).seal_with(nonce, message, ad) == sealed


@pytest.mark.requirement("CR-07")
@pytest.mark.parametrize("case", vector_files.nist("ciphers/ChaCha20/rfc7539.txt"))
def test_hchacha20_is_rfc_8439_keystream_without_initial_state(case: dict[str, str]) -> None:
    start = int(case["INITIAL_BLOCK_COUNTER"]).to_bytes(4, "little") + bytes.fromhex(case["NONCE"])
    plaintext, ciphertext = bytes.fromhex(case["PLAINTEXT"])[:64], bytes.fromhex(case["CIPHERTEXT"])[:64]
    block = unpack("<16L", bytes(left ^ right for left, right in zip(plaintext, ciphertext, strict=True)))
    initial = unpack("<8L", b"expand 32-byte k" + start)
    words = [(word - begin) % 2**32 for word, begin in zip(block[:4] + block[12:], initial, strict=True)]
    assert hchacha20(bytes.fromhex(case["KEY"]), start) == pack("<8L", *words)


@pytest.mark.requirement("CR-08")
def test_hchacha20_agrees_with_xchacha_draft() -> None:
    nonce = bytes.fromhex("000000090000004a0000000031415927")
    assert hchacha20(bytes(range(32)), nonce).hex() == (
        "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    )


@pytest.mark.requirement("CR-03")
@pytest.mark.parametrize("case", vector_files.nist("hashes/blake2/blake2s.txt"))
def test_blake2s_agrees_with_its_vectors(case: dict[str, str]) -> None:
    message = bytes.fromhex(case["Msg"])[: int(case["Len"]) // 8]
    assert blake2s_hash(message[:3], message[3:]).hex() == case["MD"]


@pytest.mark.requirement("CR-04")
@pytest.mark.parametrize("case", vector_files.blake2_keyed()[:64])
def test_mac_is_not_truncated_keyed_blake2s(case: dict[str, str]) -> None:
    key, message = bytes.fromhex(case["key"]), bytes.fromhex(case["in"])
    assert len(mac(key, message)) == 16
    assert mac(key, message).hex() != case["hash"][:32]


@pytest.mark.requirement("CR-05", "CR-06")
@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("data", [b"", b"input", bytes(32)])
def test_kdf_is_hkdf_without_info(outputs: int, data: bytes) -> None:
    expected = HKDF(BLAKE2s(32), length=32 * outputs, salt=b"key", info=None).derive(data)
    assert b"".join(kdf(outputs, b"key", data)) == expected
