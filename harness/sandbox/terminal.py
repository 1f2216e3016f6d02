"""Run a shell or a debugger in a new terminal, and connect that with the user's terminal.

The user's terminal belongs to a session outside the sandbox's PID namespace, so a shell in the sandbox could not
control jobs on it. The shell gets a new terminal (pty(7)), and input and output are copied until the program closes it.
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
from harness.install.packages import install_command
from harness.sandbox.process import program_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PIECE: Final = 1 << 16
# Seconds after which a new size of the user's terminal is copied to the new terminal.
_SIZE_INTERVAL: Final = 0.5
_SIZE: Final = 8  # bytes of struct winsize (ioctl_tty(2))


@contextmanager
def our_terminal() -> Iterator[int]:
    """Open the terminal of our standard input to read and write; raises Unavailable if that is not a terminal."""
    if not os.isatty(0):
        raise Unavailable("standard input is not a terminal")
    descriptor = os.open(os.ttyname(0), os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(terminal: int, text: str) -> None:
    """Write text to a terminal in any mode, raw or not."""
    data = text.replace("\n", "\r\n").encode()
    while data:
        data = data[os.write(terminal, data) :]


def await_enter(terminal: int, prompt: str) -> None:
    """Write a prompt, and wait until Enter is pressed, or Ctrl-D on an empty line; earlier input is discarded."""
    termios.tcflush(terminal, termios.TCIFLUSH)
    write(terminal, prompt)
    while (data := os.read(terminal, _PIECE)) and b"\n" not in data:
        pass


class TerminalSession:
    """A program in a new terminal; `connect` connects it with the user's until it ends."""

    def __init__(self, argv: Sequence[str], terminal: int, env: Mapping[str, str] | None = None) -> None:
        """Start the program. terminal: the user's, which has the size to copy. Raises Unavailable without setsid(1)."""
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
            raise Unavailable(f"setsid is not installed: {install_command(['util-linux'])}") from error
        finally:
            os.close(inside)

    def connect(self) -> int:
        """Copy input and output until the program ends; returns its exit status."""
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
        """Copy the next input or output, if any comes soon; False once a terminal is closed."""
        ready, _, _ = select.select([self._terminal, self._other], [], [], _SIZE_INTERVAL)
        if self._other in ready:
            # EIO: no process has the new terminal open any more.
            with suppress(OSError):
                if data := os.read(self._other, _PIECE):
                    os.write(self._terminal, data)
                    return True
            return False
        if self._terminal in ready:
            if not (data := os.read(self._terminal, _PIECE)):
                # The user's terminal was hung up.
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
