"""Check a whole handshake with fixed inputs, byte for byte: wireguard.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refwg.cookie import CookieJar, compute_mac2, cookie_key_of
from refwg.crypto import Aead, xopen, xseal
from refwg.messages import SECOND, CookieReply, Data, Initiation, Response
from refwg.noise import (
    INITIAL_CHAINING_KEY,
    INITIAL_HASH,
    Handshake,
    StaticIdentity,
    Transcript,
    open_initiation,
    static_static,
    timestamp,
)
from selftests.support import vector_files

if TYPE_CHECKING:
    from refwg.noise import Keypair

VECTOR = vector_files.wireguard()
INITIATOR = StaticIdentity.from_private(VECTOR["initiator_static_private"])
RESPONDER = StaticIdentity.from_private(VECTOR["responder_static_private"])


def handshake(identity: StaticIdentity, remote: StaticIdentity) -> Handshake:
    secret = static_static(identity, remote.public)
    return Handshake(remote.public, VECTOR["preshared_key"], secret)


def initiated() -> tuple[Handshake, Initiation]:
    initiator = handshake(INITIATOR, RESPONDER)
    message = initiator.create_initiation(
        INITIATOR,
        ephemeral=VECTOR["initiator_ephemeral_private"],
        timestamp=VECTOR["timestamp"],
        sender_index=VECTOR["initiator_index"],
    )
    return initiator, message


def answered() -> tuple[Handshake, Response]:
    responder = handshake(RESPONDER, INITIATOR)
    responder.consume_initiation(open_initiation(RESPONDER, Initiation.parse(VECTOR["initiation"])), 0)
    ephemeral, index = VECTOR["responder_ephemeral_private"], VECTOR["responder_index"]
    return responder, responder.create_response(ephemeral=ephemeral, sender_index=index)


def sessions() -> tuple[Keypair, Keypair]:
    (initiator, _), (responder, _) = initiated(), answered()
    initiator.consume_response(INITIATOR, Response.parse(VECTOR["response"]))
    return initiator.begin_session(0), responder.begin_session(0)


@pytest.mark.requirement("CR-01", "CR-02")
def test_initial_chaining_key_and_hash_match_vector() -> None:
    assert VECTOR["initial_chaining_key"] == INITIAL_CHAINING_KEY
    assert VECTOR["initial_hash"] == INITIAL_HASH


@pytest.mark.requirement("CR-11")
def test_timestamp_is_tai64n() -> None:
    assert timestamp(VECTOR["unix_seconds"] * SECOND) == VECTOR["timestamp"]


@pytest.mark.requirement("HS-03", "CR-13")
def test_chaining_key_after_es_matches_vector() -> None:
    _, message = initiated()
    transcript = Transcript.start(RESPONDER.public)
    transcript.mix_ephemeral(message.ephemeral)
    transcript.mix_dh(RESPONDER.key, message.ephemeral)
    assert transcript.chaining_key == VECTOR["chaining_key_after_es"]


@pytest.mark.requirement("HS-03", "CR-10", "MSG-01")
def test_initiation_matches_vector() -> None:
    initiator, message = initiated()
    assert CookieJar(RESPONDER.public).add_macs(message.to_bytes(), 0) == VECTOR["initiation"]
    assert initiator.transcript.hash == VECTOR["hash_after_initiation"]
    assert initiator.transcript.chaining_key == VECTOR["chaining_key_after_initiation"]


@pytest.mark.requirement("HS-03", "CR-17", "MSG-02")
def test_response_matches_vector() -> None:
    responder, message = answered()
    assert CookieJar(INITIATOR.public).add_macs(message.to_bytes(), 0) == VECTOR["response"]
    assert responder.transcript.chaining_key == VECTOR["final_chaining_key"]


@pytest.mark.requirement("CR-15", "CR-14")
def test_session_keys_of_both_sides_match_vector() -> None:
    to_responder, to_initiator = (
        Aead(VECTOR[name]).seal(7, b"") for name in ("initiator_to_responder_key", "responder_to_initiator_key")
    )
    initiator, responder = sessions()
    assert initiator.sending.seal(7, b"") == to_responder
    assert responder.sending.seal(7, b"") == to_initiator
    assert responder.receiving.open(7, to_responder) == initiator.receiving.open(7, to_initiator) == b""


@pytest.mark.requirement("MSG-04", "MSG-13")
def test_first_keepalive_matches_vector() -> None:
    keypair, _ = sessions()
    keepalive = Data(receiver_index=keypair.remote_index, counter=0, ciphertext=keypair.sending.seal(0, b""))
    assert keepalive.to_bytes() == VECTOR["keepalive_from_initiator"]


@pytest.mark.requirement("MSG-03", "CK-04")
def test_cookie_reply_matches_vector() -> None:
    key, mac1 = cookie_key_of(RESPONDER.public), Initiation.parse(VECTOR["initiation"]).mac1
    nonce, cookie, index = VECTOR["cookie_nonce"], VECTOR["cookie"], VECTOR["initiator_index"]
    sealed = xseal(key, nonce, cookie, mac1)
    reply = CookieReply(receiver_index=index, nonce=nonce, encrypted_cookie=sealed)
    assert reply.to_bytes() == VECTOR["cookie_reply"]
    assert xopen(key, nonce, sealed, mac1) == cookie


@pytest.mark.requirement("CK-03")
def test_mac2_matches_vector() -> None:
    assert compute_mac2(VECTOR["initiation"], VECTOR["cookie"]) == VECTOR["initiation_mac2_with_cookie"]
