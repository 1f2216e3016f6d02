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

from harness import steps
from harness.net.rtnetlink import RTNLGRP_LINK
from harness.wait import wait_for

if TYPE_CHECKING:
    from harness.net.netns import NetNS
    from harness.net.rtnetlink import Monitor

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GET_LINK: Final = 0x0A
# Seconds.
_CARRIER_TIMEOUT: Final = 5.0
# ETHTOOL_S* and ETHTOOL_G*: each command sets or reads one offload. Offloads that no caller needs are left out.
_ETHTOOL_SET: Final = {"tx": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}
_ETHTOOL_GET: Final = {"tx": 0x16, "sg": 0x18, "tso": 0x1E, "gso": 0x23, "gro": 0x2B}


@dataclass(frozen=True, slots=True)
class Veth:
    """Both ends of a veth pair; each end is (node, device name)."""

    a: tuple[NetNS, str]
    b: tuple[NetNS, str]

    def __repr__(self) -> str:
        return " - ".join(f"{node.name} {device}" for node, device in (self.a, self.b))

    def close(self) -> None:
        """Delete the pair, unless the kernel did so already when a namespace of an end was destroyed."""
        node, device = self.a
        if node.has_link(device):
            node.delete_link(device)


def add_veth(a: NetNS, a_device: str, b: NetNS, b_device: str, *, mtu: int | None = None) -> Veth:
    """Connect two nodes by a veth pair, both ends up and with carrier. mtu: bytes, of both ends; None: the kernel's."""
    descriptor = os.open(b.handle, os.O_RDONLY | os.O_CLOEXEC)
    try:
        a.add_link(a_device, kind="veth", peer={"ifname": b_device, "net_ns_fd": descriptor, "node": b.name})
    finally:
        os.close(descriptor)
    a.set_link(a_device, up=True, mtu=mtu)
    b.set_link(b_device, up=True, mtu=mtu)
    _await_carrier(a, a_device)
    return Veth((a, a_device), (b, b_device))


def _await_carrier(node: NetNS, device: str) -> None:
    """Wait until the end that was set up first is operational.

    The kernel handles its new carrier in a workqueue (linkwatch_event), and drops the end's packets until then. Since
    Linux 6.8 the request ETHTOOL_GLINK makes it do so at once (linkwatch_sync_dev).
    """
    with node.monitor(RTNLGRP_LINK) as monitor:
        _ethtool(node, device, _ETHTOOL_GET_LINK)
        wait_for(_Operational(monitor, node, device), _CARRIER_TIMEOUT, f"{device} of {node.name} to be operational")


class _Operational:
    """Event: a device is operational in the sense of RFC 2863; its value is True."""

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

    A wire turns them off. With tx on, the kernel leaves the checksum of a frame unfinished (CHECKSUM_PARTIAL). When a
    packet socket sends a copy of such a frame, its checksum is wrong, and the receiver drops it.
    """
    words = " ".join(f"{name} {'on' if on else 'off'}" for name, on in switches.items())
    with steps.step(node.name, f"ethtool -K {device} {words}"):
        for name, on in switches.items():
            _ethtool(node, device, _ETHTOOL_SET[name], on)


def offloads(node: NetNS, device: str) -> dict[str, bool]:
    """Return whether each offload of a device is on: those of `set_offloads`, and sg (scatter-gather)."""
    return {name: bool(_ethtool(node, device, command)) for name, command in _ETHTOOL_GET.items()}


def _ethtool(node: NetNS, device: str, command: int, value: int = 0) -> int:
    """Issue one ETHTOOL_* command (struct ethtool_value) and return its value."""
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = array.array("B", struct.pack("II", command, value))
        address, _ = request.buffer_info()
        fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), address))
    return int(struct.unpack("II", request)[1])
