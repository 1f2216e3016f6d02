"""Start worker processes that encrypt and decrypt in shared memory; replace dead ones.

Takes the place of the driver's queues of work for each CPU (wg_packet_encrypt_worker, wg_packet_decrypt_worker). The
AEAD keeps the interpreter's lock, so only processes work at the same time. On a free-threaded interpreter the workers
are threads. A worker keeps no key: it gets one with each job.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from refwg.engine.jobs import Answer
from refwg.messages import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.engine.jobs import Job, Workbench

# A worker that answers nothing for this long is killed, and replaced. A job takes less than a millisecond.
_PATIENCE: Final = 2 * SECOND
# After a process could not be started: the time until it is tried again.
_TRY_AGAIN_AFTER: Final = SECOND
_LARGEST_RECORD: Final = 65536
_FIRST_DESCRIPTOR: Final = 3
_NAME: Final = "refwg worker"


class _Worker:
    """One worker, seen from the main process.

    process: its id; 0 for a thread. jobs: the numbers of those that it has not answered. since: when it last answered,
    or began to work.
    """

    def __init__(self, sock: socket.socket, process: int) -> None:
        self.socket = sock
        self.process = process
        self.jobs: list[int] = []
        self.since = 0


def _load(worker: _Worker) -> int:
    return len(worker.jobs)


class Pool:
    """Workers that do jobs at the same time; readable (`fileno`) when `answers` has something.

    make_bench: called by each worker for its own `Workbench`. complain: called with a topic and a message when a
    worker has died, or cannot be started.
    """

    def __init__(
        self,
        workers: int,
        make_bench: Callable[[], Workbench],
        *,
        clock: Callable[[], int],
        complain: Callable[[str, str], None],
        threads: bool | None = None,
    ) -> None:
        """Start workers; threads: None: if the interpreter is free-threaded."""
        self._wanted = workers
        self._make_bench = make_bench
        self._clock = clock
        self._complain = complain
        self._threads = is_free_threaded() if threads is None else threads
        self._workers: dict[int, _Worker] = {}
        self._epoll = select.epoll()
        self._own_bench: Workbench | None = None
        self._retry: int | None = None
        self._start_missing()

    def fileno(self) -> int:
        """Return the descriptor, readable when a worker has answered or died."""
        return self._epoll.fileno()

    @property
    def processes(self) -> list[int]:
        """The ids of the worker processes."""
        return [worker.process for worker in self._workers.values() if worker.process]

    def submit(self, job: Job) -> Answer | None:
        """Pass a job to the worker that has the fewest; returns the answer at once if there are no workers."""
        record = job.to_bytes()
        for worker in sorted(self._workers.values(), key=_load):
            if not worker.jobs:
                worker.since = self._clock()
            try:
                worker.socket.send(record)
            except OSError:
                # It has just died; `answers` will find that out.
                continue
            worker.jobs.append(job.arena)
            return None
        if self._own_bench is None:
            self._own_bench = self._make_bench()
        return Answer.parse(self._own_bench.do(record))

    def answers(self, timeout: float | None) -> list[tuple[int, Answer | None]]:
        """Return the jobs that are done, by the numbers of their arenas; None: the worker died, and the job is lost.

        timeout: seconds to wait for the first one; None: as long as a worker may take.
        """
        if timeout is None:
            timeout = _PATIENCE / SECOND
        found: list[tuple[int, Answer | None]] = []
        for descriptor, _ in self._epoll.poll(timeout):
            found += self._read(self._workers[descriptor])
        self._kill_overdue()
        return found

    def _read(self, worker: _Worker) -> list[tuple[int, Answer | None]]:
        found: list[tuple[int, Answer | None]] = []
        while True:
            try:
                record = worker.socket.recv(_LARGEST_RECORD)
            except BlockingIOError:
                return found
            except ConnectionError:
                # The worker died with jobs unread. Its answers, and then the end, are behind this error.
                continue
            if not record:
                return [*found, *((number, None) for number in self._replace(worker))]
            answer = Answer.parse(record)
            worker.jobs.remove(answer.arena)
            worker.since = self._clock()
            found.append((answer.arena, answer))
            if not worker.jobs:
                return found

    def _replace(self, worker: _Worker) -> list[int]:
        """Start a worker in place of one that died; returns the jobs that it had."""
        self._epoll.unregister(worker.socket)
        del self._workers[worker.socket.fileno()]
        worker.socket.close()
        how = _ended(worker.process) if worker.process else "ended"
        self._complain("worker died", f"a worker {how}: {len(worker.jobs)} batches of packets were dropped with it")
        self._start_missing()
        return worker.jobs

    def tend(self) -> None:
        """Kill workers that do not answer, and start those that could not be started; call it at `next_deadline`."""
        self._kill_overdue()
        if self._retry is not None and self._retry <= self._clock():
            self._start_missing()

    def next_deadline(self) -> int | None:
        """Return when `tend` must be called, in nanoseconds; None: not before another job."""
        deadlines = [worker.since + _PATIENCE for worker in self._workers.values() if worker.jobs and worker.process]
        return min([*deadlines, *([] if self._retry is None else [self._retry])], default=None)

    def close(self) -> None:
        """End all workers; jobs that they have not answered are lost."""
        for worker in self._workers.values():
            worker.socket.close()
            if worker.process:
                # A stopped process would not see the end of its socket.
                os.kill(worker.process, signal.SIGKILL)
                _ended(worker.process)
        self._workers.clear()
        self._epoll.close()

    def _kill_overdue(self) -> None:
        now = self._clock()
        for worker in self._workers.values():
            if worker.jobs and worker.process and now >= worker.since + _PATIENCE:
                os.kill(worker.process, signal.SIGKILL)

    def _start_missing(self) -> None:
        self._retry = None
        try:
            while len(self._workers) < self._wanted:
                self._start()
        except (OSError, RuntimeError) as error:
            self._complain("worker missing", f"a worker cannot be started: {error}; the others do its part")
            self._retry = self._clock() + _TRY_AGAIN_AFTER

    def _start(self) -> None:
        """Start one worker; raises OSError or RuntimeError if the system has no process, thread or descriptor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        process = 0
        try:
            if self._threads:
                threading.Thread(target=_serve, args=(theirs, self._make_bench), name=_NAME, daemon=True).start()
            else:
                process = _fork(theirs, self._make_bench)
                theirs.close()
        except (OSError, RuntimeError):
            ours.close()
            theirs.close()
            raise
        self._workers[ours.fileno()] = _Worker(ours, process)
        self._epoll.register(ours, select.EPOLLIN)


