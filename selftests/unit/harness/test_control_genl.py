"""Check requests to the kernel and its answers against pyroute2 and bytes packed by hand."""

from __future__ import annotations

import base64
import errno
import socket
import struct
from typing import Any

import pytest
from pyroute2.netlink.generic.wireguard import wgmsg

from harness.control.genl import decode_dump, encode_set
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
from harness.errors import ControlError, UsageError
from harness.net.netlink import NLM_F_DUMP_INTR, NLMSG_DONE, DumpInterrupted, Message, parse_messages

FAMILY = 30
OURS = Key(b"o" * 32)
ALICE = Key(b"a" * 32)
BOB = Key(b"b" * 32)
ZERO = bytes(32)
DONE = Message(NLMSG_DONE, 2, 0, bytes(4))
MANY = tuple(AllowedIP(struct.pack("=BHB", 10, number, 0), 24) for number in range(2000))


def nla(kind: int, payload: bytes) -> bytes:
    """Make an attribute as netlink(7) describes it, without the code under test."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return nla(kind | 0x8000, b"".join(parts))


def prefix(address: str, length: int, order: tuple[int, ...] = (3, 1, 2)) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    values = {1: struct.pack("=H", family), 2: socket.inet_pton(family, address), 3: bytes([length])}
    return nested(0, *(nla(kind, values[kind]) for kind in order))


def dumped(*attributes: bytes) -> Message:
    return Message(FAMILY, 2, 0, b"\0\1\0\0" + b"".join(attributes))


def requested(config: DeviceConfig) -> list[dict[str, Any]]:
    """Read our requests with pyroute2."""
    messages = [wgmsg(request) for request in encode_set("wg0", config, FAMILY)]
    for message in messages:
        message.decode()
    return [plain(message) for message in messages]


def plain(node: Any) -> dict[str, Any]:
    """Turn pyroute2's tree of lists into dictionaries."""
    return {
        name: [child.get("addr") or plain(child) for child in value] if isinstance(value, list) else value
        for name, value in ((attribute[0].removeprefix(node.prefix), attribute[1]) for attribute in node["attrs"])
    }


def requested_peer(**changes: Any) -> dict[str, Any]:
    [request] = requested(DeviceConfig(peers=(PeerConfig(public_key=ALICE, **changes),)))
    [peer] = request["PEERS"]
    assert isinstance(peer, dict)
    return peer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DeviceConfig(), {}),
        (DeviceConfig(private_key=OURS), {"PRIVATE_KEY": base64.b64encode(OURS.raw)}),
        (DeviceConfig(private_key=Key(ZERO)), {"PRIVATE_KEY": base64.b64encode(ZERO)}),
        (DeviceConfig(listen_port=51820), {"LISTEN_PORT": 51820}),
        (DeviceConfig(listen_port=0, fwmark=0), {"LISTEN_PORT": 0, "FWMARK": 0}),
        (DeviceConfig(fwmark=0xFFFFFFFF), {"FWMARK": 0xFFFFFFFF}),
        (DeviceConfig(replace_peers=True), {"FLAGS": 1}),
    ],
)
def test_encoded_device_settings_are_decoded_by_pyroute2(config: DeviceConfig, expected: dict[str, Any]) -> None:
    assert requested(config) == [{"IFNAME": "wg0", **expected}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"remove": True}, {"FLAGS": 1}),
        ({"replace_allowed_ips": True}, {"FLAGS": 2}),
        ({"update_only": True}, {"FLAGS": 4}),
        ({"update_only": True, "replace_allowed_ips": True}, {"FLAGS": 6}),
        ({"preshared_key": BOB}, {"PRESHARED_KEY": base64.b64encode(BOB.raw)}),
        ({"preshared_key": Key(ZERO)}, {"PRESHARED_KEY": base64.b64encode(ZERO)}),
        ({"persistent_keepalive": 65535}, {"PERSISTENT_KEEPALIVE_INTERVAL": 65535}),
        ({"persistent_keepalive": 0}, {"PERSISTENT_KEEPALIVE_INTERVAL": 0}),
        ({"protocol_version": 2}, {"PROTOCOL_VERSION": 2}),
        ({"allowed_ips": allowed_ips("10.0.0.5/8", "fd00::/64")}, {"ALLOWEDIPS": ["10.0.0.5/8", "fd00::/64"]}),
        ({"allowed_ips": allowed_ips("0.0.0.0/0", "::/0")}, {"ALLOWEDIPS": ["0.0.0.0/0", "::/0"]}),
    ],
)
def test_encoded_peer_settings_are_decoded_by_pyroute2(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert requested_peer(**changes) == {"PUBLIC_KEY": base64.b64encode(ALICE.raw), **expected}


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (Endpoint("192.0.2.1", 51820), {"family": 2, "port": 51820, "addr": "192.0.2.1"}),
        (Endpoint("2001:db8::1", 9), {"family": 10, "port": 9, "flowinfo": 0, "addr": "2001:db8::1"}),
    ],
)
def test_encoded_endpoint_is_decoded_by_pyroute2(endpoint: Endpoint, expected: dict[str, Any]) -> None:
    assert expected.items() <= requested_peer(endpoint=endpoint)["ENDPOINT"].items()


