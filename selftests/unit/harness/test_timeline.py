"""Merge steps, messages and logs into one text by time."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from harness.lab.timeline import Entry, of_log, of_recording, of_steps, timeline
from harness.steps import Step
from harness.wire.capture import Recording
from harness.wire.messages import DATA, INITIATION
from harness.wire.pcapng import Packet
from selftests.support.packets import ip_packet, udp

if TYPE_CHECKING:
    import pytest

MS = 1_000_000
SECOND = 1000 * MS
DAY = 86_400 * SECOND
INITIATING = struct.pack("<I", INITIATION).ljust(148, b"\1")


def data(counter: int) -> bytes:
    return struct.pack("<IIQ", DATA, 7, counter).ljust(48, b"\1")


def packet(time: int, payload: bytes, *, comment: str = "", back: bool = False) -> Packet:
    ports = (2, 1) if back else (1, 2)
    ends = ("10.0.0.2", "10.0.0.1") if back else ("10.0.0.1", "10.0.0.2")
    frame = bytes(12) + b"\x08\0" + ip_packet(*ends, udp(*ports, payload))
    return Packet(0, time, frame, is_outbound=True, comment=comment)


def words(*frames: tuple[Packet, str, str]) -> list[tuple[int, str]]:
    return [(entry.time, entry.text) for entry in of_recording(Recording("link", list(frames), None))]


def test_entries_are_printed_by_time_with_new_day_and_more_lines() -> None:
    text = timeline(
        [
            Entry(DAY + 2 * SECOND + 5000, "ns1-wg0", "|", "up"),
            Entry(DAY - SECOND, "ns1", "$", "cat <<EOF\ntext"),
            Entry(DAY + SECOND, "", "$", "wait"),
        ]
    )
    assert text.splitlines()[2:] == [
        "# 1970-01-01",
        "23:59:59.000000  ns1      $ cat <<EOF",
        "                            text",
        "# 1970-01-02",
        "00:00:01.000000           $ wait",
        "00:00:02.000005  ns1-wg0  | up",
    ]


def test_middle_of_long_timeline_is_left_out() -> None:
    lines = timeline(Entry(number, "x", "|", f"line {number}") for number in range(3004)).splitlines()
    assert lines.count("# 4 entries left out") == 1
    assert lines[lines.index("# 4 entries left out") - 1].endswith("line 999")
    assert lines[lines.index("# 4 entries left out") + 1].endswith("line 1004")


def test_steps_that_read_evidence_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 5)
    steps = [Step("ns1", text) for text in ("ip link", "ip address")]
    steps[1].section = "reading"
    (entry,) = of_steps(steps, until="reading")
    assert entry[:3] == (5, "ns1", "$")
    assert entry.text.startswith("ip link")


def test_message_is_listed_with_its_sender_and_decision() -> None:
    assert words(
        (packet(1, INITIATING, comment="dropped: initiation 1"), "ns1", "ns2"),
        (packet(2, data(3), back=True), "ns2", "ns1"),
    ) == [
        (1, "ns1: 10.0.0.1 1 > 10.0.0.2 2: initiation, 148 bytes   # dropped: initiation 1"),
        (2, "ns2: 10.0.0.2 2 > 10.0.0.1 1: data 3, 48 bytes"),
    ]


def test_message_that_wire_delivers_is_listed_if_changed() -> None:
    assert words((packet(1, INITIATING), "", "ns2"), (packet(2, INITIATING, comment="injected"), "", "ns2")) == [
        (2, "to ns2: 10.0.0.1 1 > 10.0.0.2 2: initiation, 148 bytes   # injected")
    ]


def test_frame_that_is_no_datagram_is_not_listed() -> None:
    assert words((Packet(0, 1, bytes(60), is_outbound=True), "ns1", "ns2")) == []


def test_long_run_of_data_in_one_direction_is_one_entry() -> None:
    there = [(packet(number * MS, data(number)), "ns1", "ns2") for number in range(5)]
    back = [(packet((10 + number) * MS, data(number), back=True), "ns2", "ns1") for number in range(3)]
    late = [(packet((900 + number) * MS, data(9 + number), back=True), "ns2", "ns1") for number in range(2)]
    assert words(*there, *back, *late) == [
        (0, "ns1: 10.0.0.1 1 > 10.0.0.2 2: 5 data messages, counters 0 to 4, 240 bytes in 0.004 s"),
        *(
            (one.time, f"ns2: 10.0.0.2 2 > 10.0.0.1 1: data {number}, 48 bytes")
            for number, (one, *_) in enumerate(back)
        ),
        *(
            (one.time, f"ns2: 10.0.0.2 2 > 10.0.0.1 1: data {9 + number}, 48 bytes")
            for number, (one, *_) in enumerate(late)
        ),
    ]


def test_line_of_log_without_time_follows_line_before() -> None:
    lines = [(0, "before any"), (5, "first"), (0, "second"), (9, "third")]
    assert [(entry.time, entry.text) for entry in of_log("a", lines)] == [(5, "first"), (5, "second"), (9, "third")]
