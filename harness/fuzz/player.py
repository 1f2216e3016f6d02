"""Play the steps of a case as a peer without sockets, and judge what the device answers.

A correct device is silent, or answers what this peer has sent by a message that authenticates. Whatever else it sends
is wrong: a response to a message that it must refuse, data of no session, a counter used twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from harness.errors import HarnessError
from harness.fuzz import inputs
from harness.fuzz.inputs import apply
from harness.scripted.intents import CookieReply, Initiation, Response
from harness.scripted.transcripts import (
    Draw,
    has_valid_mac1,
    read_cookie,
    read_initiation,
    read_response,
    write_cookie_reply,
    write_data,
    write_initiation,
    write_response,
)
from harness.wire.messages import INITIATION, RESPONSE, kind_of, with_mac1
from refwg import messages, noise
from refwg.errors import NotAuthentic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from harness.fuzz.inputs import Step
    from harness.scripted.session import Session
    from harness.scripted.transcripts import Pending, Written
    from refwg.noise import Transcript

S = TypeVar("S")
R = TypeVar("R")

# Datagrams that a replay may choose from.
_REMEMBERED: Final = 64
# Handshakes and sessions of which late answers are still understood.
_MOST_KEPT: Final = 4096
# The largest payload of a UDP datagram over IPv4.
_LONGEST: Final = 65507
_MACS: Final = 32
_MAC: Final = 16
# What the device may answer, by name, for the novelty of a case.
INITIATED, RESPONDED, COOKIED, KEPT_ALIVE, SENT = "initiation", "response", "cookie reply", "keepalive", "data"


class WrongAnswer(HarnessError):
    """The device has sent what a correct device does not send."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An initiation of the device, decrypted: what a response and a cookie reply need of it."""

    sender_index: int
    ephemeral: bytes
    static: bytes
    transcript: Transcript
    mac1: bytes


