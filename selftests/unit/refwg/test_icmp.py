from __future__ import annotations

import pytest

from refwg.icmp import Bucket
from refwg.messages import SECOND
from selftests.support.sandbox import run_in_sandbox

SETUP = """
        import socket, subprocess
        from ipaddress import ip_address
        from pathlib import Path
        from refwg.icmp import IcmpLimits, IcmpSender
        from refwg.rtnetlink import RtnetlinkSocket
        from refwg.ip import unreachable
        from selftests.support.packets import ip_packet
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        ip("link add v0 type veth peer name v1"); ip("link set v1 up"); ip("link set v0 up")
        ip("address add 10.0.0.1/24 dev v0"); ip("address add fd00::1/64 dev v0 nodad")
        while RtnetlinkSocket().route(ip_address("fd00::1").packed).interface != 1:
            pass  # a kernel thread adds the route a moment later
        def sent(sender, address, count, now=0):
            error = unreachable(ip_packet(address, "fd00::99" if ":" in address else "10.99.0.1"))
            limits = sender.limits
            return sum(limits.allow_any(now) and sender.send(error, limits, now) for _ in range(count))
        def make():
            sender = IcmpSender(RtnetlinkSocket()); sender.limits = IcmpLimits()
            return sender
"""


def test_bucket_is_full_at_first_and_refills_with_time() -> None:
    bucket = Bucket(SECOND, 2)
    moments = [0, 0, 0, SECOND - 1, SECOND, 100 * SECOND, 100 * SECOND, 100 * SECOND]
    assert [bucket.allow(now) for now in moments] == [True, True, False, False, True, True, True, False]


def test_bucket_without_interval_never_refuses() -> None:
    bucket = Bucket(0, 6)
    assert all(bucket.allow(0) for _ in range(1000))


@pytest.mark.requirement("ERR-02")
def test_destination_gets_six_errors_at_once_then_one_per_second() -> None:
    code = """
        Path("/proc/sys/net/ipv6/icmp/ratelimit").write_text("1000")
        sender = make()
        for second in range(3):
            print(*(sent(sender, address, 9, second * 10**9) for address in ("10.0.0.7", "10.0.0.8", "fd00::7")))
    """
    assert run_in_sandbox(SETUP, code) == "6 6 6\n1 1 1\n1 1 1\n"


@pytest.mark.requirement("ERR-02")
@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1", "127.0.0.1"])
def test_local_sender_is_bound_by_global_icmp_limit_only(address: str) -> None:
    code = f"""
        print(sent(make(), "{address}", 60))
    """
    assert run_in_sandbox(SETUP, code) == "50\n"


def test_local_senders_are_looked_up_again_after_route_change() -> None:
    code = """
        sender = make()
        print(sent(sender, "10.0.0.7", 9)); ip("address add 10.0.0.7/24 dev v0")
        sender.limits.routes_changed(); print(sent(sender, "10.0.0.7", 9))
    """
    assert run_in_sandbox(SETUP, code) == "6\n9\n"


def test_icmp_rate_limit_is_read_from_sysctl() -> None:
    code = """
        Path("/proc/sys/net/ipv4/icmp_ratelimit").write_text("0")
        print(sent(make(), "10.0.0.7", 9))
    """
    assert run_in_sandbox(SETUP, code) == "9\n"


def test_icmp_error_is_skipped_when_it_cannot_be_sent() -> None:
    code = """
        sender = make()
        print(sent(sender, "99.0.0.1", 1))
        sender.close(); sender._sockets.clear()
        print(sent(sender, "10.0.0.7", 1))
    """
    assert run_in_sandbox(SETUP, code) == "0\n0\n"
