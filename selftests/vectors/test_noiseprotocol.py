"""Complete handshakes between refwg and noiseprotocol, in either role."""

from __future__ import annotations

import random
from typing import Any

import pytest
from noise.connection import Keypair as Key
from noise.connection import NoiseConnection

from refwg.errors import DropReason, Refused
from refwg.messages import Initiation, Response
from refwg.noise import (
    CONSTRUCTION,
    IDENTIFIER,
    Handshake,
    StaticIdentity,
    open_initiation,
    static_static,
    timestamp,
)

# The package warns of fixed ephemerals, which only tests may have: they make a test repeatable.
pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")

TIMESTAMP = timestamp(1_700_000_000_000_000_000)


class Setting:
    """Two identities, two ephemerals and a preshared key."""

    def __init__(self, seed: int) -> None:
        stream = random.Random(seed)  # noqa: S311 - repeatable on purpose
        self.psk = stream.randbytes(32) if seed % 2 else bytes(32)
        self.ours, self.theirs = (StaticIdentity.from_private(stream.randbytes(32)) for _ in range(2))
        self.our_ephemeral, self.their_ephemeral = stream.randbytes(32), stream.randbytes(32)

    def handshake(self) -> Handshake:
        return Handshake(self.theirs.public, self.psk, static_static(self.ours, self.theirs.public))

    def noise(self, *, is_initiator: bool) -> Any:
        """The other side, played by noiseprotocol."""
        noise = NoiseConnection.from_name(CONSTRUCTION)
        noise.set_prologue(IDENTIFIER)
        noise.set_psks(self.psk)
        noise.set_keypair_from_private_bytes(Key.STATIC, self.theirs.private)
        noise.set_keypair_from_private_bytes(Key.EPHEMERAL, self.their_ephemeral)
        if is_initiator:
            noise.set_keypair_from_public_bytes(Key.REMOTE_STATIC, self.ours.public)
            noise.set_as_initiator()
        else:
            noise.set_as_responder()
        noise.start_handshake()
        return noise


def initiation_of(noise: bytes) -> Initiation:
    return Initiation(
        sender_index=1, ephemeral=noise[:32], encrypted_static=noise[32:80], encrypted_timestamp=noise[80:]
    )


def response_of(noise: bytes) -> Response:
    return Response(sender_index=2, receiver_index=1, ephemeral=noise[:32], encrypted_nothing=noise[32:])


@pytest.mark.requirement("HS-03", "CR-15")
@pytest.mark.parametrize("seed", range(8))
def test_noiseprotocol_responds_to_initiation_of_refwg(seed: int) -> None:
    setting = Setting(seed)
    ours, theirs = setting.handshake(), setting.noise(is_initiator=False)
    ephemeral = setting.our_ephemeral
    sent = ours.create_initiation(setting.ours, ephemeral=ephemeral, timestamp=TIMESTAMP, sender_index=1)
    assert theirs.read_message(sent.ephemeral + sent.encrypted_static + sent.encrypted_timestamp) == TIMESTAMP
    ours.consume_response(setting.ours, response_of(bytes(theirs.write_message())))
    keypair = ours.begin_session(0)
    assert theirs.decrypt(keypair.sending.seal(0, b"to them")) == b"to them"
    assert keypair.receiving.open(0, theirs.encrypt(b"to us")) == b"to us"


@pytest.mark.requirement("HS-03", "CR-17")
@pytest.mark.parametrize("seed", range(8))
def test_refwg_responds_to_initiation_of_noiseprotocol(seed: int) -> None:
    setting = Setting(seed)
    ours, theirs = setting.handshake(), setting.noise(is_initiator=True)
    opened = open_initiation(setting.ours, initiation_of(bytes(theirs.write_message(TIMESTAMP))))
    assert opened.remote_static == setting.theirs.public
    ours.consume_initiation(opened, 0)
    answer = ours.create_response(ephemeral=setting.our_ephemeral, sender_index=2)
    assert theirs.read_message(answer.ephemeral + answer.encrypted_nothing) == b""
    keypair = ours.begin_session(0)
    assert theirs.decrypt(keypair.sending.seal(0, b"to them")) == b"to them"
    assert keypair.receiving.open(0, theirs.encrypt(b"to us")) == b"to us"


@pytest.mark.requirement("HS-20")
def test_response_with_wrong_preshared_key_is_refused() -> None:
    setting = Setting(1)
    ours, theirs = setting.handshake(), setting.noise(is_initiator=False)
    ours.preshared_key = bytes(32)
    ephemeral = setting.our_ephemeral
    sent = ours.create_initiation(setting.ours, ephemeral=ephemeral, timestamp=TIMESTAMP, sender_index=1)
    theirs.read_message(sent.ephemeral + sent.encrypted_static + sent.encrypted_timestamp)
    with pytest.raises(Refused) as refusal:
        ours.consume_response(setting.ours, response_of(bytes(theirs.write_message())))
    assert refusal.value.reason is DropReason.INVALID_TAG
