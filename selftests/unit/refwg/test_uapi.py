from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Endpoint, Transmit
from refwg.messages import SECOND, MessageType
from refwg.uapi import Answer, Conversation, format_endpoint
from selftests.support.packets import ip_packet
from selftests.support.pair import Pair

if TYPE_CHECKING:
    from selftests.support.pair import Side

KEY = "aa" * 32
PEER = f"public_key={KEY}"


def one_side() -> Side:
    """A device that is up and has no peers."""
    side = Pair().a
    side.device.remove_all_peers(0)
    return side


def ask(side: Side, text: str) -> Answer:
    return Conversation(side.device, side.sockets).feed(text.encode(), 0)


def apply(side: Side, *lines: str) -> int:
    """Send a set request; returns its errno as a positive number."""
    reply = ask(side, "".join(f"{line}\n" for line in ("set=1", *lines, ""))).reply.decode()
    assert reply.endswith("\n\n")
    return -int(reply.removeprefix("errno="))


def state(side: Side) -> list[str]:
    return ask(side, "get=1\n\n").reply.decode().splitlines()


@pytest.mark.requirement("CFG-41", "CFG-51")
def test_get_prints_device_and_peer_in_fixed_order() -> None:
    side = one_side()
    preshared, endpoint = "preshared_key=" + "bb" * 32, "endpoint=10.0.0.7:5"
    interval = "persistent_keepalive_interval=25"
    prefixes = ["allowed_ip=10.0.0.0/8", "allowed_ip=fd00::/16"]
    assert apply(side, "fwmark=7", PEER, preshared, endpoint, interval, *prefixes) == 0
    assert side.device.identity is not None
    device = [f"private_key={side.device.identity.private.hex()}", "listen_port=1", "fwmark=7"]
    latest = ["last_handshake_time_sec=0", "last_handshake_time_nsec=0"]
    peer = [PEER, preshared, "protocol_version=1", endpoint, *latest, "tx_bytes=0", "rx_bytes=0", interval]
    assert state(side) == [*device, *peer, *prefixes, "errno=0", ""]


@pytest.mark.requirement("CFG-51", "CFG-15", "CFG-16")
def test_get_omits_settings_that_are_not_set() -> None:
    side = Pair(up=False).a
    side.device.remove_all_peers(0)
    assert apply(side, "private_key=" + "00" * 32, "listen_port=0", PEER) == 0
    assert "endpoint" not in "".join(state(side))
    assert state(side)[:3] == [PEER, "preshared_key=" + "00" * 32, "protocol_version=1"]


def test_get_splits_latest_handshake_into_sec_and_nsec() -> None:
    side = one_side()
    apply(side, PEER)
    side.peer.latest_handshake = 5 * SECOND + 7
    assert {"last_handshake_time_sec=5", "last_handshake_time_nsec=7"} <= set(state(side))


@pytest.mark.requirement("CFG-43", "CFG-47", "CFG-45")
@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("private_key=" + "11" * 32, 0),
        ("private_key=" + "11" * 31, errno.EINVAL),
        ("private_key=" + " " * 2 + "11" * 31, errno.EINVAL),
        ("private_key=" + "zz" * 32, errno.EINVAL),
        ("listen_port=65535", 0),
        ("listen_port=65536", errno.EINVAL),
        ("listen_port=-1", errno.EINVAL),
        ("listen_port=0x10", errno.EINVAL),
        ("listen_port=", errno.EINVAL),
        ("listen_port=\u0664", errno.EINVAL),
        ("listen_port=" + "9" * 5000, errno.EINVAL),
        ("fwmark=00000000000000000007", 0),
        ("fwmark=4294967295", 0),
        ("fwmark=4294967296", errno.EINVAL),
        ("replace_peers=true", 0),
        ("replace_peers=false", errno.EINVAL),
        ("tx_bytes=1", errno.EINVAL),
        ("nonsense=1", errno.EINVAL),
        ("preshared_key=" + KEY, errno.EINVAL),
        ("nokey", errno.EPROTO),
    ],
)
def test_device_lines_are_checked(line: str, number: int) -> None:
    assert apply(one_side(), line) == number


