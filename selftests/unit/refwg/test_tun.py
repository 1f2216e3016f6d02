from __future__ import annotations

import pytest

from selftests.support.sandbox import run_in_sandbox

SETUP = """
        import os, socket, subprocess, time
        from refwg.errors import InterfaceGoneError
        from refwg.rtnetlink import RtnetlinkSocket
        from refwg.tun import Tun
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        tun = Tun.create("wg0")
"""


@pytest.mark.requirement("MTU-01", "IF-10", "IF-03")
def test_new_interface_is_down_and_has_default_mtu() -> None:
    code = """
        print(tun.link.name, tun.link.mtu, tun.link.is_up, tun.read())
        print(open("/proc/sys/net/ipv6/conf/wg0/addr_gen_mode").read().strip())
    """
    assert run_in_sandbox(SETUP, code) == "wg0 1420 False None\n1\n"


@pytest.mark.requirement("IF-17", "MTU-12", "IF-08")
def test_interface_passes_raw_ip_packets_and_reports_changes() -> None:
    code = """
        ip("address add 10.0.0.1/24 dev wg0"); ip("link set wg0 mtu 1300 up")
        tun.refresh(); print(tun.write(b"rubbish"), tun.refresh(), tun.link.mtu, tun.link.is_up)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", ("10.0.0.2", 7))
        packet = tun.read()
        print(packet[0] >> 4, packet[-5:])
        print(tun.mtu_to(bytes([10, 0, 0, 2])))
        ip("route add 10.0.0.2/32 dev wg0 mtu 1299"); tun.refresh(); print(tun.mtu_to(bytes([10, 0, 0, 2])))
        ip("link set wg0 down"); ip("link set wg0 up"); print(tun.refresh(), tun.link.is_up)
    """
    expected = "False False 1300 True\n4 b'hello'\n1300\n1299\nTrue True\n"
    assert run_in_sandbox(SETUP, code) == expected


def test_interface_with_virtio_headers_takes_offloads() -> None:
    code = """
        tun.close(); tun = Tun.create("wg0", has_headers=True); print(tun.has_headers)
        ip("address add 10.0.0.1/24 dev wg0"); ip("link set wg0 up"); tun.refresh()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", ("10.0.0.2", 7)); packet = tun.read(); print(packet[0] >> 4, packet[-5:])
            print(tun.set_offloads(1), tun.set_offloads(1 << 30))
            sender.sendto(b"hello", ("10.0.0.2", 7)); buffer = memoryview(bytearray(100)); size = tun.read_into(buffer)
            print(size, buffer[0], bytes(buffer[size - 5:size]), tun.read_into(buffer))
        print(tun.write(b"rubbish"), tun.write(bytes(buffer[10:size])))
        tun.limit_superframes(50000)
        print("gso_max_size 50000" in subprocess.check_output(["ip", "-d", "link", "show", "wg0"], text=True))
        ip("link set wg0 down"); print(tun.read_into(buffer))
        ip("link delete wg0")
        try: tun.read_into(buffer)
        except InterfaceGoneError: print("gone")
    """
    expected = "True\n4 b'hello'\nTrue False\n43 1 b'hello' 0\nFalse True\nTrue\n0\ngone\n"
    assert run_in_sandbox(SETUP, code) == expected


SETTINGS = """
        def settings(name, *command):
            for file in (f"ipv6/conf/{name}/addr_gen_mode", f"ipv4/conf/{name}/send_redirects"):
                value = subprocess.check_output([*command, "cat", f"/proc/sys/net/{file}"], text=True)
                print(value.strip(), end=" ")
            print()
"""


@pytest.mark.requirement("IF-10", "NS-01")
def test_interface_settings_are_restored_in_other_namespace() -> None:
    code = """
        there = ("nsenter", "--net=/run/netns/other")
        settings("wg0"); ip("netns add other"); ip("link set wg0 netns other"); settings("wg0", *there)
        tun.refresh(); settings("wg0", *there)
        ip("-n other link set wg0 up"); tun.refresh()
        ip("-n other -6 address show dev wg0 scope link")
    """
    assert run_in_sandbox(SETUP + SETTINGS, code) == "1 0 \n0 1 \n1 0 \n"


@pytest.mark.requirement("IF-10")
def test_interface_settings_are_restored_after_mtu_below_1280() -> None:
    code = """
        ip("link set wg0 mtu 1279"); tun.refresh(); ip("link set wg0 mtu 1420"); settings("wg0")
        tun.refresh(); settings("wg0"); print(tun.refresh(), tun.monitor.drain())
        ip("link set wg0 up"); tun.refresh(); ip("-6 address show dev wg0 scope link")
    """
    assert run_in_sandbox(SETUP + SETTINGS, code) == "0 0 \n1 0 \nFalse []\n"


@pytest.mark.requirement("NS-01", "NS-09", "ERR-02")
def test_interface_is_followed_to_other_namespace_and_name() -> None:
    code = """
        ip("netns add other"); ip("link set wg0 name wg9"); ip("link set wg9 netns other")
        for text in ("link set lo up", "address add 10.0.0.1/24 dev wg9", "link set wg9 mtu 1280 up"):
            ip("-n other " + text)
        print(tun.refresh(), tun.link.name, tun.link.mtu, tun.link.is_up, RtnetlinkSocket().link("wg9"))
        from refwg.ip import unreachable
        from selftests.support.packets import ip_packet
        for sender in ("10.0.0.1", "99.0.0.1"):
            print(tun.send_icmp(unreachable(ip_packet(sender, "10.99.0.1")), 0))
        tun.set_down(); tun.refresh(); print(tun.link.is_up)
        tun.close()
    """
    assert run_in_sandbox(SETUP, code) == "True wg9 1280 True None\nTrue\nFalse\nFalse\n"


@pytest.mark.requirement("CFG-54", "IF-16")
@pytest.mark.parametrize("question", ["tun.read()", "tun.refresh()"])
def test_deleted_interface_raises_interface_gone_error(question: str) -> None:
    code = f"""
        ip("link delete wg0")
        try:
            {question}
        except InterfaceGoneError as error:
            print("gone")
    """
    assert run_in_sandbox(SETUP, code) == "gone\n"


def test_interface_name_in_use_is_refused() -> None:
    code = """
        try:
            Tun.create("wg0")
        except OSError as error:
            print(error.strerror)
    """
    assert run_in_sandbox(SETUP, code) == "Device or resource busy\n"
