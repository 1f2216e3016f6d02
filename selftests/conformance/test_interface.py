"""Check what an interface starts with, keeps and loses, and what it counts."""

from __future__ import annotations

import errno
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    INITIATION,
    V4_OF_A,
    V4_OF_B,
    ZERO_KEY,
    Capture,
    Datagram,
    DeviceConfig,
    Endpoint,
    Key,
    PeerConfig,
    ProgramInterface,
    Unsupported,
    allowed_ips,
    differs,
    let_pass,
    poll_until,
    twin,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.control.genl import GenlControl
from harness.implementations.interface import genetlink
from selftests.support.packets import ip_packet

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest, NetNS, PeerState, Tunnel
    from harness.control.base import Control

PORT: Final = 1111
PORT_OF_A, PORT_OF_B = 1, 2
NOBODY: Final = "65534"
PEER_KEYS: Final = ("endpoint", "persistent_keepalive", "allowed_ips", "preshared_key")
# An address of B that is not among its allowed ips.
FOREIGN: Final = "192.168.241.9"
# Seconds: counters are read a moment after the packet.
SOON: Final = 2.0
# Seconds, more than the 20 ms within which a peer refuses a second initiation, measured at the peer.
TOO_EARLY: Final = 0.05


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest) -> Interface:
    return lab.interface("wg0", implementation, lab.node("ns0"))


@pytest.fixture
def alice(lab: Lab) -> Key:
    return lab.key("alice").public()


# Configuration of one interface


@pytest.mark.requirement("IF-03")
def test_new_interface_has_no_key_no_peer_and_no_mark(wg0: Interface) -> None:
    must_be_empty(wg0)
    assert wg0.wg("show", "wg0", "peers").stdout == ""
    assert wg0.wg("show", "wg0", "fwmark").stdout == "off\n"
    if wg0.manifest.kind == "kernel":
        assert wg0.get().listen_port == 0, "the kernel has a listen port before the first up"


def must_be_empty(wg0: Interface) -> None:
    state = wg0.get()
    found = {"private key": state.private_key, "public key": state.public_key, "peers": state.peers}
    kept = {name: value for name, value in {**found, "fwmark": state.fwmark}.items() if value}
    assert not kept, f"a new interface has {kept}"


@pytest.mark.requirement("CFG-44")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize("key", [*PEER_KEYS, "nothing"])
def test_set_of_one_peer_key_keeps_all_others(lab: Lab, wg0: Interface, alice: Key, key: str) -> None:
    first, other = (
        PeerConfig(
            public_key=alice,
            endpoint=Endpoint(f"192.0.2.{number}", number),
            persistent_keepalive=70 + number,
            allowed_ips=allowed_ips(f"198.51.100.{number}/32"),
            preshared_key=lab.key(f"shared {number}"),
        )
        for number in (1, 2)
    )
    wg0.set(DeviceConfig(private_key=lab.key("own"), listen_port=PORT, peers=(first,)))
    before = wg0.get()
    change = PeerConfig(public_key=alice)
    if key != "nothing":
        change = replace(change, **{key: getattr(other, key)})
    wg0.set(DeviceConfig(peers=(change,)))
    now = wg0.get()
    ((old,), (peer,)) = before.peers, now.peers
    lost = [name for name in PEER_KEYS if name != key and getattr(peer, name) != getattr(old, name)]
    assert not lost, f"a set of the peer's {key} changed its {', '.join(lost)}"
    assert key == "nothing" or getattr(peer, key) != getattr(old, key), f"the peer's {key} was not set"
    assert replace(now, peers=()) == replace(before, peers=()), f"a set of the peer's {key} changed the interface"


