"""Name the settings of two ends of a tunnel that disagree, so that no handshake succeeds."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.control.records import DeviceState, Key, PeerState


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """One end of a tunnel, as its program reports it.

    name: A or B. peer: its state of the other end; None if it has no peer with that end's public key. addresses: its
    own addresses in the tunnel that matter, without a length.
    """

    name: str
    peer: PeerState | None
    addresses: Sequence[str] = ()


def own_key(state: DeviceState) -> Key | None:
    """Return the public key of a device; None if it has none, or does not report it."""
    if state.public_key or not state.private_key:
        return state.public_key
    return state.private_key.public()


def mismatches(a: End, b: End) -> list[str]:
    """Return in words what prevents a handshake between two ends, the likeliest reason first; never a key."""
    both = ((a, b), (b, a))
    found = [f"{end.name} has no peer with {other.name}'s public key" for end, other in both if end.peer is None]
    if a.peer and b.peer:
        found += _preshared_keys(a.name, a.peer, b.name, b.peer)
        if a.peer.endpoint is None and b.peer.endpoint is None:
            found.append("neither has an endpoint for the other")
    lacking = [(end, other) for end, other in both if end.peer and _lacks(end.peer, other.addresses)]
    return [
        *found,
        *(f"{end.name}'s allowed IPs for {other.name} lack {' and '.join(other.addresses)}" for end, other in lacking),
    ]


def _preshared_keys(a: str, peer_of_a: PeerState, b: str, peer_of_b: PeerState) -> list[str]:
    keys = peer_of_a.preshared_key, peer_of_b.preshared_key
    if keys[0] == keys[1]:
        return []
    if None not in keys:
        return [f"{a} and {b} have different preshared keys for each other"]
    without, holder = (a, b) if keys[0] is None else (b, a)
    return [f"{without} has no preshared key for {holder}, {holder} has one for {without}"]


def _lacks(peer: PeerState, addresses: Sequence[str]) -> bool:
    """Whether the allowed IPs of a peer contain none of these addresses."""
    prefixes = [ip_network((entry.address, entry.length), strict=False) for entry in peer.allowed_ips]
    return bool(addresses) and not any(ip_address(text) in prefix for text in addresses for prefix in prefixes)
