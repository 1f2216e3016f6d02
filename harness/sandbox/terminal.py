"""Run a shell or a debugger in a terminal of its own, and connect that with ours.

Ours belongs to a session outside of the sandbox's PID namespace: a shell in here could not hand it to its jobs. So it
gets a new one (pty(7)), and what is typed and printed is copied until the program has closed it.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import termios
import tty
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable
from harness.sandbox.process import program_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PIECE: Final = 1 << 16
# Seconds after which a changed size of our terminal reaches the other one.
_SIZE_INTERVAL: Final = 0.5
_SIZE: Final = 8  # bytes of struct winsize (ioctl_tty(2))


@contextmanager
def our_terminal() -> Iterator[int]:
    """A descriptor of the terminal that is our standard input, to read and write; raises Unavailable without one."""
    if not os.isatty(0):
        raise Unavailable("standard input is not a terminal")
    descriptor = os.open(os.ttyname(0), os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(terminal: int, text: str) -> None:
    """Write text to a terminal, whatever mode it is in."""
    data = text.replace("\n", "\r\n").encode()
    while data:
        data = data[os.write(terminal, data) :]


def await_enter(terminal: int) -> None:
    """Return when Enter, or Ctrl-D on an empty line, is pressed; what was typed before does not count."""
    termios.tcflush(terminal, termios.TCIFLUSH)
    while (data := os.read(terminal, _PIECE)) and b"\n" not in data:
        pass


class TerminalSession:
    """A program in a terminal of its own; `connect` lets it talk with the user until it ends."""

    def __init__(self, argv: Sequence[str], terminal: int, env: Mapping[str, str] | None = None) -> None:
        """Start it. terminal: ours, whose size it gets. Raises Unavailable if there is no such program."""
        self._terminal = terminal
        self._other, inside = os.openpty()
        self._size = b""
        self._copy_size()
        try:
            # setsid(1) makes the new terminal the controlling one of a new session.
            self._child = subprocess.Popen(
                ["setsid", "--ctty", *argv], stdin=inside, stdout=inside, stderr=inside, env=program_environment(env)
            )
        except FileNotFoundError as error:
            os.close(self._other)
            raise Unavailable("setsid is not installed: apt-get install util-linux") from error
        finally:
            os.close(inside)

    def connect(self) -> int:
        """Copy what is typed and printed until the program ends; returns its exit status."""
        before = termios.tcgetattr(self._terminal)
        try:
            tty.setraw(self._terminal)
            while self._copy():
                self._copy_size()
        finally:
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, before)
            os.close(self._other)
        return self._child.wait()

    def _copy(self) -> bool:
        """Copy what is there within a moment; False when the program's side is closed."""
        ready, _, _ = select.select([self._terminal, self._other], [], [], _SIZE_INTERVAL)
        if self._other in ready:
            # Without a process that has it open, the other terminal fails with EIO.
            with suppress(OSError):
                if data := os.read(self._other, _PIECE):
                    os.write(self._terminal, data)
                    return True
            return False
        if self._terminal in ready:
            if not (data := os.read(self._terminal, _PIECE)):
                # Our terminal was hung up.
                self._child.kill()
                return False
            os.write(self._other, data)
        return True

    def _copy_size(self) -> None:
        with suppress(OSError):
            size = fcntl.ioctl(self._terminal, termios.TIOCGWINSZ, bytes(_SIZE))
            if size != self._size:
                self._size = size
                fcntl.ioctl(self._other, termios.TIOCSWINSZ, size)
