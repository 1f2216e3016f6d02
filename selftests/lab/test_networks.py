"""Check what each topology of networks.py does with plain UDP, without WireGuard, in the words of RFC 4787."""

from __future__ import annotations

import errno
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import harness
from harness import (
    Datagram,
    DeadlineExceeded,
    Device,
    Unavailable,
    error_for,
    let_pass,
    must_ping,
    ping,
    poll_until,
    tcp_stream,
    twin,
    udp_receiver,
    wait_for,
)
from harness.lab.devices import make_device
from harness.lab.networks import (
    ADDRESS_RESTRICTED,
    BLACK_HOLE,
    BONDED,
    BOTH_SIDES,
    BOTH_SYMMETRIC,
    BRIDGED,
    DOUBLE,
    FIREWALL,
    FULL_CONE,
    HAIRPIN,
    MAPPING_LIFETIME,
    NARROW,
    NARROW_MTU,
    NO_HAIRPIN,
    ONE_TO_ONE,
    PORT_RESTRICTED,
    RATE,
    RATE_LIMITED,
    SYMMETRIC,
    VLAN,
    VRF,
    VRF_MARK,
    expire_mappings,
)
from harness.traffic.icmp_errors import Error
from selftests.support.nat import ADDRESS, ADDRESS_AND_PORT, ANY, ARRIVES, Behaviour, behaviour, client

if TYPE_CHECKING:
    from harness import Lab, NetNS, Topology

pytest_plugins = ["pytester"]

MANUAL = Path(harness.__file__).parents[1] / "docs" / "networks.md"
# Seconds: a NAT of a test has this lifetime instead of MAPPING_LIFETIME, and the kernel counts in whole seconds.
BRIEF = 1
LONGER_THAN_BRIEF = 2.0
# Seconds for a datagram that should not arrive, after a marker cannot show it.
SILENCE = 0.3
SO_MARK = 36


