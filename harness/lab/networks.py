"""Define topologies of real networks: NATs, firewalls, bridges, slow and narrow paths.

Each is a record with a drawing, as in topology.py. The words for what a NAT does are those of RFC 4787: mapping is
which outer port an inner one gets, filtering is which datagrams from outside a mapping lets in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from harness.lab.devices import Device, PolicyRule, Queue
from harness.lab.topology import End, Route, Topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.net.netns import NetNS

# Seconds that a NAT or a firewall keeps a UDP mapping without traffic.
MAPPING_LIFETIME: Final = 30
# Bytes: the smallest MTU of IPv6 (RFC 8200, 5).
NARROW_MTU: Final = 1280
# Of the rate-limited path, in bits per second.
RATE: Final = 8_000_000
# The mark and the routing table of A's underlay in topology `vrf`.
VRF_MARK: Final = 0x51
VRF_TABLE: Final = 10

_ROUTER: Final = {
    "net.ipv4.ip_forward": 1,
    "net.netfilter.nf_conntrack_udp_timeout": MAPPING_LIFETIME,
    "net.netfilter.nf_conntrack_udp_timeout_stream": MAPPING_LIFETIME,
}
# While its link-local address is checked for duplicates, a router cannot look for neighbours.
_NO_DAD: Final = {"net.ipv6.conf.all.accept_dad": 0, "net.ipv6.conf.default.accept_dad": 0}
_FORWARDING: Final = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1, **_NO_DAD}
# The set of RFC 4787's "address-dependent filtering": which inner port has sent to which host.
_CONTACTED: Final = f"""\
    set contacted {{
        type inet_service . ipv4_addr
        flags dynamic,timeout
        size 1024
        timeout {MAPPING_LIFETIME}s
    }}
    chain remember {{
        type filter hook postrouting priority mangle
        oifname "vethrs" meta l4proto udp update @contacted {{ udp sport . ip daddr }}
    }}
"""


def nat_rules(mapping: str, *, inbound: str = "", more: str = "", outside: str = "vethrs") -> str:
    """Return the ruleset of a NAT, for nft(8).

    mapping: the statement for datagrams that leave. inbound: a rule for datagrams from outside that have no mapping,
    such as `dnat to ...`. more: sets and chains. outside: the outer device. Counter `opened` has how many mappings
    were made, and `refused` how many datagrams from outside were dropped.
    """
    # A refused datagram is dropped before it has an entry in connection tracking. With an entry it would take the port
    # that a later mapping needs, and the kernel would map to another one.
    return f"""\
table ip nat {{
{more}    chain postrouting {{
        type nat hook postrouting priority srcnat
        oifname "{outside}" meta l4proto udp counter {mapping} comment "opened"
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat
        {inbound}
    }}
    chain input {{
        type filter hook input priority filter
        iifname "{outside}" meta l4proto udp counter drop comment "refused"
    }}
}}
"""


# Linux keeps a port that is free, whatever the destination, and lets in what belongs to a flow.
KEEPS_PORTS: Final = "snat to 10.0.0.1"
# Each flow, that is each destination, gets a port of its own.
RANDOM_PORTS: Final = "snat to 10.0.0.1:1024-65535 fully-random"


def expire_mappings(topology: Topology, nodes: Mapping[str, NetNS]) -> None:
    """Delete what NATs and firewalls remember of all flows, as when MAPPING_LIFETIME has passed without traffic."""
    for name, rules in topology.firewall.items():
        nodes[name].forget_connections()
        if "set contacted" in rules:
            nodes[name].nft("flush set ip nat contacted")


def _nat(name: str, says: str, rules: str, *, outer: tuple[str, ...] = ("10.0.0.1/24",)) -> Topology:
    """Make a topology with A behind a NAT; says: what the NAT does, for the drawing; outer: the NAT's addresses."""
    return Topology(
        name=name,
        drawing=f"""\
   ns1 (A)                      ns0 (NAT)                     ns2 (B)
  +------------------+      +----------------------+      +----------------+
  | wg0              |      |                      |      |            wg0 |
  | vethc            |------| vethrc        vethrs |------| veths          |
  | 192.168.1.100/24 |      | 192.168.1.1/24       |      | 10.0.0.100/24  |
  | default via .1.1 |      | {" ".join(outer):>20} |      | 10.0.0.101/24  |
  +------------------+      +----------------------+      +----------------+
{says}""",
        nodes=("ns0", "ns1", "ns2"),
        links=(
            (End("ns1", "vethc", ("192.168.1.100/24",)), End("ns0", "vethrc", ("192.168.1.1/24",))),
            (End("ns0", "vethrs", outer), End("ns2", "veths", ("10.0.0.100/24", "10.0.0.101/24"))),
        ),
        routes=(Route("ns1", "default", "192.168.1.1"),),
        sysctls={"ns0": _ROUTER},
        firewall={"ns0": rules},
        endpoint_of_b="10.0.0.100:2",
    )


