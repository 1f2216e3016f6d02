"""Check the text of a refusal, and the time limit of a request."""

from __future__ import annotations

import errno
import socket

import pytest

from harness.control.base import describe
from harness.control.records import DeviceConfig, Endpoint, Key, PeerConfig, allowed_ips
from harness.errors import error_name, refusal
from harness.wait import Deadline

KEY = Key(bytes(range(32)))
TEXT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest.mark.parametrize(
    ("number", "name"),
    [(98, "EADDRINUSE"), (95, "EOPNOTSUPP"), (53, "EBADR"), (96, "EPFNOSUPPORT"), (4095, "errno 4095")],
)
def test_errno_is_printed_by_its_manual_page_name(number: int, name: str) -> None:
    assert error_name(number) == name


@pytest.mark.parametrize(("detail", "ending"), [("", ""), ("not now", " (not now)")])
def test_refusal_prints_place_errno_action_and_cause(detail: str, ending: str) -> None:
    error = refusal("wg0 (genl)", "get", errno.EPERM, detail)
    assert str(error) == f"wg0 (genl): EPERM: get: Operation not permitted{ending}"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (DeviceConfig(), "set nothing"),
        (DeviceConfig(listen_port=0, fwmark=7), "set listen_port 0, fwmark 7"),
        (DeviceConfig(private_key=KEY, replace_peers=True), "set private_key, replace_peers"),
        (DeviceConfig(peers=(PeerConfig(public_key=KEY),)), f"set peer {TEXT}"),
        (DeviceConfig(peers=(PeerConfig(public_key=KEY, remove=True),)), f"set peer {TEXT} (remove)"),
        (
            DeviceConfig(peers=(PeerConfig(public_key=KEY, endpoint=Endpoint("::1", 9), preshared_key=KEY),)),
            f"set peer {TEXT} (preshared_key, endpoint [::1]:9)",
        ),
        (
            DeviceConfig(fwmark=7, peers=(PeerConfig(public_key=KEY, allowed_ips=allowed_ips("10.0.0.0/8") * 3),)),
            f"set fwmark 7, peer {TEXT} (3 allowed_ips)",
        ),
        (DeviceConfig(peers=(PeerConfig(public_key=KEY),) * 2), "set 2 peers"),
    ],
)
def test_configuration_is_described_in_one_line(config: DeviceConfig, text: str) -> None:
    assert describe(config) == text


def test_expired_deadline_raises_timeout_error() -> None:
    with socket.socket() as sock, pytest.raises(TimeoutError):
        Deadline(0).limit(sock)


def test_deadline_limits_socket_timeout_to_remaining_time() -> None:
    with socket.socket() as sock:
        Deadline(50).limit(sock)
        assert 40 < (sock.gettimeout() or 0) <= 50