@pytest.mark.requirement("CFG-15")
def test_cleared_private_key_is_not_reported(lab: Lab, wg0: Interface) -> None:
    with twin("a private key is reported, or its public key is"):
        wg0.set(DeviceConfig(private_key=lab.key("own")))
        state = wg0.get()
        assert lab.key("own").public() in {state.public_key, state.private_key and state.private_key.public()}
    wg0.set(DeviceConfig(private_key=ZERO_KEY))
    state = wg0.get()
    assert (state.private_key, state.public_key) == (None, None), f"a cleared identity is reported: {state}"


@pytest.mark.requirement("CFG-31")
@pytest.mark.capability("fwmark")
@pytest.mark.parametrize("mark", [0xFFFFFFFF, 0x80000000, 0x10000, 7], ids=hex)
def test_fwmark_keeps_its_32_bits_until_cleared(wg0: Interface, mark: int) -> None:
    wg0.set(DeviceConfig(fwmark=mark))
    assert wg0.get().fwmark == mark
    wg0.set(DeviceConfig(fwmark=0))
    assert (wg0.get().fwmark, wg0.wg("show", "wg0", "fwmark").stdout) == (0, "off\n"), "fwmark 0 does not turn it off"


@pytest.mark.requirement("CFG-44")
@pytest.mark.bug("IB-80")
@pytest.mark.parametrize("seconds", [1, 255, 256, 257, 32768, 65535])
def test_keepalive_interval_is_kept_in_seconds(lab: Lab, wg0: Interface, alice: Key, seconds: int) -> None:
    bob = lab.key("bob").public()
    # Some programs take no peer before a private key.
    wg0.set(DeviceConfig(private_key=lab.key("own")))
    wg0.set_peer(alice, persistent_keepalive=seconds)
    wg0.wg("set", "wg0", "peer", str(bob), "persistent-keepalive", str(seconds))
    typed = {key: wg0.peer(key).persistent_keepalive for key in (alice, bob)}
    lines = wg0.wg("show", "wg0", "persistent-keepalive").stdout.splitlines()
    shown = {Key.parse(key): text for key, text in map(str.split, lines)}
    assert typed == {alice: seconds, bob: seconds}, f"{seconds} s set, {sorted(typed.values())} s read"
    assert shown == {alice: str(seconds), bob: str(seconds)}, f"{seconds} s set, wg shows {sorted(shown.values())}"


@pytest.mark.requirement("CFG-40")
def test_control_socket_is_closed_to_other_users(wg0: Interface) -> None:
    if not isinstance(wg0, ProgramInterface):
        raise Unsupported("the kernel has no control socket")
    show = ["nsenter", f"--mount={wg0.mounts}", "--"]
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    with twin("its owner connects"):
        assert wg0.birth.run([*show, "wg", "show", "wg0", "fwmark"]).stdout == "off\n"
    answer = wg0.birth.run([*show, *as_nobody, "wg", "show", "wg0", "fwmark"], check=False)
    if (answer.status, answer.stderr) != (1, "Unable to access interface: Permission denied\n"):
        differs(
            f"another user runs wg show: status {answer.status}, {answer.stdout or answer.stderr!r}",
            by=[wg0.manifest.name],
        )


@pytest.mark.requirement("IF-10")
def test_link_gets_no_ipv6_address_and_sends_no_redirects(wg0: Interface) -> None:
    # The lab sets addr_gen_mode to none for all; 0 is the default of every other link.
    wg0.place.sysctl("net.ipv6.conf.wg0.addr_gen_mode", 0)
    # The change of the mode made one, even though the link is down.
    wg0.place.run(["ip", "-6", "address", "flush", "dev", "wg0"])
    # The driver sets the mode when the link goes up. A program cannot do so before the kernel looks at it; it may do
    # so when it is told of this change.
    poll_until(lambda: wg0.place.sysctl("net.ipv6.conf.wg0.addr_gen_mode").strip(), lambda mode: mode != "0", 0.5)
    before = redirects(wg0)
    wg0.up()
    found = [address["local"] for address in ipv6_addresses(wg0.place)]
    if found or "1" in redirects(wg0):
        differs(
            f"IPv6 addresses {found}; send_redirects of wg0, all: {redirects(wg0)}, before {before}",
            by=[wg0.manifest.name],
        )


