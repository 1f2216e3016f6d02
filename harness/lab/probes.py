"""Try what a program can do: the smoke test, and one probe for each capability.

A probe uses a capability and reports what it observed. Before that it checks that the program works without the
capability, so that a dead tunnel is not mistaken for a missing capability.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from harness.control.records import DeviceConfig, Endpoint, PeerConfig, allowed_ips
from harness.errors import DeadlineExceeded, HarnessError
from harness.lab.lab import Lab
from harness.lab.topology import DIRECT, LOOPBACK, NAT
from harness.lab.tunnel import COMMON, V4_OF_A, V4_OF_B, Tunnel
from harness.traffic.icmp_errors import AT_ONCE, error_for
from harness.traffic.ping import ping
from harness.wait import let_pass, poll_until
from harness.wire.messages import DATA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.control.records import AllowedIP, PeerState
    from harness.implementations.interface import Interface
    from harness.implementations.manifest import Manifest
    from harness.net.netns import NetNS

# Seconds for the answer of a program that has nothing else to do.
_ANSWER: Final = 10.0
_PORT: Final = 51820
_OTHER_PORT: Final = 9998
_MARK: Final = 119
# Seconds for an ICMP error from the program itself, which comes at once if it comes at all.
_AT_ONCE: Final = 1.0
# The driver's errors to a local sender: ICMP host unreachable, or a missing key (ERR-02, ERR-03).
_REFUSALS: Final = frozenset({errno.EHOSTUNREACH, errno.ENOKEY})
_KEEPALIVES, _KEEPALIVES_WITHIN = 3, 6.0
# Bytes: the limit of the kernel's own test (netns.sh).
_BOUNDED: Final = 70_000
_LOOPING, _MOMENT = 1.0, 0.1
_ELSEWHERE: Final = Endpoint.parse("127.0.0.1:9")
_BESIDE: Final = ("10.0.0.1", "10.0.0.2")
_COUNTING: Final = f"""
table inet probe {{
    chain out {{
        type filter hook output priority 0
        udp sport 1 meta mark {_MARK} counter comment "marked"
        udp sport 1 counter comment "all"
    }}
}}
"""
_TRANSLATING: Final = """
table ip translating {
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 10.0.0.0/24 ip daddr 192.168.241.0/24 snat to 192.168.241.2
    }
}
"""


def smoke_test(lab: Lab, manifest: Manifest) -> None:
    """Check what every test needs: the program starts, answers `get`, takes a key and a port, ends in time.

    Raises HarnessError with the reason. It tries no handshake: the tests do.
    """
    wg0 = lab.interface("wg0", manifest, lab.node("smoke"))
    wg0.get(_ANSWER)
    key = lab.key("smoke")
    wg0.set(DeviceConfig(private_key=key, listen_port=_PORT))
    seen = wg0.get(_ANSWER)
    if seen.listen_port != _PORT:
        raise HarnessError(f"{manifest.name} was given the listen port {_PORT} and reports {seen.listen_port}")
    # Not every program reveals its private key, and not every one reports its public key.
    public = seen.public_key or (seen.private_key.public() if seen.private_key else None)
    if public not in {None, key.public()}:
        raise HarnessError(f"{manifest.name} was given a private key and reports another one")
    lab.check_health()
    lab.end(wg0)


def mtu_at_start(lab: Lab, manifest: Manifest) -> int:
    """Return the MTU that a program gives to its interface, without the MTU of the manifest."""
    wg0 = lab.interface("wg0", replace(manifest, mtu=None), lab.node("mtu"))
    mtu = wg0.place.links()["wg0"]["mtu"]
    lab.end(wg0)
    return mtu


def connect(lab: Lab, a: Manifest, b: Manifest) -> None:
    """Check that two programs make a tunnel over IPv4, with A as the initiator; HarnessError with a diagnosis."""
    tunnel = Tunnel(lab, LOOPBACK, a, b)
    tunnel.must_ping("ns1", V4_OF_B)
    lab.check_health()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The result of a probe. works: the program has the capability. complaints: of the health check afterwards."""

    works: bool
    seen: str
    complaints: tuple[str, ...] = ()


