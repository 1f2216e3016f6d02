"""Take the reports of a pytest in a guest or on another machine into this session.

Each end is a process that writes one line of JSON per report among pytest's other output. What carries the lines is the
business of `guests.py` (a port of the guest) and `hosts.py` (ssh). The reports go to this session's hooks, as if the
tests had run here; xdist does so with its workers.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeVar

import pytest

from harness.errors import HarnessError, UsageError
from harness.implementations.manifest import load_manifest
from harness.install.installer import MANIFESTS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from harness.implementations.manifest import Manifest

T = TypeVar("T")

# First byte of an event in the output of the other pytest (RFC 7464); other lines are pytest's.
RECORD: Final = b"\x1e"
# Directory there with the programs under test, each in a directory of its own.
PEERS: Final = "/peers"
_CHUNK: Final = 1 << 16


class EventParser:
    """Splits the output of the other pytest into events and other lines. text: the other lines, so far."""

    def __init__(self) -> None:
        self._rest = b""
        self.text: list[str] = []

    def feed(self, data: bytes) -> Iterator[dict[str, object]]:
        """Take a piece of the output; yields the events that it completes, and adds other lines to `text`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            before, mark, event = line.partition(RECORD)
            if not mark:
                self.text.append(line.decode(errors="replace").rstrip("\r"))
                continue
            try:
                yield json.loads(event)
            except ValueError:
                self.text.append(f"unreadable event: {event[:200]!r} after {before!r}")


def received(sock: socket.socket, parser: EventParser) -> Iterator[dict[str, object]]:
    """Yield the events that come by a socket, until the connection ends."""
    with suppress(OSError):
        while data := sock.recv(_CHUNK):
            yield from parser.feed(data)


class RemotePool:
    """Runs work in threads, each for another pytest, and queues their events for pytest's own thread.

    pytest's hooks may be called in the session's thread only. So an event waits until a test here has ended, or until
    `finish` is called.
    """

    def __init__(
        self,
        session: pytest.Session,
        at_once: int,
        start: Callable[[Iterable[str]], None],
        left_by_workers: Callable[[], Iterable[str]] = lambda: (),
    ) -> None:
        """Make a pool of `at_once` threads.

        start: called once, with the files that hold tests for guests; starts them. left_by_workers: returns the files
        whose tests the xdist workers have left to guests.
        """
        self._session = session
        self._start = start
        self._left_by_workers = left_by_workers
        self._begun = False
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="guest")
        self._left = 0
        self._events: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.stop, self._stopper = os.pipe()

    def begin(self, files: Iterable[str]) -> None:
        """Start the guests; calls after the first do nothing."""
        if not self._begun:
            self._begun = True
            self._start(files)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Start the guests when the first xdist worker has collected: all workers collect the same (hook)."""
        self.begin([*(name.partition("::")[0] for name in ids), *self._left_by_workers()])

    def start(
        self,
        work: Callable[[], T],
        ended: Callable[[T], object],
        failed: Callable[[HarnessError], object],
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        """Run `work` in a thread; then pytest's own thread calls `ended` with its result or `failed` with its error.

        threads: those to use instead of the pool's own.
        """

        def take(future: Future[T]) -> None:
            self._left -= 1
            try:
                result = future.result()
            except HarnessError as error:
                failed(error)
            else:
                ended(result)

        self._left += 1
        future = (threads or self._pool).submit(work)
        future.add_done_callback(lambda future: self.put(partial(take, future)))

    def put(self, event: Callable[[], object]) -> None:
        """Queue a call for pytest's own thread; calls are made in the order in which they were queued."""
        self._events.put(event)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Process the queued events between two tests here (hook)."""
        while not self._events.empty():
            self._events.get()()

    def finish(self) -> None:
        """Process events until all work has ended; raises pytest's own exceptions if -x or --maxfail ends it."""
        while self._left:
            self._events.get()()
            check_end(self._session)

    def close(self) -> None:
        """Stop the guests that still run."""
        os.close(self._stopper)
        self._pool.shutdown(cancel_futures=True)
        os.close(self.stop)


