"""Encode and decode netlink messages and attributes, and exchange them with the kernel.

Generic netlink, rtnetlink and nfnetlink use this module; it alone defines the layouts of nlmsghdr, nlattr and nlmsgerr.
Source: include/uapi/linux/netlink.h and genetlink.h. Integers are in the machine's byte order.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from harness.errors import ControlError, UsageError, refusal, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness.wait import Deadline

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3

NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_DUMP_INTR: Final = 0x010
NLM_F_CAPPED: Final = 0x100
NLM_F_ACK_TLVS: Final = 0x200
NLM_F_DUMP: Final = 0x300

NLA_F_NESTED: Final = 0x8000
NLA_TYPE_MASK: Final = 0x3FFF

SOL_NETLINK: Final = 270
NETLINK_CAP_ACK: Final = 10
NETLINK_EXT_ACK: Final = 11

_CTRL: Final = 16
_CTRL_GETFAMILY: Final = 3
_CTRL_FAMILY_ID, _CTRL_FAMILY_NAME = 1, 2

# The kernel puts at most 32 KiB of a dump into one read (netlink_recvmsg), but an error may repeat a request of 64 KiB.
_RECEIVE_SIZE: Final = 1 << 17
_SOCKET_BUFFER: Final = 4 << 20

_MESSAGE: Final = Struct("=IHHII")  # length, type, flags, sequence, port id
_GENERIC: Final = Struct("=BBxx")  # command, version
_ATTRIBUTE: Final = Struct("=HH")  # length with this header, type
ATTRIBUTE_HEADER: Final = _ATTRIBUTE.size
_S32: Final = Struct("=i")
_U32: Final = Struct("=I")
_SEQUENCE_AT: Final = 8
_MAX_ATTRIBUTE: Final = 0xFFFF
_ERROR_TEXT: Final = 1  # NLMSGERR_ATTR_MSG


class DumpInterrupted(ControlError):
    """The state changed during a dump (NLM_F_DUMP_INTR, netlink(7)): the answer may mix old and new. Ask again."""


class Message(NamedTuple):
    """One netlink message without its nlmsghdr.

    kind: nlmsg_type. body: for generic netlink it begins with the genlmsghdr of 4 bytes.
    """

    kind: int
    flags: int
    sequence: int
    body: bytes

    @property
    def is_last(self) -> bool:
        """True if the answer ends here: NLMSG_ERROR (an error, or the ACK), or NLMSG_DONE after a dump."""
        return self.kind in {NLMSG_ERROR, NLMSG_DONE}

    @property
    def payload(self) -> bytes:
        """The attributes of a generic netlink message: the body after the genlmsghdr."""
        return self.body[_GENERIC.size :]

    def to_bytes(self) -> bytes:
        """Encode the message with its nlmsghdr; the port id is 0, which addresses the kernel."""
        return _MESSAGE.pack(_MESSAGE.size + len(self.body), self.kind, self.flags, self.sequence, 0) + self.body


def generic(family_id: int, command: int, flags: int, payload: bytes, *, version: int = 1) -> bytes:
    """Encode a generic netlink request; `GenericSocket.exchange` fills in the sequence number."""
    return Message(family_id, flags, 0, _GENERIC.pack(command, version) + payload).to_bytes()


def parse_messages(datagram: bytes) -> list[Message]:
    """Split the data of one read into messages; ValueError if a length does not fit the data."""
    messages, at = [], 0
    while at < len(datagram):
        rest = len(datagram) - at
        if rest < _MESSAGE.size:
            raise ValueError(f"netlink message cut off after {rest} bytes")
        length, kind, flags, sequence, _ = _MESSAGE.unpack_from(datagram, at)
        if not _MESSAGE.size <= length <= rest:
            raise ValueError(f"netlink message of {length} bytes in {rest}")
        messages.append(Message(kind, flags, sequence, datagram[at + _MESSAGE.size : at + length]))
        at += _aligned(length)
    return messages


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute, padded to a multiple of 4 bytes; UsageError if it is longer than 65535 bytes."""
    length = _ATTRIBUTE.size + len(payload)
    if length > _MAX_ATTRIBUTE:
        raise UsageError(f"netlink attribute {kind & NLA_TYPE_MASK}: {length} bytes do not fit its 16-bit length")
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(_aligned(length) - length)


