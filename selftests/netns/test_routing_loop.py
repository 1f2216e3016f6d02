"""Route an endpoint through its own tunnel: traffic must stay bounded (`loopback`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from harness import LOOPBACK, OUTER, V4_OF_A, V4_OF_B, Endpoint, Tunnel, differs, flood, let_pass, poll_until, twin

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Lab, Pair

# Bytes: netns.sh reports more as an error.
BOUND = 70_000
# Seconds until the test cuts the loop: the driver's loop ends before that, a program's may go on.
WATCHED = {"kernel": 1.0, "uapi": 0.25}
IDLE_WINDOW = 0.1
# Counts datagrams of the outer tunnel that enter the inner one.
COUNTING = """
table inet counting {
chain out {
type filter hook output priority 0
oifname "wg1" udp dport 7 counter comment "looped"
}
}
"""


@dataclass(frozen=True, slots=True)
class Loop:
    """The two tunnels of A, and what the loop of ten pings cost until it was cut: bytes sent, seconds of CPU time."""

    outer: Tunnel
    inner: Tunnel
    looped: int
    worked: float


def loop_through_itself(lab: Lab, pair: Pair) -> Loop:
    """Route A's outer tunnel through the inner one that it carries, send ten pings, and cut the loop."""
    outer = Tunnel(lab, LOOPBACK, pair.a, pair.b, plan=OUTER)
    inner = outer.inside()
    carrier, carried, ns0 = outer.a, inner.a, outer.nodes["ns0"]
    carried.move(ns0)
    carried.up(f"{V4_OF_A}/24")
    with twin("A's inner interface works in its new namespace"):
        inner.must_ping("ns0", V4_OF_B)
    # End B before A's endpoint changes: a packet from B would change it back.
    lab.end(inner.b)
    lab.end(outer.b)
    carrier.set_peer(outer.pub_b, endpoint=Endpoint.parse(f"{V4_OF_B}:7"))
    ns0.nft(COUNTING)
    before, worked = inner.seen_by_a().tx_bytes, carrier.cpu_seconds() + carried.cpu_seconds()
    try:
        pings = flood(ns0, V4_OF_B, count=10, seconds=WATCHED[pair.a.kind])
    finally:
        ns0.set_link(carried.name, up=False)
    looped = inner.seen_by_a().tx_bytes - before
    worked = carrier.cpu_seconds() + carried.cpu_seconds() - worked
    lab.note("loop.txt", f"{looped} bytes, {worked:.2f} s of CPU time in {WATCHED[pair.a.kind]} s\n")
    assert pings.lost == pings.sent, f"B has ended, and pings were answered: {pings}"
    assert ns0.nft_counters()["looped"] > 0, "the test proved nothing: no outer datagram entered the inner tunnel"
    return Loop(outer, inner, looped, worked)


@pytest.mark.scenario("N19")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.alone
def test_routing_loop_through_own_tunnel_stays_bounded(
    lab: Lab, pair: Pair, record_property: Callable[[str, object], None]
) -> None:
    loop = loop_through_itself(lab, pair)
    record_property("looped_bytes", loop.looped)
    record_property("looped_cpu_seconds", round(loop.worked, 2))
    if loop.looped > BOUND:
        assert pair.a.kind != "kernel", f"the driver sent {loop.looped} bytes; netns.sh allows {BOUND}"
        how = (
            f"the loop goes on: {loop.looped} bytes and {loop.worked:.2f} s of CPU time within {WATCHED[pair.a.kind]} s"
        )
        differs(how, scenario="N19")


@pytest.mark.scenario("N19")
@pytest.mark.requirement("ROB-04")
@pytest.mark.capability("ipv6-underlay")
@pytest.mark.alone
def test_interface_survives_routing_loop_through_own_tunnel(lab: Lab, pair: Pair) -> None:
    loop = loop_through_itself(lab, pair)
    assert_calm_and_configurable(loop.outer, loop.inner)


def assert_calm_and_configurable(outer: Tunnel, inner: Tunnel) -> None:
    """Check that both interfaces of A are idle once the loop is cut, and can be configured."""

    def worked_in_window() -> float:
        before = outer.a.cpu_seconds() + inner.a.cpu_seconds()
        let_pass(IDLE_WINDOW, "the packets still in the loop are processed")
        return outer.a.cpu_seconds() + inner.a.cpu_seconds() - before

    worked = poll_until(worked_in_window, lambda seconds: seconds < IDLE_WINDOW / 2, 5.0)
    assert worked < IDLE_WINDOW / 2, f"the loop is cut, and A still uses {worked:.2f} s of CPU time in {IDLE_WINDOW} s"
    for tunnel in (outer, inner):
        tunnel.a.set_peer(tunnel.pub_b, endpoint=Endpoint.parse("127.0.0.1:7"))
        assert str(tunnel.seen_by_a().endpoint) == "127.0.0.1:7"
