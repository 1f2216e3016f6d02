"""Run many devices in virtual time: a ring lattice, eight nearest neighbours each.

    python -m bench.lattice [--devices N]...

Each device sends a packet to the four devices after it in the ring, and each of them sends one back. So every link
needs one handshake and carries one packet in each direction. Only refwg's core is real; clock, sockets and wire are
simulated. CPU time and memory per link must not depend on the number of devices.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections import Counter
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, NamedTuple

from refwg.allowedips import Prefix
from refwg.boundary import Deliver, Endpoint, Transmit
from refwg.device import Device
from refwg.messages import MILLISECOND, SECOND, MessageType
from refwg.noise import StaticIdentity
from refwg.queueing import LastUnderLoad
from refwg.ratelimiter import RateLimiter
from refwg.timers import TimerHeap
from selftests.support.packets import ip_packet
from selftests.support.pair import FakeSockets, SeededEnvironment, private_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refwg.device import Effect
    from refwg.peer import Peer

NEIGHBOURS_AHEAD: Final = 4  # the other four neighbours are those behind
LATENCY: Final = 10 * MILLISECOND  # of the wire, in nanoseconds like all times here
PORT: Final = 51820
SIZES: Final = (250, 500, 1000)  # devices


def inner(number: int) -> str:
    """Return the inner IPv4 address of a device."""
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


class Node:
    """One device of the lattice. Its number is its outer IPv4 address; `delivered` counts payloads that arrived."""

    def __init__(self, number: int, lattice: Lattice) -> None:
        """Make the device, with a key that depends only on its number. It has no peers yet."""
        self.number = number
        environment = SeededEnvironment(number, lambda: lattice.now)
        self.device = Device(
            environment,
            FakeSockets(),
            now=0,
            ratelimiter=lattice.ratelimiter,
            last_under_load=lattice.last_under_load,
        )
        identity = StaticIdentity.from_private(private_key(str(number)))
        self.public_key = identity.public
        self.device.set_private_key(identity.private, 0)
        self.endpoint = Endpoint(number.to_bytes(4), PORT)
        self.delivered: Counter[str] = Counter()

    def add_peer(self, neighbour: Node) -> None:
        """Configure a neighbour as a peer, with its endpoint and its inner address as the allowed-ip."""
        peer = self.device.add_peer(neighbour.public_key, 0)
        if peer is None:
            raise AssertionError(
                f"device {self.number} is its own neighbour; a ring has at least {NEIGHBOURS_AHEAD + 1} devices"
            )
        peer.set_endpoint(neighbour.endpoint, 0)
        self.device.insert_allowed_ip(peer, Prefix(neighbour.inner_address, 32))

    @property
    def inner_address(self) -> bytes:
        """The inner IPv4 address as four bytes."""
        return bytes(int(byte) for byte in inner(self.number).split("."))


class UnderWay(NamedTuple):
    """A datagram on the wire. order: its number, so that equal times of arrival keep the order of sending."""

    arrival: int
    order: int
    receiver: Node
    datagram: bytes
    sender: Endpoint


class Lattice:
    """A ring of devices, the wire between them, and the virtual time. `messages` counts what was sent, by type."""

    def __init__(self, devices: int) -> None:
        """Make the devices, connect each with its neighbours, and set all interfaces up."""
        self.now = 0
        self.ratelimiter, self.last_under_load = RateLimiter(), LastUnderLoad()
        self.messages: Counter[MessageType] = Counter()
        self._wire: list[UnderWay] = []
        self._timer_heap: TimerHeap[Node] = TimerHeap()
        self.nodes = [Node(number, self) for number in range(devices)]
        self.links = [
            (node, self.nodes[(node.number + distance) % devices])
            for node in self.nodes
            for distance in range(1, NEIGHBOURS_AHEAD + 1)
        ]
        for node, neighbour in self.links:
            node.add_peer(neighbour)
            neighbour.add_peer(node)
        for node in self.nodes:
            self._carry_out(node, node.device.up(0))

    def talk(self) -> None:
        """Send a packet over each link, and run until all answers have arrived and all keepalives are sent."""
        for node, neighbour in self.links:
            self._send(node, neighbour.number, b"ping")
        self.run(12 * SECOND)

    def run(self, duration: int) -> None:
        """Advance the virtual time by `duration` nanoseconds; datagrams arrive and timers expire in order."""
        end = self.now + duration
        while (moment := self._next_moment()) is not None and moment <= end:
            self.now = max(moment, self.now)
            while self._wire and self._wire[0].arrival <= self.now:
                self._arrive(heappop(self._wire))
            while (node := self._timer_heap.pop_due(self.now)) is not None:
                self._carry_out(node, node.device.expire_timers(self.now))
        self.now = end

    def _next_moment(self) -> int | None:
        moments = [self._timer_heap.next_deadline(), self._wire[0].arrival if self._wire else None]
        return min((moment for moment in moments if moment is not None), default=None)

    def _send(self, node: Node, receiver: int, payload: bytes) -> None:
        packet = ip_packet(inner(node.number), inner(receiver), payload)
        self._carry_out(node, node.device.send_packet(packet, 1420, self.now))

    def _arrive(self, message: UnderWay) -> None:
        node = message.receiver
        self._carry_out(node, node.device.receive_datagram(message.datagram, message.sender, 0, self.now))
        self._carry_out(node, node.device.process_handshakes(self.now))

    def _carry_out(self, node: Node, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Transmit):
                self._transmit(node, effect)
            elif isinstance(effect, Deliver):
                payload = effect.packet[20:]
                node.delivered[payload.decode()] += 1
                if payload == b"ping":
                    self._send(node, int.from_bytes(effect.packet[13:16]), b"pong")
        self._timer_heap.schedule(node, node.device.next_deadline())

    def _transmit(self, node: Node, effect: Transmit[Peer]) -> None:
        self.messages[MessageType(effect.datagram[0])] += 1
        node.device.sent(effect, self.now)
        receiver = self.nodes[int.from_bytes(effect.endpoint.address)]
        order = sum(self.messages.values())
        heappush(self._wire, UnderWay(self.now + LATENCY, order, receiver, effect.datagram, node.endpoint))


def main() -> int:
    """Print one line of figures for each size that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.lattice", description=__doc__.split("\n", maxsplit=1)[0])
    sizes = ", ".join(map(str, SIZES))
    parser.add_argument(
        "--devices", type=int, action="append", metavar="N",
        help=f"number of devices; may be repeated (default: one run each with {sizes})",
    )  # fmt: skip
    print("devices  links  messages  seconds  ms/link  MiB   KiB/link")
    for devices in parser.parse_args().devices or SIZES:
        print(measured(devices), flush=True)
    return 0


def measured(devices: int) -> str:
    """Return one line of figures. Memory is measured in a second run, because tracing it takes time."""
    start = time.process_time()
    lattice = Lattice(devices)
    lattice.talk()
    seconds = time.process_time() - start
    links, messages = len(lattice.links), sum(lattice.messages.values())
    tracemalloc.start()
    lattice = Lattice(devices)
    lattice.talk()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (
        f"{devices:7}  {links:5}  {messages:8}  {seconds:7.1f}  {seconds / links * 1000:7.2f}"
        f"  {memory / 2**20:4.0f}  {memory / links / 1024:8.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
