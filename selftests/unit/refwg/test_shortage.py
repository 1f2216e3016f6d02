from __future__ import annotations

import errno
import os

import pytest

from refwg.errors import Shortage
from refwg.messages import SECOND
from refwg.shortage import Complaints, as_shortage, reason


class Log:
    """A log in memory, and the clock of its complaints."""

    def __init__(self) -> None:
        self.now = 0
        self.lines: list[str] = []
        self.complaints = Complaints(self.lines.append, lambda: self.now)


@pytest.mark.bug("IB-77")
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_lack_of_resource_becomes_shortage_with_its_remedy(number: int) -> None:
    with pytest.raises(Shortage) as failure, as_shortage("the route is unknown"):
        raise OSError(number, os.strerror(number))
    assert failure.value.errno == number
    assert str(failure.value) == f"the route is unknown: {reason(number)}"
    assert reason(number).startswith(f"{os.strerror(number)}: ")


def test_exhausted_memory_of_interpreter_becomes_shortage() -> None:
    with pytest.raises(Shortage, match="Cannot allocate memory: free memory"), as_shortage("a packet is lost"):
        bytearray(1 << 62)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENODEV, errno.EINVAL])
def test_error_other_than_shortage_passes_unchanged(number: int) -> None:
    with pytest.raises(OSError) as failure, as_shortage("the route is unknown"):  # noqa: PT011 - the errno is checked
        raise OSError(number, os.strerror(number))
    assert (failure.value.errno, reason(number)) == (number, os.strerror(number))


@pytest.mark.bug("IB-77")
def test_topic_is_logged_once_per_minute_with_count_of_rest() -> None:
    log = Log()
    for now in (0, 1, 60 * SECOND - 1, 60 * SECOND, 60 * SECOND + 1):
        log.now = now
        log.complaints.shortage("look", "no descriptor")
    log.complaints.shortage("accept", "no connection")
    assert log.lines == ["no descriptor", "no descriptor (2 more times since the last report)", "no connection"]


@pytest.mark.bug("IB-77")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ENOBUFS", "datagrams were dropped: No buffer space available: send less"),
        ("EPERM", "datagrams were dropped: Operation not permitted: look for a firewall rule"),
        ("EACCES", "datagrams were dropped: Permission denied: look for a firewall rule"),
        ("ENETUNREACH", ""),
    ],
)
def test_refused_datagram_is_logged_if_remedy_is_local(error: str, words: str) -> None:
    log = Log()
    for _ in range(3):
        log.complaints.not_sent(error)
    assert len(log.lines) == bool(words)
    assert "".join(log.lines).startswith(words)
