"""Decrypt the data messages of a capture with the keys that programs have logged.

The static keys open the initiations. A session's keys need an ephemeral key of either side and the preshared key, which
only a program can tell: `key_log` in its manifest. Sources: the whitepaper, section 5.4; Wireshark's key log format.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.wire import noise
from harness.wire.messages import DATA, FIELDS, INITIATION, RESPONSE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.wire.messages import Message

_NO_PRESHARED_KEY: Final = bytes(32)
# By IP version: the length of the shortest header, where the length of the packet is in it, and how much of the header
# that length counts.
_HEADERS: Final = {4: (20, 2, 20), 6: (40, 4, 0)}


@dataclass(frozen=True, slots=True)
class Inner:
    """A data message and what it has inside. plaintext: with its padding; empty for a keepalive."""

    message: Message
    plaintext: bytes

    @property
    def packet(self) -> bytes:
        """The inner packet without padding, by the length in its header; the plaintext if it is no IP packet."""
        return packet_of(self.plaintext)


def packet_of(plaintext: bytes) -> bytes:
    """Return the inner packet without padding, by the length in its header; the whole if that makes no sense."""
    version = plaintext[0] >> 4 if plaintext else 0
    if version not in _HEADERS:
        return plaintext
    header, start, counted = _HEADERS[version]
    length = int.from_bytes(plaintext[start : start + 2]) + header - counted
    return plaintext[:length] if header <= length <= len(plaintext) else plaintext


@dataclass(slots=True)
class Keys:
    """The keys of a key log: private ones, and preshared keys.

    ephemerals: by their public keys. logged_with: the preshared key that the program logged after an ephemeral key, by
    the public key of the latter.
    """

    statics: list[noise.Static] = field(default_factory=list)
    ephemerals: dict[bytes, noise.Static] = field(default_factory=dict)
    logged_with: dict[bytes, bytes] = field(default_factory=dict)
    preshared: list[bytes] = field(default_factory=lambda: [_NO_PRESHARED_KEY])


def read_keys(log: str) -> Keys:
    """Read a key log: the text of `harness.implementations.keylog.key_log`."""
    keys = Keys()
    last = b""
    for line in log.splitlines():
        name, _, value = line.partition(" = ")
        key = base64.b64decode(value)
        if name == "LOCAL_STATIC_PRIVATE_KEY":
            keys.statics.append(noise.static_key(key))
        elif name == "LOCAL_EPHEMERAL_PRIVATE_KEY":
            ephemeral = noise.Static(key)
            last = ephemeral.public
            keys.ephemerals[last] = ephemeral
        elif name == "PRESHARED_KEY":
            keys.logged_with[last] = key
            if key not in keys.preshared:
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
    handshakes = Handshakes(keys)
    for message in messages:
        if message.kind != DATA:
            handshakes.take(message.kind, message.payload)
            continue
        key = handshakes.transport_keys.get(noise.index(message.payload))
        plaintext = open_data(key, message.payload) if key else None
        if plaintext is not None:
            found.inner.append(Inner(message, plaintext))
        else:
            (found.forged if key else found.unknown).append(message)
    return found


def open_data(key: bytes, payload: bytes) -> bytes | None:
    """Return the plaintext of a data message; None if it does not authenticate."""
    start, _ = FIELDS[DATA]["packet"]
    return noise.open_sealed(key, payload[start:], b"", bytes(4) + noise.fields(DATA, payload)["counter"])


class Handshakes:
    """Follows handshakes.

    transport_keys: the keys of their sessions, by the receiver index of the data. responses: those whose sender has
    logged the ephemeral key with a preshared key, and whether they authenticate with these two.
    """

    def __init__(self, keys: Keys) -> None:
        self.transport_keys: dict[int, bytes] = {}
        self.responses: dict[bytes, bool] = {}
        self._keys = keys
        self._initiations: dict[int, tuple[noise.Opened, bytes]] = {}

    def take(self, kind: int, payload: bytes) -> dict[int, bytes]:
        """Take the next message, in the order in which they passed; returns the keys that it led to."""
        if kind == INITIATION:
            # The device that it is for looks at mac1 first, too: it is a hundred times cheaper than to open a message.
            recipients = (static for static in self._keys.statics if noise.has_mac1(payload, static.public))
            opened = (static.open_initiation(payload) for static in recipients)
            if found := next((one for one in opened if one is not None and one.timestamp is not None), None):
                self._initiations[noise.index(payload)] = found, payload
            return {}
        made = self._respond(payload) if kind == RESPONSE else {}
        self.transport_keys |= made
        return made

    def _respond(self, payload: bytes) -> dict[int, bytes]:
        receiver = noise.receiver(payload)
        if receiver not in self._initiations:
            return {}
        opened, initiation = self._initiations[receiver]
        if (shared := self._shared(opened, initiation, payload)) is None:
            return {}
        logged = self._keys.logged_with.get(noise.fields(RESPONSE, payload)["ephemeral"])
        for preshared in self._keys.preshared if logged is None else (logged,):
            if found := noise.open_response(opened, payload, shared, preshared):
                self.responses |= {} if logged is None else {payload: True}
                return dict(zip((noise.index(payload), receiver), found, strict=True))
        if logged is not None:
            self.responses[payload] = False
        return {}

    def _shared(self, opened: noise.Opened, initiation: bytes, response: bytes) -> tuple[bytes, bytes] | None:
        """Return the secrets of the responder's ephemeral key with both keys of the initiator, from either end."""
        theirs = noise.fields(RESPONSE, response)["ephemeral"]
        ours = noise.fields(INITIATION, initiation)["ephemeral"]
        if ephemeral := self._keys.ephemerals.get(theirs):
            return ephemeral.exchange(ours), ephemeral.exchange(opened.static)
        ephemeral = self._keys.ephemerals.get(ours)
        static = next((static for static in self._keys.statics if static.public == opened.static), None)
        return (ephemeral.exchange(theirs), static.exchange(theirs)) if ephemeral and static else None
