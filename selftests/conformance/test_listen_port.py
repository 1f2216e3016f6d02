"""Check which UDP ports an interface binds, and what a taken port does."""

from __future__ import annotations

import errno
import re
import socket
from functools import partial
from operator import eq
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    ControlError,
    DeviceConfig,
    Endpoint,
    HarnessError,
    PeerConfig,
    allowed_ips,
    differs,
    ping,
    poll_until,
    twin,
)

if TYPE_CHECKING:
    from harness import Interface, Lab, Manifest, NetNS, Tunnel

OLD, NEW, THIRD = 7000, 7001, 7002
# The wildcard addresses as /proc/net/udp and udp6 write them.
ANY_V4, ANY_V6 = "0" * 8, "0" * 32
# Seconds: a program opens and closes its sockets a moment after the link changes.
SOON: Final = 2.0


class Socket(NamedTuple):
    """A bound UDP socket of a node: its address as /proc/net/udp writes it, its port, its inode."""

    address: str
    port: int
    inode: int


@pytest.fixture
def node(lab: Lab) -> NetNS:
    return lab.node("ns0")


@pytest.fixture
def wg0(lab: Lab, implementation: Manifest, node: NetNS) -> Interface:
    made = lab.interface("wg0", implementation, node)
    # Some programs bind no port without a private key.
    made.set(DeviceConfig(private_key=lab.key("own")))
    return made


def sockets(node: NetNS) -> set[Socket]:
    """Return the UDP sockets of a node."""
    lines = node.run(["cat", "/proc/net/udp", "/proc/net/udp6"]).stdout.splitlines()
    rows = [line.split() for line in lines if re.match(r" *\d+: ", line)]
    return {Socket(row[1].partition(":")[0], int(row[1].rpartition(":")[2], 16), int(row[9])) for row in rows}


def addresses_of(node: NetNS, port: int) -> set[str]:
    """Return the addresses on which a port is bound."""
    return {found.address for found in sockets(node) if found.port == port}


def is_bound(node: NetNS, port: int) -> bool:
    """Whether the port is bound in both families, on the wildcard address, by two sockets or by one for both."""
    bound = addresses_of(node, port)
    return bound == {ANY_V4, ANY_V6} or (bound == {ANY_V6} and is_open(node, "127.0.0.1", port))


def is_open(node: NetNS, address: str, port: int) -> bool:
    """Whether a datagram to this port of the node is not answered by ICMP "port unreachable"."""
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((address, port))
        sender.send(b"?")
        try:
            # Over the loopback device the ICMP error is there when send(2) returns, and the next call reports it.
            sender.send(b"?")
        except ConnectionRefusedError:
            return False
    return True


def await_bound(node: NetNS, port: int) -> None:
    """Check that the port is bound in both families, on the wildcard address."""
    if not poll_until(lambda: is_bound(node, port), bool, SOON):
        bound = sorted(addresses_of(node, port))
        pytest.fail(f"port {port} is bound on {bound or 'no address'}, not on the wildcard address of both families")


HOLDERS = {
    "v4": (socket.AF_INET, "0.0.0.0"),  # noqa: S104 - a node of our own
    "v6": (socket.AF_INET6, "::"),
    "v4-loopback": (socket.AF_INET, "127.0.0.1"),
    "v6-loopback": (socket.AF_INET6, "::1"),
}


def take(node: NetNS, holder: str, port: int) -> socket.socket:
    """Bind a port on one address of one family; the caller closes the socket."""
    family, address = HOLDERS[holder]
    sock = node.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((address, port))
    return sock


@pytest.mark.requirement("IF-04")
@pytest.mark.parametrize("port", [0, 51820])
def test_up_binds_one_port_in_both_families(wg0: Interface, node: NetNS, port: int) -> None:
    wg0.set(DeviceConfig(listen_port=port))
    wg0.up()
    reported = poll_until(lambda: wg0.get().listen_port, bool, SOON)
    assert reported == port or not port, f"it reports port {reported}, not {port}"
    assert reported, "it is up and reports no port"
    await_bound(node, reported)


@pytest.mark.requirement("CFG-22")
@pytest.mark.bug("IB-67")
@pytest.mark.capability("listen-port-change")
def test_old_port_is_closed_after_change(wg0: Interface, node: NetNS) -> None:
    wg0.up()
    for port in (OLD, NEW):
        wg0.set(DeviceConfig(listen_port=port))
        await_bound(node, port)
    left = poll_until(lambda: addresses_of(node, OLD), lambda bound: not bound, SOON)
    assert not left, f"it listens on port {NEW}, and its old port {OLD} is still bound on {sorted(left)}"


