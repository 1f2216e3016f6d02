"""Query routes, addresses and links, and receive their changes, by rtnetlink(7).

The driver calls the network stack in place (socket.c, device.c). A program must query it by netlink. Only a few
messages are needed, so they are packed by hand.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from refwg.ip import IPV4_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER: Final = Struct("=LHHLL")
_LINK: Final = Struct("=BxHlLL")
_ADDRESS: Final = Struct("=BBBBL")
_ROUTE: Final = Struct("=8BL")
_ATTRIBUTE: Final = Struct("=HH")
# The two highest bits are flags: nested, and network byte order.
_TYPE_MASK: Final = 0x3FFF
_U32: Final = Struct("=L")
_PORT: Final = Struct(">H")
_ERRNO: Final = Struct("=l")

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_RTM_NEWLINK: Final = 16
_RTM_GETLINK: Final = 18
_RTM_NEWADDR: Final = 20
_RTM_GETADDR: Final = 22
_RTM_NEWROUTE: Final = 24
_RTM_DELROUTE: Final = 25
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
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_DUMP: Final = 0x300
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_GSO_MAX_SIZE: Final = 41
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_FLAGS: Final = 8
_IFA_F_OPTIMISTIC: Final = 0x04
_IFA_F_TENTATIVE: Final = 0x40
_RTA_DST: Final = 1
_RTA_SRC: Final = 2
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PREFSRC: Final = 7
_RTA_METRICS: Final = 8
_RTA_MARK: Final = 16
_RTA_VIA: Final = 18
_RTA_UID: Final = 25
_RTA_IP_PROTO: Final = 27
_RTA_SPORT: Final = 28
_RTA_DPORT: Final = 29
_RTAX_MTU: Final = 2
_IFF_UP: Final = 1
_GROUP_LINK: Final = 0x1
# RTMGRP_* of addresses, routes and rules, IPv4 then IPv6: together they decide the route and the source address.
_GROUPS_ROUTES: Final = 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
_ROUTE_EVENTS: Final = frozenset({_RTM_NEWROUTE, _RTM_DELROUTE})
_ANSWER_WITHIN: Final = 2.0
_BUFFER: Final = 1 << 16
_DUMP_ATTEMPTS: Final = 3
# Most events that are read for one datagram, so that a storm of them delays none. The rest is read for the next one.
_EVENTS_AT_ONCE: Final = 1024
# The interface `lo` has this index in each network namespace.
LOOPBACK: Final = 1


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface; mtu: in bytes; is_up: True if it is set up (IFF_UP)."""

    index: int
    name: str
    mtu: int
    is_up: bool


class Route(NamedTuple):
    """The result of a route lookup.

    interface: index of the outgoing interface. mtu: the MTU of the route in bytes, 0: it has none of its own. source:
    the address that the stack would choose as source. gateway: its address, as the kernel encodes it; empty: none.
    error: the errno(3) if there is no route, else 0.
    """

    interface: int = 0
    mtu: int = 0
    source: bytes = b""
    gateway: bytes = b""
    error: int = 0


class Flow(NamedTuple):
    """What a route lookup may depend on, besides the destination (`struct flowi`); 0 and empty: not set.

    interface: an interface index (`flowi_oif`). tos: the TOS byte or traffic class. protocol: as in the IP header. uid:
    the user id of the socket; None: that of this process.
    """

    source: bytes = b""
    interface: int = 0
    fwmark: int = 0
    tos: int = 0
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    uid: int | None = None

    def attributes(self) -> bytes:
        """Encode the flow for RTM_GETROUTE, except for `tos`, which is part of the message's header."""
        numbers = ((_RTA_OIF, self.interface), (_RTA_MARK, self.fwmark))
        ports = ((_RTA_SPORT, self.source_port), (_RTA_DPORT, self.destination_port))
        encoded = attribute(_RTA_SRC, self.source) if self.source else b""
        encoded += b"".join(attribute(kind, _U32.pack(number)) for kind, number in numbers if number)
        encoded += attribute(_RTA_IP_PROTO, bytes([self.protocol])) if self.protocol else b""
        encoded += b"".join(attribute(kind, _PORT.pack(port)) for kind, port in ports if port)
        return encoded + (b"" if self.uid is None else attribute(_RTA_UID, _U32.pack(self.uid)))


