"""Perform the handshake, Noise_IKpsk2, and hold the keypairs it yields.

Mirrors noise.c of the driver; sections 5.4.2 to 5.4.5 of the paper. The steps of a message are headed by the tokens of
the Noise paper. Who the initiator claims to be is known only in the middle of its message, and this file knows no
peers: `OpenedInitiation` goes to the caller, who finds the peer and lets its `Handshake` go on.

Keys are bytes, which Python gives no way to wipe: dropping the last reference is all that erasing can mean here.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Self

from refwg.counter import ReplayWindow
from refwg.crypto import Aead, blake2s_hash, clamp, dh, kdf, public_key_of
from refwg.errors import DropReason, LowOrderPoint, NotAuthentic, Refused
from refwg.messages import (
    INITIATION_SPACING,
    SECOND,
    TIMESTAMP_LENGTH,
    TIMESTAMP_WHITENING,
    ZERO_KEY,
    Initiation,
    Response,
)

CONSTRUCTION: Final = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER: Final = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
INITIAL_CHAINING_KEY: Final = blake2s_hash(CONSTRUCTION)
INITIAL_HASH: Final = blake2s_hash(INITIAL_CHAINING_KEY, IDENTIFIER)
# TAI runs ahead of Unix time; ten seconds are what it was at the epoch, and what everybody uses.
TAI64_EPOCH: Final = 2**62 + 10


def timestamp(wall_clock: int) -> bytes:
    """TAI64N of nanoseconds since 1970, big-endian so that byte order is time order.

    The last bits are cleared: they would tell how fast this machine is, and how its clock drifts.
    """
    seconds, nanoseconds = divmod(wall_clock, SECOND)
    whitened = nanoseconds // TIMESTAMP_WHITENING * TIMESTAMP_WHITENING
    return (TAI64_EPOCH + seconds).to_bytes(8) + whitened.to_bytes(4)


@dataclass(frozen=True, slots=True)
class StaticIdentity:
    """The long-term keypair of a device."""

    private: bytes
    public: bytes

    @classmethod
    def from_private(cls, private: bytes) -> Self:
        clamped = clamp(private)
        return cls(clamped, public_key_of(clamped))


@dataclass(slots=True)
class Transcript:
    """Chaining key and hash: everything said so far, and all secrets shared so far."""

    chaining_key: bytes
    hash: bytes

    @classmethod
    def start(cls, responder_static: bytes) -> Self:
        return cls(INITIAL_CHAINING_KEY, blake2s_hash(INITIAL_HASH, responder_static))

    def mix_hash(self, data: bytes) -> None:
        self.hash = blake2s_hash(self.hash, data)

    def mix_ephemeral(self, public: bytes) -> None:
        """Token e. With a preshared key in play the ephemeral goes into the chaining key as well."""
        self.mix_hash(public)
        (self.chaining_key,) = kdf(1, self.chaining_key, public)

    def mix_key(self, secret: bytes) -> bytes:
        """Take in a shared secret and return a key for what follows."""
        self.chaining_key, key = kdf(2, self.chaining_key, secret)
        return key

    def mix_dh(self, private: bytes, public: bytes) -> bytes:
        """Tokens ee, es, se and ss."""
        return self.mix_key(dh(private, public))

    def mix_psk(self, preshared_key: bytes) -> bytes:
        """Token psk."""
        self.chaining_key, hashed, key = kdf(3, self.chaining_key, preshared_key)
        self.mix_hash(hashed)
        return key

    def seal(self, key: bytes, plaintext: bytes) -> bytes:
        ciphertext = Aead(key).seal(0, plaintext, self.hash)
        self.mix_hash(ciphertext)
        return ciphertext

    def open(self, key: bytes, ciphertext: bytes) -> bytes:
        plaintext = Aead(key).open(0, ciphertext, self.hash)
        self.mix_hash(ciphertext)
        return plaintext


class HandshakeState(Enum):
    """Named after what has happened last."""

    ZEROED = auto()
    CREATED_INITIATION = auto()
    CONSUMED_INITIATION = auto()
    CREATED_RESPONSE = auto()
    CONSUMED_RESPONSE = auto()


@dataclass(frozen=True, slots=True)
class OpenedInitiation:
    """An initiation of which the first half is read: `remote_static` says who claims to have sent it."""

    message: Initiation
    remote_static: bytes
    transcript: Transcript


def open_initiation(identity: StaticIdentity | None, message: Initiation) -> OpenedInitiation:
    """Read an initiation as far as it can be read without knowing the peer."""
    if identity is None:
        raise Refused(DropReason.NO_IDENTITY)
    transcript = Transcript.start(identity.public)
    try:
        # e
        transcript.mix_ephemeral(message.ephemeral)
        # es
        key = transcript.mix_dh(identity.private, message.ephemeral)
        # s
        remote_static = transcript.open(key, message.encrypted_static)
    except (LowOrderPoint, NotAuthentic) as error:
        raise _refusal(error) from error
    return OpenedInitiation(message, remote_static, transcript)


def static_static(identity: StaticIdentity | None, remote_static: bytes) -> bytes | None:
    """The secret of both static keys, computed once for all handshakes; None if there can be no handshake."""
    if identity is None:
        return None
    try:
        return dh(identity.private, remote_static)
    except LowOrderPoint:
        return None


@dataclass(slots=True, eq=False)
class Keypair:
    """A session: one key for each direction.

    birthdate: when we derived it. local_index: what the other side puts into its messages; remote_index: what we put.
    """

    i_am_the_initiator: bool
    local_index: int
    remote_index: int
    sending: Aead
    receiving: Aead
    birthdate: int
    is_valid_for_sending: bool = True
    sending_counter: int = 0
    receiving_counter: ReplayWindow = field(default_factory=ReplayWindow)

    def has_expired(self, age: int, now: int) -> bool:
        return now >= self.birthdate + age


@dataclass(slots=True)
class Handshake:
    """The one handshake with a peer that may be under way, in either role.

    precomputed_static_static: None if we have no identity or the peer's key is a point of low order.
    latest_timestamp: the greatest that was accepted; it outlives sessions, and only the peer's removal ends it.
    """

    remote_static: bytes
    preshared_key: bytes = ZERO_KEY
    precomputed_static_static: bytes | None = None
    state: HandshakeState = HandshakeState.ZEROED
    local_index: int | None = None
    remote_index: int = 0
    ephemeral_private: bytes = b""
    remote_ephemeral: bytes = b""
    transcript: Transcript = field(default_factory=lambda: Transcript(b"", b""))
    latest_timestamp: bytes = bytes(TIMESTAMP_LENGTH)
    last_initiation_consumption: int | None = None

    def clear(self) -> None:
        """Forget everything that belongs to this one handshake; the caller gives the index free."""
        self.state = HandshakeState.ZEROED
        self.local_index = None
        self.remote_index = 0
        self.ephemeral_private = self.remote_ephemeral = b""
        self.transcript = Transcript(b"", b"")

    def create_initiation(
        self, identity: StaticIdentity | None, *, ephemeral: bytes, timestamp: bytes, sender_index: int
    ) -> Initiation:
        """Begin a handshake, and abandon what was under way."""
        if identity is None:
            raise Refused(DropReason.NO_IDENTITY)
        if self.precomputed_static_static is None:
            raise Refused(DropReason.LOW_ORDER_POINT)
        transcript = Transcript.start(self.remote_static)
        # e
        ephemeral_private = clamp(ephemeral)
        ephemeral_public = public_key_of(ephemeral_private)
        transcript.mix_ephemeral(ephemeral_public)
        # es
        key = transcript.mix_dh(ephemeral_private, self.remote_static)
        # s
        encrypted_static = transcript.seal(key, identity.public)
        # ss
        key = transcript.mix_key(self.precomputed_static_static)
        # the payload is the timestamp
        encrypted_timestamp = transcript.seal(key, timestamp)

        self.state = HandshakeState.CREATED_INITIATION
        self.local_index = sender_index
        self.ephemeral_private, self.transcript = ephemeral_private, transcript
        return Initiation(
            sender_index=sender_index,
            ephemeral=ephemeral_public,
            encrypted_static=encrypted_static,
            encrypted_timestamp=encrypted_timestamp,
        )

    def consume_initiation(self, opened: OpenedInitiation, now: int) -> None:
        """Read the second half of an initiation; ours, if one is pending, is abandoned.

        Whatever is refused leaves no trace, so that the same bytes may come again.
        """
        if self.precomputed_static_static is None:
            raise Refused(DropReason.LOW_ORDER_POINT)
        transcript, message = opened.transcript, opened.message
        # ss
        key = transcript.mix_key(self.precomputed_static_static)
        # the payload is the timestamp
        try:
            timestamp = transcript.open(key, message.encrypted_timestamp)
        except NotAuthentic as error:
            raise _refusal(error) from error
        if timestamp <= self.latest_timestamp:
            raise Refused(DropReason.OLD_TIMESTAMP)
        last = self.last_initiation_consumption
        if last is not None and now < last + INITIATION_SPACING:
            raise Refused(DropReason.INITIATION_FLOOD)

        self.state = HandshakeState.CONSUMED_INITIATION
        self.remote_index, self.remote_ephemeral = message.sender_index, message.ephemeral
        self.transcript, self.latest_timestamp = transcript, timestamp
        self.last_initiation_consumption = now

    def create_response(self, *, ephemeral: bytes, sender_index: int) -> Response:
        """Answer the initiation that was consumed."""
        transcript = copy(self.transcript)
        # e
        ephemeral_private = clamp(ephemeral)
        ephemeral_public = public_key_of(ephemeral_private)
        transcript.mix_ephemeral(ephemeral_public)
        try:
            # ee
            transcript.mix_dh(ephemeral_private, self.remote_ephemeral)
            # se
            transcript.mix_dh(ephemeral_private, self.remote_static)
        except LowOrderPoint as error:
            raise _refusal(error) from error
        # psk
        key = transcript.mix_psk(self.preshared_key)
        # the payload is empty: only the tag counts
        encrypted_nothing = transcript.seal(key, b"")

        self.state = HandshakeState.CREATED_RESPONSE
        self.local_index = sender_index
        self.ephemeral_private, self.transcript = ephemeral_private, transcript
        return Response(
            sender_index=sender_index,
            receiver_index=self.remote_index,
            ephemeral=ephemeral_public,
            encrypted_nothing=encrypted_nothing,
        )

    def consume_response(self, identity: StaticIdentity | None, message: Response) -> None:
        """Read the answer to our initiation; one that is refused leaves the handshake waiting for a better one."""
        if identity is None:
            raise Refused(DropReason.NO_IDENTITY)
        if self.state is not HandshakeState.CREATED_INITIATION:
            raise Refused(DropReason.UNEXPECTED_RESPONSE)
        transcript = copy(self.transcript)
        try:
            # e
            transcript.mix_ephemeral(message.ephemeral)
            # ee
            transcript.mix_dh(self.ephemeral_private, message.ephemeral)
            # se
            transcript.mix_dh(identity.private, message.ephemeral)
            # psk
            key = transcript.mix_psk(self.preshared_key)
            # the payload is empty: only the tag counts
            transcript.open(key, message.encrypted_nothing)
        except (LowOrderPoint, NotAuthentic) as error:
            raise _refusal(error) from error

        self.state = HandshakeState.CONSUMED_RESPONSE
        self.remote_index, self.remote_ephemeral = message.sender_index, message.ephemeral
        self.transcript = transcript

    def begin_session(self, now: int) -> Keypair:
        """Turn a finished handshake into a session, and forget the handshake; the session takes over its index."""
        if self.local_index is None:
            raise AssertionError("a session begins only after a response")
        i_am_the_initiator = self.state is HandshakeState.CONSUMED_RESPONSE
        initiator_sends, responder_sends = kdf(2, self.transcript.chaining_key, b"")
        sending, receiving = (
            (initiator_sends, responder_sends) if i_am_the_initiator else (responder_sends, initiator_sends)
        )
        keypair = Keypair(
            i_am_the_initiator=i_am_the_initiator,
            local_index=self.local_index,
            remote_index=self.remote_index,
            sending=Aead(sending),
            receiving=Aead(receiving),
            birthdate=now,
        )
        self.clear()
        return keypair


@dataclass(slots=True)
class Keypairs:
    """The sessions of a peer: data goes out on `current` only and may come in on all three.

    Each method returns the sessions that it destroyed; the caller gives their indices free.
    """

    previous: Keypair | None = None
    current: Keypair | None = None
    next: Keypair | None = None

    def add_new(self, keypair: Keypair) -> list[Keypair]:
        """Take in a new session.

        An initiator may use it at once: it knows that the other side has it. A responder must wait until something
        comes in on it.
        """
        if not keypair.i_am_the_initiator:
            destroyed = [self.previous, self.next]
            self.previous, self.next = None, keypair
        elif self.next is not None:
            destroyed = [self.previous, self.current]
            self.previous, self.current, self.next = self.next, keypair, None
        else:
            destroyed = [self.previous]
            self.previous, self.current = self.current, keypair
        return [session for session in destroyed if session is not None]

    def received_with(self, keypair: Keypair) -> tuple[bool, list[Keypair]]:
        """Something authentic came in: if it came on `next`, that one is confirmed and becomes `current`."""
        if keypair is not self.next:
            return False, []
        destroyed = [] if self.previous is None else [self.previous]
        self.previous, self.current, self.next = self.current, keypair, None
        return True, destroyed

    def forbid_sending(self) -> None:
        """Our identity has changed: nothing goes out on these sessions any more, but what is under way may come in."""
        for keypair in (self.current, self.next):
            if keypair is not None:
                keypair.is_valid_for_sending = False

    def clear(self) -> list[Keypair]:
        destroyed = [self.previous, self.current, self.next]
        self.previous = self.current = self.next = None
        return [session for session in destroyed if session is not None]


def _refusal(error: LowOrderPoint | NotAuthentic) -> Refused:
    is_low_order = isinstance(error, LowOrderPoint)
    return Refused(DropReason.LOW_ORDER_POINT if is_low_order else DropReason.INVALID_TAG)
