"""Route packets and the tunnel's datagrams by bound sockets and marks (`nat`, `direct`)."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from harness import (
    COOKIE_REPLY,
    INITIATION,
    V4_OF_A,
    V4_OF_B,
    V6_OF_B,
    DeviceConfig,
    Endpoint,
    PeerConfig,
    add_veth,
    allowed_ips,
    must_ping,
    ping,
    poll_until,
    twin,
)
from harness.wire.messages import FIELDS, SIZES, kind_of, with_mac1

if TYPE_CHECKING:
    from harness import Lab, Manifest, NetNS, Tunnel

MARK = 51820
# The flag FIB_RULE_INVERT of include/uapi/linux/fib_rules.h: `ip rule add not ...`.
NOT = 2
# In a chain of type route, the kernel looks up the route again after a rule has changed the mark.
MARKING = """\
table inet marking {
    chain output {
        type route hook output priority mangle
        oifname "wg0" counter comment "inner"
        oifname "vethc" udp dport 2 counter comment "outer"
        counter meta mark set 1 comment "marked"
    }
}
"""
WATCHING = f"""\
table inet watching {{
    chain output {{
        type filter hook output priority 0
        oifname "vethc" udp dport 2 meta mark {MARK} counter comment "marked"
        oifname "vethc" udp dport 2 meta mark != {MARK} counter comment "unmarked"
        oifname "wg0" udp dport 2 counter comment "looped"
    }}
}}
"""
# Cookie replies from A's port: UDP length 8 + 64, and type 3.
COOKIE_REPLIES = f"""\
table inet replies {{
    chain output {{
        type filter hook output priority 0
        udp sport 1 udp length 72 @th,64,8 {COOKIE_REPLY} meta mark {MARK} counter comment "marked"
        udp sport 1 udp length 72 @th,64,8 {COOKIE_REPLY} meta mark != {MARK} counter comment "unmarked"
    }}
}}
"""
# The driver is under load when an eighth of its queue is full. Twice as many are sent with UDP_SEGMENT (udp(7)): with a
# system call for each, the driver would keep up.
UDP_SEGMENT = 103
AT_ONCE, BURST = 64, 1024
PATIENCE = 10.0
# Seconds for a ping that must not be answered.
UNANSWERED = 0.1


@pytest.mark.scenario("N21")
def test_device_bound_socket_works_with_and_without_rerouting(nat: Tunnel) -> None:
    ns1 = nat.nodes["ns1"]
    for address in (V4_OF_B, V6_OF_B):
        must_ping(ns1, address, device="wg0")
    ns1.nft(MARKING)
    for address in (V4_OF_B, V6_OF_B):
        must_ping(ns1, address)
        must_ping(ns1, address, device="wg0")
    counted = ns1.nft_counters()
    assert min(counted["inner"], counted["outer"]) >= 4, f"not every packet was rerouted: {counted}"
    assert counted["marked"] >= counted["inner"] + counted["outer"]
    ns1.delete_route("192.168.241.0/24", dev="wg0")
    assert ping(ns1, V4_OF_B, timeout=UNANSWERED).lost == 1, "there is still a route into the tunnel"
    must_ping(ns1, V4_OF_B, device="wg0")


@pytest.mark.scenario("N23")
@pytest.mark.requirement("RT-17")
@pytest.mark.capability("fwmark")
def test_marked_datagrams_bypass_default_route_into_tunnel(nat: Tunnel) -> None:
    ns1 = nat.nodes["ns1"]
    ns1.add_address("vethc", "fc00::9/96")
    ns1.add_route("::/0", via="fc00::1")
    ns1.nft(WATCHING)
    owned = ("192.168.99.7/32", "abab::1111/128")
    nat.nodes["ns2"].add_address("wg0", *owned)
    peer = PeerConfig(public_key=nat.pub_b, replace_allowed_ips=True, allowed_ips=allowed_ips(*owned))
    nat.a.set(DeviceConfig(fwmark=MARK, peers=(peer,)))
    route_unmarked_into_tunnel(ns1)
    nat.must_ping("ns1", "192.168.99.7", count=100)
    nat.must_ping("ns1", "abab::1111", count=100)
    counted = ns1.nft_counters()
    assert (counted["unmarked"], counted["looped"]) == (0, 0), f"datagrams of A were unmarked or looped: {counted}"
    assert counted["marked"] > 200, f"the pings did not go through the tunnel: {counted}"


def route_unmarked_into_tunnel(node: NetNS) -> None:
    """Set up the routes and rules of wg-quick(8) for a peer that owns every address."""
    for family, everything in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
        node.add_route(everything, dev="wg0", table=MARK)
        node.add_rule(family, fwmark=MARK, flags=NOT, table=MARK, priority=32765)
        # All routes of the main table but the default one.
        node.add_rule(family, table=254, suppress_prefixlen=0, priority=32764)
    disable_rp_filter(node, "vethc")


def disable_rp_filter(node: NetNS, *devices: str) -> None:
    """Turn the reverse path filter off, in `all` too: the kernel uses the stricter of the two settings."""
    for device in ("all", *devices):
        node.sysctl(f"net.ipv4.conf.{device}.rp_filter", 0)


@pytest.mark.requirement("RT-16", "RT-17")
@pytest.mark.capability("fwmark", "ipv6-underlay")
@pytest.mark.parametrize(
    ("near", "detour", "length"),
    [
        pytest.param(("10.0.0.1", "10.0.0.2"), ("10.1.0.1", "10.1.0.2"), 24, id="v4"),
        pytest.param(("fd00:aa::1", "fd00:aa::2"), ("fd00:bb::1", "fd00:bb::2"), 96, id="v6"),
    ],
)
def test_marked_datagrams_leave_by_other_link_with_its_address(
    direct: Tunnel, near: tuple[str, str], detour: tuple[str, str], length: int
) -> None:
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    add_veth(ns1, "veth3", ns2, "veth4")
    for node, devices, side in ((ns1, ("veth1", "veth3"), 0), (ns2, ("veth2", "veth4"), 1)):
        node.add_address(devices[0], f"{near[side]}/{length}")
        node.add_address(devices[1], f"{detour[side]}/{length}")
        disable_rp_filter(node, *devices)
    ns1.add_route(f"{near[1]}/{128 if ':' in near[1] else 32}", via=detour[1], table=7)
    ns1.add_rule(socket.AF_INET6 if ":" in near[1] else socket.AF_INET, fwmark=7, table=7, priority=100)
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint(near[1], 2))
    direct.must_ping("ns1", V4_OF_B)
    assert direct.seen_by_b().endpoint == Endpoint(near[0], 1)
    direct.a.set(DeviceConfig(fwmark=7))
    direct.must_ping("ns1", V4_OF_B)
    seen = direct.seen_by_b().endpoint
    assert seen == Endpoint(detour[0], 1), f"A's marked datagrams leave from {seen}, expected {Endpoint(detour[0], 1)}"


@pytest.mark.bug("IB-76")
@pytest.mark.requirement("RT-11", "RT-13")
@pytest.mark.capability("sticky-source", "update-peer")
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("from 10.1.0.77", id="source"),
        pytest.param("to 10.9.0.1", id="destination"),
        pytest.param("ipproto udp", id="protocol"),
        pytest.param("ipproto udp sport 2", id="source-port"),
        pytest.param("ipproto udp dport 1-9", id="destination-port"),
        pytest.param("uidrange 0-0", id="uid"),
        pytest.param("iif lo", id="input-device"),
        pytest.param("fwmark 7", id="fwmark", marks=pytest.mark.capability("fwmark")),
    ],
)
def test_reply_keeps_source_that_policy_rule_routes(direct: Tunnel, rule: str) -> None:
    call_second_uplink(direct)
    if "fwmark" in rule:
        direct.b.set(DeviceConfig(fwmark=7))
    direct.nodes["ns2"].run(["ip", "rule", "add", *rule.split(), "lookup", "100", "priority", "100"])
    direct.must_ping("ns1", V4_OF_B)
    must_answer_from(direct, "10.1.0.77")
    direct.must_ping("ns2", V4_OF_A)
    must_answer_from(direct, "10.1.0.77")


@pytest.mark.bug("IB-76")
@pytest.mark.requirement("RT-13", "RT-12")
@pytest.mark.capability("sticky-source", "update-peer")
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("ipproto tcp", id="protocol"),
        pytest.param("ipproto udp sport 3", id="source-port"),
        pytest.param("ipproto udp dport 2", id="destination-port"),
        pytest.param("uidrange 1-9", id="uid"),
        pytest.param("fwmark 7", id="fwmark"),
        pytest.param("oif veth4", id="output-device"),
        # The DSCP of handshakes does not count: the driver looks up the route without it.
        pytest.param("tos 8", id="tos"),
    ],
)
def test_reply_source_ignores_rule_for_other_flow(direct: Tunnel, rule: str) -> None:
    call_second_uplink(direct)
    direct.nodes["ns2"].run(["ip", "rule", "add", *rule.split(), "lookup", "100", "priority", "100"])
    direct.must_ping("ns1", V4_OF_B)
    must_answer_from(direct, "10.0.0.2")


def call_second_uplink(direct: Tunnel) -> None:
    """Let A (10.9.0.1) call B at the second address of its second uplink; B's table 100 answers by that uplink."""
    ns1, ns2 = direct.nodes["ns1"], direct.nodes["ns2"]
    add_veth(ns1, "veth3", ns2, "veth4")
    disable_rp_filter(ns1, "veth1", "veth3")
    disable_rp_filter(ns2, "veth2", "veth4")
    ns1.add_address("lo", "10.9.0.1/32")
    ns1.add_address("veth1", "10.0.0.1/24")
    ns1.add_address("veth3", "10.1.0.9/24")
    ns2.add_address("veth2", "10.0.0.2/24")
    ns2.add_address("veth4", "10.1.0.1/24", "10.1.0.77/24")
    ns1.add_route("10.1.0.77/32", dev="veth3", src="10.9.0.1")
    ns2.add_route("10.9.0.1/32", via="10.0.0.1")
    ns2.add_route("10.9.0.1/32", via="10.1.0.9", table=100)
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.1.0.77", 2))