def nest(kind: int, *parts: bytes) -> bytes:
    """Encode an attribute that contains attributes.

    NLA_F_NESTED is not optional: strict validation refuses a nest without it (NL_VALIDATE_NESTED).
    """
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type without flag bits, value) of each attribute; ValueError if a length does not fit the payload."""
    at, end = 0, len(payload)
    while at < end:
        if end - at < _ATTRIBUTE.size:
            raise ValueError(f"netlink attribute cut off after {end - at} bytes")
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        if not _ATTRIBUTE.size <= length <= end - at:
            raise ValueError(f"netlink attribute {kind & NLA_TYPE_MASK} of {length} bytes in {end - at}")
        yield kind & NLA_TYPE_MASK, payload[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def error_of(message: Message) -> tuple[int, str]:
    """Decode NLMSG_ERROR or NLMSG_DONE: (errno, text).

    errno: positive, 0 for success. text: the kernel's explanation (NLMSGERR_ATTR_MSG), empty if there is none.
    """
    if not message.body:
        return 0, ""
    number = -_S32.unpack_from(message.body)[0]
    for kind, value in attributes(message.body[_explanation(message) :]):
        if kind == _ERROR_TEXT:
            return number, value.rstrip(b"\0").decode(errors="replace")
    return number, ""


def check(messages: Sequence[Message], where: str, action: str) -> None:
    """Raise ControlError if the last message reports an error; ValueError if the answer has no end.

    where, action: begin the error's message, `where: ERRNO: action: reason`. Raises DumpInterrupted for a dump during
    which the state changed.
    """
    if not messages or not messages[-1].is_last:
        raise ValueError(f"{len(messages)} messages and no end")
    number, text = error_of(messages[-1])
    if number:
        raise refusal(where, action, number, text)
    if any(message.flags & NLM_F_DUMP_INTR for message in messages):
        reason = "the state changed during the dump"
        raise DumpInterrupted(f"{where}: {action}: {reason}", errno.EINTR, reason)


def _explanation(message: Message) -> int:
    """Return where in the body the attributes of an error begin; without NLM_F_ACK_TLVS there are none."""
    if not message.flags & NLM_F_ACK_TLVS:
        return len(message.body)
    if message.kind == NLMSG_DONE:
        return _S32.size
    # NLMSG_ERROR repeats the request: all of it, or with NLM_F_CAPPED its header only.
    request_length = _MESSAGE.unpack_from(message.body, _S32.size)[0]
    return _S32.size + (_MESSAGE.size if message.flags & NLM_F_CAPPED else _aligned(request_length))


def _aligned(length: int) -> int:
    return (length + 3) & ~3


class GenericSocket:
    """Sends requests over an open netlink socket, and receives their answers: one at a time, each with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sequence = 0
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
            # Both are optional. Without them an error repeats the whole request and has no text (netlink(7)).
            with contextlib.suppress(OSError):
                sock.setsockopt(SOL_NETLINK, option, 1)
        # The system's default buffers may be smaller than one request.
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)

    def resolve_family(self, name: str, deadline: Deadline) -> int:
        """Look up the id of a generic netlink family (CTRL_CMD_GETFAMILY).

        Raises ControlError with ENOENT if this kernel does not have the family.
        """
        payload = attribute(_CTRL_FAMILY_NAME, name.encode() + b"\0")
        request = generic(_CTRL, _CTRL_GETFAMILY, NLM_F_REQUEST | NLM_F_ACK, payload)
        answer = self.exchange(request, "genl", f"look up family {name}", deadline)
        family_id: int = struct.unpack("=H", dict(attributes(answer[0].payload))[_CTRL_FAMILY_ID])[0]
        return family_id

    def exchange(self, request: bytes, where: str, action: str, deadline: Deadline) -> list[Message]:
        """Send one request and return all messages of its answer.

        where, action: begin an error's message, `where: ERRNO: action: reason`. Raises ControlError for a refusal or an
        unreadable answer, DeadlineExceeded if the answer is late.
        """
        self._sequence += 1
        numbered = request[:_SEQUENCE_AT] + _U32.pack(self._sequence) + request[_SEQUENCE_AT + _U32.size :]
        answer: list[Message] = []
        try:
            deadline.limit(self._socket)
            self._socket.send(numbered)
            while not (answer and answer[-1].is_last):
                answer += self._receive(deadline)
            check(answer, where, action)
        except TimeoutError as error:
            raise deadline.exceeded(where, action, f"{len(answer)} messages") from error
        except OSError as error:
            raise refusal(where, action, error.errno or 0) from error
        except (ValueError, struct.error) as error:
            raise unreadable(where, error) from error
        return answer

    def _receive(self, deadline: Deadline) -> list[Message]:
        deadline.limit(self._socket)
        data, _, flags, _ = self._socket.recvmsg(_RECEIVE_SIZE)
        if flags & socket.MSG_TRUNC:
            raise ValueError(f"cut off after {len(data)} bytes")
        # A message with another sequence number is a late answer to an earlier request, which missed its deadline.
        return [message for message in parse_messages(data) if message.sequence == self._sequence]
