"""Check the text of UAPI: each key, each refusal, framing (one interface of a program)."""

from __future__ import annotations

import errno
import re
import socket
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from harness import Endpoint, PeerState, allowed_ips, differs, twin
from harness.wait import Deadline
from selftests.support.uapi_requests import TIMEOUT, ask, exchange, is_refusal, named, program, status_of

if TYPE_CHECKING:
    from harness import Key, Lab, Manifest, ProgramInterface

GET: Final = b"get=1\n\n"
HEX_KEY: Final = "[0-9a-f]{64}"
NUMBER: Final = r"(0|[1-9][0-9]*)"
ADDRESS: Final = r"[0-9a-f.:]+"
# Keys of an answer to get, with the form of their values (https://www.wireguard.com/xplatform/).
DEVICE_KEYS: Final = {"private_key": HEX_KEY, "listen_port": NUMBER, "fwmark": NUMBER}
PEER_KEYS: Final = {
    "preshared_key": HEX_KEY,
    "protocol_version": "1",
    "endpoint": rf"([0-9.]+|\[{ADDRESS}(%[^\]]+)?\]):{NUMBER}",
    "last_handshake_time_sec": NUMBER,
    "last_handshake_time_nsec": NUMBER,
    "tx_bytes": NUMBER,
    "rx_bytes": NUMBER,
    "persistent_keepalive_interval": NUMBER,
    "allowed_ip": rf"{ADDRESS}/{NUMBER}",
}
ZERO: Final = "0" * 64
READ_ONLY: Final = ("tx_bytes", "rx_bytes", "last_handshake_time_sec", "last_handshake_time_nsec")


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> ProgramInterface:
    return program(lab, implementation)


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


@pytest.fixture
def bob(lab: Lab) -> Key:
    return lab.key("bob").public()


def peer(key: Key) -> str:
    return f"public_key={key.raw.hex()}"


def peers(wg0: ProgramInterface) -> dict[Key, PeerState]:
    return {state.public_key: state for state in wg0.get().peers}


def must_accept(wg0: ProgramInterface, *lines: str) -> None:
    with twin(f"{lines[-1]} is accepted"):
        status = ask(wg0, *lines)
        assert status == 0, f"refused {lines[-1]}: {named(status)}"


def must_refuse(wg0: ProgramInterface, *lines: str) -> None:
    """Check that the last of the lines is refused with EINVAL."""
    status = ask(wg0, *lines)
    assert is_refusal(status), f"{lines[-1]!r}: {named(status)}, not EINVAL"


# Answers to get


@pytest.mark.requirement("CFG-41")
def test_get_answers_lines_and_ends_with_errno_0(wg0: ProgramInterface, alice: Key) -> None:
    must_accept(wg0, "listen_port=7", peer(alice))
    answer = exchange(wg0, GET).decode()
    *lines, status, empty, end = answer.split("\n")
    assert (status, empty, end) == ("errno=0", "", ""), f"the answer ends in {answer[-30:]!r}"
    assert {"listen_port=7", peer(alice)} <= {*lines}, f"the answer lacks what was set: {lines}"
    wrong = [line for line in lines if not re.fullmatch(r"[a-z_]+=.+", line)]
    assert not wrong, f"lines that are not KEY=VALUE: {wrong}"


@pytest.mark.requirement("CFG-51")
def test_get_lists_device_keys_only_when_not_zero(lab: Lab, wg0: ProgramInterface) -> None:
    must_accept(wg0, "listen_port=51820", "fwmark=4294967295")
    shown = device_lines(wg0)
    wanted = {"private_key": lab.key("own").raw.hex(), "listen_port": "51820", "fwmark": "4294967295"}
    assert {key: shown.get(key) for key in wanted} == wanted
    must_accept(wg0, f"private_key={ZERO}", "fwmark=0")
    zero = {key: value for key, value in device_lines(wg0).items() if key in {"private_key", "fwmark"}}
    assert not zero, f"get lists what is not set: {zero}"


def device_lines(wg0: ProgramInterface) -> dict[str, str]:
    """Return the lines of get before the first peer; check the form of those that the protocol defines."""
    lines = exchange(wg0, GET).decode().partition("public_key=")[0].split("\n")
    shown = dict(line.split("=", 1) for line in lines if "=" in line)
    wrong = {k: v for k, v in shown.items() if k in DEVICE_KEYS and not re.fullmatch(DEVICE_KEYS[k], v)}
    assert not wrong, f"values in another form: {wrong}"
    return shown


