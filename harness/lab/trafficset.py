"""Send traffic set T: all that a working tunnel must carry, in both directions.

Each part is a scenario of its own (N03 to N06). Other scenarios send the whole set over another underlay, with another
MTU, or through another tunnel.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.lab.tunnel import V4_OF_A, V4_OF_B, V6_OF_A, V6_OF_B
from harness.lanes import GUESTS, LANE, NIGHTLY
from harness.traffic.tcp import tcp_stream, tcp_streams
from harness.traffic.udp import UdpStream
from harness.wait import poll_until

if TYPE_CHECKING:
    from harness.lab.tunnel import Tunnel
    from harness.traffic.udp import Arrivals

STREAM: Final = 1 << 20
PINGS: Final = 10
# Numbers of parallel streams. In N06 each stream carries a mebibyte, in the set all streams together do.
PARALLEL: Final = (4, 5, 50)
# An emulated CPU is about ten times slower, so streams carry less in a guest.
_EMULATED: Final = 8
_ARRIVAL: Final = 20.0
# The lengths of the IPv6 and UDP headers: a datagram then fits into the MTU over IPv4 too.
_HEADERS: Final = 40 + 8


def effort(by_day: int, by_night: int) -> int:
    """Return how much of something to send or try: `by_night` with --nightly, else `by_day`, in a guest an eighth."""
    return by_night if NIGHTLY in os.environ else volume(by_day)


def volume(size: int = STREAM) -> int:
    """Return a number of bytes to send: `size`, or an eighth of it in a guest."""
    return size // _EMULATED if os.environ.get(LANE) in GUESTS else size


def must_carry_everything(tunnel: Tunnel) -> None:
    """Send traffic set T through the tunnel; raises HarnessError or DeadlineExceeded if a part fails."""
    ns1, ns2 = (tunnel.nodes[name] for name in tunnel.topology.place)
    for sender, address in ((ns2, V4_OF_A), (ns1, V4_OF_B), (ns2, V6_OF_A), (ns1, V6_OF_B)):
        tunnel.must_ping(sender.name, address, count=PINGS)
    tcp_stream(ns1, ns2, V4_OF_B, size=volume())
    tcp_stream(ns2, ns1, V6_OF_A, size=volume())
    must_stream_udp(tunnel, "ns2", V4_OF_A)
    must_stream_udp(tunnel, "ns1", V6_OF_B)
    for count in PARALLEL:
        tcp_streams(ns1, ns2, V4_OF_B, count=count, size=volume() // count)


def must_stream_udp(tunnel: Tunnel, sender: str, address: str) -> Arrivals:
    """Send UDP datagrams as long as the MTU without a pause, and return which arrived.

    Raises HarnessError if none arrives, if one arrives changed or twice, or if no ping is answered afterwards. Bounded
    queues may drop some, which is counted and does not fail.
    """
    a, b = tunnel.topology.place
    receiver = b if sender == a else a
    size = tunnel.a.place.links()[tunnel.a.name]["mtu"] - _HEADERS
    with UdpStream(tunnel.nodes[sender], tunnel.nodes[receiver], address, size=size) as stream:
        count = volume() // size
        stream.send(count)
        # A datagram sent now follows the others on the same path, and is lost while the queues are full.
        arrivals = poll_until(
            lambda: _after_one_more(stream), lambda seen: max(seen.numbers, default=0) >= count, _ARRIVAL
        )
    if min(arrivals.numbers, default=count) >= count or arrivals.broken or arrivals.duplicated:
        raise HarnessError(f"udp {sender} to {address}: {arrivals}: {tunnel.diagnosis(address)}")
    tunnel.lab.note("streams.txt", f"udp {sender} to {address}: {arrivals}\n")
    tunnel.must_ping(sender, address)
    return arrivals


def _after_one_more(stream: UdpStream) -> Arrivals:
    stream.send()
    return stream.arrivals()
