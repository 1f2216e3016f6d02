"""Define topologies as records: nodes, links, and where the interfaces under test are.

LOOPBACK, NAT and DIRECT are those of the kernel's netns.sh; networks.py has those of the world outside. Your own
topology is another such record, with a `drawing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.control.records import Endpoint
from harness.errors import UsageError
from harness.lab.devices import make_device, make_queue, make_rule
from harness.net.veth import add_veth

if TYPE_CHECKING:
    from harness.lab.devices import Device, PolicyRule, Queue
    from harness.lab.lab import Lab
    from harness.net.netns import NetNS


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link: its node, its device and its addresses (ADDRESS/LENGTH). mtu: bytes, None: the kernel's."""

    node: str
    device: str
    addresses: tuple[str, ...] = ()
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A route of a node, as in `ip route add DESTINATION via VIA table TABLE`; table None: main."""

    node: str
    destination: str
    via: str
    table: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Nodes with links and wires between them, and the nodes of A and B.

    devices: bridges, bonds, VLANs and VRFs, in the order of creation. queues: rate limits. birth: the nodes where A and
    B are created, which keep their sockets; place: the nodes that their links move to.
    sysctls: per node, set first. firewall: per node, a ruleset for nft(8). endpoint_of_a, endpoint_of_b: the endpoint
    that the other side gets at first; None if only this side can begin. The scope of a link-local one names a device of
    the other side's birth node.
    """

    name: str
    drawing: str
    nodes: tuple[str, ...]
    links: tuple[tuple[End, End], ...] = ()
    wires: tuple[tuple[End, End], ...] = ()
    devices: tuple[Device, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[PolicyRule, ...] = ()
    queues: tuple[Queue, ...] = ()
    sysctls: dict[str, dict[str, int]] = field(default_factory=dict)
    firewall: dict[str, str] = field(default_factory=dict)
    birth: tuple[str, str] = ("ns1", "ns2")
    place: tuple[str, str] = ("ns1", "ns2")
    endpoint_of_a: str | None = None
    endpoint_of_b: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown node or device, and for two nodes, or devices of a node, of one name."""
        if len(set(self.nodes)) != len(self.nodes):
            raise UsageError(f"topology {self.name}: two nodes have the same name: {', '.join(self.nodes)}")
        ends = [end for link in (*self.links, *self.wires) for end in link]
        named = [end.node for end in ends] + [made.node for made in self.devices]
        named += [route.node for route in self.routes]
        named += [rule.node for rule in self.rules] + [queue.node for queue in self.queues]
        for node in (*named, *self.sysctls, *self.firewall, *self.birth, *self.place):
            if node not in self.nodes:
                raise UsageError(f"topology {self.name}: no node {node}; there are: {', '.join(self.nodes)}")
        devices = [(end.node, end.device) for end in ends] + [(made.node, made.device) for made in self.devices]
        for node, device in devices:
            if devices.count((node, device)) > 1:
                raise UsageError(f"topology {self.name}: node {node} has two devices {device}")
        used = [(queue.node, queue.device) for queue in self.queues]
        used += [(made.node, name) for made in self.devices for name in (*made.members, made.parent) if name]
        for node, device in used:
            if (node, device) not in devices:
                raise UsageError(f"topology {self.name}: node {node} has no device {device}")
        for name, other in (("endpoint_of_a", self.birth[1]), ("endpoint_of_b", self.birth[0])):
            self._require_endpoint(name, [device for node, device in devices if node == other] + ["lo"], other)

    def _require_endpoint(self, name: str, devices: list[str], node: str) -> None:
        """Raise UsageError for a malformed endpoint, or a scope that is not a device of the node that gets it."""
        text = getattr(self, name)
        if text is None:
            return
        try:
            scope = Endpoint.parse(text).scope
        except UsageError as error:
            raise UsageError(f"topology {self.name}: {name}: {error}") from error
        if isinstance(scope, str) and scope not in devices:
            known = ", ".join(devices)
            raise UsageError(f"topology {self.name}: {name} {text}: node {node} has no device {scope}; it has: {known}")

    def __repr__(self) -> str:
        return f"topology {self.name}"

    def __str__(self) -> str:
        """The drawing."""
        return self.drawing

    def build(self, lab: Lab) -> dict[str, NetNS]:
        """Create all of it in a lab; returns the nodes by name.

        Raises Unavailable if the kernel lacks a kind of device or queue.
        """
        lab.note("topology.txt", str(self))
        nodes = {name: lab.node(name) for name in self.nodes}
        for name, values in self.sysctls.items():
            for key, value in values.items():
                nodes[name].sysctl(key, value)
        self._connect(lab, nodes)
        for route in self.routes:
            nodes[route.node].add_route(route.destination, via=route.via, table=route.table)
        for rule in self.rules:
            make_rule(nodes[rule.node], rule)
        for queue in self.queues:
            make_queue(nodes[queue.node], queue)
        for name, rules in self.firewall.items():
            nodes[name].nft(rules)
        return nodes

    def _connect(self, lab: Lab, nodes: dict[str, NetNS]) -> None:
        for a, b in self.links:
            add_veth(nodes[a.node], a.device, nodes[b.node], b.device)
            lab.capture(nodes[a.node], a.device, far=nodes[b.node])
        for a, b in self.wires:
            lab.wire((nodes[a.node], a.device), (nodes[b.node], b.device))
        # Before the addresses: a VRF removes the routes of a device that becomes its member.
        for device in self.devices:
            make_device(nodes[device.node], device)
        for end in (end for link in (*self.links, *self.wires) for end in link):
            # A value of `conf.all` is not copied to a device that exists already.
            for key, value in self.sysctls.get(end.node, {}).items():
                if ".conf.all." in key:
                    nodes[end.node].sysctl(key.replace(".all.", f".{end.device}."), value)
            if end.mtu is not None:
                nodes[end.node].set_link(end.device, mtu=end.mtu)
            nodes[end.node].add_address(end.device, *end.addresses)
        # If the sockets of both are in one node, their traffic passes its loopback device.
        if self.birth[0] == self.birth[1]:
            lab.capture(nodes[self.birth[0]], "lo")


LOOPBACK: Final = Topology(
    name="loopback",
    drawing="""\
   ns1              ns0              ns2
  +-----+        +--------+        +-----+
  | wg0 |........| lo  up |........| wg0 |
  +-----+        +--------+        +-----+
     A    UDP sockets of both       B
          live in ns0, where the
          interfaces were born;
          ns1 and ns2 have no other way out

  A 127.0.0.1:1 [::1]:1              B 127.0.0.1:2 [::1]:2
""",
    nodes=("ns0", "ns1", "ns2"),
    birth=("ns0", "ns0"),
    endpoint_of_a="127.0.0.1:1",
    endpoint_of_b="127.0.0.1:2",
)

NAT: Final = Topology(
    name="nat",
    drawing="""\
   ns1 (A)                     ns0                        ns2 (B)
  +------------------+      +---------------------+      +----------------+
  | wg0              |      | forwards IPv4       |      |            wg0 |
  | vethc            |------| vethrc       vethrs |------| veths          |
  | 192.168.1.100/24 |      | 192.168.1.1/24      |      | 10.0.0.100/24  |
  | default via .1.1 |      |         10.0.0.1/24 |      |                |
  +------------------+      +---------------------+      +----------------+
                 192.168.1.0/24 to 10.0.0.0/24 leaves as 10.0.0.1;
                 UDP mappings live 2 s
""",
    nodes=("ns0", "ns1", "ns2"),
    links=(
        (End("ns1", "vethc", ("192.168.1.100/24",)), End("ns0", "vethrc", ("192.168.1.1/24",))),
        (End("ns0", "vethrs", ("10.0.0.1/24",)), End("ns2", "veths", ("10.0.0.100/24",))),
    ),
    routes=(Route("ns1", "default", "192.168.1.1"),),
    sysctls={
        "ns0": {
            "net.ipv4.ip_forward": 1,
            "net.netfilter.nf_conntrack_udp_timeout": 2,
            "net.netfilter.nf_conntrack_udp_timeout_stream": 2,
        }
    },
    firewall={
        "ns0": """\
table ip nat {
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 192.168.1.0/24 ip daddr 10.0.0.0/24 counter snat to 10.0.0.1 comment "snat"
    }
}
"""
    },
    endpoint_of_b="10.0.0.100:2",
)

DIRECT: Final = Topology(
    name="direct",
    drawing="""\
   ns1 (A)                ns2 (B)
  +------------+         +------------+
  | wg0        |         |        wg0 |
  | veth1      |---------|      veth2 |
  +------------+         +------------+
     no IPv6 duplicate address detection; addresses are each scenario's own;
     when veth1 loses an address, its other addresses stay
