"""Send a datagram whose UDP checksum is zero: over IPv6 it must be 0xffff (`loopback`)."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from harness import V6_OF_A, V6_OF_B, Datagram, udp_receiver, wait_for
from harness.net.checksum import checksum

if TYPE_CHECKING:
    from harness import Tunnel

FROM, TO = 2222, 1111


@pytest.mark.requirement("DT-31")
def test_udp_checksum_of_zero_is_sent_as_ffff_over_ipv6(loopback: Tunnel) -> None:
    addresses = socket.inet_pton(socket.AF_INET6, V6_OF_A) + socket.inet_pton(socket.AF_INET6, V6_OF_B)
    summed = addresses + struct.pack(">IIHHHH", 10, socket.IPPROTO_UDP, FROM, TO, 10, 0)
    # With the checksum of all other words as payload, the checksum is zero, which is sent as 0xffff (RFC 8200, 8.1).
    payload = checksum(summed).to_bytes(2)
    ns1, ns2 = loopback.nodes["ns1"], loopback.nodes["ns2"]
    with udp_receiver(ns2, V6_OF_B, TO) as receiver, ns1.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.bind((V6_OF_A, FROM))
        for data in (payload, b"the next one"):
            sender.sendto(data, (V6_OF_B, TO))
        arrived, _ = wait_for(Datagram(receiver), 4.0, "a datagram")
    assert arrived == payload, "a datagram with a checksum of zero was lost, and the next one arrived"
