"""Derive the messages of a transcript from its inputs without refwg: a second witness.

noiseprotocol plays both roles of the handshake, hashes come from hashlib, the AEAD from cryptography; HChaCha20 is
written out. Nothing here imports refwg.
"""

from __future__ import annotations

from hashlib import blake2s
from struct import Struct, pack
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from noise.connection import Keypair, NoiseConnection

CONSTRUCTION: Final = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER: Final = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
NANOSECONDS: Final = 10**9
COLUMNS_AND_DIAGONALS: Final = (
    *((column, column + 4, column + 8, column + 12) for column in range(4)),
    *((column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4) for column in range(4)),
)


class Witness:
    """Returns the bytes of each message, by one method per type, named as in the file."""

    def __init__(self, transcript: dict[str, Any]) -> None:
        self._transcript = transcript
        # Keys are sender indices. Values: the initiator's connection, its message, and the responder.
        self._handshakes: dict[int, tuple[NoiseConnection, bytes, str]] = {}
        self._transport_keys: dict[int, bytes] = {}
        self._mac1: dict[int, bytes] = {}
        self._cookies: dict[str, bytes] = {}

    def initiation(self, message: dict[str, Any]) -> bytes:
        sender, index = message["from"], message["sender_index"]
        noise = self._noise(sender, message["ephemeral_private"])
        noise.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, self._static_public(other(sender)))
        noise.set_as_initiator()
        noise.start_handshake()
        written = bytes(noise.write_message(tai64n(message["unix_time"])))
        self._handshakes[index] = noise, written, other(sender)
        return self._with_macs(message, pack("<LL", 1, index) + written)

    def response(self, message: dict[str, Any]) -> bytes:
        index, initiator_index = message["sender_index"], message["receiver_index"]
        initiator, initiation, sender = self._handshakes[initiator_index]
        assert sender == message["from"]
        noise = self._noise(sender, message["ephemeral_private"])
        noise.set_as_responder()
        noise.start_handshake()
        noise.read_message(initiation)
        written = bytes(noise.write_message())
        initiator.read_message(written)
        ours, theirs = noise.noise_protocol, initiator.noise_protocol
        assert ours.cipher_state_encrypt.k == theirs.cipher_state_decrypt.k
        self._transport_keys[index] = ours.cipher_state_decrypt.k
        self._transport_keys[initiator_index] = ours.cipher_state_encrypt.k
        return self._with_macs(message, pack("<LLL", 2, index, initiator_index) + written)

    def cookie_reply(self, message: dict[str, Any]) -> bytes:
        rejected, index, nonce = other(message["from"]), message["receiver_index"], bytes.fromhex(message["nonce"])
        issuer, source = self._transcript["sides"][message["from"]], self._transcript["sides"][rejected]
        cookie = mac(
            bytes.fromhex(issuer["cookie_secret"]), bytes.fromhex(source["address"]), pack(">H", source["port"])
        )
        assert cookie.hex() == message["cookie"]
        self._cookies[rejected] = cookie
        subkey = hchacha20(digest(b"cookie--", self._static_public(message["from"])), nonce[:16])
        sealed = ChaCha20Poly1305(subkey).encrypt(bytes(4) + nonce[16:], cookie, self._mac1[index])
        return pack("<LL", 3, index) + nonce + sealed

    def data(self, message: dict[str, Any]) -> bytes:
        index, counter, packet = message["receiver_index"], message["counter"], bytes.fromhex(message["packet"])
        padded = packet.ljust(min(-(-len(packet) // 16) * 16, self._transcript["mtu"]), b"\0")
        sealed = ChaCha20Poly1305(self._transport_keys[index]).encrypt(pack("<LQ", 0, counter), padded, None)
        return pack("<LLQ", 4, index, counter) + sealed

    def _static_public(self, side: str) -> bytes:
        return bytes.fromhex(self._transcript["sides"][side]["static_public"])

    def _noise(self, side: str, ephemeral: str) -> NoiseConnection:
        noise = NoiseConnection.from_name(CONSTRUCTION)
        noise.set_prologue(IDENTIFIER)
        noise.set_psks(bytes.fromhex(self._transcript["preshared_key"]))
        static = bytes.fromhex(self._transcript["sides"][side]["static_private"])
        noise.set_keypair_from_private_bytes(Keypair.STATIC, static)
        noise.set_keypair_from_private_bytes(Keypair.EPHEMERAL, bytes.fromhex(ephemeral))
        return noise

    def _with_macs(self, message: dict[str, Any], unsigned: bytes) -> bytes:
        sender = message["from"]
        mac1 = mac(digest(b"mac1----", self._static_public(other(sender))), unsigned)
        self._mac1[message["sender_index"]] = mac1
        cookie = self._cookies.get(sender)
        return unsigned + mac1 + (bytes(16) if cookie is None else mac(cookie, unsigned, mac1))


def other(side: str) -> str:
    return {"A": "B", "B": "A"}[side]


def digest(*parts: bytes) -> bytes:
    return blake2s(b"".join(parts)).digest()


def mac(key: bytes, *parts: bytes) -> bytes:
    return blake2s(b"".join(parts), key=key, digest_size=16).digest()


def tai64n(unix_time: int) -> bytes:
    """Big-endian seconds since 2^62 + 10 before 1970, and nanoseconds in steps of 2^24."""
    seconds, nanoseconds = divmod(unix_time, NANOSECONDS)
    return pack(">QL", 0x400000000000000A + seconds, nanoseconds & 0xFF000000)


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """draft-irtf-cfrg-xchacha-03, section 2.2, written out."""
    words = [*Struct("<16L").unpack(b"expand 32-byte k" + key + nonce)]
    for _ in range(10):
        for a, b, c, d in COLUMNS_AND_DIAGONALS:
            for left, middle, right, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                words[left] = (words[left] + words[middle]) & 0xFFFFFFFF
                mixed = words[right] ^ words[left]
                words[right] = (mixed << bits | mixed >> 32 - bits) & 0xFFFFFFFF
    return pack("<8L", *words[:4], *words[12:])