ANY_FLOW: Final = Flow()


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

    def dump(self, kind: int, body: bytes) -> list[tuple[int, bytes]] | None:
        """Request a list; returns type and body of each entry, or None if the kernel refuses or does not answer."""
        for _ in range(_DUMP_ATTEMPTS):
            self._sequence += 1
            flags = _NLM_F_REQUEST | _NLM_F_DUMP
            try:
                self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
                entries, is_consistent = self._read_dump()
            except OSError:
                return None
            # NLM_F_DUMP_INTR: the list has changed while the kernel wrote it, so ask again (netlink(7)).
            if is_consistent:
                break
        return entries

    def _read_dump(self) -> tuple[list[tuple[int, bytes]], bool]:
        """Read all parts of a list; returns the entries, and whether it stayed the same meanwhile."""
        entries: list[tuple[int, bytes]] = []
        is_consistent = True
        while True:
            for kind, flags, sequence, body in _headers_and_bodies(self._socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue
                is_consistent &= not flags & _NLM_F_DUMP_INTR
                if kind == _NLMSG_ERROR:
                    raise OSError(_refusal(body), "dump refused")
                if kind == _NLMSG_DONE:
                    return entries, is_consistent
                entries.append((kind, body))


class RtnetlinkSocket(NetlinkSocket):
    """Queries links, routes and namespace ids, and sets a link down (rtnetlink(7))."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    def link(self, name: str) -> Link | None:
        """Return the interface with this name, None if there is none; raises OSError if the kernel cannot answer.

        A lack of memory must not look like a missing interface.
        """
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, os.fsencode(name) + b"\0")
        failure, answer = self.request(_RTM_GETLINK, body)
        if failure not in {0, errno.ENODEV}:
            raise OSError(failure, os.strerror(failure))
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

    def set_gso_max_size(self, link: Link, size: int) -> None:
        """Set the size of the largest superframe of an interface, in bytes of a packet; a refusal is ignored."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, link.index, 0, 0) + attribute(_IFLA_GSO_MAX_SIZE, _U32.pack(size))
        self.request(_RTM_NEWLINK, body, _NLM_F_ACK)

    def wait_for_changes(self) -> None:
        """Return when changes that the kernel has begun are complete, because RTM_GETLINK waits for their lock (RTNL).

        The kernel reports a link or an address before it removes the routes that depend on it (`__dev_notify_flags`,
        `__inet_del_ifa`).
        """
        self.request(_RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, LOOPBACK, 0, 0))

    def local_addresses(self) -> frozenset[bytes] | None:
        """Return all addresses from which the driver sends (`inet_confirm_addr`, `ipv6_chk_addr`); None: not known.

        These are addresses of interfaces. Broadcast, multicast and anycast addresses are not among them, nor are those
        that are local by a route only, such as 127.0.0.2.
        """
        entries = self.dump(_RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        if entries is None:
            return None
        addresses = [_read_address(body) for kind, body in entries if kind == _RTM_NEWADDR]
        own = {address.local for address in addresses if address.is_ipv6 and address.is_usable}
        by_interface: dict[int, list[_Address]] = {}
        for address in addresses:
            if not address.is_ipv6:
                by_interface.setdefault(address.interface, []).append(address)
        for neighbours in by_interface.values():
            own |= {address.local for address in neighbours if any(other.covers(address) for other in neighbours)}
        return frozenset(own)

    def route(self, destination: bytes, flow: Flow = ANY_FLOW) -> Route:
        """Look up the route of a flow to an address of 4 or 16 bytes."""
        is_ipv4 = len(destination) == IPV4_BYTES
        family = socket.AF_INET if is_ipv4 else socket.AF_INET6
        body = _ROUTE.pack(family, 8 * len(destination), 8 * len(flow.source), flow.tos, 0, 0, 0, 0, 0)
        failure, answer = self.request(_RTM_GETROUTE, body + attribute(_RTA_DST, destination) + flow.attributes())
        return Route(error=failure) if failure else _read_route(answer)


class _Address(NamedTuple):
    """An address of an interface; prefix, length: of the network it belongs to, or of the other end of the link."""

    interface: int
    local: bytes
    prefix: bytes
    length: int
    is_usable: bool

    @property
    def is_ipv6(self) -> bool:
        return len(self.local) != IPV4_BYTES

    def covers(self, other: _Address) -> bool:
        """Return whether the other address belongs to this one's network (`inet_ifa_match`).

        `confirm_addr_indev` demands it of an address of the same interface, so it confirms no address with a peer /32.
        """
        difference = int.from_bytes(self.prefix) ^ int.from_bytes(other.local)
        return not difference >> (8 * len(self.prefix) - self.length)


class Monitor:
    """Readable when links or routes have changed in the network namespace in which it was opened.

    everywhere: also in all namespaces that have an id here (`RtnetlinkSocket.namespace_id`). The monitor does not keep
    these namespaces alive.
    """

    def __init__(self, *, links: bool = False, routes: bool = False, everywhere: bool = False) -> None:
        self._socket = open_socket((_GROUP_LINK if links else 0) | (_GROUPS_ROUTES if routes else 0))
        self._socket.setblocking(False)
        # Half a microsecond for each datagram; a read that fails would take four times as long.
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
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

    def has_events(self) -> bool:
        """Return whether events are waiting, or were lost."""
        return bool(self._poll.poll(0))

    def changes(self) -> tuple[bool, bool]:
        """Read the events; return whether anything has changed, and whether that is more than routes in the tables."""
        is_changed = is_more = False
        for _ in range(_EVENTS_AT_ONCE):
            try:
                data = self._socket.recv(_BUFFER)
            except BlockingIOError:
                return is_changed, is_more
            except OSError as error:
                # ENOBUFS: messages were lost, so anything may have changed (netlink(7)).
                if error.errno != errno.ENOBUFS:
                    raise
                is_changed = is_more = True
                continue
            is_changed = True
            is_more |= any(kind not in _ROUTE_EVENTS for kind, _, _ in messages(data))
        return True, True


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
    for kind, _, sequence, body in _headers_and_bodies(data):
        yield kind, sequence, body


def _headers_and_bodies(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield type, flags, sequence number and body of each message, as `messages` does."""
    while len(data) >= _HEADER.size:
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, data[_HEADER.size : length]
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


def _read_address(body: bytes) -> _Address:
    """Return the address in RTM_NEWADDR; one that duplicate address detection has not yet confirmed is not usable."""
    family, length, flags, _, interface = _ADDRESS.unpack_from(body)
    details = attributes(body[_ADDRESS.size :])
    prefix = details.get(_IFA_ADDRESS) or details.get(_IFA_LOCAL, b"")
    if _IFA_FLAGS in details:
        flags = _U32.unpack(details[_IFA_FLAGS])[0]
    # An optimistic address (RFC 4429) counts as confirmed (ipv6_chk_addr_and_flags).
    is_usable = family == socket.AF_INET or not flags & _IFA_F_TENTATIVE or bool(flags & _IFA_F_OPTIMISTIC)
    return _Address(interface, details.get(_IFA_LOCAL, prefix), prefix, length, is_usable)


def _read_route(body: bytes) -> Route:
    details = attributes(body[_ROUTE.size :])
    metrics = attributes(details.get(_RTA_METRICS, b""))
    interface = _U32.unpack(details.get(_RTA_OIF, bytes(4)))[0]
    mtu = _U32.unpack(metrics.get(_RTAX_MTU, bytes(4)))[0]
    gateway = details.get(_RTA_GATEWAY) or details.get(_RTA_VIA, b"")
    return Route(interface, mtu, details.get(_RTA_PREFSRC, b""), gateway)