@pytest.mark.requirement("CFG-44", "CFG-49", "CFG-50")
@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("remove=true", 0),
        ("remove=yes", errno.EINVAL),
        ("update_only=true", 0),
        ("update_only=1", errno.EINVAL),
        ("preshared_key=" + KEY, 0),
        ("preshared_key=12", errno.EINVAL),
        ("endpoint=1.2.3.4:0", 0),
        ("endpoint=[::1]:77", 0),
        ("endpoint=[fe80::1%3]:77", 0),
        ("endpoint=[fe80::1%eth0]:77", 0),
        ("endpoint=[fe80::1%nope]:77", errno.EINVAL),
        ("endpoint=[fe80::1%4294967296]:77", errno.EINVAL),
        ("endpoint=[fe80::1%" + "9" * 5000 + "]:77", errno.EINVAL),
        ("endpoint=[fe80::1%]:77", errno.EINVAL),
        ("endpoint=host:1", errno.EINVAL),
        ("endpoint=[[::1]]:1", errno.EINVAL),
        ("endpoint=", errno.EINVAL),
        ("endpoint=1.2.3.4\0:1", errno.EINVAL),
        ("endpoint=010.0.0.1:1", errno.EINVAL),
        ("endpoint=::1:77", errno.EINVAL),
        ("endpoint=1.2.3.4", errno.EINVAL),
        ("endpoint=1.2.3.4%1:5", errno.EINVAL),
        ("endpoint=[1.2.3.4]:5", errno.EINVAL),
        ("persistent_keepalive_interval=65535", 0),
        ("persistent_keepalive_interval=65536", errno.EINVAL),
        ("persistent_keepalive_interval=off", errno.EINVAL),
        ("replace_allowed_ips=true", 0),
        ("replace_allowed_ips=0", errno.EINVAL),
        ("allowed_ip=10.1.2.3/8", 0),
        ("allowed_ip=+10.1.2.3/8", 0),
        ("allowed_ip=-10.1.2.3/8", 0),
        ("allowed_ip=10.1.2.3", errno.EINVAL),
        ("allowed_ip=10.1.2.3/33", errno.EINVAL),
        ("allowed_ip=::/129", errno.EINVAL),
        ("allowed_ip=fe80::1%3/64", errno.EINVAL),
        ("allowed_ip=nonsense/8", errno.EINVAL),
        ("allowed_ip=::\xff/8", errno.EINVAL),
        ("allowed_ip=\0/8", errno.EINVAL),
        ("protocol_version=1", 0),
        ("protocol_version=2", errno.EINVAL),
        ("listen_port=1", errno.EINVAL),
        ("rx_bytes=1", errno.EINVAL),
        ("public_key=12", errno.EINVAL),
    ],
)
def test_peer_lines_are_checked(line: str, number: int) -> None:
    assert apply(one_side(), PEER, line) == number


@pytest.mark.requirement("CFG-18", "CFG-52")
def test_set_stops_at_first_error_and_keeps_earlier_settings() -> None:
    side = one_side()
    lines = ["fwmark=7", PEER, "allowed_ip=10.0.0.0/8", "allowed_ip=bad", "public_key=" + "cc" * 32]
    assert apply(side, *lines) == errno.EINVAL
    assert (side.device.fwmark, [peer.public_key.hex() for peer in side.device.peers]) == (7, [KEY])


@pytest.mark.requirement("CFG-48", "CFG-46")
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("fwmark=7", b"errno=0\n\n"),
        ("fwmark=x", b"errno=-22\n\n"),
        ("nokey", b"errno=-71\n\n"),
        ("listen_port=7", b"errno=-98\n\n"),
    ],
)
def test_set_reply_has_negative_errno_on_error(line: str, reply: bytes) -> None:
    side = one_side()
    side.sockets.taken.add(7)
    assert ask(side, f"set=1\n{line}\n\n").reply == reply


@pytest.mark.requirement("CFG-19", "CFG-20")
def test_taken_port_is_refused_with_eaddrinuse() -> None:
    side = one_side()
    side.sockets.taken.add(7)
    assert apply(side, "listen_port=7", "fwmark=9") == errno.EADDRINUSE
    assert (side.device.listen_port, side.device.fwmark) == (1, 0)


