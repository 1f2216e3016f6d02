"""Connect two nodes by a veth pair, and switch the offloads of its ends.

Sources: veth(4); the ETHTOOL ioctls of include/uapi/linux/ethtool.h.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.net.rtnetlink import RTNLGRP_LINK
from harness.wait import wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS
    from harness.net.rtnetlink import Monitor

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GET_LINK: Final = 0x0A
_CARRIER: Final = 5.0
# The commands that switch one offload each; those without a row of their own are not needed here.
_ETHTOOL_SET: Final = {"tx": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}
_ETHTOOL_GET: Final = {"tx": 0x16, "sg": 0x18, "tso": 0x1E, "gso": 0x23, "gro": 0x2B}


@dataclass(frozen=True, slots=True)
class Veth:
    """Both ends of a veth pair; each end is (node, device name)."""

    a: tuple[NetNS, str]
    b: tuple[NetNS, str]

    def close(self) -> None:
        """Delete the pair, unless its end has gone already with its namespace."""
        node, device = self.a
        if node.has_link(device):
            node.delete_link(device)


def add_veth(a: NetNS, a_device: str, b: NetNS, b_device: str, *, mtu: int | None = None) -> Veth:
    """Connect two nodes by a veth pair with both ends up."""
    descriptor = os.open(b.handle, os.O_RDONLY | os.O_CLOEXEC)
    try:
        a.add_link(a_device, kind="veth", peer={"ifname": b_device, "net_ns_fd": descriptor})
    finally:
        os.close(descriptor)
    a.set_link(a_device, up=True, mtu=mtu)
    b.set_link(b_device, up=True, mtu=mtu)
    _await_carrier(a, a_device)
    return Veth((a, a_device), (b, b_device))


def _await_carrier(node: NetNS, device: str) -> None:
    """Wait until the end that came up first works: the kernel notices its carrier a little later, and drops till then.

    Since Linux 6.8 it does so at once when it is asked.
    """
    with node.monitor(RTNLGRP_LINK) as monitor:
        _ethtool(node, device, _ETHTOOL_GET_LINK)
        wait_for(_Operational(monitor, node, device), _CARRIER, f"{device} of {node.name} to work")


class _Operational:
    """A device is operational in the sense of RFC 2863: True."""

    def __init__(self, monitor: Monitor, node: NetNS, device: str) -> None:
        self._monitor = monitor
        self._node = node
        self._device = device

    def fileno(self) -> int:
        return self._monitor.fileno()

    def look(self) -> bool | None:
        self._monitor.drain()
        return self._node.links()[self._device]["is_operational"] or None

    def seen(self) -> str:
        return f"{self._node.links()[self._device]}"


def set_offloads(node: NetNS, device: str, **switches: bool) -> None:
    """Turn offloads of a device on or off: tx (checksums), tso, gso, gro; names as in ethtool(8).

    A wire or a capture wants them off: with tx on, checksums in it are partial, and UDP that leaves the kernel through
    a raw socket is lost.
    """
    for name, on in switches.items():
        _ethtool(node, device, _ETHTOOL_SET[name], on)


def offloads(node: NetNS, device: str) -> dict[str, bool]:
    """The offloads of a device by their names, as for `set_offloads`, and sg: whether they are on."""
    return {name: bool(_ethtool(node, device, command)) for name, command in _ETHTOOL_GET.items()}


def _ethtool(node: NetNS, device: str, command: int, value: int = 0) -> int:
    """Give one command; returns the value that it is answered with."""
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = array.array("B", struct.pack("II", command, value))
        address, _ = request.buffer_info()
        fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), address))
    return int(struct.unpack("II", request)[1])
