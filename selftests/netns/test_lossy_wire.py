"""Run a tunnel over a wire that drops, reorders, duplicates and delays messages (`wired`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import V4_OF_A, V4_OF_B, Drop, Duplicate, Flip, Hold, UdpStream, tcp_stream
from harness.wire import script
from selftests.support.transfer import assert_equal_growth, received

if TYPE_CHECKING:
    from harness import Arrivals, Tunnel, Wire

# Datagrams that fit every queue on the path; the next ones are sent when these are on the wire.
BURST = 50
WINDOW = 1000
# Bytes of payload of each datagram.
SIZE = 256
BAD_LINE = Path(__file__).with_name("bad-line.toml")
PASSED_AT_ONCE = {"passed", "duplicated"}
LOST_ON_WIRE = {"dropped", "flipped"}


@pytest.fixture(autouse=True)
def _session(wired: Tunnel, wire: Wire) -> None:
    """Establish a session, initiated by A, on a wire without faults."""
    wired.must_ping("ns1", V4_OF_B)
    wire.apply()


def carry(wired: Tunnel, wire: Wire, count: int, *, size: int = SIZE) -> tuple[Arrivals, int]:
    """Send datagrams from A to B; return what arrived, and how many the wire dropped or changed."""
    # IPv4: over IPv6, wireguard-go sends a checksum of 0 in one datagram of 65536, which receivers refuse.
    with UdpStream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B, size=size) as stream:
        for sent in range(0, count, BURST):
            stream.send(min(BURST, count - sent))
            # Each datagram is one message on the wire, and each that the wire passes at once must arrive.
            wire.wait_for("data", "the datagrams to be sent", sender="ns1", nth=min(sent + BURST, count))
            stream.wait_for(sum(s.did in PASSED_AT_ONCE for s in wire.sightings("data", sender="ns1")))
        wire.release()
        lost_on_wire = sum(s.did in LOST_ON_WIRE for s in wire.sightings("data", sender="ns1"))
        stream.wait_for(count - lost_on_wire)
        # A tunnel keeps order: no copy of an earlier datagram can arrive after this one.
        wire.apply()
        stream.send()
        arrivals = stream.wait_for(count - lost_on_wire + 1)
        assert wire.unexplained_losses == 0
        return arrivals, lost_on_wire


@pytest.mark.requirement("ROB-12")
def test_tcp_stream_arrives_intact_when_one_tenth_is_lost(wired: Tunnel, wire: Wire) -> None:
    # Message 20 is always dropped: in one run of a thousand, chance would drop no message.
    wire.apply(Drop(message="data", share=0.1), Drop(message="data", sender="ns1", nth=20))
    tcp_stream(wired.nodes["ns1"], wired.nodes["ns2"], V4_OF_B, size=64 << 10, deadline=60.0)
    assert wire.sightings("data", did="dropped"), "the test proved nothing: no message was dropped"


@pytest.mark.requirement("ROB-12")
def test_tunnel_loses_only_messages_that_wire_drops(wired: Tunnel, wire: Wire) -> None:
    wire.apply(Drop(message="data", sender="ns1", share=0.1))
    arrivals, dropped = carry(wired, wire, 300)
    assert dropped, "the test proved nothing: no message was dropped"
    assert (arrivals.lost, arrivals.duplicated, arrivals.reordered) == (dropped, 0, 0), str(arrivals)


@pytest.mark.requirement("ROB-12", "DT-03", "DT-04")
def test_undropped_messages_arrive_once_over_bad_line(wired: Tunnel, wire: Wire) -> None:
    wire.apply(script.load_script(BAD_LINE))
    arrivals, dropped = carry(wired, wire, 200)
    assert (arrivals.lost, arrivals.duplicated, arrivals.broken) == (dropped, 0, 0), str(arrivals)
    assert min(dropped, arrivals.reordered) > 0, f"the test proved nothing: {dropped} messages were dropped, {arrivals}"
    wire.apply(script.load_script(BAD_LINE))
    tcp_stream(wired.nodes["ns2"], wired.nodes["ns1"], V4_OF_A, size=32 << 10, deadline=60.0)


@pytest.mark.requirement("DT-04", "ROB-12")
def test_reordered_messages_arrive_once_and_none_is_lost(wired: Tunnel, wire: Wire) -> None:
    wire.apply(Hold(message="data", sender="ns1", share=0.2, behind=5))
    arrivals, _ = carry(wired, wire, 300)
    assert arrivals.reordered > 20, str(arrivals)
    assert (arrivals.lost, arrivals.duplicated) == (0, 0), str(arrivals)


@pytest.mark.requirement("DT-04")
def test_message_1000_counters_behind_is_accepted(wired: Tunnel, wire: Wire) -> None:
    # The messages between the two are dropped, to save time on a slow machine.
    between = Drop(message="data", sender="ns1", nth=f"1-{WINDOW - 1}")
    wire.apply(Hold(message="data", sender="ns1", nth=1), between)
    arrivals, _ = carry(wired, wire, WINDOW + 1, size=16)
    assert arrivals.numbers == (WINDOW, 0, WINDOW + 1), str(arrivals)


@pytest.mark.requirement("DT-03", "ROB-12")
def test_duplicated_messages_arrive_and_are_counted_once(wired: Tunnel, wire: Wire) -> None:
    with received(wired.seen_by_b) as without_copies:
        carry(wired, wire, 100)
    wire.apply(Duplicate(message="transport", copies=2))
    with received(wired.seen_by_b) as with_copies:
        arrivals, _ = carry(wired, wire, 100)
    assert (arrivals.lost, arrivals.duplicated) == (0, 0), str(arrivals)
    assert_equal_growth(with_copies, without_copies, 100 * SIZE, "B counted a message more than once")


@pytest.mark.requirement("DT-13", "DT-07")
@pytest.mark.parametrize(
    ("field", "bit"),
    [
        pytest.param("receiver", 0, id="receiver"),
        pytest.param("counter", 3, id="counter-8-later"),
        pytest.param("counter", 60, id="counter-far-later"),
        pytest.param("packet", 0, id="packet"),
        pytest.param("tag", 127, id="tag"),
    ],
)
def test_changed_message_is_dropped_and_others_arrive(wired: Tunnel, wire: Wire, field: str, bit: int) -> None:
    with received(wired.seen_by_b) as all_unchanged:
        carry(wired, wire, 20)
    wire.apply(Flip(message="data", sender="ns1", nth=1, field=field, bit=bit))
    with received(wired.seen_by_b) as first_changed:
        arrivals, _ = carry(wired, wire, 21)
    assert (arrivals.numbers, arrivals.broken) == (tuple(range(1, 22)), 0), str(arrivals)
    assert_equal_growth(first_changed, all_unchanged, 20 * SIZE, "B counted the changed message, or not all others")
