"""Send traffic set T: all that a working tunnel must carry, in both directions.

The single parts are scenarios too (N03 to N06); other scenarios repeat the whole over another underlay, with another
MTU, or through another tunnel.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.lab.tunnel import V4_OF_A, V4_OF_B, V6_OF_A, V6_OF_B
from harness.lanes import GUESTS, LANE
from harness.traffic.tcp import tcp_stream, tcp_streams
from harness.traffic.udp import UdpStream
from harness.wait import poll_until

if TYPE_CHECKING:
    from harness.lab.tunnel import Tunnel
    from harness.traffic.udp import Arrivals

STREAM: Final = 1 << 20
PINGS: Final = 10
# Streams at once. Of N06 each carries a mebibyte; where the set is repeated, all of them together do.
PARALLEL: Final = (4, 5, 50)
# Where the processor is emulated, what takes a second elsewhere takes ten: streams carry less there.
_EMULATED: Final = 8
_ARRIVAL: Final = 20.0
# Of IPv6 and UDP, so that a datagram fits into the MTU in both families.
_HEADERS: Final = 40 + 8


def volume(size: int = STREAM) -> int:
    """So many bytes; in a guest an eighth of them."""
    return size // _EMULATED if os.environ.get(LANE) in GUESTS else size


def must_carry_everything(tunnel: Tunnel) -> None:
    """Raise HarnessError, DeadlineExceeded unless the tunnel carries all of traffic set T."""
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
    """Send datagrams as long as the MTU, as fast as they go.

    Raises HarnessError if none of them arrives, if one comes changed or twice, or if the tunnel is dead afterwards. A
    sender that nobody paces loses some wherever queues are bounded: how many, is counted and not judged.
    """
    a, b = tunnel.topology.place
    receiver = b if sender == a else a
    size = tunnel.a.place.links()[tunnel.a.name]["mtu"] - _HEADERS
    with UdpStream(tunnel.nodes[sender], tunnel.nodes[receiver], address, size=size) as stream:
        count = volume() // size
        stream.send(count)
        # What is sent now comes behind them on the same way, and is lost as long as the queues are full.
        arrivals = poll_until(
            lambda: _after_one_more(stream), lambda seen: max(seen.numbers, default=0) >= count, _ARRIVAL
        )
    if min(arrivals.numbers, default=count) >= count or arrivals.broken or arrivals.duplicated:
        raise HarnessError(f"udp {sender} to {address}: {arrivals}: {tunnel.diagnosis()}")
    tunnel.lab.note("streams.txt", f"udp {sender} to {address}: {arrivals}\n")
    tunnel.must_ping(sender, address)
    return arrivals


def _after_one_more(stream: UdpStream) -> Arrivals:
    stream.send()
    return stream.arrivals()
