"""Reach a peer through another peer of the same interface, and through itself (`nat`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_B, DeviceConfig, Endpoint, PeerConfig, allowed_ips, differs, let_pass, ping, poll_until, twin

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Interface, NetNS, Tunnel

INNER_OF_A, INNER_OF_B = "192.168.242.1", "192.168.242.2"
PORT = 5
# Bytes that a bounded loop may send: the limit of netns.sh for a routing loop (N19).
BOUNDED = 70_000
LOOPING = 0.25
# Seconds within which a looping program sends more than BOUNDED, even on a busy machine.
LOOP_DEADLINE = 5.0
IDLE_WINDOW = 0.2
LOOP_WINDOW = 0.1


def wrap_once_more(nat: Tunnel) -> Interface:
    """Add a second interface in ns2, whose peer is A's wg0 through its own tunnel."""
    key3 = nat.lab.key("key3")
    wg1 = nat.lab.interface("wg1", nat.b.manifest, nat.nodes["ns2"])
    peer = PeerConfig(public_key=nat.pub_a, allowed_ips=allowed_ips(f"{INNER_OF_A}/32"))
    wg1.set(DeviceConfig(private_key=key3, listen_port=PORT, peers=(peer,)))
    wg1.up(f"{INNER_OF_B}/24")
    nat.nodes["ns1"].add_address("wg0", f"{INNER_OF_A}/24")
    nat.a.set_peer(key3.public(), endpoint=Endpoint(V4_OF_B, PORT), allowed_ips=allowed_ips(f"{INNER_OF_B}/32"))
    return wg1


@pytest.mark.scenario("N22")
def test_peer_is_reached_through_other_peer_of_same_interface(nat: Tunnel) -> None:
    wg1 = wrap_once_more(nat)
    nat.must_ping("ns1", INNER_OF_B)
    assert str(wg1.peer(nat.pub_a).endpoint) == "192.168.241.1:1", "B's second interface was not reached by the tunnel"


@pytest.mark.scenario("N22")
@pytest.mark.alone
def test_loop_of_peer_behind_itself_is_bounded_as_declared(
    nat: Tunnel, record_property: Callable[[str, object], None]
) -> None:
    ns1, pub3 = nat.nodes["ns1"], nat.lab.key("key3").public()
    with twin("the peer behind the other one answers"):
        wg1 = wrap_once_more(nat)
        nat.must_ping("ns1", INNER_OF_B)
    nat.lab.end(wg1)
    nat.a.set_peer(pub3, endpoint=Endpoint(INNER_OF_B, PORT))
    before, busy = ns1.links()["wg0"]["tx_bytes"], nat.a.cpu_seconds()
    is_bounded = "bounded-loop" in nat.a.manifest.capabilities
    try:
        pings = ping(ns1, INNER_OF_B, timeout=LOOPING)
        if is_bounded:
            more = sent_in_window(ns1)
            assert more == 0, (
                f"{nat.a.manifest.name} declares bounded-loop, but sent {more} more bytes in {LOOP_WINDOW} s"
            )
        else:
            poll_until(lambda: ns1.links()["wg0"]["tx_bytes"] - before, lambda sent: sent > BOUNDED, LOOP_DEADLINE)
    finally:
        nat.a.set_peer(pub3, remove=True)
    sent, busy = ns1.links()["wg0"]["tx_bytes"] - before, nat.a.cpu_seconds() - busy
    record_property("looped_bytes", sent)
    record_property("looped_cpu_seconds", round(busy, 2))
    assert pings.lost == 1, "the ping was answered although its peer has ended"
    # Until A has drained its queue of looped packets, the TUN device may drop a new one (tun_net_xmit).
    # The CPU time of the driver cannot be measured.
    if nat.a.manifest.kind != "kernel":
        assert poll_until(lambda: is_idle(nat.a), bool, LOOP_DEADLINE), "A is still busy although the loop was cut"
    nat.must_ping("ns1", V4_OF_B)
    looped = f"one ping became {sent} bytes until the loop was cut; a bounded loop sends at most {BOUNDED}"
    name = nat.a.manifest.name
    assert (sent <= BOUNDED) == is_bounded, f"{looped}; {name} {'declares' if is_bounded else 'does not declare'} this"
    if not is_bounded:
        differs(looped, scenario="N22")


def sent_in_window(node: NetNS) -> int:
    before = node.links()["wg0"]["tx_bytes"]
    let_pass(LOOP_WINDOW, "an unbounded loop would send all the time")
    return int(node.links()["wg0"]["tx_bytes"] - before)


def is_idle(side: Interface) -> bool:
    before = side.cpu_seconds()
    let_pass(IDLE_WINDOW, "a program in the loop would use the CPU all the time")
    return side.cpu_seconds() - before < IDLE_WINDOW / 2
