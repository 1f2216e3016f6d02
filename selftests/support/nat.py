"""Measure what a NAT does with plain UDP, in the words of RFC 4787.

The method is that of RFC 5780, with three servers.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness import Datagram, steps, udp_receiver, wait_for

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from harness import NetNS

# Seconds.
ARRIVES: Final = 5.0
ANY, ADDRESS, ADDRESS_AND_PORT = "endpoint-independent", "address-dependent", "address and port-dependent"
# By the servers that reach a client which has sent to the first one only.
FILTERINGS: Final = {frozenset({0}): ADDRESS_AND_PORT, frozenset({0, 1}): ADDRESS, frozenset({0, 1, 2}): ANY}
# Two addresses of one node; RFC 5780 has the second port at the first address too.
SERVERS: Final = (("10.0.0.100", 3478), ("10.0.0.100", 3479), ("10.0.0.101", 3478))
# A random mapping could by chance be the same for two destinations; hardly for each of these ports.
CLIENT_PORTS: Final = (1, 5001, 5002)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a NAT does. mapping, filtering: RFC 4787, 4.1 and 5. outer: its address. keeps_ports: 4.2.1."""

    mapping: str
    filtering: str
    outer: str
    keeps_ports: bool


@dataclass(frozen=True, slots=True)
class Client:
    """A socket behind the NAT, and the three servers outside."""

    sock: socket.socket
    servers: tuple[socket.socket, ...]

    def mapped(self, number: int) -> tuple[str, int]:
        """Send to a server, and return the source that it sees: address and port."""
        self.sock.sendto(b"map", SERVERS[number])
        server = self.servers[number]
        _, source = wait_for(Datagram(server), ARRIVES, f"a datagram at {SERVERS[number]}")
        return source

    def passing(self, target: tuple[str, int], senders: tuple[int, ...]) -> frozenset[int]:
        """Return which servers' datagrams to `target` reach the client; the last sender's must."""
        for number in senders:
            self.servers[number].sendto(bytes([number]), target)
        arrived: set[int] = set()
        while senders[-1] not in arrived:
            data, _ = wait_for(Datagram(self.sock), ARRIVES, f"the datagram of server {senders[-1]}")
            arrived.add(data[0])
        return frozenset(arrived)


@contextmanager
def client(inside: NetNS, outside: NetNS, port: int, address: str = "192.168.1.100") -> Iterator[Client]:
    """Open the client's socket and those of the servers."""
    with ExitStack() as stack:
        servers = tuple(stack.enter_context(udp_receiver(outside, *server)) for server in SERVERS)
        yield Client(stack.enter_context(udp_receiver(inside, address, port)), servers)


def behaviour(inside: NetNS, outside: NetNS) -> Behaviour:
    """Measure the NAT between two nodes; the outer one has both addresses of SERVERS."""
    sources, filterings = [], set()
    for port in CLIENT_PORTS:
        with client(inside, outside, port) as made:
            first = made.mapped(0)
            # Before anything else is sent: only the first server has been contacted.
            arrived = made.passing(first, (2, 1, 0))
            filterings.add(FILTERINGS[arrived])
            sources.append((first, made.mapped(1), made.mapped(2)))
    (filtering,) = filterings
    if all(first == second == third for first, second, third in sources):
        mapping = ANY
    else:
        mapping = ADDRESS if all(first == second for first, second, _ in sources) else ADDRESS_AND_PORT
    (outer,) = {address for row in sources for address, _ in row}
    keeps_ports = all(first[1] == port for port, (first, _, _) in zip(CLIENT_PORTS, sources, strict=True))
    measured = Behaviour(mapping, filtering, outer, keeps_ports)
    steps.record(inside.name, f"measured: {measured}; sources: {sources}")
    return measured
