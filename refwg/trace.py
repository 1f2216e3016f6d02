"""Write each event of a device as a JSON line, and the keys in Wireshark's format.

Takes the place of the driver's debug messages. Wireshark reads the keys with its preference `wg.keylog_file`.
"""

from __future__ import annotations

import json
import time
from base64 import b64encode
from dataclasses import asdict, is_dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, TextIO

from refwg.boundary import Endpoint
from refwg.uapi import format_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

_KEY_NAMES: Final = (
    "LOCAL_STATIC_PRIVATE_KEY",
    "REMOTE_STATIC_PUBLIC_KEY",
    "LOCAL_EPHEMERAL_PRIVATE_KEY",
    "PRESHARED_KEY",
)


class FileWatcher:
    """A `Watcher` that writes to files and to the log, and flushes each line at once.

    debug: receives each event as a line of text. complain: receives an error message.
    """

    def __init__(
        self,
        trace: TextIO | None,
        keylog: TextIO | None,
        debug: Callable[[str], None] | None,
        complain: Callable[[str], None] = lambda _: None,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Watch a device. wall_clock: nanoseconds since 1970, as in packet captures; not the clock of `now`."""
        self._complain = complain
        self._wall_clock = wall_clock
        self._trace = trace
        self._keylog = keylog
        self._debug = debug

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        """Write an event: keys `time` (nanoseconds since boot), `event`, `peer` (base64 or null), and the details."""
        name = b64encode(peer).decode()
        values = {key: _plain(value) for key, value in details.items()}
        if self._trace is not None:
            record = {"time": now, "wall": self._wall_clock(), "event": event, "peer": name or None, **values}
            self._trace = self._append(self._trace, json.dumps(record) + "\n")
        if self._debug is not None:
            rest = " ".join(f"{key}={value}" for key, value in values.items())
            self._debug(f"{event}{f' peer={name}' if name else ''}{f' {rest}' if rest else ''}")

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        """Append four lines to the key log, in the order that Wireshark expects."""
        if self._keylog is None:
            return
        secrets = (static_private, remote_static, ephemeral_private, preshared)
        lines = (f"{name} = {b64encode(secret).decode()}\n" for name, secret in zip(_KEY_NAMES, secrets, strict=True))
        self._keylog = self._append(self._keylog, "".join(lines))

    def _append(self, file: TextIO, text: str) -> TextIO | None:
        """Write to a file and return it; None if that fails, for example because the disk is full."""
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            self._complain(f"{file.name}: {error.strerror}; no more is written to this file")
            return None
        return file


def _plain(value: object) -> object:
    if isinstance(value, Endpoint):
        source = "" if value.source is None else f" from {ip_address(value.source.address)}"
        return format_endpoint(value) + source
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value
