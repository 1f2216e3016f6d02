"""Check requests over generic netlink; a socket pair plays the kernel."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from harness.control.genl import GenlControl
from harness.control.records import AllowedIP, DeviceConfig, DeviceState, Key, PeerConfig
from harness.errors import ControlError, DeadlineExceeded, Unavailable, UsageError
from harness.net.netlink import (
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    Message,
    attribute,
    error_of,
    parse_messages,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILY = 30
MANY = tuple(AllowedIP(struct.pack("=BHB", 10, number, 0), 24) for number in range(2000))
HEADER = struct.pack("=IHHII", 500, FAMILY, 5, 1, 0)
TEXT = struct.pack("=HH", 12, 1) + b"bad key\0"
OFFSET = struct.pack("=HHI", 8, 2, 28)
BAD = struct.pack("=i", -errno.EINVAL)


class Kernel:
    """The far end of `control`: answers are queued before a request, requests read after it."""

    def __init__(self, sock: socket.socket, control: GenlControl) -> None:
        self.control = control
        self.far = sock

    def answer(self, sequence: int, *messages: Message) -> None:
        """Queue an answer to the request of this number; number 1 is the look-up of the family."""
        self.far.send(b"".join(message._replace(sequence=sequence).to_bytes() for message in messages))

    def requests(self) -> list[Message]:
        """The requests after the look-up of the family."""
        requests = []
        while True:
            try:
                requests += parse_messages(self.far.recv(1 << 16, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return requests[1:]


def acknowledged(number: int) -> Message:
    return Message(NLMSG_ERROR, NLM_F_CAPPED, 0, struct.pack("=i", -number) + bytes(16))


def dumped(port: int, flags: int = 2) -> Message:
    return Message(FAMILY, flags, 0, b"\0\1\0\0" + struct.pack("=HHHxx", 6, 6, port))


DONE = Message(NLMSG_DONE, 2, 0, bytes(4))


@pytest.fixture
def bare_kernel() -> Iterator[Kernel]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        yield Kernel(far, GenlControl(near, timeout=0.1))


@pytest.fixture
def kernel(bare_kernel: Kernel) -> Kernel:
    number = struct.pack("=HHHxx", 6, 1, FAMILY)
    bare_kernel.answer(1, Message(16, 0, 0, b"\1\2\0\0" + number), acknowledged(0))
    return bare_kernel


def test_set_sends_interface_name_and_requests_acknowledgement(kernel: Kernel) -> None:
    kernel.answer(2, acknowledged(0))
    kernel.control.interface("wg0").set(DeviceConfig(listen_port=5))
    [request] = kernel.requests()
    payload = struct.pack("=HH", 8, 2) + b"wg0\0" + struct.pack("=HHHxx", 6, 6, 5)
    assert request == Message(FAMILY, 0x5, 2, b"\1\1\0\0" + payload)


def test_get_requests_dump_and_decodes_it(kernel: Kernel) -> None:
    kernel.answer(2, dumped(51820))
    kernel.answer(2, DONE)
    assert kernel.control.interface("wg0").get() == DeviceState(listen_port=51820)
    assert kernel.requests() == [Message(FAMILY, 0x301, 2, b"\0\1\0\0" + struct.pack("=HH", 8, 2) + b"wg0\0")]


def test_family_id_is_looked_up_once(kernel: Kernel) -> None:
    kernel.answer(2, acknowledged(0))
    kernel.answer(3, acknowledged(0))
    kernel.control.set("wg0", DeviceConfig())
    kernel.control.set("wg1", DeviceConfig())
    assert [request.kind for request in kernel.requests()] == [FAMILY, FAMILY]


def test_interrupted_dump_is_read_again(kernel: Kernel) -> None:
    kernel.answer(2, dumped(1), dumped(2, flags=2 | NLM_F_DUMP_INTR), DONE)
    kernel.answer(3, dumped(51820), DONE)
    assert kernel.control.get("wg0").listen_port == 51820


def test_answer_to_earlier_request_is_ignored(kernel: Kernel) -> None:
    kernel.answer(1, dumped(1), DONE)
    kernel.answer(2, dumped(51820), DONE)
    assert kernel.control.get("wg0").listen_port == 51820


def test_refused_set_reports_interface_errno_and_settings(kernel: Kernel) -> None:
    kernel.answer(2, acknowledged(errno.EADDRINUSE))
    message = r"^wg0 \(genl\): EADDRINUSE: set listen_port 5: Address already in use$"
    with pytest.raises(ControlError, match=message) as caught:
        kernel.control.set("wg0", DeviceConfig(listen_port=5))
    assert caught.value.errno == errno.EADDRINUSE


def test_refused_get_reports_interface_and_errno(kernel: Kernel) -> None:
    kernel.answer(2, acknowledged(errno.ENODEV))
    with pytest.raises(ControlError, match=r"^wg0 \(genl\): ENODEV: get: No such device$"):
        kernel.control.get("wg0")


def test_large_set_stops_at_first_refused_part(kernel: Kernel) -> None:
    kernel.answer(2, acknowledged(0))
    kernel.answer(3, acknowledged(errno.ENOMEM))
    config = DeviceConfig(peers=(PeerConfig(public_key=Key(bytes(32)), allowed_ips=MANY * 2),))
    with pytest.raises(ControlError, match=r"ENOMEM: .* \(part 2 of 4\): Cannot allocate memory"):
        kernel.control.set("wg0", config)
    assert [request.sequence for request in kernel.requests()] == [2, 3]


def test_kernel_without_wireguard_family_is_unavailable(bare_kernel: Kernel) -> None:
    bare_kernel.answer(1, acknowledged(errno.ENOENT))
    with pytest.raises(Unavailable, match="this kernel has no WireGuard: modprobe wireguard"):
        bare_kernel.control.get("wg0")


def test_failed_family_lookup_reports_its_errno(bare_kernel: Kernel) -> None:
    bare_kernel.answer(1, acknowledged(errno.EPERM))
    with pytest.raises(ControlError, match=r"^genl: EPERM: look up family wireguard: Operation not permitted$"):
        bare_kernel.control.get("wg0")


def test_incomplete_answer_ends_with_deadline_exceeded(kernel: Kernel) -> None:
    kernel.answer(2, dumped(1))
    with pytest.raises(DeadlineExceeded, match=r"^wg0 \(genl\): waited 0.1 s for the answer to get; seen: 1 messages$"):
        kernel.control.get("wg0")


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"short", "netlink message cut off after 5 bytes"),
        (Message(FAMILY, 2, 2, b"\0\1\0\0\3\0\0\0").to_bytes(), "netlink attribute 0 of 3 bytes in 4"),
        (bytes(1 << 17) + b"x", "cut off after 131072 bytes"),
    ],
)
def test_unreadable_answer_is_reported_with_interface(kernel: Kernel, answer: bytes, complaint: str) -> None:
    kernel.far.send(answer)
    kernel.answer(2, DONE)
    with pytest.raises(ControlError, match=rf"^wg0 \(genl\): unreadable answer: {complaint}$"):
        kernel.control.get("wg0")


def test_unconnected_socket_is_reported_as_enotconn() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as unconnected:
        control = GenlControl(unconnected)
        with pytest.raises(ControlError, match=r"ENOTCONN: look up family wireguard: .* not connected$"):
            control.get("wg0")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Message(NLMSG_ERROR, 0, 0, bytes(20)), (0, "")),
        (Message(NLMSG_ERROR, 0, 0, BAD + HEADER + bytes(484)), (errno.EINVAL, "")),
        (Message(NLMSG_ERROR, NLM_F_ACK_TLVS, 0, BAD + HEADER + bytes(484) + TEXT), (errno.EINVAL, "bad key")),
        (
            Message(NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, 0, BAD + HEADER + OFFSET + TEXT),
            (errno.EINVAL, "bad key"),
        ),
        (Message(NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, 0, BAD + HEADER + OFFSET), (errno.EINVAL, "")),
        (Message(NLMSG_DONE, 2, 0, b""), (0, "")),
        (Message(NLMSG_DONE, 2, 0, BAD), (errno.EINVAL, "")),
        (Message(NLMSG_DONE, 2 | NLM_F_ACK_TLVS, 0, BAD + TEXT), (errno.EINVAL, "bad key")),
    ],
)
def test_verdict_returns_errno_and_extended_ack_message(answer: Message, expected: tuple[int, str]) -> None:
    assert error_of(answer) == expected


def test_extended_ack_message_ends_error_text(kernel: Kernel) -> None:
    kernel.answer(2, Message(NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, 0, BAD + HEADER + TEXT))
    with pytest.raises(ControlError, match=r"EINVAL: set listen_port 5: Invalid argument \(bad key\)$"):
        kernel.control.set("wg0", DeviceConfig(listen_port=5))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (bytes(15), "netlink message cut off after 15 bytes"),
        (struct.pack("=I", 15) + bytes(12), "netlink message of 15 bytes in 16"),
        (struct.pack("=I", 17) + bytes(12), "netlink message of 17 bytes in 16"),
    ],
)
def test_impossible_message_length_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        parse_messages(data)


def test_attribute_of_65536_bytes_raises_usage_error() -> None:
    assert len(attribute(1, bytes(0xFFFB))) == 0x10000
    with pytest.raises(UsageError, match="netlink attribute 1: 65536 bytes do not fit its 16-bit length"):
        attribute(1, bytes(0xFFFC))
