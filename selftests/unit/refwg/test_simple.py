from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from refwg.boundary import Deliver, Transmit, Unreachable
from refwg.cookie import compute_mac1, mac1_key_of
from refwg.engine.simple import SimpleEngine, Surroundings
from refwg.errors import DropReason
from refwg.ip import IcmpError
from refwg.messages import MILLISECOND
from refwg.rtnetlink import Link
from selftests.support.packets import ip_packet
from selftests.support.pair import Pair, arrived_at

if TYPE_CHECKING:
    import socket

    from refwg.boundary import Endpoint
    from refwg.peer import Peer
    from refwg.socket import Received, UdpSockets
    from refwg.tun import Tun


class FakeTun:
    """An interface made of two lists."""

    def __init__(self) -> None:
        self.link = Link(1, "wg0", 1420, is_up=True)
        self.waiting: list[bytes] = []
        self.written: list[bytes] = []
        self.errors: list[IcmpError] = []
        self.takes = True

    def read(self) -> bytes | None:
        return self.waiting.pop(0) if self.waiting else None

    def write(self, packet: bytes) -> bool:
        self.written.append(packet)
        return self.takes

    def mtu_to(self, destination: bytes) -> int:
        return 1300 if len(destination) == 4 else 1420

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        del now
        self.errors.append(error)
        return True


class FakeUdp:
    """Sockets made of two lists; `why` is the error of everything sent, empty for none."""

    def __init__(self) -> None:
        self.waiting: list[Received] = []
        self.sent: list[Transmit[Peer]] = []
        self.why = ""

    def receive(self, sock: socket.socket) -> Received | None:
        del sock
        return self.waiting.pop(0) if self.waiting else None

    def send(self, transmit: Transmit[Peer]) -> str:
        self.sent.append(transmit)
        return self.why


class Rig:
    """Side A of a pair, driven by an engine."""

    def __init__(self) -> None:
        self.pair, self.tun, self.udp = Pair(), FakeTun(), FakeUdp()
        self.device = self.pair.a.device
        sockets, tun = cast("UdpSockets", self.udp), cast("Tun", self.tun)
        # The time that the clock moves at each reading.
        self.step = 0
        self.engine = SimpleEngine(Surroundings(self.device, sockets, tun, self.clock))

    def clock(self) -> int:
        self.pair.now += self.step
        return self.pair.now

    def receive(self, datagram: bytes, sender: Endpoint | None = None) -> None:
        endpoint = arrived_at(sender or self.pair.b.endpoint, self.pair.a)
        self.udp.waiting.append((datagram, endpoint, 0))
        self.engine.datagrams_waiting(cast("socket.socket", None))


def test_interface_packets_are_staged_and_start_handshake() -> None:
    rig = Rig()
    rig.tun.waiting += [ip_packet("192.168.241.1", "192.168.241.2")] * 2
    rig.engine.packets_waiting()
    assert [effect.datagram[0] for effect in rig.udp.sent] == [1]
    assert rig.device.statistics.tx_bytes == 148
    assert [staged.mtu for staged in rig.pair.a.peer.staged.take()] == [1300, 1300]


@pytest.mark.requirement("IF-08")
def test_interface_packets_are_discarded_while_device_is_down() -> None:
    rig = Rig()
    rig.device.down(0)
    rig.tun.waiting.append(ip_packet("192.168.241.1", "192.168.241.2"))
    rig.engine.packets_waiting()
    assert (rig.udp.sent, rig.tun.waiting) == ([], [])


def test_empty_packet_from_interface_is_counted_as_not_ip() -> None:
    rig = Rig()
    rig.tun.waiting.append(b"")
    rig.engine.packets_waiting()
    assert rig.device.statistics.drops[DropReason.NOT_IP] == 1


@pytest.mark.requirement("DOS-08")
def test_engine_reads_64_packets_and_256_datagrams_per_turn() -> None:
    rig = Rig()
    rig.tun.waiting += [b""] * 100
    rig.engine.packets_waiting()
    assert len(rig.tun.waiting) == 36
    rig.udp.waiting += [(b"", rig.pair.b.endpoint, 0)] * 300
    rig.engine.datagrams_waiting(cast("socket.socket", None))
    assert len(rig.udp.waiting) == 44


@pytest.mark.requirement("DOS-08")
def test_handshake_processing_is_limited_in_time_per_turn() -> None:
    rig = Rig()
    start = bytes([1, 0, 0, 0]) + bytes(112)
    mac1 = compute_mac1(start + bytes(32), mac1_key_of(rig.pair.a.public_key))
    for _ in range(4):
        rig.receive(start + mac1 + bytes(16))
    assert rig.engine.next_deadline() == 0
    rig.step = MILLISECOND // 2
    rig.engine.time_passed()
    assert (rig.engine.next_deadline(), rig.device.statistics.drops[DropReason.LOW_ORDER_POINT]) == (0, 2)
    rig.engine.time_passed()
    assert rig.engine.next_deadline() is None


@pytest.mark.requirement("TM-16")
def test_failed_datagram_is_reported_to_device() -> None:
    rig = Rig()
    rig.udp.why = "ENETUNREACH"
    rig.engine.carry_out([Transmit(b"x", rig.pair.b.endpoint, 0, rig.pair.a.peer)])
    assert (rig.device.statistics.tx_bytes, rig.device.statistics.drops[DropReason.SEND_FAILED]) == (0, 1)


@pytest.mark.bug("IB-77")
def test_refused_datagram_is_handed_to_complaints_with_its_errno() -> None:
    rig = Rig()
    names: list[str] = []
    rig.udp.why = "ENOBUFS"
    sockets, tun = cast("UdpSockets", rig.udp), cast("Tun", rig.tun)
    engine = SimpleEngine(Surroundings(rig.device, sockets, tun, rig.clock, names.append))
    engine.carry_out([Transmit(b"x", rig.pair.b.endpoint, 0, rig.pair.a.peer)] * 2)
    assert (names, rig.device.statistics.drops[DropReason.SEND_FAILED]) == (["ENOBUFS"] * 2, 2)


@pytest.mark.parametrize(("takes", "lost"), [(True, 0), (False, 1)])
def test_packet_refused_by_interface_is_counted_as_drop(takes: bool, lost: int) -> None:
    rig = Rig()
    rig.tun.takes = takes
    rig.engine.carry_out([Deliver(b"packet", rig.pair.a.peer)])
    assert (rig.tun.written, rig.device.statistics.drops[DropReason.NOT_DELIVERED]) == ([b"packet"], lost)


@pytest.mark.requirement("ERR-02")
def test_icmp_error_is_handed_to_interface() -> None:
    rig = Rig()
    error = IcmpError(destination=bytes(4), message=b"error")
    rig.engine.carry_out([Unreachable(error)])
    assert rig.tun.errors == [error]