def must_answer_from(direct: Tunnel, address: str) -> None:
    """Check that A reports this address as that of B."""
    seen = direct.seen_by_a().endpoint
    assert seen == Endpoint(address, 2), f"A called 10.1.0.77, and B ({direct.b.manifest.name}) answered from {seen}"


@pytest.mark.requirement("RT-17", "MSG-11")
@pytest.mark.capability("fwmark")
def test_cookie_replies_carry_fwmark(lab: Lab, implementation: Manifest) -> None:
    ns0, key = lab.node("ns0"), lab.key("key1")
    wg0 = lab.interface("wg0", implementation, ns0)
    wg0.set(DeviceConfig(private_key=key, listen_port=1))
    wg0.set(DeviceConfig(fwmark=MARK))
    wg0.up()
    ns0.nft(COOKIE_REPLIES)
    initiations = [with_mac1(b"\1\0\0\0" + lab.random.randbytes(144), key.public().raw) for _ in range(AT_ONCE)]
    with ns0.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.connect(("127.0.0.1", 1))
        stranger.setblocking(False)
        stranger.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SIZES[INITIATION])
        must_get_cookie_reply(stranger, initiations)
        counted = ns0.nft_counters()
        assert (counted["marked"] > 0, counted["unmarked"]) == (True, 0), f"A's cookie replies: {counted}"
        wg0.set(DeviceConfig(fwmark=0))
        with twin("cookie replies without the mark are counted"):
            must_get_cookie_reply(stranger, initiations)
            assert poll_until(lambda: ns0.nft_counters()["unmarked"], bool, 1.0) > 0


def must_get_cookie_reply(stranger: socket.socket, initiations: list[bytes]) -> None:
    """Send bursts of initiations until one is answered by a cookie reply."""

    def look() -> bytes:
        for _ in range(BURST // AT_ONCE):
            stranger.send(b"".join(initiations))
        with suppress(BlockingIOError):
            return stranger.recv(2048)
        return b""

    reply = poll_until(look, bool, PATIENCE)
    assert kind_of(reply) == COOKIE_REPLY, f"expected a cookie reply under load, got {reply.hex() or 'nothing'}"
    index = reply[slice(*FIELDS[COOKIE_REPLY]["receiver"])]
    sent = {initiation[slice(*FIELDS[INITIATION]["sender"])] for initiation in initiations}
    assert index in sent, f"a cookie reply has the receiver index {index.hex()}, which no initiation has as its sender"
