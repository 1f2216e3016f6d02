"""Check the oracle's own handshake code against the fixed vectors, and against noiseprotocol in either role."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from noise.connection import Keypair as Key
from noise.connection import NoiseConnection

from harness.wire.noise import has_mac1, has_mac2, open_cookie_reply, open_response, static_key
from selftests.support import vector_files
from selftests.vectors.witness import CONSTRUCTION, IDENTIFIER, tai64n

# The package warns of fixed ephemerals, which only tests may have: they make a test repeatable.
pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")

VECTOR = vector_files.wireguard()
INITIATOR, RESPONDER = (static_key(VECTOR[f"{role}_static_private"]) for role in ("initiator", "responder"))
EPHEMERAL = static_key(VECTOR["responder_ephemeral_private"])
MACS = bytes(32)
# More initiations than the oracle remembers.
MANY = 1100
STAMP = tai64n(1_700_000_000_123_456_789)


def noise(local: bytes, ephemeral: bytes, psk: bytes, *, remote: bytes | None = None) -> Any:
    """A side, played by noiseprotocol; remote: the responder's public key, for the initiator."""
    made = NoiseConnection.from_name(CONSTRUCTION)
    made.set_prologue(IDENTIFIER)
    made.set_psks(psk)
    made.set_keypair_from_private_bytes(Key.STATIC, local)
    made.set_keypair_from_private_bytes(Key.EPHEMERAL, ephemeral)
    if remote is None:
        made.set_as_responder()
    else:
        made.set_keypair_from_public_bytes(Key.REMOTE_STATIC, remote)
        made.set_as_initiator()
    made.start_handshake()
    return made


@pytest.mark.requirement("HS-03", "CR-11", "MSG-01")
def test_oracle_opens_initiation_of_vector() -> None:
    opened = RESPONDER.open_initiation(VECTOR["initiation"])
    assert opened is not None
    assert (opened.static, opened.timestamp) == (INITIATOR.public, VECTOR["timestamp"])
    assert (opened.chaining_key, opened.hash) == (
        VECTOR["chaining_key_after_initiation"],
        VECTOR["hash_after_initiation"],
    )


@pytest.mark.requirement("CR-15", "CR-17", "MSG-02")
def test_oracle_opens_response_of_vector() -> None:
    opened = RESPONDER.open_initiation(VECTOR["initiation"])
    assert opened is not None
    shared = EPHEMERAL.exchange(VECTOR["initiation"][8:40]), EPHEMERAL.exchange(INITIATOR.public)
    keys = open_response(opened, VECTOR["response"], shared, VECTOR["preshared_key"])
    assert keys == (VECTOR["initiator_to_responder_key"], VECTOR["responder_to_initiator_key"])
    assert open_response(opened, VECTOR["response"], shared, bytes(32)) is None


@pytest.mark.requirement("CK-01")
def test_oracle_finds_mac1_of_vector() -> None:
    assert has_mac1(VECTOR["initiation"], RESPONDER.public)
    assert has_mac1(VECTOR["response"], INITIATOR.public)
    assert not has_mac1(VECTOR["initiation"], INITIATOR.public)


@pytest.mark.requirement("CK-03", "CK-04")
def test_oracle_opens_cookie_reply_of_vector() -> None:
    cookie = open_cookie_reply(VECTOR["cookie_reply"], RESPONDER.public, VECTOR["initiation"][116:132])
    assert cookie is not None
    assert cookie == VECTOR["cookie"]
    with_mac2 = VECTOR["initiation"][:-16] + VECTOR["initiation_mac2_with_cookie"]
    assert has_mac2(with_mac2, cookie)
    assert not has_mac2(VECTOR["initiation"], cookie)
    assert open_cookie_reply(VECTOR["cookie_reply"], INITIATOR.public, VECTOR["initiation"][116:132]) is None
    assert open_cookie_reply(VECTOR["cookie_reply"], RESPONDER.public, bytes(16)) is None


@pytest.mark.requirement("HS-03", "CR-15")
@pytest.mark.parametrize("seed", range(8))
def test_oracle_opens_handshake_of_noiseprotocol(seed: int) -> None:
    stream = random.Random(seed)  # noqa: S311 - repeatable on purpose
    psk = stream.randbytes(32) if seed % 2 else bytes(32)
    ours, theirs, first, second = (stream.randbytes(32) for _ in range(4))
    sender, recipient = static_key(ours), static_key(theirs)
    initiator, responder = noise(ours, first, psk, remote=recipient.public), noise(theirs, second, psk)
    written = bytes(initiator.write_message(STAMP))
    initiation = struct.pack("<II", 1, 7) + written + MACS
    assert responder.read_message(written) == STAMP
    answer = bytes(responder.write_message())
    initiator.read_message(answer)
    opened = recipient.open_initiation(initiation)
    assert opened is not None
    assert (opened.static, opened.timestamp) == (sender.public, STAMP)
    response = struct.pack("<III", 2, 8, 7) + answer + MACS
    ephemeral = static_key(second)
    shared = ephemeral.exchange(initiation[8:40]), ephemeral.exchange(sender.public)
    keys = open_response(opened, response, shared, psk)
    there = initiator.noise_protocol.cipher_state_encrypt.k
    assert keys == (there, initiator.noise_protocol.cipher_state_decrypt.k)


def test_oracle_opens_no_initiation_to_other_key() -> None:
    assert INITIATOR.open_initiation(VECTOR["initiation"]) is None


def test_oracle_opens_initiation_again_after_flood() -> None:
    first = RESPONDER.open_initiation(VECTOR["initiation"])
    stream = random.Random(1)  # noqa: S311 - repeatable on purpose
    for _ in range(MANY):
        assert RESPONDER.open_initiation(b"\1\0\0\0" + stream.randbytes(144)) is None
    again = RESPONDER.open_initiation(VECTOR["initiation"])
    assert first == again
    assert again is RESPONDER.open_initiation(VECTOR["initiation"])


def test_oracle_finds_changed_timestamp() -> None:
    changed = bytearray(VECTOR["initiation"])
    changed[100] ^= 1
    opened = RESPONDER.open_initiation(bytes(changed))
    assert opened is not None
    assert (opened.static, opened.timestamp) == (INITIATOR.public, None)


def test_oracle_takes_low_order_point_as_zero_secret() -> None:
    assert RESPONDER.exchange(bytes(32)) == bytes(32)