def name_of(topology: Topology) -> str:
    return topology.name


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (FULL_CONE, Behaviour(ANY, ANY, "10.0.0.1", True)),
        (ADDRESS_RESTRICTED, Behaviour(ANY, ADDRESS, "10.0.0.1", True)),
        (PORT_RESTRICTED, Behaviour(ANY, ADDRESS_AND_PORT, "10.0.0.1", True)),
        (SYMMETRIC, Behaviour(ADDRESS_AND_PORT, ADDRESS_AND_PORT, "10.0.0.1", False)),
        (ONE_TO_ONE, Behaviour(ANY, ANY, "10.0.0.50", True)),
        (DOUBLE, Behaviour(ANY, ADDRESS_AND_PORT, "10.0.0.1", True)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_nat_maps_and_filters_as_drawn(lab: Lab, topology: Topology, expected: Behaviour) -> None:
    nodes = topology.build(lab)
    assert behaviour(nodes["ns1"], nodes["ns2"]) == expected


@pytest.mark.parametrize("topology", [PORT_RESTRICTED, ADDRESS_RESTRICTED], ids=name_of)
def test_mapping_expires_without_traffic(lab: Lab, topology: Topology) -> None:
    nodes = topology.build(lab)
    ns0 = nodes["ns0"]
    timers = [f"net.netfilter.nf_conntrack_udp_timeout{which}" for which in ("", "_stream")]
    assert [ns0.sysctl(timer) for timer in timers] == [str(MAPPING_LIFETIME)] * 2
    for timer in timers:
        ns0.sysctl(timer, BRIEF)
    if topology is ADDRESS_RESTRICTED:
        ns0.nft(topology.firewall["ns0"].replace("table ip nat", "flush ruleset\ntable ip nat").replace("30s", "1s"))
    with client(nodes["ns1"], nodes["ns2"], 1) as made:
        target = made.mapped(0)
        with twin("a datagram from outside passes while the mapping lives"):
            assert made.passing(target, (0,)) == {0}
        let_pass(LONGER_THAN_BRIEF, "the mapping expires")
        refused = ns0.nft_counters()["refused"]
        made.servers[0].sendto(b"late", target)
        assert refuses(ns0, refused + 1), "the mapping outlived its second"
        with pytest.raises(BlockingIOError):
            made.sock.recvfrom(10, socket.MSG_DONTWAIT)


@pytest.mark.parametrize(
    ("topology", "passes"),
    [
        (FULL_CONE, True),
        (ONE_TO_ONE, True),
        (PORT_RESTRICTED, False),
        (ADDRESS_RESTRICTED, False),
        (SYMMETRIC, False),
        (DOUBLE, False),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_deleted_mapping_is_like_expired_one(lab: Lab, topology: Topology, passes: bool) -> None:
    nodes = topology.build(lab)
    with client(nodes["ns1"], nodes["ns2"], 1) as made:
        target = made.mapped(0)
        expire_mappings(topology, nodes)
        made.servers[0].sendto(b"late", target)
        if passes:
            assert wait_for(Datagram(made.sock), ARRIVES, "a datagram without a mapping")[0] == b"late"
        else:
            assert refuses(nodes["ns0"], 1), "the NAT passed a datagram without a mapping"
        before = nodes["ns0"].nft_counters()["opened"]
        assert made.passing(made.mapped(0), (0,)) == {0}
        assert nodes["ns0"].nft_counters()["opened"] == before + (not passes), "a new mapping was not counted"


def refuses(node: NetNS, count: int) -> bool:
    """Whether the node has refused this number of datagrams in time."""
    return poll_until(lambda: node.nft_counters()["refused"], lambda seen: seen >= count, ARRIVES) == count


@pytest.mark.parametrize(
    ("topology", "meets"), [(BOTH_SIDES, True), (BOTH_SYMMETRIC, False)], ids=["keeping-ports", "random-ports"]
)
def test_datagrams_pass_two_nats_only_if_ports_are_kept(lab: Lab, topology: Topology, meets: bool) -> None:
    nodes = topology.build(lab)
    with (
        udp_receiver(nodes["ns1"], "192.168.1.100", 1) as a,
        udp_receiver(nodes["ns2"], "192.168.2.100", 2) as b,
    ):
        a.sendto(b"from a", ("10.0.0.2", 2))
        assert refuses(nodes["nat2"], 1), "B's NAT let in what no datagram of B had asked for"
        b.sendto(b"from b", ("10.0.0.1", 1))
        if meets:
            assert wait_for(Datagram(a), ARRIVES, "B's datagram") == (b"from b", ("10.0.0.2", 2))
            a.sendto(b"again", ("10.0.0.2", 2))
            assert wait_for(Datagram(b), ARRIVES, "A's datagram") == (b"again", ("10.0.0.1", 1))
        else:
            assert refuses(nodes["nat1"], 1), "A's NAT let B's datagram in"
            a.sendto(b"again", ("10.0.0.2", 2))
            assert refuses(nodes["nat2"], 2), "B's NAT let A's datagram in"


def test_hairpinned_datagram_has_outer_source(lab: Lab) -> None:
    nodes = HAIRPIN.build(lab)
    with (
        udp_receiver(nodes["ns1"], "192.168.1.100", 1) as a,
        udp_receiver(nodes["ns2"], "192.168.2.100", 2) as b,
        udp_receiver(nodes["ns3"], "10.0.0.100", 3478) as stranger,
    ):
        a.sendto(b"turned", ("10.0.0.1", 2))
        assert wait_for(Datagram(b), ARRIVES, "A's datagram") == (b"turned", ("10.0.0.1", 1))
        stranger.sendto(b"forwarded", ("10.0.0.1", 2))
        assert wait_for(Datagram(b), ARRIVES, "a stranger's datagram") == (b"forwarded", ("10.0.0.100", 3478))


def test_nat_without_hairpin_forwards_from_outside_only(lab: Lab) -> None:
    nodes = NO_HAIRPIN.build(lab)
    with (
        udp_receiver(nodes["ns1"], "192.168.1.100", 1) as a,
        udp_receiver(nodes["ns2"], "192.168.2.100", 2) as b,
        udp_receiver(nodes["ns3"], "10.0.0.100", 3478) as stranger,
    ):
        a.sendto(b"turned", ("10.0.0.1", 2))
        assert refuses(nodes["ns0"], 1), "the NAT let a datagram turn back inside"
        stranger.sendto(b"forwarded", ("10.0.0.1", 2))
        assert wait_for(Datagram(b), ARRIVES, "a stranger's datagram") == (b"forwarded", ("10.0.0.100", 3478))


def test_ipv6_firewall_admits_answers_only(lab: Lab) -> None:
    nodes = FIREWALL.build(lab)
    prohibited = Error(errno.EACCES, (1, 1), "fd00:2::1")
    assert error_for(nodes["ns2"], "fd00:1::100") == (0, prohibited)
    with (
        udp_receiver(nodes["ns1"], "fd00:1::100", 1) as a,
        udp_receiver(nodes["ns2"], "fd00:2::100", 2) as b,
    ):
        a.sendto(b"question", ("fd00:2::100", 2))
        assert wait_for(Datagram(b), ARRIVES, "A's datagram") == (b"question", ("fd00:1::100", 1))
        b.sendto(b"answer", ("fd00:1::100", 1))
        assert wait_for(Datagram(a), ARRIVES, "B's answer")[0] == b"answer"
        expire_mappings(FIREWALL, nodes)
        b.sendto(b"late", ("fd00:1::100", 1))
        assert refuses(nodes["ns0"], 2), "the firewall admitted a datagram that answers nothing"
        with pytest.raises(BlockingIOError):
            a.recvfrom(10, socket.MSG_DONTWAIT)


def test_bridge_carries_frames_from_each_port(lab: Lab) -> None:
    nodes = BRIDGED.build(lab)
    must_ping(nodes["ns1"], "192.168.1.2")
    nodes["ns1"].delete_address("veth1", "192.168.1.1/24")
    nodes["ns1"].set_link("veth1", up=False)
    nodes["ns1"].add_address("veth3", "192.168.1.1/24")
    must_ping(nodes["ns1"], "192.168.1.2")
    assert nodes["switch"].links()["port3"]["rx_bytes"] > 0


def test_rate_limited_line_keeps_rate_and_drops_overflow(lab: Lab) -> None:
    nodes = RATE_LIMITED.build(lab)
    rate = 8 * tcp_stream(nodes["ns1"], nodes["ns2"], "10.2.0.9", size=1 << 19)
    assert rate < RATE, f"the line carried {rate:.0f} bit/s"
    drops = {node: nodes[node].run_json(["tc", "-s", "-j", "qdisc", "show", "dev", line])[0]["drops"]
             for node, line in (("r1", "line1"), ("r2", "line2"))}  # fmt: skip
    assert drops["r1"] > 0, "the queue was never full"
    assert drops["r2"] == 0, f"acknowledgements filled the queue of the other direction: {drops}"


@pytest.mark.parametrize(
    ("address", "icmp", "router", "headers"),
    [
        pytest.param("10.2.0.9", (3, 4), "10.1.0.1", 28, id="v4"),
        pytest.param("fd00:2::9", (2, 0), "fd00:1::1", 48, id="v6"),
    ],
)
def test_narrow_path_is_reported_by_its_router(
    lab: Lab, address: str, icmp: tuple[int, int], router: str, headers: int
) -> None:
    ns1 = NARROW.build(lab)["ns1"]
    must_ping(ns1, address)
    _, error = error_for(ns1, address, size=NARROW_MTU + 1 - headers)
    assert error == Error(errno.EMSGSIZE, icmp, router, NARROW_MTU)


def test_black_hole_drops_long_datagrams_without_report(lab: Lab) -> None:
    nodes = BLACK_HOLE.build(lab)
    must_ping(nodes["ns1"], "fd00:2::9", size=NARROW_MTU - 48)
    with pytest.raises(DeadlineExceeded):
        error_for(nodes["ns1"], "fd00:2::9", size=NARROW_MTU + 1 - 48, within=SILENCE)
    assert nodes["r1"].nft_counters()["silenced"] == 1


def build(lab: Lab, topology: Topology) -> dict[str, NetNS]:
    """Build a topology whose devices this kernel may lack."""
    try:
        return topology.build(lab)
    except Unavailable as error:
        pytest.skip(str(error))


def test_vrf_has_way_for_marked_datagrams_only(lab: Lab) -> None:
    nodes = build(lab, VRF)
    with (
        udp_receiver(nodes["ns1"], "0.0.0.0", 1) as a,  # noqa: S104 - a node of the lab
        udp_receiver(nodes["ns2"], "192.168.1.2", 2) as b,
    ):
        with pytest.raises(OSError, match=r"Network is unreachable"):
            a.sendto(b"unmarked", ("192.168.1.2", 2))
        a.setsockopt(socket.SOL_SOCKET, SO_MARK, VRF_MARK)
        a.sendto(b"marked", ("192.168.1.2", 2))
        assert wait_for(Datagram(b), ARRIVES, "A's datagram") == (b"marked", ("192.168.1.1", 1))
        b.sendto(b"answer", ("192.168.1.1", 1))
        assert wait_for(Datagram(a), ARRIVES, "B's answer")[0] == b"answer"


def test_bond_changes_to_other_link_when_one_fails(lab: Lab) -> None:
    nodes = build(lab, BONDED)
    for lost, back in (("port1", "port3"), ("port3", "port1")):
        for port, up in ((back, True), (lost, False)):
            nodes["switch"].set_link(port, up=up)
        assert poll_until(lambda: ping(nodes["ns1"], "192.168.1.2", timeout=SILENCE).lost == 0, bool, ARRIVES), (
            f"no way to B without {lost}"
        )


def test_vlan_frames_have_tag(lab: Lab) -> None:
    nodes = build(lab, VLAN)
    with nodes["ns2"].socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind(("veth2", 3))
        tap.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: the kernel takes the tag out of the frame
        must_ping(nodes["ns1"], "192.168.1.2")
        tap.setblocking(False)
        tags = set()
        with suppress(BlockingIOError):
            while True:
                _, ancillary, _, _ = tap.recvmsg(2000, 64)
                tags.add(int.from_bytes(ancillary[0][2][16:18], "little"))
    assert tags == {5}


def test_missing_kind_of_device_is_named(lab: Lab) -> None:
    with pytest.raises(
        Unavailable, match=r"^ns1: this kernel has no device of type nonsense .*guests of lane vm have it$"
    ):
        make_device(lab.node("ns1"), Device(node="ns1", device="x0", kind="nonsense"))


@pytest.mark.usefixtures("inner_pytest")
def test_examples_of_documentation_pass(pytester: pytest.Pytester) -> None:
    examples = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", MANUAL.read_text(), re.MULTILINE | re.DOTALL))
    pytester.makepyfile(examples)
    run = pytester.runpytest_inprocess("--pair", "refwg~refwg")
    run.stdout.fnmatch_lines(["collected 3 items"])
    # The results of the oracle count as passed, too.
    assert run.ret == 0
    assert set(run.parseoutcomes()) == {"passed"}