@pytest.mark.requirement("CFG-13", "HS-33")
@pytest.mark.parametrize("line", ["remove=true", "update_only=true"])
def test_absent_peer_is_not_created_by_remove_or_update_only(line: str) -> None:
    side = one_side()
    rest = ["preshared_key=" + KEY, "endpoint=1.2.3.4:5", "allowed_ip=10.0.0.0/8", "replace_allowed_ips=true"]
    assert apply(side, PEER, line, *rest, "persistent_keepalive_interval=5", "remove=true") == 0
    assert list(side.device.peers) == []


@pytest.mark.requirement("HS-33")
def test_own_public_key_as_peer_is_ignored() -> None:
    side = one_side()
    assert apply(side, f"public_key={side.public_key.hex()}", "allowed_ip=10.0.0.0/8") == 0
    assert list(side.device.peers) == []


@pytest.mark.requirement("CFG-13")
def test_update_only_changes_existing_peer() -> None:
    side = one_side()
    assert apply(side, PEER, PEER, "update_only=true", "persistent_keepalive_interval=5") == 0
    assert side.peer.timers.persistent_keepalive_interval == 5


@pytest.mark.requirement("AIP-10", "AIP-11")
def test_allowed_ips_are_added_replaced_and_removed() -> None:
    side = one_side()
    apply(side, PEER, "allowed_ip=10.0.0.0/8", "allowed_ip=11.0.0.0/8")
    apply(side, PEER, "allowed_ip=-10.0.0.0/8", "allowed_ip=12.0.0.0/8")
    assert [str(prefix) for prefix in side.device.allowed_ips(side.peer)] == ["11.0.0.0/8", "12.0.0.0/8"]
    apply(side, PEER, "replace_allowed_ips=true", "allowed_ip=13.0.0.0/8")
    assert [str(prefix) for prefix in side.device.allowed_ips(side.peer)] == ["13.0.0.0/8"]


@pytest.mark.requirement("CFG-14")
def test_replace_peers_removes_all_earlier_peers() -> None:
    side = one_side()
    apply(side, PEER)
    apply(side, "replace_peers=true", "public_key=" + "cc" * 32)
    assert [peer.public_key.hex() for peer in side.device.peers] == ["cc" * 32]


@pytest.mark.requirement("TM-22", "HS-28")
def test_effects_are_returned_even_when_request_fails_later() -> None:
    lines = [PEER, "endpoint=1.2.3.4:5", "persistent_keepalive_interval=5", "allowed_ip=bad"]
    answer = ask(one_side(), "\n".join(("set=1", *lines, "", "")))
    assert len(answer.effects) == 1
    assert answer.reply == f"errno={-errno.EINVAL}\n\n".encode()


@pytest.mark.requirement("TM-22", "HS-28")
@pytest.mark.parametrize("before", [[], ["endpoint=1.2.3.4:4"]], ids=["new", "known"])
@pytest.mark.parametrize("order", [1, -1], ids=["endpoint-first", "interval-first"])
def test_enabled_keepalive_sends_one_initiation_to_new_endpoint(before: list[str], order: int) -> None:
    side = one_side()
    assert apply(side, PEER, *before) == 0
    lines = ["endpoint=1.2.3.4:5", "persistent_keepalive_interval=5"][::order]
    (effect,) = ask(side, "\n".join(("set=1", PEER, *lines, "", ""))).effects
    assert isinstance(effect, Transmit)
    assert (effect.datagram[0], effect.endpoint.port) == (MessageType.INITIATION, 5)


@pytest.mark.requirement("TM-22")
@pytest.mark.parametrize(("intervals", "sends"), [((0,), 0), ((5, 7), 1), ((5, 0), 0)])
def test_last_keepalive_interval_of_section_applies(intervals: tuple[int, ...], sends: int) -> None:
    lines = [f"persistent_keepalive_interval={interval}" for interval in intervals]
    answer = ask(one_side(), "\n".join(("set=1", PEER, "endpoint=1.2.3.4:5", *lines, "", "")))
    assert len(answer.effects) == sends


