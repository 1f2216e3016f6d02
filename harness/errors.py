"""Define the errors of the harness; each names what is wrong and, if known, the remedy."""

from __future__ import annotations

import errno
import os
from typing import Final


class HarnessError(Exception):
    """Anything the harness itself reports; its message is one line, fit to print without a traceback.

    HarnessError
    |- UsageError        the caller asked for something that does not exist or makes no sense (exit status 2)
    |- Unavailable       this machine lacks a program, a permission or a kernel feature (exit status 125)
    |- Unsupported       the implementation says that it cannot do this
    |- ControlError      an implementation refused a configuration, with the errno it gave
    |- DeadlineExceeded  an awaited event did not come in time
    `- ProgramFailed     a program exited with a status other than zero
    """


class UsageError(HarnessError):
    """The caller asked for something that does not exist or makes no sense."""


class Unavailable(HarnessError):
    """This machine lacks a program, a permission or a kernel feature."""


class Unsupported(HarnessError):
    """The implementation declares that it lacks this capability."""


class ControlError(HarnessError):
    """An implementation refused a configuration.

    errno: the positive error number it gave (errno(3)), whatever its sign on the wire.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class DeadlineExceeded(HarnessError):
    """An awaited event did not come in time; the message lists what was seen instead."""


class ProgramFailed(HarnessError):
    """A program exited with a status other than zero."""


# Where a number has two names, Python knows the one that WireGuard's documentation does not use.
_USUAL_NAMES: Final = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK"}


def error_name(number: int) -> str:
    """EADDRINUSE for 98, as errno(3) names it."""
    return _USUAL_NAMES.get(number) or errno.errorcode.get(number, f"errno {number}")


def refusal(where: str, action: str, number: int, detail: str = "") -> ControlError:
    """Make the error of a refused request: `wg0 (uapi): EADDRINUSE: set listen_port 51820: Address already in use`."""
    explained = f" ({detail})" if detail else ""
    return ControlError(f"{where}: {error_name(number)}: {action}: {os.strerror(number)}{explained}", number)


def unreadable(where: str, what: object) -> ControlError:
    """Make the error of an answer that breaks the protocol."""
    return ControlError(f"{where}: unreadable answer: {what}", errno.EBADMSG)
