"""Play one WireGuard peer over UDP: send what the test chooses, and expect messages.

A peer has no state machine. It answers nothing, retries nothing and rekeys nothing by itself: a test that wants a
response sends one.
"""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from harness.errors import HarnessError, UsageError
from harness.scripted.exchange import Line
from harness.scripted.intents import CookieReply, Data, Initiation, Keepalive, Response
from harness.scripted.peer_socket import PeerSocket
from harness.scripted.received import (
    Received,
    ReceivedCookieReply,
    ReceivedData,
    ReceivedInitiation,
    ReceivedResponse,
)
from harness.scripted.transcripts import (
    Draw,
    Written,
    has_valid_mac1,
    read_cookie,
    read_initiation,
    read_response,
    write_cookie_reply,
    write_data,
    write_initiation,
    write_response,
)
from harness.wait import let_pass, wait_for
from refwg import messages, noise
from refwg.errors import MalformedMessage, NotAuthentic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from harness.control.records import Key
    from harness.net.netns import NetNS
    from harness.scripted.exchange import Exchange
    from harness.scripted.intents import Outgoing
    from harness.scripted.session import Session
    from harness.scripted.transcripts import (
        Pending,
    )

T = TypeVar("T", bound=Received)

_KINDS: Final[dict[type[Outgoing], tuple[type[Received], str]]] = {
    Initiation: (ReceivedInitiation, "an initiation"),
    Response: (ReceivedResponse, "a response"),
    CookieReply: (ReceivedCookieReply, "a cookie reply"),
    Data: (ReceivedData, "a data message"),
    Keepalive: (ReceivedData, "a keepalive"),
}
# Timestamps lose the last 24 bits of their nanoseconds (5.1).
_TIMESTAMP_STEP: Final = 1 << 24
# Seconds between two initiations of a peer, so that none is refused as a flood; with reserve.
SPACING: Final = 0.025


class Unexpected(HarnessError, AssertionError):
    """The device has not sent what was expected, or has sent what it must not."""