def redirects(wg0: Interface) -> list[str]:
    return [wg0.place.sysctl(f"net.ipv4.conf.{name}.send_redirects").strip() for name in ("wg0", "all")]


def ipv6_addresses(node: NetNS) -> list[dict[str, str]]:
    """Return the IPv6 addresses of wg0 once the kernel has had the time to make one."""

    def read() -> list[dict[str, str]]:
        links = node.run_json(["ip", "-j", "-6", "address", "show", "wg0"])
        return [address for link in links for address in link.get("addr_info", [])]

    return poll_until(read, bool, 0.2)


WRITERS, READERS, ROUNDS = 4, 4, 25


@pytest.mark.requirement("CFG-55")
def test_concurrent_requests_are_applied_one_by_one(lab: Lab, wg0: Interface) -> None:
    wg0.set(DeviceConfig(private_key=lab.key("own")))
    keys = [lab.key(f"peer{number}").public() for number in range(WRITERS)]
    written = threading.Event()
    with ThreadPoolExecutor(WRITERS + READERS) as pool:
        readers = [pool.submit(read_until, client(lab, wg0), keys, written) for _ in range(READERS)]
        writers = [pool.submit(write, client(lab, wg0), wg0.manifest, key, n) for n, key in enumerate(keys)]
        failures = [writer.exception() for writer in writers]
        written.set()
        failures = [*filter(None, [*failures, *(reader.exception() for reader in readers)])]
    assert not failures, f"{len(failures)} of {WRITERS + READERS} clients failed: {failures[0]}"
    mixed = [peer for reader in readers for peer in reader.result()]
    assert not mixed, f"a peer with settings of two requests: {mixed[0]}"
    last = {peer.public_key: peer.persistent_keepalive for peer in wg0.get().peers}
    assert last == dict.fromkeys(keys, ROUNDS), f"after {ROUNDS} requests for each peer: {sorted(last.values())}"


def client(lab: Lab, wg0: Interface) -> Control:
    """Return a control of its own for a thread: a netlink socket has one request at a time."""
    if wg0.manifest.kind != "kernel":
        return wg0.control
    sock = genetlink(wg0.place)
    lab.undo(sock.close)
    return GenlControl(sock).interface("wg0")


def write(control: Control, manifest: Manifest, key: Key, number: int) -> None:
    """Change all settings of a peer again and again."""
    for turn in range(1, ROUNDS + 1):
        if "update-peer" not in manifest.capabilities:
            control.set(DeviceConfig(peers=(PeerConfig(public_key=key, remove=True),)))
        control.set(DeviceConfig(peers=(whole_entry(key, number, turn),)))


def read_until(control: Control, keys: list[Key], written: threading.Event) -> list[PeerState]:
    """Read the device again and again; return the peers with settings of several requests."""
    mixed: list[PeerState] = []
    while not written.is_set():
        mixed += [peer for peer in control.get().peers if not is_whole(peer, keys)]
    return mixed


def whole_entry(key: Key, number: int, turn: int) -> PeerConfig:
    """Return all settings of a peer, each of which names the turn."""
    return PeerConfig(
        public_key=key,
        preshared_key=Key(bytes([turn]) * 32),
        endpoint=Endpoint("127.0.0.1", turn),
        replace_allowed_ips=True,
        allowed_ips=allowed_ips(f"10.{number}.{turn}.0/24", f"fd00:{number}:{turn}::/64"),
        persistent_keepalive=turn,
    )


def is_whole(peer: PeerState, keys: list[Key]) -> bool:
    number, turn = keys.index(peer.public_key), peer.persistent_keepalive
    prefixes = {*allowed_ips(f"10.{number}.{turn}.0/24", f"fd00:{number}:{turn}::/64")}
    kept = (peer.preshared_key, peer.endpoint and peer.endpoint.port, {*peer.allowed_ips})
    return kept == (Key(bytes([turn]) * 32), turn, prefixes)