class Player:
    """A peer that plays steps: `datagrams` makes what it sends, `heard` takes what the device sends to it.

    static: its private key. device: the device's public key. clock: returns ns of the wall clock.
    """

    def __init__(
        self,
        *,
        static: bytes,
        device: bytes,
        random: Random,
        clock: Callable[[], int],
        preshared_key: bytes = messages.ZERO_KEY,
    ) -> None:
        self.identity = noise.StaticIdentity.from_private(static)
        self._device = device
        self._random = random
        self._clock = clock
        self._preshared_key = preshared_key
        # By index; a change of a message may give several the same index.
        self._pending: dict[int, list[Pending]] = {}
        self._sessions: dict[int, list[Session]] = {}
        self._mac1: dict[int, list[bytes]] = {}
        self._may_answer: Counter[int] = Counter()
        self._timestamps: set[bytes] = set()
        self._counters: dict[int, dict[int, bytes]] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the last case: the device has forgotten this peer. Late answers are still understood."""
        self.session: Session | None = None
        self._opened: Opened | None = None
        self._cookie = b""
        self._sent: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._held: bytes | None = None
        self._holds = False
        # Without these a device would have to refuse what it must accept of a new peer.
        self._timestamps.clear()
        for kept in (self._pending, self._sessions, self._mac1, self._may_answer, self._counters):
            if len(kept) > _MOST_KEPT:
                kept.clear()

    # Sending

    def datagrams(self, step: Step) -> list[bytes]:
        """Return what is to be sent for a step, in order; empty for steps that are not sent over UDP."""
        if step.kind == inputs.HOLD:
            self._holds = True
            return []
        made = self._make(step)
        if made is None:
            return []
        self._sent.append(made)
        if self._holds and self._held is None:
            self._held = made
            return []
        held, self._held, self._holds = self._held, None, False
        return [made] if held is None else [made, held]

    def _make(self, step: Step) -> bytes | None:
        makers = {
            inputs.INITIATION: self._initiation,
            inputs.RESPONSE: self._response,
            inputs.COOKIE: self._cookie_reply,
            inputs.DATA: self._data,
        }
        if step.kind in makers:
            return makers[step.kind](step)
        if step.kind == inputs.BYTES:
            return self._outgoing(step.argument)
        if step.kind == inputs.REPLAY and self._sent:
            return self._outgoing(apply(step.changes, self._sent[-1 - (step.counter or 0) % len(self._sent)]))
        return None

    def _outgoing(self, datagram: bytes) -> bytes:
        """Cut bytes to what a datagram can hold, and note what the device may answer to them."""
        datagram = datagram[:_LONGEST]
        kind = kind_of(datagram)
        if kind not in {INITIATION, RESPONSE} or not has_valid_mac1(datagram, self._device):
            return datagram
        index = int.from_bytes(datagram[4:8], "little")
        self._mac1.setdefault(index, []).append(datagram[-_MACS:-_MAC])
        # Its encrypted timestamp stands for the initiation: a device answers it once.
        if kind == INITIATION and datagram[8:116] not in self._timestamps:
            self._timestamps.add(datagram[8:116])
            self._may_answer[index] += 1
        return datagram

    def _changed(self, step: Step, datagram: bytes) -> bytes:
        """Apply the step's changes, and compute the macs again if it is sealed."""
        datagram = apply(step.changes, datagram)
        is_handshake = step.kind in {inputs.INITIATION, inputs.RESPONSE}
        if is_handshake and step.is_sealed and step.changes and len(datagram) >= _MACS:
            datagram = with_mac1(datagram, self._device)
            if self._cookie:
                mac2 = hashlib.blake2s(datagram[:-_MAC], key=self._cookie, digest_size=_MAC).digest()
                datagram = datagram[:-_MAC] + mac2
        return self._outgoing(datagram)

    def _draw(self) -> Draw:
        return Draw(
            identity=self.identity,
            remote=self._device,
            ephemeral=self._random.randbytes(messages.KEY_LENGTH),
            index=self._random.getrandbits(32),
            timestamp=noise.timestamp(self._clock()),
            preshared_key=self._preshared_key,
            cookie=self._cookie,
            nonce=self._random.randbytes(messages.COOKIE_NONCE_LENGTH),
            value=self._random.randbytes(messages.COOKIE_LENGTH),
        )

    def _initiation(self, step: Step) -> bytes:
        timestamp = step.argument[: messages.TIMESTAMP_LENGTH] if step.argument else None
        written = write_initiation(Initiation(timestamp=timestamp), self._draw())
        datagram = self._changed(step, written.datagram)
        if written.pending is not None and kind_of(datagram) == INITIATION:
            self._pending.setdefault(int.from_bytes(datagram[4:8], "little"), []).append(written.pending)
        return datagram

    def _response(self, step: Step) -> bytes:
        payload = step.argument or None
        written = write_response(Response(to=self._to(), payload=payload), self._draw(), self._clock())
        datagram = self._changed(step, written.datagram)
        if written.session is not None and kind_of(datagram) == RESPONSE:
            self._sessions.setdefault(int.from_bytes(datagram[4:8], "little"), []).append(written.session)
            if not step.changes and not payload and self._opened is not None:
                self.session = written.session
        return datagram

    def _cookie_reply(self, step: Step) -> bytes:
        value = (step.argument + bytes(_MAC))[:_MAC] if step.argument else None
        written = write_cookie_reply(CookieReply(to=self._to(), value=value), self._draw())
        return self._changed(step, written.datagram)

    def _data(self, step: Step) -> bytes:
        session = self.session
        if session is None:
            return self._outgoing(apply(step.changes, b"\4\0\0\0" + self._random.randbytes(12 + 16) + step.argument))
        return self._changed(step, _sealed(session, step).datagram)

    def _to(self) -> Opened:
        """Return the device's last initiation; without one, something that fits none."""
        if self._opened is not None:
            return self._opened
        content = self._random.randbytes(messages.KEY_LENGTH)
        transcript = noise.Transcript.start(self._device)
        index = next(reversed(self._sessions), self._random.getrandbits(32))
        return Opened(index, content, self._device, transcript, content[:_MAC])

    # Receiving

    def heard(self, datagram: bytes) -> str:
        """Take a datagram of the device; returns its name. Raises WrongAnswer."""
        match kind_of(datagram):
            case messages.MessageType.INITIATION:
                return self._heard_initiation(messages.Initiation.parse(datagram), datagram)
            case messages.MessageType.RESPONSE:
                return self._heard_response(messages.Response.parse(datagram), datagram)
            case messages.MessageType.COOKIE_REPLY:
                return self._heard_cookie(messages.CookieReply.parse(datagram))
            case messages.MessageType.DATA:
                return self._heard_data(messages.Data.parse(datagram))
        raise WrongAnswer(f"sent {len(datagram)} bytes that are not a message: {datagram[:16].hex()}")

    def _heard_initiation(self, message: messages.Initiation, datagram: bytes) -> str:
        try:
            read = read_initiation(self.identity.private, self.identity.public, message)
        except NotAuthentic as error:
            raise WrongAnswer(f"sent an initiation of which {error}") from error
        if read.static != self._device:
            raise WrongAnswer("sent an initiation whose static key is not its own")
        if not has_valid_mac1(datagram, self.identity.public):
            raise WrongAnswer("sent an initiation whose mac1 does not verify")
        self._opened = Opened(message.sender_index, message.ephemeral, read.static, read.transcript, message.mac1)
        return INITIATED

    def _heard_response(self, message: messages.Response, datagram: bytes) -> str:
        index = message.receiver_index
        if index not in self._pending:
            raise WrongAnswer(f"sent a response to {index:#010x}, the index of no initiation")
        if not self._may_answer[index]:
            raise WrongAnswer("answered an initiation twice, or one that it must refuse")
        self._may_answer[index] -= 1
        session = _first(lambda pending: read_response(pending, message, self._clock())[0], self._pending[index])
        if session is None:
            raise WrongAnswer("sent a response whose tag does not verify")
        if not has_valid_mac1(datagram, self.identity.public):
            raise WrongAnswer("sent a response whose mac1 does not verify")
        self.session = session
        self._sessions.setdefault(index, []).append(session)
        return RESPONDED

    def _heard_cookie(self, message: messages.CookieReply) -> str:
        mac1s = self._mac1.get(message.receiver_index)
        if mac1s is None:
            raise WrongAnswer("sent a cookie reply to a message without a valid mac1")
        cookie = _first(lambda mac1: read_cookie(self._device, mac1, message), mac1s)
        if cookie is None:
            raise WrongAnswer("sent a cookie reply that does not open with the mac1 of the message")
        self._cookie = cookie
        return COOKIED

    def _heard_data(self, message: messages.Data) -> str:
        index, counter = message.receiver_index, message.counter
        sessions = self._sessions.get(index)
        if sessions is None:
            raise WrongAnswer(f"sent data for {index:#010x}, the index of no session")
        plaintext = _first(lambda session: session.keypair.receiving.open(counter, message.ciphertext), sessions)
        if plaintext is None:
            raise WrongAnswer("sent data whose tag does not verify")
        tag = message.ciphertext[-_MAC:]
        seen = self._counters.setdefault(index, {})
        if len(sessions) == 1 and counter in seen:
            repeated = "the same message" if seen[counter] == tag else "another message"
            raise WrongAnswer(f"used counter {counter} twice in one session, for {repeated}")
        seen[counter] = tag
        return SENT if plaintext else KEPT_ALIVE


def _first(read: Callable[[S], R], candidates: Sequence[S]) -> R | None:
    """Return the result for the newest candidate for which the tag verifies; None if it does for none."""
    for candidate in reversed(candidates):
        with suppress(NotAuthentic):
            return read(candidate)
    return None


def _sealed(session: Session, step: Step) -> Written:
    return write_data(session.data(plaintext=step.argument, counter=step.counter))
