"""Query routes and links, and receive their changes, by rtnetlink(7).

The driver calls the network stack in place (socket.c, device.c). A program must query it by netlink. Only a few
messages are needed, so they are packed by hand.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Final

from refwg.ip import IPV4_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER: Final = Struct("=LHHLL")
_LINK: Final = Struct("=BxHlLL")
_ROUTE: Final = Struct("=8BL")
_ATTRIBUTE: Final = Struct("=HH")
# The two highest bits are flags: nested, and network byte order.
_TYPE_MASK: Final = 0x3FFF
_U32: Final = Struct("=L")
_ERRNO: Final = Struct("=l")

_NLMSG_ERROR: Final = 2
_RTM_NEWLINK: Final = 16
_RTM_GETLINK: Final = 18
_RTM_GETROUTE: Final = 26
_RTM_NEWNSID: Final = 88
_RTM_GETNSID: Final = 90
_NETNSA_NSID: Final = 1
_NETNSA_FD: Final = 3
_NSID_ANY: Final = -1
_SOL_NETLINK: Final = 270
_NETLINK_LISTEN_ALL_NSID: Final = 8
_NLM_F_REQUEST: Final = 1
_NLM_F_ACK: Final = 4
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_RTA_DST: Final = 1
_RTA_SRC: Final = 2
_RTA_OIF: Final = 4
_RTA_PREFSRC: Final = 7
_RTA_METRICS: Final = 8
_RTA_MARK: Final = 16
_RTAX_MTU: Final = 2
_IFF_UP: Final = 1
_GROUP_LINK: Final = 0x1
# RTMGRP_* of addresses, routes and rules, IPv4 then IPv6: together they decide the route and the source address.
_GROUPS_ROUTES: Final = 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
_ANSWER_WITHIN: Final = 2.0
_BUFFER: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface; mtu: in bytes; is_up: True if it is set up (IFF_UP)."""

    index: int
    name: str
    mtu: int
    is_up: bool


@dataclass(frozen=True, slots=True)
class Route:
    """The result of a route lookup.

    interface: index of the outgoing interface. mtu: the MTU of the route in bytes, 0: it has none of its own. source:
    the address that the stack would choose as source. error: the errno(3) if there is no route, else 0.
    """

    interface: int = 0
    mtu: int = 0
    source: bytes = b""
    error: int = 0


class NetlinkSocket:
    """Sends one request at a time, in the network namespace in which it was opened."""

    def __init__(self, protocol: int) -> None:
        self._socket = open_socket(0, protocol)
        self._socket.settimeout(_ANSWER_WITHIN)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket; its namespace can be deleted only then."""
        self._socket.close()

    def request(self, kind: int, body: bytes, flags: int = 0) -> tuple[int, bytes]:
        """Send one request; returns 0 and the body of the answer, or an errno and nothing.

        The errno is that of the answer, or ETIMEDOUT after 2 s without one.
        """
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, self._sequence, 0)
        try:
            self._socket.send(header + body)
            while True:
                for answer_kind, sequence, answer in messages(self._socket.recv(_BUFFER)):
                    if sequence == self._sequence:
                        return (_refusal(answer), b"") if answer_kind == _NLMSG_ERROR else (0, answer)
        except OSError as error:
            return error.errno or errno.ETIMEDOUT, b""


class RtnetlinkSocket(NetlinkSocket):
    """Queries links, routes and namespace ids, and sets a link down (rtnetlink(7))."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    def link(self, name: str) -> Link | None:
        """Return the interface with this name, None if there is none."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, os.fsencode(name) + b"\0")
        failure, answer = self.request(_RTM_GETLINK, body)
        return None if failure else _read_link(answer)

    def namespace_id(self, namespace: int) -> int | None:
        """Return our namespace's id (nsid) for another namespace, and assign one if needed; namespace: a descriptor."""
        body = bytes(4) + attribute(_NETNSA_FD, _U32.pack(namespace))
        self.request(_RTM_NEWNSID, body + attribute(_NETNSA_NSID, _ERRNO.pack(_NSID_ANY)), _NLM_F_ACK)
        failure, answer = self.request(_RTM_GETNSID, body)
        nsid = attributes(answer[4:]).get(_NETNSA_NSID)
        return None if failure or nsid is None else int(_ERRNO.unpack(nsid)[0])

    def set_down(self, link: Link) -> None:
        """Set an interface down (`ip link set NAME down`); a refusal is ignored."""
        self.request(_RTM_NEWLINK, _LINK.pack(socket.AF_UNSPEC, 0, link.index, 0, _IFF_UP), _NLM_F_ACK)

    def route(self, destination: bytes, *, source: bytes = b"", interface: int = 0, fwmark: int = 0) -> Route:
        """Look up the route to an address of 4 or 16 bytes, for packets with the source, interface and mark given."""
        is_ipv4 = len(destination) == IPV4_BYTES
        family = socket.AF_INET if is_ipv4 else socket.AF_INET6
        body = _ROUTE.pack(family, 8 * len(destination), 8 * len(source), 0, 0, 0, 0, 0, 0)
        body += attribute(_RTA_DST, destination)
        body += attribute(_RTA_SRC, source) if source else b""
        body += attribute(_RTA_OIF, _U32.pack(interface)) if interface else b""
        body += attribute(_RTA_MARK, _U32.pack(fwmark)) if fwmark else b""
        failure, answer = self.request(_RTM_GETROUTE, body)
        return Route(error=failure) if failure else _read_route(answer)


