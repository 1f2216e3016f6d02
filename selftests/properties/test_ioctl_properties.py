"""Check harness/net/ioctl.py against pyroute2's struct ifreq and the socket module."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from contextlib import contextmanager
from ctypes import sizeof
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.ethtool.ioctl import IfReq
from pyroute2.netlink.rtnl.ifinfmsg import IFF_NAMES

from harness.net.ioctl import Devices

if TYPE_CHECKING:
    from collections.abc import Iterator

# struct ifreq of netdevice(7): 16 bytes of name and a union as long as its longest member, struct ifmap.
IFREQ_SIZE = 16 + 24
# include/uapi/linux/sockios.h
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU, SIOCSIFNAME = 0x8913, 0x8914, 0x8922, 0x8923

names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=15)
Sent = list[tuple[int, str, bytes]]


@contextmanager
def kernel(flags: int = 0) -> Iterator[tuple[Devices, Sent]]:
    """Devices whose ioctls are recorded (number, name, union) and answered with these flags."""
    sent: Sent = []

    def ioctl(_: object, number: int, request: bytes) -> bytes:
        assert len(request) == IFREQ_SIZE
        name, at = bytes(IfReq.from_buffer_copy(request).ifr_name), IfReq.u.offset
        sent.append((number, name.rstrip(b"\0").decode(), request[at:]))
        return request[:at] + struct.pack("=H", flags) + request[at + 2 :]

    with socket.socket(socket.AF_UNIX) as control, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "ioctl", ioctl)
        yield Devices(control), sent


def test_union_of_ifreq_begins_behind_name() -> None:
    assert (IfReq.ifr_name.size, IfReq.u.offset) == (16, 16)
    assert sizeof(IfReq) <= IFREQ_SIZE


@given(names, st.integers(0, 0xFFFF), st.booleans())
def test_set_up_changes_only_flag_iff_up(name: str, flags: int, up: bool) -> None:
    iff_up = IFF_NAMES["IFF_UP"]
    with kernel(flags) as (devices, sent):
        devices.set_up(name, up)
        assert devices.is_up(name) == bool(flags & iff_up)
    assert [number for number, *_ in sent] == [SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFFLAGS]
    expected = flags | iff_up if up else flags & ~iff_up
    assert sent[1] == (SIOCSIFFLAGS, name, struct.pack("=H", expected) + bytes(22))


@given(names, names, st.integers(0, 2**31 - 1))
def test_mtu_and_new_name_follow_name_of_device(name: str, new: str, mtu: int) -> None:
    with kernel() as (devices, sent):
        devices.set_mtu(name, mtu)
        devices.rename(name, new)
    assert sent == [
        (SIOCSIFMTU, name, struct.pack("=i", mtu) + bytes(20)),
        (SIOCSIFNAME, name, new.encode().ljust(24, b"\0")),
    ]


def test_index_and_flags_of_real_devices_are_read() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        devices = Devices(control)
        for index, name in socket.if_nameindex():
            assert devices.index(name) == index
        assert devices.index("no such device") is None
        with pytest.raises(OSError, match="No such device") as refusal:
            devices.is_up("no such device")
        assert refusal.value.errno == errno.ENODEV
