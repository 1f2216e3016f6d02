"""Check nodes and links by the output of `ip` and `nft`, and by the kernel."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from harness import (
    DIRECT,
    LOOPBACK,
    NAT,
    DeadlineExceeded,
    HarnessError,
    ProgramFailed,
    UsageError,
    add_veth,
    must_ping,
    offloads,
    ping,
    set_offloads,
    tcp_stream,
    tcp_streams,
    udp_message,
    udp_receiver,
    wait_for,
)
from harness.net.netns import leftover_nodes
from harness.net.nsid import NsidEvents

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Lab, NetNS, Topology

SIOCETHTOOL = 0x8946
RULES = """\
table inet count {
    counter named { }
    chain input {
        type filter hook input priority 0
        ip protocol icmp icmp type echo-request counter name "named" counter comment "requests"
        ip protocol icmp icmp type timestamp-request counter comment "never"
    }
}
"""


@pytest.fixture
def left(lab: Lab) -> NetNS:
    return lab.node("left")


@pytest.fixture
def right(lab: Lab, left: NetNS) -> NetNS:
    """A node with a link to the left one: 10.0.0.1 -- 10.0.0.2."""
    node = lab.node("right")
    add_veth(left, "to-right", node, "to-left", mtu=1400)
    left.add_address("to-right", "10.0.0.1/24", "fd00:1::1/64")
    node.add_address("to-left", "10.0.0.2/24", "fd00:1::2/64")
    return node


def test_new_node_has_only_loopback_and_name_for_ip_netns(left: NetNS) -> None:
    assert leftover_nodes() == ["left"]
    assert list(left.links()) == ["lo"]
    assert left.links()["lo"]["up"]
    assert [link["ifname"] for link in left.run_json(["ip", "-j", "-n", "left", "link"])] == ["lo"]


@pytest.mark.parametrize("address", ["10.0.0.2", "fd00:1::2"])
def test_linked_nodes_reach_each_other_at_once(left: NetNS, right: NetNS, address: str) -> None:
    assert ping(left, address, count=3).lost == 0
    assert right.links()["to-left"]["rx_bytes"] > 0


def test_new_link_carries_first_frame_in_both_directions(lab: Lab) -> None:
    ends = (lab.node("a"), "veth1"), (lab.node("b"), "veth2")
    frame = b"\xff" * 6 + bytes(6) + b"\x88\xb5" + bytes(46)
    for _ in range(10):
        link = add_veth(*ends[0], *ends[1])
        raw = [node.socket(socket.AF_PACKET, socket.SOCK_RAW) for node, _ in ends]
        for sock, (_, device) in zip(raw, ends, strict=True):
            sock.bind((device, 0x88B5))
            sock.settimeout(1.0)
        with raw[0], raw[1]:
            for sender, receiver in (raw, raw[::-1]):
                sender.send(frame)
                assert receiver.recv(100) == frame
        link.close()


def test_link_properties_match_output_of_ip(left: NetNS, right: NetNS) -> None:
    (shown,) = right.run_json(["ip", "-j", "-d", "link", "show", "to-left"])
    facts = right.links()["to-left"]
    assert (facts["mtu"], facts["kind"], facts["up"]) == (1400, "veth", True)
    assert (shown["mtu"], shown["linkinfo"]["info_kind"], "UP" in shown["flags"]) == (1400, "veth", True)
    assert (shown["ifindex"], left.index("lo")) == (facts["index"], 1)


def test_addresses_are_added_and_deleted(right: NetNS) -> None:
    right.delete_address("to-left", "10.0.0.2/24")
    right.add_address("to-left", "10.9.9.9/32")
    (shown,) = right.run_json(["ip", "-j", "-4", "address", "show", "to-left"])
    assert [(entry["local"], entry["prefixlen"]) for entry in shown["addr_info"]] == [("10.9.9.9", 32)]


def test_routes_and_rules_match_output_of_ip(left: NetNS, right: NetNS) -> None:
    left.add_route("10.7.0.0/16", via="10.0.0.2", metric=7, table=77, mtu=1300)
    left.add_rule(socket.AF_INET, fwmark=5, table=77, priority=99)
    (route,) = left.run_json(["ip", "-j", "route", "show", "table", "77"])
    assert (route["dst"], route["gateway"], route["metric"]) == ("10.7.0.0/16", "10.0.0.2", 7)
    (rule,) = [entry for entry in left.run_json(["ip", "-j", "rule"]) if entry["priority"] == 99]
    assert (rule["fwmark"], rule["table"]) == ("0x5", "77")
    left.delete_rule(socket.AF_INET, fwmark=5, table=77, priority=99)
    assert all(entry["priority"] != 99 for entry in left.run_json(["ip", "-j", "rule"]))
    assert ping(right, "10.0.0.1").lost == 0


@pytest.mark.parametrize(
    ("destination", "words", "shown"),
    [
        ("default", {"via": "10.0.0.2"}, {"dst": "default", "gateway": "10.0.0.2", "protocol": "static"}),
        ("10.8.0.0/16", {"dev": "to-right", "src": "10.0.0.1"}, {"scope": "link", "prefsrc": "10.0.0.1"}),
        ("10.8.0.1", {"dev": "to-right"}, {"dst": "10.8.0.1", "dev": "to-right"}),
        ("default", {"via": "fd00:1::2"}, {"dst": "default", "gateway": "fd00:1::2"}),
        ("fd00:8::/64", {"dev": "to-right", "mtu": 1300}, {"dst": "fd00:8::/64", "metrics": [{"mtu": 1300}]}),
    ],
)
@pytest.mark.usefixtures("right")
def test_added_route_matches_output_of_ip_and_is_deleted(
    left: NetNS, destination: str, words: dict[str, Any], shown: dict[str, Any]
) -> None:
    listing = ["ip", "-j", "-6" if ":" in f"{destination}{words.get('via')}" else "-4", "-d", "route"]
    before = left.run_json(listing)
    left.add_route(destination, **words)
    (route,) = [route for route in left.run_json(listing) if route not in before]
    assert {name: route.get(name) for name in shown} == shown
    left.delete_route(destination, **{name: words[name] for name in words.keys() & {"via", "dev"}})
    assert left.run_json(listing) == before


def test_link_changes_match_output_of_ip(left: NetNS, right: NetNS) -> None:
    left.set_link("to-right", up=False, mtu=1300, name="renamed")
    (shown,) = left.run_json(["ip", "-j", "link", "show", "renamed"])
    assert (shown["mtu"], "UP" in shown["flags"], left.has_link("to-right")) == (1300, False, False)
    left.set_link("renamed", up=True)
    assert "UP" in left.run_json(["ip", "-j", "link", "show", "renamed"])[0]["flags"]
    must_ping(right, "10.0.0.1")


def test_moved_link_keeps_name_and_mtu(left: NetNS, right: NetNS) -> None:
    left.add_link("veth7", kind="veth", peer={"ifname": "veth8"})
    left.set_link("veth7", mtu=1234, name="moved")
    left.move_link("moved", right)
    assert "moved" not in left.links()
    assert right.links()["moved"]["mtu"] == 1234
    right.delete_link("moved")
    assert "moved" not in right.links()
    assert "veth8" not in left.links()


def test_sysctl_is_set_in_one_node_only(left: NetNS, right: NetNS) -> None:
    assert left.sysctl("net.ipv4.ip_forward", 1) == "1"
    assert left.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"
    assert right.sysctl("net.ipv4.ip_forward") == "0"


def test_nft_counters_count_packets(left: NetNS, right: NetNS) -> None:
    right.nft(RULES)
    must_ping(left, "10.0.0.2", count=5)
    assert right.nft_counters() == {"named": 5, "requests": 5, "never": 0}


@pytest.mark.parametrize(("switch", "command"), [("tx", 0x16), ("tso", 0x1E), ("gso", 0x23), ("gro", 0x2B)])
def test_offload_is_switched_and_read(left: NetNS, right: NetNS, switch: str, command: int) -> None:
    assert right.name == "right"
    for on in (False, True, False):
        set_offloads(left, "to-right", **{switch: on})
        assert offloads(left, "to-right")[switch] == ethtool_get(left, "to-right", command) == on


def ethtool_get(node: NetNS, device: str, command: int) -> int:
    """Return the state of one offload by the ETHTOOL_G... command of this number."""
    value = array.array("B", struct.pack("II", command, 99))
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP16x", device.encode(), value.buffer_info()[0]))
    return int(struct.unpack("II", value)[1])


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda node: node.index("eth7"), UsageError, "left: no device eth7; there are: lo"),
        (lambda node: node.add_address("lo", "10.0.0.1"), UsageError, "left: address '10.0.0.1': want ADDRESS/LENGTH"),
        (lambda node: node.add_address("lo", "10.0.0.1/99"), HarnessError, "left: ip address add 10.0.0.1/99 dev lo: "),
        (lambda node: node.set_link("lo", mtu=-1), HarnessError, "left: ip link set lo: Invalid argument"),
        (lambda node: node.add_link("lo", kind="veth"), HarnessError, "left: ip link add lo type veth: File exists"),
        (lambda node: node.add_link("x", kind="nope"), HarnessError, "left: ip link add x type nope: "),
        (
            lambda node: node.add_route("10.0.0.0/8", via="10.0.0.1"),
            HarnessError,
            "left: ip route add 10.0.0.0/8 via 10.0.0.1: Network is unreachable (Nexthop has invalid gateway)",
        ),
        (
            lambda node: [node.set_nsid(node, nsid) for nsid in (7, 8)],
            HarnessError,
            "left: ip netns set left 8: File exists",
        ),
        (lambda node: node.sysctl("net.no.such"), HarnessError, "left: sysctl net.no.such: No such file or directory"),
        (lambda node: node.nft("nonsense"), ProgramFailed, "left: nft -f -: status 1: "),
        (lambda node: type(node)("left"), UsageError, "node 'left' already exists"),
    ],
)  # fmt: skip
def test_error_message_names_node_and_object(
    left: NetNS, mistake: Callable[[NetNS], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as refusal:
        mistake(left)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("topology", [LOOPBACK, NAT, DIRECT], ids=lambda topology: str(topology.name))
def test_topology_is_built_as_declared(lab: Lab, topology: Topology) -> None:
    nodes = topology.build(lab)
    assert leftover_nodes() == sorted(topology.nodes)
    for end in (end for link in topology.links for end in link):
        (shown,) = nodes[end.node].run_json(["ip", "-j", "-4", "address", "show", end.device]) or [{"addr_info": []}]
        assert [f"{entry['local']}/{entry['prefixlen']}" for entry in shown["addr_info"]] == list(end.addresses)
    assert (lab.directory / "topology.txt").read_text() == topology.drawing


def test_nat_translates_source_and_counts_it(lab: Lab) -> None:
    nodes = NAT.build(lab)
    with udp_receiver(nodes["ns2"], "10.0.0.100", 5000) as receiver:
        udp_message(nodes["ns1"], "10.0.0.100", 5000, b"out")
        receiver.settimeout(5)
        assert receiver.recvfrom(10)[1][0] == "10.0.0.1"
    assert nodes["ns0"].nft_counters() == {"snat": 1}


@pytest.mark.parametrize("count", [1, 3])
def test_corrupted_stream_is_reported_with_byte_position(lab: Lab, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    node = lab.node("here")
    # Replaces the bytes that sendfile(2) would send.
    monkeypatch.setattr(os, "sendfile", lambda out, _file, _at, length: os.write(out, bytes(length)))
    with pytest.raises(HarnessError, match=r"^tcp here to here 127\.0\.0\.1: byte \d arrived as 0x00, not 0x"):
        tcp_streams(node, node, "127.0.0.1", count=count)


def test_stream_to_closed_port_is_reported_as_refused(lab: Lab) -> None:
    here, there = lab.node("here"), lab.node("there")
    with pytest.raises(HarnessError, match=r"^tcp here to there 127\.0\.0\.1: Connection refused after 0 bytes"):
        tcp_stream(here, there, "127.0.0.1")


def test_timed_out_stream_reports_progress_and_retransmits(left: NetNS, right: NetNS) -> None:
    right.nft("table inet cut {\nchain input {\ntype filter hook input priority 0\ntcp flags psh drop\n}\n}\n")
    tried = (
        r"stream 0: 0 bytes; retransmission timeout \d+ ms after [1-9]\d* unanswered retransmissions, "
        r"congestion window 1 segments"
    )
    with pytest.raises(DeadlineExceeded, match=r"0 of 1 streams and 0 of 100 bytes arrived within \d s; " + tried):
        tcp_stream(left, right, "10.0.0.2", size=100, deadline=1.0)


def test_node_uses_reno_congestion_control(left: NetNS) -> None:
    with left.socket(socket.AF_INET, socket.SOCK_STREAM) as stream:
        name = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    assert name.rstrip(b"\0") == b"reno"


@pytest.mark.parametrize("awaited", [("one",), ("one", "two")])
def test_departure_of_all_awaited_namespaces_is_reported(lab: Lab, awaited: tuple[str, ...]) -> None:
    nodes = {name: lab.node(name) for name in ("watcher", "one", "two")}
    with NsidEvents(nodes["watcher"], *(nodes[name] for name in awaited)) as events:
        nodes["one"].close()
        if awaited == ("one", "two"):
            with pytest.raises(DeadlineExceeded, match=r"seen: still there: two$"):
                wait_for(events, 0.5, "both to vanish")
            nodes["two"].close()
        assert wait_for(events, 5.0, "all to vanish")
