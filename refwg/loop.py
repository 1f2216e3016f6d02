"""Wait for interface, sockets, configuration and clock, and call the engine.

Takes the place of the driver's work queues, timers and notifiers. Only this module, the trace and the self-test read a
clock.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from refwg import crypto
from refwg.device import Device
from refwg.engine.simple import SimpleEngine, Surroundings
from refwg.errors import ConfigError, InterfaceGoneError, Shortage, UnsuitableMachine
from refwg.messages import MILLISECOND, SECOND
from refwg.rtnetlink import Monitor, RtnetlinkSocket
from refwg.shortage import Complaints, as_shortage
from refwg.socket import UdpSockets
from refwg.uapi_socket import Control

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.boundary import Watcher
    from refwg.engine.batch import BatchEngine
    from refwg.engine.offloads import Offloads
    from refwg.engine.parallel import ParallelEngine
    from refwg.tun import Tun
    from refwg.uapi_socket import SocketFile

    Handler = Callable[[int], None]
    Log = Callable[[str], None]

# The machine was asleep if CLOCK_BOOTTIME has gained this much on CLOCK_MONOTONIC.
_ASLEEP: Final = 500 * MILLISECOND
# After a shortage: the time until the state of the interface is read again, or new connections are accepted again.
_TRY_AGAIN_AFTER: Final = SECOND
# A shortage that stopped a handler may leave its descriptor readable. This pause (in seconds) keeps it from becoming a
# busy loop.
_PAUSE: Final = 0.05
# The garbage collector searches for reference cycles after this many new objects (gc.set_threshold).
_GARBAGE: Final = 100_000
# More processes than any machine has use for: the process that moves the packets is full with a few.
MAX_WORKERS: Final = 32
# What numpy's builds for x86-64 use as soon as they are imported (x86-64-v2). Without it the process would be killed by
# SIGILL, also in a guest whose hypervisor hides it, as QEMU's default model does.
_INSTRUCTIONS: Final = frozenset({"popcnt", "sse4_1", "sse4_2", "ssse3"})
_CPU: Final = Path("/proc/cpuinfo")
STOPPING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def boot_clock() -> int:
    """Return nanoseconds since boot, time asleep included (CLOCK_BOOTTIME, as in the driver)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SystemEnvironment:
    """The core's `Environment`: random bytes and time of day of the system."""

    def random_bytes(self, length: int) -> bytes:
        """Return `length` bytes of urandom(4)."""
        return os.urandom(length)

    def wall_clock(self) -> int:
        """Return CLOCK_REALTIME in nanoseconds since 1970."""
        return time.time_ns()


def load_batch_engine() -> type[BatchEngine]:
    """Import the batch engine, which takes a tenth of a second: numpy is large.

    Raises UnsuitableMachine, ImportError or OSError.
    """
    if missing := _missing_instructions():
        raise UnsuitableMachine(f"numpy needs instructions that this CPU does not have: {', '.join(sorted(missing))}")
    # numpy's library for linear algebra, which is not used here, would start a thread for each processor.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from refwg.engine.batch import BatchEngine  # noqa: PLC0415 - after the control socket answers

    return BatchEngine


def load_parallel_engine() -> type[ParallelEngine]:
    """Import the batch engine with workers; raises what `load_batch_engine` raises."""
    from refwg.engine.parallel import ParallelEngine  # noqa: PLC0415 - only with --workers

    return ParallelEngine


def _missing_instructions() -> frozenset[str]:
    """Return the instructions that numpy needs and an x86 CPU does not have; no others are known."""
    for line in _CPU.read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return _INSTRUCTIONS - {*flags.split()}
    return frozenset()


class EngineChoice(NamedTuple):
    """What moves the packets: the engine `simple` or `batch`, or `auto`; offloads: those that `batch` may use.

    auto: simple until there are many packets in one turn, then batch. An idle interface does not need numpy. workers:
    how many encrypt and decrypt for `batch`; 0: it does so itself.
    """

    name: str
    offloads: frozenset[str] = frozenset()
    workers: int = 0