""",
    nodes=("ns1", "ns2"),
    links=((End("ns1", "veth1"), End("ns2", "veth2")),),
    sysctls={
        "ns1": {"net.ipv6.conf.all.accept_dad": 0, "net.ipv4.conf.all.promote_secondaries": 1},
        "ns2": {"net.ipv6.conf.all.accept_dad": 0},
    },
)

WIRED: Final = Topology(
    name="wired",
    drawing="""\
   ns1 (A)                            wire0                       ns2 (B)
  +----------------+             +--------------+            +----------------+
  | wg0            |             | carries what |            |            wg0 |
  | veth1          |-------------| the script   |------------| veth2          |
  | 192.168.1.1/24 |             | lets through |            | 192.168.1.2/24 |
  | fd00:aa::1/96  |             +--------------+            | fd00:aa::2/96  |
  +----------------+                                         +----------------+
""",
    nodes=("ns1", "ns2"),
    wires=(
        (
            End("ns1", "veth1", ("192.168.1.1/24", "fd00:aa::1/96")),
            End("ns2", "veth2", ("192.168.1.2/24", "fd00:aa::2/96")),
        ),
    ),
    endpoint_of_a="192.168.1.1:1",
    endpoint_of_b="192.168.1.2:2",
)

LINK_LOCAL: Final = Topology(
    name="link-local",
    drawing="""\
   ns1 (A)                   ns2 (B)
  +---------------+         +---------------+
  | wg0           |         |           wg0 |
  | veth1         |---------|         veth2 |
  | fe80::1/64    |         |    fe80::2/64 |
  | veth3         |---------|         veth4 |
  | fe80::1/64    |         |    fe80::2/64 |
  +---------------+         +---------------+
     both links have the same addresses, so only
     the scope of an endpoint says which link to take
""",
    nodes=("ns1", "ns2"),
    links=(
        (End("ns1", "veth1", ("fe80::1/64",)), End("ns2", "veth2", ("fe80::2/64",))),
        (End("ns1", "veth3", ("fe80::1/64",)), End("ns2", "veth4", ("fe80::2/64",))),
    ),
    # IN6_ADDR_GEN_MODE_NONE: the kernel adds no link-local address of its own.
    sysctls={
        node: {"net.ipv6.conf.all.accept_dad": 0, "net.ipv6.conf.default.addr_gen_mode": 1} for node in ("ns1", "ns2")
    },
    endpoint_of_a="[fe80::1%veth2]:1",
    endpoint_of_b="[fe80::2%veth1]:2",
)
