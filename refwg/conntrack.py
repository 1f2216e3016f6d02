"""Query connection tracking by netlink for the source that a packet had before NAT.

For the driver this source is in the packet's conntrack entry, which comes with the packet (icmp_ndo_send). A program
gets only the packet, and must look the entry up by its translated addresses. Messages:
linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import Final

from refwg import ip
from refwg.rtnetlink import NetlinkSocket, attribute, attributes

_NETLINK_NETFILTER: Final = 12
_CTNETLINK_GET: Final = 1 << 8 | 1
_NESTED: Final = 0x8000
_FAMILY: Final = Struct("=BBH")
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SOURCE: Final = {ip.IPV4_BYTES: 1, ip.IPV6_BYTES: 3}
_IP_DESTINATION: Final = {ip.IPV4_BYTES: 2, ip.IPV6_BYTES: 4}
_PROTO_NUM, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_IPPROTO_ICMP, _IPPROTO_ICMPV6 = 1, 58
# By protocol: attributes of identifier, type and code, and the type of the reply to each echo request.
_ECHO: Final = {_IPPROTO_ICMP: ((4, 5, 6), {8: 0}), _IPPROTO_ICMPV6: ((7, 8, 9), {128: 129})}
_FIRST_OF_PAYLOAD: Final = 8


class Conntrack(NetlinkSocket):
    """Queries connection tracking in the network namespace in which it was opened."""

    def __init__(self) -> None:
        super().__init__(_NETLINK_NETFILTER)

    def original_source(self, packet: bytes) -> bytes:
        """Return the packet's source address before source NAT; its own source address if no entry is found."""
        source = ip.source(packet)
        tuple_ = _reply_tuple(packet)
        if not tuple_:
            return source
        family = socket.AF_INET if len(source) == ip.IPV4_BYTES else socket.AF_INET6
        failure, answer = self.request(
            _CTNETLINK_GET, _FAMILY.pack(family, 0, 0) + attribute(_TUPLE_REPLY | _NESTED, tuple_)
        )
        if failure:
            return source
        original = attributes(attributes(answer[_FAMILY.size :]).get(_TUPLE_ORIG, b""))
        return attributes(original.get(_TUPLE_IP, b"")).get(_IP_SOURCE[len(source)], source)


def _reply_tuple(packet: bytes) -> bytes:
    """Return the packet's reply tuple (addresses and ports swapped, or the echo id); empty for other protocols."""
    source, destination = ip.source(packet), ip.destination(packet)
    protocol, payload = ip.upper_layer(packet)
    if protocol is None or len(payload) < _FIRST_OF_PAYLOAD:
        return b""
    addresses = attribute(_IP_SOURCE[len(source)], destination) + attribute(_IP_DESTINATION[len(source)], source)
    if protocol in _ECHO:
        (identifier, kind, code), answers = _ECHO[protocol]
        if payload[0] not in answers:
            return b""
        details = attribute(identifier, payload[4:6]) + attribute(kind, bytes([answers[payload[0]]]))
        details += attribute(code, b"\0")
    else:
        details = attribute(_PROTO_SOURCE_PORT, payload[2:4]) + attribute(_PROTO_DESTINATION_PORT, payload[:2])
    return attribute(_TUPLE_IP | _NESTED, addresses) + attribute(
        _TUPLE_PROTO | _NESTED, attribute(_PROTO_NUM, bytes([protocol])) + details
    )