@pytest.mark.requirement("IF-04")
@pytest.mark.bug("IB-80")
@pytest.mark.parametrize("holder", HOLDERS)
def test_port_taken_in_one_family_is_not_bound_in_other(wg0: Interface, node: NetNS, holder: str) -> None:
    with take(node, holder, OLD) as holding:
        occupied = sockets(node)
        refused_by = try_to_bind(wg0, OLD)
        half = {found for found in sockets(node) - occupied if found.port == OLD}
        assert not half, f"the port is taken ({holder}), and it is bound on {[found.address for found in half]}"
        holding.close()
    with twin(f"the port is bound once it is free ({', '.join(refused_by) or 'nothing'} was refused before)"):
        wg0.place.set_link("wg0", up=False)
        wg0.set(DeviceConfig(listen_port=OLD))
        wg0.up()
        await_bound(node, OLD)


def try_to_bind(wg0: Interface, port: int) -> list[str]:
    """Set a port and set the link up; return which of the two was refused, and how."""
    refused_by = []
    try:
        wg0.set(DeviceConfig(listen_port=port))
    except ControlError as refusal:
        refused_by.append(f"set ({errno.errorcode[refusal.errno]})")
    try:
        wg0.place.set_link("wg0", up=True)
    except HarnessError as refusal:
        refused_by.append(f"up ({'EADDRINUSE' if 'ddress already in use' in str(refusal) else refusal})")
    return refused_by


@pytest.mark.requirement("IF-05")
@pytest.mark.parametrize("holder", HOLDERS)
def test_link_stays_down_when_its_port_is_taken(wg0: Interface, node: NetNS, holder: str) -> None:
    with take(node, holder, OLD):
        refused_by = try_to_bind(wg0, OLD)
        # A program cannot refuse it, and may set the link down itself.
        flags = poll_until(lambda: flags_of(node, "wg0"), lambda found: "UP" not in found, SOON)
    if "UP" in flags:
        differs("the link stays up without its port", by=[wg0.manifest.name])
    if refused_by != ["up (EADDRINUSE)"]:
        differs(
            f"refused: {', '.join(refused_by) or 'nothing'}; the link is down",
            by=[wg0.manifest.name] if wg0.manifest.kind == "kernel" else [],
        )


def flags_of(node: NetNS, device: str) -> list[str]:
    """Return the flags of a link, as ip(8) prints them."""
    link: list[dict[str, list[str]]] = node.run_json(["ip", "-j", "link", "show", device])
    return link[0]["flags"]


@pytest.mark.requirement("CFG-19")
@pytest.mark.bug("IB-80", "IB-67")
@pytest.mark.capability("listen-port-change")
@pytest.mark.parametrize("holder", HOLDERS)
def test_change_to_taken_port_is_refused_with_eaddrinuse(wg0: Interface, node: NetNS, holder: str) -> None:
    wg0.set(DeviceConfig(listen_port=OLD))
    wg0.up()
    await_bound(node, OLD)
    with take(node, holder, NEW):
        occupied = sockets(node)
        with pytest.raises(ControlError) as refusal:
            wg0.set(DeviceConfig(listen_port=NEW))
        assert refusal.value.errno == errno.EADDRINUSE, f"{refusal.value}, not EADDRINUSE"
        half = {found for found in sockets(node) - occupied if found.port == NEW}
        assert not half, f"the change was refused, and the port is bound on {[found.address for found in half]}"
    with twin("the change is accepted once the port is free"):
        wg0.set(DeviceConfig(listen_port=NEW))
        await_bound(node, NEW)


@pytest.mark.requirement("CFG-19")
@pytest.mark.bug("IB-67")
@pytest.mark.capability("listen-port-change")
def test_two_interfaces_do_not_share_port(lab: Lab, wg0: Interface, node: NetNS) -> None:
    wg0.set(DeviceConfig(listen_port=OLD))
    wg0.up()
    await_bound(node, OLD)
    mine = {found for found in sockets(node) if found.port == OLD}
    other = lab.interface("wg1", wg0.manifest, node)
    other.set(DeviceConfig(private_key=lab.key("other"), listen_port=NEW))
    other.up()
    await_bound(node, NEW)
    with pytest.raises(ControlError) as refusal:
        other.set(DeviceConfig(listen_port=OLD))
    assert refusal.value.errno == errno.EADDRINUSE, f"{refusal.value}, not EADDRINUSE"
    left = {found for found in sockets(node) if found.port == OLD}
    assert left == mine, f"the sockets of port {OLD} were {mine} and are {left}"


