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

from refwg.engine.virtio import HEADER_LENGTH, PLAIN_HEADER
from refwg.errors import ForbiddenNamespace, InterfaceGoneError, OptionError, RefwgError, Shortage
from refwg.icmp import IcmpLimits, IcmpSender
from refwg.messages import DEFAULT_MTU
from refwg.rtnetlink import Flow, Monitor, RtnetlinkSocket
from refwg.shortage import as_shortage, is_shortage, lack, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
_IFF_VNET_HDR: Final = 0x4000
_TUNSETOFFLOAD: Final = 0x400454D0
_CLONE_NEWNET: Final = 0x40000000
# Errors of TUNGETDEVNETNS if the kernel lacks it, or without CAP_NET_ADMIN in the interface's namespace. We then assume
# that the interface is in our own namespace.
_CANNOT_LOOK: Final = frozenset({errno.EINVAL, errno.ENOTTY, errno.EPERM})
# Errors of a TUN descriptor whose interface was deleted; ENOENT: its namespace is being deleted, and it will follow.
_DETACHED: Final = frozenset({errno.EBADFD, errno.EBADF, errno.ENOENT})
_LOOKING: Final = "the state of the interface cannot be read"
_MAX_NAME: Final = 15
# isspace() of the kernel: these bytes, and 0xa0, which is a space in Latin-1.
_SPACES: Final = frozenset(b" \t\n\v\f\r\xa0")
_INTERFACE_REQUEST: Final = Struct("=16sH22x")
_INTERFACE_REQUEST_MTU: Final = Struct("=16si20x")
_LARGEST_PACKET: Final = HEADER_LENGTH + 65535 + 40
_CACHED_ROUTES: Final = 4096


