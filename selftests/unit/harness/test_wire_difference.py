"""Check the first difference of two captures: who sends what, how long, when, and to where."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from harness.net.checksum import checksum
from harness.report.wire_difference import compare, difference, look
from harness.wire import pcapng
from harness.wire.compare import read_messages
from harness.wire.messages import NANOSECONDS, Message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

A, B = ("10.0.0.1", 1), ("10.0.0.2", 2)
INITIATION = b"\x01\0\0\0" + bytes.fromhex("0a0a0a0a") + bytes(140)
RESPONSE = b"\x02\0\0\0" + bytes.fromhex("0b0b0b0b0a0a0a0a") + bytes(80)
COOKIE = b"\x03\0\0\0" + bytes.fromhex("0a0a0a0a") + bytes(56)
KEEPALIVE_OF_A = b"\x04\0\0\0" + bytes.fromhex("0b0b0b0b") + bytes(24)
END = ("10.0.0.9", 999)


def data(counter: int, size: int = 128, receiver: str = "0b0b0b0b") -> bytes:
    return b"\x04\0\0\0" + bytes.fromhex(receiver) + struct.pack("<Q", counter) + bytes(size - 16)


def message(
    payload: bytes, at: float = 0.0, source: tuple[str, int] = A, destination: tuple[str, int] | None = None
) -> Message:
    to = destination or (B if source == A else A)
    return Message(time=round((1000 + at) * NANOSECONDS), source=source, destination=to, payload=payload)


def by_b(payload: bytes, at: float = 0.0) -> Message:
    return message(payload, at, B)


HANDSHAKE = [message(INITIATION), by_b(RESPONSE, 0.1), message(data(0), 0.2)]


def found(reference: Sequence[Message], seen: Sequence[Message]) -> str:
    return compare(look(reference), look(seen), named="refwg~refwg")


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (HANDSHAKE, ""),
        ([message(INITIATION), message(INITIATION, 5.0)],
         "message 2: in refwg~refwg B sends a response, here A sends the initiation again after 5.0 s"),
        # The assertion that fails ends the test, and so what is sent.
        (HANDSHAKE[:1], ""),
        ([message(INITIATION[:-1] + b"\x01")],
         "message 1: in refwg~refwg A sends an initiation without a mac2, here with a mac2"),
        ([*HANDSHAKE, by_b(COOKIE, 0.3)],
         "message 4: in refwg~refwg nothing more is sent, here B sends a cookie reply"),
        ([*HANDSHAKE[:2], message(KEEPALIVE_OF_A, 0.2)],
         "message 3: in refwg~refwg A sends data, here A sends a keepalive"),
        ([*HANDSHAKE[:2], message(data(0, 144), 0.2)],
         "message 3: in refwg~refwg A sends data of 128 bytes, here it has 144 bytes"),
        ([*HANDSHAKE[:2], message(data(1), 0.2)],
         "message 3: in refwg~refwg A sends data with counter 0, here with counter 1"),
        ([*HANDSHAKE[:2], message(data(0), 0.2, A, END)],
         "message 3: in refwg~refwg A sends data from 10.0.0.1:1 to 10.0.0.2:2, here from 10.0.0.1:1 to 10.0.0.9:999"),
        ([*HANDSHAKE[:2], message(data(0), 4.3)],
         "message 3: in refwg~refwg A sends data 0.1 s after the message before, here 4.2 s after it"),
        ([message(INITIATION[:-1] + b"\x01"), *HANDSHAKE[1:]],
         "message 1: in refwg~refwg A sends an initiation without a mac2, here with a mac2"),
        ([message(b"\x01\0\x01\0" + INITIATION[4:])],
         ("message 1: in refwg~refwg A sends an initiation, here A sends 148 bytes with type word 01000100, "
          "which are not a WireGuard message")),
    ],
)  # fmt: skip
def test_first_difference_is_named_in_words_of_protocol(seen: list[Message], text: str) -> None:
    assert found(HANDSHAKE, seen) == text


def test_initiation_after_response_is_new_one() -> None:
    text = found([*HANDSHAKE, message(data(1), 0.3)], [*HANDSHAKE, message(INITIATION, 0.3)])
    assert text == "message 4: in refwg~refwg A sends data, here A sends an initiation"


def test_time_may_differ_by_second_or_half() -> None:
    late = [*HANDSHAKE, message(data(1), 10.0)]
    assert found(late, [*HANDSHAKE, message(data(1), 14.0)]) == ""
    assert found(HANDSHAKE, [*HANDSHAKE[:2], message(data(0), 1.0)]) == ""


def test_messages_that_cross_are_equal_in_either_order() -> None:
    one, other = message(data(1), 0.30), by_b(data(0, receiver="0a0a0a0a"), 0.31)
    assert found([*HANDSHAKE, one, other], [*HANDSHAKE, other, one]) == ""
    late = by_b(data(0, receiver="0a0a0a0a"), 0.9)
    assert found([*HANDSHAKE, one, late], [*HANDSHAKE, late, one]).startswith("message 4: ")


def test_side_is_known_by_port_or_receiver_index() -> None:
    roamed = message(data(1), 0.3, END, ("10.0.0.8", 888))
    unknown = message(data(1, receiver="0c0c0c0c"), 0.3, END, ("10.0.0.8", 888))
    assert [sight.side for sight in look([*HANDSHAKE, roamed, unknown])] == ["A", "B", "A", "A", ""]
    # A scripted peer has any port, and the device under test port 1.
    assert look([message(INITIATION, 0.0, END, A)])[0].side == "B"
    assert found(HANDSHAKE[:2], [HANDSHAKE[0], unknown]) == (
        "message 2: in refwg~refwg B sends a response, here a third side sends data"
    )


def test_random_ports_are_no_difference() -> None:
    runs = [[message(INITIATION, 0.0, ("::1", port), ("::1", 1)), message(RESPONSE, 0.0, ("::1", 1), ("::1", port))]
            for port in (4000, 5000)]  # fmt: skip
    assert found(*runs) == ""
    assert look(runs[0])[0].way == "from [::1]:4000 to [::1]:1"


# Captures


def frame(sent_message: Message) -> bytes:
    """The message as an Ethernet frame, over IPv4."""
    size = len(sent_message.payload)
    addresses = b"".join(bytes(map(int, end[0].split("."))) for end in (sent_message.source, sent_message.destination))
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + size, 0, 0, 64, 17, 0) + addresses
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    ports = struct.pack("!HHHH", sent_message.source[1], sent_message.destination[1], 8 + size, 0)
    return bytes(12) + b"\x08\0" + header + ports + sent_message.payload


def save(path: Path, messages: Sequence[Message], *, ends: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    packets = [pcapng.Packet(0, sent.time, frame(sent), is_outbound=sent.source == A) for sent in messages]
    # What a wire passes on, it records at the other end, too.
    copies = [pcapng.Packet(1, sent.time, frame(sent), is_outbound=False) for sent in messages if ends > 1]
    pcapng.save(path, [pcapng.End(f"end{n}") for n in range(ends)], [*packets, *copies], keys="KEY", comment="seed 7")


def test_captures_of_two_runs_are_compared(tmp_path: Path) -> None:
    save(tmp_path / "one" / "ns1-veth1.pcapng", HANDSHAKE)
    save(tmp_path / "other" / "ns1-veth1.pcapng", [message(INITIATION), message(INITIATION, 5.0)])
    assert difference(tmp_path / "one", tmp_path / "other", named="refwg", b="the peer") == (
        "message 2: in refwg the peer sends a response, here A sends the initiation again after 5.0 s"
    )
    assert difference(tmp_path / "one", tmp_path / "one", named="refwg") == (
        "no difference that shows without keys in 3 messages"
    )


def test_capture_is_named_if_there_are_several(tmp_path: Path) -> None:
    for folder, messages in (("one", HANDSHAKE), ("other", [HANDSHAKE[0], message(INITIATION, 5.0)])):
        save(tmp_path / folder / "a.pcapng", HANDSHAKE[:1])
        save(tmp_path / folder / "b.pcapng", messages)
    assert difference(tmp_path / "one", tmp_path / "other", named="refwg").startswith("b: message 2: ")


def test_nothing_is_reported_if_failing_run_only_ends_earlier(tmp_path: Path) -> None:
    for folder, messages in (("one", HANDSHAKE), ("other", HANDSHAKE[:2])):
        save(tmp_path / folder / "a.pcapng", messages)
        save(tmp_path / folder / "b.pcapng", HANDSHAKE[:1])
    assert difference(tmp_path / "one", tmp_path / "other", named="refwg") == ""
    save(tmp_path / "other" / "b.pcapng", [message(data(0))])
    assert difference(tmp_path / "one", tmp_path / "other", named="refwg").startswith("b: message 1: ")


def test_nothing_is_reported_without_comparable_captures(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        save(tmp_path / folder / "empty.pcapng", [])
    save(tmp_path / "other" / "only-here.pcapng", HANDSHAKE)
    (tmp_path / "one" / "broken.pcapng").write_bytes(b"\0" * 9)
    save(tmp_path / "other" / "broken.pcapng", HANDSHAKE)
    assert difference(tmp_path / "one", tmp_path / "other", named="refwg") == ""


def test_wire_counts_each_message_once_where_it_left(tmp_path: Path) -> None:
    save(tmp_path / "w" / "wire.pcapng", HANDSHAKE[::2], ends=2)
    assert [each.payload for each in read_messages(tmp_path / "w" / "wire.pcapng")] == [INITIATION, data(0)]


def test_frames_that_are_no_datagrams_are_left_out(tmp_path: Path) -> None:
    arp = pcapng.Packet(0, 1, bytes(12) + b"\x08\x06" + bytes(28), is_outbound=True)
    pcapng.save(tmp_path / "a.pcapng", [pcapng.End("a")], [arp])
    assert read_messages(tmp_path / "a.pcapng") == []
