"""Wait for interface, sockets, configuration and clock, and let the engine do the rest.

Mirrors what work queues, timers and notifiers are for the driver. Only this place reads a clock, and the self-test.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import time
from typing import TYPE_CHECKING, Final

from refwg.device import Device
from refwg.engine.simple import SimpleEngine
from refwg.errors import ConfigError, InterfaceGoneError
from refwg.messages import MILLISECOND, SECOND
from refwg.rtnetlink import Monitor, RtnetlinkSocket
from refwg.socket import UdpSockets
from refwg.uapi_socket import Control

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.boundary import Watcher
    from refwg.tun import Tun
    from refwg.uapi_socket import SocketFile

    Handler = Callable[[int], None]
    Log = Callable[[str], None]

# Clocks that differ by this much more than before: the machine was asleep.
_ASLEEP: Final = 500 * MILLISECOND
# So many new objects before the first look for garbage in cycles.
_GARBAGE: Final = 100_000
STOPPING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def boot_clock() -> int:
    """Nanoseconds since the machine was started, time asleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SystemEnvironment:
    """Chance and the time of day, as the system has them."""

    def random_bytes(self, length: int) -> bytes:
        return os.urandom(length)

    def wall_clock(self) -> int:
        return time.time_ns()


class Loop:
    """Everything that runs between the start of the process and its end."""

    def __init__(self, tun: Tun, listener: socket.socket, *, watcher: Watcher | None, log_error: Log) -> None:
        self._tun = tun
        self._log_error = log_error
        self._sockets = UdpSockets(RtnetlinkSocket())
        self._device = Device(SystemEnvironment(), self._sockets, now=boot_clock(), watcher=watcher)
        self._engine = SimpleEngine(self._device, self._sockets, tun, boot_clock)
        self._selector = selectors.DefaultSelector()
        self._control = Control(
            listener,
            self._selector,
            self._device,
            self._sockets,
            clock=boot_clock,
            carry_out=self._engine.carry_out,
        )
        self._routes = Monitor(routes=True)
        self._wakers: tuple[socket.socket, socket.socket] | None = None
        self._udp: list[socket.socket] = []
        self._udp_generation = -1
        self._is_running = True
        self._sleep_seen = _time_asleep()

    def start(self) -> None:
        """Do the last things that can fail; then whoever waits for us may go on."""
        self._watch_signals()
        self._selector.register(self._tun, selectors.EVENT_READ, lambda _: self._engine.packets_waiting())
        self._selector.register(self._routes, selectors.EVENT_READ, self._routes_changed)
        self._selector.register(self._tun.monitor, selectors.EVENT_READ, self._link_changed)
        self._apply_link_state()
        # Next to nothing here is garbage in a cycle, and a large configuration is long to search for it.
        gc.freeze()
        gc.set_threshold(_GARBAGE)

    def run(self) -> None:
        """Work until a signal comes, or the interface or the socket file is gone."""
        try:
            while self._is_running:
                self._turn()
        except InterfaceGoneError as error:
            if str(error):
                self._log_error(str(error))
        self._device.down(boot_clock())
        # The interface goes at once, however long it takes to clear up behind it.
        self._tun.close()

    def stop_when_removed(self, file: SocketFile) -> None:
        """End when this file is gone: it is how a user tells us to."""
        if file.path is None:
            return
        # Imported late: it takes time, and nobody removes the file before it is there.
        from refwg.inotify import RemovalWatch  # noqa: PLC0415

        watch = RemovalWatch(file.path.parent)

        def look(_: int) -> None:
            watch.drain()
            if not file.is_there:
                self._stop()

        self._selector.register(watch, selectors.EVENT_READ, look)
        # Somebody may have been quicker than we.
        look(0)

    def _turn(self) -> None:
        self._watch_udp()
        ready = self._selector.select(self._timeout())
        # What has woken us must neither be answered with old keys nor begin a handshake that is forgotten then.
        self._notice_sleep()
        # Changes of routes and links first: what is sent next must know of them.
        for key, events in sorted(ready, key=_by_urgency):
            handler: Handler = key.data
            handler(events)
            self._watch_udp()
        self._engine.time_passed()
        self._tun.rest()

    def _timeout(self) -> float | None:
        deadline = self._engine.next_deadline()
        return None if deadline is None else max(0, deadline - boot_clock()) / SECOND

    def _stop(self) -> None:
        self._is_running = False

    def _watch_signals(self) -> None:
        waker, sleeper = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in STOPPING_SIGNALS:
            signal.signal(number, lambda *_: self._stop())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING_SIGNALS)
        self._selector.register(sleeper, selectors.EVENT_READ, lambda _: sleeper.recv(1))
        self._wakers = (waker, sleeper)

    def _watch_udp(self) -> None:
        """Listen to the sockets that are open now."""
        if self._udp_generation == self._sockets.generation:
            return
        self._udp_generation = self._sockets.generation
        for one in self._udp:
            self._selector.unregister(one)
        self._udp = self._sockets.sockets
        for one in self._udp:
            self._selector.register(one, selectors.EVENT_READ, lambda _, one=one: self._engine.datagrams_waiting(one))

    def _link_changed(self, _: int) -> None:
        # Of the IPv4 routes by a link that goes down nothing else is told.
        self._sockets.routes_changed()
        if self._tun.refresh():
            self._device.down(boot_clock())
        self._apply_link_state()

    def _apply_link_state(self) -> None:
        """Be up when the interface is; if that cannot be, the interface must not be up either."""
        if not self._tun.link.is_up:
            if self._device.is_up:
                self._device.down(boot_clock())
            return
        try:
            self._engine.carry_out(self._device.up(boot_clock()))
        except ConfigError as error:
            self._log_error(str(error))
            self._tun.set_down()

    def _routes_changed(self, _: int) -> None:
        self._routes.drain()
        self._sockets.routes_changed()

    def _notice_sleep(self) -> None:
        asleep = _time_asleep()
        if asleep > self._sleep_seen + _ASLEEP:
            self._sleep_seen = asleep
            self._device.clear_keys(boot_clock())


def _time_asleep() -> int:
    return boot_clock() - time.monotonic_ns()


def _by_urgency(ready: tuple[selectors.SelectorKey, int]) -> bool:
    return not isinstance(ready[0].fileobj, Monitor)