class Loop:
    """The event loop of one interface: sockets, device, engine and configuration.

    listener: the listening UAPI socket. log_error: called with each error message. engine: what moves packets.
    """

    def __init__(
        self,
        tun: Tun,
        listener: socket.socket,
        *,
        watcher: Watcher | None,
        log_error: Log,
        engine: EngineChoice = EngineChoice("simple"),  # noqa: B008 - immutable
    ) -> None:
        self._tun = tun
        self._choice = engine
        self._watcher = watcher
        self._log_error = log_error
        self._complaints = Complaints(log_error, boot_clock)
        tun.complain = self._complaints.shortage
        self._routes = Monitor(links=True, routes=True)
        self._sockets = UdpSockets(RtnetlinkSocket(), self._routes)
        self._device = Device(SystemEnvironment(), self._sockets, now=boot_clock(), watcher=watcher)
        self._surroundings = Surroundings(self._device, self._sockets, tun, boot_clock, self._complaints.not_sent)
        self._engine: SimpleEngine = SimpleEngine(self._surroundings)
        self._selector = selectors.DefaultSelector()
        self._control = Control(
            listener,
            self._selector,
            self._device,
            self._sockets,
            clock=boot_clock,
            carry_out=self._engine.carry_out,
            complain=self._complaints.shortage,
            try_later=self._try_later,
        )
        self._wakers: tuple[socket.socket, socket.socket] | None = None
        self._udp: list[socket.socket] = []
        self._udp_generation = -1
        self._pool: object = None
        self._is_running = True
        self._sleep_seen = _time_asleep()
        # What must be tried again after a shortage, with the time.
        self._later: dict[Callable[[], None], int] = {}

    def start(self) -> None:
        """Do the last steps that can fail; the process may then report that it is ready."""
        self._watch_signals()
        self._selector.register(self._tun, selectors.EVENT_READ, lambda _: self._engine.packets_waiting())
        self._selector.register(self._routes, selectors.EVENT_READ, lambda _: self._sockets.follow_changes())
        self._selector.register(self._tun.monitor, selectors.EVENT_READ, self._link_changed)
        self._apply_link_state()
        # Reference cycles are rare here, and the garbage collector takes long to search a large configuration for them.
        gc.freeze()
        gc.set_threshold(_GARBAGE)

    def run(self) -> None:
        """Handle events until SIGTERM or SIGINT, or until the interface or the socket file is removed.

        Raises ForbiddenNamespace if the interface was moved to where this process must not follow it, and OSError if
        the system refuses what refwg cannot do without. A shortage is logged, and the loop goes on.
        """
        # Now, because later there may be no descriptor for the files that `cryptography` imports on first use.
        crypto.load()
        with suppress(InterfaceGoneError):
            while self._is_running:
                self._turn()
        self._engine.close()
        self._device.down(boot_clock())
        # This removes the interface now; the rest of the shutdown may take longer.
        self._tun.close()

    def stop_when_removed(self, file: SocketFile) -> None:
        """End the loop when this file is removed: the way to stop a userspace WireGuard (`rm NAME.sock`)."""
        if file.path is None:
            return
        # Imported late, so that the socket file appears sooner.
        from refwg.inotify import RemovalWatch  # noqa: PLC0415

        watch = RemovalWatch(file.path.parent)

        def stop_if_removed(_: int) -> None:
            """Stop the loop if the file is gone; events of other files change nothing."""
            watch.drain()
            if not file.is_there:
                self._stop()

        self._selector.register(watch, selectors.EVENT_READ, stop_if_removed)
        # The file may have been removed before the watch began.
        stop_if_removed(0)

    def _turn(self) -> None:
        self._survive(self._watch_udp)
        ready = self._selector.select(self._timeout())
        # Before any event: handlers must not use keys from before the sleep, nor begin a handshake that is then erased.
        self._notice_sleep()
        # Changes of routes and links come first, because they decide how the next datagrams are sent.
        if len(ready) > 1:
            ready.sort(key=_by_urgency)
        for key, events in ready:
            handler: Handler = key.data
            if self._pool is not None and not self._is_traffic(key.fileobj):
                # The device may change, and what is in work belongs to its present state.
                self._survive(self._engine.settle)
            self._survive(handler, events)
            self._survive(self._watch_udp)
        self._survive(self._engine.time_passed)
        if self._choice.name == "batch" or (self._choice.name == "auto" and self._engine.is_busy):
            self._change_engine()
        self._try_again()
        self._tun.rest()

    def _is_traffic(self, source: object) -> bool:
        return source is self._tun or source is self._pool or source in self._udp

    def _change_engine(self) -> None:
        """Take the batch engine from now on; without numpy, or with too little memory for it, the simple one stays."""
        choice, self._choice = self._choice, EngineChoice("done")
        try:
            batch = load_batch_engine()
        except (UnsuitableMachine, ImportError, OSError, MemoryError) as error:
            self._log_error(f"the simple engine stays, because the batch engine cannot be loaded: {error}")
            return
        # Imported late, like the engine.
        from refwg.engine import offloads  # noqa: PLC0415

        names = offloads.enable(self._tun, self._sockets, choice.offloads)
        enabled = offloads.Offloads(names, self._note_offload)
        if not choice.workers or not self._start_workers(choice.workers, enabled):
            self._engine = batch(self._surroundings, offloads=enabled)
        if self._watcher is not None:
            self._watcher.note(boot_clock(), "engine", b"", name="batch", offloads=sorted(enabled.enabled))

    def _start_workers(self, workers: int, offloads: Offloads) -> bool:
        """Take the batch engine with workers; returns False if there is no memory or no descriptor for it."""
        try:
            engine = load_parallel_engine()(
                self._surroundings,
                offloads=offloads,
                workers=workers,
                complain=self._complaints.shortage,
            )
            self._selector.register(engine.pool, selectors.EVENT_READ, lambda _: engine.work_done())
        except (UnsuitableMachine, ImportError, OSError, MemoryError) as error:
            self._log_error(f"no workers: {error}")
            return False
        self._engine, self._pool = engine, engine.pool
        return True

    def _note_offload(self, direction: str, offload: str, count: int) -> None:
        if self._watcher is not None:
            self._watcher.note(boot_clock(), "offload", b"", direction=direction, offload=offload, count=count)

    def _survive(self, step: Callable[..., None], *arguments: int) -> None:
        """Call one step of a turn; a shortage that stops it is logged and costs only the packets of this step."""
        try:
            step(*arguments)
        except (MemoryError, OSError, Shortage) as error:
            self._log_shortage(error)

    def _log_shortage(self, error: MemoryError | OSError | Shortage) -> None:
        """Log a shortage and pause; an error that is not a shortage is raised again."""
        try:
            with as_shortage("an event could not be handled"):
                raise error
        except Shortage as shortage:
            self._complaints.shortage("turn", str(shortage))
            time.sleep(_PAUSE)

    def _try_later(self, step: Callable[[], None]) -> None:
        """Call `step` in a second; asked twice, it is called once."""
        self._later.setdefault(step, boot_clock() + _TRY_AGAIN_AFTER)

    def _try_again(self) -> None:
        if not self._later:
            return
        now = boot_clock()
        for step in [step for step, due in self._later.items() if due <= now]:
            del self._later[step]
            self._survive(self._engine.settle)
            self._survive(step)

    def _timeout(self) -> float | None:
        deadline = self._engine.next_deadline()
        if self._later:
            again = min(self._later.values())
            deadline = again if deadline is None else min(deadline, again)
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
        """Register the UDP sockets that are open now, if they have changed."""
        if self._udp_generation == self._sockets.generation:
            return
        for sock in self._udp:
            # After a shortage in the selector some may not be registered.
            with suppress(KeyError, ValueError):
                self._selector.unregister(sock)
        self._udp = self._sockets.sockets
        for sock in self._udp:
            self._selector.register(sock, selectors.EVENT_READ, partial(self._datagrams_waiting, sock))
        # Last, so that a shortage in the selector is made good at the next turn.
        self._udp_generation = self._sockets.generation

    def _datagrams_waiting(self, sock: socket.socket, _: int) -> None:
        """Process a datagram, then packets of the interface, then the other datagrams.

        This host has often answered already: the kernel answers a ping while it takes the packet. It would take longer
        to learn that from the selector than to encrypt the answer.
        """
        self._engine.datagrams_waiting(sock, 1)
        self._engine.packets_waiting()
        self._engine.datagrams_waiting(sock)

    def _link_changed(self, _: int) -> None:
        self._refresh_link()

    def _refresh_link(self) -> None:
        """Read the link's state and apply it; after a shortage this is tried again until it succeeds."""
        try:
            if self._tun.refresh():
                self._device.down(boot_clock())
            self._apply_link_state()
        except Shortage as shortage:
            self._complaints.shortage("look", str(shortage))
            self._try_later(self._refresh_link)

    def _apply_link_state(self) -> None:
        """Set the device up or down like the interface; if the device cannot go up, set the interface down."""
        if not self._tun.link.is_up:
            if self._device.is_up:
                self._device.down(boot_clock())
            return
        try:
            self._engine.carry_out(self._device.up(boot_clock()))
        except ConfigError as error:
            self._log_error(f"{error}; the interface is set down")
            self._tun.set_down()

    def _notice_sleep(self) -> None:
        asleep = _time_asleep()
        if asleep > self._sleep_seen + _ASLEEP:
            if self._pool is not None:
                self._survive(self._engine.settle)
            self._sleep_seen = asleep
            self._device.clear_keys(boot_clock())


def _time_asleep() -> int:
    return boot_clock() - time.monotonic_ns()


def _by_urgency(ready: tuple[selectors.SelectorKey, int]) -> bool:
    return not isinstance(ready[0].fileobj, Monitor)
