"""Open UDP sockets for both families on one port; keep local address, ECN and fwmark.

Mirrors socket.c of the driver. A datagram to a peer is sent from the address that received the peer's last one. That
address must still be local, and for IPv4 the route must still use the interface of that datagram. The kernel is asked
about both when a datagram is sent, and again only after a route, a rule, an address or a link has changed.

The kernel looks up a program's routes with two keys of its own: the user id of the socket, where the driver has 0, and
the DSCP of the datagram, where the driver has none. If a rule sends that DSCP another way, the datagram goes without.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from refwg.address import format_address
from refwg.boundary import Endpoint, LocalAddress
from refwg.errors import ConfigError
from refwg.ip import ECN_MASK, IPV4_BYTES, IPV6_BYTES
from refwg.rtnetlink import Flow

if TYPE_CHECKING:
    from refwg.boundary import Transmit
    from refwg.peer import Peer
    from refwg.rtnetlink import Monitor, Route, RtnetlinkSocket

_IP_PKTINFO: Final = 8
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_PMTUDISC_DONT: Final = 0
_SO_MARK: Final = 36
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_SOL_UDP: Final = 17
_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_PKTINFO4: Final = Struct("=i4s4s")
_PKTINFO6: Final = Struct("=16si")
_INT: Final = Struct("=i")
_U16: Final = Struct("=H")
# SO_MARK is unsigned: marks above 2^31 - 1 do not fit the int of setsockopt().
_MARK: Final = Struct("=I")
_LARGEST_DATAGRAM: Final = 65535
_ANCILLARY_ROOM: Final = socket.CMSG_SPACE(_PKTINFO6.size) + 2 * socket.CMSG_SPACE(_INT.size)
_PORT_ATTEMPTS: Final = 100
# 4 MiB: room for datagrams that arrive while a large configuration is read, or while the process waits for the CPU, and
# for whole batches that wait to be sent.
_BUFFER: Final = 1 << 22
# Limit on cached senders and routes, because anyone may send datagrams.
_REMEMBERED: Final = 4096
_FAMILY_MISSING: Final = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL})
_UNSPECIFIED: Final = bytes(IPV6_BYTES)
# The first 10 bits of link-local addresses, fe80::/10 (RFC 4291, 2.5.6).
_LINK_LOCAL: Final = 0xFE80 >> 6

Received = tuple[bytes, Endpoint, int]
Ancillary = tuple[int, int, bytes]

_TOS: Final = (socket.IPPROTO_IP, socket.IP_TOS)
_TRAFFIC_CLASS: Final = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)


class _SendPlan(NamedTuple):
    """The arguments of sendmsg(2) that all datagrams to an endpoint share.

    packet_info: source address and interface. traffic_class: level and type of the control message for TOS or traffic
    class. bits: those of it that may be set.
    """

    socket: socket.socket
    to: tuple[str, int] | tuple[str, int, int, int]
    packet_info: list[Ancillary]
    traffic_class: tuple[int, int]
    bits: int


class ReceivedBatch(NamedTuple):
    """Datagrams of one sender in a buffer: their length in all, the length of each but the last, and their origin."""

    length: int
    segment: int
    endpoint: Endpoint
    ecn: int


class UdpSockets:
    """Both UDP sockets of a device: the core's `Sockets`. One of the two families may be missing, but not both."""

    def __init__(self, rtnetlink: RtnetlinkSocket, monitor: Monitor) -> None:
        """Open nothing yet; both arguments are of the namespace where the UDP sockets will be.

        rtnetlink: for look-ups. monitor: of links and routes; this object reads all its events.
        """
        self._rtnetlink = rtnetlink
        self._monitor = monitor
        # By endpoint and DSCP. Cleared when routes, addresses or the mark change, because another route may then apply.
        self._plans: dict[tuple[Endpoint, int], _SendPlan] = {}
        # None: not read since they may have changed.
        self._local_addresses: frozenset[bytes] | None = None
        self._port = 0
        self._uid = 0
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._fwmark = 0
        self._is_joining = False
        # Endpoint and ECN bits by sender and control messages.
        self._origins: dict[tuple[object, ...], tuple[Endpoint, int]] = {}
        # Increased whenever sockets are opened or closed, so that the loop registers them again.
        self.generation = 0

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets that are open now, IPv4 first; valid until `generation` changes."""
        return list(self._sockets.values())

    def open(self, port: int) -> int:
        """Bind both families to `port` (0: any free one) and return the port; raises ConfigError.

        Sockets that were open before are closed only if this succeeds.
        """
        opened = self._open_both(port)
        self.close()
        self._sockets = opened
        sock = next(iter(opened.values()))
        self._port = int(sock.getsockname()[1])
        # The owner of a socket is the user id of its flows (sock_i_uid), even if the process changes its own later.
        self._uid = os.fstat(sock.fileno()).st_uid
        return self._port

    def close(self) -> None:
        """Close both sockets and forget all senders; the mark stays for sockets opened later."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets = {}
        self._origins.clear()
        self._plans.clear()
        self.generation += 1

    def set_fwmark(self, fwmark: int) -> None:
        """Set SO_MARK of both sockets, now and when they are opened again; raises ConfigError if not permitted."""
        try:
            for sock in self._sockets.values():
                sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK.pack(fwmark))
        except OSError as error:
            raise ConfigError(f"fwmark {fwmark}: {error.strerror}", error.errno or errno.EIO) from error
        self._fwmark = fwmark
        self._plans.clear()

    def follow_changes(self) -> None:
        """Read the monitor, and forget what may have changed."""
        is_changed, is_more_than_routes = self._monitor.changes()
        if is_changed:
            self._plans.clear()
        if is_more_than_routes:
            self._local_addresses = None
            self._rtnetlink.wait_for_changes()

    def interface_index(self, name: str) -> int:
        """Return the index of an interface, if_nametoindex(3); raises ConfigError (EINVAL) if there is none."""
        try:
            return socket.if_nametoindex(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"interface {name!r} does not exist", errno.EINVAL) from error

    def receive(self, sock: socket.socket) -> Received | None:
        """Return the next datagram, its sender with our local address, and its ECN bits; None: no datagram."""
        try:
            datagram, ancillary, _, sender = sock.recvmsg(_LARGEST_DATAGRAM, _ANCILLARY_ROOM)
        except OSError:
            # The queue is empty, or this is an ICMP error about a datagram sent before. Such errors can be forged, so
            # they change nothing. Datagrams behind the error keep the socket readable.
            return None
        key = (sender, *ancillary)
        origin = self._origins.get(key) or self._remember(key, sock.family, sender, ancillary)
        return datagram, *origin

    def join_received(self) -> bool:
        """Let the kernel join received datagrams (UDP_GRO), on these sockets and later ones; False if it cannot."""
        self._is_joining = True
        return all(_join_received(sock) for sock in self.sockets)

    def receive_into(self, sock: socket.socket, buffer: memoryview) -> ReceivedBatch | None:
        """Read the next datagrams of one sender into a buffer; None: none is there."""
        try:
            length, ancillary, _, sender = sock.recvmsg_into([buffer], _ANCILLARY_ROOM)
        except OSError:
            # As in `receive`.
            return None
        segment = length
        if ancillary and ancillary[0][:2] == (_SOL_UDP, _UDP_GRO):
            segment = _INT.unpack(ancillary.pop(0)[2])[0]
        key = (sender, *ancillary)
        origin = self._origins.get(key) or self._remember(key, sock.family, sender, ancillary)
        return ReceivedBatch(length, segment, *origin)

    def send(self, transmit: Transmit[Peer], segment: int = 0) -> str:
        """Send a datagram; returns the name of the errno, empty if the stack took the datagram.

        A source address that is no longer local is forgotten, and routing chooses another one. segment: the bytes are
        several datagrams of this length (UDP_SEGMENT), of which the last may be shorter; 0: they are one.
        """
        # No datagram takes an old route.
        if self._monitor.has_events():
            self.follow_changes()
        endpoint, dscp = transmit.endpoint, transmit.traffic_class & ~ECN_MASK
        plan = self._plans.get((endpoint, dscp))
        if plan is None:
            if not self._is_source_usable(endpoint):
                endpoint = _forget_source(transmit)
            plan = self._make_plan(endpoint, dscp)
        failure = _send(transmit, plan, segment)
        if failure == errno.EINVAL and endpoint.source is not None and len(endpoint.address) == IPV6_BYTES:
            # A program may send from a link-local address only by the interface that has it (ip6_datagram_send_ctl).
            failure = _send(transmit, self._make_plan(_forget_source(transmit), dscp), segment)
        return errno.errorcode.get(failure, str(failure)) if failure else ""

    def _is_source_usable(self, endpoint: Endpoint) -> bool:
        """Return whether to send from the learned address; True if there is none.

        Only IPv4 endpoints hold an interface. If there is no route now, the address is kept, because the route may
        return.
        """
        source = endpoint.source
        if source is None:
            return True
        # Both send4 (inet_confirm_addr) and send6 (ipv6_chk_addr) want an address of an interface.
        if self._local_addresses is None:
            self._local_addresses = self._rtnetlink.local_addresses()
        if self._local_addresses is not None and source.address not in self._local_addresses:
            return False
        if not source.interface:
            return True
        # send4: the route must not fail with EINVAL, nor leave by another interface
        route = self._route(endpoint)
        return route.error != errno.EINVAL and (bool(route.error) or route.interface == source.interface)

    def _route(self, endpoint: Endpoint, dscp: int = 0) -> Route:
        """Look up the route of datagrams to an endpoint: the flow of `send4` and `send6`."""
        flow = Flow(
            source=endpoint.source.address if endpoint.source else b"",
            interface=endpoint.scope_id,
            fwmark=self._fwmark,
            tos=dscp,
            protocol=socket.IPPROTO_UDP,
            source_port=self._port,
            destination_port=endpoint.port,
            uid=self._uid,
        )
        return self._rtnetlink.route(endpoint.address, flow)

    def _make_plan(self, endpoint: Endpoint, dscp: int) -> _SendPlan | None:
        """Make and cache the send plan of an endpoint; None if there is no socket of its family."""
        is_ipv4 = len(endpoint.address) == IPV4_BYTES
        sock = self._sockets.get(socket.AF_INET if is_ipv4 else socket.AF_INET6)
        if sock is None:
            return None
        host = format_address(endpoint.address)
        to = (host, endpoint.port) if is_ipv4 else (host, endpoint.port, 0, endpoint.scope_id)
        # A rule or a route may select by DSCP (fib4_rule_match), and the flow of the driver has none.
        is_free = not dscp or self._route(endpoint, dscp) == self._route(endpoint)
        info = packet_info(endpoint.source, self._interface(endpoint))
        plan = _SendPlan(sock, to, info, _TOS if is_ipv4 else _TRAFFIC_CLASS, ~0 if is_free else ECN_MASK)
        if len(self._plans) >= _REMEMBERED:
            self._plans.clear()
        self._plans[endpoint, dscp] = plan
        return plan

    def _interface(self, endpoint: Endpoint) -> int:
        """Return the index of the interface that sendmsg(2) needs beside the address, 0: none.

        A scope id restricts the route to its interface (`send6`); sendmsg(2) itself only obeys that of link-local
        addresses. From a link-local source, sendmsg(2) wants an interface for every destination.
        """
        source = endpoint.source
        if endpoint.scope_id or source is None or len(source.address) == IPV4_BYTES or not _is_link_local(source):
            return endpoint.scope_id
        return self._route(endpoint).interface

    def _open_both(self, port: int) -> dict[socket.AddressFamily, socket.socket]:
        for attempt in range(_PORT_ATTEMPTS):
            opened: dict[socket.AddressFamily, socket.socket] = {}
            try:
                chosen = port
                for family in (socket.AF_INET, socket.AF_INET6):
                    sock = self._open(family, chosen)
                    if sock is not None:
                        opened[family] = sock
                        chosen = sock.getsockname()[1]
            except OSError as error:
                for sock in opened.values():
                    sock.close()
                # A port that is free in one family may be taken in the other; wg_socket_init also tries 100 times.
                if port == 0 and error.errno == errno.EADDRINUSE and attempt < _PORT_ATTEMPTS - 1:
                    continue
                raise ConfigError(f"port {port}: {error.strerror}", error.errno or errno.EIO) from error
            if opened:
                return opened
            break
        raise ConfigError("the kernel has neither IPv4 nor IPv6", errno.EAFNOSUPPORT)

    def _open(self, family: socket.AddressFamily, port: int) -> socket.socket | None:
        """Return a bound socket; None if the kernel does not have the family."""
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            if error.errno in _FAMILY_MISSING:
                return None
            raise
        try:
            self._prepare(sock)
            sock.bind(("", port))
        except OSError as error:
            sock.close()
            if family == socket.AF_INET6 and error.errno in _FAMILY_MISSING:
                return None
            raise
        return sock

    def _prepare(self, sock: socket.socket) -> None:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            # DF stays clear, as in the driver: routers may fragment datagrams, so the inner MTU need not fit the path.
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT)
            # The driver sends to any address that has a route. Its TTL is the same for all of them (ip4_dst_hoplimit).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            ttl = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT)
            hops = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, hops)
        for forced, option in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
            except PermissionError:
                # Root in a user namespace gets no more than rmem_max and wmem_max.
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        if self._is_joining:
            _join_received(sock)
        if self._fwmark:
            sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK.pack(self._fwmark))

    def _remember(
        self, key: tuple[object, ...], family: int, sender: tuple[object, ...], ancillary: list[Ancillary]
    ) -> tuple[Endpoint, int]:
        """Return endpoint and ECN bits of a datagram, and cache them for the next one from the same sender."""
        if len(self._origins) >= _REMEMBERED:
            self._origins.clear()
        host, port, *rest = sender
        scope_id = int(str(rest[1])) if rest else 0
        address = socket.inet_pton(family, str(host).partition("%")[0])
        origin = Endpoint(address, int(str(port)), scope_id, _local_address(ancillary)), _ecn(ancillary)
        self._origins[key] = origin
        return origin


