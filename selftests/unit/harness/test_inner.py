"""Decrypt captured data with logged keys; noiseprotocol plays both ends."""

from __future__ import annotations

import base64
import random
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from harness.wire.inner import Handshakes, Inner, decrypt, read_keys
from harness.wire.messages import Message, with_mac1
from harness.wire.noise import static_key
from selftests.vectors.test_oracle_noise import MACS, STAMP, noise

if TYPE_CHECKING:
    from collections.abc import Sequence

# The package warns of fixed ephemerals, which only tests may have: they make a test repeatable.
pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")

A, B = ("10.0.0.1", 1), ("10.0.0.2", 2)
V4 = bytes([0x45, 0, 0, 21]) + bytes(16) + b"!"
V6 = bytes([0x60, 0, 0, 0, 0, 2]) + bytes(34) + b"hi"


class Conversation(NamedTuple):
    """A handshake with sender indices 7 and 8, a packet of A, and one of B; keys: the log of all keys."""

    messages: list[Message]
    keys: dict[str, str]


def message(source: tuple[str, int], payload: bytes) -> Message:
    return Message(time=0, source=source, destination=A if source == B else B, payload=payload)


def line(name: str, key: bytes) -> str:
    return f"{name} = {base64.b64encode(key).decode()}\n"


def conversation(psk: bytes = bytes(32), there: Sequence[bytes] = (V4,), back: Sequence[bytes] = (V6,)) -> Conversation:
    stream = random.Random(7)  # noqa: S311 - repeatable on purpose
    ours, theirs, first, second = (stream.randbytes(32) for _ in range(4))
    a, b = noise(ours, first, psk, remote=static_key(theirs).public), noise(theirs, second, psk)
    written = bytes(a.write_message(STAMP))
    b.read_message(written)
    answer = bytes(b.write_message())
    a.read_message(answer)
    messages = [
        message(A, with_mac1(struct.pack("<II", 1, 7) + written + MACS, static_key(theirs).public)),
        message(B, struct.pack("<III", 2, 8, 7) + answer + MACS),
    ]
    for counter, packet in enumerate(there):
        messages.append(message(A, struct.pack("<IIQ", 4, 8, counter) + bytes(a.encrypt(padded(packet)))))
    for counter, packet in enumerate(back):
        messages.append(message(B, struct.pack("<IIQ", 4, 7, counter) + bytes(b.encrypt(padded(packet)))))
    return Conversation(
        messages,
        {
            "statics": line("LOCAL_STATIC_PRIVATE_KEY", ours) + line("LOCAL_STATIC_PRIVATE_KEY", theirs),
            "public": line("REMOTE_STATIC_PUBLIC_KEY", static_key(theirs).public),
            "initiator": line("LOCAL_EPHEMERAL_PRIVATE_KEY", first),
            "responder": line("LOCAL_EPHEMERAL_PRIVATE_KEY", second),
            "psk": line("PRESHARED_KEY", psk),
        },
    )


def padded(packet: bytes) -> bytes:
    return packet + bytes(-len(packet) % 16)


@pytest.mark.parametrize("psk", [bytes(32), b"p" * 32], ids=["none", "psk"])
@pytest.mark.parametrize("end", ["initiator", "responder"])
def test_ephemeral_key_of_either_end_decrypts_both_directions(end: str, psk: bytes) -> None:
    messages, keys = conversation(psk)
    log = keys["public"] + keys["statics"] + keys[end] + keys["psk"] * 2
    found = decrypt(messages, read_keys(log))
    assert [(inner.message, inner.packet) for inner in found.inner] == [(messages[2], V4), (messages[3], V6)]
    assert [len(inner.plaintext) for inner in found.inner] == [32, 48]
    assert (found.unknown, found.forged) == ([], [])


@pytest.mark.parametrize("lacking", ["statics", "ephemerals", "psk", "initiation"])
def test_data_is_unknown_without_keys_of_its_session(lacking: str) -> None:
    messages, keys = conversation(b"p" * 32)
    if lacking == "initiation":
        del messages[0]
    parts = {"statics": keys["statics"], "ephemerals": keys["initiator"], "psk": keys["psk"]}
    found = decrypt(messages, read_keys("".join(text for name, text in parts.items() if name != lacking)))
    assert (found.inner, found.unknown, found.forged) == ([], messages[-2:], [])


def test_changed_data_is_forged() -> None:
    messages, keys = conversation()
    changed = bytearray(messages[2].payload)
    changed[20] ^= 1
    messages[2] = message(A, bytes(changed))
    found = decrypt(messages, read_keys(keys["statics"] + keys["responder"]))
    assert (len(found.inner), found.unknown, found.forged) == (1, [], [messages[2]])


@pytest.mark.parametrize("end", ["responder", "initiator"])
@pytest.mark.parametrize("psk", [b"p" * 32, b"q" * 32], ids=["same", "other"])
def test_response_is_opened_with_preshared_key_of_its_sender(end: str, psk: bytes) -> None:
    messages, keys = conversation(b"p" * 32)
    handshakes = Handshakes(read_keys(keys["statics"] + keys[end] + line("PRESHARED_KEY", psk)))
    for one in messages[:2]:
        handshakes.take(one.kind, one.payload)
    # What the initiator has logged says nothing about the preshared key of the responder.
    assert handshakes.responses == ({messages[1].payload: psk == b"p" * 32} if end == "responder" else {})


def test_initiation_with_wrong_mac1_begins_no_session() -> None:
    (initiation, *rest), keys = conversation()
    wrong = replace(initiation, payload=initiation.payload[:-32] + bytes(32))
    found = decrypt([wrong, *rest], read_keys("".join(keys.values())))
    assert (found.inner, len(found.unknown)) == ([], 2)


@pytest.mark.parametrize("plaintext", [b"", b"\x45", bytes([0x15]) + bytes(15)], ids=["keepalive", "short", "not-ip"])
def test_plaintext_that_is_no_ip_packet_is_kept_whole(plaintext: bytes) -> None:
    assert Inner(message(A, b""), plaintext).packet == plaintext


@pytest.mark.parametrize("length", [19, 22], ids=["below-header", "above-plaintext"])
def test_packet_with_impossible_length_is_kept_whole(length: int) -> None:
    plaintext = V4[:2] + length.to_bytes(2) + V4[4:]
    assert Inner(message(A, b""), plaintext).packet == plaintext
