"""Make the network interface by /dev/net/tun, and follow it into other namespaces.

Mirrors the net_device part of device.c. The UDP sockets stay in the namespace where the process was started; MTU,
routes, link state and ICMP errors belong where the interface is now.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final, TypeVar

from refwg.errors import InterfaceGoneError
from refwg.icmp import IcmpLimits, IcmpSender
from refwg.messages import DEFAULT_MTU
from refwg.rtnetlink import Monitor, RtnetlinkSocket

if TYPE_CHECKING:
    from collections.abc import Callable

    from refwg.ip import IcmpError
    from refwg.rtnetlink import Link

T = TypeVar("T")

TUN_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_TUNGETIFF: Final = 0x800454D2
_TUNGETDEVNETNS: Final = 0x54E3
_SIOCSIFMTU: Final = 0x8922
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_CLONE_NEWNET: Final = 0x40000000
# A kernel before 5.10, or no right to look: then the interface had better stay where it was made.
_CANNOT_LOOK: Final = frozenset({errno.EINVAL, errno.ENOTTY, errno.EPERM})
_INTERFACE_REQUEST: Final = Struct("=16sH22x")
_INTERFACE_REQUEST_MTU: Final = Struct("=16si20x")
_LARGEST_PACKET: Final = 65535 + 40
_CACHED_ROUTES: Final = 4096


class Tun:
    """An interface, and a view of the network namespace that it is in."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._place: _Place | None = None
        self._home = RtnetlinkSocket()
        self._mtus: dict[bytes, int] = {}
        # Readable when links or routes have changed, where the interface is among other places; see `refresh`.
        self.monitor = Monitor(links=True, routes=True, everywhere=True)
        self._number: int | None = None
        self._limits: IcmpLimits | None = None
        self.link = self._look_up()

    @classmethod
    def create(cls, name: str) -> Tun:
        """Make a new interface, down, with the MTU that fits into most paths."""
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = _INTERFACE_REQUEST.pack(os.fsencode(name), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
                fcntl.ioctl(one, _SIOCSIFMTU, _INTERFACE_REQUEST_MTU.pack(os.fsencode(name), DEFAULT_MTU))
            _quieten(name)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._place is not None:
            self._place.close()
        self._home.close()
        self.monitor.close()
        os.close(self._descriptor)

    def refresh(self) -> bool:
        """Look again at the interface, wherever it is now; True if it was down meanwhile, or has moved."""
        number, was_down = self._number, False
        self._mtus.clear()
        while True:
            seen = [link for where, link in self.monitor.drain() if where == number and link.index == self.link.index]
            was_down |= any(not link.is_up for link in seen)
            self._leave()
            self.link = self._look_up()
            if not seen or self._number != number:
                break
            # What was told while we looked would look like news the next time.
        self._where().limits.routes_changed()
        if not self.link.is_up:
            # The kernel makes the settings anew after a move, and after an MTU that is too small for IPv6.
            self._call_there(lambda _: _quieten(self.link.name))
        return was_down or self._number != number

    def rest(self) -> None:
        """Nothing is to be done for now: hold on to no other namespace than ours, or it could not be deleted."""
        if self._number is not None:
            self._leave()

    def read(self) -> bytes | None:
        """Next packet from the interface's network stack; None if none is there."""
        try:
            return os.read(self._descriptor, _LARGEST_PACKET)
        except BlockingIOError:
            return None
        except OSError as error:
            # EIO: the interface is down.
            if error.errno == errno.EIO:
                return None
            raise InterfaceGoneError from error

    def write(self, packet: bytes) -> bool:
        """Give a packet to the interface's network stack; False if it did not take it."""
        try:
            os.write(self._descriptor, packet)
        except OSError:
            return False
        return True

    def mtu_to(self, destination: bytes) -> int:
        """MTU of the route by which a packet came here; of the interface if the route has none of its own."""
        mtu = self._mtus.get(destination)
        if mtu is None:
            if len(self._mtus) >= _CACHED_ROUTES:
                self._mtus.clear()
            route = self._where().rtnetlink.route(destination, interface=self.link.index)
            mtu = min(self.link.mtu, route.mtu) if route.mtu else self.link.mtu
            self._mtus[destination] = mtu
        return mtu

    def set_down(self) -> None:
        self._where().rtnetlink.set_down(self.link)

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        """Send an ICMP error to an address where the interface is; False if that failed, or there were too many."""
        if self._limits is None or not self._limits.allow_any(now):
            return False
        place = self._where()
        return place.icmp.send(error, place.limits, now)

    def _look_up(self) -> Link:
        """Find the interface by the name it has now, in the namespace it is in now."""
        for _ in range(3):
            link = self._where().rtnetlink.link(self._name())
            if link is not None:
                return link
            self._leave()
        raise InterfaceGoneError

    def _name(self) -> str:
        try:
            answer = fcntl.ioctl(self._descriptor, _TUNGETIFF, bytes(_INTERFACE_REQUEST.size))
        except OSError as error:
            raise InterfaceGoneError from error
        return os.fsdecode(answer[:16].rstrip(b"\0"))

    def _where(self) -> _Place:
        if self._place is None:
            self._place = self._enter()
            self._number, self._limits = self._place.number, self._place.limits
        return self._place

    def _leave(self) -> None:
        if self._place is not None:
            self._place.close()
        self._place = None

    def _enter(self) -> _Place:
        """Make sockets where the interface is; what was sent so far counts as long as it stays where it is."""
        return self._call_there(lambda number: _Place(number, self._limits if number == self._number else None))

    def _call_there(self, make: Callable[[int | None], T]) -> T:
        """Call a function where the interface is: at once if that is our own namespace, else in a thread that goes.

        It is told the number by which our own namespace knows that one, None if it is the same.
        """
        try:
            namespace = fcntl.ioctl(self._descriptor, _TUNGETDEVNETNS, 0)
        except OSError as error:
            if error.errno in _CANNOT_LOOK:
                return make(None)
            why = "" if error.errno in {errno.EBADFD, errno.EBADF} else f"no network namespace: {error.strerror}"
            raise InterfaceGoneError(why) from error
        try:
            there, here = os.fstat(namespace), Path("/proc/thread-self/ns/net").stat()
            is_home = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
            if is_home:
                return make(None)
            number = self._home.namespace_id(namespace)
            return _call_in(namespace, lambda: make(number))
        except OSError as error:
            raise InterfaceGoneError(f"its network namespace cannot be entered: {error.strerror}") from error
        finally:
            os.close(namespace)


class _Place:
    """Sockets in the namespace of the interface. They keep belonging to it, whoever uses them, and keep it alive.

    number: by which our own namespace knows it, None if it is the same.
    """

    def __init__(self, number: int | None, limits: IcmpLimits | None) -> None:
        self.number = number
        self.limits = limits or IcmpLimits()
        self.rtnetlink = RtnetlinkSocket()
        self.icmp = IcmpSender(self.rtnetlink)

    def close(self) -> None:
        self.rtnetlink.close()
        self.icmp.close()


def _quieten(name: str) -> None:
    """No link-local address and no redirects, as the driver has it; where that cannot be set, nothing is lost."""
    for setting, value in (
        (f"ipv6/conf/{name}/addr_gen_mode", "1"),
        (f"ipv4/conf/{name}/send_redirects", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
    ):
        with suppress(OSError):
            Path("/proc/sys/net", setting).write_text(value)


def _call_in(namespace: int, make: Callable[[], T]) -> T:
    """Call a function in another network namespace. A thread goes there, because nobody can be sure to get back."""
    # Imported late: an interface that stays where it was made does not need it.
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    results: list[T] = []
    failures: list[OSError] = []

    def go() -> None:
        if libc.setns(namespace, _CLONE_NEWNET):
            failures.append(OSError(ctypes.get_errno(), "setns"))
            return
        try:
            results.append(make())
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
