"""Write what a device decides as JSON lines, and the keys in Wireshark's format.

No kernel file has this; the driver's counterpart are its debug messages.
"""

from __future__ import annotations

import json
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
    """A watcher that writes to files and to the log; each line is out before the next thing happens."""

    def __init__(
        self,
        trace: TextIO | None,
        keylog: TextIO | None,
        debug: Callable[[str], None] | None,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._complain = complain
        self._trace = trace
        self._keylog = keylog
        self._debug = debug

    def note(self, now: int, event: str, peer: bytes, **details: object) -> None:
        name = b64encode(peer).decode()
        values = {key: _plain(value) for key, value in details.items()}
        if self._trace is not None:
            record = {"time": now, "event": event, "peer": name or None, **values}
            self._trace = self._append(self._trace, json.dumps(record) + "\n")
        if self._debug is not None:
            rest = " ".join(f"{key}={value}" for key, value in values.items())
            self._debug(f"{event}{f' peer={name}' if name else ''}{f' {rest}' if rest else ''}")

    def keys(self, static_private: bytes, remote_static: bytes, ephemeral_private: bytes, preshared: bytes) -> None:
        if self._keylog is None:
            return
        secrets = (static_private, remote_static, ephemeral_private, preshared)
        lines = (f"{name} = {b64encode(secret).decode()}\n" for name, secret in zip(_KEY_NAMES, secrets, strict=True))
        self._keylog = self._append(self._keylog, "".join(lines))

    def _append(self, file: TextIO, text: str) -> TextIO | None:
        """Write to a file; one that cannot be written, because the disk is full perhaps, is given up."""
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            self._complain(f"{file.name}: {error.strerror}; nothing more is written there")
            return None
        return file


def _plain(value: object) -> object:
    if isinstance(value, Endpoint):
        source = "" if value.source is None else f" from {ip_address(value.source.address)}"
        return format_endpoint(value) + source
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value
