"""Check the diagnosis of a broken tunnel: the clue first, then both sides, then their logs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from harness import LOOPBACK, V4_OF_A, DeviceConfig, ProgramInterface, Registry, Tunnel, stopped

if TYPE_CHECKING:
    from harness import Lab

NAME = "wireguard-go-debian"


@pytest.fixture
def tunnel(lab: Lab) -> Tunnel:
    manifest = Registry().get(NAME)
    if reason := manifest.why_unavailable():
        pytest.skip(reason)
    return Tunnel(lab, LOOPBACK, manifest, manifest)


def test_diagnosis_begins_with_missing_handshake(tunnel: Tunnel) -> None:
    assert tunnel.diagnosis().split("\n")[:3] == [
        "neither has a handshake",
        f"A ({NAME}) has no handshake, sent 0 and received 0 bytes; its endpoint for B is 127.0.0.1:2",
        f"B ({NAME}) has no handshake, sent 0 and received 0 bytes; its endpoint for A is 127.0.0.1:1",
    ]


def test_diagnosis_begins_with_endpoint_that_is_out_of_date(tunnel: Tunnel) -> None:
    tunnel.must_ping("ns2", V4_OF_A)
    # The last datagram may not be counted yet.
    assert tunnel.diagnosis().startswith("both have a handshake")
    tunnel.a.set(DeviceConfig(listen_port=9))
    assert tunnel.diagnosis().split("\n")[0] == "B's endpoint for A is 127.0.0.1:1, A listens on 9"


def test_diagnosis_survives_program_that_does_not_answer(tunnel: Tunnel) -> None:
    assert isinstance(tunnel.b, ProgramInterface)
    with stopped(tunnel.b.pid):
        clue, a, b, *_ = tunnel.diagnosis().split("\n")
    assert clue == "B does not report its state"
    assert a.startswith(f"A ({NAME}) has no handshake")
    assert re.match(rf"B \({NAME}\) does not report its state: wg0 \(uapi\): ", b)