def _send(transmit: Transmit[Peer], plan: _SendPlan | None, segment: int) -> int:
    """Pass a datagram to the stack; returns the errno, 0 if it was taken."""
    if plan is None:
        return errno.EAFNOSUPPORT
    if transmit.endpoint.address == _UNSPECIFIED:
        # sendmsg(2) would send to ::1; there is no route to :: (send6).
        return errno.ENETUNREACH
    ancillary = plan.packet_info
    if traffic_class := transmit.traffic_class & plan.bits:
        ancillary = [*ancillary, (*plan.traffic_class, _INT.pack(traffic_class))]
    if segment:
        ancillary = [*ancillary, (_SOL_UDP, _UDP_SEGMENT, _U16.pack(segment))]
    try:
        plan.socket.sendmsg([transmit.datagram], ancillary, 0, plan.to)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _join_received(sock: socket.socket) -> bool:
    try:
        sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
    except OSError:
        return False
    return True


def _forget_source(transmit: Transmit[Peer]) -> Endpoint:
    """Return the endpoint without a source address, and clear the peer's source address as well."""
    if transmit.peer is not None:
        transmit.peer.clear_endpoint_source()
    return transmit.endpoint.without_source()


def _is_link_local(source: LocalAddress) -> bool:
    return int.from_bytes(source.address[:2]) >> 6 == _LINK_LOCAL


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


def packet_info(source: LocalAddress | None, interface: int = 0) -> list[Ancillary]:
    """Return the control message that sets the source address of a datagram (ip(7), ipv6(7)); None: no message.

    interface: the index of the outgoing interface of an IPv6 datagram, 0: any.
    """
    if source is None and not interface:
        return []
    if source is not None and len(source.address) == IPV4_BYTES:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, source.address, bytes(4)))]
    address = source.address if source else _UNSPECIFIED
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO6.pack(address, interface))]