FULL_CONE: Final = _nat(
    "nat-full-cone",
    """\
     mapping: endpoint-independent, port kept: 192.168.1.100:P leaves as 10.0.0.1:P
     filtering: endpoint-independent: what anybody sends to 10.0.0.1:P goes to 192.168.1.100:P
""",
    nat_rules(KEEPS_PORTS, inbound='iifname "vethrs" meta l4proto udp dnat to 192.168.1.100'),
)
ADDRESS_RESTRICTED: Final = _nat(
    "nat-address-restricted",
    """\
     mapping: endpoint-independent, port kept: 192.168.1.100:P leaves as 10.0.0.1:P
     filtering: address-dependent: 10.0.0.1:P takes datagrams from hosts that port P has sent to in the last 30 s
""",
    nat_rules(
        KEEPS_PORTS,
        inbound='iifname "vethrs" udp dport . ip saddr @contacted dnat to 192.168.1.100',
        more=_CONTACTED,
    ),
)
PORT_RESTRICTED: Final = _nat(
    "nat-port-restricted",
    """\
     mapping: endpoint-independent, port kept: 192.168.1.100:P leaves as 10.0.0.1:P
     filtering: address and port-dependent: 10.0.0.1:P takes answers only, until 30 s after the last datagram
""",
    nat_rules(KEEPS_PORTS),
)
SYMMETRIC: Final = _nat(
    "nat-symmetric",
    """\
     mapping: address and port-dependent: 192.168.1.100:P leaves as 10.0.0.1 with a random port for each destination
     filtering: address and port-dependent: that port takes answers only, until 30 s after the last datagram
""",
    nat_rules(RANDOM_PORTS),
)
ONE_TO_ONE: Final = _nat(
    "nat-one-to-one",
    """\
     10.0.0.50 stands for 192.168.1.100 in both directions, with all ports;
     mapping and filtering: endpoint-independent
""",
    nat_rules("snat to 10.0.0.50", inbound='iifname "vethrs" ip daddr 10.0.0.50 dnat to 192.168.1.100'),
    outer=("10.0.0.50/24",),
)

DOUBLE: Final = Topology(
    name="nat-double",
    drawing="""\
   ns1 (A)                 home (NAT)              ns0 (carrier's NAT)          ns2 (B)
  +------------------+    +------------------+    +-----------------------+    +---------------+
  | wg0              |    |                  |    |                       |    |           wg0 |
  | vethc            |----| vethh      vethu |----| vethrc         vethrs |----| veths         |
  | 192.168.1.100/24 |    | 192.168.1.1/24   |    | 100.64.0.1/24         |    | 10.0.0.100/24 |
  | default via .1.1 |    |    100.64.0.2/24 |    |           10.0.0.1/24 |    | 10.0.0.101/24 |
  +------------------+    +------------------+    +-----------------------+    +---------------+
     192.168.1.100:P leaves home as 100.64.0.2:P, and the carrier as 10.0.0.1:P;
     mapping: endpoint-independent; filtering: address and port-dependent, in both
""",
    nodes=("ns0", "home", "ns1", "ns2"),
    links=(
        (End("ns1", "vethc", ("192.168.1.100/24",)), End("home", "vethh", ("192.168.1.1/24",))),
        (End("home", "vethu", ("100.64.0.2/24",)), End("ns0", "vethrc", ("100.64.0.1/24",))),
        (End("ns0", "vethrs", ("10.0.0.1/24",)), End("ns2", "veths", ("10.0.0.100/24", "10.0.0.101/24"))),
    ),
    routes=(Route("ns1", "default", "192.168.1.1"), Route("home", "default", "100.64.0.1")),
    sysctls={"ns0": _ROUTER, "home": _ROUTER},
    firewall={"home": nat_rules("snat to 100.64.0.2", outside="vethu"), "ns0": nat_rules(KEEPS_PORTS)},
    endpoint_of_b="10.0.0.100:2",
)


