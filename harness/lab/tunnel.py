"""Configure the two interfaces of a topology with the keys and addresses all tests share.

A tunnel may run inside another one, with another `Plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from harness.control.base import EVIDENCE_TIMEOUT
from harness.control.records import DeviceConfig, DeviceState, Endpoint, PeerConfig, allowed_ips
from harness.errors import HarnessError
from harness.lab.mismatch import End, mismatches, own_key
from harness.traffic.ping import ping
from harness.wait import poll_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness.control.records import Key, PeerState
    from harness.implementations.interface import Interface
    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab
    from harness.lab.topology import Topology
    from harness.net.netns import NetNS

V4_OF_A: Final = "192.168.241.1"
V4_OF_B: Final = "192.168.241.2"
V6_OF_A: Final = "fd00::1"
V6_OF_B: Final = "fd00::2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The names and settings of a tunnel's two interfaces; in each pair the first is A's.

    keys: names of the lab's keys. addresses: in the tunnel, as ADDRESS/LENGTH. endpoints: the first endpoint of each;
    None for the topology's. mtu: None for the implementation's own.
    """

    name: str = "wg0"
    keys: tuple[str, str] = ("key1", "key2")
    ports: tuple[int, int] = (1, 2)
    addresses: tuple[tuple[str, ...], tuple[str, ...]] = (
        (f"{V4_OF_A}/24", f"{V6_OF_A}/112"),
        (f"{V4_OF_B}/24", f"{V6_OF_B}/112"),
    )
    endpoints: tuple[str, str] | None = None
    mtu: int | None = None


COMMON: Final = Plan()
# The plan of an outer tunnel, then the plan of the tunnel inside it.
OUTER: Final = Plan(addresses=(("fd00::5:1/112",), ("fd00::5:2/112",)))
INNER: Final = Plan(
    name="wg1", keys=("key3", "key4"), ports=(5, 5), endpoints=("[fd00::5:1]:5", "[fd00::5:2]:5"), mtu=1340
)


