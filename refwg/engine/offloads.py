"""Switch on the kernel's offloads that the batch engine uses, and count their use.

Each can be missing alone: Linux before 6.2 has no USO for TUN, before 5.0 no UDP_GRO, before 4.18 no UDP_SEGMENT.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from refwg.engine.virtio import GSO_ECN, GSO_TCPV4, GSO_TCPV6

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from refwg.socket import UdpSockets
    from refwg.tun import Tun

# The interface gives and takes packets without a checksum, and superframes of TCP and UDP (TUN_F_* of linux/if_tun.h).
_TUN_FLAGS: Final = {"csum": 0x01, "tso4": 0x02, "tso6": 0x04, "tso-ecn": 0x08, "uso4": 0x20, "uso6": 0x40}
UDP_SEGMENT: Final = "udp-segment"
UDP_GRO: Final = "udp-gro"
OFFLOADS: Final = (*_TUN_FLAGS, UDP_SEGMENT, UDP_GRO)
# All others of the interface need this one (set_offload of the driver tun).
_FIRST: Final = "csum"
_TOGETHER: Final = frozenset({"uso4", "uso6"})


class Offloads:
    """The offloads that are on, and how often each was used.

    used: superframes and batches by direction ("in", "out") and offload. note: called with direction, offload and count
    when the count is a power of two.
    """

    def __init__(self, enabled: Iterable[str], note: Callable[[str, str, int], None]) -> None:
        self.enabled = frozenset(enabled)
        self.used: Counter[tuple[str, str]] = Counter()
        self._note = note

    def __contains__(self, offload: str) -> bool:
        return offload in self.enabled

    def count(self, direction: str, offload: str) -> None:
        """Count one superframe or batch."""
        self.used[direction, offload] += 1
        count = self.used[direction, offload]
        if not count & (count - 1):
            self._note(direction, offload, count)

    def close(self) -> None:
        """Report all counts that were not reported."""
        for (direction, offload), count in self.used.items():
            if count & (count - 1):
                self._note(direction, offload, count)


def enable(tun: Tun, sockets: UdpSockets, wanted: Iterable[str]) -> set[str]:
    """Switch on each wanted offload that interface and sockets have; returns those that are on."""
    names = set(wanted)
    enabled = _of_interface(tun, names) if tun.has_headers and _FIRST in names else set()
    if UDP_GRO in names and sockets.join_received():
        enabled.add(UDP_GRO)
    return enabled | names & {UDP_SEGMENT}


def _of_interface(tun: Tun, names: set[str]) -> set[str]:
    """Switch on the offloads of the interface, one by one; those for UDP can only be had together."""
    enabled: set[str] = set()
    for name in _TUN_FLAGS:
        group = names & _TOGETHER if name in _TOGETHER else {name} & names
        if name in names and group != _TOGETHER - {name} and tun.set_offloads(_flags(enabled | group)):
            enabled |= group
    tun.set_offloads(_flags(enabled))
    return enabled


def _flags(names: Iterable[str]) -> int:
    return sum(_TUN_FLAGS[name] for name in names)


def offload_of(gso_type: int, *, is_ipv4: bool) -> str:
    """Return the offload that a kind of superframe (GSO_*) belongs to."""
    kind = gso_type & ~GSO_ECN
    if kind in {GSO_TCPV4, GSO_TCPV6}:
        return "tso4" if kind == GSO_TCPV4 else "tso6"
    return "uso4" if is_ipv4 else "uso6"
