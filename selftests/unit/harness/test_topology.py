"""Check topologies: a mistake is reported before anything is created."""

from __future__ import annotations

from typing import Any

import pytest

from harness.errors import UsageError
from harness.lab.topology import DIRECT, LINK_LOCAL, LOOPBACK, NAT, End, Route, Topology

NODES = ("ns1", "ns2")
LINK = (End("ns1", "veth1"), End("ns2", "veth2"))


def make(**changes: Any) -> Topology:
    return Topology(name="mine", drawing="", **{"nodes": NODES} | changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"nodes": ("ns1", "ns2", "ns1")}, "two nodes have the same name: ns1, ns2, ns1"),
        ({"nodes": ("ns1",)}, "no node ns2; there are: ns1"),
        ({"birth": ("ns0", "ns2")}, "no node ns0; there are: ns1, ns2"),
        ({"place": ("ns1", "ns9")}, "no node ns9; there are: ns1, ns2"),
        ({"links": ((End("ns1", "veth1"), End("ns3", "veth2")),)}, "no node ns3; there are: ns1, ns2"),
        ({"routes": (Route("ns4", "default", "10.0.0.1"),)}, "no node ns4; there are: ns1, ns2"),
        ({"sysctls": {"ns5": {}}}, "no node ns5; there are: ns1, ns2"),
        ({"firewall": {"ns6": ""}}, "no node ns6; there are: ns1, ns2"),
        ({"links": (LINK, LINK)}, "node ns1 has two devices veth1"),
        ({"links": ((End("ns1", "v"), End("ns1", "v")),)}, "node ns1 has two devices v"),
        (
            {"endpoint_of_a": "10.0.0.1%eth0:1"},
            "endpoint_of_a: endpoint '10.0.0.1%eth0:1': an IPv4 address has no scope",
        ),
        (
            {"links": (LINK,), "endpoint_of_b": "[fe80::2%veth9]:2"},
            "endpoint_of_b [fe80::2%veth9]:2: node ns1 has no device veth9; it has: veth1, lo",
        ),
    ],
)
def test_bad_topology_is_refused_in_one_line(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        make(**changes)
    assert str(refusal.value) == f"topology mine: {complaint}"


def test_same_device_name_in_two_nodes_is_accepted() -> None:
    assert make(links=((End("ns1", "veth"), End("ns2", "veth")),)).links


@pytest.mark.parametrize("topology", [LOOPBACK, NAT, DIRECT, LINK_LOCAL], ids=lambda topology: str(topology.name))
def test_drawing_shows_every_node_device_and_address(topology: Topology) -> None:
    ends = [end for link in topology.links for end in link]
    shown = [*topology.nodes, *(end.device for end in ends), *(a for end in ends for a in end.addresses)]
    assert [name for name in shown if name not in topology.drawing] == []