def check_end(session: pytest.Session) -> None:
    """Raise pytest's own exception if -x, --maxfail or a plugin has ended the session."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


class RemoteReporter:
    """Passes the reports of another pytest to this session's hooks."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # The phases of each test whose tear-down is not reported yet.
        self._begun: dict[str, list[pytest.TestReport]] = {}

    def take_report(self, data: object) -> pytest.TestReport:
        """Take the report of a phase of a test from the JSON that carries it."""
        report = revive(self._config, data)
        self.adapt(report)
        self._begun.setdefault(report.nodeid, []).append(report)
        # Pass on all phases of a test together: the same test, or another one, may run here at the same time.
        if report.when == "teardown":
            self._tell(self._begun.pop(report.nodeid))
        return report

    def adapt(self, report: pytest.TestReport) -> None:
        """Change what has another meaning here."""

    def tell_begun(self) -> None:
        """Pass on the phases of tests that have not ended, and will not."""
        for reports in self._begun.values():
            self._tell(reports)
        self._begun.clear()

    def drop_begun(self) -> None:
        """Forget the phases of tests that have not ended: these tests run again."""
        self._begun.clear()

    def _tell(self, reports: Iterable[pytest.TestReport]) -> None:
        for report in reports:
            self._config.hook.pytest_runtest_logreport(report=report)


def revive(config: pytest.Config, data: object) -> pytest.TestReport:
    """Rebuild a report from the JSON that another pytest has sent."""
    report: pytest.TestReport = config.hook.pytest_report_from_serializable(config=config, data=data)
    match report.longrepr:
        case [str(path), int(line), str(reason)]:
            # The reason of a skip is a tuple, which JSON turns into a list.
            report.longrepr = (path, line, reason)
    return report


def carry_programs(
    manifests: Iterable[Manifest], *, root: str = "", installed: bool
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Return the files to copy, with their paths there, and pytest's options that name them.

    root: the directory that takes the place of `/` there. installed: also copy programs that the lab has installed;
    otherwise only those that the user has given by their path.
    """
    files: list[tuple[Path, str]] = []
    options: list[str] = []
    every = list(manifests)
    for manifest in every:
        options += _take_manifest(manifest, files, root)
        options += ["--impl", manifest.name + _take_program(manifest, files, root, installed=installed)]
        if like := manifest.like:
            if like not in every:
                options += _take_manifest(like, files, root)
            options += ["--like", f"{manifest.name}={like.name}"]
    return files, options


def _take_program(manifest: Manifest, files: list[tuple[Path, str]], root: str, *, installed: bool) -> str:
    if manifest.kind == "kernel" or not manifest.needs_program or not (installed or manifest.program):
        return ""
    try:
        program = manifest.find_program()
    except HarnessError:
        return ""
    there = f"{root}{PEERS}/{manifest.name}/{program.name}"
    files.append((program, there))
    return f"={there}"


def _take_manifest(manifest: Manifest, files: list[tuple[Path, str]], root: str) -> list[str]:
    """Add a user's manifest, and the files that it names, to the files; all keep their paths, below `root`."""
    if manifest.source is None or manifest.source.parent == MANIFESTS:
        return []
    source = manifest.source.absolute()
    there = load_manifest(source)
    files += [(path, f"{root}{path}") for path in (source, there.program, there.expectations) if path is not None]
    return ["--impl-manifest", f"{root}{source}"]


def pack(files: Iterable[tuple[Path, str]]) -> str:
    """Return files and folders as an archive in base64; each comes with its path in the archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, name in files:
            try:
                archive.add(path.resolve(), name.lstrip("/"))
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return base64.b64encode(buffer.getvalue()).decode()


def unpack(text: str, folder: Path) -> None:
    """Unpack the files of such an archive below a folder; raises HarnessError for one that `pack` cannot have made."""
    try:
        with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text))) as archive:
            for member in archive:
                target = Path(os.path.normpath(folder / member.name))
                if not target.is_relative_to(folder):
                    raise HarnessError(f"an archive has the path {member.name!r}")
                if file := archive.extractfile(member) if member.isreg() else None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read())
                    target.chmod(member.mode & 0o777)
    except (tarfile.TarError, ValueError) as error:
        raise HarnessError(f"an archive is damaged: {error}") from error
