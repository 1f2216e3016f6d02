"""What both ways to configure have in common: the typed interface, the deadline, and how a refusal reads."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Final, Protocol

from harness.control.records import keyword_changes
from harness.errors import ControlError, DeadlineExceeded
from harness.wait import scaled

if TYPE_CHECKING:
    import socket

    from harness.control.records import DeviceConfig, DeviceState, PeerConfig

# Of one get or set, in seconds: long enough for 130 560 allowed-ips of a program that has a tenth of a processor.
DEFAULT_TIMEOUT: Final = 30.0
# Of one that is asked for evidence after a failure, which may be that it does not answer.
EVIDENCE_TIMEOUT: Final = 2.0

# Where a number has two names, Python knows the one that WireGuard's documentation does not use.
_USUAL_NAMES: Final = {errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EDEADLK: "EDEADLK"}


class Control(Protocol):
    """One WireGuard interface, in whichever way it is reached."""

    def get(self, timeout: float | None = None) -> DeviceState: ...

    def set(self, config: DeviceConfig) -> None: ...


class Deadline:
    """The end of one request, however many reads it takes: in so many seconds, multiplied by --timeout-scale."""

    def __init__(self, seconds: float) -> None:
        self._seconds = scaled(seconds)
        self._end = time.monotonic() + self._seconds

    def limit(self, sock: socket.socket) -> None:
        """Give the next call on this socket what is left of the time; TimeoutError when nothing is."""
        left = self._end - time.monotonic()
        # A socket takes a timeout of 0 for "do not wait at all" and raises something else then.
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)

    def exceeded(self, where: str, action: str, seen: str) -> DeadlineExceeded:
        """Make the error of a request that took longer."""
        return DeadlineExceeded(f"{where}: waited {self._seconds:g} s for the answer to {action}; seen: {seen}")


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


def describe(config: DeviceConfig) -> str:
    """Say in one line what a configuration changes; without private and preshared keys, which are of no help."""
    changes = [_change(name, value) for name, value in keyword_changes(config).items() if name != "peers"]
    match config.peers:
        case []:
            pass
        case [only]:
            changes.append(_describe_peer(only))
        case several:
            changes.append(f"{len(several)} peers")
    return f"set {', '.join(changes) or 'nothing'}"


def _describe_peer(peer: PeerConfig) -> str:
    changes = [_change(name, value) for name, value in keyword_changes(peer).items() if name != "public_key"]
    return f"peer {peer.public_key}" + (f" ({', '.join(changes)})" if changes else "")


def _change(name: str, value: object) -> str:
    if name == "allowed_ips" and isinstance(value, tuple):
        return f"{len(value)} allowed_ips"
    if value is True or name.endswith("_key"):
        return name
    return f"{name} {value}"
