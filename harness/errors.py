"""Define the errors of the harness; each names what is wrong and, if known, the remedy."""

from __future__ import annotations

import errno
import os
from typing import Final


class HarnessError(Exception):
    """The base of all errors that harness raises on purpose.

    The message begins with what failed, in one line that makes sense without a traceback; details follow in others.

    HarnessError
    |- UsageError          the caller asked for something that does not exist or makes no sense (exit status 2)
    |- Unavailable         this machine lacks a program, a permission or a kernel feature (exit status 125)
    |- Unsupported         the implementation does not declare this capability
    |- ControlError        an implementation or the kernel refused a request, with an errno
    |  `- DumpInterrupted  the kernel's state changed during a dump, which may mix old and new values
    |- DeadlineExceeded    an awaited event did not come in time
    |- ProgramFailed       a program exited with a status other than zero
    |- ToolFailed          a compiler or installer failed, with the line of its output that names the reason
    |- Missing             a probe of `wg-interop doctor` found something missing, with the remedy
    |- NothingShownError   a probe of a capability could not show what it starts from, so it shows nothing
    |- NothingMatchedError  a rule of a fault script matched no message, so its test shows nothing
    |- Unexpected          the device did not send a scripted peer what was expected, or sent what it must not
    |- NotDelivered        a packet that had to come out of the interface has not come in time
    |- LoadNotReached      the device could not be brought or kept under load; the test's result is `not_reached`
    |- Finding             the fuzzer saw a device do what a correct device does not do
    |- WrongAnswer         a device has sent the fuzzer what a correct device does not send
    |- Unhealthy           a health check found something wrong with a process under test
    |- LeakError           a test has left something behind in its worker: a namespace, a process, a descriptor ...
    `- Stopped             a guest was stopped because its result is not needed any more
    """


class UsageError(HarnessError):
    """The caller asked for something that does not exist or makes no sense."""


class Unavailable(HarnessError):
    """This machine lacks a program, a permission or a kernel feature."""


class Unsupported(HarnessError):
    """The implementation declares that it lacks this capability."""


class ControlError(HarnessError):
    """An implementation, or the kernel, refused a request.

    errno: the positive error number (errno(3)), whatever its sign on the wire. reason: the number's meaning and, from
    the kernel, its extended ack: `Network is unreachable (Nexthop has invalid gateway)`.
    """

    def __init__(self, message: str, errno: int, reason: str) -> None:
        super().__init__(message)
        self.errno = errno
        self.reason = reason


class DeadlineExceeded(HarnessError):
    """An awaited event did not come in time; the message lists what was seen instead."""


class LoadNotReached(HarnessError):
    """The device could not be brought or kept under load, so nothing about load was shown."""


class ProgramFailed(HarnessError):
    """A program exited with a status other than zero."""


# Some numbers have two names, and Python's errno.errorcode has the one that WireGuard's documentation does not use.
_USUAL_NAMES: Final = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK"}


def error_name(number: int) -> str:
    """Return the name of an error number as in errno(3): EADDRINUSE for 98."""
    return _USUAL_NAMES.get(number) or errno.errorcode.get(number, f"errno {number}")


def refusal(where: str, action: str, number: int, detail: str = "") -> ControlError:
    """Make the error for a refused request: `wg0 (uapi): EADDRINUSE: set listen_port 51820: Address already in use`."""
    reason = f"{os.strerror(number)} ({detail})" if detail else os.strerror(number)
    return ControlError(f"{where}: {error_name(number)}: {action}: {reason}", number, reason)


def unreadable(where: str, what: object) -> ControlError:
    """Make the error for an answer that violates the protocol."""
    reason = f"unreadable answer: {what}"
    return ControlError(f"{where}: {reason}", errno.EBADMSG, reason)
