from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from refwg import loop
from refwg.errors import UnsuitableMachine
from refwg.loop import Loop, SystemEnvironment, boot_clock
from selftests.support.sandbox import run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from refwg.device import Device


@pytest.mark.requirement("TM-31")
def test_boot_clock_never_goes_back() -> None:
    first, second = boot_clock(), boot_clock()
    assert 0 < first <= second


def test_system_environment_gives_random_bytes_and_wall_clock() -> None:
    environment = SystemEnvironment()
    assert len(environment.random_bytes(32)) == 32
    assert environment.random_bytes(32) != environment.random_bytes(32)
    assert environment.wall_clock() > 1_700_000_000 * 10**9


CPU = """processor\t: 0
{}\t\t: fpu sse sse2 cx16 {}
processor\t: 1
"""
NEEDED = "ssse3 sse4_1 sse4_2 popcnt"


@pytest.mark.parametrize(
    ("cpu", "missing"),
    [
        (CPU.format("flags", NEEDED), ""),
        (CPU.format("flags", ""), "popcnt, sse4_1, sse4_2, ssse3"),
        (CPU.format("flags", "ssse3 sse4_1 popcnt"), "sse4_2"),
        (CPU.format("Features", ""), ""),
    ],
    ids=["all", "none", "without-one", "other-architecture"],
)
def test_numpy_is_not_imported_on_cpu_that_it_would_crash_on(
    cpu: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpu)
    monkeypatch.setattr(loop, "_CPU", tmp_path / "cpuinfo")
    if not missing:
        assert loop.load_batch_engine().__name__ == "BatchEngine"
        return
    with pytest.raises(UnsuitableMachine, match=f"instructions that this CPU does not have: {missing}$"):
        loop.load_batch_engine()


class Sleeper:
    """A device that counts the calls of `clear_keys`."""

    def __init__(self) -> None:
        self.calls = 0

    def clear_keys(self, now: int) -> None:
        del now
        self.calls += 1


@pytest.mark.requirement("TM-32")
@pytest.mark.parametrize(("asleep", "calls"), [(0, 0), (400_000_000, 0), (600_000_000, 1)])
def test_keys_are_forgotten_once_after_sleep_beyond_threshold(
    asleep: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, running = Sleeper(), object.__new__(Loop)
    running._device, running._sleep_seen, running._pool = cast("Device", sleeper), 5, None
    monkeypatch.setattr(loop, "_time_asleep", lambda: 5 + asleep)
    for _ in range(3):
        running._notice_sleep()
    assert sleeper.calls == calls


@pytest.mark.requirement("TM-32")
def test_keys_are_forgotten_before_pending_events_are_handled() -> None:
    code = """
        import selectors, socket
        from refwg import loop
        from refwg.uapi_socket import listen
        from refwg.tun import Tun
        class Watcher:
            def note(self, now, event, peer, **details): print(event)
        running = loop.Loop(Tun.create("wg0"), listen("wg0"), watcher=Watcher(), log_error=print)
        ours, others = socket.socketpair()
        running._selector.register(ours, selectors.EVENT_READ, lambda _: print("handled", ours.recv(9)))
        others.send(b"one"); running._turn()
        awake = loop._time_asleep(); loop._time_asleep = lambda: awake + 10**9
        others.send(b"two"); running._turn()
        others.send(b"three"); running._turn()
    """
    order = "handled b'one'\nkeys cleared\nhandled b'two'\nhandled b'three'\n"
    assert run_in_sandbox("", code) == order


def test_interface_is_read_between_first_datagram_and_others() -> None:
    code = """
        import socket
        from refwg.loop import Loop
        from refwg.uapi_socket import listen
        from refwg.tun import Tun
        running = Loop(Tun.create("wg0"), listen("wg0"), watcher=None, log_error=print)
        running._device.up(0); running._watch_udp()
        ours = next(sock for sock in running._udp if sock.family == socket.AF_INET)
        engine, receive = running._engine, running._sockets.receive
        def received(sock):
            datagram = receive(sock)
            print("datagram", datagram and datagram[0])
            return datagram
        running._sockets.receive = received
        engine.packets_waiting = lambda: print("interface")
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for data in (b"one", b"two"):
            client.sendto(data, ("127.0.0.1", ours.getsockname()[1]))
        running._turn()
    """
    assert run_in_sandbox("", code) == "datagram b'one'\ninterface\ndatagram b'two'\ndatagram None\n"


def test_work_of_workers_is_finished_before_device_may_change() -> None:
    code = """
        import selectors, socket
        from refwg import loop
        from refwg.uapi_socket import listen
        from refwg.tun import Tun
        choice = loop.EngineChoice("batch", frozenset(), 1)
        running = loop.Loop(Tun.create("wg0"), listen("wg0"), watcher=None, log_error=print, engine=choice)
        ours, others = socket.socketpair()
        running._selector.register(ours, selectors.EVENT_READ, lambda _: print("handled", ours.recv(9)))
        others.send(b"one"); running._turn()
        engine = running._engine; settle = engine.settle
        engine.settle = lambda: print("finished", settle())
        others.send(b"two"); running._turn()
        ours.close(); engine.close()
    """
    assert run_in_sandbox("", code) == "handled b'one'\nfinished None\nhandled b'two'\n"


@pytest.mark.requirement("RT-13")
def test_cached_routes_are_dropped_when_link_goes_down() -> None:
    code = """
        import subprocess
        from refwg import loop
        from refwg.boundary import Endpoint, Transmit
        from refwg.uapi_socket import listen
        from refwg.tun import Tun
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        for number in (1, 2):
            ip(f"link add v{number} type veth peer name w{number}"); ip(f"address add 10.0.{number}.1/24 dev v{number}")
            for name in ("v", "w"):
                open(f"/proc/sys/net/ipv6/conf/{name}{number}/disable_ipv6", "w").write("1")
                ip(f"link set {name}{number} up")
        running = loop.Loop(Tun.create("wg0"), listen("wg0"), watcher=None, log_error=print)
        def settle():
            while running._selector.select(0):
                running._turn()
        running.start(); running._sockets.open(7); settle()
        running._sockets.send(Transmit(b"x", Endpoint(bytes([10, 0, 1, 9]), 5), 0, None))
        print(len(running._sockets._plans)); ip("link set v1 down"); settle()
        print(len(running._sockets._plans))
    """
    assert run_in_sandbox("", code) == "1\n0\n"
