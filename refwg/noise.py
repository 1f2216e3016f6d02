"""Perform the handshake, Noise_IKpsk2, and hold the keypairs it yields.

Mirrors noise.c of the driver; sections 5.4.2 to 5.4.5 of the paper. A comment above each step of a message names its
token in the Noise framework: e, s, ee, es, se, ss, psk. The sender of an initiation is known only after its first half
is decrypted, and this module has no table of peers. So `open_initiation` returns an `OpenedInitiation`; the caller
looks up the peer and passes it to the peer's `Handshake`.

Python cannot wipe the memory of bytes. Keys are erased by dropping the last reference to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple, Self

from refwg.counter import ReplayWindow
from refwg.crypto import Aead, PrivateKey, blake2s_hash, kdf
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
# tai64n_now: TAI was 10 s ahead of Unix time in 1970; every implementation keeps that difference.
TAI64_EPOCH: Final = 2**62 + 10


def timestamp(wall_clock: int) -> bytes:
    """Return the TAI64N timestamp of nanoseconds since 1970: 12 bytes, big-endian, so that bytes compare like times.

    The last 24 bits are cleared: they would leak how fast this machine is, and how its clock drifts.
    """
    # 5.1: 24 bits of the nanoseconds may be cut off
    seconds, nanoseconds = divmod(wall_clock, SECOND)
    whitened = nanoseconds // TIMESTAMP_WHITENING * TIMESTAMP_WHITENING
    return (TAI64_EPOCH + seconds).to_bytes(8) + whitened.to_bytes(4)


class StaticIdentity(NamedTuple):
    """The long-term X25519 keypair of a device, 32 bytes each; the private key is clamped."""

    private: bytes
    public: bytes
    key: PrivateKey

    @classmethod
    def from_private(cls, private: bytes) -> Self:
        """Clamp a private key of 32 bytes and compute its public key."""
        key = PrivateKey(private)
        return cls(key.raw, key.public, key)


@dataclass(slots=True)
class Transcript:
    """The symmetric state of a handshake: `hash` covers all messages so far, `chaining_key` all shared secrets."""

    chaining_key: bytes
    hash: bytes

    @classmethod
    def start(cls, responder_static: bytes) -> Self:
        """Return the state before the first message; both sides mix in the responder's public key (5.4.2)."""
        return cls(INITIAL_CHAINING_KEY, blake2s_hash(INITIAL_HASH, responder_static))

    def copy(self) -> Transcript:
        """Return a copy, so that a message that is refused changes nothing."""
        return Transcript(self.chaining_key, self.hash)

    def mix_hash(self, data: bytes) -> None:
        """Hash `data` into the transcript, so that later tags cover it."""
        self.hash = blake2s_hash(self.hash, data)

    def mix_ephemeral(self, public: bytes) -> None:
        """Token e. Because of the preshared key the ephemeral is mixed into the chaining key as well."""
        self.mix_hash(public)
        (self.chaining_key,) = kdf(1, self.chaining_key, public)

    def mix_key(self, secret: bytes) -> bytes:
        """Mix in a shared secret and return the key for the next encrypted field."""
        self.chaining_key, key = kdf(2, self.chaining_key, secret)
        return key

    def mix_dh(self, private: PrivateKey, public: bytes) -> bytes:
        """Tokens ee, es, se and ss: mix in a Diffie-Hellman result; raises LowOrderPoint if it is zero."""
        return self.mix_key(private.dh(public))

    def mix_psk(self, preshared_key: bytes) -> bytes:
        """Token psk: mix in the preshared key, 32 zero bytes if there is none (5.2)."""
        self.chaining_key, hashed, key = kdf(3, self.chaining_key, preshared_key)
        self.mix_hash(hashed)
        return key

    def seal(self, key: bytes, plaintext: bytes) -> bytes:
        """Encrypt a field of a message, and mix the ciphertext into the hash."""
        ciphertext = Aead(key).seal(0, plaintext, self.hash)
        self.mix_hash(ciphertext)
        return ciphertext

    def open(self, key: bytes, ciphertext: bytes) -> bytes:
        """Decrypt a field of a message; raises NotAuthentic and leaves the hash unchanged if the tag is wrong."""
        # 5.4.2: the associated data is the hash of everything before the field
        plaintext = Aead(key).open(0, ciphertext, self.hash)
        self.mix_hash(ciphertext)
        return plaintext