# Sessions


@pytest.mark.requirement("CFG-14")
def test_replaced_peers_lose_sessions_and_counters(loopback: Tunnel) -> None:
    a, ns1, ns2 = loopback.a, loopback.nodes["ns1"], loopback.nodes["ns2"]
    stranger = loopback.lab.key("stranger").public()
    a.set(DeviceConfig(peers=(PeerConfig(public_key=stranger),)))
    with udp_receiver(ns1, V4_OF_A, PORT) as receiver, Capture(loopback.nodes["ns0"], "lo") as wire:
        with twin("data of B is delivered on the session"):
            loopback.must_ping("ns1", V4_OF_B)
            udp_message(ns2, V4_OF_A, PORT, b"before")
            assert wait_for(Datagram(receiver), 5.0, "a datagram")[0] == b"before"
        let_pass(TOO_EARLY, "B refuses an initiation that follows another too closely (HS-12)")
        number = len(wire.messages(port=PORT_OF_A))
        b = PeerConfig(
            public_key=loopback.pub_b,
            preshared_key=loopback.psk,
            endpoint=Endpoint("127.0.0.1", PORT_OF_B),
            allowed_ips=allowed_ips(f"{V4_OF_B}/32"),
        )
        a.set(DeviceConfig(replace_peers=True, peers=(b,)))
        peers = a.get().peers
        udp_message(ns2, V4_OF_A, PORT, b"on the old session")
        await_data_from(wire, PORT_OF_B, bytes_inside=len(b"on the old session"))
        loopback.must_ping("ns1", V4_OF_B)
        udp_message(ns2, V4_OF_A, PORT, b"after")
        data, _ = wait_for(Datagram(receiver), 5.0, "a datagram on the new session")
        first = [message.kind for message in wire.messages(port=PORT_OF_A)[number:]][:1]
    assert [peer.public_key for peer in peers] == [loopback.pub_b], f"after the replacement it has {len(peers)} peers"
    assert (peers[0].latest_handshake, peers[0].rx_bytes) == (0, 0), f"the re-added peer is not new: {peers[0]}"
    assert data == b"after", f"data for the session of a replaced peer was delivered: {data!r}"
    assert first == [INITIATION], f"its first message after the replacement is of type {first}, not an initiation"


