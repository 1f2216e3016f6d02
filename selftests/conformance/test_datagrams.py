"""Check that datagrams of any size and content leave a device able to answer."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from harness import Initiation, Response, stopped, twin

if TYPE_CHECKING:
    from harness import Target

PORT = 1
ADDRESS = {4: ("192.168.1.1", PORT), 6: ("fd00:aa::1", PORT)}
# Around the lengths of the messages, of a page, and the longest over the link: longer ones go in fragments.
SIZES = (1, 3, 4, 31, 32, 63, 64, 65, 92, 147, 148, 149, 1472, 1500, 4095, 4096, 4097, 8000, 32768, 65507)
FIRST_BYTES = (0, 1, 2, 3, 4, 5, 255)
UDP_SEGMENT = 103
# At most 64 segments in one send (UDP_MAX_SEGMENTS).
BURST = 60


@pytest.mark.requirement("ROB-08", "ROB-10")
@pytest.mark.bug("IB-52")
@pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])
def test_device_answers_after_datagrams_of_any_size(target: Target, family: int) -> None:
    with twin("an initiation is answered before"):
        target.round_trip(family)
    with target.peers_node.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        for size in SIZES:
            for first in FIRST_BYTES:
                content = bytes([first, 0, 0, 0]) + bytes(max(0, size - 4))
                sender.sendto(content[:size], ADDRESS[family])
            target.round_trip(family)
        sender.setblocking(False)
        with pytest.raises(BlockingIOError):
            sender.recv(1)


@pytest.mark.requirement("ROB-08")
@pytest.mark.bug("IB-52")
@pytest.mark.parametrize("size", [1, 148, 1400])
def test_device_answers_after_segmented_burst(target: Target, size: int) -> None:
    with twin("an initiation is answered before"):
        target.round_trip()
    with target.peers_node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        for first in FIRST_BYTES:
            segment = (bytes([first]) + bytes(size))[:size]
            content = segment * min(BURST, 65000 // size)
            sent = sender.sendto(content, ADDRESS[4])
            assert sent == len(content), f"{sent} of {len(content)} bytes were sent"
            target.round_trip()


@pytest.mark.requirement("ROB-08", "ROB-10")
@pytest.mark.bug("IB-52")
@pytest.mark.parametrize("size", [0, 1, 31])
def test_short_datagram_does_not_lose_message_behind_it(target: Target, size: int) -> None:
    peer = target.peer()
    with twin("an initiation is answered"):
        peer.handshake()
    peer.keep_spacing()
    with stopped(target.interface.pid):
        peer.send(bytes(size))
        peer.send(Initiation())
    peer.expect(Response)
