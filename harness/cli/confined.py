"""Run a module of the harness in a sandbox, as a child, and read the JSON lines it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from harness import suite
from harness.errors import HarnessError
from harness.install import tools
from harness.sandbox.launch import launcher_command

if TYPE_CHECKING:
    from collections.abc import Iterator


def run_confined(
    name: str, module: str, *arguments: str, deadline: float, is_interruptible: bool = False
) -> Iterator[dict[str, Any]]:
    """Start `python -m module` in a sandbox, or without one if none can be created; yield its lines.

    name: of the command, for error messages. deadline: seconds, after which the child and all processes of the sandbox
    are killed. is_interruptible: SIGINT and SIGTERM are passed on to the child, which ends by itself; the second one
    kills it. Raises HarnessError after the deadline, or if the child failed.
    """
    command = [*launcher_command("--die-with", str(os.getpid()), "--or-without"), "-m", module, *arguments]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(suite.PACKAGES), os.environ.get("PYTHONPATH")]))
    }
    with tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.Popen(
            command,
            env=env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # At a terminal Ctrl-C must not reach the programs of the sandbox.
            start_new_session=is_interruptible,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(deadline, end)
        # After Ctrl-C or `| head -1` the process must not wait for the timer.
        timer.daemon = True
        timer.start()
        try:
            with child, tools.ended(child), _passed_on(child) if is_interruptible else nullcontext():
                yield from (json.loads(line) for line in child.stdout or ())
        finally:
            timer.cancel()
        if late.is_set():
            raise HarnessError(f"{name}: it took longer than {deadline:g} s")
        stderr.seek(0)
        if child.returncode != 0:
            last = (stderr.read().splitlines() or ["nothing on stderr"])[-1]
            raise HarnessError(f"{name}: its child ended with status {child.returncode}: {last}")


@contextmanager
def _passed_on(child: subprocess.Popen[str]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to a child during the block; kill it at the second one."""
    received = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        if len(received) == 1:
            child.send_signal(signal.SIGINT)
        else:
            child.kill()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