def _both(name: str, says: str, mapping_a: str, mapping_b: str) -> Topology:
    """Make a topology with A and B behind a NAT each."""
    return Topology(
        name=name,
        drawing=f"""\
   ns1 (A)                 nat1                      nat2                    ns2 (B)
  +------------------+    +-----------------+      +-----------------+    +------------------+
  | wg0              |    |                 |      |                 |    |              wg0 |
  | vethc            |----| vethl     veth1 |------| veth2     vethr |----| veths            |
  | 192.168.1.100/24 |    | 192.168.1.1/24  |      |  192.168.2.1/24 |    | 192.168.2.100/24 |
  | default via .1.1 |    |     10.0.0.1/24 |      | 10.0.0.2/24     |    | default via .2.1 |
  +------------------+    +-----------------+      +-----------------+    +------------------+
{says}""",
        nodes=("ns1", "nat1", "nat2", "ns2"),
        links=(
            (End("ns1", "vethc", ("192.168.1.100/24",)), End("nat1", "vethl", ("192.168.1.1/24",))),
            (End("nat1", "veth1", ("10.0.0.1/24",)), End("nat2", "veth2", ("10.0.0.2/24",))),
            (End("ns2", "veths", ("192.168.2.100/24",)), End("nat2", "vethr", ("192.168.2.1/24",))),
        ),
        routes=(Route("ns1", "default", "192.168.1.1"), Route("ns2", "default", "192.168.2.1")),
        sysctls={"nat1": _ROUTER, "nat2": _ROUTER},
        firewall={"nat1": nat_rules(mapping_a, outside="veth1"), "nat2": nat_rules(mapping_b, outside="veth2")},
        endpoint_of_a="10.0.0.1:1",
        endpoint_of_b="10.0.0.2:2",
    )


BOTH_SIDES: Final = _both(
    "nat-both-sides",
    """\
     A leaves as 10.0.0.1:1, B as 10.0.0.2:2; each NAT takes answers only. Each side has the other's outer endpoint,
     so they meet when both send: the first datagram of a side is refused, but lets the other's in
""",
    "snat to 10.0.0.1",
    "snat to 10.0.0.2",
)
BOTH_SYMMETRIC: Final = _both(
    "nat-both-symmetric",
    """\
     A and B leave with a random port for each destination, and each NAT takes answers only. No port that one side
     could name is the port that the other's datagrams come from, so no datagram ever arrives
""",
    RANDOM_PORTS,
    RANDOM_PORTS.replace("10.0.0.1", "10.0.0.2"),
)
BOTH_UNKNOWN: Final = replace(
    _both(
        "nat-both-unknown",
        """\
     as nat-both-sides, but neither side has an endpoint of the other: nobody can begin
""",
        "snat to 10.0.0.1",
        "snat to 10.0.0.2",
    ),
    endpoint_of_a=None,
    endpoint_of_b=None,
)


def _one_nat(name: str, says: str, rules: str) -> Topology:
    """Make a topology with A and B behind the same NAT, which forwards a port to each."""
    return Topology(
        name=name,
        drawing=f"""\
   ns1 (A)                  ns0 (NAT)                ns2 (B)
  +------------------+    +-------------------+    +------------------+
  | wg0              |    | 192.168.1.1/24    |    |              wg0 |
  | vethc            |----| vethrc     vethrb |----| vethb            |
  | 192.168.1.100/24 |    |    192.168.2.1/24 |    | 192.168.2.100/24 |
  | default via .1.1 |    |      vethrs       |    | default via .2.1 |
  +------------------+    +--------+----------+    +------------------+
                                   | 10.0.0.1/24
                                   |
                                   | veths 10.0.0.100/24
                                  ns3 (the Internet)
{says}""",
        nodes=("ns0", "ns1", "ns2", "ns3"),
        links=(
            (End("ns1", "vethc", ("192.168.1.100/24",)), End("ns0", "vethrc", ("192.168.1.1/24",))),
            (End("ns0", "vethrs", ("10.0.0.1/24",)), End("ns3", "veths", ("10.0.0.100/24",))),
            (End("ns0", "vethrb", ("192.168.2.1/24",)), End("ns2", "vethb", ("192.168.2.100/24",))),
        ),
        routes=(Route("ns1", "default", "192.168.1.1"), Route("ns2", "default", "192.168.2.1")),
        sysctls={"ns0": _ROUTER},
        firewall={"ns0": rules},
        endpoint_of_a="10.0.0.1:1",
        endpoint_of_b="10.0.0.1:2",
    )


