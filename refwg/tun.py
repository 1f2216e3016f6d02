"""Make the network interface by /dev/net/tun, and follow it into other namespaces.

Mirrors the net_device part of device.c. The UDP sockets stay in the namespace where the process was started. MTU,
routes, link state and ICMP errors belong to the namespace in which the interface is now.
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
from refwg.rtnetlink import Flow, Monitor, RtnetlinkSocket

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
# Errors of TUNGETDEVNETNS if the kernel lacks it, or without CAP_NET_ADMIN. We then assume that the interface is in our
# own namespace.
_CANNOT_LOOK: Final = frozenset({errno.EINVAL, errno.ENOTTY, errno.EPERM})
_INTERFACE_REQUEST: Final = Struct("=16sH22x")
_INTERFACE_REQUEST_MTU: Final = Struct("=16si20x")
_LARGEST_PACKET: Final = 65535 + 40
_CACHED_ROUTES: Final = 4096


class Tun:
    """A TUN interface, and the network namespace that it is in.

    link: its state at the last `refresh`. monitor: readable when `refresh` must be called.
    """

    def __init__(self, descriptor: int) -> None:
        """Take over the descriptor of an interface (IFF_NO_PI); raises InterfaceGoneError if it is not one."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._place: _Place | None = None
        self._home = RtnetlinkSocket()
        self._mtus: dict[bytes, int] = {}
        # It also receives events of other namespaces, which `refresh` skips.
        self.monitor = Monitor(links=True, routes=True, everywhere=True)
        self._nsid: int | None = None
        self._limits: IcmpLimits | None = None
        self.link = self._look_up()

    @classmethod
    def create(cls, name: str) -> Tun:
        """Make a new interface, down, with MTU 1420; raises OSError if /dev/net/tun refuses."""
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = _INTERFACE_REQUEST.pack(os.fsencode(name), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                fcntl.ioctl(sock, _SIOCSIFMTU, _INTERFACE_REQUEST_MTU.pack(os.fsencode(name), DEFAULT_MTU))
            _quieten(name)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def fileno(self) -> int:
        """Return the descriptor, readable when `read` has a packet."""
        return self._descriptor

    def close(self) -> None:
        """Close all sockets and the descriptor; the kernel then removes an interface that `create` has made."""
        if self._place is not None:
            self._place.close()
        self._home.close()
        self.monitor.close()
        os.close(self._descriptor)

    def refresh(self) -> bool:
        """Read the state of the interface again; returns True if it was down since the last call, or has moved.

        Raises InterfaceGoneError.
        """
        nsid, was_down = self._nsid, False
        self._mtus.clear()
        while True:
            events = [link for where, link in self.monitor.drain() if where == nsid and link.index == self.link.index]
            was_down |= any(not link.is_up for link in events)
            self._leave()
            self.link = self._look_up()
            if not events or self._nsid != nsid:
                break
            # Repeat until no event arrives during the look-up. An event that is left over would look like a new change.
        self._where().limits.routes_changed()
        if not self.link.is_up:
            # The kernel resets these settings after a move, and after an MTU that is too small for IPv6.
            self._call_there(lambda _: _quieten(self.link.name))
        return was_down or self._nsid != nsid

    def rest(self) -> None:
        """Close sockets in another namespace, which would keep it from being deleted; call it before waiting."""
        if self._nsid is not None:
            self._leave()

    def read(self) -> bytes | None:
        """Return the next packet from the network stack, None if there is none; raises InterfaceGoneError."""
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
        """Pass a packet to the network stack; returns False if the stack refused it."""
        try:
            os.write(self._descriptor, packet)
        except OSError:
            return False
        return True

    def mtu_to(self, destination: bytes) -> int:
        """Return the MTU of the route to a destination, in bytes, or that of the interface if it is smaller."""
        mtu = self._mtus.get(destination)
        if mtu is None:
            if len(self._mtus) >= _CACHED_ROUTES:
                self._mtus.clear()
            route = self._where().rtnetlink.route(destination, Flow(interface=self.link.index))
            mtu = min(self.link.mtu, route.mtu) if route.mtu else self.link.mtu
            self._mtus[destination] = mtu
        return mtu

    def set_down(self) -> None:
        """Set the interface down, because the device could not be set up."""
        self._where().rtnetlink.set_down(self.link)

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        """Send an ICMP error in the interface's namespace; returns False if it failed or a limit is reached."""
        if self._limits is None or not self._limits.allow_any(now):
            return False
        place = self._where()
        return place.icmp.send(error, place.limits, now)

    def _look_up(self) -> Link:
        """Return the state of the interface, by its present name and namespace; raises InterfaceGoneError."""
        # Name and namespace may change between the two steps, so try again.
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
            self._nsid, self._limits = self._place.nsid, self._place.limits
        return self._place

    def _leave(self) -> None:
        if self._place is not None:
            self._place.close()
        self._place = None

    def _enter(self) -> _Place:
        """Open sockets in the interface's namespace; the ICMP limits stay the same until the interface moves."""
        return self._call_there(lambda nsid: _Place(nsid, self._limits if nsid == self._nsid else None))

    def _call_there(self, make: Callable[[int | None], T]) -> T:
        """Call a function in the interface's namespace: directly if that is our own, else in a thread that enters it.

        make: called with the id (nsid) that our namespace has for the interface's, None if both are the same. Raises
        InterfaceGoneError.
        """
        try:
            namespace = fcntl.ioctl(self._descriptor, _TUNGETDEVNETNS, 0)
        except OSError as error:
            if error.errno in _CANNOT_LOOK:
                return make(None)
            message = "" if error.errno in {errno.EBADFD, errno.EBADF} else f"no network namespace: {error.strerror}"
            raise InterfaceGoneError(message) from error
        try:
            there, here = os.fstat(namespace), Path("/proc/thread-self/ns/net").stat()
            is_home = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
            if is_home:
                return make(None)
            nsid = self._home.namespace_id(namespace)
            return _call_in(namespace, lambda: make(nsid))
        except OSError as error:
            raise InterfaceGoneError(f"cannot enter the interface's network namespace: {error.strerror}") from error
        finally:
            os.close(namespace)


class _Place:
    """Sockets in the namespace of the interface; any thread may use them, and they keep the namespace alive.

    nsid: the id that our namespace has for this one, None if both are the same.
    """

    def __init__(self, nsid: int | None, limits: IcmpLimits | None) -> None:
        self.nsid = nsid
        self.limits = limits or IcmpLimits()
        self.rtnetlink = RtnetlinkSocket()
        self.icmp = IcmpSender(self.rtnetlink)

    def close(self) -> None:
        """Close the sockets, so that the namespace may be deleted."""
        self.rtnetlink.close()
        self.icmp.close()


def _quieten(name: str) -> None:
    """Turn off link-local addresses and ICMP redirects (`wg_open`); a setting that cannot be written is skipped."""
    for setting, value in (
        (f"ipv6/conf/{name}/addr_gen_mode", "1"),
        (f"ipv4/conf/{name}/send_redirects", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
    ):
        with suppress(OSError):
            Path("/proc/sys/net", setting).write_text(value)


def _call_in(namespace: int, make: Callable[[], T]) -> T:
    """Call a function in another network namespace, in a new thread, because returning to ours might fail.

    namespace: a descriptor. Raises OSError.
    """
    # Imported late, because only an interface that was moved needs it.
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    results: list[T] = []
    failures: list[OSError] = []

    def enter_and_call() -> None:
        """Enter the namespace, which changes this thread only, and keep the result or the error."""
        if libc.setns(namespace, _CLONE_NEWNET):
            failures.append(OSError(ctypes.get_errno(), "setns"))
            return
        try:
            results.append(make())
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=enter_and_call)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