class Monitor:
    """Readable when links or routes have changed in the network namespace in which it was opened.

    everywhere: also in all namespaces that have an id here (`RtnetlinkSocket.namespace_id`). The monitor does not keep
    these namespaces alive.
    """

    def __init__(self, *, links: bool = False, routes: bool = False, everywhere: bool = False) -> None:
        self._socket = open_socket((_GROUP_LINK if links else 0) | (_GROUPS_ROUTES if routes else 0))
        self._socket.setblocking(False)
        if everywhere:
            # A process without the right to listen cannot move interfaces to other namespaces either.
            with suppress(PermissionError):
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_LISTEN_ALL_NSID, 1)

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; events that were not read are lost."""
        self._socket.close()

    def drain(self) -> list[tuple[int | None, Link]]:
        """Read all events; return the state of links in them, each with the id of its namespace (None: ours).

        A link may have gone down and up since the last call; then it is listed twice.
        """
        links: list[tuple[int | None, Link]] = []
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_BUFFER, socket.CMSG_SPACE(_ERRNO.size))
            except BlockingIOError:
                return links
            except OSError as error:
                # ENOBUFS: messages were lost. Callers query the current state after drain(), so nothing is missed.
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            namespace = next((int(_ERRNO.unpack(number)[0]) for _, _, number in ancillary), None)
            states = [_read_link(body) for kind, _, body in messages(data) if kind == _RTM_NEWLINK]
            links += [(namespace, link) for link in states if link is not None]


def open_socket(groups: int, protocol: int = socket.NETLINK_ROUTE) -> socket.socket:
    """Open a netlink socket; groups: bits of the multicast groups to join, 0: none (netlink(7))."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    sock.bind((0, groups))
    return sock


def _refusal(body: bytes) -> int:
    """Return the errno in the body of NLMSG_ERROR; 0: the message is an acknowledgement."""
    return -int(_ERRNO.unpack_from(body)[0])


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute, padded to 4 bytes (NLA_ALIGN); payload: its value, or its nested attributes."""
    length = _ATTRIBUTE.size + len(payload)
    return (_ATTRIBUTE.pack(length, kind) + payload).ljust(_aligned(length), b"\0")


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, sequence number and body of each message in a datagram; stops at one with a wrong length."""
    while len(data) >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, sequence, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the payload of each attribute by its type without flags; stops at one with a wrong length."""
    payloads: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        payloads[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return payloads


def _read_link(body: bytes) -> Link | None:
    """Return the link in RTM_NEWLINK; None without name or MTU, as in wireless events (wext-core.c)."""
    _, _, index, flags, _ = _LINK.unpack_from(body)
    details = attributes(body[_LINK.size :])
    name, mtu = details.get(_IFLA_IFNAME), details.get(_IFLA_MTU)
    if name is None or mtu is None:
        return None
    return Link(index, os.fsdecode(name.rstrip(b"\0")), _U32.unpack(mtu)[0], bool(flags & _IFF_UP))


def _read_route(body: bytes) -> Route:
    details = attributes(body[_ROUTE.size :])
    metrics = attributes(details.get(_RTA_METRICS, b""))
    interface = _U32.unpack(details.get(_RTA_OIF, bytes(4)))[0]
    mtu = _U32.unpack(metrics.get(_RTAX_MTU, bytes(4)))[0]
    return Route(interface, mtu, details.get(_RTA_PREFSRC, b""))
