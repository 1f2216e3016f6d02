"""Both engines give the same results for any traffic, and superframes are cut and joined without a difference."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from selftests.support import flows
from selftests.support.engines import both
from selftests.support.flows import ACK, CWR, ECE, FIN, PSH, TCP, UDP, URG, Flow
from selftests.support.superframes import cut, delivered

if TYPE_CHECKING:
    from selftests.support.engines import Driven

PAYLOAD = bytes(number * 7 % 251 for number in range(20000))

FLOWS = st.builds(
    Flow,
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from([TCP, UDP]),
    tos=st.integers(0, 255),
    ttl=st.integers(1, 255),
    identification=st.sampled_from([0, 1, 65534, 65535]),
    fragment=st.sampled_from([0, 0x4000]),
    flow_label=st.integers(0, 2**20 - 1),
    source_port=st.integers(0, 65535),
    sequence=st.one_of(st.integers(0, 2**32 - 1), st.integers(2**32 - 3000, 2**32 - 1)),
    flags=st.lists(st.sampled_from([FIN, PSH, ECE, CWR, URG]), max_size=3).map(lambda bits: ACK | sum({*bits})),
    window=st.integers(0, 65535),
    options=st.sampled_from([b"", bytes(4), bytes.fromhex("0101080a0000000100000002"), b"\1" * 40]),
)
# Few values, so that packets often belong together and sometimes nearly do.
SIMILAR = st.builds(
    Flow,
    number=st.just(2),
    version=st.sampled_from([4, 4, 4, 6]),
    protocol=st.sampled_from([TCP, TCP, UDP]),
    tos=st.sampled_from([0, 0, 0, 1]),
    source_port=st.sampled_from([1000, 1000, 1000, 1001]),
    flags=st.sampled_from([ACK, ACK, ACK, ACK | PSH, ACK | FIN]),
    has_checksum=st.sampled_from([True, True, False]),
)
SIZES = st.sampled_from([1, 16, 99, 100, 100, 100, 1300])


@given(FLOWS, st.integers(1, 1400), st.integers(1, 9000), st.integers(1, 64))
def test_cut_packets_are_those_of_plain_segmentation(flow: Flow, size: int, length: int, step: int) -> None:
    length = min(length, 200 * size)
    assert cut(flow.frame(PAYLOAD[:length], size), step=step) == flow.segments(PAYLOAD[:length], size)


@st.composite
def packets(draw: st.DrawFn) -> list[bytes]:
    """Draw packets of few flows, most of which continue the packet before them."""
    found: list[bytes] = []
    sequence = draw(st.integers(0, 2**32 - 1))
    for flow, size, is_next, change in draw(
        st.lists(st.tuples(SIMILAR, SIZES, st.integers(0, 9), st.integers(0, 19)), min_size=1, max_size=12)
    ):
        packet = replace(flow, sequence=sequence).packet(PAYLOAD[sequence % 100 :][:size])
        if change == 0:
            packet = packet[:-1] + bytes([packet[-1] ^ 1])
        found.append(packet)
        sequence = (sequence + (size if is_next else 1)) % 2**32
    return found


@given(packets())
def test_joined_packets_come_out_as_they_were(found: list[bytes]) -> None:
    frames = delivered(found)
    back = [flows.without_identification(packet) for frame in frames for packet in frame]
    assert back == [flows.without_identification(packet) for packet in found]


@given(st.lists(st.tuples(FLOWS, st.integers(1, 1400), st.integers(1, 6000), st.booleans()), max_size=6))
def test_engines_send_same_datagrams_for_any_frames(
    frames: list[tuple[Flow, int, int, bool]],
) -> None:
    def script(side: Driven) -> None:
        read = []
        for flow, size, length, is_superframe in frames:
            payload = PAYLOAD[: min(length, 100 * size)]
            read += (
                [flow.frame(payload, size)]
                if is_superframe
                else [bytes(10) + packet for packet in flow.segments(payload, size)]
            )
        side.send(read)

    both(script)


@given(packets(), st.integers(0, 3), st.data())
def test_engines_deliver_same_packets_for_any_datagrams(found: list[bytes], ecn: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(found))) | st.just([*range(len(found))]))
    repeated = data.draw(st.lists(st.sampled_from(range(len(found))), max_size=3))
    broken = data.draw(st.lists(st.sampled_from(range(len(found))), max_size=2))

    def script(side: Driven) -> None:
        messages = side.messages(found)
        for number in broken:
            messages[number] = messages[number][:-1] + bytes([messages[number][-1] ^ 1])
        side.receive([messages[number] for number in [*order, *repeated]], ecn)

    both(script)
