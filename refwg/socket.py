"""Open UDP sockets for both families on one port; keep local address, ECN and fwmark.

Mirrors socket.c of the driver. A datagram leaves from the address at which its peer's last one arrived, as long as that
is one of ours and, for IPv4, the route still uses the interface it came by. As in the driver both are looked at when
something is to be sent, and once only until a route or an address changes.
"""

from __future__ import annotations

import errno
import socket
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from refwg.address import format_address
from refwg.boundary import Endpoint, LocalAddress
from refwg.errors import ConfigError
from refwg.ip import ECN_MASK, IPV4_BYTES

if TYPE_CHECKING:
    from refwg.boundary import Transmit
    from refwg.peer import Peer
    from refwg.rtnetlink import RtnetlinkSocket

_IP_PKTINFO: Final = 8
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_PMTUDISC_DONT: Final = 0
_SO_MARK: Final = 36
_SO_RCVBUFFORCE: Final = 33
_PKTINFO4: Final = Struct("=i4s4s")
_PKTINFO6: Final = Struct("=16si")
_INT: Final = Struct("=i")
# A mark, which may be greater than the integers that setsockopt takes by themselves.
_MARK: Final = Struct("=I")
_LARGEST_DATAGRAM: Final = 65535
_ANCILLARY_ROOM: Final = socket.CMSG_SPACE(_PKTINFO6.size) + socket.CMSG_SPACE(_INT.size)
_PORT_ATTEMPTS: Final = 100
# Room for what arrives while a large configuration is being read, or others have the CPU.
_RECEIVE_BUFFER: Final = 1 << 22
# Senders, and routes to them, of which no more than this is kept in mind: anybody may send.
_REMEMBERED: Final = 4096
_FAMILY_MISSING: Final = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL})
# What the stack says if the source address is not ours; it says some of it of destinations, too.
_SOURCE_AT_FAULT: Final = frozenset(
    {errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENETUNREACH, errno.EHOSTUNREACH}
)

Received = tuple[bytes, Endpoint, int]
Ancillary = tuple[int, int, bytes]

_TOS: Final = (socket.IPPROTO_IP, socket.IP_TOS)
_TRAFFIC_CLASS: Final = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)


class _Way(NamedTuple):
    """How datagrams to an endpoint are sent: by which socket, to which address, from where, and how they are marked."""

    socket: socket.socket
    to: tuple[str, int] | tuple[str, int, int, int]
    packet_info: list[Ancillary]
    traffic_class: tuple[int, int]


