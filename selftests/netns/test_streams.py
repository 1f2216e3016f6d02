"""Send TCP and UDP streams, one and many at a time: they arrive intact (`loopback`)."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from harness import (
    V4_OF_A,
    V4_OF_B,
    V6_OF_A,
    V6_OF_B,
    Endpoint,
    must_carry_everything,
    must_stream_udp,
    tcp_stream,
    tcp_streams,
    volume,
)
from harness.install.packages import install_command

if TYPE_CHECKING:
    from harness import Tunnel

DEFAULT, JUMBO = 1420, 34816 - 1500 + 1420
MTU_13 = pytest.mark.requirement("MTU-13")
V4, V6 = ("127.0.0.1:1", "127.0.0.1:2"), ("[::1]:1", "[::1]:2")


@pytest.mark.scenario("N04")
def test_tcp_stream_from_ns1_arrives_intact_over_inner_ipv4(loopback: Tunnel) -> None:
    tcp_stream(loopback.nodes["ns1"], loopback.nodes["ns2"], V4_OF_B, size=volume())


@pytest.mark.scenario("N04")
def test_tcp_stream_from_ns2_arrives_intact_over_inner_ipv6(loopback: Tunnel) -> None:
    tcp_stream(loopback.nodes["ns2"], loopback.nodes["ns1"], V6_OF_A, size=volume())


@pytest.mark.scenario("N05")
@pytest.mark.requirement("Q-06")
@pytest.mark.parametrize(
    ("sender", "address"),
    [pytest.param("ns2", V4_OF_A, id="B-to-A-v4"), pytest.param("ns1", V6_OF_B, id="A-to-B-v6")],
)
def test_unpaced_udp_stream_arrives_and_leaves_tunnel_working(loopback: Tunnel, sender: str, address: str) -> None:
    must_stream_udp(loopback, sender, address)


@pytest.mark.scenario("N06")
@pytest.mark.parametrize("count", [4, 5, 50])
def test_parallel_tcp_streams_all_arrive_intact(loopback: Tunnel, count: int) -> None:
    tcp_streams(loopback.nodes["ns1"], loopback.nodes["ns2"], V4_OF_B, count=count, size=volume())


@pytest.mark.scenario("N04")
@pytest.mark.parametrize("address", [V4_OF_B, V6_OF_B], ids=["v4", "v6"])
def test_iperf3_sends_requested_bytes_through_tunnel(loopback: Tunnel, address: str) -> None:
    if shutil.which("iperf3") is None:
        pytest.skip(f"iperf3: not installed; to install it: {install_command(['iperf3'])}")
    size = volume()
    server = loopback.nodes["ns2"].spawn(
        ["iperf3", "-s", "-1", "--forceflush"], log=loopback.lab.directory / "iperf3.log"
    )
    loopback.lab.undo(server.close)
    loopback.lab.undo(server.kill)
    server.says("Server listening")
    client = loopback.nodes["ns1"].run(["iperf3", "-J", "-c", address, "-n", str(size)], deadline=30)
    end = json.loads(client.stdout)["end"]
    assert end["sum_sent"]["bytes"] >= size
    # iperf3 stops when all is sent, and does not count the bytes in flight.
    assert end["sum_received"]["bytes"] > 0


@pytest.mark.parametrize(
    ("endpoints", "mtu"),
    [
        pytest.param(V4, DEFAULT, marks=pytest.mark.scenario("N08"), id="outer-v4-1420"),
        pytest.param(V4, JUMBO, marks=[pytest.mark.scenario("N09"), MTU_13], id="outer-v4-34736"),
        pytest.param(V6, DEFAULT, marks=pytest.mark.scenario("N10"), id="outer-v6-1420"),
        pytest.param(V6, JUMBO, marks=[pytest.mark.scenario("N11"), MTU_13], id="outer-v6-34736"),
    ],
)
@pytest.mark.capability("ipv6-underlay")
def test_traffic_set_passes_over_each_outer_family_and_mtu(
    loopback: Tunnel, endpoints: tuple[str, str], mtu: int
) -> None:
    for side in (loopback.a, loopback.b):
        side.place.set_link(side.name, mtu=mtu)
    loopback.a.set_peer(loopback.pub_b, endpoint=Endpoint.parse(endpoints[1]))
    loopback.b.set_peer(loopback.pub_a, endpoint=Endpoint.parse(endpoints[0]))
    must_carry_everything(loopback)
    assert [str(side.endpoint) for side in (loopback.seen_by_b(), loopback.seen_by_a())] == list(endpoints)