class Tunnel:
    """Two interfaces under test in a topology, configured with the common keys and addresses of the scenarios.

    A has key1, the addresses 192.168.241.1/24 and fd00::1/112, and listens on port 1. B has key2, 192.168.241.2/24 and
    fd00::2/112, and listens on port 2. Each allows the other's /32 and /128; both share a preshared key.
    """

    def __init__(
        self,
        lab: Lab,
        topology: Topology,
        a: Manifest,
        b: Manifest,
        *,
        plan: Plan = COMMON,
        nodes: dict[str, NetNS] | None = None,
    ) -> None:
        """Build the topology, unless `nodes` has one that is built, and set up both interfaces."""
        self.lab = lab
        self.topology = topology
        self.plan = plan
        self.nodes = topology.build(lab) if nodes is None else nodes
        self.key_a, self.key_b, self.psk = lab.key(plan.keys[0]), lab.key(plan.keys[1]), lab.key("psk")
        self.a = self._make(a, 0)
        self.b = self._make(b, 1)
        self._configure()

    def inside(self, plan: Plan = INNER) -> Tunnel:
        """Make a tunnel of the same implementations through this one: its sockets are in the nodes of our links."""
        within = replace(self.topology, birth=self.topology.place)
        return Tunnel(self.lab, within, self.a.manifest, self.b.manifest, plan=plan, nodes=self.nodes)

    @property
    def pub_a(self) -> Key:
        """A's public key."""
        return self.key_a.public()

    @property
    def pub_b(self) -> Key:
        """B's public key."""
        return self.key_b.public()

    def seen_by_a(self) -> PeerState:
        """Return the peer B as A reports it: endpoint, counters, latest handshake."""
        return self.a.peer(self.pub_b)

    def seen_by_b(self) -> PeerState:
        """Return the peer A as B reports it."""
        return self.b.peer(self.pub_a)

    def counted(self, deadline: float = 1.0) -> tuple[PeerState, PeerState]:
        """Return both peers as reported, once the counters of the two sides agree, or else after the deadline.

        A program counts a datagram a moment after it has sent it, without an event; so this polls.
        """
        return poll_until(
            lambda: (self.seen_by_a(), self.seen_by_b()),
            lambda seen: (seen[0].rx_bytes, seen[0].tx_bytes) == (seen[1].tx_bytes, seen[1].rx_bytes),
            deadline,
        )

    def keep_alive(self, seconds: int) -> None:
        """Make A send persistent keepalives at this interval, in seconds; 0 turns them off.

        If A cannot change a peer (capability `update-peer`), it removes and adds the peer, which begins a new session.
        """
        if "update-peer" not in self.a.manifest.capabilities:
            self.a.set(DeviceConfig(peers=(PeerConfig(public_key=self.pub_b, remove=True),)))
            self.a.set(DeviceConfig(peers=(replace(self._peer(1), persistent_keepalive=seconds),)))
        else:
            self.a.set_peer(self.pub_b, persistent_keepalive=seconds)

    def must_ping(self, sender: str, address: str, *, count: int = 1) -> None:
        """Ping through the tunnel from a node; raises HarnessError with a diagnosis if a request is not answered."""
        __tracebackhide__ = True  # pytest's traceback ends at the test's own line
        pings = ping(self.nodes[sender], address, count=count)
        if pings.lost:
            raise HarnessError(f"{sender}: ping {pings}: {self.diagnosis(address)}")

    def diagnosis(self, address: str = "") -> str:
        """Describe a tunnel that does not work: what is odd about it, then the state of both sides, then their logs.

        address: what does not answer; without it, addresses of both families count.
        """
        a, b = _look("A", self.a), _look("B", self.b)
        a, b = a.facing(b, self.pub_b), b.facing(a, self.pub_a)
        logs = [f"{side.name} logs {line!r}" for side in (a, b) for line in side.interface.complaints_in_log()]
        own = [[text for text in _hosts(side) if not address or (":" in text) == (":" in address)]
               for side in self.plan.addresses]  # fmt: skip
        return "\n".join([_clue(a, b, own), str(a), str(b), *logs])

    def __repr__(self) -> str:
        return f"Tunnel({self.a.manifest.name}~{self.b.manifest.name}, {self.topology!r})"

    def _make(self, manifest: Manifest, side: int) -> Interface:
        birth = self.nodes[self.topology.birth[side]]
        made = self.lab.interface(self.plan.name, manifest, birth, self.nodes[self.topology.place[side]])
        made.role = "ab"[side]
        return made

    def _configure(self) -> None:
        for side, (interface, key) in enumerate(((self.a, self.key_a), (self.b, self.key_b))):
            port, peer = self.plan.ports[side], self._peer(1 - side)
            interface.set(DeviceConfig(private_key=key, listen_port=port, peers=(peer,)))
            interface.up(*self.plan.addresses[side], mtu=self.plan.mtu)

    def _peer(self, side: int) -> PeerConfig:
        """Make the other side's configuration of A (0) or B (1)."""
        endpoints = self.plan.endpoints or (self.topology.endpoint_of_a, self.topology.endpoint_of_b)
        endpoint = endpoints[side]
        return PeerConfig(
            public_key=(self.pub_a, self.pub_b)[side],
            preshared_key=self.psk,
            endpoint=Endpoint.parse(endpoint) if endpoint else None,
            allowed_ips=allowed_ips(*map(_alone, self.plan.addresses[side])),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One side in a diagnosis: its state, and its state of the peer; error: why there is no state."""

    name: str
    interface: Interface
    state: DeviceState = field(default_factory=DeviceState)
    peer: PeerState | None = None
    error: str = ""

    def __str__(self) -> str:
        """`A (refwg) has a handshake, sent 404 and received 220 bytes; its endpoint for B is 127.0.0.1:2`."""
        whose, other = f"{self.name} ({self.interface.manifest.name})", "BA"[self.name == "B"]
        if self.error:
            return f"{whose} does not report its state: {self.error}"
        if self.peer is None:
            return f"{whose} has no peer with {other}'s public key"
        handshake = "a handshake" if self.peer.latest_handshake else "no handshake"
        carried = f"sent {self.peer.tx_bytes} and received {self.peer.rx_bytes} bytes"
        return f"{whose} has {handshake}, {carried}; its endpoint for {other} is {self.peer.endpoint}"

    def facing(self, other: _Side, planned: Key) -> _Side:
        """Return this side with its state of the other side. planned: that side's public key, if it reports none."""
        key = own_key(other.state) or planned
        return replace(self, peer=next((peer for peer in self.state.peers if peer.public_key == key), None))


def _look(name: str, interface: Interface) -> _Side:
    try:
        return _Side(name=name, interface=interface, state=interface.get(EVIDENCE_TIMEOUT))
    except (HarnessError, OSError) as error:
        # The program may be gone: that is the diagnosis, and must not take the place of what it explains.
        return _Side(name=name, interface=interface, error=str(error) or type(error).__name__)


def _clue(a: _Side, b: _Side, addresses: Sequence[Sequence[str]]) -> str:
    """Return the most likely reason why the tunnel does not work, in one line. addresses: of A, of B."""
    silent = [side for side in (a, b) if side.error]
    if silent:
        return ", ".join(f"{side.name} does not report its state" for side in silent)
    shaken = [side for side in (a, b) if side.peer and side.peer.latest_handshake]
    # Allowed IPs may change during a session; then they are no reason that there is none.
    own = [texts if len(shaken) < len(addresses) else () for texts in addresses]
    reasons = mismatches(*(End(name=side.name, peer=side.peer, addresses=texts)
                           for side, texts in zip((a, b), own, strict=True)))  # fmt: skip
    return "; ".join([*reasons, ", ".join(_oddities(a, b, shaken))])


def _oddities(a: _Side, b: _Side, shaken: Sequence[_Side]) -> list[str]:
    """Return what is odd about the endpoints, handshakes and counters. shaken: the sides that have a handshake."""
    odd = []
    for side, other in ((a, b), (b, a)):
        endpoint = side.peer.endpoint if side.peer else None
        if endpoint is None:
            # If neither has one, `mismatches` says so.
            if side.peer and other.peer and other.peer.endpoint:
                odd.append(f"{side.name} has no endpoint for {other.name}")
        elif other.state.listen_port not in {0, endpoint.port}:
            listens = f"{other.name} listens on {other.state.listen_port}"
            odd.append(f"{side.name}'s endpoint for {other.name} is {endpoint}, {listens}")
    if len(shaken) == 1:
        odd.append(f"only {shaken[0].name} has a handshake")
    if not shaken:
        odd.append("neither has a handshake")
    return odd or ["both have a handshake", *_losses(a, b)]


def _losses(a: _Side, b: _Side) -> list[str]:
    """Return the bytes that did not arrive: after the deadline of a ping no datagram is still on its way."""
    return [
        f"{taker.name} received {taker.peer.rx_bytes} of {sender.name}'s {sender.peer.tx_bytes} bytes"
        for sender, taker in ((a, b), (b, a))
        if sender.peer and taker.peer and taker.peer.rx_bytes < sender.peer.tx_bytes
    ]


def _hosts(addresses: Iterable[str]) -> list[str]:
    return [address.partition("/")[0] for address in addresses]


def _alone(address: str) -> str:
    """Return the prefix that contains this address only."""
    host = address.partition("/")[0]
    return f"{host}/{128 if ':' in host else 32}"
