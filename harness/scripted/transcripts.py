"""Compute messages with any of their values replaced, and keep each value by name.

Follows sections 5.4.2 to 5.4.7 of the whitepaper, with refwg's `Transcript`. Where a correct peer stops, as at a
Diffie-Hellman result of zero, this goes on: a device that lacks the check would do so too.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.scripted.session import Session
from refwg import cookie, crypto, messages
from refwg.errors import LowOrderPoint, NotAuthentic
from refwg.noise import Keypair, Transcript

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.scripted.intents import CookieReply, Data, Initiation, Outgoing, Response
    from refwg.noise import StaticIdentity

ZERO: Final = bytes(32)
_MACS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a correct peer would choose for one message.

    identity: of the peer. remote: the device's public key. ephemeral: 32 random bytes. index: of the new handshake.
    timestamp: 12 bytes. preshared_key: 32 bytes. cookie: the one with which mac2 is made, b"" for none. nonce: 24
    random bytes. value: 16 random bytes, a cookie to give.
    """

    identity: StaticIdentity
    remote: bytes
    ephemeral: bytes
    index: int
    timestamp: bytes
    preshared_key: bytes
    cookie: bytes = b""
    nonce: bytes = bytes(messages.COOKIE_NONCE_LENGTH)
    value: bytes = bytes(messages.COOKIE_LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A message that is ready to be sent. values: each value of its computation, in order, by name."""

    datagram: bytes = field(repr=False)
    values: Mapping[str, bytes] = field(repr=False)
    pending: Pending | None = None
    session: Session | None = None
    mac1: bytes = b""

    def made(self) -> Session:
        """Return the session that a response leads to; AssertionError for any other message."""
        if self.session is None:
            raise AssertionError("only a response leads to a session")
        return self.session


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """An initiation of the peer that waits for its response, for as long as the test wants."""

    sender_index: int
    ephemeral_private: bytes
    ephemeral: bytes
    static_private: bytes
    preshared_key: bytes
    transcript: Transcript


class _Recording:
    """A transcript that keeps each of its values by name."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.values: dict[str, bytes] = {}
        self._keep("start")

    def ephemeral(self, public: bytes) -> None:
        self.values["ephemeral"] = public
        self.transcript.mix_ephemeral(public)
        self._keep("e")

    def secret(self, token: str, secret: bytes) -> bytes:
        self.values[token] = secret
        key = self.transcript.mix_key(secret)
        self._keep(token)
        return key

    def psk(self, preshared_key: bytes) -> bytes:
        self.values["psk"] = preshared_key
        key = self.transcript.mix_psk(preshared_key)
        self._keep("psk")
        return key

    def seal(self, name: str, key: bytes, plaintext: bytes, instead: bytes | None) -> bytes:
        self.values[name] = plaintext
        if instead is None:
            sealed = self.transcript.seal(key, plaintext)
        else:
            sealed = instead
            self.transcript.mix_hash(sealed)
        self.values[f"{name}, encrypted"] = sealed
        self._keep(name)
        return sealed

    def _keep(self, token: str) -> None:
        for name, value in (("c", self.transcript.chaining_key), ("h", self.transcript.hash)):
            # Most tokens change one of them.
            if value not in self.values.values():
                self.values[f"{name} after {token}"] = value


def shared(private: bytes, public: bytes) -> bytes:
    """Return the Diffie-Hellman result; 32 zero bytes for a point of low order."""
    try:
        return crypto.dh(private, public)
    except LowOrderPoint:
        return ZERO


def _is_low_order(public: bytes) -> bool:
    return shared(crypto.clamp(bytes(range(32))), public) == ZERO


def _or(override: bytes | None, correct: bytes) -> bytes:
    return correct if override is None else override


def write_initiation(message: Initiation, draw: Draw) -> Written:
    """Compute an initiation; `pending` of the result waits for the response."""
    private = crypto.clamp(_or(message.ephemeral_private, draw.ephemeral))
    static_private = crypto.clamp(_or(message.static_private, draw.identity.private))
    transcript = Transcript.start(_or(message.responder_static, draw.remote))
    transcript.hash = _or(message.hash, transcript.hash)
    state = _Recording(transcript)
    ephemeral = _or(message.ephemeral, crypto.public_key_of(private))
    state.ephemeral(ephemeral)
    # The device computes es from its own key and this ephemeral: zero for a point of low order.
    key = state.secret("es", _or(message.es, ZERO if _is_low_order(ephemeral) else shared(private, draw.remote)))
    static = _or(message.static, crypto.public_key_of(static_private))
    encrypted_static = state.seal("static", key, static, message.encrypted_static)
    key = state.secret("ss", _or(message.ss, shared(static_private, draw.remote)))
    timestamp = _or(message.timestamp, draw.timestamp)
    encrypted_timestamp = state.seal("timestamp", key, timestamp, message.encrypted_timestamp)
    index = draw.index if message.sender_index is None else message.sender_index
    body = messages.Initiation(
        sender_index=index,
        ephemeral=ephemeral,
        encrypted_static=encrypted_static,
        encrypted_timestamp=encrypted_timestamp,
    ).to_bytes()
    pending = Pending(
        sender_index=index,
        ephemeral_private=private,
        ephemeral=ephemeral,
        static_private=static_private,
        preshared_key=draw.preshared_key,
        transcript=copy(state.transcript),
    )
    datagram, mac1 = _with_macs(body, message, draw, state.values)
    return Written(datagram=datagram, values=state.values, pending=pending, mac1=mac1)


def write_response(message: Response, draw: Draw, now: int) -> Written:
    """Compute a response; `session` of the result is what it leads to. now: ns, the birthdate of the session."""
    to = message.to
    private = crypto.clamp(_or(message.ephemeral_private, draw.ephemeral))
    state = _Recording(copy(to.transcript))
    state.transcript.hash = _or(message.hash, state.transcript.hash)
    ephemeral = _or(message.ephemeral, crypto.public_key_of(private))
    state.ephemeral(ephemeral)
    is_low = _is_low_order(ephemeral)
    state.secret("ee", _or(message.ee, ZERO if is_low else shared(private, to.ephemeral)))
    state.secret("se", _or(message.se, ZERO if is_low else shared(private, to.static)))
    key = state.psk(_or(message.preshared_key, draw.preshared_key))
    nothing = state.seal("nothing", key, _or(message.payload, b""), message.encrypted_nothing)
    index = draw.index if message.sender_index is None else message.sender_index
    receiver = to.sender_index if message.receiver_index is None else message.receiver_index
    # A payload that should not be there makes the message longer: so it is put together by hand.
    head = messages.Response.LAYOUT.pack(messages.MessageType.RESPONSE, index, receiver, ephemeral, b"", b"", b"")
    body = head[: 12 + 32] + nothing + bytes(_MACS)
    session = _session(state.transcript, is_initiator=False, local=index, remote=receiver, now=now)
    datagram, mac1 = _with_macs(body, message, draw, state.values)
    return Written(datagram=datagram, values=state.values, session=session, mac1=mac1)


def write_cookie_reply(message: CookieReply, draw: Draw) -> Written:
    """Compute a cookie reply to a message of the device."""
    nonce, value = _or(message.nonce, draw.nonce), _or(message.value, draw.value)
    mac1 = _or(message.mac1, message.to.mac1)
    key = cookie.cookie_key_of(_or(message.issuer, draw.identity.public))
    sealed = _or(message.encrypted_cookie, crypto.xseal(key, nonce, value, mac1))
    receiver = message.to.sender_index if message.receiver_index is None else message.receiver_index
    body = messages.CookieReply(receiver_index=receiver, nonce=nonce, encrypted_cookie=sealed).to_bytes()
    values = {"key": key, "nonce": nonce, "cookie": value, "mac1": mac1, "cookie, encrypted": sealed}
    return Written(datagram=_reshaped(_prefixed(body, message), message), values=values)


def write_data(message: Data) -> Written:
    """Compute transport data."""
    counter = message.counter if message.nonce is None else message.nonce
    sealed = _or(message.ciphertext, message.keypair.sending.seal(counter, message.plaintext))
    receiver = message.keypair.remote_index if message.receiver_index is None else message.receiver_index
    body = messages.Data(receiver_index=receiver, counter=message.counter, ciphertext=sealed).to_bytes()
    values = {"receiver": receiver.to_bytes(4), "counter": message.counter.to_bytes(8), "plaintext": message.plaintext}
    return Written(datagram=_reshaped(_prefixed(body, message), message), values=values)


def _with_macs(
    body: bytes, message: Initiation | Response, draw: Draw, values: dict[str, bytes]
) -> tuple[bytes, bytes]:
    """Put both macs into the last 32 bytes; returns the datagram and its mac1."""
    body = _prefixed(body, message)
    key = cookie.mac1_key_of(_or(message.mac1_recipient, draw.remote))
    mac1 = _or(message.mac1, cookie.compute_mac1(body, key))
    body = body[:-_MACS] + mac1 + bytes(messages.COOKIE_LENGTH)
    given = _or(message.cookie, draw.cookie)
    made = cookie.compute_mac2(body, given) if given else messages.ZERO_MAC
    mac2 = _or(message.mac2, made)
    values["mac1"], values["mac2"] = mac1, mac2
    if given:
        values["cookie"] = given
    return _reshaped(body[: -messages.COOKIE_LENGTH] + mac2, message), mac1


def _prefixed(body: bytes, message: Outgoing) -> bytes:
    return message.prefix + body[len(message.prefix) :]


def _reshaped(body: bytes, message: Outgoing) -> bytes:
    return (body if message.cut is None else body[: message.cut]) + message.suffix


def _session(transcript: Transcript, *, is_initiator: bool, local: int, remote: int, now: int) -> Session:
    # 5.4.5: the first key sends from initiator to responder, the second one back
    to_responder, to_initiator = crypto.kdf(2, transcript.chaining_key, b"")
    sending, receiving = (to_responder, to_initiator) if is_initiator else (to_initiator, to_responder)
    return Session(
        Keypair(
            i_am_the_initiator=is_initiator,
            local_index=local,
            remote_index=remote,
            sending=crypto.Aead(sending),
            receiving=crypto.Aead(receiving),
            birthdate=now,
        )
    )


@dataclass(frozen=True, slots=True)
class ReadInitiation:
    """What an initiation contains, and the transcript after it; values: as in Written."""

    static: bytes
    timestamp: bytes
    transcript: Transcript
    values: Mapping[str, bytes]


def read_initiation(private: bytes, public: bytes, message: messages.Initiation) -> ReadInitiation:
    """Decrypt an initiation with the static key of its receiver; raises NotAuthentic with the field's name."""
    state = _Recording(Transcript.start(public))
    state.ephemeral(message.ephemeral)
    key = state.secret("es", shared(private, message.ephemeral))
    static = _open(state, "static", key, message.encrypted_static)
    key = state.secret("ss", shared(private, static))
    timestamp = _open(state, "timestamp", key, message.encrypted_timestamp)
    return ReadInitiation(static, timestamp, state.transcript, state.values)


def read_response(
    pending: Pending, message: messages.Response, now: int, preshared_key: bytes | None = None
) -> tuple[Session, Mapping[str, bytes]]:
    """Decrypt a response to an initiation of ours; raises NotAuthentic. preshared_key: in place of the peer's."""
    state = _Recording(copy(pending.transcript))
    state.ephemeral(message.ephemeral)
    # Whoever has sent an ephemeral of low order must expect the zero that the receiver would get.
    ee = ZERO if _is_low_order(pending.ephemeral) else shared(pending.ephemeral_private, message.ephemeral)
    state.secret("ee", ee)
    state.secret("se", shared(pending.static_private, message.ephemeral))
    key = state.psk(pending.preshared_key if preshared_key is None else preshared_key)
    _open(state, "nothing", key, message.encrypted_nothing)
    session = _session(
        state.transcript, is_initiator=True, local=message.receiver_index, remote=message.sender_index, now=now
    )
    return session, state.values


def read_cookie(issuer: bytes, mac1: bytes, message: messages.CookieReply) -> bytes:
    """Decrypt a cookie reply to the message with this mac1; raises NotAuthentic. issuer: the device's public key."""
    return crypto.xopen(cookie.cookie_key_of(issuer), message.nonce, message.encrypted_cookie, mac1)


def has_valid_mac1(datagram: bytes, public: bytes) -> bool:
    """Return whether a handshake message is for the owner of this public key, by its mac1."""
    return datagram[-_MACS : -_MACS // 2] == cookie.compute_mac1(datagram, cookie.mac1_key_of(public))


def _open(state: _Recording, name: str, key: bytes, sealed: bytes) -> bytes:
    state.values[f"{name}, encrypted"] = sealed
    try:
        plaintext = state.transcript.open(key, sealed)
    except NotAuthentic as error:
        raise NotAuthentic(f"the tag of its field {name!r} does not verify") from error
    state.values[name] = plaintext
    return plaintext
