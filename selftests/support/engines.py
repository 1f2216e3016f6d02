"""Drive both engines of refwg with the same input, and compare what comes of it.

    frames of the interface ---> engine of side A ---> datagrams        (superframes only for the batch engine)
    packets for the interface <--- engine of side A <--- datagrams      (batches only for the batch engine)

Time is virtual. Side B is a plain device: it makes the messages that A receives, and opens those that A sends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from refwg.boundary import Transmit
from refwg.engine.batch import BatchEngine
from refwg.engine.offloads import OFFLOADS, Offloads
from refwg.engine.simple import SimpleEngine, Surroundings
from refwg.engine.virtio import HEADER_LENGTH
from refwg.messages import MessageType
from refwg.socket import ReceivedBatch
from selftests.support import flows
from selftests.support.pair import Pair, arrived_at

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from refwg.boundary import Endpoint
    from refwg.device import Device
    from refwg.ip import IcmpError
    from refwg.peer import Peer
    from refwg.socket import UdpSockets
    from refwg.tun import Tun

MTU = 1420


@dataclass
class Link:
    """What an engine asks of the state of an interface."""

    mtu: int = MTU


@dataclass
class MemoryTun:
    """An interface in memory: frames to read, each with its virtio header, and the frames that were written.

    refuses: says which written frames the kernel refuses.
    """

    has_headers: bool = True
    link: Link = field(default_factory=Link)
    waiting: list[bytes] = field(default_factory=list)
    written: list[bytes] = field(default_factory=list)
    icmp: list[IcmpError] = field(default_factory=list)
    largest: int = 0
    refuses: Callable[[bytes], bool] = lambda _: False

    def read(self) -> bytes | None:
        return self.waiting.pop(0)[HEADER_LENGTH:] if self.waiting else None

    def read_into(self, buffer: memoryview) -> int:
        if not self.waiting:
            return 0
        frame = self.waiting.pop(0)[0 if self.has_headers else HEADER_LENGTH :]
        buffer[: len(frame)] = frame
        return len(frame)

    def write(self, packet: bytes) -> bool:
        return self.write_parts([bytes(HEADER_LENGTH), packet] if self.has_headers else [packet])

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        frame = (b"" if self.has_headers else bytes(HEADER_LENGTH)) + b"".join(parts)
        if self.refuses(frame):
            return False
        self.written.append(frame)
        return True

    def mtu_to(self, destination: bytes) -> int:
        del destination
        return self.link.mtu

    def limit_superframes(self, size: int) -> None:
        self.largest = size

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        del now
        self.icmp.append(error)
        return True


@dataclass
class MemoryUdp:
    """Sockets in memory: datagrams to receive, each with its ECN bits, and those that were sent.

    error: returns the errno of a call of sendmsg(2), by its datagrams and the length of each; empty: it is taken.
    """

    sender: Endpoint
    waiting: list[tuple[bytes, int, int]] = field(default_factory=list)
    sent: list[tuple[bytes, Endpoint, int]] = field(default_factory=list)
    calls: int = 0
    error: Callable[[bytes, int], str] = lambda _datagrams, _segment: ""

    def send(self, transmit: Transmit[Peer], segment: int = 0) -> str:
        self.calls += 1
        datagrams = bytes(transmit.datagram)
        error = self.error(datagrams, segment)
        if error:
            return error
        length = segment or len(datagrams)
        for start in range(0, len(datagrams), length):
            self.sent.append((datagrams[start : start + length], transmit.endpoint, transmit.traffic_class))
        return ""

    def receive(self, sock: socket.socket) -> tuple[bytes, Endpoint, int] | None:
        del sock
        if not self.waiting:
            return None
        datagram, _, ecn = self.waiting.pop(0)
        return datagram, self.sender, ecn

    def receive_into(self, sock: socket.socket, buffer: memoryview) -> ReceivedBatch | None:
        del sock
        if not self.waiting:
            return None
        datagrams, segment, ecn = self.waiting.pop(0)
        buffer[: len(datagrams)] = datagrams
        return ReceivedBatch(len(datagrams), segment, self.sender, ecn)


class Driven:
    """Side A of a pair, driven by an engine; B is a device without an engine."""

    def __init__(self, *, is_batch: bool, has_headers: bool = True, connect: bool = True) -> None:
        self.is_batch = is_batch
        self.pair = Pair()
        if connect:
            self.pair.connect()
        self.device: Device = self.pair.a.device
        self.tun = MemoryTun(has_headers)
        self.udp = MemoryUdp(arrived_at(self.pair.b.endpoint, self.pair.a))
        self.refused: list[str] = []
        self.notes: list[tuple[str, str, int]] = []
        self.offloads = Offloads(OFFLOADS, lambda *note: self.notes.append(note))
        sockets, tun = cast("UdpSockets", self.udp), cast("Tun", self.tun)
        self.surroundings = Surroundings(self.device, sockets, tun, self.clock, self.refused.append)
        # However few messages there are, a batch engine of a test processes them together.
        self.engine = (
            BatchEngine(self.surroundings, offloads=self.offloads, worthwhile=2)
            if is_batch
            else SimpleEngine(self.surroundings)
        )

    def clock(self) -> int:
        return self.pair.now

    def send(self, frames: Sequence[bytes]) -> None:
        """Let the engine read frames; the simple one gets the packets that they stand for."""
        if not self.is_batch:
            frames = [bytes(HEADER_LENGTH) + packet for frame in frames for packet in flows.cut(completed(frame))]
        self.tun.waiting += frames
        while self.tun.waiting:
            self.engine.packets_waiting()

    def receive(self, datagrams: Sequence[bytes], ecn: int = 0) -> None:
        """Let the engine receive datagrams of one sender; the batch engine gets them as UDP_GRO would join them."""
        if self.is_batch:
            self.udp.waiting += [(b"".join(batch), len(batch[0]), ecn) for batch in batches(datagrams)]
        else:
            self.udp.waiting += [(datagram, len(datagram), ecn) for datagram in datagrams]
        while self.udp.waiting:
            self.engine.datagrams_waiting(cast("socket.socket", None))
        self.engine.time_passed()

    def messages(self, packets: Sequence[bytes]) -> list[bytes]:
        """Return the messages in which B sends these packets to A."""
        effects = [one for packet in packets for one in self.pair.b.device.send_packet(packet, MTU, self.pair.now)]
        return [effect.datagram for effect in effects if isinstance(effect, Transmit)]

    def outcome(self) -> dict[str, object]:
        """Return everything that both engines must have in common."""
        peer = self.pair.a.peer
        sessions = (peer.keypairs.previous, peer.keypairs.current, peer.keypairs.next)
        return {
            "sent": [one for one in self.udp.sent if one[0][0] == MessageType.DATA],
            # An initiation that renews the session may leave after the batch instead of after its first message.
            "handshakes": [one for one in self.udp.sent if one[0][0] != MessageType.DATA],
            "delivered": [
                flows.without_identification(packet) for frame in self.tun.written for packet in flows.cut(frame)
            ],
            "icmp": self.tun.icmp,
            "refused": len(self.refused) > 0,
            "statistics": peer.statistics,
            "device": self.device.statistics,
            "deadlines": (peer.timers._deadlines, peer.timers.need_another_keepalive),  # noqa: SLF001
            "staged": [staged.packet for staged in peer.staged.take()],
            "endpoint": peer.endpoint,
            "counters": [
                (one.sending_counter, one.receiving_counter._seen, one.receiving_counter._next)  # noqa: SLF001
                for one in sessions
                if one
            ],
        }


def batches(datagrams: Sequence[bytes]) -> list[list[bytes]]:
    """Join datagrams as UDP_GRO does: those of one length, with at most one shorter at the end, up to 64."""
    found: list[list[bytes]] = []
    for datagram in datagrams:
        last = found[-1] if found else []
        fits = last and len(last) < 64 and len(last[-1]) == len(last[0]) >= len(datagram) > 0
        if fits and sum(map(len, last)) + len(datagram) <= 65507:
            last.append(datagram)
        else:
            found.append([datagram])
    return found


def completed(frame: bytes) -> bytes:
    """Return a frame whose checksum is complete, if it is no superframe and asks for that."""
    if frame[0] != 1 or frame[1]:
        return frame
    packet = frame[HEADER_LENGTH:]
    flow = flows.read(packet)
    return bytes(HEADER_LENGTH) + flow.packet(packet[flow.header_length :])


def both(script: Callable[[Driven], None], **options: bool) -> Driven:
    """Run a script with each engine, demand the same outcome, and return the batch engine's side."""
    simple, batch = (Driven(is_batch=is_batch, **options) for is_batch in (False, True))
    outcomes = []
    for driven in (simple, batch):
        script(driven)
        outcomes.append(driven.outcome())
    for name, expected in outcomes[0].items():
        assert outcomes[1][name] == expected, f"the batch engine has another {name} than the simple one"
    return batch