def probe(directory: Path, seed: int, manifest: Manifest, other: Manifest, capability: str) -> Observation:
    """Try one capability of a program in a new lab; other: its peer, if the probe needs one.

    A program that ends in the probe lacks the capability. Raises NothingShownError if a precondition of the probe
    fails, because then nothing is known about the capability.
    """
    lab = Lab(directory, seed)
    complaints: list[str] = []
    try:
        try:
            works, seen = PROBES[capability](_Bench(lab, manifest, other))
        except NothingShownError:
            raise
        except (HarnessError, OSError) as error:
            works, seen = False, str(error)
        complaints = _end_all(lab, manifest)
    finally:
        with suppress(HarnessError):
            lab.close()
    return Observation(
        works=works and not complaints, seen="; ".join([seen, *complaints]), complaints=tuple(complaints)
    )


def _end_all(lab: Lab, manifest: Manifest) -> list[str]:
    """End the interfaces; return the complaints of the health check about the program, not about its peer."""
    ended, lab.interfaces = lab.interfaces, []
    found = [(made.manifest, made.complaints() + made.close()) for made in reversed(ended)]
    if wrong := [text for of, texts in found if of is not manifest for text in texts]:
        raise HarnessError(f"the peer of {manifest.name} is not healthy: {'; '.join(wrong)}")
    return list(dict.fromkeys(text for _, texts in found for text in texts))


class NothingShownError(HarnessError):
    """A precondition of a probe failed, so it shows nothing about the capability."""


@dataclass(frozen=True, slots=True)
class _Bench:
    """The inputs of a probe: a lab, the program, and its peer."""

    lab: Lab
    manifest: Manifest
    other: Manifest

    def interface(self) -> Interface:
        """Start the program alone, with a private key."""
        wg0 = self.lab.interface("wg0", self.manifest, self.lab.node("ns0"))
        with _start("takes a private key"):
            wg0.set(DeviceConfig(private_key=self.lab.key("own")))
        return wg0

    def loopback(self) -> Tunnel:
        """Make a tunnel with the program as A, both sockets in ns0, after a ping through it."""
        with _start("makes a tunnel over IPv4"):
            tunnel = Tunnel(self.lab, LOOPBACK, self.manifest, self.other)
            tunnel.must_ping("ns1", V4_OF_B)
        return tunnel

    def direct(self) -> Tunnel:
        """Make a tunnel with the program as A, which has two addresses on the link; sends nothing through it."""
        with _start("sets up a tunnel over a link"):
            tunnel = Tunnel(self.lab, DIRECT, self.manifest, self.other)
            tunnel.nodes["ns1"].add_address("veth1", *(f"{host}/24" for host in _BESIDE))
            tunnel.nodes["ns2"].add_address("veth2", "10.0.0.3/24")
        return tunnel


@contextmanager
def _start(what: str) -> Iterator[None]:
    try:
        yield
    except (HarnessError, OSError) as error:
        raise NothingShownError(f"nothing was shown; precondition failed: the program {what}: {error}") from error


# Each probe returns whether the program has the capability, and what it observed.


def _roaming(bench: _Bench) -> tuple[bool, str]:
    tunnel = bench.loopback()
    tunnel.b.set(DeviceConfig(listen_port=_OTHER_PORT))
    moved = Endpoint("127.0.0.1", _OTHER_PORT)
    pings = ping(tunnel.nodes["ns2"], V4_OF_A)
    seen = _poll_peer(tunnel.seen_by_a, lambda peer: peer.endpoint == moved).endpoint
    return seen == moved and not pings.lost, f"its peer sent from {moved}; it reports the endpoint {seen} ({pings})"


def _sticky_source(bench: _Bench) -> tuple[bool, str]:
    tunnel = bench.direct()
    answered = []
    for host in _BESIDE:
        tunnel.b.set_peer(tunnel.pub_a, endpoint=Endpoint(host, 1))
        with _start("answers a ping over the link"):
            tunnel.must_ping("ns2", V4_OF_A)
        answered.append(str(tunnel.seen_by_b().endpoint))
    addressed = [f"{host}:1" for host in _BESIDE]
    return answered == addressed, f"addressed at {' and '.join(addressed)}, it answered from {' and '.join(answered)}"