class ScriptedPeer:
    """A WireGuard peer under a test's control.

    name: for messages and evidence. static: its private key. preshared_key: 32 bytes. inner4, inner6: its addresses in
    the tunnel. inbox: everything that came and that no expectation has taken. cookie: the last one that the device
    gave; b"" for none. timestamp: of its last initiation. sent: all that was sent, to be sent again or changed.
    """

    def __init__(
        self,
        node: NetNS,
        name: str,
        *,
        static: Key,
        device: Key,
        targets: Mapping[int, tuple[str, int]],
        address: str,
        random: Random,
        exchange: Exchange,
        preshared_key: bytes = messages.ZERO_KEY,
        inner4: str = "",
        inner6: str = "",
        port: int = 0,
        round_trip: Callable[[], object] | None = None,
    ) -> None:
        """Open its first socket. targets: the device's address and port by family. round_trip: see expect_silence."""
        self.name = name
        self.static = static
        self.public_key = static.public()
        self.device = device
        self.preshared_key = preshared_key
        self.inner4, self.inner6 = inner4, inner6
        self.exchange = exchange
        self.inbox: list[Received] = []
        self.sent: list[bytes] = []
        self.cookie = b""
        self.timestamp = bytes(messages.TIMESTAMP_LENGTH)
        self.sessions: dict[int, Session] = {}
        self._node = node
        self._targets = targets
        self._random = random
        self._round_trip = round_trip
        self._identity = noise.StaticIdentity.from_private(static.raw)
        self._pending: dict[int, Pending] = {}
        # The mac1 of each handshake message that was sent, by its index: what a cookie reply is bound to.
        self._mac1: dict[int, bytes] = {}
        self._last_initiation = 0.0
        self._poll = select.epoll()
        self.sockets: list[PeerSocket] = []
        self.main = self.socket(address, port)

    def socket(self, address: str = "", port: int = 0) -> PeerSocket:
        """Open another address or port of this peer. address: of its node; default: that of the first socket."""
        address = address or self.main.address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        opened = PeerSocket(self._node, address, port, self._targets[family])
        self.sockets.append(opened)
        self._poll.register(opened.fileno(), select.EPOLLIN)
        return opened

    def close(self) -> None:
        """Close all sockets."""
        for opened in self.sockets:
            opened.close()
        self._poll.close()

    def __repr__(self) -> str:
        return f"{self.name} at {self.main!r}"

    # Sending

    def send(self, message: Outgoing | bytes, via: PeerSocket | None = None) -> Written:
        """Send a message, or bytes as they are, to the device; returns it with all of its values.

        via: the socket; default: the first one. An initiation that overrides no timestamp waits until 25 ms have passed
        since the last one, or since its response, because a device refuses more than 50 a second.
        """
        via = via or self.main
        if isinstance(message, bytes):
            written = Written(datagram=message, values={})
            self._throw(written, via, f"{len(message)} bytes as they are, {message[:4].hex()}...")
            return written
        if isinstance(message, Initiation) and message.timestamp is None:
            self.keep_spacing()
        draw = self._draw(message)
        written = self._write(message, draw)
        changed = message.overrides()
        correct = self._write(message.correct(), draw).values if changed else {}
        self._throw(written, via, _describe(message, written, changed), correct, message.tos)
        self._remember(written)
        return written

    def send_together(self, sent: Sequence[Data | bytes], *, tos: int = 0) -> list[bytes]:
        """Send data messages, or bytes as they are, by as few system calls as possible; returns the datagrams.

        Those of equal length that follow each other leave as one batch, and one shorter datagram may end it. On the
        link of a `Target` it stays together, and a device with UDP_GRO receives it as one. tos: of all.
        """
        datagrams = []
        for message in sent:
            if isinstance(message, bytes):
                datagram, text, values = message, f"{len(message)} bytes as they are, {message[:4].hex()}...", {}
            else:
                written = self._write(message, self._draw(message))
                datagram, values = written.datagram, dict(written.values)
                text = _describe(message, written, message.overrides())
            self._record(datagram, self.main, f"{text}, in a batch", values)
            datagrams.append(datagram)
        self.main.throw_together(datagrams, tos)
        return datagrams

    def handshake(self, message: Initiation | None = None, *, within: float = 5.0) -> Session:
        """Send an initiation and expect its response; returns the session, which no data has confirmed yet.

        Without `message` it does as any peer if the device is under load and sends a cookie reply: its next initiation
        carries the cookie. A kernel is under load until a second after any of its interfaces was.
        """
        self.send(message or Initiation())
        if message is None and self._gets_cookie(within):
            self.send(Initiation())
        return self.expect(Response, within=within).session

    def connect(self, *, within: float = 5.0) -> Session:
        """Make a handshake and confirm it by a keepalive; returns the session."""
        session = self.handshake(within=within)
        self.send(session.keepalive())
        return session

    def respond(self, *, within: float = 7.0) -> Session:
        """Expect an initiation of the device and answer it; returns the session."""
        return self.send(Response(to=self.expect(Initiation, within=within))).made()

    def _gets_cookie(self, within: float) -> bool:
        """Return whether a cookie reply comes before a response, and take it out of the inbox."""
        try:
            answer = wait_for(_Answer(self), within, f"an answer to {self}")
        except HarnessError:
            return False
        if isinstance(answer, ReceivedCookieReply):
            self.inbox.remove(answer)
            return True
        return False

    def keep_spacing(self) -> None:
        """Wait until the device's limit of 50 initiations a second cannot refuse the next one.

        For an initiation whose timestamp the test chooses, and bytes that are sent as they are.
        """
        left = self._last_initiation + SPACING - time.monotonic()
        if left > 0:
            let_pass(left, "the device refuses an initiation within 20 ms of the last one")

    def next_timestamp(self) -> bytes:
        """Return a timestamp of now that is greater than that of the last initiation."""
        now = noise.timestamp(time.time_ns())
        return now if now > self.timestamp else later(self.timestamp)

    # Expecting

    @overload
    def expect(
        self, kind: type[Initiation], within: float = ..., *, where: Callable[[ReceivedInitiation], bool] | None = ...
    ) -> ReceivedInitiation: ...
    @overload
    def expect(
        self, kind: type[Response], within: float = ..., *, where: Callable[[ReceivedResponse], bool] | None = ...
    ) -> ReceivedResponse: ...
    @overload
    def expect(
        self, kind: type[CookieReply], within: float = ..., *, where: Callable[[ReceivedCookieReply], bool] | None = ...
    ) -> ReceivedCookieReply: ...
    @overload
    def expect(
        self, kind: type[Data], within: float = ..., *, where: Callable[[ReceivedData], bool] | None = ...
    ) -> ReceivedData: ...
    def expect(self, kind: type[Any], within: float = 5.0, *, where: Callable[[Any], bool] | None = None) -> Received:
        """Wait for a message of this kind that authenticates, and take it out of the inbox.

        Messages of other kinds stay in the inbox. within: seconds, scaled. where: accepts only some of this kind.
        Raises Unexpected, which says what came instead.
        """
        try:
            found = wait_for(_Arrival(self, kind, where), within, f"{_KINDS[kind][1]} to {self}")
        except HarnessError:
            came = ", ".join(map(str, self.inbox)) or "nothing"
            what = _KINDS[kind][1].partition(" ")[2]
            raise Unexpected(
                f"the device sent no {what} to {self} within {within:g} s; it sent: {came}; "
                f"the last messages: {self.exchange.last()}"
            ) from None
        self.inbox.remove(found)
        return found

    def expect_silence(
        self,
        marker: Callable[[], object] | None = None,
        *,
        but: tuple[type[Outgoing], ...] = (),
        after: str = "what was sent",
    ) -> None:
        """Show that the device does not answer: after the marker nothing has come to any address of this peer.

        marker: a call that makes the device do something that can only come after an answer, such as another peer's
        handshake over the same path; default: the round trip of the lab's witness. but: kinds of messages that may
        come. after: completes the error "the device answered ...". Raises Unexpected with what came.
        """
        marker = marker or self._round_trip
        if marker is None:
            raise UsageError("expect_silence: this peer has no witness; give a marker")
        marker()
        self.drain()
        came = [one for one in self.inbox if not any(_is_kind(one, kind) for kind in but)]
        if came:
            raise Unexpected(f"the device answered {after}: {', '.join(map(str, came))}; {self.exchange.last()}")

    def drain(self) -> list[Received]:
        """Take in what has come so far, without waiting; returns the inbox."""
        for opened in self.sockets:
            while opened.fileno() >= 0 and (taken := opened.take()) is not None:
                self._arrived(opened, *taken)
        return self.inbox

    def fileno(self) -> int:
        """Return a descriptor that is readable when a datagram has come."""
        return self._poll.fileno()

    # Inside

    def _draw(self, message: Outgoing) -> Draw:
        return Draw(
            identity=self._identity,
            remote=self.device.raw,
            ephemeral=self._random.randbytes(messages.KEY_LENGTH),
            index=self._random.getrandbits(32),
            timestamp=self.next_timestamp() if isinstance(message, Initiation) else b"",
            preshared_key=self.preshared_key,
            cookie=self.cookie,
            nonce=self._random.randbytes(messages.COOKIE_NONCE_LENGTH),
            value=self._random.randbytes(messages.COOKIE_LENGTH),
        )

    def _write(self, message: Outgoing, draw: Draw) -> Written:
        match message:
            case Initiation():
                return write_initiation(message, draw)
            case Response():
                return write_response(message, draw, time.time_ns())
            case CookieReply():
                return write_cookie_reply(message, draw)
            case Data():
                return write_data(message)
        raise UsageError(f"{self.name} cannot send {message!r}")

    def _throw(
        self, written: Written, via: PeerSocket, text: str, correct: Mapping[str, bytes] | None = None, tos: int = 0
    ) -> None:
        self._record(written.datagram, via, text, written.values, correct)
        via.throw(written.datagram, tos)

    def _record(
        self,
        datagram: bytes,
        via: PeerSocket,
        text: str,
        values: Mapping[str, bytes],
        correct: Mapping[str, bytes] | None = None,
    ) -> None:
        peer = f"{self.name} {via!r}"
        self.exchange.add(
            Line(time=time.time_ns(), peer=peer, is_sent=True, text=text, values=values, correct=correct or {})
        )
        self.sent.append(datagram)

    def _remember(self, written: Written) -> None:
        if written.pending is not None:
            self._last_initiation = time.monotonic()
            self._pending[written.pending.sender_index] = written.pending
            self._mac1[written.pending.sender_index] = written.mac1
            self.timestamp = max(self.timestamp, written.values["timestamp"])
        if written.session is not None:
            self.sessions[written.session.local_index] = written.session
            self._mac1[written.session.local_index] = written.mac1

    def _arrived(self, opened: PeerSocket, datagram: bytes, source: tuple[str, int], tos: int, now: int) -> None:
        facts: dict[str, Any] = {
            "datagram": datagram,
            "time": now,
            "source": source,
            "at": (opened.address, opened.port),
            "tos": tos,
        }
        received, values = self._read(datagram, facts)
        self.inbox.append(received)
        text = f"{received}{_words(received)}"
        self.exchange.add(Line(time=now, peer=f"{self.name} {opened!r}", is_sent=False, text=text, values=values))

    def _read(self, datagram: bytes, facts: dict[str, Any]) -> tuple[Received, Mapping[str, bytes]]:
        try:
            parsed = messages.parse(datagram)
        except MalformedMessage as error:
            return Received(**facts, wrong=str(error)), {"datagram": datagram}
        match parsed:
            case messages.Initiation():
                return self._read_initiation(parsed, facts)
            case messages.Response():
                return self._read_response(parsed, facts)
            case messages.CookieReply():
                return self._read_cookie(parsed, facts)
            case messages.Data():
                return self._read_data(parsed, facts)

    def _read_initiation(
        self, parsed: messages.Initiation, facts: dict[str, Any]
    ) -> tuple[Received, Mapping[str, bytes]]:
        try:
            read = read_initiation(self._identity.private, self._identity.public, parsed)
        except NotAuthentic as error:
            return Received(**facts, wrong=str(error)), {}
        wrong = "" if has_valid_mac1(facts["datagram"], self._identity.public) else "its mac1 does not verify"
        if read.static != self.device.raw:
            wrong = "its static key is not the device's"
        received = ReceivedInitiation(
            **facts,
            wrong=wrong,
            sender_index=parsed.sender_index,
            ephemeral=parsed.ephemeral,
            static=read.static,
            timestamp=read.timestamp,
            mac1=parsed.mac1,
            mac2=parsed.mac2,
            transcript=read.transcript,
        )
        return received, read.values

    def _read_response(self, parsed: messages.Response, facts: dict[str, Any]) -> tuple[Received, Mapping[str, bytes]]:
        pending = self._pending.get(parsed.receiver_index)
        session, values, wrong = None, dict[str, bytes](), ""
        if pending is None:
            wrong = f"no initiation of {self.name} has the index {parsed.receiver_index:#010x}"
        else:
            # On a busy machine the device has read the initiation long after it was sent.
            self._last_initiation = time.monotonic()
            try:
                session, read = read_response(pending, parsed, facts["time"])
                values = dict(read)
                self.sessions[session.local_index] = session
            except NotAuthentic as error:
                wrong = str(error)
        if not wrong and not has_valid_mac1(facts["datagram"], self._identity.public):
            wrong = "its mac1 does not verify"
        received = ReceivedResponse(
            **facts,
            wrong=wrong,
            sender_index=parsed.sender_index,
            receiver_index=parsed.receiver_index,
            ephemeral=parsed.ephemeral,
            mac1=parsed.mac1,
            mac2=parsed.mac2,
            pending=pending,
            made=session,
        )
        return received, values

    def _read_cookie(self, parsed: messages.CookieReply, facts: dict[str, Any]) -> tuple[Received, Mapping[str, bytes]]:
        mac1 = self._mac1.get(parsed.receiver_index)
        cookie, wrong = b"", ""
        if mac1 is None:
            wrong = f"no message of {self.name} has the index {parsed.receiver_index:#010x}"
        else:
            try:
                cookie = self.cookie = read_cookie(self.device.raw, mac1, parsed)
            except NotAuthentic as error:
                wrong = str(error)
        received = ReceivedCookieReply(
            **facts, wrong=wrong, receiver_index=parsed.receiver_index, nonce=parsed.nonce, cookie=cookie
        )
        return received, {"nonce": parsed.nonce, "cookie": cookie}

    def _read_data(self, parsed: messages.Data, facts: dict[str, Any]) -> tuple[Received, Mapping[str, bytes]]:
        session = self.sessions.get(parsed.receiver_index)
        plaintext, wrong = b"", ""
        if session is None:
            wrong = f"no session of {self.name} has the index {parsed.receiver_index:#010x}"
        else:
            try:
                plaintext = session.keypair.receiving.open(parsed.counter, parsed.ciphertext)
            except NotAuthentic as error:
                wrong = str(error)
        received = ReceivedData(
            **facts,
            wrong=wrong,
            receiver_index=parsed.receiver_index,
            counter=parsed.counter,
            session=session,
            plaintext=plaintext,
        )
        return received, {"plaintext": plaintext}