SOCKADDRS = pytest.mark.parametrize(
    ("endpoint", "sockaddr"),
    [
        (Endpoint("192.0.2.1", 1), struct.pack("=H", 2) + bytes.fromhex("0001 c0000201") + bytes(8)),
        (
            # Packed here, because pyroute2 packs the scope as big-endian: sin6_scope_id is in host byte order.
            Endpoint("fe80::2", 0xCA6C, 3),
            struct.pack("=H", 10)
            + bytes.fromhex("ca6c 00000000 fe80000000000000 0000000000000002")
            + struct.pack("=I", 3),
        ),
    ],
)


@SOCKADDRS
def test_endpoint_is_encoded_as_sockaddr(endpoint: Endpoint, sockaddr: bytes) -> None:
    [request] = encode_set("wg0", DeviceConfig(peers=(PeerConfig(public_key=ALICE, endpoint=endpoint),)), FAMILY)
    assert request.endswith(nested(8, nested(0, nla(1, ALICE.raw), nla(4, sockaddr))))


@SOCKADDRS
def test_endpoint_is_decoded_from_sockaddr(endpoint: Endpoint, sockaddr: bytes) -> None:
    state = decode_dump([dumped(nested(8, nested(0, nla(1, ALICE.raw), nla(4, sockaddr)))), DONE])
    assert state.peer(ALICE).endpoint == endpoint


def test_removed_allowed_ip_carries_remove_me_flag() -> None:
    peer = PeerConfig(public_key=ALICE, allowed_ips=allowed_ips("-10.0.0.0/8"))
    [request] = encode_set("wg0", DeviceConfig(peers=(peer,)), FAMILY)
    entry = nla(3, b"\x08") + nla(1, struct.pack("=H", 2)) + nla(2, bytes((10, 0, 0, 0))) + nla(4, struct.pack("=I", 1))
    assert request.endswith(nested(9, nested(0, entry)))


def by_pyroute2(*attributes: Any) -> list[Message]:
    message = wgmsg()
    message["header"]["type"] = FAMILY
    message["attrs"] = list(attributes)
    message.encode()
    return parse_messages(bytes(message.data))


def test_device_encoded_by_pyroute2_is_decoded() -> None:
    address = bytes((10, 0, 0, 0))
    entry = [("WGALLOWEDIP_A_FAMILY", 2), ("WGALLOWEDIP_A_IPADDR", address), ("WGALLOWEDIP_A_CIDR_MASK", 8)]
    peer = [
        ("WGPEER_A_PUBLIC_KEY", str(ALICE)),
        ("WGPEER_A_ENDPOINT", {"addr": "192.0.2.1", "port": 9}),
        ("WGPEER_A_ALLOWEDIPS", [{"attrs": entry}]),
    ]
    messages = by_pyroute2(("WGDEVICE_A_LISTEN_PORT", 51820), ("WGDEVICE_A_PEERS", [{"attrs": peer}]))
    state = PeerState(public_key=ALICE, endpoint=Endpoint("192.0.2.1", 9), allowed_ips=(AllowedIP(address, 8),))
    assert decode_dump([*messages, DONE]) == DeviceState(listen_port=51820, peers=(state,))


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        (nla(1, struct.pack("=I", 7)) + nla(2, b"wg0\0"), {}),
        (nla(3, OURS.raw), {"private_key": OURS}),
        (nla(4, ALICE.raw), {"public_key": ALICE}),
        (nla(6, struct.pack("=H", 51820)), {"listen_port": 51820}),
        (nla(7, struct.pack("=I", 0xFFFFFFFF)), {"fwmark": 0xFFFFFFFF}),
    ],
)
def test_device_attribute_is_decoded(attribute: bytes, expected: dict[str, Any]) -> None:
    assert decode_dump([dumped(attribute), DONE]) == DeviceState(**expected)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        (nla(2, BOB.raw), {"preshared_key": BOB}),
        (nla(5, struct.pack("=H", 25)), {"persistent_keepalive": 25}),
        (nla(6, struct.pack("=qq", 1700000000, 999999999)), {"latest_handshake": 1700000000_999999999}),
        (nla(7, struct.pack("=Q", 148)), {"rx_bytes": 148}),
        (nla(8, struct.pack("=Q", 1 << 63)), {"tx_bytes": 1 << 63}),
        (
            nested(9, prefix("10.0.0.0", 8), prefix("fd00::", 64)),
            {"allowed_ips": allowed_ips("10.0.0.0/8", "fd00::/64")},
        ),
        (nla(10, struct.pack("=I", 1)), {"protocol_version": 1}),
    ],
)
def test_peer_attribute_is_decoded(attribute: bytes, expected: dict[str, Any]) -> None:
    state = decode_dump([dumped(nested(8, nested(0, nla(1, ALICE.raw), attribute))), DONE])
    assert state.peers == (PeerState(public_key=ALICE, **expected),)


