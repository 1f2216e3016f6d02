"""Get and use cookies of a device under load, and wait until it is no longer under load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Initiation, ProgramInterface, not_reached, poll_until
from harness.scripted.received import ReceivedCookieReply, ReceivedResponse

if TYPE_CHECKING:
    from harness import PeerSocket, ScriptedPeer, Target
    from harness.scripted.load import Load
    from harness.scripted.received import Received

NO_MAC2 = bytes(16)
# Seconds for one answer; initiations until the load must have ended, each 25 ms after the last.
ANSWER = 2.0
MOST_WITHOUT_LOAD = 400


def cookie_reply(load: Load, peer: ScriptedPeer, via: PeerSocket | None = None) -> ReceivedCookieReply:
    """Send an initiation without mac2 under load; return the cookie reply to it, which authenticates."""
    answer = load.answer(peer, Initiation(mac2=NO_MAC2), via)
    assert isinstance(answer, ReceivedCookieReply), f"under load an initiation without mac2 was answered by a {answer}"
    assert not answer.wrong, f"a cookie reply does not open: {answer.wrong}"
    return answer


def use(load: Load, peer: ScriptedPeer, cookie: bytes, via: PeerSocket | None = None) -> Received:
    """Send an initiation whose mac2 is made with a cookie under load; return the answer."""
    return load.answer(peer, Initiation(cookie=cookie), via)


def assert_refused(answer: Received, what: str) -> None:
    """Assert that the answer is another cookie reply."""
    assert isinstance(answer, ReceivedCookieReply), f"under load the device accepted {what}: it sent a {answer}"


def assert_accepted(answer: Received, what: str) -> None:
    """Assert that the answer is a response that leads to a session."""
    assert isinstance(answer, ReceivedResponse), f"under load the device answered {what} by a {answer}"
    assert not answer.wrong, f"under load the response to {what} does not authenticate: {answer.wrong}"


def elsewhere(target: Target, family: int) -> str:
    """Add another address of the peers' node."""
    return target.address("192.168.1.77" if family == 4 else "fd00:aa::4d")


def handshake_answers(peer: ScriptedPeer) -> list[Received]:
    """Return the responses and cookie replies that have come to a peer."""
    return [one for one in peer.drain() if isinstance(one, ReceivedResponse | ReceivedCookieReply)]


def first_response(peer: ScriptedPeer) -> ReceivedResponse:
    """Send initiations without mac2 until the device, no longer under load, answers by a response."""
    for _ in range(MOST_WITHOUT_LOAD):
        peer.inbox.clear()
        peer.send(Initiation(mac2=NO_MAC2))
        answers = poll_until(lambda: handshake_answers(peer), bool, ANSWER, what="an answer after the load")
        if answers and isinstance(answers[0], ReceivedResponse):
            peer.inbox.remove(answers[0])
            return answers[0]
    return not_reached(f"the device was still under load after {MOST_WITHOUT_LOAD} initiations")


def resident(target: Target) -> int:
    """Return the memory that the device uses, in bytes: of its process, or all that the kernel has given away."""
    if isinstance(target.interface, ProgramInterface):
        pages = Path(f"/proc/{target.interface.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(table["MemTotal"].split()[0]) - int(table["MemAvailable"].split()[0])) * 1024


def open_descriptors(target: Target) -> int:
    """Return how many descriptors the program has open; 0 for the kernel."""
    if isinstance(target.interface, ProgramInterface):
        return len(list(Path(f"/proc/{target.interface.process.pid}/fd").iterdir()))
    return 0
