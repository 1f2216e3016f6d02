"""Check that what a lab's captures have recorded is judged, and what is left out: replays, losses, filtered sends."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from harness import (
    DIRECT,
    LOOPBACK,
    V4_OF_A,
    V4_OF_B,
    WIRED,
    Capture,
    DeviceConfig,
    Drop,
    Endpoint,
    Tunnel,
    let_pass,
    ping,
)
from harness.implementations.registry import Registry
from harness.lab.judged import judge
from harness.net.stamps import SO_TIMESTAMPNS
from harness.wire import capture as capture_module
from harness.wire.messages import NANOSECONDS, RESPONSE

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Lab, NetNS
    from harness.lab.judged import Judgement
    from harness.lab.topology import Topology

pytest_plugins = ["pytester"]

# Two tests of a program that leaves out every second counter, which no assertion notices.
TESTS = """
import pytest

@pytest.mark.parametrize("count", [2, 3])
def test_ping(loopback, count):
    loopback.must_ping("ns1", "192.168.241.2", count=count)
"""
PINGS = 3
# By requirement: a mutant that violates it, and what a test does that shows it to the oracle. DT-21 needs 180 s.
MUTANTS = {
    "CK-01": ("wrong-mac1", "ping"),
    "CK-02": ("mac2-is-copy-of-mac1", "ping"),
    "CR-11": ("leaves-out-tai64-epoch", "ping"),
    "CR-12": ("sends-exact-timestamps", "ping"),
    "CR-14": ("authenticates-header-of-data", "ping"),
    "CR-16": ("responds-with-same-ephemeral", "respond_twice"),
    "DT-01": ("skips-counters", "ping"),
    "DT-02": ("sends-own-index-in-data", "ping"),
    "HS-14": ("initiates-at-any-time", "ping_in_vain"),
    "HS-20": ("ignores-preshared-key", "respond_twice"),
    "HS-24": ("responder-sends-before-confirmation", "lose_confirmation"),
    "HS-39": ("initiates-with-static-as-ephemeral", "ping"),
    "MSG-01": ("initiations-end-in-extra-byte", "ping"),
    "MSG-02": ("responses-end-in-extra-byte", "respond_twice"),
    "MSG-04": ("cuts-tag-of-keepalives", "keep_alive"),
    "MSG-05": ("marks-keepalives-in-reserved-bytes", "keep_alive"),
    "MSG-11": ("responds-to-own-index", "respond_twice"),
    "MSG-12": ("pads-nothing", "ping"),
    "MSG-15": ("answers-malformed-messages", "get_garbage"),
    "MSG-19": ("other-port-for-ipv6", "ping_over_ipv6"),
}
# One test for each mutant, which is A. It asserts nothing: the mutant may keep the tunnel from working.
OF_MUTANTS = """
import socket
from harness import LOOPBACK, WIRED, V4_OF_A, V4_OF_B, Drop, Endpoint, Tunnel, let_pass, ping

DEED = {deed!r}

def to_b(made, count=1): ping(made.nodes["ns1"], V4_OF_B, count=count, timeout=0.2)
def to_a(made): ping(made.nodes["ns2"], V4_OF_A, timeout=0.2)

def test_mutant(lab, pair):
    made = Tunnel(lab, WIRED if DEED == "lose_confirmation" else LOOPBACK, *pair)
    match DEED:
        case "ping":
            to_b(made, 3)
        case "respond_twice":
            for _ in range(2):
                to_a(made)
                made.nodes["ns2"].set_link("wg0", up=False)
                made.nodes["ns2"].set_link("wg0", up=True)
                let_pass(0.025, "a device refuses an initiation within 20 ms of the last one")
        case "ping_in_vain":
            made.nodes["ns2"].set_link("wg0", up=False)
            # For half a second after the link was set up, the oracle allows another initiation.
            to_b(made, 6)
        case "lose_confirmation":
            lab.wires[0].apply(Drop(message="data", sender="ns2"))
            to_a(made)
            to_b(made)
        case "keep_alive":
            to_b(made)
            made.keep_alive(1)
            lab.captures[0].wait_for(lambda m: m.source[1] == 1 and len(m.payload) < 48, 5, "a keepalive of A")
        case "get_garbage":
            with made.nodes["ns0"].socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(bytes([9]) * 40, ("127.0.0.1", 1))
            to_b(made)
        case "ping_over_ipv6":
            made.a.set_peer(made.pub_b, endpoint=Endpoint("::1", 2))
            to_b(made)