# The kernel's own order is length, family, address.
@pytest.mark.parametrize("order", [(3, 1, 2), (3, 2, 1), (1, 2, 3), (2, 3, 1)])
@pytest.mark.parametrize("text", ["10.0.0.0/8", "fd00::/64"])
def test_allowed_ip_is_decoded_in_any_attribute_order(text: str, order: tuple[int, ...]) -> None:
    address, _, length = text.partition("/")
    entry = nested(9, prefix(address, int(length), order))
    state = decode_dump([dumped(nested(8, nested(0, nla(1, ALICE.raw), entry))), DONE])
    assert state.peers[0].allowed_ips == allowed_ips(text)


def test_all_zero_keys_are_decoded_as_none() -> None:
    device = dumped(nla(3, ZERO), nla(4, ZERO), nested(8, nested(0, nla(1, ALICE.raw), nla(2, ZERO))))
    state = decode_dump([device, DONE])
    assert (state.private_key, state.public_key, state.peers[0].preshared_key) == (None, None, None)


def test_unknown_attributes_are_ignored() -> None:
    peer = nested(0, nla(99, b"x"), nla(1, ALICE.raw), nested(9, nested(0, prefix("10.0.0.0", 8)[4:], nla(9, b"x"))))
    state = decode_dump([dumped(nla(99, b"x"), nested(8, peer)), DONE])
    assert state.peers == (PeerState(public_key=ALICE, allowed_ips=allowed_ips("10.0.0.0/8")),)


def test_peer_split_over_messages_is_decoded_as_one_peer() -> None:
    alice = [nested(8, nested(0, nla(1, ALICE.raw), nested(9, prefix(f"10.{part}.0.0", 16)))) for part in range(3)]
    bob = nested(8, nested(0, nla(1, BOB.raw), nested(9, prefix("fd00::", 64))))
    state = decode_dump([*map(dumped, [*alice, bob]), DONE])
    assert [(peer.public_key, peer.allowed_ips) for peer in state.peers] == [
        (ALICE, allowed_ips("10.0.0.0/16", "10.1.0.0/16", "10.2.0.0/16")),
        (BOB, allowed_ips("fd00::/64")),
    ]


def continued(**changes: Any) -> list[dict[str, Any]]:
    """Read with pyroute2 the entries into which a peer with many allowed-ips is split."""
    config = DeviceConfig(peers=(PeerConfig(public_key=ALICE, allowed_ips=MANY, **changes),))
    return [peer for request in requested(config) for peer in request["PEERS"]]


def test_large_peer_is_split_without_losing_allowed_ips() -> None:
    parts = continued()
    assert len(parts) > 1
    assert [text for part in parts for text in part["ALLOWEDIPS"]] == [str(prefix) for prefix in MANY]


@pytest.mark.parametrize(
    ("changes", "first", "further"),
    [
        ({}, None, None),
        ({"replace_allowed_ips": True}, 2, None),
        ({"update_only": True}, 4, 4),
        ({"update_only": True, "replace_allowed_ips": True}, 6, 4),
        ({"remove": True}, 1, 1),
    ],
)
def test_split_peer_repeats_all_flags_but_replace_allowed_ips(
    changes: dict[str, bool], first: int | None, further: int | None
) -> None:
    flags = [part.get("FLAGS") for part in continued(**changes)]
    assert flags == [first] + [further] * (len(flags) - 1)


def test_split_peer_sends_its_settings_only_once() -> None:
    first, *further = continued(preshared_key=BOB, endpoint=Endpoint("192.0.2.1", 9), persistent_keepalive=5)
    assert {"PRESHARED_KEY", "ENDPOINT", "PERSISTENT_KEEPALIVE_INTERVAL"} < set(first)
    assert {frozenset(part) for part in further} == {frozenset({"PUBLIC_KEY", "ALLOWEDIPS"})}


