"""Define what a scripted peer receives: decrypted messages, with source and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.wire.messages import NAMES, kind_of

if TYPE_CHECKING:
    from harness.scripted.session import Session
    from harness.scripted.transcripts import Pending
    from refwg.noise import Transcript

_HEADER_6 = 40


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Received:
    """A datagram that came to one of the peer's addresses.

    time: of the arrival, ns of the wall clock. source: address and port of the sender. at: of the peer. tos: the outer
    IPv4 TOS or IPv6 traffic class. wrong: why it is not what it seems to be; empty if it authenticates.
    """

    datagram: bytes
    time: int
    source: tuple[str, int]
    at: tuple[str, int]
    tos: int
    wrong: str = ""

    @property
    def name(self) -> str:
        """`initiation`, `response`, `cookie reply`, `data`, or `datagram` for anything else."""
        return NAMES.get(kind_of(self.datagram), "datagram")

    def __str__(self) -> str:
        """`response of 92 bytes from 192.168.1.1:1`."""
        wrong = f" ({self.wrong})" if self.wrong else ""
        return f"{self.name} of {len(self.datagram)} bytes from {self.source[0]}:{self.source[1]}{wrong}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ReceivedInitiation(Received):
    """An initiation of the device, decrypted.

    static: the public key that it carries; timestamp: 12 bytes; transcript: the state after it, from which a response
    goes on.
    """

    sender_index: int
    ephemeral: bytes
    static: bytes
    timestamp: bytes
    mac1: bytes
    mac2: bytes
    transcript: Transcript


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ReceivedResponse(Received):
    """A response of the device; session: what it leads to, None if it does not authenticate.

    pending: the initiation of the peer that it answers, None if there is none with its receiver index.
    """

    sender_index: int
    receiver_index: int
    ephemeral: bytes
    mac1: bytes
    mac2: bytes
    pending: Pending | None
    made: Session | None

    @property
    def session(self) -> Session:
        """The session that this response leads to; AssertionError if it does not authenticate."""
        if self.made is None:
            raise AssertionError(f"there is no session: {self}")
        return self.made


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ReceivedCookieReply(Received):
    """A cookie reply of the device; cookie: decrypted, b"" if it does not authenticate."""

    receiver_index: int
    nonce: bytes
    cookie: bytes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ReceivedData(Received):
    """Transport data of the device; session: the one that its index names; plaintext: with the padding."""

    receiver_index: int
    counter: int
    session: Session | None
    plaintext: bytes

    @property
    def is_keepalive(self) -> bool:
        """True if it authenticates and is empty."""
        return not self.wrong and not self.plaintext

    @property
    def name(self) -> str:
        """`keepalive` for empty data, else `data`."""
        return "keepalive" if self.is_keepalive else "data"

    @property
    def packet(self) -> bytes:
        """The inner IPv4 or IPv6 packet without the padding, cut by its own length field."""
        if not self.plaintext:
            return b""
        if self.plaintext[0] >> 4 == 4:  # noqa: PLR2004
            return self.plaintext[: int.from_bytes(self.plaintext[2:4])]
        return self.plaintext[: _HEADER_6 + int.from_bytes(self.plaintext[4:6])]

    def __str__(self) -> str:
        wrong = f" ({self.wrong})" if self.wrong else ""
        source = f"{self.source[0]}:{self.source[1]}"
        return f"{self.name} with counter {self.counter}, {len(self.datagram)} bytes, from {source}{wrong}"
