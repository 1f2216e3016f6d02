"""Run compilers and installers: output line by line, versions, no process left behind."""

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
    """A compiler or installer failed; the message is the line of its output that says why."""


def version_said(argv: Sequence[str | Path], variables: Mapping[str, str], pattern: re.Pattern[str]) -> Version | None:
    """The numbers in the groups of the pattern, which must match what the program prints; None if it does not."""
    try:
        answer = subprocess.run(
            argv,
            env=os.environ | dict(variables),
            cwd="/",  # away from a go.mod, go.work or rust-toolchain.toml that could have a say
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = pattern.match(answer)
    return tuple(int(part or 0) for part in found.groups()) if found else None


def parse_version(text: str) -> Version:
    """'1.23.1' as numbers that compare."""
    return tuple(int(part) for part in text.split("."))


def version_text(version: Version) -> str:
    """'1.23.1' for its numbers."""
    return ".".join(map(str, version))


def run_tool(
    argv: Sequence[str | Path], on_line: OnLine, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a compiler or installer, hand on each line it prints, and return them all."""
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
        raise ToolFailed(reason(lines) or f"{argv[0]} exited with status {process.returncode} and said nothing")
    return "\n".join(lines)


def reason(lines: Sequence[str]) -> str:
    """The line of a failed program's output that says why: its last error, else its last line."""
    said = [line for line in lines if line]
    errors = [line for line in said if line.startswith(("E: ", "ERROR: ", "error: ", "dpkg-deb: error"))]
    # Without a network pip ends with "No matching distribution", and says only in passing that it reached no one; cargo
    # says so last of all.
    unreached = [found.group() for line in said if (found := _UNREACHED.search(line))]
    return " ".join([*(errors or said or [""])[-1:], *(f"({cause.strip()})" for cause in unreached[-1:])])


def exit_on_sigterm() -> None:
    """Have SIGTERM unwind the stack as Ctrl-C does, so that no child and no half-made directory stays behind."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def ended(process: subprocess.Popen[AnyStr]) -> Iterator[None]:
    """Leave no program behind: one that still runs at the end of the block is asked to stop, then made to."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.kill()
