"""Check the UAPI client: requests, answers, and a server behind a socket pair."""

from __future__ import annotations

import errno
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from harness.control.records import (
    AllowedIP,
    DeviceConfig,
    DeviceState,
    Endpoint,
    Key,
    PeerConfig,
    PeerState,
    allowed_ips,
)
from harness.control.uapi import UapiControl, decode_get, encode_set
from harness.errors import ControlError, DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OURS = Key(bytes.fromhex("c0" * 32))
ALICE = Key(bytes.fromhex("a1" * 32))
BOB = Key(bytes.fromhex("b2" * 32))
ZERO = Key(bytes(32))
DONE = b"errno=0\n\n"

# An answer of wireguard-go 0.0.20220316, with the keys replaced.
WIREGUARD_GO = f"""\
private_key={"c0" * 32}
listen_port=51820
fwmark=7
public_key={"a1" * 32}
preshared_key={"b2" * 32}
protocol_version=1
endpoint=[fe80::1]:1234
last_handshake_time_sec=1700000000
last_handshake_time_nsec=999999999
tx_bytes=148
rx_bytes=92
persistent_keepalive_interval=25
allowed_ip=10.0.0.0/8
allowed_ip=fd00::/64
public_key={"b2" * 32}
preshared_key={"00" * 32}
protocol_version=1
last_handshake_time_sec=0
last_handshake_time_nsec=0
tx_bytes=0
rx_bytes=0
persistent_keepalive_interval=0
errno=0

"""


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (DeviceConfig(), []),
        (DeviceConfig(private_key=OURS), ["private_key=" + "c0" * 32]),
        (DeviceConfig(private_key=ZERO), ["private_key=" + "00" * 32]),
        (DeviceConfig(listen_port=0), ["listen_port=0"]),
        (DeviceConfig(fwmark=0xFFFFFFFF), ["fwmark=4294967295"]),
        (DeviceConfig(replace_peers=True), ["replace_peers=true"]),
    ],
)
def test_device_settings_are_encoded_as_lines(config: DeviceConfig, lines: list[str]) -> None:
    assert encode_set(config).decode() == "\n".join(["set=1", *lines, "", ""])


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"remove": True}, ["remove=true"]),
        ({"update_only": True}, ["update_only=true"]),
        ({"protocol_version": 1}, ["protocol_version=1"]),
        ({"preshared_key": BOB}, ["preshared_key=" + "b2" * 32]),
        ({"endpoint": Endpoint("192.0.2.1", 9)}, ["endpoint=192.0.2.1:9"]),
        ({"endpoint": Endpoint("fe80::1", 9, 3)}, ["endpoint=[fe80::1%3]:9"]),
        ({"replace_allowed_ips": True}, ["replace_allowed_ips=true"]),
        ({"allowed_ips": allowed_ips("10.0.0.5/8", "::/0")}, ["allowed_ip=10.0.0.5/8", "allowed_ip=::/0"]),
        ({"allowed_ips": allowed_ips("-fd00::/64")}, ["allowed_ip=-fd00::/64"]),
        ({"persistent_keepalive": 0}, ["persistent_keepalive_interval=0"]),
    ],
)
def test_peer_settings_are_encoded_as_lines(changes: dict[str, Any], lines: list[str]) -> None:
    request = encode_set(DeviceConfig(peers=(PeerConfig(public_key=ALICE, **changes),)))
    assert request.decode().split("\n") == ["set=1", "public_key=" + "a1" * 32, *lines, "", ""]


def test_lines_of_set_are_in_order_of_kernel() -> None:
    everything = PeerConfig(
        public_key=ALICE,
        preshared_key=BOB,
        endpoint=Endpoint("192.0.2.1", 9),
        persistent_keepalive=5,
        allowed_ips=allowed_ips("10.0.0.0/8"),
        replace_allowed_ips=True,
    )
    config = DeviceConfig(private_key=OURS, listen_port=1, fwmark=2, replace_peers=True, peers=(everything,))
    names = [line.partition("=")[0] for line in encode_set(config).decode().split()]
    assert names[1:5] == ["fwmark", "listen_port", "replace_peers", "private_key"]
    peer = ["preshared_key", "endpoint", "replace_allowed_ips", "allowed_ip", "persistent_keepalive_interval"]
    assert names[5:] == ["public_key", *peer]


