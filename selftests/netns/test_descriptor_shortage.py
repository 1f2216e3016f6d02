"""Take a program's descriptors by idle connections: traffic goes on, and the control socket recovers (`loopback`)."""

from __future__ import annotations

import resource
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import pytest

from harness import (
    LOOPBACK,
    V4_OF_A,
    V4_OF_B,
    HarnessError,
    ProgramInterface,
    Registry,
    Tunnel,
    Unsupported,
    ping,
    poll_until,
)

if TYPE_CHECKING:
    from harness import Lab, Manifest

# A limit that a program with two UDP sockets, a TUN device and a control socket does not reach by itself.
DESCRIPTORS: Final = 64
IDLE_CONNECTIONS: Final = 100
# Seconds in which a program that has stopped carrying packets ends, if it does.
ENDS: Final = 2.0
# Seconds in which a program answers again after the connections were closed.
RECOVERS: Final = 10.0


def must_carry(tunnel: Tunnel, after: str) -> None:
    """Check that the program still runs, and carries packets in both directions."""
    assert isinstance(tunnel.a, ProgramInterface)
    lost = 2
    # An interface that is gone has neither route nor address.
    with suppress(HarnessError, OSError):
        pings = [ping(tunnel.nodes[node], address) for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A))]
        lost = sum(each.lost for each in pings)
    process = tunnel.a.process
    if lost:
        # A program that is about to end may have closed its sockets first.
        poll_until(lambda: process.running, lambda runs: not runs, ENDS, what="the program ends")
    status = None if process.running else process.wait(1.0)
    assert status is None, f"it ended with status {status} after {after}"
    assert not lost, f"{lost} of 2 pings were lost after {after}"


def answers(program: ProgramInterface) -> bool:
    try:
        program.get()
    except (HarnessError, OSError):
        return False
    return True


@pytest.mark.bug("IB-77")
def test_traffic_goes_on_when_idle_clients_hold_all_descriptors(lab: Lab, implementation: Manifest) -> None:
    if implementation.kind == "kernel":
        raise Unsupported("the driver has no control socket")
    tunnel = Tunnel(lab, LOOPBACK, implementation, Registry().get("refwg"))
    program = tunnel.a
    assert isinstance(program, ProgramInterface)
    tunnel.must_ping("ns1", V4_OF_B)
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    with ExitStack() as idle:
        # A program that has ended takes no more connections.
        with suppress(OSError):
            for _ in range(IDLE_CONNECTIONS):
                idle.enter_context(program.connect())
        must_carry(tunnel, f"{IDLE_CONNECTIONS} idle connections, with a limit of {DESCRIPTORS} descriptors")
        with suppress(HarnessError):
            tunnel.nodes["ns1"].set_link("wg0", mtu=1300)
        must_carry(tunnel, "a change of the MTU while it had no free descriptor")
    recovered = poll_until(lambda: answers(program), bool, RECOVERS, what="the control socket answers")
    assert recovered, "the control socket does not answer after all idle connections were closed"
