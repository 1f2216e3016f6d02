"""Open an initiation as its responder does, by noiseprotocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from noise.connection import Keypair, NoiseConnection

from harness.wire.messages import FIELDS, INITIATION

if TYPE_CHECKING:
    from harness import Key

_CONSTRUCTION: Final = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
_PROLOGUE: Final = b"WireGuard v1 zx2c4 Jason@zx2c4.com"


def opened(initiation: bytes, responder: Key, psk: Key) -> tuple[bytes, bytes]:
    """Open an initiation as its responder does; returns the initiator's static key and the timestamp.

    noiseprotocol does it: neither our code nor a program's.
    """
    noise = NoiseConnection.from_name(_CONSTRUCTION)
    noise.set_prologue(_PROLOGUE)
    noise.set_psks(psk.raw)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, responder.raw)
    noise.set_as_responder()
    noise.start_handshake()
    start, end = FIELDS[INITIATION]["ephemeral"][0], FIELDS[INITIATION]["timestamp"][1]
    timestamp = bytes(noise.read_message(initiation[start:end]))
    return bytes(noise.noise_protocol.handshake_state.rs.public_bytes), timestamp