@pytest.mark.requirement("TM-22")
def test_enabled_keepalive_does_not_affect_next_peer() -> None:
    first = [PEER, "endpoint=1.2.3.4:5", "persistent_keepalive_interval=5"]
    second = ["public_key=" + "cc" * 32, "endpoint=1.2.3.4:6"]
    answer = ask(one_side(), "\n".join(("set=1", *first, *second, "", "")))
    assert [effect.endpoint.port for effect in answer.effects if isinstance(effect, Transmit)] == [5]


@pytest.mark.requirement("TM-22")
def test_section_takes_effect_once_when_next_key_is_malformed() -> None:
    lines = [PEER, "endpoint=1.2.3.4:5", "persistent_keepalive_interval=5", "public_key=12"]
    answer = ask(one_side(), "\n".join(("set=1", *lines, "", "")))
    assert len(answer.effects) == 1
    assert answer.reply == f"errno={-errno.EINVAL}\n\n".encode()


@pytest.mark.requirement("CFG-14")
@pytest.mark.parametrize("removal", [(), ("replace_peers=true",), (PEER, "remove=true")], ids=["none", "all", "one"])
def test_removed_peer_gets_no_initiation_from_same_request(removal: tuple[str, ...]) -> None:
    side = one_side()
    assert apply(side, "private_key=" + "00" * 32, PEER, "endpoint=1.2.3.4:5", "allowed_ip=10.0.0.0/8") == 0
    assert side.device.send_packet(ip_packet("10.0.0.1", "10.0.0.2"), 1420, 0) == []
    answer = ask(side, "\n".join(("set=1", "private_key=" + "11" * 32, *removal, "", "")))
    assert (len(answer.effects), answer.reply) == (0 if removal else 1, b"errno=0\n\n")


@pytest.mark.requirement("CFG-42", "CFG-53")
def test_consecutive_requests_are_parsed_byte_by_byte() -> None:
    side = one_side()
    conversation = Conversation(side.device, side.sockets)
    text = b"set=1\n\nset=1\nfwmark=3\n\nget=1\n\n"
    replies = b"".join(conversation.feed(bytes([byte]), 0).reply for byte in text)
    assert replies.startswith(b"errno=0\n\nerrno=0\n\nprivate_key=")
    assert replies.endswith(b"\nfwmark=3\nerrno=0\n\n")


@pytest.mark.requirement("CFG-53")
@pytest.mark.parametrize("text", ["get=2\n\n", "\n", "nonsense\n", "\xff\xfe\n", "x" * 5000])
def test_unknown_operation_closes_connection(text: str) -> None:
    answer = ask(one_side(), text)
    assert (answer.reply, answer.is_over) == (b"", True)


@pytest.mark.requirement("CFG-53", "CFG-45")
def test_overlong_line_is_refused_with_einval() -> None:
    answer = ask(one_side(), "set=1\nfwmark=7" + "7" * 5000)
    assert (answer.reply, answer.is_over) == (f"errno={-errno.EINVAL}\n\n".encode(), True)


@pytest.mark.parametrize(("text", "is_over"), [("get=1\nX", True), ("get=1\nX\n", False)])
def test_get_with_trailing_data_is_refused_with_einval(text: str, is_over: bool) -> None:
    answer = ask(one_side(), text)
    assert (answer.reply, answer.is_over) == (f"errno={-errno.EINVAL}\n\n".encode(), is_over)


@pytest.mark.requirement("CFG-55")
def test_unfinished_request_changes_nothing() -> None:
    side = one_side()
    assert ask(side, "set=1\nfwmark=7\n") == Answer()
    assert side.device.fwmark == 0


@pytest.mark.requirement("RT-18")
@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint(b"\x01\2\3\4", 5), "1.2.3.4:5"),
        (Endpoint(bytes(15) + b"\1", 5), "[::1]:5"),
        (Endpoint(b"\xfe\x80" + bytes(13) + b"\1", 5, 3), "[fe80::1%3]:5"),
    ],
)
def test_endpoint_is_written_and_parsed_in_wg_format(endpoint: Endpoint, text: str) -> None:
    assert format_endpoint(endpoint) == text
    side = one_side()
    assert apply(side, PEER, f"endpoint={text}") == 0
    assert side.peer.endpoint == endpoint