def _ipv6_underlay(bench: _Bench) -> tuple[bool, str]:
    plan = replace(COMMON, endpoints=("[::1]:1", "[::1]:2"))
    tunnel = Tunnel(bench.lab, LOOPBACK, bench.manifest, bench.other, plan=plan)
    pings = ping(tunnel.nodes["ns1"], V4_OF_B)
    endpoint = tunnel.seen_by_b().endpoint
    return not pings.lost and endpoint == Endpoint("::1", 1), f"{pings}; the peer's endpoint for it is {endpoint}"


def _listen_port_change(bench: _Bench) -> tuple[bool, str]:
    tunnel = bench.loopback()
    tunnel.a.set(DeviceConfig(listen_port=_OTHER_PORT))
    reported = tunnel.a.get().listen_port
    tunnel.b.set_peer(tunnel.pub_a, endpoint=Endpoint("127.0.0.1", _OTHER_PORT))
    pings = ping(tunnel.nodes["ns2"], V4_OF_A)
    return reported == _OTHER_PORT and not pings.lost, (
        f"given the listen port {_OTHER_PORT} it reports {reported}; pings to that port: {pings}"
    )


def _persistent_keepalive(bench: _Bench) -> tuple[bool, str]:
    tunnel = bench.loopback()
    (capture,) = bench.lab.captures

    def count() -> int:
        return sum(message.is_keepalive for message in capture.messages(kind=DATA, port=1))

    before = count()
    tunnel.keep_alive(1)
    sent = poll_until(lambda: count() - before, lambda number: number >= _KEEPALIVES, _KEEPALIVES_WITHIN)
    return sent >= _KEEPALIVES, f"with an interval of 1 s it sent {sent} keepalives within {_KEEPALIVES_WITHIN:g} s"


def _remove_allowed_ip(bench: _Bench) -> tuple[bool, str]:
    wg0, alice = bench.interface(), bench.lab.key("alice").public()
    given = allowed_ips("10.0.0.1/32", "10.0.0.2/32")
    with _start("takes allowed-ips"):
        wg0.set(DeviceConfig(peers=(PeerConfig(public_key=alice, allowed_ips=given),)))
    # By `control`, here and below: `wg0.set` would refuse a capability that the manifest does not declare.
    wg0.control.set(DeviceConfig(peers=(PeerConfig(public_key=alice, allowed_ips=allowed_ips("-10.0.0.1/32")),)))
    left = wg0.peer(alice).allowed_ips
    return left == given[1:], f"asked to remove 10.0.0.1/32 it keeps {_shown(left)}"


def _icmp_unreachable(bench: _Bench) -> tuple[bool, str]:
    bench.interface().up(f"{V4_OF_A}/24")
    try:
        number, error = error_for(bench.lab.nodes["ns0"], V4_OF_B, within=_AT_ONCE)
    except DeadlineExceeded:
        return False, f"a datagram that no peer owns was dropped, and no error came within {_AT_ONCE:g} s"
    return error.errno in _REFUSALS or number in _REFUSALS, f"the sender got {error}"


def _icmp_through_nat(bench: _Bench) -> tuple[bool, str]:
    with _start("makes a tunnel through a NAT, as B"):
        nat = Tunnel(bench.lab, NAT, bench.other, bench.manifest)
        ns0, ns2 = nat.nodes["ns0"], nat.nodes["ns2"]
        ns2.sysctl("net.ipv4.ip_forward", 1)
        ns2.nft(_TRANSLATING)
        ns0.add_route(f"{V4_OF_A}/32", via="10.0.0.100")
        nat.keep_alive(1)
        nat.must_ping("ns1", V4_OF_B)
        nat.must_ping("ns0", V4_OF_A)
    nat.b.set_peer(nat.pub_a, remove=True)
    try:
        _, error = error_for(ns0, V4_OF_A, within=AT_ONCE)
    except DeadlineExceeded:
        return False, f"a datagram that came through a NAT was dropped, and no error came back within {AT_ONCE:g} s"
    return error.errno == errno.EHOSTUNREACH, f"the sender behind the NAT got {error}"