@pytest.mark.requirement("CFG-51", "CFG-44")
def test_get_lists_each_peer_under_its_public_key(lab: Lab, wg0: ProgramInterface, alice: Key, bob: Key) -> None:
    psk = lab.key("psk").raw.hex()
    of_alice = [f"preshared_key={psk}", "endpoint=[fd00::9]:99", "allowed_ip=10.0.0.0/8", "allowed_ip=fd00:a::/64"]
    of_bob = ["endpoint=10.1.2.3:0", "persistent_keepalive_interval=65535"]
    must_accept(wg0, peer(alice), *of_alice, peer(bob), *of_bob)
    sections = exchange(wg0, GET).decode().partition("errno=")[0].split("public_key=")[1:]
    shown = {key: [*filter(None, lines)] for key, *lines in (section.split("\n") for section in sections[-2:])}
    assert shown.keys() == {alice.raw.hex(), bob.raw.hex()}
    missing = [*({*of_alice} - {*shown[alice.raw.hex()]}), *({*of_bob} - {*shown[bob.raw.hex()]})]
    assert not missing, f"get does not list what was set: {missing}"
    wrong = [line for lines in shown.values() for line in lines if not is_defined(line)]
    assert not wrong, f"lines in another form, or of an unknown key: {wrong}"


def is_defined(line: str) -> bool:
    key, _, value = line.partition("=")
    return key in PEER_KEYS and bool(re.fullmatch(PEER_KEYS[key], value))


# Keys of set


class Row(NamedTuple):
    """A key, a value that is accepted, and one that is refused."""

    key: str
    good: str
    bad: str


@pytest.mark.requirement("CFG-42", "CFG-43")
@pytest.mark.parametrize("line", ["", "listen_port=65535", "listen_port=7", "fwmark=4294967295", "fwmark=7"])
def test_set_applies_device_key_and_answers_errno_0(wg0: ProgramInterface, line: str) -> None:
    before = exchange(wg0, GET)
    answer = exchange(wg0, f"set=1\n{line}{chr(10) * bool(line)}\n".encode())
    assert answer == b"errno=0\n\n", f"{line or 'an empty set'} is answered by {answer!r}"
    if line:
        assert line in exchange(wg0, GET).decode().split("\n")
    else:
        assert exchange(wg0, GET) == before, "an empty set changed the device"


@pytest.mark.requirement("CFG-43")
@pytest.mark.parametrize(
    "row",
    [
        *[Row("listen_port", "7777", bad) for bad in ("65536", "-1", "0x10", "7777x", "")],
        *[Row("fwmark", "7", bad) for bad in ("4294967296", "-1", "0x7", "off", "")],
        *[Row("private_key", "40" * 32, bad) for bad in ("4" * 63, "4" * 65, "4" * 66, "z" * 64, "")],
    ],
    ids=lambda row: f"{row.key}-{(row.bad if len(row.bad) < 12 else f'{len(row.bad)}{row.bad[0]}') or 'empty'}",
)
def test_device_key_with_bad_value_is_refused(wg0: ProgramInterface, row: Row) -> None:
    must_accept(wg0, f"{row.key}={row.good}")
    before = exchange(wg0, GET)
    must_refuse(wg0, f"{row.key}={row.bad}")
    assert exchange(wg0, GET) == before, f"{row.key}={row.bad} was refused, and changed the device"


@pytest.mark.requirement("CFG-44")
@pytest.mark.capability("update-peer")
def test_peer_keys_change_existing_peer(lab: Lab, wg0: ProgramInterface, alice: Key) -> None:
    psk = lab.key("psk")
    must_accept(wg0, peer(alice), "allowed_ip=10.0.0.0/8", "endpoint=10.0.0.1:1", "protocol_version=1")
    must_accept(wg0, peer(alice), f"preshared_key={psk.raw.hex()}", "persistent_keepalive_interval=11",
                "endpoint=[fd00::9]:99", "replace_allowed_ips=true", "allowed_ip=10.7.0.0/16")  # fmt: skip
    assert peers(wg0)[alice] == PeerState(
        public_key=alice,
        preshared_key=psk,
        endpoint=Endpoint("fd00::9", 99),
        persistent_keepalive=11,
        allowed_ips=allowed_ips("10.7.0.0/16"),
        tx_bytes=peers(wg0)[alice].tx_bytes,
    )
    must_accept(wg0, peer(alice), "remove=true")
    assert peers(wg0) == {}, "the peer is there after remove=true"


