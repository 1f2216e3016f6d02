"""Check rtnetlink against bytes packed by hand; a socket pair plays the kernel."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from harness.errors import ControlError
from harness.net.netlink import NLM_F_ACK_TLVS, NLM_F_CAPPED, NLMSG_ERROR, Message, parse_messages
from harness.net.rtnetlink import Rtnetlink, vanished_nsid

if TYPE_CHECKING:
    from collections.abc import Iterator

RTM_NEWNSID, RTM_DELNSID = 88, 89
SUCCESS = Message(NLMSG_ERROR, NLM_F_CAPPED, 1, bytes(20))


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our socket and the kernel's."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernel:
        yield ours, kernel


def nsid_message(kind: int, nsid: int) -> Message:
    """A notification of the kernel: family and padding, then the attribute NETNSA_NSID."""
    return Message(kind, 0, 0, bytes(4) + struct.pack("=HHi", 8, 1, nsid))


def test_nsid_request_carries_descriptor_and_id(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, kernel = sockets
    kernel.send(SUCCESS.to_bytes())
    Rtnetlink(ours).set_nsid(7, 1000)
    attributes = struct.pack("=HHI", 8, 3, 7) + struct.pack("=HHi", 8, 1, 1000)
    assert parse_messages(kernel.recv(100)) == [Message(RTM_NEWNSID, 0x5, 1, bytes(4) + attributes)]


def test_refused_request_reports_errno_and_extended_ack(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, kernel = sockets
    text = b"already assigned\0\0\0\0"
    body = struct.pack("=i", -errno.EEXIST) + bytes(16) + struct.pack("=HH", 4 + len(text), 1) + text
    kernel.send(Message(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, 1, body).to_bytes())
    with pytest.raises(ControlError) as refusal:
        Rtnetlink(ours).set_nsid(7, 1000)
    assert (refusal.value.errno, refusal.value.reason) == (errno.EEXIST, "File exists (already assigned)")


@pytest.mark.parametrize(("kind", "expected"), [(RTM_DELNSID, 1000), (RTM_NEWNSID, None)])
def test_vanished_nsid_is_read_from_its_notification_only(kind: int, expected: int | None) -> None:
    assert vanished_nsid(nsid_message(kind, 1000)) == expected
