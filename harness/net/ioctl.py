"""Find and set up the devices of one network namespace by ioctls, netdevice(7).

What a test does most often, finding a device and setting it up, costs microseconds this way, and ten times as long by
netlink (rtnetlink.py).
"""

from __future__ import annotations

import errno
import fcntl
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFNAME: Final = 0x8923
_SIOCGIFINDEX: Final = 0x8933
_IFF_UP: Final = 1
_NUMBER: Final = Struct("=16si20x")
_FLAGS: Final = Struct("=16sH22x")
_NAMES: Final = Struct("=16s16s8x")


class Devices:
    """The devices of the namespace that a socket lives in; every method raises OSError as the kernel does."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def close(self) -> None:
        self._control.close()

    def index(self, name: str) -> int | None:
        """The interface index; None if there is no device of that name."""
        try:
            answer = fcntl.ioctl(self._control, _SIOCGIFINDEX, _NUMBER.pack(name.encode(), 0))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return int(_NUMBER.unpack(answer)[1])

    def is_up(self, name: str) -> bool:
        return bool(self._flags(name) & _IFF_UP)

    def set_up(self, name: str, up: bool) -> None:
        flags = self._flags(name) & ~_IFF_UP | (_IFF_UP if up else 0)
        fcntl.ioctl(self._control, _SIOCSIFFLAGS, _FLAGS.pack(name.encode(), flags))

    def set_mtu(self, name: str, mtu: int) -> None:
        fcntl.ioctl(self._control, _SIOCSIFMTU, _NUMBER.pack(name.encode(), mtu))

    def rename(self, name: str, new: str) -> None:
        fcntl.ioctl(self._control, _SIOCSIFNAME, _NAMES.pack(name.encode(), new.encode()))

    def _flags(self, name: str) -> int:
        answer = fcntl.ioctl(self._control, _SIOCGIFFLAGS, _FLAGS.pack(name.encode(), 0))
        return int(_FLAGS.unpack(answer)[1])
