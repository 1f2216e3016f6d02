"""Run chosen tests in another pytest for a limited time, and collect their results."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Final

from harness.lanes import EVENTS, GUESTS
from harness.sandbox.launch import pytest_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pytest

    from harness.plugin.session import State
    from harness.report.blame import Rerun

# Why results are missing after Ctrl-C.
INTERRUPTED: Final = "the run was interrupted"
# The lowest descriptor for events, as for `wg-interop run`.
_EVENTS_FROM: Final = 200
# Seconds for pytest to end after SIGINT, with the undo of the test that runs; then it is killed.
_PATIENCE: Final = 15.0
_TICK: Final = 0.5
_TAIL: Final = 3  # last lines of pytest's output that explain why there are no results
# Variables of the pytest that starts the other one; they would make it a worker, or part of a test.
_NOT_PASSED_ON: Final = ("PYTEST_XDIST", "PYTEST_CURRENT_TEST")


class NestedPytest:
    """One run of pytest. place: the directory of its report. complaint: why results are missing; empty if none are."""

    def __init__(
        self,
        config: pytest.Config,
        state: State,
        *,
        lane: str,
        kernel: str,
        ids: Sequence[str],
        pairs: Sequence[str],
        directory: Path,
    ) -> None:
        """Prepare the run of the tests with these ids, in this order.

        kernel: value of `--kernel`, empty for the default or if the lane has no guest. directory: for its files.
        """
        self.place = directory
        self.complaint = ""
        self._ids = ids
        self._root = config.rootpath
        self._is_guest = lane in GUESTS
        self._results = directory / "results.json"
        self._output = directory / "output"
        self._found: dict[str, Rerun] = {}
        directory.mkdir(parents=True, exist_ok=True)
        # One argument a line: there may be more than fit a command line.
        (directory / "tests").write_text("".join(f"{name}\n" for name in ids))
        self._arguments = [f"@{directory / 'tests'}", *_options(config, state, lane, kernel, pairs)]
        self._arguments += [f"--results={self._results}", "--keep=all", "--no-blame"]

    def run(self, deadline: float, show: Callable[[int, int], object]) -> None:
        """Run pytest until it ends or the deadline is over, by time.monotonic.

        show: called after each test, with the number of tests that have ended and of all.
        """
        read_end, write_end = os.pipe()
        events = fcntl.fcntl(write_end, fcntl.F_DUPFD, _EVENTS_FROM)
        os.close(write_end)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
        with self._output.open("wb") as output:
            # In its own session it gets no SIGINT from the terminal: Ctrl-C ends the wait below, which kills it.
            process = subprocess.Popen(
                [*pytest_command(guests=self._is_guest), *self._arguments], cwd=self._root, pass_fds=[events],
                env=environment | {EVENTS: str(events)}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        os.close(events)
        try:
            with os.fdopen(read_end, "rb", buffering=0) as pipe:
                self._follow(process, pipe, deadline, show)
        except KeyboardInterrupt:
            self.complaint = INTERRUPTED
            raise
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        if not self._found and not self.complaint:
            self.complaint = self._last_lines()

    def _follow(
        self, process: subprocess.Popen[bytes], pipe: IO[bytes], deadline: float, show: Callable[[int, int], object]
    ) -> None:
        os.set_blocking(pipe.fileno(), False)
        exited = os.pidfd_open(process.pid)
        rest = b""
        stops_at: float | None = None
        try:
            show(0, len(self._ids))
            while True:
                select.select([exited, pipe.fileno()], [], [], _TICK)
                is_over = process.poll() is not None
                while chunk := pipe.read(1 << 16):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._take(line)
                    show(len(self._found), len(self._ids))
                if is_over or (stops_at is not None and time.monotonic() > stops_at):
                    return
                if stops_at is None and time.monotonic() > deadline:
                    stops_at = time.monotonic() + _PATIENCE
                    process.send_signal(signal.SIGINT)
        finally:
            os.close(exited)

    def _take(self, line: bytes) -> None:
        """Take an event of the other pytest, if it is the result of a test."""
        from harness.report.blame import Rerun

        event = json.loads(line)
        if event.get("event") == "result" and event["id"] in self._ids:
            self._found[event["id"]] = Rerun(
                pair=event["pair"], state=event["state"], seconds=event["seconds"], message=event["message"]
            )

    def reruns(self) -> dict[str, Rerun]:
        """Return the results of the tests that have ended, by id, with the path of their evidence below `place`."""
        from dataclasses import replace

        from harness.errors import HarnessError
        from harness.report.results import read_results

        artifacts: dict[str, str] = {}
        with suppress(HarnessError):
            artifacts = {result.id: result.artifacts for result in read_results(self._results).results}
        return {name: replace(rerun, artifacts=artifacts.get(name, "")) for name, rerun in self._found.items()}

    def _last_lines(self) -> str:
        lines = self._output.read_text(errors="replace").split("\n")
        return " / ".join([line.strip() for line in lines if line.strip()][-_TAIL:])


def _options(config: pytest.Config, state: State, lane: str, kernel: str, pairs: Sequence[str]) -> list[str]:
    """Return the options by which another pytest runs the tests as this one has."""
    plan = state.plan
    invocation = state.results.invocation
    words = [f"--lane={lane}", f"--seed={state.seed}", f"--timeout-scale={plan.timeout_scale:g}"]
    words += [f"--rootdir={config.rootpath}", *([f"-c{config.inipath}"] if config.inipath else [])]
    words += [f"--kernel={kernel}"] if kernel and lane in GUESTS else []
    words += [f"--kernel-module={path}" for path in invocation.kernel_modules if lane in GUESTS]
    programs = invocation.programs
    words += [f"--impl={name}={path}" for name, path in programs.items()]
    # NAME@VERSION; a plain name would only be asked for.
    words += [f"--impl={text}" for text in plan.programs if "@" in text and "=" not in text]
    words += [f"--impl-manifest={path.absolute()}" for path in plan.manifests]
    words += [f"--like={like}" for like in plan.likes]
    words += [f"--pair={pair}" for pair in pairs]
    words += ["--nightly"] if plan.nightly else []
    words += [f"-p{name}" for name in config.option.plugins or ()]
    # The other pytest has no cache, and would refuse its directory.
    settings = [text for text in config.option.override_ini or () if not text.startswith("cache_dir=")]
    words += [f"-o{setting}" for setting in settings]
    # The tests run one after the other, so that they do not disturb each other.
    words += ["-n0"] if config.pluginmanager.hasplugin("xdist") else []
    return [*words, "-pno:cacheprovider", "--color=no"]
