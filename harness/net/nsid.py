"""Wait until network namespaces have vanished, by the kernel's messages RTM_DELNSID.

The kernel notifies every namespace that holds an id of a destroyed one. Source: RTM_NEWNSID and RTM_DELNSID,
rtnetlink(7) and include/uapi/linux/net_namespace.h. An id is not a reference: it keeps nothing alive.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final, Self

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.net.netns import NetNS

_RTM_NEWNSID, _RTM_DELNSID = 88, 89
_NETNSA_NSID, _NETNSA_FD = 1, 3
_NLM_F_REQUEST_ACK: Final = 1 | 4
_RTNLGRP_NSID: Final = 28
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
# length, type, flags, sequence, port; then the family, padded to four bytes
_HEADER: Final = struct.Struct("=IHHII4x")
_ATTRIBUTE: Final = struct.Struct("=HHi")
_ERROR: Final = struct.Struct("=16xi")
# Far from those that the kernel gives out by itself.
_FIRST: Final = 1000


class NsidEvents:
    """All of some namespaces have vanished: an event, for `wait_for`; as a context manager."""

    def __init__(self, watcher: NetNS, *watched: NetNS) -> None:
        """Give each a number. watcher: in whose namespace the kernel tells of it, and which stays."""
        self._names = {_FIRST + index: node.name for index, node in enumerate(watched)}
        self._socket = watcher.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            for number, node in zip(self._names, watched, strict=True):
                self._give_number(number, node)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _RTNLGRP_NSID)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def look(self) -> bool | None:
        while True:
            try:
                message = self._socket.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None if self._names else True
            if _HEADER.unpack_from(message)[1] == _RTM_DELNSID:
                self._names.pop(_number(message), None)

    def seen(self) -> str:
        return f"still there: {', '.join(self._names.values())}"

    def _give_number(self, number: int, node: NetNS) -> None:
        descriptor = os.open(node.handle, os.O_RDONLY | os.O_CLOEXEC)
        try:
            attributes = _ATTRIBUTE.pack(8, _NETNSA_FD, descriptor) + _ATTRIBUTE.pack(8, _NETNSA_NSID, number)
            length = _HEADER.size + len(attributes)
            self._socket.send(_HEADER.pack(length, _RTM_NEWNSID, _NLM_F_REQUEST_ACK, 0, 0) + attributes)
            (negative,) = _ERROR.unpack_from(self._socket.recv(4096))
        finally:
            os.close(descriptor)
        if negative:
            raise HarnessError(f"{node.name}: no number for its namespace: {os.strerror(-negative)}")


def _number(message: bytes) -> int:
    offset = _HEADER.size
    while offset + _ATTRIBUTE.size <= len(message):
        length, kind, value = _ATTRIBUTE.unpack_from(message, offset)
        if kind == _NETNSA_NSID:
            return int(value)
        offset += max(4, (length + 3) & ~3)
    return 0
