"""Check the diagnosis of a broken tunnel: the clue first, then both sides, then their logs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from harness import (
    LOOPBACK,
    V4_OF_A,
    V4_OF_B,
    DeviceConfig,
    HarnessError,
    Key,
    ProgramInterface,
    Registry,
    Tunnel,
    allowed_ips,
    stopped,
)

if TYPE_CHECKING:
    from harness import Lab

NAME = "wireguard-go-debian"
NO_KEY, OTHER_KEY = Key(bytes(32)), Key(bytes(range(64, 96)))


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


def test_diagnosis_names_side_without_preshared_key(tunnel: Tunnel) -> None:
    tunnel.a.set_peer(tunnel.pub_b, preshared_key=NO_KEY)
    with pytest.raises(HarnessError) as caught:
        tunnel.must_ping("ns1", V4_OF_B)
    clue = str(caught.value).split("\n")[0]
    assert clue.endswith(": A has no preshared key for B, B has one for A; neither has a handshake")
    tunnel.a.set_peer(tunnel.pub_b, preshared_key=OTHER_KEY)
    text = tunnel.diagnosis()
    assert text.startswith("A and B have different preshared keys for each other; neither has a handshake\n")
    for key in (OTHER_KEY, tunnel.psk):
        assert str(key) not in text
        assert key.short not in text


def test_diagnosis_names_side_that_has_not_key_of_other(tunnel: Tunnel) -> None:
    tunnel.b.set(DeviceConfig(private_key=OTHER_KEY))
    clue, a, b, *_ = tunnel.diagnosis().split("\n")
    assert clue == "A has no peer with B's public key; neither has a handshake"
    assert a == f"A ({NAME}) has no peer with B's public key"
    assert b.startswith(f"B ({NAME}) has no handshake")


def test_diagnosis_names_address_that_allowed_ips_lack(tunnel: Tunnel) -> None:
    tunnel.a.set_peer(tunnel.pub_b, allowed_ips=allowed_ips("fd00::/64"), replace_allowed_ips=True)
    clue = f"A's allowed IPs for B lack {V4_OF_B}; neither has a handshake"
    with pytest.raises(HarnessError, match=f": {clue}\n"):
        tunnel.must_ping("ns1", V4_OF_B)
    assert tunnel.diagnosis().startswith("neither has a handshake\n")


def test_diagnosis_survives_program_that_does_not_answer(tunnel: Tunnel) -> None:
    assert isinstance(tunnel.b, ProgramInterface)
    with stopped(tunnel.b.pid):
        clue, a, b, *_ = tunnel.diagnosis().split("\n")
    assert clue == "B does not report its state"
    assert a.startswith(f"A ({NAME}) has no handshake")
    assert re.match(rf"B \({NAME}\) does not report its state: wg0 \(uapi\): ", b)
