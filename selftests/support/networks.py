"""Look at a tunnel that crosses a NAT or a firewall: outer sources, counters, vain tries."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from harness import DATA, V4_OF_A, V4_OF_B, Endpoint, ping, poll_until

if TYPE_CHECKING:
    from harness import Capture, Message, Topology, Tunnel

# Seconds for what happens at once.
SOON: Final = 5.0
# Seconds for an answer that should not come; a counter has shown then that the request was dropped.
REFUSED: Final = 0.2
# Data bytes of a ping that is as long as the MTU of 1420.
LONGEST: Final = 1420 - 28


def name_of(topology: Topology) -> str:
    """Return a topology's name, for the ids of tests."""
    return topology.name


def towards_b(tunnel: Tunnel) -> Capture:
    """Return the capture of the last link before B: its messages have the source that B sees."""
    end = tunnel.topology.links[-1][0]
    (capture,) = [made for made in tunnel.lab.captures if made.name == f"{end.node}-{end.device}"]
    return capture


def source_of(message: Message) -> Endpoint:
    """Return where a message came from, as an endpoint."""
    return Endpoint(*message.source)


def outer_source(tunnel: Tunnel) -> Endpoint:
    """Return the source of A's latest datagram as B sees it, behind all NATs."""
    return source_of(towards_b(tunnel).messages()[-1])


def must_have_learned(tunnel: Tunnel) -> Endpoint:
    """Check that B's endpoint for A is the source of A's latest datagram, and return it."""
    __tracebackhide__ = True  # pytest's traceback ends at the test's own line
    endpoint = poll_until(lambda: tunnel.seen_by_b().endpoint, lambda seen: seen == outer_source(tunnel), SOON)
    source = outer_source(tunnel)
    assert endpoint == source, f"B's endpoint for A is {endpoint}; A's latest datagram came from {source}"
    return source


def sent_to_b(tunnel: Tunnel) -> int:
    """Return the number of messages that A has sent so far and that came as far as B's link."""
    return len(towards_b(tunnel).messages())


def must_be_data_only(tunnel: Tunnel, since: int) -> None:
    """Check that A's messages from number `since` on are data: it has neither made nor answered an initiation."""
    __tracebackhide__ = True
    kinds = {message.kind for message in towards_b(tunnel).messages()[since:]}
    assert kinds == {DATA}, f"the session did not go on: A sent messages of types {sorted(kinds)}, expected data only"


def count(tunnel: Tunnel, name: str) -> int:
    """Return a counter (`opened`, `refused`) of all NATs and firewalls together."""
    return sum(tunnel.nodes[node].nft_counters().get(name, 0) for node in tunnel.topology.firewall)


def must_refuse_b(tunnel: Tunnel) -> None:
    """Let B ping A, and check that a NAT or a firewall drops B's datagram."""
    __tracebackhide__ = True
    before = count(tunnel, "refused")
    pings = ping(tunnel.nodes["ns2"], V4_OF_A, timeout=REFUSED)
    refused = poll_until(lambda: count(tunnel, "refused"), lambda seen: seen > before, SOON) - before
    assert refused > 0, f"no datagram of B was refused: {pings}; {tunnel.diagnosis()}"
    assert pings.lost == 1, f"B reached A, although {refused} of its datagrams were refused: {pings}"


def try_in_vain(tunnel: Tunnel) -> None:
    """Ping once in each direction, whatever comes of it."""
    for node, address in (("ns1", V4_OF_B), ("ns2", V4_OF_A)):
        # A peer without an endpoint is answered with ICMP host unreachable.
        with suppress(OSError):
            ping(tunnel.nodes[node], address, timeout=REFUSED)


def have_handshake(tunnel: Tunnel) -> tuple[bool, bool]:
    """Return for A and for B whether it reports a handshake."""
    return bool(tunnel.seen_by_a().latest_handshake), bool(tunnel.seen_by_b().latest_handshake)
