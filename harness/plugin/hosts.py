"""Run tests on other machines, as part of one pytest session.

For `wg-interop run --on ssh:HOST`, harness/cli/on.py has started ssh outside the sandbox, and passes each connection as
a descriptor. At its other end is harness/cli/hosted.py. This session gives each host a part of its tests, then smaller
and smaller parts. A host that is lost gives back what it has not reported.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING, Final, cast

import pytest

from harness.errors import HarnessError
from harness.lanes import HOSTS
from harness.plugin.remote import EventParser, RemoteReporter, carry_programs, check_end, pack, received, unpack
from harness.plugin.selection import lane_of
from harness.plugin.session import REPORTER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from harness.plugin.options import RunPlan
    from harness.plugin.remote import RemotePool
    from harness.plugin.session import State

# The fewest tests of a part: to start pytest on the host takes as long as a few tests.
_SMALLEST: Final = 10
_TAIL: Final = 3  # last lines of a log in a message


class Deck:
    """The tests that hosts share, as ids. Its methods may be called from any thread."""

    def __init__(self, ids: Sequence[str], hosts: Iterable[str], smallest: int = _SMALLEST) -> None:
        """smallest: the fewest tests of a part, unless some hosts would get none."""
        self._waiting = deque(ids)
        self._held: dict[str, dict[str, None]] = {name: {} for name in hosts}
        self._rest: list[str] = []
        self._smallest = min(smallest, -(-len(ids) // max(1, len(self._held))))
        self._changed = Condition()
        self._closed = False

    def draw(self, host: str) -> list[str]:
        """Give a host the next part; empty at the end.

        Waits while others still hold tests, which come back if their host is lost.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or not any(self._held.values()))
            if self._closed:
                return []
            # Large parts first, because each costs a start of pytest; small ones last, so that all hosts end together.
            size = max(self._smallest, -(-len(self._waiting) // (2 * len(self._held))))
            part = [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]
            self._held[host] = dict.fromkeys(part)
            return part

    def reported(self, host: str, name: str) -> bool:
        """Note that a host has reported a test to its end; False if it holds no such test."""
        with self._changed:
            if name not in self._held.get(host, ()):
                return False
            del self._held[host][name]
            self._changed.notify_all()
            return True

    def held(self, host: str) -> list[str]:
        """Return the tests that a host holds and has not reported."""
        with self._changed:
            return list(self._held.get(host, ()))

    def leave(self, host: str, names: Iterable[str]) -> None:
        """Take tests from a host that lacks their files, and keep them for this machine."""
        with self._changed:
            self._rest += [name for name in names if self._held[host].pop(name, 0) is None]
            self._changed.notify_all()

    def lose(self, host: str) -> int:
        """Give back all that a host holds, and give it nothing more; returns how many tests that is."""
        with self._changed:
            back = list(self._held.pop(host, ()))
            self._waiting.extendleft(reversed(back))
            self._changed.notify_all()
            return len(back)

    def rest(self) -> list[str]:
        """Return the tests that no host has run, when all hosts have ended."""
        with self._changed:
            return [*self._waiting, *self._rest]

    def close(self) -> None:
        """End all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Connection:
    """A connection to harness/cli/hosted.py on a host, which ssh carries.

    name: `ssh:HOST`. scratch: a directory there for this run. log: what ssh prints.
    """

    def __init__(self, name: str, descriptor: int, scratch: str, log: Path) -> None:
        self.name = name
        self.scratch = scratch
        self._log = log
        self._socket = socket.socket(fileno=descriptor)
        # Programs that tests start must not keep the connection open.
        self._socket.set_inheritable(False)
        self._parser = EventParser()

    def send(self, message: dict[str, object]) -> None:
        """Send a message as a line of JSON; raises HarnessError if the connection has ended."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise HarnessError(self._why_ended()) from error

    def events(self) -> Iterator[dict[str, object]]:
        """Yield the events that the host sends; HarnessError when the connection ends."""
        yield from received(self._socket, self._parser)
        raise HarnessError(self._why_ended())

    def output(self) -> str:
        """Return the last lines that pytest there has printed."""
        return " / ".join([line.strip() for line in self._parser.text if line.strip()][-_TAIL:])

    def close(self) -> None:
        """End the connection, upon which the host stops its tests: others may have the descriptor open, too."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _why_ended(self) -> str:
        said = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        lines = " / ".join([line.strip() for line in said if line.strip()][-_TAIL:])
        return "the connection ended" + (f": {lines}" if lines else "")


class HostReporter(RemoteReporter):
    """Passes a host's reports to this session's hooks. host: `ssh:HOST`."""

    def __init__(self, config: pytest.Config, host: str) -> None:
        super().__init__(config)
        self._host = host

    def adapt(self, report: pytest.TestReport) -> None:
        """Name the host where it explains a result: what is missing is missing there."""
        if report.failed:
            report.sections.append(("machine", self._host))
        match report.longrepr:
            case (path, line, str(reason)) if report.skipped:
                report.longrepr = (path, line, f"Skipped: {self._host}: {reason.removeprefix('Skipped: ')}")


class Hosts:
    """The hosts of one session, and the tests that they share."""

    def __init__(self, config: pytest.Config, state: State) -> None:
        self._config = config
        self._state = state
        self._items: dict[str, pytest.Item] = {}
        self._connections: list[Connection] = []
        self._deck = Deck((), ())
        self._threads: ThreadPoolExecutor
        self._pool: RemotePool
        self._session: pytest.Session
        self._remarks: list[str] = []

    def check(self) -> None:
        """Raise pytest.UsageError if this run cannot use hosts."""
        plan = self._state.plan
        option = f"--on ssh:{plan.places.hosts[0]}"
        if plan.is_watched or self._config.option.usepdb:
            raise pytest.UsageError(
                f"{option}: a lab on another machine cannot be entered; leave out one of the options"
            )
        if plan.only_guests:
            raise pytest.UsageError(f"{option}: hosts run lanes core and netns: add --lane netns")
        if not self._state.runs_suite:
            raise pytest.UsageError(
                f"{option}: hosts have the tests of the suite only, and pytest's root directory is "
                f"{self._config.rootpath}; leave out --on"
            )
        if HOSTS not in os.environ:
            raise pytest.UsageError(f"{option}: `wg-interop run` connects to hosts, pytest alone does not; start that")

    @contextmanager
    def beside(self, session: pytest.Session, pool: RemotePool) -> Iterator[Hosts]:
        """Take the connections, run what `deal` gives them, and end them."""
        self._session, self._pool = session, pool
        # Taken from the environment: a pytest that a test starts must not use the connections.
        self._connections = [
            Connection(**{**each, "log": Path(each["log"])}) for each in json.loads(os.environ.pop(HOSTS))
        ]
        self._threads = ThreadPoolExecutor(len(self._connections), thread_name_prefix="host")
        self._config.pluginmanager.register(self)
        try:
            yield self
        finally:
            self._deck.close()
            for connection in self._connections:
                connection.close()
            self._threads.shutdown()

    def deal(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """Share the tests that use the lab among the hosts; returns the others, which run here."""
        if self._session.testsfailed and not self._config.option.continue_on_collection_errors:
            return items
        self._items = {item.nodeid: item for item in items if lane_of(item) == "netns"}
        workers = self._state.plan.workers
        smallest = _SMALLEST * (workers if isinstance(workers, int) and workers > 1 else 1)
        self._deck = Deck(list(self._items), [each.name for each in self._connections], smallest)
        for connection in self._connections:
            reporter = HostReporter(self._config, connection.name)
            self._pool.start(
                partial(self._serve, connection, reporter),
                lambda _: None,
                partial(self._lost, reporter),
                self._threads,
            )
        return [item for item in items if item.nodeid not in self._items]

    def _serve(self, connection: Connection, reporter: HostReporter) -> None:
        """Give a host one part of the tests after the other, in a thread of its own."""
        try:
            files, options = carry_programs(self._state.programs.alone, root=connection.scratch, installed=False)
            if files:
                connection.send(
                    {"files": pack((path, there.removeprefix(connection.scratch)) for path, there in files)}
                )
            words = [*options, *_arguments(self._state.plan, self._state.seed)]
            while part := self._deck.draw(connection.name):
                connection.send({"ids": part, "arguments": words})
                status = self._follow(connection, reporter)
                self._require_all(connection, status)
        except Exception as error:  # whatever a host sends must lose no result
            back = self._deck.lose(connection.name)
            reason = error if isinstance(error, HarnessError) else repr(error)
            raise HarnessError(f"{connection.name} was lost, and gave back {back} tests: {reason}") from error

    def _require_all(self, connection: Connection, status: object) -> None:
        """Raise HarnessError if pytest there has ended without a report of each test."""
        if left := self._deck.held(connection.name):
            raise HarnessError(
                f"pytest there ended with status {status} and has not run {len(left)} of its tests, such as "
                f"{left[0]}: {connection.output()}"
            )

    def _follow(self, connection: Connection, reporter: HostReporter) -> object:
        """Take the reports of one part; returns the exit status of pytest there."""
        for event in connection.events():
            match event.get("event"):
                case "evidence":
                    self._keep(str(event["path"]), str(event["data"]))
                case "lacks":
                    self._deck.leave(connection.name, cast("list[str]", event["ids"]))
                case "report":
                    data = cast("dict[str, object]", event["data"])
                    name = str(data["nodeid"])
                    # Noted before the session's thread takes it: a host that is lost now must not give it back.
                    ended = data["when"] == "teardown"
                    if not ended or self._deck.reported(connection.name, name):
                        self._pool.put(partial(reporter.take_report, data))
                case "done":
                    return event["status"]
        raise AssertionError  # the loop above ends by an exception only

    def _keep(self, path: str, data: str) -> None:
        """Write the evidence of a test where a run here would have it; raises HarnessError for a wrong path."""
        report = self._state.report_directory
        target = Path(os.path.normpath(report / path))
        if not target.is_relative_to(report / "evidence") or target == report / "evidence":
            raise HarnessError(f"it sent evidence with the path {path!r}")
        # What another host wrote before it was lost.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        unpack(data, target)

    def _lost(self, reporter: HostReporter, error: HarnessError) -> None:
        reporter.drop_begun()
        self._remark(str(error))

    def _remark(self, text: str) -> None:
        self._remarks.append(text)
        self._config.pluginmanager.getplugin(REPORTER).remark(text)

    def run_rest_here(self) -> None:
        """Run the tests here that no host has run; they are expected already."""
        rest = [self._items[name] for name in self._deck.rest()]
        if rest and self._remarks:
            self._remark(f"{len(rest)} tests ran on this machine, because no host was left for them")
        for item, following in zip_longest(rest, rest[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            check_end(self._session)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the hosts that were lost (hook)."""
        for text in self._remarks:
            terminalreporter.write_line(f"wg-interop: {text}", yellow=True)


def _arguments(plan: RunPlan, seed: int) -> list[str]:
    """Return pytest's options on a host, from those of this run; the ids select the tests."""
    words = [f"--seed={seed}", f"--timeout-scale={plan.timeout_scale:g}", f"--keep={plan.keep}"]
    words += [f"--pair={pair}" for pair in plan.pairs]
    words += ["--nightly"] if plan.nightly else []
    return words + ([f"-n{plan.workers}"] if plan.workers else [])
