"""Check reassembly: what a receiver takes for one datagram is one, in whatever order its fragments come."""

from __future__ import annotations

from itertools import permutations

import pytest

from harness.errors import UsageError
from harness.wire import frames
from harness.wire.fragments import MOST_BYTES, MOST_DATAGRAMS, TIMEOUT, Arrival, Fragments, Piece
from refwg.ip import internet_checksum
from selftests.support.fragments import ETHERNET, fragments, piece
from selftests.support.packets import ip_packet, udp

ADDRESSES = {0x0800: ("192.0.2.1", "192.0.2.2"), 0x86DD: ("fd00::1", "fd00::2")}
PAYLOAD = b"\4\0\0\0" + bytes(range(4, 200))
FAMILIES = pytest.mark.parametrize("ethertype", ADDRESSES, ids=["v4", "v6"])


def frame(ethertype: int, payload: bytes = PAYLOAD) -> bytes:
    packet = ip_packet(*ADDRESSES[ethertype], udp(1, 2, payload))
    return b"to-macby-mac" + ethertype.to_bytes(2) + packet


def arrive(gathering: Fragments, sent: list[bytes], side: int = 0, now: int = 0) -> list[Arrival]:
    """Let fragments arrive; return what waits no longer."""
    out = []
    for number, one in enumerate(sent):
        place = frames.read(one)
        assert isinstance(place, frames.Fragment)
        out += gathering.arrive(Piece(one, place, number), side, now)
    return [arrival for _, arrival in out]


@FAMILIES
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_datagram_is_whole_after_last_fragment_in_any_order(ethertype: int, order: tuple[int, ...]) -> None:
    whole = frame(ethertype)
    cut = [fragments(whole, 64, 128)[number] for number in order]
    gathering = Fragments()
    assert arrive(gathering, cut[:2]) == []
    (arrival,) = arrive(gathering, cut[2:])
    assert arrival.frames == tuple(cut)
    assert arrival.notes("data 5") == tuple(f"fragment {number + 1} of 3 of data 5" for number in order)
    assert (arrival.message(3).payload, arrival.message(3).source) == (PAYLOAD, (ADDRESSES[ethertype][0], 1))
    if ethertype == 0x0800:
        assert internet_checksum(arrival.frame[ETHERNET : ETHERNET + 20]) == 0
        # The flags and the identification differ from the frame that was cut, and so does the checksum.
        assert arrival.frame[ETHERNET + 20 :] == whole[ETHERNET + 20 :]
    else:
        assert arrival.frame == whole
    assert gathering.next_deadline() is None


@FAMILIES
def test_duplicate_fragment_belongs_to_its_datagram(ethertype: int) -> None:
    first, second, last = fragments(frame(ethertype), 64, 128)
    (arrival,) = arrive(Fragments(), [second, second, first, second, last])
    assert arrival.message(0).payload == PAYLOAD
    assert [note[9] for note in arrival.notes("data")] == ["2", "2", "1", "2", "3"]


@FAMILIES
def test_first_bytes_count_when_copy_is_shorter(ethertype: int) -> None:
    whole = frame(ethertype)
    forged = whole[:-100] + bytes(100)
    (arrival,) = arrive(Fragments(), [piece(whole, 64, 208), piece(forged, 128, 160), piece(whole, 0, 64)])
    assert arrival.message(0).payload == PAYLOAD


