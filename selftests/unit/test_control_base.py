"""How a refusal reads, and the spellings that the configuration records take and give."""

from __future__ import annotations

import errno
import socket

import pytest

from harness.control.base import Deadline, describe, error_name, refusal
from harness.control.records import AllowedIP, DeviceConfig, Endpoint, Key, PeerConfig, allowed_ips
from harness.errors import UsageError

KEY = Key(bytes(range(32)))
TEXT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest.mark.parametrize(
    ("number", "name"),
    [(98, "EADDRINUSE"), (95, "EOPNOTSUPP"), (53, "EBADR"), (96, "EPFNOSUPPORT"), (4095, "errno 4095")],
)
def test_error_bears_the_name_of_the_manual(number: int, name: str) -> None:
    assert error_name(number) == name


@pytest.mark.parametrize(("detail", "ending"), [("", ""), ("not now", " (not now)")])
def test_refusal_is_one_line_from_place_to_cause(detail: str, ending: str) -> None:
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
def test_configuration_is_told_in_one_line(config: DeviceConfig, text: str) -> None:
    assert describe(config) == text


def test_deadline_that_has_passed_lets_nothing_begin() -> None:
    with socket.socket() as sock, pytest.raises(TimeoutError):
        Deadline(0).limit(sock)


def test_deadline_gives_a_call_no_more_than_its_rest() -> None:
    with socket.socket() as sock:
        Deadline(50).limit(sock)
        assert 40 < (sock.gettimeout() or 0) <= 50


@pytest.mark.parametrize("text", ["10.0.0.5/8", "-10.0.0.0/8", "fd00::/64", "-::/0"])
def test_allowed_ip_is_printed_as_it_is_read(text: str) -> None:
    assert str(AllowedIP.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:9", "192.0.2.1:9"),
        ("[2001:DB8:0::1]:9", "[2001:db8::1]:9"),
        ("[::ffff:c000:201]:9", "[::ffff:192.0.2.1]:9"),
        ("[fe80::1%7]:9", "[fe80::1%7]:9"),
        ("[fe80::1%eth0]:9", "[fe80::1%42]:9"),
    ],
)
def test_endpoint_is_printed_in_its_usual_spelling(text: str, expected: str) -> None:
    assert str(Endpoint.parse(text, {"eth0": 42}.__getitem__)) == expected


@pytest.mark.parametrize("text", ["", "192.0.2.1", "192.0.2.1:", "::1:9x", "host:9", "[fe80::1%no-such-interface]:9"])
def test_text_that_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^endpoint '.*': want ADDRESS:PORT or \[ADDRESS\]:PORT$"):
        Endpoint.parse(text)
