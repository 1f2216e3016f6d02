"""Send requests as UAPI text over the control socket, and read the errno of the answers."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Final

from harness import ProgramInterface, Unsupported

if TYPE_CHECKING:
    from harness import Lab, Manifest

_STATUS: Final = re.compile(rb"(?:^|\n)errno=(-?\d+)\n\n$")
# Seconds: an answer to a well-formed request comes at once.
TIMEOUT: Final = 5.0


def program(lab: Lab, manifest: Manifest) -> ProgramInterface:
    """Start wg0 of a program, with a private key; raises Unsupported for the driver, which has no UAPI socket."""
    if manifest.kind == "kernel":
        raise Unsupported("the kernel is not configured over UAPI")
    made = lab.interface("wg0", manifest, lab.node("ns0"))
    assert isinstance(made, ProgramInterface)
    # Some programs take no peer before a private key.
    status = ask(made, f"private_key={lab.key('own').raw.hex()}")
    assert status == 0, f"private_key: {named(status)}"
    return made


def exchange(wg0: ProgramInterface, request: bytes) -> bytes:
    """Send bytes on a new connection; return the answer, up to its empty line or the end of the connection."""
    answer: bytes = wg0.control.exchange(request, "request", TIMEOUT)  # type: ignore[attr-defined]
    return answer


def ask(wg0: ProgramInterface, *lines: str) -> int | None:
    """Send a set request of these lines; return the errno as it stands there, None without an errno line."""
    return status_of(exchange(wg0, "\n".join(["set=1", *lines, "", ""]).encode()))


def status_of(answer: bytes) -> int | None:
    """Return the errno of an answer, None if it does not end in an errno line and an empty line."""
    found = _STATUS.search(answer)
    return int(found[1]) if found else None


def is_refusal(status: int | None, number: int = errno.EINVAL) -> bool:
    """Whether this is the errno, negative or positive: wg(8) accepts both as a failure."""
    return status is not None and abs(status) == number


def named(status: int | None) -> str:
    """Describe a status for a message: `errno=-22`, or that the line was missing."""
    return "closed the connection without an errno line" if status is None else f"answered errno={status}"
