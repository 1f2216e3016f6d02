"""Check that captures hold every datagram, and that Wireshark decrypts them."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness import DATA, V4_OF_A, V4_OF_B, V6_OF_A, V6_OF_B, Capture, Drop, Unsupported, ping, tcp_stream
from harness.install.packages import install_command

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Pair, Tunnel, Wire

STREAM = 64 << 10


def tshark(path: Path, display_filter: str, *fields: str) -> list[list[str]]:
    """Return these fields of the packets that match the filter, by tshark with its default settings."""
    argv = ["tshark", "-r", str(path), "-Y", display_filter, "-T", "fields", "-E", "occurrence=l"]
    argv += [word for field in fields for word in ("-e", field)]
    env = {"HOME": str(path.parent), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    printed = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    return [line.split("\t") for line in printed.splitlines()]


@pytest.fixture
def wireshark() -> None:
    if shutil.which("tshark") is None:
        pytest.skip(f"tshark is not installed; to install it: {install_command(['tshark'])}")


@pytest.fixture
def revealing(pair: Pair) -> None:
    """At least one program of the pair logs its keys."""
    if not (pair.a.key_log or pair.b.key_log):
        raise Unsupported(f"neither {pair.a.name} nor {pair.b.name} logs its keys")


@pytest.mark.usefixtures("wireshark", "revealing")
def test_wireshark_decrypts_capture_of_wire_with_embedded_keys(wired: Tunnel) -> None:
    wired.must_ping("ns1", V4_OF_B)
    wired.must_ping("ns2", V6_OF_A)
    wired.lab.save_captures()
    path = wired.lab.directory / "ns1-ns2.pcapng"
    # The file has each packet twice: as one node sent it, and as the other received it.
    v4 = tshark(path, "wg && icmp", "ip.src", "ip.dst", "icmp.type", "frame.interface_name")
    ends = ["ns1-veth1", "ns2-veth2"]
    assert [row for row in v4 if row[3] == ends[0]] == [
        [V4_OF_A, V4_OF_B, "8", ends[0]],
        [V4_OF_B, V4_OF_A, "0", ends[0]],
    ]
    assert [row[3] for row in v4] == [*ends, *ends[::-1]]
    v6 = tshark(path, "wg && icmpv6.type in {128, 129} && frame.interface_id == 1", "ipv6.src", "ipv6.dst")
    assert v6 == [[V6_OF_B, V6_OF_A], [V6_OF_A, V6_OF_B]]


@pytest.mark.usefixtures("wireshark", "revealing")
def test_wireshark_decrypts_capture_of_link_with_embedded_keys(nat: Tunnel) -> None:
    nat.must_ping("ns1", V4_OF_B)
    nat.lab.save_captures()
    for name in ("ns1-vethc", "ns0-vethrs"):
        inner = tshark(nat.lab.directory / f"{name}.pcapng", "wg && icmp", "ip.src", "icmp.type")
        assert inner == [[V4_OF_A, "8"], [V4_OF_B, "0"]]


@pytest.mark.usefixtures("wireshark")
def test_wireshark_shows_initiator_key_from_configured_keys(loopback: Tunnel) -> None:
    loopback.must_ping("ns1", V4_OF_B)
    loopback.lab.save_captures()
    path = loopback.lab.directory / "ns0-lo.pcapng"
    assert tshark(path, "wg.type == 1", "wg.static") == [[str(loopback.pub_a)]]


@pytest.mark.usefixtures("wireshark")
def test_wire_verdict_is_written_as_packet_comment(wired: Tunnel, wire: Wire) -> None:
    wired.must_ping("ns1", V4_OF_B)
    wire.apply(Drop(message="data", nth=2))
    pings = ping(wired.nodes["ns1"], V4_OF_B, timeout=0.2)
    assert pings.lost == 1
    wire.wait_for("data", "B's answer", nth=2)
    wired.lab.save_captures()
    rows = tshark(wired.lab.directory / "ns1-ns2.pcapng", "frame.comment", "wg.type", "udp.srcport", "frame.comment")
    assert rows == [["4", "2", "dropped: data 2 (rule 1: drop message=data nth=2)"]]


def test_capture_contains_every_datagram_sent_in_batches(loopback: Tunnel) -> None:
    with Capture(loopback.nodes["ns0"], "lo") as capture:
        loopback.must_ping("ns1", V4_OF_B)
        tcp_stream(loopback.nodes["ns1"], loopback.nodes["ns2"], V4_OF_B, size=STREAM)
        if capture.unsplit:
            pytest.skip(
                f"this kernel does not report the segment size of {capture.unsplit} superframes; Linux 6.2 does"
            )
        # A session's first counter is 0, be it a keepalive or the ping.
        counters = [message.counter for message in capture.messages(kind=DATA, port=1)]
    assert counters == list(range(len(counters)))
    assert len(counters) > STREAM // 1420