class UdpSockets:
    """Both sockets of a device. Either family may be missing on this machine, but not both."""

    def __init__(self, rtnetlink: RtnetlinkSocket) -> None:
        """Take a socket for route queries in the namespace where the UDP sockets will be."""
        self._rtnetlink = rtnetlink
        # Forgotten whenever something changes that may lead elsewhere.
        self._ways: dict[Endpoint, _Way] = {}
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._fwmark = 0
        # By sender and ancillary data: the endpoint and the ECN that they say.
        self._origins: dict[tuple[object, ...], tuple[Endpoint, int]] = {}
        # Replaced whenever sockets are opened or closed, so that a loop can see that it must look again.
        self.generation = 0

    @property
    def sockets(self) -> list[socket.socket]:
        return list(self._sockets.values())

    def open(self, port: int) -> int:
        """Bind both families to `port` (0: any free one); what was open is closed only if that succeeds."""
        opened = self._open_both(port)
        self.close()
        self._sockets = opened
        return int(next(iter(opened.values())).getsockname()[1])

    def close(self) -> None:
        for one in self._sockets.values():
            one.close()
        self._sockets = {}
        self._origins.clear()
        self._ways.clear()
        self.generation += 1

    def set_fwmark(self, fwmark: int) -> None:
        try:
            for one in self._sockets.values():
                one.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK.pack(fwmark))
        except OSError as error:
            raise ConfigError(f"fwmark {fwmark}: {error.strerror}", error.errno or errno.EIO) from error
        self._fwmark = fwmark
        self._ways.clear()

    def routes_changed(self) -> None:
        """Routes, rules or addresses have changed; what follows from that is found out when something is sent."""
        self._ways.clear()

    def interface_index(self, name: str) -> int:
        try:
            return socket.if_nametoindex(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"interface {name!r}: there is none of that name", errno.EINVAL) from error

    def receive(self, one: socket.socket) -> Received | None:
        """Next datagram of a socket, who sent it to which of our addresses, and its ECN; None if none is there."""
        try:
            datagram, ancillary, _, sender = one.recvmsg(_LARGEST_DATAGRAM, _ANCILLARY_ROOM)
        except OSError:
            # None waits, or an ICMP error about something sent before, which proves nothing and changes nothing. What
            # waits behind it keeps the socket readable.
            return None
        key = (sender, *(data for _, _, data in ancillary))
        origin = self._origins.get(key) or self._remember(key, one.family, sender, ancillary)
        return datagram, *origin

    def send(self, transmit: Transmit[Peer]) -> str:
        """Send a datagram; returns what went wrong, or nothing.

        If the local address to send from is gone, it is forgotten, and routing decides.
        """
        endpoint = transmit.endpoint
        way = self._ways.get(endpoint)
        if way is None:
            if self._is_detoured(endpoint):
                endpoint = _forget_source(transmit)
            way = self._find_way(endpoint)
        why = _send(transmit, way)
        source = endpoint.source
        if why in _SOURCE_AT_FAULT and source is not None and (why == errno.EINVAL or not _is_ours(source)):
            why = _send(transmit, self._find_way(_forget_source(transmit)))
        return errno.errorcode.get(why, str(why)) if why else ""

    def _find_way(self, endpoint: Endpoint) -> _Way | None:
        """Prepare everything that datagrams to this endpoint have in common; None if we lack the family."""
        is_ipv4 = len(endpoint.address) == IPV4_BYTES
        one = self._sockets.get(socket.AF_INET if is_ipv4 else socket.AF_INET6)
        if one is None:
            return None
        host = format_address(endpoint.address)
        to = (host, endpoint.port) if is_ipv4 else (host, endpoint.port, 0, endpoint.scope_id)
        if len(self._ways) >= _REMEMBERED:
            self._ways.clear()
        way = self._ways[endpoint] = _Way(one, to, packet_info(endpoint.source), _TOS if is_ipv4 else _TRAFFIC_CLASS)
        return way

    def _is_detoured(self, endpoint: Endpoint) -> bool:
        """Whether the route from a remembered address leaves by another interface than the one it was learned at.

        Only IPv4 remembers the interface. No route at all is no reason to forget anything: there may be one again.
        """
        source = endpoint.source
        if source is None or not source.interface:
            return False
        route = self._rtnetlink.route(endpoint.address, source=source.address, fwmark=self._fwmark)
        return route.error == errno.EINVAL or (not route.error and route.interface != source.interface)

    def _open_both(self, port: int) -> dict[socket.AddressFamily, socket.socket]:
        for attempt in range(_PORT_ATTEMPTS):
            opened: dict[socket.AddressFamily, socket.socket] = {}
            try:
                chosen = port
                for family in (socket.AF_INET, socket.AF_INET6):
                    one = self._open(family, chosen)
                    if one is not None:
                        opened[family] = one
                        chosen = one.getsockname()[1]
            except OSError as error:
                for one in opened.values():
                    one.close()
                # A free port of one family may be taken in the other.
                if port == 0 and error.errno == errno.EADDRINUSE and attempt < _PORT_ATTEMPTS - 1:
                    continue
                raise ConfigError(f"port {port}: {error.strerror}", error.errno or errno.EIO) from error
            if opened:
                return opened
            break
        raise ConfigError("neither IPv4 nor IPv6 is to be had here", errno.EAFNOSUPPORT)

    def _open(self, family: socket.AddressFamily, port: int) -> socket.socket | None:
        """One socket, bound; None if the machine lacks the family."""
        try:
            one = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno in _FAMILY_MISSING:
                return None
            raise
        try:
            self._prepare(one)
            one.bind(("", port))
        except OSError as error:
            one.close()
            if family == socket.AF_INET6 and error.errno in _FAMILY_MISSING:
                return None
            raise
        return one

    def _prepare(self, one: socket.socket) -> None:
        if one.family == socket.AF_INET:
            one.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            one.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            # Routers may cut our datagrams: what is inside has its own idea of the path's MTU.
            one.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT)
        else:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
            one.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT)
        try:
            one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except PermissionError:
            # Root of a user namespace gets no more than the system allows to everybody.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        if self._fwmark:
            one.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK.pack(self._fwmark))

    def _remember(
        self, key: tuple[object, ...], family: int, sender: tuple[object, ...], ancillary: list[Ancillary]
    ) -> tuple[Endpoint, int]:
        """Make the endpoint of a sender, and read its ECN; the next such datagram from there is spared the work."""
        if len(self._origins) >= _REMEMBERED:
            self._origins.clear()
        host, port, *rest = sender
        scope_id = int(str(rest[1])) if rest else 0
        address = socket.inet_pton(family, str(host).partition("%")[0])
        origin = Endpoint(address, int(str(port)), scope_id, _local_address(ancillary)), _ecn(ancillary)
        self._origins[key] = origin
        return origin


def _send(transmit: Transmit[Peer], way: _Way | None) -> int:
    """Hand a datagram to the stack; returns the errno, 0 if it was taken."""
    if way is None:
        return errno.EAFNOSUPPORT
    ancillary = way.packet_info
    if transmit.traffic_class:
        ancillary = [*ancillary, (*way.traffic_class, _INT.pack(transmit.traffic_class))]
    try:
        way.socket.sendmsg([transmit.datagram], ancillary, 0, way.to)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _forget_source(transmit: Transmit[Peer]) -> Endpoint:
    """Let routing choose the source, for this datagram and all that follow."""
    if transmit.peer is not None:
        transmit.peer.clear_endpoint_source()
    return transmit.endpoint.without_source()


def _is_ours(source: LocalAddress) -> bool:
    family = socket.AF_INET if len(source.address) == IPV4_BYTES else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.bind((format_address(source.address), 0))
    except OSError as error:
        # Anything else, such as too many open files, says nothing about the address.
        return error.errno != errno.EADDRNOTAVAIL
    return True


def _local_address(ancillary: list[Ancillary]) -> LocalAddress | None:
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            interface, _, address = _PKTINFO4.unpack(data)
            return LocalAddress(address, interface)
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return LocalAddress(_PKTINFO6.unpack(data)[0])
    return None


def _ecn(ancillary: list[Ancillary]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) in {_TOS, _TRAFFIC_CLASS}:
            return data[0] & ECN_MASK
    return 0


def packet_info(source: LocalAddress | None) -> list[Ancillary]:
    """The control message that lets a datagram leave from an address (ip(7), ipv6(7))."""
    if source is None:
        return []
    if len(source.address) == IPV4_BYTES:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, source.address, bytes(4)))]
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO6.pack(source.address, 0))]