@pytest.mark.requirement("CFG-44")
@pytest.mark.parametrize("flag", ["remove=true", "replace_allowed_ips=true"])
def test_each_public_key_starts_next_peer(wg0: ProgramInterface, alice: Key, bob: Key, flag: str) -> None:
    of_alice = [peer(alice), flag, "persistent_keepalive_interval=9", "allowed_ip=10.1.0.0/16"]
    must_accept(wg0, *of_alice, peer(bob), "allowed_ip=10.2.0.0/16", "persistent_keepalive_interval=7")
    assert peers(wg0).get(bob) == PeerState(
        public_key=bob, allowed_ips=allowed_ips("10.2.0.0/16"), persistent_keepalive=7
    ), f"the peer behind one with {flag} is {peers(wg0).get(bob)}"


# For each key: the requirement, a good value, and the bad ones by name.
PEER_ROWS = {
    "preshared_key": (
        pytest.mark.requirement("CFG-44"),
        "40" * 32,
        {"63-digits": "4" * 63, "66-digits": "4" * 66, "letters": "z" * 64, "empty": ""},
    ),
    "persistent_keepalive_interval": (
        pytest.mark.requirement("CFG-44"),
        "65535",
        {"65536": "65536", "negative": "-1", "hexadecimal": "0x10", "word": "off", "empty": ""},
    ),
    "protocol_version": (pytest.mark.requirement("CFG-44"), "1", {"0": "0", "2": "2", "empty": ""}),
    "endpoint": (
        pytest.mark.requirement("CFG-49"),
        "1.2.3.4:65535",
        {
            "host": "localhost:1",
            "no-port": "1.2.3.4",
            "empty-port": "1.2.3.4:",
            "65536": "1.2.3.4:65536",
            "bare-v6": "::1:77",
            "v6-no-port": "[::1]",
            "v4-in-brackets": "[1.2.3.4]:1",
            "three-octets": "1.2.3:4",
            "empty": "",
        },
    ),
    "allowed_ip": (
        pytest.mark.requirement("CFG-50"),
        "10.0.0.0/8",
        {
            "no-length": "10.1.2.3",
            "empty-length": "10.1.2.3/",
            "v4-33": "10.1.2.3/33",
            "v6-129": "fd00::/129",
            "negative": "10.0.0.0/-1",
            "netmask": "10.0.0.0/255.0.0.0",
            "name": "localhost/8",
            "empty": "",
        },
    ),
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row(key, good, bad), marks=mark, id=f"{key}-{name}")
        for key, (mark, good, values) in PEER_ROWS.items()
        for name, bad in values.items()
    ],
)
def test_peer_key_with_bad_value_is_refused(wg0: ProgramInterface, alice: Key, bob: Key, row: Row) -> None:
    must_accept(wg0, peer(alice), f"{row.key}={row.good}")
    before = peers(wg0)
    must_refuse(wg0, peer(bob), f"{row.key}={row.bad}")
    after = peers(wg0)
    # The peer itself may exist: lines before the refused one stay applied.
    kept = after.pop(bob, PeerState(public_key=bob))
    assert kept == PeerState(public_key=bob), f"{row.key}={row.bad} was refused, and applied"
    assert after == before


@pytest.mark.requirement("CFG-49")
@pytest.mark.parametrize(
    "text",
    ["1.2.3.4:0", "[::1]:77", "[fd00::9]:65535", "255.255.255.255:1"],
    ids=["v4-port-0", "v6", "v6-65535", "v4-broadcast"],
)
def test_literal_endpoint_is_kept(wg0: ProgramInterface, alice: Key, text: str) -> None:
    must_accept(wg0, peer(alice), f"endpoint={text}")
    assert str(peers(wg0)[alice].endpoint) == text