def test_device_settings_are_sent_in_first_request_only() -> None:
    peers = (PeerConfig(public_key=ALICE, allowed_ips=MANY), PeerConfig(public_key=BOB, allowed_ips=MANY))
    config = DeviceConfig(private_key=OURS, listen_port=1, fwmark=2, replace_peers=True, peers=peers)
    first, *further = requested(config)
    assert set(first) == {"IFNAME", "PRIVATE_KEY", "LISTEN_PORT", "FWMARK", "FLAGS", "PEERS"}
    assert {frozenset(request) for request in further} == {frozenset({"IFNAME", "PEERS"})}


@pytest.mark.parametrize("address", ["10.0.0.0/8", "fd00::/64", "-10.0.0.0/8", "-fd00::/64"])
def test_request_size_is_bounded_and_large_on_average(address: str) -> None:
    peers = (PeerConfig(public_key=ALICE, allowed_ips=allowed_ips(address) * 5000),)
    sizes = [len(request) for request in encode_set("wg0", DeviceConfig(peers=peers), FAMILY)]
    # An attribute's length has 16 bits; few large requests are faster than many small ones.
    assert max(sizes) < 32768 + 200
    assert sum(sizes) / len(sizes) > 12000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeviceConfig(listen_port=65536), "listen_port 65536: want 0 to 65535"),
        (DeviceConfig(fwmark=-1), "fwmark -1: want 0 to 4294967295"),
        (DeviceConfig(peers=(PeerConfig(public_key=ALICE, persistent_keepalive=65536),)), "persistent_keepalive 65536"),
        (
            DeviceConfig(peers=(PeerConfig(public_key=ALICE, endpoint=Endpoint("localhost", 1)),)),
            "endpoint localhost:1",
        ),
        (
            DeviceConfig(peers=(PeerConfig(public_key=ALICE, endpoint=Endpoint("::1", 65536)),)),
            r"endpoint \[::1\]:65536",
        ),
        (DeviceConfig(peers=(PeerConfig(public_key=ALICE, allowed_ips=(AllowedIP(b"12345", 8),)),)), "allowed ip 3132"),
        (
            DeviceConfig(peers=(PeerConfig(public_key=ALICE, allowed_ips=(AllowedIP(b"1234", 256),)),)),
            "allowed ip 3132",
        ),
    ],
)
def test_setting_that_fits_no_attribute_raises_usage_error(config: DeviceConfig, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        encode_set("wg0", config, FAMILY)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([], "0 messages and no end"),
        ([dumped()], "1 messages and no end"),
        ([dumped(b"\x03\0\0\0"), DONE], "netlink attribute 0 of 3 bytes in 4"),
        ([dumped(b"\xff\0\x06\0"), DONE], "netlink attribute 6 of 255 bytes in 4"),
        ([dumped(b"\x04"), DONE], "netlink attribute cut off after 1 bytes"),
        ([dumped(nla(6, b"1")), DONE], "unpack requires a buffer of 2 bytes"),
        ([dumped(nla(3, b"short")), DONE], "a key has 32 bytes, not 5"),
        ([dumped(nested(8, nested(0, nla(2, ZERO)))), DONE], "a peer without public key"),
        ([dumped(nested(8, nested(0, nla(1, ZERO), nla(4, bytes(16))))), DONE], "an endpoint of family 0"),
        ([dumped(nested(8, nested(0, nla(1, ZERO), nested(9, nested(0, nla(3, b"1")))))), DONE], "an allowed ip of 05"),
        (
            [dumped(nested(8, nested(0, nla(1, ZERO), nested(9, prefix("::", 8)[:20])))), DONE],
            "unpack_from requires a buffer",
        ),
    ],
)
def test_malformed_dump_raises_ebadmsg(answer: list[Message], complaint: str) -> None:
    with pytest.raises(ControlError, match=f"^genl: unreadable answer: {complaint}") as caught:
        decode_dump(answer)
    assert caught.value.errno == errno.EBADMSG


def test_error_in_last_message_of_dump_is_raised() -> None:
    with pytest.raises(ControlError, match=r"^wg0: EMSGSIZE: get: Message too long$"):
        decode_dump([dumped(), DONE._replace(body=struct.pack("=i", -errno.EMSGSIZE))], "wg0")


@pytest.mark.parametrize("interrupted", [0, 1])
def test_dump_interrupted_in_any_message_is_refused(interrupted: int) -> None:
    answer = [dumped(nla(6, b"12")), DONE]
    answer[interrupted] = answer[interrupted]._replace(flags=2 | NLM_F_DUMP_INTR)
    with pytest.raises(DumpInterrupted, match=r"^genl: get: the state changed during the dump$"):
        decode_dump(answer)
