from __future__ import annotations

import errno
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from refwg.rtnetlink import Flow, Link, Monitor, RtnetlinkSocket
from selftests.support.sandbox import run_in_sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def rtnetlink() -> Iterator[RtnetlinkSocket]:
    rtnetlink = RtnetlinkSocket()
    yield rtnetlink
    rtnetlink.close()


def test_link_is_found_by_name(rtnetlink: RtnetlinkSocket) -> None:
    link = rtnetlink.link("lo")
    assert link is not None
    assert (link.index, link.name, link.mtu) == (1, "lo", 65536)
    assert rtnetlink.link("no such link") is None


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_route_to_loopback_address_leaves_by_lo(rtnetlink: RtnetlinkSocket, address: str) -> None:
    packed = ip_address(address).packed
    assert rtnetlink.route(packed, Flow(source=packed, fwmark=7)).interface == 1


def test_route_through_missing_interface_returns_enodev(rtnetlink: RtnetlinkSocket) -> None:
    assert rtnetlink.route(ip_address("127.0.0.1").packed, Flow(interface=12345)).error == errno.ENODEV


def test_address_without_route_returns_enetunreach() -> None:
    code = """
        from refwg.rtnetlink import RtnetlinkSocket
        print(*(RtnetlinkSocket().route(address).error for address in (bytes([192, 0, 2, 1]), b"\\xfd" + bytes(15))))
    """
    assert run_in_sandbox("", code) == f"{errno.ENETUNREACH} {errno.ENETUNREACH}\n"


def test_monitor_returns_nothing_without_events() -> None:
    monitor = Monitor(links=True, routes=True)
    assert monitor.drain() == []
    monitor.close()


@pytest.mark.requirement("MTU-04")
def test_route_mtu_and_link_changes_are_reported() -> None:
    code = """
        import subprocess
        from refwg.rtnetlink import Flow, Monitor, RtnetlinkSocket
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        rtnetlink, monitor = RtnetlinkSocket(), Monitor(links=True)
        ip("link add v0 type veth peer name v1"); ip("link set v1 up"); ip("link set v0 up")
        ip("address add 10.0.0.1/24 dev v0"); ip("route add 10.0.9.0/24 dev v0 mtu 1299")
        link = rtnetlink.link("v0")
        by_link = rtnetlink.route(bytes([10, 0, 9, 1]), Flow(interface=link.index))
        print(by_link.mtu, rtnetlink.route(bytes([10, 0, 0, 9])).mtu)
        rtnetlink.set_down(link)
        print(rtnetlink.link("v0").is_up, {seen.is_up for _, seen in monitor.drain() if seen.name == "v0"})
    """
    assert run_in_sandbox("", code) == "1299 0\nFalse {False, True}\n"


def test_links_with_same_fields_are_equal() -> None:
    assert Link(1, "lo", 65536, is_up=True) == Link(1, "lo", 65536, is_up=True)


def test_link_events_of_other_namespace_carry_its_namespace_id() -> None:
    code = """
        import os, subprocess
        from refwg.rtnetlink import Monitor, RtnetlinkSocket
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        rtnetlink, everywhere, here = RtnetlinkSocket(), Monitor(links=True, everywhere=True), Monitor(links=True)
        ip("netns add other"); other = os.open("/run/netns/other", os.O_RDONLY)
        number = rtnetlink.namespace_id(other); print(number == rtnetlink.namespace_id(other), number >= 0)
        ip("-n other link add v0 type veth peer name v1"); ip("-n other link set v0 up")
        print({(where == number, link.is_up) for where, link in everywhere.drain() if link.name == "v0"}, here.drain())
    """
    assert run_in_sandbox("", code) == "True True\n{(True, False), (True, True)} []\n"


@pytest.mark.requirement("NS-06")
def test_monitor_does_not_keep_other_namespace_alive() -> None:
    code = """
        import os, select, subprocess
        from refwg.rtnetlink import Monitor, RtnetlinkSocket
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        rtnetlink, everywhere, here = RtnetlinkSocket(), Monitor(links=True, everywhere=True), Monitor(links=True)
        ip("netns add other"); other = os.open("/run/netns/other", os.O_RDONLY)
        print(rtnetlink.namespace_id(other) is not None); os.close(other)
        # A veth pair is deleted with the namespace of either end.
        ip("link add outside type veth peer name inside netns other")
        print({link.name for where, link in everywhere.drain() if where is not None} >= {"inside"})
        ip("netns delete other")
        while rtnetlink.link("outside") and select.select([here], [], [], 10)[0]:
            here.drain()
        print(rtnetlink.link("outside"))
    """
    assert run_in_sandbox("", code) == "True\nTrue\nNone\n"


@pytest.mark.parametrize("left_out", ["mtu", "name"])
def test_link_message_without_name_or_mtu_is_ignored(left_out: str) -> None:
    code = f"""
        import socket, struct
        from refwg.rtnetlink import Monitor, attribute, open_socket
        RTM_NEWLINK, IFLA_IFNAME, IFLA_MTU, IFLA_WIRELESS = 16, 3, 4, 11
        def new_link(*attributes):
            body = struct.pack("=BxHlLL", socket.AF_UNSPEC, 1, 7, 0, 0) + b"".join(attributes)
            return struct.pack("=LHHLL", 16 + len(body), RTM_NEWLINK, 0, 0, 0) + body
        attributes = dict(name=attribute(IFLA_IFNAME, b"wlan0\\0"), mtu=attribute(IFLA_MTU, struct.pack("=L", 1500)))
        monitor, sender = Monitor(links=True), open_socket(0)
        sender.sendto(new_link(*attributes.values()), (0, 1)); print([link.name for _, link in monitor.drain()])
        attributes[{left_out!r}] = attribute(IFLA_WIRELESS, bytes(8))
        sender.sendto(new_link(*attributes.values()), (0, 1)); print(monitor.drain())
    """
    assert run_in_sandbox("", code) == "['wlan0']\n[]\n"