@pytest.mark.parametrize("claim", ["remove", "update_only"])
def test_remove_and_update_only_lines_follow_public_key_directly(claim: str) -> None:
    peer = PeerConfig(public_key=ALICE, preshared_key=BOB, protocol_version=1, **{claim: True})  # type: ignore[arg-type]
    assert encode_set(DeviceConfig(peers=(peer,))).decode().split()[2] == f"{claim}=true"


def test_answer_of_wireguard_go_is_read() -> None:
    alice = PeerState(
        public_key=ALICE,
        preshared_key=BOB,
        endpoint=Endpoint("fe80::1", 1234),
        persistent_keepalive=25,
        latest_handshake=1700000000_999999999,
        rx_bytes=92,
        tx_bytes=148,
        allowed_ips=allowed_ips("10.0.0.0/8", "fd00::/64"),
    )
    expected = DeviceState(private_key=OURS, listen_port=51820, fwmark=7, peers=(alice, PeerState(public_key=BOB)))
    assert decode_get(WIREGUARD_GO.encode()) == expected


def test_answer_as_lines_is_decoded_like_answer_as_bytes() -> None:
    assert decode_get(WIREGUARD_GO.split("\n")) == decode_get(WIREGUARD_GO.encode())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("own_public_key=" + "a1" * 32, DeviceState(public_key=ALICE)),
        ("private_key=" + "C0" * 32, DeviceState(private_key=OURS)),
        ("private_key=" + "00" * 32, DeviceState()),
        ("some_day=x", DeviceState()),
        ("", DeviceState()),
    ],
)
def test_device_line_is_decoded_or_ignored(line: str, expected: DeviceState) -> None:
    assert decode_get([line, "errno=0"]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:9", Endpoint("192.0.2.1", 9)),
        ("[2001:db8:0::1]:9", Endpoint("2001:db8::1", 9)),
        ("[fe80::1%7]:9", Endpoint("fe80::1", 9, 7)),
        ("[fe80::1%not-here]:9", Endpoint("fe80::1", 9, 42)),
    ],
)
def test_endpoint_is_read_with_its_scope(text: str, expected: Endpoint) -> None:
    answer = ["public_key=" + "a1" * 32, f"endpoint={text}", "errno=0"]
    assert decode_get(answer, scope_index={"not-here": 42}.__getitem__).peer(ALICE).endpoint == expected


@pytest.mark.parametrize("number", [98, -98])
def test_positive_and_negative_errno_raise_control_error(number: int) -> None:
    with pytest.raises(ControlError, match=r"^wg0: EADDRINUSE: get: Address already in use$") as caught:
        decode_get([f"errno={number}"], "wg0")
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("answer", [b"", b"\n", b"listen_port=1\n", b"listen_port=1\nerrno=0\nfwmark=1\n\n"])
def test_answer_that_does_not_end_with_errno_is_refused(answer: bytes) -> None:
    with pytest.raises(ControlError, match=r"ECONNRESET: get: .* \(the answer ended without an errno line\)$"):
        decode_get(answer)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("errno=", "errno="),
        ("listen_port=many", "listen_port=many: invalid literal"),
        ("private_key=xy", "private_key=xy: key 'xy': not hexadecimal"),
        ("private_key=c0", "a key has 32 bytes, not 1"),
        ("public_key=xy", "key 'xy': not hexadecimal"),
        (
            f"public_key={ALICE.raw.hex()}\nallowed_ip=10.0.0.0/33",
            "allowed ip '10.0.0.0/33': a prefix length is 0 to 32",
        ),
        (f"public_key={ALICE.raw.hex()}\nendpoint=here", "endpoint 'here'"),
    ],
)
def test_malformed_value_raises_ebadmsg(line: str, complaint: str) -> None:
    ending = b"\n\n" if line.startswith("errno") else b"\nerrno=0\n\n"
    with pytest.raises(ControlError, match=f"^uapi: unreadable answer: {complaint}") as caught:
        decode_get(line.encode() + ending)
    assert caught.value.errno == errno.EBADMSG


