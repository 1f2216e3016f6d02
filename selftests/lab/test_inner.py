"""Decrypt the captures of a lab: a test reads what is inside the tunnel from what is outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import Unavailable

if TYPE_CHECKING:
    from harness import Tunnel


def test_capture_is_decrypted_if_one_end_logs_its_keys(loopback: Tunnel) -> None:
    """Each echo request of A and each reply is inside, with the addresses of the tunnel."""
    names = {loopback.a.manifest.name, loopback.b.manifest.name}
    (capture,) = loopback.lab.captures
    loopback.must_ping("ns1", "192.168.241.2", count=3)
    if "refwg" not in names:
        with pytest.raises(Unavailable, match="one end must log its keys"):
            loopback.lab.inner(capture)
        return
    packets = [inner.packet for inner in loopback.lab.inner(capture) if inner.packet]
    echoes = [(packet[20], packet[12:16]) for packet in packets if packet[0] >> 4 == 4 and packet[9] == 1]
    here, there = bytes([192, 168, 241, 1]), bytes([192, 168, 241, 2])
    assert echoes == [(8, here), (0, there)] * 3
