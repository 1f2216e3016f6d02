"""Drive a batch engine by recorded superframes and batches, and keep what comes out.

    interface of A ---- engine and device A ---- B, C: devices that make and read the datagrams of real sessions

Device, engine, workers and encryption are real. The interface and the sockets are lists.
"""

from __future__ import annotations

from collections import deque
from ipaddress import ip_address
from struct import pack
from typing import TYPE_CHECKING, NamedTuple, cast

from refwg.boundary import Deliver, Transmit
from refwg.engine.batch import BatchEngine
from refwg.engine.offloads import OFFLOADS, Offloads
from refwg.engine.parallel import ParallelEngine
from refwg.engine.simple import Surroundings
from refwg.engine.virtio import GSO_TCPV4, NEEDS_CHECKSUM, PLAIN_HEADER, VirtioHeader
from refwg.ip import internet_checksum
from refwg.messages import SECOND, Data
from refwg.rtnetlink import Link
from refwg.socket import ReceivedBatch
from selftests.support.packets import ip_packet
from selftests.support.pair import Side, arrived_at

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from refwg.boundary import Endpoint
    from refwg.device import Effect
    from refwg.ip import IcmpError
    from refwg.peer import Peer
    from refwg.socket import UdpSockets
    from refwg.tun import Tun

MSS = 1360
TCP = 6
_ACK = 0x10
_NO_SOCKET = cast("socket.socket", None)


class RecordedTun:
    """An interface with virtio headers: `waiting` is read, `written` is what was passed to it."""

    has_headers = True

    def __init__(self) -> None:
        self.link = Link(1, "wg0", 1420, is_up=True)
        self.waiting: deque[bytes] = deque()
        self.written: list[bytes] = []

    def read_into(self, buffer: memoryview) -> int:
        if not self.waiting:
            return 0
        frame = self.waiting.popleft()
        buffer[: len(frame)] = frame
        return len(frame)

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        self.written.append(b"".join(parts))
        return True

    def write(self, packet: bytes) -> bool:
        return self.write_parts([PLAIN_HEADER, packet])

    def limit_superframes(self, size: int) -> None:
        del size

    def mtu_to(self, destination: bytes) -> int:
        del destination
        return self.link.mtu

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        del error, now
        return True


class SentBatch(NamedTuple):
    """Datagrams that were sent by one call; segment: the length of each but the last, 0 if it is one."""

    endpoint: Endpoint
    datagrams: bytes
    segment: int

    def split(self) -> list[bytes]:
        """Return the datagrams one by one."""
        size = self.segment or len(self.datagrams)
        return [self.datagrams[start : start + size] for start in range(0, len(self.datagrams), size)]


