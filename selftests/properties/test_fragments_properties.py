"""Check that a message is one message however it is cut into fragments, and whatever order they come in."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from harness.wire import frames
from harness.wire.fragments import TIMEOUT, Fragments, Piece
from harness.wire.rules import Rules
from harness.wire.script import Drop, Duplicate, Flip, Script
from selftests.support.fragments import fragments
from selftests.support.packets import ip_packet, udp
from selftests.support.strategies import flip
from selftests.support.wire_rules import NODES

if TYPE_CHECKING:
    import random

    from harness.wire.fragments import Arrival

ADDRESSES = (("192.0.2.1", "192.0.2.2"), ("fd00::1", "fd00::2"))
SIZES = st.integers(32, 4000)


def data_message(addresses: tuple[str, str], size: int, counter: int) -> bytes:
    payload = b"\4\0\0\0abcd" + struct.pack("<Q", counter)
    payload += (bytes([counter, 1, 2, 3, 4, 5, 6]) * 600)[: size - 16]
    packet = ip_packet(*addresses, udp(1, 2, payload))
    return b"to-macby-mac" + (b"\x08\x00" if ":" not in addresses[0] else b"\x86\xdd") + packet


def payload_of(whole: bytes) -> bytes:
    datagram = frames.udp(whole)
    assert datagram is not None
    return datagram.payload(whole)


@st.composite
def cut(draw: st.DrawFn, counter: int = 7) -> tuple[bytes, list[bytes]]:
    """A frame with a message, and its fragments in any order, some twice; the last to arrive is not a copy."""
    whole = data_message(draw(st.sampled_from(ADDRESSES)), draw(SIZES), counter)
    size = 8 + len(payload_of(whole))
    places = draw(st.lists(st.integers(1, (size - 1) // 8), min_size=1, max_size=8, unique=True))
    parts = fragments(whole, *(8 * place for place in places), identification=counter)
    *early, last = draw(st.permutations(parts))
    copies = draw(st.lists(st.sampled_from(early), max_size=4))
    return whole, [*draw(st.permutations([*early, *copies])), last]


def arrivals(gathering: Fragments, parts: list[bytes]) -> list[Arrival]:
    out = []
    for part in parts:
        place = frames.read(part)
        assert isinstance(place, frames.Fragment)
        out += gathering.arrive(Piece(part, place), 0, 0)
    return [arrival for _, arrival in out]


@given(cut())
def test_message_in_any_fragments_is_one_message(drawn: tuple[bytes, list[bytes]]) -> None:
    whole, parts = drawn
    (arrival,) = arrivals(Fragments(), parts)
    assert arrival.frames == tuple(parts)
    message = arrival.message(0)
    assert (message.payload, message.counter, message.source[1]) == (payload_of(whole), 7, 1)


@given(cut(), cut(counter=8), st.randoms(use_true_random=False))
def test_interleaved_messages_are_each_one_message(
    first: tuple[bytes, list[bytes]], second: tuple[bytes, list[bytes]], chance: random.Random
) -> None:
    sides = [0] * len(first[1]) + [1] * len(second[1])
    chance.shuffle(sides)
    queues = [iter(first[1]), iter(second[1])]
    out = arrivals(Fragments(), [next(queues[side]) for side in sides])
    assert sorted(arrival.message(0).counter or 0 for arrival in out) == [7, 8]


@given(cut())
def test_message_without_one_fragment_is_never_complete(drawn: tuple[bytes, list[bytes]]) -> None:
    gathering = Fragments()
    assert arrivals(gathering, drawn[1][:-1]) == []
    ((_, arrival),) = gathering.due(TIMEOUT)
    assert (arrival.frames, arrival.message(0).sort) == (tuple(drawn[1][:-1]), "fragment")


@given(cut())
def test_rule_applies_to_all_fragments_or_none(drawn: tuple[bytes, list[bytes]]) -> None:
    _, parts = drawn
    (arrival,) = arrivals(Fragments(), parts)
    for rule, expected in (
        (Drop(message="transport"), []),
        (Drop(message="handshake"), parts),
        (Duplicate(message="transport"), parts * 2),
    ):
        _, deliveries = Rules(Script((rule,)), NODES, seed=1).decide(arrival, 0, 0)
        assert [delivery.frame for delivery in deliveries] == expected


@given(cut(), st.integers(0, 127))
def test_flipped_bit_arrives_in_same_fragments(drawn: tuple[bytes, list[bytes]], bit: int) -> None:
    (arrival,) = arrivals(Fragments(), drawn[1])
    rule = Flip(message="transport", field="tag", bit=bit)
    _, deliveries = Rules(Script((rule,)), NODES, seed=1).decide(arrival, 0, 0)
    (again,) = arrivals(Fragments(), [delivery.frame for delivery in deliveries])
    before = arrival.message(0).payload
    assert again.message(0).payload == flip(before, 8 * (len(before) - 16) + bit)
    assert [len(frame) for frame in again.frames] == [len(frame) for frame in arrival.frames]
