"""Break refwg on purpose in one way, to show that the tests detect it.

Each mutant replaces one function of the core by a wrong one and names the requirement that it breaks. Only `__main__`
imports this file, and only for `--mutant` with REFWG_MUTANTS=allowed in the environment. No other option, no
configuration and no packet can load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from refwg import noise, receive
from refwg.cookie import CookieJar
from refwg.peer import Peer
from refwg.timers import PeerTimers

if TYPE_CHECKING:
    from refwg.boundary import Endpoint
    from refwg.peer import Shared

PERMISSION: Final = ("REFWG_MUTANTS", "allowed")

_real_add_macs = CookieJar.add_macs
_real_set_endpoint = Peer.set_endpoint


def _clamp(private_key: bytes) -> bytes:
    return private_key


def _is_source_allowed(shared: Shared, peer: Peer, address: bytes) -> bool:
    del shared, peer, address
    return True


def _set_endpoint(self: Peer, endpoint: Endpoint, now: int) -> None:
    # A configured endpoint has no source; a learned one has.
    if self.endpoint is None or endpoint.source is None:
        _real_set_endpoint(self, endpoint, now)


def _any_authenticated_packet_traversal(self: PeerTimers, now: int) -> None:
    del self, now


def _count_received(self: Peer, length: int) -> None:
    del self, length


def _add_macs(self: CookieJar, message: bytes, now: int) -> bytes:
    right = bytearray(_real_add_macs(self, message, now))
    right[-32] ^= 1
    return bytes(right)


@dataclass(frozen=True, slots=True)
class Mutant:
    """Replaces `owner.name` by `replacement`; requirement: the id of the requirement that it breaks."""

    owner: Any
    name: str
    replacement: Any
    requirement: str


MUTANTS: Final = {
    "no-clamp": Mutant(noise, "clamp", _clamp, "CR-18"),
    "no-source-check": Mutant(receive, "is_source_allowed", _is_source_allowed, "AIP-02"),
    "no-roaming": Mutant(Peer, "set_endpoint", _set_endpoint, "RT-03"),
    "no-keepalive": Mutant(
        PeerTimers, "any_authenticated_packet_traversal", _any_authenticated_packet_traversal, "TM-20"
    ),
    "stale-counters": Mutant(Peer, "count_received", _count_received, "IF-11"),
    "wrong-mac1": Mutant(CookieJar, "add_macs", _add_macs, "CK-01"),
}


def apply(name: str) -> None:
    """Apply the mutant with this name until the process ends; raises KeyError if there is none."""
    mutant = MUTANTS[name]
    setattr(mutant.owner, mutant.name, mutant.replacement)