class RecordedSockets:
    """Sockets that join datagrams: `waiting` is read, `sent` is what was passed to them."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[bytes, int, Endpoint, int]] = deque()
        self.sent: list[SentBatch] = []

    def receive_into(self, sock: socket.socket, buffer: memoryview) -> ReceivedBatch | None:
        del sock
        if not self.waiting:
            return None
        data, segment, endpoint, ecn = self.waiting.popleft()
        buffer[: len(data)] = data
        return ReceivedBatch(len(data), segment, endpoint, ecn)

    def send(self, transmit: Transmit[Peer], segment: int = 0) -> str:
        self.sent.append(SentBatch(transmit.endpoint, bytes(transmit.datagram), segment))
        return ""


class Rig:
    """An engine of device A with sessions with B and C; workers: 0 for the batch engine. Close it.

    threads: as in `Pool`. tun, udp: others than those that keep everything. complaints: topics and messages.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        threads: bool | None = None,
        tun: RecordedTun | None = None,
        udp: RecordedSockets | None = None,
    ) -> None:
        self.now = SECOND
        self.a, self.b, self.c = (Side(name, number, lambda: self.now, 7) for number, name in enumerate("ABC", 1))
        self.others = (self.b, self.c)
        self.complaints: list[tuple[str, str]] = []
        for other in self.others:
            for side, remote in ((self.a, other), (other, self.a)):
                side.add_peer(remote, self.now).set_endpoint(remote.endpoint, self.now)
                side.device.up(self.now)
            self._connect(other)
        self.tun, self.udp = tun or RecordedTun(), udp or RecordedSockets()
        sockets, interface = cast("UdpSockets", self.udp), cast("Tun", self.tun)
        self.offloads = Offloads(OFFLOADS, lambda *_: None)
        surroundings = Surroundings(self.a.device, sockets, interface, lambda: self.now)
        if workers:
            self.engine: BatchEngine = ParallelEngine(
                surroundings,
                offloads=self.offloads,
                workers=workers,
                complain=lambda *complaint: self.complaints.append(complaint),
                threads=threads,
            )
        else:
            self.engine = BatchEngine(surroundings, offloads=self.offloads)

    @property
    def parallel(self) -> ParallelEngine:
        """The engine, which has workers."""
        assert isinstance(self.engine, ParallelEngine)
        return self.engine

    def close(self) -> None:
        self.engine.close()

    def _connect(self, other: Side) -> None:
        """Make a session that A initiates and that is confirmed."""
        packet = ip_packet(self.a.inner[4], other.inner[4])
        waiting = deque([(self.a, self.a.device.send_packet(packet, 1420, self.now))])
        while waiting:
            side, effects = waiting.popleft()
            to = other if side is self.a else self.a
            for effect in effects:
                if isinstance(effect, Transmit):
                    side.device.sent(effect, self.now)
                    waiting.append((to, self._arrive(to, effect.datagram, side)))
                elif isinstance(effect, Deliver):
                    to = side
        assert other.peer.keypairs.current is not None

    def _arrive(self, side: Side, datagram: bytes, sender: Side) -> list[Effect]:
        effects = side.device.receive_datagram(datagram, arrived_at(sender.endpoint, side), 0, self.now)
        return [*effects, *side.device.process_handshakes(self.now)]

    # Input.

    def send(self, *frames: bytes) -> None:
        """Let the engine read frames from the interface, until none is left."""
        self.tun.waiting += frames
        while self.tun.waiting:
            self.engine.packets_waiting()

    def receive(self, sender: Side, datagrams: Sequence[bytes], ecn: int = 0) -> None:
        """Let the engine read datagrams of a side; those of one length that follow each other come together."""
        first = 0
        for position in range(1, len(datagrams) + 1):
            is_end = position == len(datagrams) or len(datagrams[position - 1]) < len(datagrams[first])
            if is_end or len(datagrams[position]) > len(datagrams[first]) or position - first == 40:
                batch = datagrams[first:position]
                origin = arrived_at(sender.endpoint, self.a)
                self.udp.waiting.append((b"".join(batch), len(batch[0]), origin, ecn))
                first = position
        while self.udp.waiting:
            self.engine.datagrams_waiting(_NO_SOCKET)

    def sealed(self, sender: Side, packets: Sequence[bytes]) -> list[bytes]:
        """Return the datagrams in which a side sends packets to A."""
        effects = [effect for packet in packets for effect in sender.device.send_packet(packet, 1420, self.now)]
        return [effect.datagram for effect in effects if isinstance(effect, Transmit)]

    # Output.

    def sent_to(self, side: Side) -> list[bytes]:
        """Return the datagrams that A has sent to a side, in order."""
        address = side.endpoint.address
        return [datagram for batch in self.udp.sent if batch.endpoint.address == address for datagram in batch.split()]

    def counters_to(self, side: Side) -> list[int]:
        """Return the counters of the data messages that A has sent to a side, in order."""
        return [Data.parse(datagram).counter for datagram in self.sent_to(side) if datagram[0] == 4]

    def opened_by(self, side: Side) -> list[bytes]:
        """Return the packets in the datagrams that A has sent to a side, decrypted by that side."""
        effects = [effect for datagram in self.sent_to(side) for effect in self._arrive(side, datagram, self.a)]
        return [effect.packet for effect in effects if isinstance(effect, Deliver)]


def tcp_segments(source: str, destination: str, payload: bytes, *, sequence: int = 1, size: int = MSS) -> list[bytes]:
    """Return data as TCP segments with correct checksums."""
    return [
        _tcp(source, destination, payload[start : start + size], sequence + start, index)
        for index, start in enumerate(range(0, len(payload), size))
    ]


def superframe(
    source: str, destination: str, payload: bytes, *, sequence: int = 1, size: int = MSS, identification: int = 1
) -> bytes:
    """Return data as one IPv4 TCP superframe of the interface, with its virtio header (TSO)."""
    packet = _tcp(source, destination, payload, sequence, identification - 1)
    pseudo = internet_checksum(_pseudo_header(source, destination, 20 + len(payload))) ^ 0xFFFF
    packet = packet[:36] + pack(">H", pseudo) + packet[38:]
    header = VirtioHeader(NEEDS_CHECKSUM, GSO_TCPV4, 40, size, 20, 16)
    return header.to_bytes() + packet


def _tcp(source: str, destination: str, payload: bytes, sequence: int, index: int) -> bytes:
    header = pack(">HHLLBBHHH", 5001, 5001, sequence % (1 << 32), 1, 5 << 4, _ACK, 65535, 0, 0)
    checksum = internet_checksum(_pseudo_header(source, destination, 20 + len(payload)) + header + payload)
    segment = header[:16] + pack(">H", checksum) + header[18:] + payload
    packet = ip_packet(source, destination, segment, protocol=TCP)
    # Identification 1 + index, with the checksum of the header.
    numbered = packet[:4] + pack(">H", 1 + index) + packet[6:10] + bytes(2) + packet[12:20]
    return numbered[:10] + pack(">H", internet_checksum(numbered)) + numbered[12:] + segment


def _pseudo_header(source: str, destination: str, length: int) -> bytes:
    return ip_address(source).packed + ip_address(destination).packed + pack(">HH", TCP, length)
