"""Decrypt the data messages of a capture, with the keys that the programs of a lab have logged.

The static keys open the initiations. A session's keys need an ephemeral key of either side and the preshared key, which
only a program can tell: `key_log` in its manifest. Sources: the whitepaper, section 5.4; Wireshark's key log format.
"""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.wire import noise
from harness.wire.messages import DATA, FIELDS, INITIATION, RESPONSE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.wire.messages import Message

_NO_PRESHARED_KEY: Final = bytes(32)
_V4, _V6 = 4, 6
_V4_LENGTH, _V6_LENGTH = 2, 4  # where the length is in the header
_V6_HEADER: Final = 40


@dataclass(frozen=True, slots=True)
class Inner:
    """A data message and what it has inside. plaintext: with its padding; empty for a keepalive."""

    message: Message
    plaintext: bytes

    @property
    def packet(self) -> bytes:
        """The inner packet without padding, by the length in its header; the plaintext if it is no IP packet."""
        return self.plaintext[: _length(self.plaintext)]


def _length(packet: bytes) -> int:
    version = packet[0] >> 4 if len(packet) > _V4_LENGTH + 1 else 0
    if version == _V4:
        return int.from_bytes(packet[_V4_LENGTH : _V4_LENGTH + 2])
    if version == _V6:
        return _V6_HEADER + int.from_bytes(packet[_V6_LENGTH : _V6_LENGTH + 2])
    return len(packet)


@dataclass(slots=True)
class Keys:
    """The keys of a key log: private ones, and preshared keys. ephemerals: by their public keys."""

    statics: list[noise.Static] = field(default_factory=list)
    ephemerals: dict[bytes, noise.Static] = field(default_factory=dict)
    preshared: list[bytes] = field(default_factory=lambda: [_NO_PRESHARED_KEY])


def read_keys(log: str) -> Keys:
    """Read a key log: the text of `harness.implementations.keylog.key_log`."""
    keys = Keys()
    for line in log.splitlines():
        name, _, value = line.partition(" = ")
        key = base64.b64decode(value)
        if name == "LOCAL_STATIC_PRIVATE_KEY":
            keys.statics.append(noise.static_key(key))
        elif name == "LOCAL_EPHEMERAL_PRIVATE_KEY":
            ephemeral = noise.Static(key)
            keys.ephemerals[ephemeral.public] = ephemeral
        elif name == "PRESHARED_KEY" and key not in keys.preshared:
            keys.preshared.append(key)
    return keys


@dataclass(slots=True)
class Decryption:
    """The data messages of a capture. inner: those that were decrypted. unknown: those whose keys are not known.

    forged: those that do not authenticate, although the keys of their session are known.
    """

    inner: list[Inner] = field(default_factory=list)
    unknown: list[Message] = field(default_factory=list)
    forged: list[Message] = field(default_factory=list)


def decrypt(messages: Iterable[Message], keys: Keys) -> Decryption:
    """Decrypt data messages; messages: of both directions, in the order in which they passed."""
    found = Decryption()
    initiations: dict[bytes, tuple[noise.Opened, bytes]] = {}
    sessions: dict[bytes, bytes] = {}
    for message in messages:
        payload = message.payload
        if message.kind == INITIATION and (opened := _open(payload, keys)):
            initiations[noise.fields(INITIATION, payload)["sender"]] = opened, payload
        elif message.kind == RESPONSE:
            sessions |= _session(payload, initiations, keys)
        elif message.kind == DATA:
            _decrypt(message, sessions, found)
    return found


def _open(payload: bytes, keys: Keys) -> noise.Opened | None:
    opened = (static.open_initiation(payload) for static in keys.statics)
    return next((one for one in opened if one is not None and one.timestamp is not None), None)


def _session(payload: bytes, initiations: dict[bytes, tuple[noise.Opened, bytes]], keys: Keys) -> dict[bytes, bytes]:
    """Return the keys that a response leads to, by the receiver index of the messages that they decrypt."""
    response = noise.fields(RESPONSE, payload)
    if response["receiver"] not in initiations:
        return {}
    opened, initiation = initiations[response["receiver"]]
    ours = noise.fields(INITIATION, initiation)["ephemeral"]
    if ephemeral := keys.ephemerals.get(response["ephemeral"]):
        shared = ephemeral.exchange(ours), ephemeral.exchange(opened.static)
    elif ephemeral := keys.ephemerals.get(ours):
        static = next(static for static in keys.statics if static.public == opened.static)
        shared = ephemeral.exchange(response["ephemeral"]), static.exchange(response["ephemeral"])
    else:
        return {}
    for preshared in keys.preshared:
        if found := noise.open_response(opened, payload, shared, preshared):
            to_responder, to_initiator = found
            return {response["sender"]: to_responder, response["receiver"]: to_initiator}
    return {}


def _decrypt(message: Message, sessions: dict[bytes, bytes], found: Decryption) -> None:
    start, _ = FIELDS[DATA]["packet"]
    fields = noise.fields(DATA, message.payload)
    key = sessions.get(fields["receiver"])
    if key is None:
        found.unknown.append(message)
        return
    plaintext = noise.open_sealed(key, message.payload[start:], b"", struct.pack("<4xQ", message.counter))
    if plaintext is None:
        found.forged.append(message)
    else:
        found.inner.append(Inner(message, plaintext))