def _fwmark(bench: _Bench) -> tuple[bool, str]:
    tunnel = bench.loopback()
    ns0 = tunnel.nodes["ns0"]
    ns0.nft(_COUNTING)
    tunnel.a.set(DeviceConfig(fwmark=_MARK))
    with _start("still sends after it was given a mark"):
        tunnel.must_ping("ns1", V4_OF_B)
    counted = ns0.nft_counters()
    return 0 < counted["all"] == counted["marked"], f"{counted['marked']} of {counted['all']} datagrams were marked"


def _update_peer(bench: _Bench) -> tuple[bool, str]:
    wg0, alice = bench.interface(), bench.lab.key("alice").public()
    with _start("takes a peer"):
        wg0.set(DeviceConfig(peers=(PeerConfig(public_key=alice),)))
    wg0.control.set(DeviceConfig(peers=(PeerConfig(public_key=alice, endpoint=_ELSEWHERE),)))
    endpoint = wg0.peer(alice).endpoint
    return endpoint == _ELSEWHERE, f"a peer that was given the endpoint {_ELSEWHERE} has {endpoint}"


def _peer_before_key(bench: _Bench) -> tuple[bool, str]:
    alice = bench.lab.key("alice").public()
    wg0 = bench.lab.interface("wg0", bench.manifest, bench.lab.node("ns0"))
    wg0.control.set(DeviceConfig(peers=(PeerConfig(public_key=alice),)))
    peers = [peer.public_key for peer in wg0.get().peers]
    return peers == [alice], f"given a peer before the private key it has {len(peers)} peers"


def _bounded_loop(bench: _Bench) -> tuple[bool, str]:
    tunnel = bench.direct()
    ns1, peer = tunnel.nodes["ns1"], tunnel.pub_b
    tunnel.a.set_peer(peer, endpoint=Endpoint("10.0.0.3", 2))
    with _start("makes a tunnel over a link"):
        tunnel.must_ping("ns1", V4_OF_B)
    # The peer must send nothing: the program would take its endpoint from that.
    bench.lab.end(tunnel.b)
    tunnel.a.set_peer(peer, endpoint=Endpoint(V4_OF_B, 2))
    before = _sent(ns1)
    try:
        ping(ns1, V4_OF_B, timeout=_MOMENT)
        sent = poll_until(lambda: _sent(ns1) - before, lambda sent: sent > _BOUNDED, _LOOPING)
        let_pass(_MOMENT, "an endless loop would keep sending")
        goes_on = _sent(ns1) - before > sent
    finally:
        ns1.set_link("wg0", up=False)
    looped = f"one ping to a peer that is behind itself became {sent} bytes"
    return not goes_on and sent <= _BOUNDED, f"{looped}{' and more' if goes_on else ''}"


def _sent(node: NetNS) -> int:
    return int(node.links()["wg0"]["tx_bytes"])


def _poll_peer(look: Callable[[], PeerState], accept: Callable[[PeerState], bool]) -> PeerState:
    return poll_until(look, accept, _AT_ONCE)


def _shown(prefixes: tuple[AllowedIP, ...]) -> str:
    return ", ".join(map(str, prefixes)) or "none"


# By capability. The other probes use the results of the first two: how a lab configures a program depends on them.
PROBES: Final[dict[str, Callable[[_Bench], tuple[bool, str]]]] = {
    "update-peer": _update_peer,
    "peer-before-key": _peer_before_key,
    "roaming": _roaming,
    "sticky-source": _sticky_source,
    "ipv6-underlay": _ipv6_underlay,
    "listen-port-change": _listen_port_change,
    "persistent-keepalive": _persistent_keepalive,
    "remove-allowed-ip": _remove_allowed_ip,
    "icmp-unreachable": _icmp_unreachable,
    "icmp-through-nat": _icmp_through_nat,
    "fwmark": _fwmark,
    "bounded-loop": _bounded_loop,
}
