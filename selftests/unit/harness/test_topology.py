"""Check topologies: a mistake is reported before anything is created."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.lab.devices import Device, PolicyRule, Queue
from harness.lab.networks import NETWORKS
from harness.lab.topology import DIRECT, LINK_LOCAL, LOOPBACK, NAT, End, Route, Topology
from harness.vm.kernels import CATALOGUE

ROOT = Path(__file__).parents[3]
NODES = ("ns1", "ns2")
BRIDGE = Device(node="ns1", device="br0", kind="bridge")
# By kind of device or queue: the module of lane vm's guests, and the option of a kernel of one's own.
KINDS = {
    "bond": ("bonding", "CONFIG_BONDING"),
    "bridge": ("bridge", "CONFIG_BRIDGE"),
    "tbf": ("sch_tbf", "CONFIG_NET_SCH_TBF"),
    "vlan": ("8021q", "CONFIG_VLAN_8021Q"),
    "vrf": ("vrf", "CONFIG_NET_VRF"),
}
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
        ({"rules": (PolicyRule(node="ns4", fwmark=1, table=1),)}, "no node ns4; there are: ns1, ns2"),
        ({"queues": (Queue(node="ns4", device="veth1", kind="tbf"),)}, "no node ns4; there are: ns1, ns2"),
        ({"devices": (Device(node="ns4", device="br0", kind="bridge"),)}, "no node ns4; there are: ns1, ns2"),
        ({"queues": (Queue(node="ns1", device="veth9", kind="tbf"),)}, "node ns1 has no device veth9"),
        ({"devices": (BRIDGE, BRIDGE)}, "node ns1 has two devices br0"),
        ({"devices": (replace(BRIDGE, members=("veth9",)),)}, "node ns1 has no device veth9"),
        ({"devices": (replace(BRIDGE, parent="veth9"),)}, "node ns1 has no device veth9"),
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


@pytest.mark.parametrize("topology", [LOOPBACK, NAT, DIRECT, LINK_LOCAL, *NETWORKS], ids=lambda topology: topology.name)
def test_drawing_shows_every_node_device_and_address(topology: Topology) -> None:
    made = [(end.device, *end.addresses) for link in topology.links for end in link]
    made += [(device.device, *device.addresses) for device in topology.devices]
    shown = [*topology.nodes, *(text for texts in made for text in texts)]
    assert [name for name in shown if name not in topology.drawing] == []


def test_text_of_topology_is_its_drawing() -> None:
    assert (str(NAT), repr(NAT)) == (NAT.drawing, "topology nat")


def test_names_of_networks_are_distinct() -> None:
    names = [topology.name for topology in NETWORKS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("topology", NETWORKS, ids=lambda topology: topology.name)
def test_documentation_has_drawing_of_each_network(topology: Topology) -> None:
    text = (ROOT / "docs" / "networks.md").read_text()
    assert f"`{topology.name}`" in text
    assert topology.drawing in text


def test_guests_have_all_kinds_of_devices_and_queues() -> None:
    kinds = {device.kind for topology in NETWORKS for device in topology.devices}
    kinds |= {queue.kind for topology in NETWORKS for queue in topology.queues}
    assert kinds == KINDS.keys()
    options = (ROOT / "harness" / "vm" / "kernel.config").read_text().splitlines()
    lacking = [row for row in KINDS.values() if row[0] not in CATALOGUE.modules.wanted or f"{row[1]}=y" not in options]
    assert lacking == []
