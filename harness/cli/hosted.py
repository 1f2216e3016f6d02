"""Run tests for another machine, over stdin and stdout: `wg-interop hosted`.

This is the far end of `wg-interop run --on ssh:HOST`. A message is a line of JSON on stdin: files to unpack, or ids of
tests and pytest's options. For these tests pytest starts in a sandbox, and its output goes to stdout, with a line of
JSON for each report among it. The evidence goes before the report that names it, so that it is there if the connection
ends. At the end of stdin pytest is stopped: ssh passes on no signal.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final

import click

from harness import suite
from harness.errors import HarnessError
from harness.lanes import EVENTS, LANE
from harness.plugin.remote import RECORD, pack, unpack
from harness.plugin.rundir import RunDirectory
from harness.report.results import artifacts_in
from harness.sandbox.launch import launcher_command, pytest_command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Where programs are on most systems. A shell that ssh starts often has no PATH for root's programs.
SYSTEM_PATHS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# Programs that every test of the lab needs.
NEEDED: Final = ("ip", "nft", "wg")
_PATIENCE: Final = 15.0  # seconds for pytest to stop after SIGINT; then it is killed
_CHUNK: Final = 1 << 16


@click.command(hidden=True)
def hosted() -> int:
    """Run tests for `wg-interop run --on`, over stdin and stdout; that command starts it."""
    return serve()


def serve() -> int:
    """Take messages until stdin ends; returns the exit status."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_PATHS])
    if reason := why_unfit():
        _send({"event": "unfit", "reason": reason})
        return 1
    with closing(RunDirectory()) as place:
        _send({"event": "ready", "scratch": str(place.path / "root"), "python": platform.python_version()})
        lines = _Lines(0)
        for line in lines:
            message = json.loads(line)
            if "files" in message:
                unpack(message["files"], place.path / "root")
            else:
                _Part(place.path / "part", message, lines).run()
    return 0


def why_unfit() -> str:
    """Return why lane netns cannot run here, with the remedy as `wg-interop doctor` names it; empty if it can."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    attempt = [*launcher_command(), "-c", "pass"]
    if (
        not lacking
        and subprocess.run(attempt, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    ):
        return ""
    from harness.cli.doctor import findings  # noqa: PLC0415 - it takes seconds to try everything

    try:
        wrong = [each for each in findings() if each.needed and each.mark == "MISSING"]
    except HarnessError as error:
        return str(error)
    return "; ".join(
        f"{each.name}: {each.detail}" + (f" (to fix: {each.remedy})" if each.remedy else "") for each in wrong
    )


class _Lines:
    """Reads whole lines from a descriptor. ended: nothing more will come."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ended = False
        self._rest = b""

    def read(self) -> list[bytes]:
        """Read once, which waits if nothing is there; returns the lines that are complete now."""
        piece = os.read(self.descriptor, _CHUNK)
        self.ended = not piece
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return lines

    def __iter__(self) -> Iterator[bytes]:
        while not self.ended:
            yield from self.read()


class _Part:
    """One pytest, for a part of the tests."""

    def __init__(self, place: Path, message: dict[str, Any], orders: _Lines) -> None:
        """place: a directory for its files, which is emptied. orders: stdin, whose end stops pytest."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self._place = place
        self._orders = orders
        self._report = place / "report"
        root = suite.root()
        here = [name for name in message["ids"] if (root / name.partition("::")[0]).exists()]
        self._lacking = [name for name in message["ids"] if name not in set(here)]
        # One argument a line: there may be more than fit a command line.
        (place / "tests").write_text("".join(f"{root / name}\n" for name in here))
        self._arguments = [
            f"@{place / 'tests'}", *suite.pytest_options(), f"--results={self._report / 'results.json'}",
            "--color=no", "-pno:cacheprovider", *message["arguments"],
        ] if here else []  # fmt: skip

    def run(self) -> None:
        """Run pytest, and send what it reports, and its exit status."""
        if self._lacking:
            _send({"event": "lacks", "ids": self._lacking})
        status = 0
        if self._arguments:
            self._report.mkdir()
            environment = os.environ | {EVENTS: "stdout", LANE: "netns"}
            with subprocess.Popen(
                [*pytest_command(guests=False), *self._arguments], cwd=self._place, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            ) as process:  # fmt: skip
                try:
                    self._follow(process)
                finally:
                    process.kill()
                status = process.wait()
        if not self._orders.ended:
            _send({"event": "done", "status": status})

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on the output of pytest until it ends; stop it if nobody is left to take it."""
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        output = _Lines(process.stdout.fileno())
        deadline: float | None = None
        while not output.ended and (deadline is None or time.monotonic() < deadline):
            watched = [output.descriptor] if self._orders.ended else [output.descriptor, self._orders.descriptor]
            ready, _, _ = select.select(watched, [], [], None if deadline is None else 1.0)
            if self._orders.descriptor in ready and not self._orders.read() and self._orders.ended:
                deadline = time.monotonic() + _PATIENCE
                process.send_signal(signal.SIGINT)
            for line in output.read() if output.descriptor in ready else ():
                self._pass_on(line)

    def _pass_on(self, line: bytes) -> None:
        if self._orders.ended:
            return
        _, mark, event = line.partition(RECORD)
        if mark and (artifacts := artifacts_in(json.loads(event).get("data", {}))):
            self._send_evidence(artifacts)
        _write(line + b"\n")

    def _send_evidence(self, path: str) -> None:
        folder = self._report / path
        if folder.is_dir():
            _send({"event": "evidence", "path": path, "data": pack([(folder, ".")])})


def _send(event: dict[str, object]) -> None:
    _write(RECORD + json.dumps(event).encode() + b"\n")


def _write(data: bytes) -> None:
    """Write all of the data to stdout; nobody may be left to read it."""
    with suppress(BrokenPipeError):
        while data:
            data = data[os.write(1, data) :]
