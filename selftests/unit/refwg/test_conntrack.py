from __future__ import annotations

import pytest

from selftests.support.sandbox import run_in_sandbox

SETUP = """
        import socket, subprocess
        from ipaddress import ip_address
        from refwg.conntrack import Conntrack
        from selftests.support.packets import ip_packet, udp
        def ip(text): subprocess.run(["ip", *text.split()], check=True)
        for address in ("10.0.0.1/24", "10.0.0.55/24", "fd00::1/64", "fd00::55/64"):
            ip(f"address add {address} dev lo" + (" nodad" if ":" in address else ""))
        for family, source, other in (("ip", "10.0.0.1", "10.0.0.55"), ("ip6", "fd00::1", "fd00::55")):
            rule = f"{family} saddr {source} snat to {other}"
            chain = f"chain out {{ type nat hook postrouting priority srcnat; {rule}; }};"
            subprocess.run(["nft", f"table {family} nat {{ {chain} }}"], check=True)
        def was(packet): return ip_address(Conntrack().original_source(packet))
"""


@pytest.mark.requirement("ERR-02")
@pytest.mark.parametrize(
    ("source", "translated", "far"), [("10.0.0.1", "10.0.0.55", "127.0.0.1"), ("fd00::1", "fd00::55", "::1")]
)
def test_original_source_of_translated_datagram_is_found(source: str, translated: str, far: str) -> None:
    code = f"""
        family = socket.AF_INET6 if ":" in "{far}" else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as near, socket.socket(family, socket.SOCK_DGRAM) as other:
            other.bind(("{far}", 9)); near.bind(("{source}", 0))
            near.sendto(b"hello", ("{far}", 9)); port = other.recvfrom(10)[1][1]
            print(was(ip_packet("{translated}", "{far}", udp(port, 9))))
            print(was(ip_packet("{translated}", "{far}", udp(port, 10))))
    """
    assert run_in_sandbox(SETUP, code) == f"{source}\n{translated}\n"


@pytest.mark.requirement("ERR-02")
def test_original_source_of_translated_echo_request_is_found() -> None:
    code = """
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as near:
            near.bind(("10.0.0.1", 0)); near.sendto(bytes([8, 0, 0xee, 0xf7, 9, 8, 0, 0]), ("127.0.0.1", 0))
        print(was(ip_packet("10.0.0.55", "127.0.0.1", bytes([8, 0, 0, 0, 9, 8, 0, 0]), protocol=1)))
    """
    assert run_in_sandbox(SETUP, code) == "10.0.0.1\n"


@pytest.mark.parametrize("payload", ["b''", "b'short'", "bytes([0, 0, 0, 0, 9, 8, 0, 0])"])
def test_source_is_unchanged_without_conntrack_entry(payload: str) -> None:
    code = f"""
        print(was(ip_packet("10.0.0.55", "127.0.0.1", {payload}, protocol=1)))
    """
    assert run_in_sandbox(SETUP, code) == "10.0.0.55\n"