class Tun:
    """A TUN interface, and the network namespace that it is in.

    link: its state at the last `refresh`. monitor: readable when `refresh` must be called. complain: called with a
    topic and a message when something cannot be done for lack of descriptors, memory or buffers. has_headers: the
    kernel puts a virtio header in front of each packet (IFF_VNET_HDR), so superframes are possible.
    """

    complain: Callable[[str, str], None] = staticmethod(lambda _topic, _message: None)

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
        # TUNGETDEVNETNS was refused: the namespace belongs to a user namespace in which we have no rights.
        self._is_hidden = False
        # The interface was down, or has moved, since `refresh` last returned.
        self._has_changed = False
        self.link = self._look_up()
        self._has_changed = False
        self.has_headers = bool(self._flags() & _IFF_VNET_HDR)

    @classmethod
    def create(cls, name: str, *, has_headers: bool = False) -> Tun:
        """Make a new interface, down, with MTU 1420, or take over a persistent TUN interface of this name.

        name: may be a pattern such as `wg%d`; the kernel then chooses the number (`link.name`). has_headers: ask for
        virtio headers. Raises OSError if /dev/net/tun refuses, OptionError if the name cannot be used.
        """
        descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            made = _attach(descriptor, name, _IFF_VNET_HDR if has_headers else 0)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                fcntl.ioctl(sock, _SIOCSIFMTU, _INTERFACE_REQUEST_MTU.pack(made, DEFAULT_MTU))
            _quieten(os.fsdecode(made.rstrip(b"\0")))
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

        Raises InterfaceGoneError, ForbiddenNamespace, or Shortage. After Shortage `link` is unchanged, and the caller
        must call again later, because the events were read.
        """
        nsid = self._nsid
        self._mtus.clear()
        while True:
            events = [link for where, link in self.monitor.drain() if where == nsid and link.index == self.link.index]
            self._has_changed |= any(not link.is_up for link in events)
            self._leave()
            self.link = self._look_up()
            if not events or self._nsid != nsid:
                break
            # Repeat until no event arrives during the look-up. An event that is left over would look like a new change.
        self._where().limits.routes_changed()
        if not self.link.is_up:
            # The kernel resets these settings after a move, and after an MTU that is too small for IPv6.
            self._call_there(lambda _: _quieten(self.link.name))
        has_changed, self._has_changed = self._has_changed, False
        return has_changed

    def rest(self) -> None:
        """Close sockets in another namespace, which would keep it from being deleted; call it before waiting."""
        if self._nsid is not None:
            self._leave()

    def read(self) -> bytes | None:
        """Return the next packet from the network stack, None if there is none.

        Raises InterfaceGoneError, or OSError if the system refuses for another reason.
        """
        try:
            packet = os.read(self._descriptor, _LARGEST_PACKET)
        except OSError as error:
            self._nothing_read(error)
            return None
        # Without offloads the header is always zero.
        return packet[HEADER_LENGTH:] if self.has_headers else packet

    def read_into(self, buffer: memoryview) -> int:
        """Read the next packet, with its virtio header if it has one; returns the length, 0 if there is none."""
        try:
            return os.readv(self._descriptor, [buffer])
        except OSError as error:
            self._nothing_read(error)
            return 0

    def _nothing_read(self, error: OSError) -> None:
        """Raise an error of read(2), unless it means that nothing is there (EAGAIN) or the interface is down (EIO)."""
        if error.errno in {errno.EAGAIN, errno.EIO}:
            return
        if error.errno in _DETACHED:
            raise InterfaceGoneError from error
        raise error

    def write(self, packet: bytes) -> bool:
        """Pass a packet to the network stack; returns False if the stack refused it."""
        return self.write_parts([PLAIN_HEADER, packet] if self.has_headers else [packet])

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Pass a packet or superframe in parts, the virtio header first; returns False if the stack refused it."""
        try:
            os.writev(self._descriptor, parts)
        except OSError as error:
            if is_shortage(error):
                self.complain("deliver", f"received packets were dropped: {reason(error.errno or errno.ENOMEM)}")
            return False
        return True

    def set_offloads(self, flags: int) -> bool:
        """Tell the kernel which superframes it may pass (TUNSETOFFLOAD, TUN_F_* flags); False if it refuses them."""
        try:
            fcntl.ioctl(self._descriptor, _TUNSETOFFLOAD, flags)
        except OSError:
            return False
        return True

    def mtu_to(self, destination: bytes) -> int:
        """Return the MTU of the route to a destination, in bytes, or that of the interface if it is smaller.

        If there are no descriptors for the route lookup, it is the interface's MTU, so that the packet still leaves.
        """
        mtu = self._mtus.get(destination)
        if mtu is None:
            if len(self._mtus) >= _CACHED_ROUTES:
                self._mtus.clear()
            try:
                route = self._where().rtnetlink.route(destination, Flow(interface=self.link.index))
            except Shortage as shortage:
                self.complain("look", str(shortage))
                return self.link.mtu
            mtu = min(self.link.mtu, route.mtu) if route.mtu else self.link.mtu
            self._mtus[destination] = mtu
        return mtu

    def set_down(self) -> None:
        """Set the interface down, because the device could not be set up; raises Shortage."""
        self._where().rtnetlink.set_down(self.link)

    def limit_superframes(self, size: int) -> None:
        """Tell the kernel to make no superframe of more than `size` bytes; without effect if it refuses."""
        with suppress(Shortage):
            self._where().rtnetlink.set_gso_max_size(self.link, size)

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        """Send an ICMP error in the interface's namespace; returns False if it failed or a limit is reached."""
        if self._limits is None or not self._limits.allow_any(now):
            return False
        try:
            place = self._where()
        except Shortage as shortage:
            self.complain("look", str(shortage))
            return False
        return place.icmp.send(error, place.limits, now)

    def _look_up(self) -> Link:
        """Return the state of the interface, by its present name and namespace; raises what `refresh` raises."""
        # Name and namespace may change between the two steps, so try again.
        for _ in range(3):
            try:
                with as_shortage(_LOOKING):
                    link = self._where().rtnetlink.link(self._name())
            except TimeoutError as error:
                raise lack(f"{_LOOKING} by netlink", errno.ETIMEDOUT) from error
            if link is not None:
                return link
            self._leave()
        if self._is_hidden:
            raise ForbiddenNamespace(_forbidden("ask for"))
        raise InterfaceGoneError

    def _name(self) -> str:
        return os.fsdecode(self._request()[0].rstrip(b"\0"))

    def _flags(self) -> int:
        return self._request()[1]

    def _request(self) -> tuple[bytes, int]:
        """Return name and IFF_* flags of the interface."""
        try:
            answer = fcntl.ioctl(self._descriptor, _TUNGETIFF, bytes(_INTERFACE_REQUEST.size))
        except OSError as error:
            # TUNGETIFF takes no memory: the interface was deleted, or this is not the descriptor of one.
            raise InterfaceGoneError from error
        name, flags = _INTERFACE_REQUEST.unpack(answer)
        return name, flags

    def _where(self) -> _Place:
        if self._place is None:
            self._place = self._enter()
            self._has_changed |= self._place.nsid != self._nsid
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
        InterfaceGoneError, ForbiddenNamespace or Shortage, which are not the same: only the first means that the
        interface no longer exists. Other errors of the system are raised as they are.
        """
        with as_shortage(_LOOKING):
            namespace = self._namespace()
            if namespace is None:
                return make(None)
            try:
                there, here = os.fstat(namespace), Path("/proc/thread-self/ns/net").stat()
                is_home = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
                if is_home:
                    return make(None)
                nsid = self._home.namespace_id(namespace)
                return _call_in(namespace, lambda: make(nsid))
            finally:
                os.close(namespace)

    def _namespace(self) -> int | None:
        """Return a descriptor of the interface's namespace; None: the kernel does not say, so assume our own."""
        self._is_hidden = False
        try:
            return fcntl.ioctl(self._descriptor, _TUNGETDEVNETNS, 0)
        except OSError as error:
            if error.errno in _CANNOT_LOOK:
                self._is_hidden = error.errno == errno.EPERM
                return None
            if error.errno in _DETACHED:
                raise InterfaceGoneError from error
            raise


