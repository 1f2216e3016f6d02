"""Make what a topology has besides veth pairs: bridges, bonds, VLANs, VRFs, queues, rules.

pyroute2 makes the devices and queues, with its own names for their options. A kernel may lack a kind of them; then
Unavailable says which one.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.net.iproute import needs_kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.net.iproute import NodeIPRoute
    from harness.net.netns import NetNS


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of a node that is not an end of a veth pair, as in `ip link add DEVICE type KIND OPTIONS`.

    members: devices of the node that become its ports (bridge, bond, vrf). parent: the device below a VLAN. options:
    in pyroute2's words, such as {"vlan_id": 5}. addresses: ADDRESS/LENGTH.
    """

    node: str
    device: str
    kind: str
    members: tuple[str, ...] = ()
    parent: str | None = None
    options: Mapping[str, int] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A queueing discipline of a device, as in `tc qdisc add dev DEVICE root KIND OPTIONS`; options: pyroute2's."""

    node: str
    device: str
    kind: str
    options: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """A policy rule of a node for IPv4: datagrams with this firewall mark use this routing table."""

    node: str
    fwmark: int
    table: int


def make_device(node: NetNS, wanted: Device) -> None:
    """Create a device, give it its members, and set it up; raises Unavailable if the kernel lacks this kind."""
    words = dict(wanted.options)
    if wanted.parent is not None:
        words["link"] = node.index(wanted.parent)
    with node.iproute() as ip:
        with needs_kind(node.name, f"device of type {wanted.kind}"):
            ip.link("add", ifname=wanted.device, kind=wanted.kind, **words)
        index = node.index(wanted.device)
        if wanted.kind == "bond":
            # bond_enslave refuses no member that is up, but ip-link(8)'s way is to add it down; the bond sets it up.
            _add_members(node, ip, wanted, index, state="down")
            node.set_link(wanted.device, up=True)
        else:
            # A bridge forwards at once for ports that it gets when it is up.
            node.set_link(wanted.device, up=True)
            _add_members(node, ip, wanted, index)
    node.add_address(wanted.device, *wanted.addresses)


def make_queue(node: NetNS, wanted: Queue) -> None:
    """Give a device a queueing discipline; raises Unavailable if the kernel lacks this kind."""
    with node.iproute() as ip, needs_kind(node.name, f"queueing discipline {wanted.kind}"):
        ip.tc("add", wanted.kind, node.index(wanted.device), **wanted.options)


def make_rule(node: NetNS, wanted: PolicyRule) -> None:
    """Add a policy rule for IPv4."""
    node.add_rule(socket.AF_INET, fwmark=wanted.fwmark, table=wanted.table)


def _add_members(node: NetNS, ip: NodeIPRoute, wanted: Device, index: int, **changes: str) -> None:
    for member in wanted.members:
        if changes:
            ip.link("set", index=node.index(member), **changes)
        ip.link("set", index=node.index(member), master=index)