@FAMILIES
@pytest.mark.parametrize(
    "bounds",
    [
        [(0, 64), (56, 128)],
        [(64, 128), (0, 72)],
        [(64, 128), (0, 136)],
        # Behind the end, before and after the last fragment; and a second end.
        [(0, 64), (128, 192), (64, 128, False)],
        [(64, 128, False), (128, 192)],
        [(64, 128, False), (128, 192, False)],
    ],
)
def test_overlapping_fragments_make_no_datagram(ethertype: int, bounds: list[tuple[int, ...]]) -> None:
    """RFC 8200, 4.5; the kernel discards them for IPv4 too (inet_frag_queue_insert)."""
    whole = frame(ethertype)
    sent = [piece(whole, start, stop, more=not ends) for start, stop, *ends in bounds]
    gathering = Fragments()
    (arrival,) = arrive(gathering, sent)
    assert (arrival.trouble, arrival.frames, gathering.waiting) == ("overlapping", tuple(sent), 0)
    message = arrival.message(0)
    assert (message.kind, message.name) == (0, "fragment (overlapping)")
    assert arrival.notes(message.name) == ("fragment (overlapping)",) * len(sent)


@FAMILIES
def test_interleaved_datagrams_are_told_apart(ethertype: int) -> None:
    one, two = (fragments(frame(ethertype, PAYLOAD[:-4] + text), 64, identification=n) for n, text in enumerate(TEXTS))
    other_vlan = [part[:12] + b"\x81\x00\x00\x05" + part[12:] for part in one]
    gathering = Fragments()
    assert arrive(gathering, [one[0], two[1], other_vlan[1]]) == []
    assert arrive(gathering, [one[1]], side=1) == []
    assert [arrival.message(0).payload[-4:] for arrival in arrive(gathering, [two[0], one[1]])] == [*reversed(TEXTS)]
    assert gathering.waiting == 2


TEXTS = (b"text", b"TEXT")


@FAMILIES
def test_incomplete_datagram_is_given_up_after_its_timeout(ethertype: int) -> None:
    first, second, _ = fragments(frame(ethertype), 64, 128)
    gathering = Fragments()
    arrive(gathering, [first], now=5)
    arrive(gathering, [second], side=1, now=6)
    assert gathering.next_deadline() == 5 + TIMEOUT
    assert gathering.due(4 + TIMEOUT) == []
    ((side, arrival),) = gathering.due(5 + TIMEOUT)
    assert (side, arrival.trouble, arrival.frames) == (0, "incomplete", (first,))
    assert gathering.next_deadline() == 6 + TIMEOUT


def test_oldest_datagram_is_given_up_when_too_many_wait() -> None:
    whole = frame(0x0800)
    gathering = Fragments()
    waiting = [piece(whole, 0, 64, number) for number in range(MOST_DATAGRAMS + 1)]
    assert arrive(gathering, waiting[:-1]) == []
    (oldest,) = arrive(gathering, waiting[-1:])
    assert (oldest.trouble, oldest.frames) == ("incomplete", (waiting[0],))
    assert gathering.waiting == MOST_DATAGRAMS