@pytest.mark.requirement("CFG-50", "AIP-05")
@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("192.168.4.77/24", "192.168.4.0/24"),
        ("1.2.3.4/0", "0.0.0.0/0"),
        ("255.255.255.255/31", "255.255.255.254/31"),
        ("2001:db8::ffff/32", "2001:db8::/32"),
        ("ffff::1/1", "8000::/1"),
        ("fd00::1/127", "fd00::/127"),
        ("fd00::1/128", "fd00::1/128"),
    ],
    ids=["8", "24", "v4-0", "31", "v6-32", "v6-1", "v6-127", "v6-128"],
)
def test_allowed_ip_is_kept_without_host_bits(wg0: ProgramInterface, alice: Key, text: str, stored: str) -> None:
    must_accept(wg0, peer(alice), f"allowed_ip={text}")
    lines = [line for line in exchange(wg0, GET).decode().split("\n") if line.startswith("allowed_ip=")]
    assert lines == [f"allowed_ip={stored}"], f"allowed_ip={text} is read back as {lines}"


@pytest.mark.requirement("CFG-45")
@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        pytest.param([], "foo=1", id="unknown"),
        pytest.param([], "errno=0", id="errno"),
        pytest.param([], "=1", id="nameless"),
        pytest.param([], "allowed_ip=10.0.0.0/8", id="allowed-ip-first"),
        pytest.param([], "persistent_keepalive_interval=7", id="keepalive-first"),
        pytest.param(["PEER"], "foo=1", id="unknown-of-peer"),
        pytest.param(["PEER"], "listen_port=7", id="port-of-peer"),
        pytest.param(["PEER"], "fwmark=7", id="mark-of-peer"),
        pytest.param(["PEER"], f"private_key={ZERO}", id="private-key-of-peer"),
        pytest.param(["PEER"], "replace_peers=true", id="replace-peers-of-peer"),
        *[pytest.param(["PEER"], f"{key}=1", id=key) for key in READ_ONLY],
    ],
)
def test_unknown_or_misplaced_key_is_refused(wg0: ProgramInterface, alice: Key, lines: list[str], bad: str) -> None:
    above = [peer(alice) for _ in lines]
    with twin("the same request without this line is accepted"):
        assert ask(wg0, *above) == 0
        assert ask(wg0, *above, "remove=true") == 0 if above else True
    must_refuse(wg0, *above, bad)


@pytest.mark.requirement("CFG-47")
@pytest.mark.parametrize("value", ["false", "yes", "1", "TRUE", ""], ids=lambda value: value or "empty")
@pytest.mark.parametrize(
    "flag",
    [
        "replace_peers",
        "remove",
        pytest.param("update_only", marks=pytest.mark.capability("update-peer")),
        "replace_allowed_ips",
    ],
)
def test_flag_takes_no_value_but_true(lab: Lab, wg0: ProgramInterface, alice: Key, flag: str, value: str) -> None:
    carol, bob = ([] if flag == "replace_peers" else [peer(lab.key(name).public())] for name in ("carol", "bob"))
    if flag == "update_only":
        assert ask(wg0, *carol) == 0
    must_accept(wg0, *carol, f"{flag}=true")
    must_accept(wg0, peer(alice), "allowed_ip=10.0.0.0/8")
    must_refuse(wg0, *bob, f"{flag}={value}")
    assert peers(wg0).get(alice) == PeerState(public_key=alice, allowed_ips=allowed_ips("10.0.0.0/8"))


# Order, errno values


@pytest.mark.requirement("CFG-52")
def test_lines_take_effect_in_order_up_to_refused_one(wg0: ProgramInterface, alice: Key, bob: Key) -> None:
    ask(wg0, "fwmark=1", "fwmark=7", peer(alice), "allowed_ip=10.0.0.0/8", "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.9.0.0/16", peer(bob))  # fmt: skip
    state = wg0.get()
    kept = {key: [*map(str, found.allowed_ips)] for key, found in peers(wg0).items()}
    if (state.fwmark, kept) != (7, {alice: ["10.0.0.0/8"]}):
        differs(
            f"after a refused line: fwmark {state.fwmark}, peers with allowed ips {[*kept.values()]}",
            by=[wg0.manifest.name],
        )


@pytest.mark.requirement("CFG-48")
@pytest.mark.parametrize(
    ("line", "number"), [("fwmark=x", errno.EINVAL), ("nokey", errno.EPROTO), ("listen_port=9", errno.EADDRINUSE)]
)
def test_errno_is_negative_and_names_reason(wg0: ProgramInterface, line: str, number: int) -> None:
    wg0.up()
    with wg0.birth.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 9))
        status = ask(wg0, line)
    assert status != 0, f"{line}: accepted"
    if status != -number:
        differs(f"{line}: {named(status)}, not errno={-number}", by=[wg0.manifest.name])


