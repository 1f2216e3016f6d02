"""Check that refwg goes on without descriptors, memory, disk space or permission, and logs the reason (`loopback`)."""

from __future__ import annotations

import dataclasses
import resource
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    DATA,
    LOOPBACK,
    V4_OF_B,
    Capture,
    ProgramInterface,
    Registry,
    Tunnel,
    must_ping,
    poll_until,
)
from harness.implementations import interface

if TYPE_CHECKING:
    from harness import Lab, NetNS

pytestmark = pytest.mark.long_in_guest

DEADLINE: Final = 10.0
# So few that refwg can open no further descriptor.
NONE_FREE: Final = 3
PORT_OF_A: Final = 1
# Lengths of the message with a packet of 1297 bytes: padded to a multiple of 16, and not beyond the MTU.
PADDED_FOR_1420, PADDED_FOR_1300 = 32 + 1312, 32 + 1300
REFUSED: Final = b"errno=-24\n\n"


@pytest.fixture
def tunnel(lab: Lab) -> Tunnel:
    """A and B are refwg, each with its link in a namespace other than that of its sockets."""
    refwg = Registry().get("refwg")
    made = Tunnel(lab, LOOPBACK, refwg, refwg)
    made.must_ping("ns1", V4_OF_B)
    return made


def program(tunnel: Tunnel) -> ProgramInterface:
    assert isinstance(tunnel.a, ProgramInterface)
    return tunnel.a


def limit(side: ProgramInterface, kind: int, value: int) -> None:
    resource.prlimit(side.process.pid, kind, (value, resource.prlimit(side.process.pid, kind)[1]))


def must_log(side: ProgramInterface, pattern: str) -> None:
    side.process.says(pattern, DEADLINE)


@pytest.mark.bug("IB-77")
def test_client_is_refused_by_errno_while_descriptors_are_taken(tunnel: Tunnel) -> None:
    side = program(tunnel)
    limit(side, resource.RLIMIT_NOFILE, 64)
    with ExitStack() as idle:
        replies = []
        for _ in range(100):
            client = idle.enter_context(side.connect())
            client.settimeout(0)
            replies.append(client)
        last = replies[-1]
        last.settimeout(DEADLINE)
        assert last.recv(100) == REFUSED
        must_log(side, "ERROR: .*control socket: a connection was refused: Too many open files: close idle connections")
        accepted = [client for client in replies if not has_reply(client)]
        # 64 less those in use and those kept free.
        assert 20 < len(accepted) < 50
        accepted[0].settimeout(DEADLINE)
        accepted[0].sendall(b"get=1\n\n")
        assert accepted[0].recv(1 << 16).endswith(b"errno=0\n\n"), "an accepted connection is not served"
        tunnel.nodes["ns1"].set_link("wg0", mtu=1300)
        sent = poll_until(lambda: sent_length(tunnel), lambda length: length == PADDED_FOR_1300, DEADLINE)
        assert sent == PADDED_FOR_1300, "the connections left no descriptor to read the link's MTU"
        assert "cannot be read" not in side.process.log.read_text()
    poll_until(tunnel.seen_by_a, bool, DEADLINE)


def has_reply(client: socket.socket) -> bool:
    client.settimeout(0)
    try:
        client.recv(100, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


@pytest.mark.bug("IB-77")
def test_link_change_is_applied_once_descriptor_is_free(tunnel: Tunnel) -> None:
    side, ns1 = program(tunnel), tunnel.nodes["ns1"]
    limit(side, resource.RLIMIT_NOFILE, NONE_FREE)
    ns1.set_link("wg0", mtu=1300)
    must_log(side, "ERROR: .*the state of the interface cannot be read: Too many open files: close idle connections")
    assert sent_length(tunnel) == PADDED_FOR_1420
    limit(side, resource.RLIMIT_NOFILE, 1024)
    sent = poll_until(lambda: sent_length(tunnel), lambda length: length == PADDED_FOR_1300, DEADLINE)
    assert sent == PADDED_FOR_1300, f"a packet was sent as {sent} bytes, and the link's MTU allows {PADDED_FOR_1300}"


def sent_length(tunnel: Tunnel) -> int:
    """Send a packet of 1297 bytes from A to B; return the length of its message, which shows A's MTU (5.4.6)."""
    with Capture(tunnel.nodes["ns0"], "lo") as wire:
        must_ping(tunnel.nodes["ns1"], V4_OF_B, size=1297 - 28)
        return max(len(message.payload) for message in wire.messages(kind=DATA, port=PORT_OF_A))


@pytest.mark.bug("IB-77")
def test_move_without_rights_ends_with_status_1_and_its_reason(lab: Lab) -> None:
    refwg = Registry().get("refwg")
    command = (*refwg.command[:-1], "--drop-privileges", "root", refwg.command[-1])
    birth, place = lab.node("birth"), lab.node("place")
    side = interface.create("wg0", dataclasses.replace(refwg, command=command), birth, lab.directory / "refwg.log")
    assert isinstance(side, ProgramInterface)
    try:
        birth.move_link("wg0", place)
        assert side.process.wait(DEADLINE) == 1
        log = side.process.log.read_text()
        assert "not permitted to enter it: that needs CAP_SYS_ADMIN" in log
        assert "setns" not in log
        # The helper of --drop-privileges has a copy of the TUN descriptor until it runs for the first time.
        assert poll_until(lambda: not place.has_link("wg0"), bool, DEADLINE), "the interface is still there"
    finally:
        side.close()


@pytest.mark.bug("IB-77")
def test_datagrams_that_firewall_rejects_are_reported_once(tunnel: Tunnel) -> None:
    side = program(tunnel)
    reject(tunnel.nodes["ns0"])
    for _ in range(3):
        tunnel.nodes["ns1"].run(["ping", "-c", "1", "-W", "1", V4_OF_B], check=False)
    must_log(side, "ERROR: .*datagrams were dropped: Operation not permitted: look for a firewall rule")
    assert side.process.log.read_text().count("ERROR:") == 1
    tunnel.nodes["ns0"].run(["nft", "flush", "ruleset"])
    tunnel.must_ping("ns1", V4_OF_B)


def reject(node: NetNS) -> None:
    """Drop the datagrams of A where it sends them: its sendmsg(2) then fails with EPERM."""
    rules = "table ip t { chain c { type filter hook output priority 0\n udp sport 1 drop\n}\n}"
    node.run(["nft", "-f", "-"], stdin=rules)