class HandshakeState(Enum):
    """State of a handshake, named after its last step (`enum noise_handshake_state` of the driver)."""

    ZEROED = auto()
    CREATED_INITIATION = auto()
    CONSUMED_INITIATION = auto()
    CREATED_RESPONSE = auto()
    CONSUMED_RESPONSE = auto()


class OpenedInitiation(NamedTuple):
    """An initiation whose first half is decrypted; remote_static: the static key that the sender claims."""

    message: Initiation
    remote_static: bytes
    transcript: Transcript


def open_initiation(identity: StaticIdentity | None, message: Initiation) -> OpenedInitiation:
    """Decrypt the first half of an initiation, which contains the peer's static key.

    Raises Refused if the device has no private key, the ephemeral is a point of low order, or the tag is wrong.
    """
    # wg_noise_handshake_consume_initiation: nothing can be decrypted without a private key
    if identity is None:
        raise Refused(DropReason.NO_IDENTITY)
    transcript = Transcript.start(identity.public)
    # 5.4.2: first message, tokens e, es, s
    try:
        # e
        transcript.mix_ephemeral(message.ephemeral)
        # es
        key = transcript.mix_dh(identity.key, message.ephemeral)
        # s
        remote_static = transcript.open(key, message.encrypted_static)
    except (LowOrderPoint, NotAuthentic) as error:
        raise _refusal(error) from error
    return OpenedInitiation(message, remote_static, transcript)


def static_static(identity: StaticIdentity | None, remote_static: bytes) -> bytes | None:
    """Return the Diffie-Hellman result of both static keys, computed once for all handshakes.

    None if no handshake is possible: the device has no private key, or the peer's key is a point of low order.
    """
    if identity is None:
        return None
    # wg_noise_precompute_static_static: a zero result stands for "none", and every handshake with it fails
    try:
        return identity.key.dh(remote_static)
    except LowOrderPoint:
        return None


