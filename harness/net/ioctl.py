"""Find and set up the devices of one network namespace by ioctls, netdevice(7).

Tests look up devices and set them up more often than anything else. An ioctl takes some microseconds; the same request
by netlink (rtnetlink.py) takes ten times as long.
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
    """The devices of one network namespace: the namespace of `control`, a socket of any family.

    Every method raises OSError with the kernel's errno, ENODEV for an unknown name.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def close(self) -> None:
        """Close the control socket."""
        self._control.close()

    def index(self, name: str) -> int | None:
        """Return the interface index of a device; None, and no error, if there is no device of that name."""
        try:
            answer = fcntl.ioctl(self._control, _SIOCGIFINDEX, _NUMBER.pack(name.encode(), 0))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return int(_NUMBER.unpack(answer)[1])

    def is_up(self, name: str) -> bool:
        """Return whether the device is set up (IFF_UP); it may have no carrier even so."""
        return bool(self._flags(name) & _IFF_UP)

    def set_up(self, name: str, up: bool) -> None:
        """Set a device up or down, and keep its other flags."""
        flags = self._flags(name) & ~_IFF_UP | (_IFF_UP if up else 0)
        fcntl.ioctl(self._control, _SIOCSIFFLAGS, _FLAGS.pack(name.encode(), flags))

    def set_mtu(self, name: str, mtu: int) -> None:
        """Set the MTU in bytes; EINVAL if the device does not allow this one."""
        fcntl.ioctl(self._control, _SIOCSIFMTU, _NUMBER.pack(name.encode(), mtu))

    def rename(self, name: str, new: str) -> None:
        """Rename a device; an older kernel refuses this with EBUSY while the device is up."""
        fcntl.ioctl(self._control, _SIOCSIFNAME, _NAMES.pack(name.encode(), new.encode()))

    def _flags(self, name: str) -> int:
        answer = fcntl.ioctl(self._control, _SIOCGIFFLAGS, _FLAGS.pack(name.encode(), 0))
        return int(_FLAGS.unpack(answer)[1])