class _Arrival:
    """Event: a message of a kind has come to a peer and authenticates; its value is that message."""

    def __init__(self, peer: ScriptedPeer, kind: type[Outgoing], where: Callable[[Any], bool] | None) -> None:
        self._peer = peer
        self._kind = kind
        self._where = where

    def fileno(self) -> int:
        return self._peer.fileno()

    def look(self) -> Received | None:
        return next((one for one in self._peer.drain() if self._is_it(one)), None)

    def _is_it(self, one: Received) -> bool:
        return _is_kind(one, self._kind) and not one.wrong and (self._where is None or self._where(one))

    def seen(self) -> str:
        return ", ".join(map(str, self._peer.inbox)) or "nothing"


class _Answer:
    """Event: a response or a cookie reply has come to a peer; its value is that message."""

    def __init__(self, peer: ScriptedPeer) -> None:
        self._peer = peer

    def fileno(self) -> int:
        return self._peer.fileno()

    def look(self) -> Received | None:
        answers = (one for one in self._peer.drain() if isinstance(one, ReceivedResponse | ReceivedCookieReply))
        return next((one for one in answers if not one.wrong), None)

    def seen(self) -> str:
        return ", ".join(map(str, self._peer.inbox)) or "nothing"


def _is_kind(one: Received, kind: type[Outgoing]) -> bool:
    if not isinstance(one, _KINDS[kind][0]):
        return False
    # Data means both: a program may confirm a session by a keepalive or by what it has to send.
    return kind is not Keepalive or (isinstance(one, ReceivedData) and one.is_keepalive)


def later(timestamp: bytes, nanoseconds: int = _TIMESTAMP_STEP) -> bytes:
    """Return a later timestamp, or an earlier one; default: later by the least that all programs tell apart."""
    whole, rest = int.from_bytes(timestamp[:8]), int.from_bytes(timestamp[8:])
    seconds, rest = divmod(rest + nanoseconds, messages.SECOND)
    return (whole + seconds).to_bytes(8) + rest.to_bytes(4)


def _describe(message: Outgoing, written: Written, changed: list[str]) -> str:
    name = type(message).__name__.lower().replace("cookiereply", "cookie reply")
    index = written.datagram[4:8][::-1].hex()
    counter = f", counter {message.counter}" if isinstance(message, Data) else ""
    overrides = f", overrides: {', '.join(changed)}" if changed else ""
    return f"{name} of {len(written.datagram)} bytes, index 0x{index}{counter}{overrides}"


def _words(received: Received) -> str:
    return f", index 0x{received.datagram[4:8][::-1].hex()}" if len(received.datagram) > 8 else ""  # noqa: PLR2004
