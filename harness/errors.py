"""The errors of the harness: each names the thing that is wrong and, where there is one, the remedy."""

from __future__ import annotations


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
