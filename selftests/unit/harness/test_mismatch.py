"""Check which settings of two ends are named as the reason that there is no handshake."""

from __future__ import annotations

from typing import Final

import pytest

from harness.control.records import DeviceState, Endpoint, Key, PeerState, allowed_ips
from harness.lab.mismatch import End, mismatches, own_key

KEY, PSK, OTHER = (Key(bytes([n]) * 32) for n in (8, 16, 24))
AT: Final = Endpoint.parse("10.0.0.2:2")


def peer(psk: Key | None = PSK, endpoint: Endpoint | None = AT, *prefixes: str) -> PeerState:
    allowed = allowed_ips(*(prefixes or ("10.9.0.0/24", "fd00::/64")))
    return PeerState(public_key=KEY, preshared_key=psk, endpoint=endpoint, allowed_ips=allowed)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        (peer(), peer(), []),
        (peer(None), peer(None), []),
        (peer(None), peer(), ["A has no preshared key for B, B has one for A"]),
        (peer(), peer(None), ["B has no preshared key for A, A has one for B"]),
        (peer(), peer(OTHER), ["A and B have different preshared keys for each other"]),
        (peer(), None, ["B has no peer with A's public key"]),
        (None, None, ["A has no peer with B's public key", "B has no peer with A's public key"]),
        (peer(PSK, None), peer(), []),
        (peer(), peer(PSK, None), []),
        (peer(PSK, None), peer(PSK, None), ["neither has an endpoint for the other"]),
        (peer(PSK, AT, "10.9.1.0/24"), peer(), ["A's allowed IPs for B lack 10.9.0.2 and fd00::2"]),
        # One family is enough for packets of that family.
        (peer(PSK, AT, "fd00::2/128"), peer(), []),
        (peer(), peer(PSK, AT, "10.9.0.2/32"), ["B's allowed IPs for A lack 10.9.0.1 and fd00::1"]),
    ],
)
def test_settings_that_disagree_are_named(a: PeerState | None, b: PeerState | None, found: list[str]) -> None:
    ends = [
        End(name=name, peer=one, addresses=(f"10.9.0.{n}", f"fd00::{n}")) for name, one, n in (("A", a, 1), ("B", b, 2))
    ]
    assert mismatches(*ends) == found


def test_public_key_follows_from_private_key() -> None:
    assert own_key(DeviceState()) is None
    assert own_key(DeviceState(private_key=KEY)) == KEY.public()
    assert own_key(DeviceState(private_key=KEY, public_key=OTHER)) == OTHER