def _port_forwards(*, hairpin: bool) -> str:
    """Return a ruleset that forwards 10.0.0.1:1 to A and 10.0.0.1:2 to B; hairpin: for datagrams from inside too."""
    arriving = "" if hairpin else 'iifname "vethrs" '
    leaving = "" if hairpin else 'oifname "vethrs" '
    return f"""\
table ip nat {{
    chain postrouting {{
        type nat hook postrouting priority srcnat
        {leaving}ip saddr 192.168.0.0/16 meta l4proto udp counter snat to 10.0.0.1 comment "opened"
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat
        {arriving}ip daddr 10.0.0.1 udp dport 1 dnat to 192.168.1.100
        {arriving}ip daddr 10.0.0.1 udp dport 2 dnat to 192.168.2.100
    }}
    chain input {{
        type filter hook input priority filter
        meta l4proto udp counter drop comment "refused"
    }}
}}
"""


HAIRPIN: Final = _one_nat(
    "nat-hairpin",
    """\
     10.0.0.1:1 is A and 10.0.0.1:2 is B, from outside and from inside; a datagram that turns back inside
     leaves the NAT with its outer source (RFC 4787, REQ-9a)
""",
    _port_forwards(hairpin=True),
)
NO_HAIRPIN: Final = _one_nat(
    "nat-no-hairpin",
    """\
     10.0.0.1:1 is A and 10.0.0.1:2 is B, but only from outside: inside nobody can use these endpoints
""",
    _port_forwards(hairpin=False),
)

FIREWALL: Final = Topology(
    name="ipv6-firewall",
    drawing="""\
   ns1 (A)                        ns0 (firewall)               ns2 (B)
  +-----------------------+      +-----------------+      +-----------------------+
  | wg0                   |      |                 |      |                   wg0 |
  | vethc                 |------| vethrc   vethrs |------| veths                 |
  | fd00:1::100/64        |      | fd00:1::1/64    |      | fd00:2::100/64        |
  | default via fd00:1::1 |      |    fd00:2::1/64 |      | default via fd00:2::1 |
  +-----------------------+      +-----------------+      +-----------------------+
     A may send to anybody; what comes from outside is refused with "administratively prohibited"
     unless it answers a datagram of the last 30 s
""",
    nodes=("ns0", "ns1", "ns2"),
    links=(
        (End("ns1", "vethc", ("fd00:1::100/64",)), End("ns0", "vethrc", ("fd00:1::1/64",))),
        (End("ns0", "vethrs", ("fd00:2::1/64",)), End("ns2", "veths", ("fd00:2::100/64",))),
    ),
    routes=(Route("ns1", "default", "fd00:1::1"), Route("ns2", "default", "fd00:2::1")),
    sysctls={"ns0": {**_ROUTER, **_FORWARDING}, "ns1": _NO_DAD, "ns2": _NO_DAD},
    firewall={
        "ns0": """\
table inet firewall {
    chain forward {
        type filter hook forward priority filter
        ct state established,related accept
        iifname "vethrc" meta l4proto udp counter accept comment "opened"
        iifname "vethrs" meta l4proto udp counter reject with icmpv6 type admin-prohibited comment "refused"
    }
}
"""
    },
    endpoint_of_a="[fd00:1::100]:1",
    endpoint_of_b="[fd00:2::100]:2",
)

BRIDGED: Final = Topology(
    name="bridged",
    drawing="""\
   ns1 (A)                 switch                   ns2 (B)
  +----------------+      +----------------+      +----------------+
  | wg0            |      |      br0       |      |            wg0 |
  | veth1          |------| port1    port2 |------| veth2          |
  | 192.168.1.1/24 |      |                |      | 192.168.1.2/24 |
  | veth3          |------| port3          |      |                |
  +----------------+      +----------------+      +----------------+
     veth3 has no address, so that a test can move A to another port of the bridge
""",
    nodes=("switch", "ns1", "ns2"),
    links=(
        (End("ns1", "veth1", ("192.168.1.1/24",)), End("switch", "port1")),
        (End("ns1", "veth3"), End("switch", "port3")),
        (End("switch", "port2"), End("ns2", "veth2", ("192.168.1.2/24",))),
    ),
    devices=(Device(node="switch", device="br0", kind="bridge", members=("port1", "port2", "port3")),),
    endpoint_of_a="192.168.1.1:1",
    endpoint_of_b="192.168.1.2:2",
)


