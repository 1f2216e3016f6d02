"""Write each event of a device as a JSON line, and the keys in Wireshark's format.

Takes the place of the driver's debug messages. Wireshark reads the keys with its preference `wg.keylog_file`.
"""

from __future__ import annotations

import errno
import json
import os
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, Protocol

from refwg.boundary import Endpoint
from refwg.messages import SECOND
from refwg.shortage import SHORTAGES, reason
from refwg.uapi import format_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

_KEY_NAMES: Final = (
    "LOCAL_STATIC_PRIVATE_KEY",
    "REMOTE_STATIC_PUBLIC_KEY",
    "LOCAL_EPHEMERAL_PRIVATE_KEY",
    "PRESHARED_KEY",
)


_DROPS_IN_SECOND: Final = 1000
# Errors of write(2) that may be over later: the lines until then are lost. After any other error a file is given up.
_MAY_PASS: Final = SHORTAGES | {errno.ENOSPC, errno.EDQUOT}


class Lines(Protocol):
    """Where lines are appended: a `LineFile`."""

    def append(self, lines: str) -> None:
        """Write whole lines."""


class LineFile:
    """A file to which lines are appended, each by one write(2); lines are dropped and counted while the disk is full.

    complain: called with a message when the first line is lost, when lines are written again, and when no more is
    written.
    """

    def __init__(self, name: str, complain: Callable[[str], None]) -> None:
        """Open the file for appending, readable by its owner only, because it may contain keys; raises OSError."""
        self._name = name
        self._complain = complain
        self._descriptor: int | None = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lost = 0

    def append(self, lines: str) -> None:
        """Write whole lines, or nothing of them."""
        if self._descriptor is None:
            return
        data = lines.encode()
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            self._failed(error)
            return
        if written < len(data):
            # The disk is full now. Half a line would spoil the next one.
            with suppress(OSError):
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        elif self._lost:
            self._complain(f"{self._name}: written again; {self._lost} events were lost")
            self._lost = 0

    def _failed(self, error: OSError) -> None:
        if error.errno in _MAY_PASS:
            self._lost += 1
            if self._lost == 1:
                self._complain(f"{self._name}: {reason(error.errno)}; events are lost until then")
            return
        self._complain(f"{self._name}: {error.strerror}; no more is written to this file")
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


class FileWatcher:
    """A `Watcher` that writes to files and to the log, each event at once.

    debug: receives each event as a line of text, but at most 1000 dropped packets in a second, because a flood would
    cost more time in the log than in the protocol. trace: receives all of them.
    """

    def __init__(
        self,
        trace: Lines | None,
        keylog: Lines | None,
        debug: Callable[[str], None] | None,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Watch a device. wall_clock: nanoseconds since 1970, as in packet captures; not the clock of `now`."""
        self._wall_clock = wall_clock
        self._trace = trace
        self._keylog = keylog
        self._debug = debug
        # The second in which drops were last logged, and how many there were.
        self._second = self._drops = 0

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        """Write an event: keys `time` (nanoseconds since boot), `event`, `peer` (base64 or null), and the details."""
        if self._trace is None and not self._is_logged(now, event):
            return
        name = b64encode(peer).decode()
        values = {key: _plain(value) for key, value in details.items()}
        if self._trace is not None:
            record = {"time": now, "wall": self._wall_clock(), "event": event, "peer": name or None, **values}
            self._trace.append(json.dumps(record) + "\n")
        if self._debug is not None and (self._trace is None or self._is_logged(now, event)):
            rest = " ".join(f"{key}={value}" for key, value in values.items())
            self._debug(f"{event}{f' peer={name}' if name else ''}{f' {rest}' if rest else ''}")

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        """Append four lines to the key log, in the order that Wireshark expects."""
        if self._keylog is None:
            return
        secrets = (static_private, remote_static, ephemeral_private, preshared)
        lines = (f"{name} = {b64encode(secret).decode()}\n" for name, secret in zip(_KEY_NAMES, secrets, strict=True))
        self._keylog.append("".join(lines))

    def _is_logged(self, now: int, event: str) -> bool:
        """Return True if the log receives this event; counts it if it is a drop (`net_ratelimit` in the driver)."""
        if self._debug is None or event != "drop":
            return self._debug is not None
        second = now // SECOND
        if second != self._second:
            self._second, self._drops = second, 0
        self._drops += 1
        if self._drops == _DROPS_IN_SECOND + 1:
            self._debug("drop: more packets are dropped in this second, and not listed here")
        return self._drops <= _DROPS_IN_SECOND


def _plain(value: object) -> object:
    if isinstance(value, Endpoint):
        source = "" if value.source is None else f" from {ip_address(value.source.address)}"
        return format_endpoint(value) + source
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value