@pytest.mark.requirement("CFG-20")
@pytest.mark.bug("IB-80")
@pytest.mark.capability("listen-port-change")
@pytest.mark.parametrize("holder", ["v4", "v6"])
def test_old_port_works_after_refused_change(loopback: Tunnel, holder: str) -> None:
    a, node = loopback.a, loopback.nodes["ns0"]
    loopback.must_ping("ns1", V4_OF_B)
    with take(node, holder, NEW):
        try:
            a.set(DeviceConfig(listen_port=NEW))
        except ControlError as refusal:
            said = refusal.errno
        else:
            pytest.fail(f"{a.manifest.name} accepted a port that is taken ({holder})")
        reported, bound = a.get().listen_port, is_bound(node, 1)
        answered = not ping(loopback.nodes["ns2"], V4_OF_A).lost
    if (said, reported, bound, answered) != (errno.EADDRINUSE, 1, True, True):
        state = f"reports port {reported}, its old port is {'bound' if bound else 'closed'}"
        differs(
            f"refused with {errno.errorcode[said]}; {state}, and the tunnel {'works' if answered else 'is broken'}",
            by=[a.manifest.name],
        )


@pytest.mark.requirement("CFG-21")
@pytest.mark.bug("IB-67")
@pytest.mark.capability("listen-port-change")
def test_same_port_keeps_socket_and_zero_picks_another(wg0: Interface, node: NetNS) -> None:
    wg0.set(DeviceConfig(listen_port=OLD))
    wg0.up()
    await_bound(node, OLD)
    before = sockets(node)
    wg0.set(DeviceConfig(listen_port=OLD))
    await_bound(node, OLD)
    reopened = sockets(node) != before
    wg0.set(DeviceConfig(listen_port=0))
    port = poll_until(lambda: wg0.get().listen_port, bool, SOON)
    if port in {0, OLD} or not poll_until(lambda: is_bound(node, port), bool, SOON):
        differs(
            f"listen port 0 leaves port {port}, bound on {sorted(addresses_of(node, port))}", by=[wg0.manifest.name]
        )
    if reopened:
        differs("the port that it has already is bound by new sockets", by=[wg0.manifest.name])


@pytest.mark.requirement("CFG-23")
def test_settings_made_while_down_take_effect_at_up(lab: Lab, wg0: Interface, node: NetNS) -> None:
    alice = lab.key("alice").public()
    peer = PeerConfig(
        public_key=alice,
        endpoint=Endpoint("127.0.0.1", 9),
        preshared_key=lab.key("psk"),
        allowed_ips=allowed_ips("10.9.0.0/16"),
    )
    wg0.set(DeviceConfig(listen_port=OLD, fwmark=7, peers=(peer,)))
    for port, mark in ((OLD, 7), (NEW, 8)):
        wg0.set(DeviceConfig(listen_port=port, fwmark=mark))
        wg0.up()
        state = wg0.get()
        assert (state.listen_port, state.fwmark, state.private_key or state.public_key) == (
            port,
            mark,
            lab.key("own") if state.private_key else lab.key("own").public(),
        )
        found = state.peer(alice)
        assert (found.endpoint, found.preshared_key, found.allowed_ips) == (
            peer.endpoint,
            peer.preshared_key,
            peer.allowed_ips,
        )
        await_bound(node, port)
        wg0.place.set_link("wg0", up=False)


@pytest.mark.requirement("IF-08")
def test_sockets_are_open_only_while_link_is_up(wg0: Interface, node: NetNS) -> None:
    wg0.set(DeviceConfig(listen_port=OLD))
    are_open = [bool(sockets(node))]
    for up in (True, False, True):
        node.set_link("wg0", up=up)
        are_open.append(poll_until(lambda: bool(sockets(node)), partial(eq, up), SOON))
    assert are_open[1], "its link is up, and it has no UDP socket"
    assert are_open[3], "its link is up again, and it has no UDP socket"
    if are_open != [False, True, False, True]:
        differs(f"whether it has UDP sockets before up, after up, after down: {are_open[:3]}", by=[wg0.manifest.name])