def await_data_from(wire: Capture, port: int, *, bytes_inside: int) -> None:
    """Wait until a data message of this inner UDP length was sent."""
    length = 32 + -(-(28 + bytes_inside) // 16) * 16
    wire.wait_for(
        lambda message: message.payload[0] == 4 and len(message.payload) in {length, 32 + 28 + bytes_inside},
        5.0,
        f"a data message of {length} bytes from port {port}",
    )


@pytest.mark.requirement("IF-07", "DT-34")
def test_down_ends_sessions_and_up_may_initiate_at_once(loopback: Tunnel) -> None:
    a, ns1, ns2 = loopback.a, loopback.nodes["ns1"], loopback.nodes["ns2"]
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        loopback.must_ping("ns1", V4_OF_B)
        let_pass(TOO_EARLY, "B refuses an initiation that follows another too closely (HS-12)")
        ns1.set_link("wg0", up=False)
        a.up()
        with udp_receiver(ns1, V4_OF_A, PORT) as receiver:
            number = len(wire.messages(port=PORT_OF_A))
            udp_message(ns2, V4_OF_A, PORT, b"on the old session")
            await_data_from(wire, PORT_OF_B, bytes_inside=len(b"on the old session"))
            udp_message(ns1, V4_OF_B, PORT, b"initiate")
            wire.wait_for(lambda message: message in wire.messages(port=PORT_OF_A)[number:], 5.0, "a message of A")
            first = wire.messages(port=PORT_OF_A)[number].kind
            # The answer shows that both use the new session.
            loopback.must_ping("ns1", V4_OF_B)
            udp_message(ns2, V4_OF_A, PORT, b"after")
            data, _ = wait_for(Datagram(receiver), 5.0, "a datagram after up")
    if (data, first) != (b"after", INITIATION):
        kept = "is delivered" if data != b"after" else "is dropped"
        differs(
            f"after down and up data of the old session {kept}; A's first message has type {first}",
            by=[a.manifest.name],
        )


@pytest.mark.requirement("IF-16")
def test_deleted_interface_frees_port_and_new_one_is_empty(loopback: Tunnel) -> None:
    lab, node, ns2 = loopback.lab, loopback.nodes["ns0"], loopback.nodes["ns2"]
    loopback.must_ping("ns1", V4_OF_B)
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            udp_message(ns2, V4_OF_A, PORT, bytes(1000))
            let_pass(0.001, "the programs and the test need CPU time too")

    sender = threading.Thread(target=send)
    sender.start()
    try:
        lab.end(loopback.a)
        for family, wildcard in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - a node
            with node.socket(family, socket.SOCK_DGRAM) as sock:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                bind(sock, wildcard)
        loopback.a = lab.interface("wg0", loopback.a.manifest, node, loopback.nodes["ns1"])
        must_be_empty(loopback.a)
    finally:
        over.set()
        sender.join()
    b = PeerConfig(
        public_key=loopback.pub_b,
        preshared_key=loopback.psk,
        endpoint=Endpoint("127.0.0.1", PORT_OF_B),
        allowed_ips=allowed_ips(f"{V4_OF_B}/32"),
    )
    with twin("the new interface works once it is configured"):
        loopback.a.set(DeviceConfig(private_key=loopback.key_a, listen_port=PORT_OF_A, peers=(b,)))
        loopback.a.up(f"{V4_OF_A}/24")
        loopback.must_ping("ns1", V4_OF_B)


def bind(sock: socket.socket, wildcard: str) -> None:
    try:
        sock.bind((wildcard, PORT_OF_A))
    except OSError as error:
        pytest.fail(f"its port is not free on {wildcard}: {errno.errorcode[error.errno or 0]}")


@pytest.mark.requirement("NS-09")
def test_moved_interface_keeps_configuration_and_counters(loopback: Tunnel) -> None:
    a, elsewhere = loopback.a, loopback.lab.node("elsewhere")
    loopback.must_ping("ns1", V4_OF_B)
    loopback.counted()
    let_pass(TOO_EARLY, "B refuses an initiation that follows another too closely (HS-12)")
    # A namespace that ends takes its links with it: this undo runs before that of the node.
    loopback.lab.undo(a.move, loopback.nodes["ns1"])
    before = a.get()
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        a.move(elsewhere)
        after = a.get()
        a.up(f"{V4_OF_A}/24")
        udp_message(elsewhere, V4_OF_B, PORT, b"hello")
        wire.wait_for(lambda message: message in wire.messages(port=PORT_OF_A), 5.0, "a message of A")
        first = wire.messages(port=PORT_OF_A)[0].kind
    if (after, first) != (before, INITIATION):
        kept = "all settings" if after == before else f"not all: before {before.peers[0]}, after {after.peers[0]}"
        differs(f"a move keeps {kept}; its first message afterwards has type {first}", by=[a.manifest.name])


# Counters


def errors_of(node: NetNS) -> dict[str, int]:
    """Return the error counters of wg0 as ip(8) shows them."""
    stats = node.run_json(["ip", "-j", "-s", "-s", "link", "show", "wg0"])[0]["stats64"]
    received, sent = stats["rx"], stats["tx"]
    return {
        "rx_errors": received["errors"],
        "rx_frame_errors": received.get("frame_errors", 0),
        "rx_length_errors": received.get("length_errors", 0),
        "tx_errors": sent["errors"],
        "tx_dropped": sent["dropped"],
    }


@pytest.mark.requirement("IF-13", "IF-14")
def test_packet_of_foreign_source_counts_only_as_error(loopback: Tunnel) -> None:
    ns1, ns2 = loopback.nodes["ns1"], loopback.nodes["ns2"]
    ns2.add_address("wg0", f"{FOREIGN}/24")
    loopback.must_ping("ns1", V4_OF_B)
    received, errors = loopback.seen_by_a().rx_bytes, errors_of(ns1)
    with udp_receiver(ns1, V4_OF_A, PORT) as receiver:
        # Not authentic, so it counts nowhere.
        udp_message(loopback.nodes["ns0"], "127.0.0.1", PORT_OF_A, b"\4\0\0\0" + bytes(60))
        udp_message(ns2, V4_OF_A, PORT, bytes(900), source=FOREIGN)
        udp_message(ns2, V4_OF_A, PORT, b"mine", source=V4_OF_B)
        data, _ = wait_for(Datagram(receiver), 5.0, "the datagram from B's own address")
    assert data == b"mine", "a packet with another source than the allowed ips was delivered"
    after = poll_until(lambda: loopback.seen_by_a().rx_bytes, lambda count: count > received, SOON)
    changed = {name: value - errors[name] for name, value in errors_of(ns1).items() if value != errors[name]}
    if after - received > 900:
        differs("a packet of a foreign source adds to rx_bytes", by=[loopback.a.manifest.name])
    if changed != {"rx_errors": 1, "rx_frame_errors": 1}:
        differs(f"a packet of a foreign source changes the counters by {changed}", by=kernel_only(loopback.a.manifest))


def kernel_only(manifest: Manifest) -> list[str]:
    """Return the program's name if it is the driver: only the driver sets the counters and offloads of its link."""
    return [manifest.name] if manifest.kind == "kernel" else []


@pytest.mark.requirement("IF-15")
def test_packet_without_peer_or_endpoint_is_transmit_error(lab: Lab, wg0: Interface, alice: Key) -> None:
    node = wg0.place
    wg0.set(DeviceConfig(private_key=lab.key("own")))
    wg0.set_peer(alice, allowed_ips=allowed_ips("203.0.113.0/24"))
    wg0.up("10.9.0.1/24")
    node.add_route("203.0.113.0/24", dev="wg0")
    before = errors_of(node)
    for address in ("10.9.0.2", "203.0.113.1"):
        # The driver returns ENOKEY without a peer, and EDESTADDRREQ without an endpoint.
        with suppress(OSError):
            udp_message(node, address, PORT, b"to nobody")
    after = poll_until(lambda: errors_of(node), lambda found: found["tx_errors"] >= before["tx_errors"] + 2, 0.2)
    changed = {name: value - before[name] for name, value in after.items() if value != before[name]}
    if changed != {"tx_errors": 2}:
        differs(
            f"a packet without a peer and one without an endpoint change the counters by {changed}",
            by=kernel_only(wg0.manifest),
        )


@pytest.mark.requirement("IF-18")
def test_wrong_inner_checksum_is_not_verified(loopback: Tunnel) -> None:
    ns1, ns2 = loopback.nodes["ns1"], loopback.nodes["ns2"]
    loopback.must_ping("ns1", V4_OF_B)
    with (
        udp_receiver(ns1, V4_OF_A, PORT) as receiver,
        ns2.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender,
    ):
        wrong = PORT.to_bytes(2) * 2 + (8 + 5).to_bytes(2) + b"\x12\x34" + b"wrong"
        sender.sendto(ip_packet(V4_OF_B, V4_OF_A, wrong), (V4_OF_A, 0))
        udp_message(ns2, V4_OF_A, PORT, b"right")
        data, _ = wait_for(Datagram(receiver), 5.0, "a datagram with a right checksum")
    if data != b"wrong":
        differs("an inner datagram with a wrong checksum is not delivered", by=kernel_only(loopback.a.manifest))