class _Place:
    """Sockets in the namespace of the interface; any thread may use them, and they keep the namespace alive.

    nsid: the id that our namespace has for this one, None if both are the same.
    """

    def __init__(self, nsid: int | None, limits: IcmpLimits | None) -> None:
        self.nsid = nsid
        self.limits = limits or IcmpLimits()
        self.rtnetlink = RtnetlinkSocket()
        try:
            self.icmp = IcmpSender(self.rtnetlink)
        except BaseException:
            self.rtnetlink.close()
            raise

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
        try:
            Path("/proc/sys/net", setting).write_text(value)
        except OSError as error:
            if is_shortage(error):
                raise


def name_problem(name: str) -> str:
    """Return the rule of the kernel that an interface name breaks (`dev_valid_name`, `dev_alloc_name`); empty: none."""
    raw = os.fsencode(name)
    if not 0 < len(raw) <= _MAX_NAME:
        return f"{len(raw)} bytes: an interface name has 1 to {_MAX_NAME} bytes"
    if name in {".", ".."}:
        return "an interface name must not be '.' or '..', because it becomes a directory in /proc/sys/net"
    forbidden = [character for character in "/:" if character in name]
    if forbidden:
        return f"an interface name must not contain '{forbidden[0]}'"
    if _SPACES & {*raw}:
        return "an interface name must not contain white space (the kernel takes the byte 0xa0 for one too)"
    if "%" in name and (name.count("%") > 1 or "%d" not in name):
        return "a pattern contains '%d' once, for the number that the kernel chooses, and no other '%'"
    return ""


def _attach(descriptor: int, name: str, flags: int) -> bytes:
    """Make the interface, or attach to a persistent one; returns the name that it got, with zero bytes after it."""
    try:
        request = _INTERFACE_REQUEST.pack(os.fsencode(name), _IFF_TUN | _IFF_NO_PI | flags)
        return bytes(fcntl.ioctl(descriptor, _TUNSETIFF, request)[:16])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # TUNSETIFF has one error for a name that is in use and for a name that no interface may have.
        if _exists(name):
            raise OptionError("an interface with this name already exists, and it is not a TUN interface") from error
        raise OptionError("the kernel refuses this interface name (Invalid argument): choose another one") from error


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _forbidden(verb: str) -> str:
    return (
        f"the interface was moved to another network namespace, and this process is not permitted to {verb} it: that "
        "needs CAP_SYS_ADMIN in both, which --drop-privileges gives up: move the interface back, or run as root"
    )


def _call_in(namespace: int, make: Callable[[], T]) -> T:
    """Call a function in another network namespace, in a new thread, because returning to ours might fail.

    namespace: a descriptor. Raises ForbiddenNamespace, Shortage, OSError.
    """
    # Imported late, because only an interface that was moved needs it.
    try:
        import ctypes  # noqa: PLC0415
    except ImportError as error:
        # Its shared objects could not be opened; the loader has no errno.
        raise lack(f"{_LOOKING}, because ctypes cannot be loaded", errno.EMFILE) from error

    libc = ctypes.CDLL(None, use_errno=True)
    results: list[T] = []
    failures: list[OSError | MemoryError | RefwgError] = []

    def enter_and_call() -> None:
        """Enter the namespace, which changes this thread only, and keep the result or the error."""
        if libc.setns(namespace, _CLONE_NEWNET):
            number = ctypes.get_errno()
            is_forbidden = number == errno.EPERM
            failures.append(
                ForbiddenNamespace(_forbidden("enter")) if is_forbidden else OSError(number, os.strerror(number))
            )
            return
        try:
            results.append(make())
        except (OSError, MemoryError, RefwgError) as error:
            failures.append(error)

    thread = threading.Thread(target=enter_and_call)
    try:
        thread.start()
    except RuntimeError as error:
        # CPython has no better error for pthread_create(3), which lacks a process number or memory for the stack.
        raise lack(f"{_LOOKING}, because no thread can be started", errno.EAGAIN) from error
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
