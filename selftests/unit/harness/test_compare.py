"""Check the comparison of two captures: what is equal from run to run, and what a difference is called."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from harness.wire import pcapng
from harness.wire.compare import differences, read_messages
from harness.wire.messages import Message

if TYPE_CHECKING:
    from pathlib import Path

A, B, C = ("10.0.0.1", 1), ("10.0.0.2", 2), ("fd00::3", 3)
INITIATION = Message(time=0, source=A, destination=B, payload=b"\x01" + bytes(147))
RESPONSE = Message(time=1, source=B, destination=A, payload=b"\x02" + bytes(3) + b"12345678" + bytes(80))
COOKIE = Message(time=1, source=B, destination=A, payload=b"\x03" + bytes(63))


def data(counter: int, size: int = 128, source: tuple[str, int] = A, destination: tuple[str, int] = B) -> Message:
    payload = struct.pack("<IIQ", 4, 7, counter).ljust(size, b"x")
    return Message(time=2, source=source, destination=destination, payload=payload)


def renewed(message: Message, source: tuple[str, int], destination: tuple[str, int]) -> Message:
    """The same message of another run: other time, index, ends."""
    payload = message.payload[:4] + b"\x99" * 4 + message.payload[8:]
    return Message(time=message.time + 5, source=source, destination=destination, payload=payload)


def test_runs_that_differ_in_times_indexes_and_ports_are_equal() -> None:
    good = [INITIATION, RESPONSE, data(0)]
    x, y = ("10.0.0.1", 40000), ("10.0.0.2", 50000)
    bad = [renewed(good[0], x, y), renewed(good[1], y, x), renewed(good[2], x, y)]
    assert differences(good, bad) == []


def test_other_length_is_counted_and_shown_where_it_begins() -> None:
    good, bad = [INITIATION, data(0), data(1)], [INITIATION, data(0, 116), data(1, 116)]
    assert differences(good, bad) == [
        "10.0.0.1:1 > 10.0.0.2:2: data of 128 bytes: good 2, bad 0",
        "10.0.0.1:1 > 10.0.0.2:2: data of 116 bytes: good 0, bad 2",
        "first difference after 1 equal messages:",
        "  good: 10.0.0.1:1 > 10.0.0.2:2: data of 128 bytes, counter 0",
        "  good: 10.0.0.1:1 > 10.0.0.2:2: data of 128 bytes, counter 1",
        "  bad:  10.0.0.1:1 > 10.0.0.2:2: data of 116 bytes, counter 0",
        "  bad:  10.0.0.1:1 > 10.0.0.2:2: data of 116 bytes, counter 1",
    ]


@pytest.mark.parametrize(
    ("good", "bad", "lines"),
    [
        ([INITIATION, RESPONSE], [INITIATION], ["  good: {b}: response of 92 bytes", "  bad:  nothing more"]),
        ([INITIATION], [INITIATION, RESPONSE], ["  bad:  {b}: response of 92 bytes", "  good: nothing more"]),
        (
            [INITIATION, RESPONSE, data(0)],
            [INITIATION, data(0)],
            ["  good: {b}: response of 92 bytes", "  bad:  {a}: data of 128 bytes, counter 0"],
        ),
        (
            [INITIATION, data(0)],
            [INITIATION, COOKIE, data(0)],
            ["  bad:  {b}: cookie reply of 64 bytes", "  good: {a}: data of 128 bytes, counter 0"],
        ),
        (
            [data(0), data(1)],
            [data(0), data(2)],
            ["  good: {a}: data of 128 bytes, counter 1", "  bad:  {a}: data of 128 bytes, counter 2"],
        ),
    ],
)
def test_message_on_one_side_is_shown_beside_next_one(
    good: list[Message], bad: list[Message], lines: list[str]
) -> None:
    names = {"a": "10.0.0.1:1 > 10.0.0.2:2", "b": "10.0.0.2:2 > 10.0.0.1:1"}
    assert differences(good, bad)[-len(lines) :] == [line.format(**names) for line in lines]


def test_answer_from_other_address_is_shown_with_addresses() -> None:
    good, bad = [INITIATION, data(0, source=C)], [INITIATION, data(0)]
    assert "10.0.0.1:1 > 10.0.0.2:2: data of 128 bytes: good 0, bad 1" in differences(good, bad)
    assert "[fd00::3]:3 > 10.0.0.2:2: data of 128 bytes: good 1, bad 0" in differences(good, bad)


def test_ends_are_numbered_if_they_differ_from_run_to_run() -> None:
    x, y = ("10.0.0.1", 40000), ("10.0.0.2", 50000)
    found = differences([INITIATION, data(0)], [renewed(INITIATION, x, y), data(0, 116, x, y)])
    assert "end 1 > end 2: data of 116 bytes: good 0, bad 1" in found


def test_initiation_with_mac2_differs_from_one_without() -> None:
    with_mac2 = Message(time=0, source=A, destination=B, payload=INITIATION.payload[:-16] + b"m" * 16)
    assert differences([INITIATION], [with_mac2])[-1].endswith(": initiation of 148 bytes, with mac2")


def frame(payload: bytes, *, fragment: bool = False) -> bytes:
    """An Ethernet frame with a UDP datagram from A to B; fragment: the first piece of a larger one."""
    udp = struct.pack("!HHHH", 1, 2, 8 + len(payload), 0) + payload
    more = 0x2000 if fragment else 0
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, more, 64, socket.IPPROTO_UDP, 0)
    return bytes(12) + b"\x08\x00" + header + socket.inet_aton(A[0]) + socket.inet_aton(B[0]) + udp


def test_saved_capture_is_read_with_each_message_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    packets = [
        pcapng.Packet(0, 1 << 33 | 5, frame(INITIATION.payload), is_outbound=True, comment="odd"),
        pcapng.Packet(1, 1 << 33 | 6, frame(INITIATION.payload), is_outbound=False),
        pcapng.Packet(0, 7, frame(b"x" * 16, fragment=True), is_outbound=True),
        pcapng.Packet(0, 8, bytes(12) + b"\x08\x06" + bytes(28), is_outbound=True),
    ]
    pcapng.save(path, [pcapng.End("a"), pcapng.End("b")], packets, keys="k", comment="c")
    found = read_messages(path)
    assert [(message.time, message.source, message.destination, message.payload) for message in found] == [
        (1 << 33 | 5, A, B, INITIATION.payload)
    ]


def test_capture_of_one_end_has_messages_of_both_directions(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    there, back = (
        pcapng.Packet(0, 1, frame(b"1" * 40), is_outbound=True),
        pcapng.Packet(0, 2, frame(b"2" * 40), is_outbound=False),
    )
    pcapng.save(path, [pcapng.End("a")], [there, back])
    assert [message.payload[:1] for message in read_messages(path)] == [b"1", b"2"]


def test_capture_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    pcapng.save(path, [pcapng.End("a")], [pcapng.Packet(0, 1, frame(b"1" * 40), is_outbound=True)])
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match="block at byte "):
        read_messages(path)