def _routed(name: str, says: str) -> Topology:
    """Make a topology with two routers between A and B, for IPv4 and IPv6."""
    return Topology(
        name=name,
        drawing=f"""\
   ns1 (A)              r1                          r2                   ns2 (B)
  +--------------+    +-----------------+         +-----------------+   +--------------+
  | wg0          |    |                 |         |                 |   |          wg0 |
  | veth1        |----| left1     line1 |---------| line2     left2 |---| veth2        |
  | 10.1.0.9/24  |    | 10.1.0.1/24     |         |     10.2.0.1/24 |   | 10.2.0.9/24  |
  | fd00:1::9/64 |    | fd00:1::1/64    |         |    fd00:2::1/64 |   | fd00:2::9/64 |
  +--------------+    |    10.3.0.1/24  |         | 10.3.0.2/24     |   +--------------+
                      |    fd00:3::1/64 |         | fd00:3::2/64    |
                      +-----------------+         +-----------------+
{says}""",
        nodes=("r1", "r2", "ns1", "ns2"),
        links=(
            (End("ns1", "veth1", ("10.1.0.9/24", "fd00:1::9/64")), End("r1", "left1", ("10.1.0.1/24", "fd00:1::1/64"))),
            (End("r1", "line1", ("10.3.0.1/24", "fd00:3::1/64")), End("r2", "line2", ("10.3.0.2/24", "fd00:3::2/64"))),
            (End("r2", "left2", ("10.2.0.1/24", "fd00:2::1/64")), End("ns2", "veth2", ("10.2.0.9/24", "fd00:2::9/64"))),
        ),
        routes=(
            *(Route("ns1", "default", gateway) for gateway in ("10.1.0.1", "fd00:1::1")),
            *(Route("ns2", "default", gateway) for gateway in ("10.2.0.1", "fd00:2::1")),
            *(Route("r1", "default", gateway) for gateway in ("10.3.0.2", "fd00:3::2")),
            *(Route("r2", "default", gateway) for gateway in ("10.3.0.1", "fd00:3::1")),
        ),
        sysctls={"r1": _FORWARDING, "r2": _FORWARDING, "ns1": _NO_DAD, "ns2": _NO_DAD},
        endpoint_of_a="10.1.0.9:1",
        endpoint_of_b="10.2.0.9:2",
    )


def _narrow(topology: Topology) -> Topology:
    """Give the line between the routers the smallest MTU of IPv6."""
    left, (r1, r2), right = topology.links
    return replace(topology, links=(left, (replace(r1, mtu=NARROW_MTU), replace(r2, mtu=NARROW_MTU)), right))


def _over_ipv6(topology: Topology) -> Topology:
    """Give A and B endpoints of IPv6."""
    name = f"{topology.name}-v6"
    return replace(topology, name=name, endpoint_of_a="[fd00:1::9]:1", endpoint_of_b="[fd00:2::9]:2")


_SILENT: Final = """\
table inet silent {
    chain output {
        type filter hook output priority filter
        icmpv6 type packet-too-big counter drop comment "silenced"
        icmp type destination-unreachable drop
    }
}
"""
RATE_LIMITED: Final = replace(
    _routed(
        "rate-limited",
        """\
     the line carries 8 Mbit/s in each direction; a queue of 32 KiB waits before it, and what finds it full is dropped
""",
    ),
    queues=tuple(
        Queue(node=node, device=device, kind="tbf", options={"rate": "8mbit", "burst": 8_000, "limit": 32 << 10})
        for node, device in (("r1", "line1"), ("r2", "line2"))
    ),
)
NARROW: Final = _narrow(
    _routed(
        "narrow-path",
        """\
     the line has MTU 1280, all others 1500; the routers report it: "fragmentation needed", "packet too big"
""",
    )
)
NARROW_V6: Final = _over_ipv6(NARROW)
BLACK_HOLE: Final = replace(
    _over_ipv6(
        _narrow(
            _routed(
                "pmtu-black-hole",
                """\
     the line has MTU 1280, all others 1500, and no sender gets to know: the routers drop their own ICMP errors
""",
            )
        )
    ),
    name="pmtu-black-hole",
    firewall=dict.fromkeys(("r1", "r2"), _SILENT),
)

