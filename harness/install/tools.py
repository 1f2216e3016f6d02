"""Run compilers and installers: read output and versions, leave no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, AnyStr, Final, NoReturn

from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.install.progress import OnLine

_UNREACHED: Final = re.compile(
    r"Failed to establish a new connection: [^')]*|Read timed out|ProxyError\([^,]*|"
    r"Could not (?:connect|resolve) [^()]*"
)

Version = tuple[int, ...]


class ToolFailed(HarnessError):
    """A compiler or installer failed; the message is the line of its output with the reason (`reason`)."""


def printed_version(
    argv: Sequence[str | Path], variables: Mapping[str, str], pattern: re.Pattern[str]
) -> Version | None:
    """Run a program and read its version from its output.

    variables: added to the environment. pattern: its groups are the numbers of the version. Returns None if the program
    does not run, fails, or prints something else.
    """
    try:
        answer = subprocess.run(
            argv,
            env=os.environ | dict(variables),
            cwd="/",  # so that no go.mod, go.work or rust-toolchain.toml changes the result
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = pattern.match(answer)
    return tuple(int(part or 0) for part in match.groups()) if match else None


def parse_version(text: str) -> Version:
    """Parse '1.23.1' into (1, 23, 1), which compares as versions do; ValueError for anything else."""
    return tuple(int(part) for part in text.split("."))


def version_text(version: Version) -> str:
    """Format (1, 23, 1) as '1.23.1'."""
    return ".".join(map(str, version))


def run_tool(
    argv: Sequence[str | Path], on_line: OnLine, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a compiler or installer and return its output, stdout and stderr together.

    on_line: called with each line as it comes. Raises ToolFailed if it cannot be started or fails.
    """
    lines = []
    try:
        process = subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ToolFailed(f"{argv[0]}: {error.strerror}") from error
    with process, ended(process):
        assert process.stdout is not None  # noqa: S101 - stdout=PIPE gives one
        for line in process.stdout:
            on_line(line)
            lines.append(line.strip())
        process.wait()
    if process.returncode != 0:
        raise ToolFailed(reason(lines) or f"{argv[0]} exited with status {process.returncode} without any output")
    return "\n".join(lines)


def reason(lines: Sequence[str]) -> str:
    """Return the line of a failed program's output that gives the reason: its last error, else its last line."""
    printed = [line for line in lines if line]
    errors = [line for line in printed if line.startswith(("E: ", "ERROR: ", "error: ", "dpkg-deb: error"))]
    # Without a network, pip's last error is "No matching distribution"; an earlier line has the network error. Cargo
    # prints the network error last.
    unreached = [match.group() for line in printed if (match := _UNREACHED.search(line))]
    return " ".join([*(errors or printed or [""])[-1:], *(f"({cause.strip()})" for cause in unreached[-1:])])


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, so that clean-up runs: no child and no partial directory is left behind."""

    def leave(number: int, _: object) -> NoReturn:
        """Exit with the status that a shell reports for this signal."""
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def ended(process: subprocess.Popen[AnyStr]) -> Iterator[None]:
    """Stop a program that still runs at the end of the block: SIGTERM, and after 5 seconds SIGKILL."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