def test_duplicates_do_not_fill_memory() -> None:
    copy = piece(frame(0x0800, bytes(60_000)), 0, 59_200)
    (given_up,) = arrive(Fragments(), [copy] * (MOST_BYTES // len(copy) + 1))
    assert given_up.trouble == "incomplete"


@FAMILIES
def test_fragment_without_place_in_any_datagram_is_malformed(ethertype: int) -> None:
    whole = frame(ethertype)
    for malformed in (piece(whole, 0, 63), piece(whole, 64, 64), piece(whole, 65_528, 65_528 + 8, more=False)):
        padded = malformed.ljust(100, b"x")
        assert frames.message(padded, frames.read(padded), 0).name == "fragment (malformed)"
    truncated = piece(whole, 0, 64)[:-1]
    assert frames.read(truncated) == "truncated"


def test_datagram_that_is_not_understood_when_whole_is_named() -> None:
    # The data begins with a fragment header of its own.
    nested = b"\x11\0\0\1abcd".ljust(80, b"n")
    whole = bytes(12) + b"\x86\xdd" + ip_packet(*ADDRESSES[0x86DD], nested, protocol=44)
    (arrival,) = arrive(Fragments(), fragments(whole, 64))
    assert arrival.message(0).name == "fragment (not understood)"
    refused = r"^0.000 fragment \(not understood\) \(120\): there is no UDP datagram to change$"
    with pytest.raises(UsageError, match=refused):
        arrival.changed(b"")
    with pytest.raises(UsageError, match=refused):
        arrival.reflected()


def test_reassembled_icmp_is_named_by_its_protocol() -> None:
    whole = bytes(12) + b"\x08\x00" + ip_packet(*ADDRESSES[0x0800], bytes(200), protocol=1)
    (arrival,) = arrive(Fragments(), fragments(whole, 64))
    assert arrival.message(0).name == "other (ICMP)"


@FAMILIES
def test_extension_headers_stay_before_fragment_header(ethertype: int) -> None:
    """Each fragment has them (RFC 8200, 4.5); over IPv4 the first has options that others lack (RFC 791)."""
    whole = frame(ethertype)
    first, last = fragments(whole, 64)
    if ethertype == 0x86DD:
        extended = [
            part[:18] + (len(part) - 46).to_bytes(2) + b"\x3c" + part[21:54] + b"\x2c\0\1\4\0\0\0\0" + part[54:]
            for part in (first, last)
        ]
    else:
        option = first[:14] + b"\x46" + first[15:16] + (len(first) - 10).to_bytes(2) + first[18:34] + b"\x94\4\0\0"
        extended = [option + first[34:], last]
    (arrival,) = arrive(Fragments(), extended[::-1])
    assert arrival.message(0).payload == PAYLOAD
    assert arrival.changed(PAYLOAD[::-1])[::-1] != tuple(extended)
    (again,) = arrive(Fragments(), list(arrival.changed(PAYLOAD[::-1])))
    assert again.message(0).payload == PAYLOAD[::-1]


@FAMILIES
def test_changed_datagram_is_cut_as_it_was(ethertype: int) -> None:
    cut = fragments(frame(ethertype), 64, 128)
    (arrival,) = arrive(Fragments(), [cut[2], cut[0], cut[1]])
    (moved,) = arrive(Fragments(), list(arrival.changed(PAYLOAD, port=7777)))
    assert (moved.message(0).source[1], moved.message(0).payload) == (7777, PAYLOAD)
    assert [len(one) for one in moved.frames] == [len(one) for one in arrival.frames]
    # Only the first fragment has the port and the checksum.
    assert [new == old for new, old in zip(moved.frames, arrival.frames, strict=True)] == [True, False, True]
    source, destination = ADDRESSES[ethertype]
    for port in (None, 5):
        (back,) = arrive(Fragments(), list(arrival.reflected(port=port)))
        message = back.message(0)
        assert (message.source, message.destination) == ((destination, port or 2), (source, 1))
        assert (message.payload, back.frame[:12]) == (PAYLOAD, b"by-macto-mac")
        if ethertype == 0x0800:
            assert {internet_checksum(one[14:34]) for one in back.frames} == {0}


def test_single_frame_is_changed_alone() -> None:
    whole = frame(0x0800)
    arrival = Arrival(whole, frames.read(whole))
    assert (arrival.frames, arrival.notes("data")) == ((whole,), ("",))
    (changed,) = arrival.changed(PAYLOAD[::-1])
    assert changed[42:] == PAYLOAD[::-1]


def test_fragments_that_were_forwarded_are_marked() -> None:
    first, last = fragments(frame(0x0800), 64)
    places = [frames.read(one) for one in (first, last)]
    pieces = [
        Piece(one, place)
        for one, place in zip((first, last), places, strict=True)
        if not isinstance(place, str | frames.Transport)
    ]
    gathering = Fragments()
    assert gathering.is_gone(pieces[0], 0) is None
    gathering.arrive(pieces[0], 0, 0, is_gone=True)
    assert (gathering.is_gone(pieces[1], 0), gathering.is_gone(pieces[1], 1)) == (True, None)
    ((_, arrival),) = gathering.arrive(pieces[1], 0, 0, is_gone=True)
    assert arrival.is_gone
