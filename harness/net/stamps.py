"""Keep on the kernel's time stamps of packets, from before the first packet that matters.

The kernel stamps packets only while a socket asks for it, and begins a moment after the first one has
(net_enable_timestamp in net/core/dev.c). A packet that came before has the time when it is read.
"""

from __future__ import annotations

import socket
from typing import Final

from harness.sandbox.kept import keep_descriptor

# asm-generic/socket.h: SO_TIMESTAMPNS_OLD.
SO_TIMESTAMPNS: Final = 35

_asking: list[socket.socket] = []


def keep_on() -> None:
    """Ask for time stamps until this process ends; the second call does nothing."""
    if not _asking:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        _asking.append(sock)
        keep_descriptor(sock.fileno(), "time stamps of packets")