"""


def tunnel(lab: Lab, topology: Topology, a: str = "refwg", b: str = "refwg") -> Tunnel:
    known = Registry()
    return Tunnel(lab, topology, known.get(a), known.get(b))


def violations(judgement: Judgement) -> list[tuple[str, str]]:
    return [(finding.requirement, interface.role) for interface, finding in judgement.findings]


def states(folder: Path) -> dict[str, dict[str, Any]]:
    entries = json.loads((folder / "report" / "results.json").read_text())["results"]
    return {entry["id"]: entry for entry in entries}


@pytest.mark.usefixtures("inner_pytest")
def test_violation_is_result_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    run = pytester.runpytest_inprocess("--pair", "refwg+skips-counters~refwg", "--junit-xml", "junit.xml")
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    results = states(pytester.path)
    tests = [entry for name, entry in results.items() if name.startswith("test_")]
    assert [entry["state"] for entry in tests] == ["passed", "passed"]
    failed = {name: entry for name, entry in results.items() if entry["state"] == "failed"}
    ((name, entry),) = failed.items()
    assert name == "oracle::DT-01[refwg+skips-counters~refwg-a]"
    assert "sent data with counter 2, where 1 was next (ns0-lo.pcapng, frame " in entry["message"]
    assert entry["message"].endswith(f"; in 2 tests, first in {tests[0]['id']}")
    # The evidence of the first test is kept, although it passed.
    assert entry["artifacts"] == tests[0]["artifacts"] != tests[1]["artifacts"] == ""
    evidence = pytester.path / "report" / entry["artifacts"]
    assert {"ns0-lo.pcapng", "oracle.txt"} <= {path.name for path in evidence.iterdir()}
    assert results["oracle::DT-01[refwg+skips-counters~refwg-b]"]["state"] == "passed"
    assert "DT-01[refwg+skips-counters~refwg-a]" in (pytester.path / "junit.xml").read_text()
    run.stdout.fnmatch_lines("FAILED oracle::DT-01*")


@pytest.mark.usefixtures("inner_pytest")
@pytest.mark.parametrize("requirement", MUTANTS)
def test_oracle_reports_mutant_that_violates(pytester: pytest.Pytester, requirement: str) -> None:
    mutant, deed = MUTANTS[requirement]
    pytester.makepyfile(OF_MUTANTS.format(deed=deed))
    pytester.runpytest_inprocess("--keep", "none", f"--pair=refwg+{mutant}~refwg")
    results = states(pytester.path)
    assert [entry["state"] for name, entry in results.items() if "::test_mutant" in name] == ["passed"]
    reported = {name for name, entry in results.items() if entry["state"] == "failed"}
    assert reported == {f"oracle::{requirement}[refwg+{mutant}~refwg-a]"}


@pytest.mark.parametrize("topology", [LOOPBACK, WIRED], ids=lambda topology: topology.name)
def test_every_datagram_of_both_ends_is_judged(lab: Lab, topology: Topology) -> None:
    made = tunnel(lab, topology)
    made.must_ping("ns1", V4_OF_B, count=PINGS)
    judgement = judge(lab)
    assert violations(judgement) == []
    # Of A an initiation and its requests, of B a response and its answers.
    for interface in (made.a, made.b):
        assert judgement.checked[interface, "MSG-15"] == 1 + PINGS
    assert (made.a, "MSG-11") not in judgement.checked
    assert judgement.checked[made.b, "HS-24"] == PINGS


def test_sender_at_far_end_of_link_is_judged(lab: Lab) -> None:
    made = tunnel(lab, DIRECT, b="refwg+skips-counters")
    for side, (node, device) in enumerate((("ns1", "veth1"), ("ns2", "veth2")), 1):
        made.nodes[node].add_address(device, f"10.0.0.{side}/24")
    made.a.set_peer(made.pub_b, endpoint=Endpoint("10.0.0.2", 2))
    made.must_ping("ns1", V4_OF_B, count=PINGS)
    assert violations(judge(lab)) == [("DT-01", "b")]


def test_filtered_sends_are_no_violation(lab: Lab) -> None:
    made = tunnel(lab, LOOPBACK)
    made.must_ping("ns1", V4_OF_B)
    made.nodes["ns0"].nft("table inet t { chain o { type filter hook output priority 0; udp sport 1 drop; }; }")
    assert ping(made.nodes["ns1"], V4_OF_B, count=1, timeout=0.2).lost
    made.nodes["ns0"].nft("flush ruleset")
    made.must_ping("ns1", V4_OF_B)
    judgement = judge(lab)
    assert judgement.checked[made.a, "DT-01"] == 2
    assert violations(judgement) == []


def test_replays_and_changes_of_wire_are_not_judged(lab: Lab) -> None:
    made = tunnel(lab, WIRED)
    (wire,) = lab.wires
    made.must_ping("ns1", V4_OF_B, count=PINGS)
    for sighting in wire.sightings():
        wire.replay(sighting)
        wire.replay(sighting, payload=bytes([9, *sighting.message.payload[1:]]))
        wire.reflect(sighting)
    wire.apply(Drop(message="data", nth=1))
    ping(made.nodes["ns1"], V4_OF_B, count=1, timeout=0.2)
    made.must_ping("ns2", V4_OF_A)
    assert violations(judge(lab)) == []


def test_interface_is_not_judged_after_unreadable_change(lab: Lab) -> None:
    made = tunnel(lab, LOOPBACK, a="refwg+skips-counters")
    made.must_ping("ns1", V4_OF_B)
    before = judge(lab).checked[made.a, "DT-01"]
    assert before == 1
    made.a.wg("addconf", "wg0", "/dev/stdin", stdin="[Interface]\n")
    made.must_ping("ns1", V4_OF_B, count=PINGS)
    judgement = judge(lab)
    assert judgement.checked[made.a, "DT-01"] == before
    assert judgement.checked[made.b, "DT-01"] == 1 + PINGS


def test_datagram_of_raw_socket_is_not_judged(lab: Lab) -> None:
    made = tunnel(lab, LOOPBACK)
    made.must_ping("ns1", V4_OF_B)
    before = judge(lab).checked[made.b, "MSG-15"]
    (response,) = lab.captures[0].messages(kind=RESPONSE)
    forged = struct.pack(">4H", 2, 1, 8 + len(response.payload), 0) + response.payload
    header = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0) + socket.inet_aton("127.0.0.1") * 2
    with made.nodes["ns0"].socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(header + forged, ("127.0.0.1", 0))
    made.must_ping("ns1", V4_OF_B)
    assert len(lab.captures[0].messages(kind=RESPONSE)) == 2
    judgement = judge(lab)
    assert violations(judgement) == []
    assert judgement.checked[made.b, "MSG-15"] == before


def test_change_by_wg_is_known_to_oracle(lab: Lab) -> None:
    made = tunnel(lab, LOOPBACK)
    made.must_ping("ns1", V4_OF_B)
    key = lab.key("another")
    made.a.wg("set", "wg0", "private-key", "/dev/stdin", "listen-port", "77", stdin=str(key))
    made.b.set(DeviceConfig(peers=(replace(made._peer(0), public_key=key.public(), preshared_key=made.psk),)))  # noqa: SLF001
    made.must_ping("ns1", V4_OF_B)
    judgement = judge(lab)
    assert judgement.checked[made.a, "MSG-19"] == 2
    assert violations(judgement) == []


def test_capture_marks_first_frame_after_loss(lab: Lab) -> None:
    node = lab.node("here")
    with Capture(node, "lo", buffer=1 << 14) as capture:
        flood(node, 100)
        assert 0 < len(capture.messages()) < 100
        flood(node, 2, b"late")
        recording = capture.recording()
    assert recording.intact
    is_late = [b"late" in packet.frame for packet, *_ in recording.frames]
    assert is_late == [False] * recording.intact + [True] * (len(is_late) - recording.intact)
    assert any(is_late)


def test_frame_that_was_stamped_when_read_precedes_next_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    node, told, late = lab.node("here"), capture_module._time_and_loss, iter([5 * NANOSECONDS // 2] * 3)  # noqa: SLF001

    def told_late(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, bool]:
        stamp, follows_loss = told(ancillary)
        return stamp + next(late, 0), follows_loss

    # What the kernel does to frames that come before its stamps are on; which those are is its own affair.
    monkeypatch.setattr(capture_module, "_time_and_loss", told_late)
    with Capture(node, "lo") as capture:
        flood(node, 5)
        messages = [message.time for message in capture.messages()]
        frames = [packet.time for packet, *_ in capture.recording().frames]
    assert next(late, None) is None
    assert (messages, frames) == (sorted(messages), sorted(frames))


def test_packet_is_stamped_before_any_socket_of_test_asks(lab: Lab) -> None:
    node = lab.node("here")
    with closing(node.socket(socket.AF_INET, socket.SOCK_DGRAM)) as receiver:
        receiver.bind(("127.0.0.1", 0))
        with closing(node.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.sendto(b"early", receiver.getsockname())
        sent = time.time_ns()
        let_pass(0.05, "a packet without a stamp gets one when it is read")
        receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        (_, _, data) = receiver.recvmsg(10, 64)[1][0]
    seconds, nanoseconds = struct.unpack("qq", data)
    assert seconds * NANOSECONDS + nanoseconds <= sent


def test_nothing_is_judged_after_first_lost_frame(lab: Lab) -> None:
    made = tunnel(lab, LOOPBACK)
    made.must_ping("ns1", V4_OF_B)
    before = judge(lab).checked[made.a, "MSG-15"]
    (capture,) = lab.captures
    while capture.recording().intact is None:
        flood(made.nodes["ns0"], 1000)
    made.must_ping("ns1", V4_OF_B, count=PINGS)
    assert judge(lab).checked[made.a, "MSG-15"] == before


def flood(node: NetNS, count: int, word: bytes = b"") -> None:
    """Send datagrams of 1400 bytes over the loopback device, faster than anybody reads the capture."""
    with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            sock.sendto(word.ljust(1400, b"x"), ("127.0.0.1", 9))