@dataclass(slots=True, eq=False)
class Keypair:
    """A session: one key for each direction.

    birthdate: when the keys were derived, in nanoseconds. local_index: the receiver index of messages to us;
    remote_index: the receiver index of our messages. sending_counter: the counter of the next packet.
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
        """True once the session is `age` nanoseconds old (`wg_birthdate_has_expired`)."""
        return now >= self.birthdate + age


@dataclass(slots=True)
class Handshake:
    """The handshake with a peer, in either role; a peer has one at a time.

    precomputed_static_static: None if the device has no private key or the peer's key is a point of low order.
    latest_timestamp: the greatest accepted one; it is kept until the peer is removed.
    last_initiation_consumption: when an initiation was last accepted, in nanoseconds; None: never.
    """

    remote_static: bytes
    preshared_key: bytes = ZERO_KEY
    precomputed_static_static: bytes | None = None
    state: HandshakeState = HandshakeState.ZEROED
    local_index: int | None = None
    remote_index: int = 0
    ephemeral_key: PrivateKey | None = None
    remote_ephemeral: bytes = b""
    transcript: Transcript = field(default_factory=lambda: Transcript(b"", b""))
    latest_timestamp: bytes = bytes(TIMESTAMP_LENGTH)
    last_initiation_consumption: int | None = None

    def clear(self) -> None:
        """Erase the state of this handshake, but not `latest_timestamp`; the caller frees the index."""
        self.state = HandshakeState.ZEROED
        self.local_index = None
        self.remote_index = 0
        self.ephemeral_key, self.remote_ephemeral = None, b""
        self.transcript = Transcript(b"", b"")

    def create_initiation(
        self, identity: StaticIdentity | None, *, ephemeral: bytes, timestamp: bytes, sender_index: int
    ) -> Initiation:
        """Begin a handshake and return its first message; a handshake in progress is abandoned.

        ephemeral: 32 random bytes. timestamp: 12 bytes, see `timestamp`. Raises Refused if the device has no private
        key, or the peer's key is a point of low order.
        """
        # wg_noise_handshake_create_initiation: fails without a private key, or if the precomputed secret is zero
        if identity is None:
            raise Refused(DropReason.NO_IDENTITY)
        if self.precomputed_static_static is None:
            raise Refused(DropReason.LOW_ORDER_POINT)
        # 5.4.2: first message, tokens e, es, s, ss
        transcript = Transcript.start(self.remote_static)
        # e
        ephemeral_key = PrivateKey(ephemeral)
        transcript.mix_ephemeral(ephemeral_key.public)
        # es
        key = transcript.mix_dh(ephemeral_key, self.remote_static)
        # s
        encrypted_static = transcript.seal(key, identity.public)
        # ss
        key = transcript.mix_key(self.precomputed_static_static)
        # the payload is the timestamp
        encrypted_timestamp = transcript.seal(key, timestamp)

        self.state = HandshakeState.CREATED_INITIATION
        self.local_index = sender_index
        self.ephemeral_key, self.transcript = ephemeral_key, transcript
        return Initiation(
            sender_index=sender_index,
            ephemeral=ephemeral_key.public,
            encrypted_static=encrypted_static,
            encrypted_timestamp=encrypted_timestamp,
        )

    def consume_initiation(self, opened: OpenedInitiation, now: int) -> None:
        """Check and accept the second half of an initiation; a pending handshake of our own is abandoned.

        Raises Refused. A refused message changes nothing, so the same message may be accepted later.
        """
        # mix_precomputed_dh: a zero secret is refused
        if self.precomputed_static_static is None:
            raise Refused(DropReason.LOW_ORDER_POINT)
        # 5.4.2: first message, token ss and the timestamp
        transcript, message = opened.transcript, opened.message
        # ss
        key = transcript.mix_key(self.precomputed_static_static)
        # the payload is the timestamp
        try:
            timestamp = transcript.open(key, message.encrypted_timestamp)
        except NotAuthentic as error:
            raise _refusal(error) from error
        # 5.1: the timestamp must be greater than all earlier ones, so that a replay cannot end a session
        if timestamp <= self.latest_timestamp:
            raise Refused(DropReason.OLD_TIMESTAMP)
        # wg_noise_handshake_consume_initiation: at most 50 initiations a second from one peer
        last = self.last_initiation_consumption
        if last is not None and now < last + INITIATION_SPACING:
            raise Refused(DropReason.INITIATION_FLOOD)

        self.state = HandshakeState.CONSUMED_INITIATION
        self.remote_index, self.remote_ephemeral = message.sender_index, message.ephemeral
        self.transcript, self.latest_timestamp = transcript, timestamp
        self.last_initiation_consumption = now

    def create_response(self, *, ephemeral: bytes, sender_index: int) -> Response:
        """Return the response to the accepted initiation.

        ephemeral: 32 random bytes. Raises Refused if a key of the peer is a point of low order.
        """
        # 5.4.3: second message, tokens e, ee, se, psk
        transcript = self.transcript.copy()
        # e
        ephemeral_key = PrivateKey(ephemeral)
        transcript.mix_ephemeral(ephemeral_key.public)
        try:
            # ee
            transcript.mix_dh(ephemeral_key, self.remote_ephemeral)
            # se
            transcript.mix_dh(ephemeral_key, self.remote_static)
        except LowOrderPoint as error:
            raise _refusal(error) from error
        # psk
        key = transcript.mix_psk(self.preshared_key)
        # the payload is empty, only its tag is sent
        encrypted_nothing = transcript.seal(key, b"")

        self.state = HandshakeState.CREATED_RESPONSE
        self.local_index = sender_index
        self.ephemeral_key, self.transcript = ephemeral_key, transcript
        return Response(
            sender_index=sender_index,
            receiver_index=self.remote_index,
            ephemeral=ephemeral_key.public,
            encrypted_nothing=encrypted_nothing,
        )

    def consume_response(self, identity: StaticIdentity | None, message: Response) -> None:
        """Check and accept the response to our initiation.

        Raises Refused. A refused response changes nothing, so the handshake still waits for a valid one.
        """
        # wg_noise_handshake_consume_response: needs a private key, and an initiation of ours that is not yet answered
        if identity is None:
            raise Refused(DropReason.NO_IDENTITY)
        if self.state is not HandshakeState.CREATED_INITIATION or self.ephemeral_key is None:
            raise Refused(DropReason.UNEXPECTED_RESPONSE)
        # 5.4.3: second message, tokens e, ee, se, psk
        transcript = self.transcript.copy()
        try:
            # e
            transcript.mix_ephemeral(message.ephemeral)
            # ee
            transcript.mix_dh(self.ephemeral_key, message.ephemeral)
            # se
            transcript.mix_dh(identity.key, message.ephemeral)
            # psk
            key = transcript.mix_psk(self.preshared_key)
            # the payload is empty, but its tag must verify
            transcript.open(key, message.encrypted_nothing)
        except (LowOrderPoint, NotAuthentic) as error:
            raise _refusal(error) from error

        self.state = HandshakeState.CONSUMED_RESPONSE
        self.remote_index, self.remote_ephemeral = message.sender_index, message.ephemeral
        self.transcript = transcript

    def begin_session(self, now: int) -> Keypair:
        """Turn a finished handshake into a session with the same index, and erase the handshake (5.4.5)."""
        if self.local_index is None:
            raise AssertionError("a session begins only after a response")
        # 5.4.5: the first key sends from initiator to responder, the second one back
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
    """The sessions of a peer: data is sent on `current` only and accepted on all three (6.3).

    Each method returns the sessions that it destroyed; the caller frees their indices.
    """

    previous: Keypair | None = None
    current: Keypair | None = None
    next: Keypair | None = None

    def add_new(self, keypair: Keypair) -> list[Keypair]:
        """Put a new session into its slot.

        The initiator uses it at once, because the response shows that the responder has it. The responder must wait
        for a packet on it.
        """
        # 6.3: the initiator's new session becomes current, the responder's becomes next (add_new_keypair)
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
        """Rotate the slots if this packet was the first on `next`; returns whether it was, and the destroyed sessions.

        Call it after every authenticated data packet.
        """
        # 6.3: the first packet on next confirms it (wg_noise_received_with_keypair)
        if keypair is not self.next:
            return False, []
        destroyed = [] if self.previous is None else [self.previous]
        self.previous, self.current, self.next = self.current, keypair, None
        return True, destroyed

    def forbid_sending(self) -> None:
        """Stop sending on `current` and `next`, because the private key has changed; they still receive."""
        for keypair in (self.current, self.next):
            if keypair is not None:
                keypair.is_valid_for_sending = False

    def clear(self) -> list[Keypair]:
        """Empty all three slots (`wg_noise_keypairs_clear`)."""
        destroyed = [self.previous, self.current, self.next]
        self.previous = self.current = self.next = None
        return [session for session in destroyed if session is not None]


def _refusal(error: LowOrderPoint | NotAuthentic) -> Refused:
    # mix_dh: a zero result is refused; message_decrypt: so is a tag that does not verify
    is_low_order = isinstance(error, LowOrderPoint)
    return Refused(DropReason.LOW_ORDER_POINT if is_low_order else DropReason.INVALID_TAG)