class Server:
    """Plays a program: each connection reads one request and sends `answers`."""

    def __init__(self) -> None:
        self.answers: list[bytes] = [DONE]
        self.request = b""
        self.reads_at_most = 1 << 30
        self._thread = threading.Thread()

    def connect(self) -> socket.socket:
        near, far = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(far,))
        self._thread.start()
        return near

    def close(self) -> None:
        if self._thread.ident:
            self._thread.join()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            while not self.request.endswith(b"\n\n") and len(self.request) < self.reads_at_most:
                self.request += sock.recv(1 << 16)
            for piece in self.answers:
                sock.sendall(piece)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def control(server: Server) -> UapiControl:
    return UapiControl("wg0", server.connect, timeout=10, scope_index={"not-here": 42}.__getitem__)


def test_set_sends_its_lines_to_socket(server: Server, control: UapiControl) -> None:
    control.set(DeviceConfig(listen_port=5))
    assert server.request == b"set=1\nlisten_port=5\n\n"


def test_get_sends_request_and_decodes_answer(server: Server, control: UapiControl) -> None:
    server.answers = [b"public_key=" + b"a1" * 32 + b"\nendpoint=[fe80::1%not-here]:9\n", DONE]
    assert control.get() == DeviceState(peers=(PeerState(public_key=ALICE, endpoint=Endpoint("fe80::1", 9, 42)),))
    assert server.request == b"get=1\n\n"


@pytest.mark.parametrize("answers", [[b"errno=-98\n\n"], [b"errno=98\n\n"], [b"err", b"no=-98\n", b"\n"]])
def test_refused_set_reports_interface_errno_and_settings(
    server: Server, control: UapiControl, answers: list[bytes]
) -> None:
    server.answers = answers
    message = r"^wg0 \(uapi\): EADDRINUSE: set listen_port 5: Address already in use$"
    with pytest.raises(ControlError, match=message) as caught:
        control.set(DeviceConfig(listen_port=5))
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("call", [UapiControl.get, lambda control: control.set(DeviceConfig())])
def test_connection_closed_before_errno_reports_econnreset(
    server: Server, control: UapiControl, call: Callable[[UapiControl], object]
) -> None:
    server.answers = [b"listen_port=1\n"]
    with pytest.raises(
        ControlError, match=r"^wg0 \(uapi\): ECONNRESET: .* \(the answer ended without an errno line\)$"
    ):
        call(control)


@pytest.mark.parametrize(("answers", "name"), [([b"errno=-22\n\n"], "EINVAL"), ([], "ECONNRESET")])
def test_error_is_reported_when_program_closes_during_large_set(
    server: Server, control: UapiControl, answers: list[bytes], name: str
) -> None:
    server.answers, server.reads_at_most = answers, 1
    many = tuple(AllowedIP(number.to_bytes(4), 32) for number in range(100_000))
    with pytest.raises(ControlError, match=rf"{name}: set peer {ALICE} \(100000 allowed_ips\)".replace("+", r"\+")):
        control.set(DeviceConfig(peers=(PeerConfig(public_key=ALICE, allowed_ips=many),)))


def test_incomplete_answer_ends_with_deadline_exceeded() -> None:
    near, far = socket.socketpair()
    with far:
        far.send(b"listen_port=1\n")
        with pytest.raises(
            DeadlineExceeded, match=r"^wg0 \(uapi\): waited 0.1 s for the answer to get; seen: 14 bytes$"
        ):
            UapiControl("wg0", lambda: near, timeout=0.1).get()


def test_set_exceeds_deadline_when_program_reads_nothing() -> None:
    near, far = socket.socketpair()
    many = (PeerConfig(public_key=ALICE, allowed_ips=allowed_ips("10.0.0.0/8") * 100_000),)
    with far, pytest.raises(DeadlineExceeded, match=r"waited 0.1 s for the answer to set peer"):
        UapiControl("wg0", lambda: near, timeout=0.1).set(DeviceConfig(peers=many))


def test_missing_socket_is_reported_with_interface(tmp_path: Path) -> None:
    def connect() -> socket.socket:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "wg0.sock"))
            return sock

    with pytest.raises(ControlError, match=r"^wg0 \(uapi\): ENOENT: get: No such file or directory$"):
        UapiControl("wg0", connect).get()
