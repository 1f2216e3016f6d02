"""Check that a datagram which the stack refuses is lost, and nothing else: session, timers, retries (`direct`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from harness import DATA, INITIATION, V4_OF_A, V4_OF_B, Capture, Endpoint, let_pass, ping, poll_until, slack, twin

if TYPE_CHECKING:
    from harness import NetNS, Tunnel

# Seconds between two initiations: REKEY_TIMEOUT and its jitter (TM-01).
LONGEST_RETRY = 5 + 1 / 3
# Seconds for a ping that must not be answered.
UNANSWERED = 0.2
REFUSING = """\
table inet refusing {
    chain output {
        type filter hook output priority 0
        udp sport 1 counter drop comment "refused"
    }
}
"""


class Refusal(NamedTuple):
    """Commands of `ip` that make the stack refuse A's datagrams, and those that end it; none: a firewall."""

    begin: str = ""
    end: str = ""

    def start(self, node: NetNS) -> None:
        """Let the stack refuse A's datagrams from now on."""
        if self.begin:
            node.run(["ip", *self.begin.split()])
        else:
            node.nft(REFUSING)

    def stop(self, node: NetNS) -> None:
        """Let the stack take them again."""
        if self.end:
            node.run(["ip", *self.end.split()])
        else:
            node.nft("delete table inet refusing")


FIREWALL = pytest.param(Refusal(), id="eperm")
NO_ROUTE = pytest.param(
    Refusal("route del 10.0.0.0/24 dev veth1", "route add 10.0.0.0/24 dev veth1 src 10.0.0.1"), id="enetunreach"
)
REFUSALS = [
    FIREWALL,
    NO_ROUTE,
    *(
        pytest.param(Refusal(f"route add {kind} 10.0.0.2/32", f"route del {kind} 10.0.0.2/32"), id=errno)
        for kind, errno in (("unreachable", "ehostunreach"), ("prohibit", "eacces"), ("blackhole", "einval"))
    ),
    pytest.param(Refusal("link set veth1 down", "link set veth1 up"), id="link-down"),
]


@pytest.fixture
def connected(direct: Tunnel) -> Tunnel:
    """A tunnel with outer addresses; A has the endpoint of B, and has not yet used it."""
    direct.nodes["ns1"].add_address("veth1", "10.0.0.1/24")
    direct.nodes["ns2"].add_address("veth2", "10.0.0.2/24")
    direct.a.set_peer(direct.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    return direct


@pytest.mark.bug("IB-83")
@pytest.mark.requirement("ERR-07")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_session_outlives_refused_datagrams(connected: Tunnel, refusal: Refusal) -> None:
    outlive(connected, refusal, seconds=0)


@pytest.mark.waiting
@pytest.mark.bug("IB-83")
@pytest.mark.requirement("ERR-07")
@pytest.mark.capability("update-peer")
def test_session_outlives_seven_seconds_of_refused_datagrams(connected: Tunnel) -> None:
    outlive(connected, Refusal(), seconds=7)


def outlive(connected: Tunnel, refusal: Refusal, *, seconds: float) -> None:
    """Let A's datagrams be refused for a time; afterwards the first ping must pass, on the same session."""
    ns1, name = connected.nodes["ns1"], connected.a.manifest.name
    with twin("A's datagrams are sent before and after the refusal"):
        connected.must_ping("ns1", V4_OF_B)
    refusal.start(ns1)
    lost = ping(ns1, V4_OF_B, count=3, timeout=UNANSWERED).lost
    assert lost == 3, f"{name} sends although the stack has no route to 10.0.0.2: {3 - lost} of 3 pings passed"
    let_pass(seconds, "the stack goes on to refuse A's datagrams")
    refusal.stop(ns1)
    with Capture(ns1, "veth1") as wire:
        pings = ping(ns1, V4_OF_B)
        calls, data = wire.messages(kind=INITIATION), wire.messages(kind=DATA)
    assert not pings.lost, f"{name} sent {len(data)} data messages after the refusal: {connected.diagnosis()}"
    assert not calls, f"{name} began another session, because the stack had refused datagrams"
    connected.must_ping("ns2", V4_OF_A)


@pytest.mark.nightly
@pytest.mark.bug("IB-83")
@pytest.mark.requirement("ERR-07", "TM-01")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize("refusal", [FIREWALL, NO_ROUTE])
def test_handshake_is_retried_after_refused_initiation(connected: Tunnel, refusal: Refusal) -> None:
    connect_after(connected, refusal, seconds=0.5)


@pytest.mark.waiting
@pytest.mark.bug("IB-83")
@pytest.mark.requirement("ERR-07", "TM-01")
@pytest.mark.capability("update-peer")
@pytest.mark.parametrize("refusal", [FIREWALL, NO_ROUTE])
def test_handshake_is_retried_after_22_seconds_of_refusals(connected: Tunnel, refusal: Refusal) -> None:
    connect_after(connected, refusal, seconds=22)


def connect_after(connected: Tunnel, refusal: Refusal, *, seconds: float) -> None:
    """Let A's first initiations be refused for a time; afterwards a retry must make a session."""
    ns1, name = connected.nodes["ns1"], connected.a.manifest.name
    within = LONGEST_RETRY + slack(LONGEST_RETRY)
    refusal.start(ns1)
    with Capture(ns1, "veth1") as wire:
        lost = ping(ns1, V4_OF_B, timeout=UNANSWERED).lost
        let_pass(seconds, "the stack refuses A's initiations")
        assert (lost, wire.messages()) == (1, []), "the test proved nothing: a message left while it was refused"
        refusal.stop(ns1)
        shaken = poll_until(lambda: connected.seen_by_a().latest_handshake, bool, within, what="A has a session")
        calls = len(wire.messages(kind=INITIATION))
    assert shaken, f"{name} sent {calls} initiations within {within:.1f} s after the stack had refused some"
    connected.must_ping("ns1", V4_OF_B)
