"""Recognize shortages of descriptors and memory, and log each at most once a minute.

The driver has no such file: its system calls return these errors to the caller. A program must go on without what it
did not get, or it would end all its tunnels because of a lack that may be over in a second.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from refwg.errors import Shortage
from refwg.messages import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What an administrator can do about each shortage.
_REMEDIES: Final = {
    errno.EMFILE: "close idle connections to the control socket, or raise RLIMIT_NOFILE (ulimit -n)",
    errno.ENFILE: "end programs that hold many files open, or raise fs.file-max",
    errno.ENOMEM: "free memory, or raise the memory limit of the process or its cgroup",
    errno.ENOBUFS: "send less, or raise net.core.wmem_max and the queue length of the outgoing interface",
    errno.ENOSPC: "free space on the file system",
    errno.EDQUOT: "free space, or raise the quota of the user",
    errno.EAGAIN: "end other processes of the user, or raise RLIMIT_NPROC (ulimit -u)",
}
# Errors of a system call that lacks a resource. EAGAIN is not listed: for a socket it means that nothing is there.
SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# Refusals of sendmsg(2) by policy: a firewall rule, or a security module.
_REFUSALS: Final = frozenset({errno.EPERM, errno.EACCES})
_QUIET_FOR: Final = 60 * SECOND


def is_shortage(error: OSError) -> bool:
    """Return True if the system lacked a resource, so that the same call may succeed later."""
    return error.errno in SHORTAGES


def reason(number: int) -> str:
    """Return the text of an errno, with the remedy if it is a shortage."""
    remedy = _REMEDIES.get(number)
    return f"{os.strerror(number)}: {remedy}" if remedy else os.strerror(number)


def lack(what: str, number: int) -> Shortage:
    """Return the error for a shortage; what: what could not be done, for its message."""
    return Shortage(f"{what}: {reason(number)}", number)


@contextmanager
def as_shortage(what: str) -> Iterator[None]:
    """Turn an OSError of the block into Shortage if it is one, and so a MemoryError; other errors pass."""
    try:
        yield
    except MemoryError as error:
        raise lack(what, errno.ENOMEM) from error
    except OSError as error:
        if not is_shortage(error):
            raise
        raise lack(what, error.errno or errno.ENOMEM) from error


class Complaints:
    """Log of shortages: each topic at most once a minute, with the number of complaints left out since.

    log: called with each message. clock: returns nanoseconds.
    """

    def __init__(self, log: Callable[[str], None], clock: Callable[[], int]) -> None:
        self._log = log
        self._clock = clock
        self._logged: dict[str, int] = {}
        self._left_out: dict[str, int] = {}

    def shortage(self, topic: str, message: str) -> None:
        """Log a message, unless one of this topic was logged within the last minute. topic: a constant text."""
        now = self._clock()
        last = self._logged.get(topic)
        if last is not None and now < last + _QUIET_FOR:
            self._left_out[topic] = self._left_out.get(topic, 0) + 1
            return
        self._logged[topic] = now
        left_out = self._left_out.pop(topic, 0)
        self._log(f"{message} ({left_out} more times since the last report)" if left_out else message)

    def not_sent(self, error: str) -> None:
        """Log that the stack refused datagrams for lack of something or by policy; error: the name of the errno."""
        number = getattr(errno, error, 0)
        if number in SHORTAGES:
            self.shortage(error, f"datagrams were dropped: {reason(number)}")
        elif number in _REFUSALS:
            self.shortage(
                error, f"datagrams were dropped: {os.strerror(number)}: look for a firewall rule that rejects them"
            )
