"""Complete handshakes between a scripted peer's messages and noiseprotocol, in either role."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from noise.connection import Keypair as Key
from noise.connection import NoiseConnection

from harness.scripted.intents import LOW_ORDER_POINTS, CookieReply, Initiation, Response
from harness.scripted.received import ReceivedInitiation
from harness.scripted.transcripts import (
    ZERO,
    Draw,
    read_cookie,
    read_initiation,
    read_response,
    write_cookie_reply,
    write_data,
    write_initiation,
    write_response,
)
from refwg import messages
from refwg.errors import NotAuthentic
from refwg.noise import CONSTRUCTION, IDENTIFIER, StaticIdentity, timestamp

if TYPE_CHECKING:
    from harness.scripted.transcripts import (
        ReadInitiation,
    )

# The package warns of fixed ephemerals, which only tests may have: they make a test repeatable.
pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")

OURS, THEIRS = StaticIdentity.from_private(b"\x11" * 32), StaticIdentity.from_private(b"\x22" * 32)
STAMP = timestamp(1_700_000_000_000_000_000)
PSK = b"\x55" * 32
DRAW = Draw(
    identity=OURS,
    remote=THEIRS.public,
    ephemeral=b"\x33" * 32,
    index=0x01020304,
    timestamp=STAMP,
    preshared_key=PSK,
    nonce=bytes(range(24)),
    value=bytes(range(16)),
)


def noise(psk: bytes, *, is_initiator: bool) -> Any:
    """The device, played by noiseprotocol."""
    made = NoiseConnection.from_name(CONSTRUCTION)
    made.set_prologue(IDENTIFIER)
    made.set_psks(psk)
    made.set_keypair_from_private_bytes(Key.STATIC, THEIRS.private)
    made.set_keypair_from_private_bytes(Key.EPHEMERAL, b"\x44" * 32)
    if is_initiator:
        made.set_keypair_from_public_bytes(Key.REMOTE_STATIC, OURS.public)
        made.set_as_initiator()
    else:
        made.set_as_responder()
    made.start_handshake()
    return made


def received(datagram: bytes, read: ReadInitiation) -> ReceivedInitiation:
    parsed = messages.Initiation.parse(datagram)
    return ReceivedInitiation(
        datagram=datagram,
        time=0,
        source=("192.168.1.1", 1),
        at=("192.168.1.2", 2),
        tos=0,
        sender_index=parsed.sender_index,
        ephemeral=parsed.ephemeral,
        static=read.static,
        timestamp=read.timestamp,
        mac1=parsed.mac1,
        mac2=parsed.mac2,
        transcript=read.transcript,
    )


@pytest.mark.parametrize("psk", [PSK, bytes(32)], ids=["psk", "none"])
def test_noiseprotocol_answers_scripted_initiation(psk: bytes) -> None:
    theirs = noise(psk, is_initiator=False)
    sent = write_initiation(Initiation(), replace(DRAW, preshared_key=psk))
    assert theirs.read_message(sent.datagram[8:116]) == STAMP
    answer = bytes(theirs.write_message())
    assert sent.pending is not None
    parsed = messages.Response(
        sender_index=9, receiver_index=DRAW.index, ephemeral=answer[:32], encrypted_nothing=answer[32:]
    )
    session, _ = read_response(sent.pending, parsed, 0)
    sealed = write_data(session.data(b"to them!" * 2))
    assert theirs.decrypt(sealed.datagram[16:]) == b"to them!" * 2
    assert session.keypair.receiving.open(0, theirs.encrypt(b"to us")) == b"to us"


@pytest.mark.parametrize("psk", [PSK, bytes(32)], ids=["psk", "none"])
def test_scripted_response_is_accepted_by_noiseprotocol(psk: bytes) -> None:
    theirs = noise(psk, is_initiator=True)
    first = bytes(theirs.write_message(STAMP))
    datagram = b"\1\0\0\0" + (7).to_bytes(4, "little") + first + bytes(32)
    read = read_initiation(OURS.private, OURS.public, messages.Initiation.parse(datagram))
    assert (read.static, read.timestamp) == (THEIRS.public, STAMP)
    draw = replace(DRAW, preshared_key=psk)
    sent = write_response(Response(to=received(datagram, read)), draw, 0)
    assert theirs.read_message(sent.datagram[12:60]) == b""
    assert sent.datagram[4:12] == DRAW.index.to_bytes(4, "little") + (7).to_bytes(4, "little")
    assert theirs.decrypt(write_data(sent.made().data(b"x" * 16)).datagram[16:]) == b"x" * 16


def test_noiseprotocol_refuses_response_with_other_preshared_key() -> None:
    theirs = noise(PSK, is_initiator=True)
    datagram = b"\1\0\0\0" + bytes(4) + bytes(theirs.write_message(STAMP)) + bytes(32)
    read = read_initiation(OURS.private, OURS.public, messages.Initiation.parse(datagram))
    sent = write_response(Response(to=received(datagram, read), preshared_key=bytes(32)), DRAW, 0)
    with pytest.raises(Exception, match=r"^$|tag|Failed"):
        theirs.read_message(sent.datagram[12:60])


@pytest.mark.parametrize("point", LOW_ORDER_POINTS, ids=lambda point: point.hex()[:8])
def test_low_order_ephemeral_leads_to_zero_secrets(point: bytes) -> None:
    sent = write_initiation(Initiation(ephemeral=point), DRAW)
    assert sent.values["es"] == ZERO
    # Whoever lacks the check computes the same zero, so only the check can refuse the message.
    read = read_initiation(THEIRS.private, THEIRS.public, messages.Initiation.parse(sent.datagram))
    assert (read.static, read.timestamp) == (OURS.public, STAMP)


def test_macs_follow_whitepaper() -> None:
    sent = write_initiation(Initiation(cookie=b"c" * 16), DRAW).datagram
    key = hashlib.blake2s(b"mac1----" + THEIRS.public).digest()
    assert sent[116:132] == hashlib.blake2s(sent[:116], key=key, digest_size=16).digest()
    assert sent[132:] == hashlib.blake2s(sent[:132], key=b"c" * 16, digest_size=16).digest()
    assert write_initiation(Initiation(), DRAW).datagram[132:] == bytes(16)


def test_cookie_reply_opens_only_with_mac1_of_its_message() -> None:
    initiation = write_initiation(Initiation(), DRAW)
    read = read_initiation(THEIRS.private, THEIRS.public, messages.Initiation.parse(initiation.datagram))
    to = received(initiation.datagram, read)
    reply = write_cookie_reply(CookieReply(to=to), DRAW).datagram
    parsed = messages.CookieReply.parse(reply)
    assert parsed.receiver_index == DRAW.index
    assert read_cookie(OURS.public, to.mac1, parsed) == DRAW.value
    other = messages.CookieReply.parse(write_cookie_reply(CookieReply(to=to, mac1=bytes(16)), DRAW).datagram)
    with pytest.raises(NotAuthentic):
        read_cookie(OURS.public, to.mac1, other)


@pytest.mark.parametrize(
    ("message", "size", "start"),
    [
        (Initiation(cut=147), 147, b"\1\0\0\0"),
        (Initiation(suffix=b"\0"), 149, b"\1\0\0\0"),
        (Initiation(prefix=b"\1\0\0\1"), 148, b"\1\0\0\1"),
    ],
    ids=["cut", "suffix", "prefix"],
)
def test_override_of_whole_message_changes_bytes(message: Initiation, size: int, start: bytes) -> None:
    sent = write_initiation(message, DRAW).datagram
    assert (len(sent), sent[:4]) == (size, start)
    assert message.correct() == Initiation()
    assert len(message.overrides()) == 1
