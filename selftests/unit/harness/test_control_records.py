"""Check the configuration records: the notations they read and print, and what they refuse."""

from __future__ import annotations

import re

import pytest

from harness.control.records import AllowedIP, DeviceState, Endpoint, Key, PeerState
from harness.errors import UsageError

# The output of `wg pubkey` of wireguard-tools 1.0.20210914.
PRIVATE = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
PUBLIC = "j0DFrbaPJWJK5bIU6nZ6bslNgp09e14a0bpvPiE4KF8="


def test_public_key_equals_output_of_wg_pubkey() -> None:
    assert str(Key.parse(PRIVATE).public()) == PUBLIC


@pytest.mark.parametrize("drawn", [b"\x00", b"\xff"])
def test_generated_key_is_clamped_for_any_random_bytes(drawn: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda size: drawn * size)
    raw = Key.generate().raw
    assert (raw[0] & 7, raw[31] & 0xC0, raw[1:31]) == (0, 0x40, drawn * 30)


def test_generated_keys_differ() -> None:
    assert Key.generate() != Key.generate()


@pytest.mark.parametrize(
    ("text", "complaint"), [("AAEC", "a key has 32 bytes, not 3"), ("?" * 44, "key '.*': not base64")]
)
def test_malformed_key_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Key.parse(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("10.0.0/8", "want ADDRESS/LENGTH"),
        ("10.0.0.0/x", "want ADDRESS/LENGTH"),
        ("10.0.0.0/33", "a prefix length is 0 to 32"),
        ("::/129", "a prefix length is 0 to 128"),
        ("::/-1", "a prefix length is 0 to 128"),
    ],
)
def test_malformed_allowed_ip_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=f"^allowed ip '{text}': {complaint}$"):
        AllowedIP.parse(text)


def test_allowed_ip_is_parsed_without_length_and_with_plus_sign() -> None:
    assert [str(AllowedIP.parse(text)) for text in ("10.0.0.1", "+::1")] == ["10.0.0.1/32", "::1/128"]


def test_unknown_peer_is_refused_with_list_of_known_peers() -> None:
    state = DeviceState(peers=(PeerState(public_key=Key.parse(PUBLIC)),))
    assert state.peer(Key.parse(PUBLIC)) is state.peers[0]
    with pytest.raises(UsageError, match=f"^no peer {PRIVATE}; there are: {re.escape(PUBLIC)}$"):
        state.peer(Key.parse(PRIVATE))


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
        ("[ff02::1%eth0]:9", "[ff02::1%42]:9"),
    ],
)
def test_endpoint_is_printed_in_canonical_form(text: str, expected: str) -> None:
    assert str(Endpoint.parse(text, {"eth0": 42}.__getitem__)) == expected


@pytest.mark.parametrize("text", ["", "192.0.2.1", "192.0.2.1:", "::1:9x", "host:9"])
def test_malformed_endpoint_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^endpoint '.*': want ADDRESS:PORT, \[ADDRESS\]:PORT or \[ADDRESS%SCOPE"):
        Endpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[fe80::1%]:9", "endpoint '.*': after % want an interface or its index"),
        ("10.0.0.1%eth0:9", "endpoint '.*': an IPv4 address has no scope"),
        ("[fe80::1%veth9]:9", r"endpoint \[fe80::1%veth9\]:9: no interface veth9"),
    ],
)
def test_malformed_or_unknown_scope_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=f"^{complaint}$"):
        Endpoint.parse(text, {"eth0": 42}.__getitem__)


def test_scope_name_is_kept_until_it_is_resolved() -> None:
    endpoint = Endpoint.parse("[fe80::1%veth9]:2")
    assert (str(endpoint), Endpoint.parse(str(endpoint))) == ("[fe80::1%veth9]:2", endpoint)
    assert endpoint.resolve({"veth9": 7}.__getitem__) == Endpoint("fe80::1", 2, 7)


def test_error_of_node_about_scope_names_endpoint() -> None:
    def index(device: str) -> int:
        raise UsageError(f"ns1: no device {device}; there are: lo")

    with pytest.raises(UsageError, match=r"^endpoint \[fe80::1%veth9\]:2: ns1: no device veth9; there are: lo$"):
        Endpoint.parse("[fe80::1%veth9]:2", index)