def is_free_threaded() -> bool:
    """Return True if threads of this interpreter run at the same time (PEP 703)."""
    is_gil_enabled: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    return not is_gil_enabled()


def _serve(sock: socket.socket, make_bench: Callable[[], Workbench]) -> None:
    """Do jobs until the other end is closed, which the kernel does at the end of the main process."""
    with sock, suppress(OSError):
        bench = make_bench()
        while record := sock.recv(_LARGEST_RECORD):
            sock.send(bench.do(record))


def _fork(sock: socket.socket, make_bench: Callable[[], Workbench]) -> int:
    """Start a process that serves a socket; returns its id."""
    with warnings.catch_warnings():
        # Python warns if there are other threads. Those that numpy's libraries start hold no lock of ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    try:
        _leave_main_process(sock.fileno())
        _serve(sock, make_bench)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - nothing may return to the caller, which belongs to the main process
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _leave_main_process(kept: int) -> None:
    """Give up what a forked process shares with the main process, but for the descriptor `kept` and standard streams.

    An open TUN descriptor would keep the interface alive after the main process has ended, and an open end of another
    worker's socket would keep that worker alive.
    """
    signal.set_wakeup_fd(-1)
    # Signals to the process group are for the main process: workers end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(_FIRST_DESCRIPTOR, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    # The garbage collector would write to memory that is shared until then.
    gc.freeze()
    with suppress(OSError):
        Path("/proc/self/comm").write_text(_NAME, encoding="ascii")


def _ended(process: int) -> str:
    """Wait for a process that has closed its socket, or whose socket was closed; returns how it ended."""
    try:
        _, status = os.waitpid(process, 0)
    except ChildProcessError:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