VRF: Final = Topology(
    name="vrf",
    drawing="""\
   ns1 (A)                            ns2 (B)
  +---------------------------+      +----------------+
  | wg0                       |      |            wg0 |
  | blue: table 10            |      |                |
  |   veth1                   |------| veth2          |
  |   192.168.1.1/24          |      | 192.168.1.2/24 |
  | rule: fwmark 0x51 blue    |      +----------------+
  +---------------------------+
     only A's datagrams with mark 0x51 find the way to B: veth1 is in VRF blue, and table main has no route;
     a socket of table main takes datagrams that arrive in the VRF (udp_l3mdev_accept)
""",
    nodes=("ns1", "ns2"),
    links=((End("ns1", "veth1", ("192.168.1.1/24",)), End("ns2", "veth2", ("192.168.1.2/24",))),),
    devices=(Device(node="ns1", device="blue", kind="vrf", members=("veth1",), options={"vrf_table": VRF_TABLE}),),
    rules=(PolicyRule(node="ns1", fwmark=VRF_MARK, table=VRF_TABLE),),
    sysctls={"ns1": {"net.ipv4.udp_l3mdev_accept": 1}},
    endpoint_of_b="192.168.1.2:2",
)

BONDED: Final = Topology(
    name="bonded",
    drawing="""\
   ns1 (A)                   switch                   ns2 (B)
  +------------------+      +----------------+      +----------------+
  | wg0              |      |      br0       |      |            wg0 |
  | bond0: veth1     |------| port1    port2 |------| veth2          |
  |        veth3     |------| port3          |      | 192.168.1.2/24 |
  | 192.168.1.1/24   |      |                |      |                |
  +------------------+      +----------------+      +----------------+
     the bond uses one of its links, and the other if that one fails (active-backup)
""",
    nodes=("switch", "ns1", "ns2"),
    links=(
        (End("ns1", "veth1"), End("switch", "port1")),
        (End("ns1", "veth3"), End("switch", "port3")),
        (End("switch", "port2"), End("ns2", "veth2", ("192.168.1.2/24",))),
    ),
    devices=(
        Device(node="switch", device="br0", kind="bridge", members=("port1", "port2", "port3")),
        Device(
            node="ns1",
            device="bond0",
            kind="bond",
            members=("veth1", "veth3"),
            # Mode 1 is active-backup; miimon: milliseconds between two looks at a link.
            options={"bond_mode": 1, "bond_miimon": 10},
            addresses=("192.168.1.1/24",),
        ),
    ),
    endpoint_of_a="192.168.1.1:1",
    endpoint_of_b="192.168.1.2:2",
)

VLAN: Final = Topology(
    name="vlan",
    drawing="""\
   ns1 (A)                            ns2 (B)
  +-------------------------+        +-------------------------+
  | wg0                     |        |                     wg0 |
  | vlan5  192.168.1.1/24   |        |   192.168.1.2/24  vlan5 |
  | veth1                   |--------|                   veth2 |
  +-------------------------+        +-------------------------+
     all frames on the link have the 802.1Q tag 5
""",
    nodes=("ns1", "ns2"),
    links=((End("ns1", "veth1"), End("ns2", "veth2")),),
    devices=(
        Device(
            node="ns1",
            device="vlan5",
            kind="vlan",
            parent="veth1",
            options={"vlan_id": 5},
            addresses=("192.168.1.1/24",),
        ),
        Device(
            node="ns2",
            device="vlan5",
            kind="vlan",
            parent="veth2",
            options={"vlan_id": 5},
            addresses=("192.168.1.2/24",),
        ),
    ),
    endpoint_of_a="192.168.1.1:1",
    endpoint_of_b="192.168.1.2:2",
)

NETWORKS: Final = (
    FULL_CONE, ADDRESS_RESTRICTED, PORT_RESTRICTED, SYMMETRIC, ONE_TO_ONE, DOUBLE, BOTH_SIDES, BOTH_SYMMETRIC,
    BOTH_UNKNOWN, HAIRPIN, NO_HAIRPIN, FIREWALL, BRIDGED, RATE_LIMITED, NARROW, NARROW_V6, BLACK_HOLE,
    VRF, BONDED, VLAN,
)  # fmt: skip
