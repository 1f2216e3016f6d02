"""Check that creations and destructions in a kernel log are counted by kind."""

from __future__ import annotations

import pytest

from harness.vm.objects import count, leaks

BALANCED = """\
<7>[   14.466095] wireguard: wg0: Interface created
<7>[   16.179143] wireguard: wg0: Peer 1 created
<7>[   16.300000] wireguard: wg0: Sending handshake initiation to peer 1 (127.0.0.1:2)
<7>[   16.301000] wireguard: wg0: Keypair 1 created for peer 1
<7>[   17.000000] wireguard: wg0: Keypair 1 destroyed for peer 1
<7>[   17.100000] wireguard: wg0: Peer 1 ([::1]:2) destroyed
<7>[   17.200000] wireguard: wg0: Interface destroyed
"""


def test_each_kind_of_object_is_counted() -> None:
    kinds = {(kind, event) for kind in ("Interface", "Peer", "Keypair") for event in ("created", "destroyed")}
    assert count(BALANCED) == dict.fromkeys(kinds, 1)


def test_log_balances_when_all_objects_are_destroyed() -> None:
    assert leaks(BALANCED) == []


@pytest.mark.parametrize("kind", ["Interface", "Peer", "Keypair"])
def test_undestroyed_object_is_reported_by_kind(kind: str) -> None:
    leaking = "".join(line + "\n" for line in BALANCED.splitlines() if not (kind in line and "destroyed" in line))
    assert leaks(leaking) == [f"1 of {kind} created, 0 destroyed"]


def test_log_without_objects_is_reported_as_imbalance() -> None:
    (complaint,) = leaks("<6>[    1.0] wireguard: WireGuard 1.0.0 loaded.\n")
    assert "dynamic debug" in complaint