# Framing


def converse(connection: socket.socket, request: bytes) -> bytes:
    """Send a request on an open connection; return what comes up to an empty line, the end, or the time limit."""
    deadline, answer = Deadline(TIMEOUT), b""
    connection.sendall(request)
    while not answer.endswith(b"\n\n"):
        deadline.limit(connection)
        data = connection.recv(1 << 16)
        if not data:
            break
        answer += data
    return answer


@pytest.mark.requirement("CFG-53")
@pytest.mark.bug("IB-65")
def test_requests_on_one_connection_are_answered_in_turn(wg0: ProgramInterface) -> None:
    requests = (GET, b"set=1\nlisten_port=77\n\n", GET, b"set=1\nfoo=1\n\n", GET)
    statuses = []
    with wg0.connect() as connection:
        for request in requests:
            try:
                statuses.append(status_of(converse(connection, request)))
            except ConnectionError:
                statuses.append(None)
    assert statuses[0] == 0
    if statuses[:3] != [0, 0, 0] or not is_refusal(statuses[3]) or statuses[4] != 0:
        differs(
            f"five requests on one connection are answered with errno {statuses}; None: without an answer",
            by=[wg0.manifest.name],
        )


@pytest.mark.requirement("CFG-42")
@pytest.mark.bug("IB-65")
def test_request_in_pieces_is_answered_once_complete(wg0: ProgramInterface) -> None:
    with wg0.connect() as connection:
        *pieces, last = (bytes([octet]) for octet in b"set=1\nlisten_port=77\n\n")
        for piece in pieces:
            connection.sendall(piece)
        answer = converse(connection, last)
    assert answer == b"errno=0\n\n", f"a request sent byte by byte is answered by {answer!r}"
    assert wg0.get().listen_port == 77


@pytest.mark.requirement("CFG-53")
@pytest.mark.bug("IB-65")
def test_requests_in_one_write_are_answered_in_turn(wg0: ProgramInterface) -> None:
    setting = b"set=1\nlisten_port=77\n\n"
    with wg0.connect() as connection:
        answer = converse(connection, setting + GET + setting + GET)
        # No event says that no more answers come: shut the sending side, and read up to the end of the connection.
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(1 << 16):
            answer += data
    assert answer.startswith(b"errno=0\n\n"), f"the first of four requests is answered by {answer[:30]!r}"
    if (answered := answer.count(b"errno=0\n\n")) != 4:
        differs(f"of set, get, set, get in one write {answered} are answered", by=[wg0.manifest.name])


@pytest.mark.requirement("CFG-53")
@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        pytest.param(b"get=2\n\n", b"", id="get-2"),
        pytest.param(b"set=2\n\n", b"", id="set-2"),
        pytest.param(b"hello\n\n", b"", id="unknown"),
        pytest.param(b"get=1\nX\n\n", b"errno=-22\n\n", id="get-with-line"),
    ],
)
def test_unknown_operation_ends_connection(wg0: ProgramInterface, request_: bytes, wanted: bytes) -> None:
    with wg0.connect() as connection:
        answer = converse(connection, request_)
    if answer != wanted:
        differs(f"{request_!r} is answered by {answer[-30:]!r}, not by {wanted!r}", by=[wg0.manifest.name])


@pytest.mark.requirement("CFG-45")
@pytest.mark.bug("IB-65")
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"set=1\nfoo=" + b"x" * (1 << 20) + b"\n\n", id="line-of-1-mib"),
        pytest.param(b"set=1\nlisten_po", id="half-line"),
        pytest.param(b"set=1\r\nlisten_port=7\r\n\r\n", id="crlf"),
        pytest.param(b"set=1\nnokey\n\n", id="without-equals-sign"),
        pytest.param(b"set=1\n\0=\xff\n\n", id="binary"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\n", id="empty-line"),
    ],
)
def test_next_connection_is_answered_after_bad_input(wg0: ProgramInterface, request_: bytes) -> None:
    with wg0.connect() as connection:
        connection.settimeout(TIMEOUT)
        try:
            connection.sendall(request_)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass  # it may refuse and close before it has read everything
    answer = exchange(wg0, GET)
    assert status_of(answer) == 0, f"after {request_[:20]!r} a get is answered by {answer!r}"
