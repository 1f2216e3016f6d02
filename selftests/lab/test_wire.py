"""Check that a wire carries all traffic and changes messages as its script says.

Sockets of the kernel send and receive. No implementation is needed: a wire recognizes a message by its type and length.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import (
    WIRED,
    Capture,
    Datagram,
    DeadlineExceeded,
    Delay,
    Drop,
    Duplicate,
    Flip,
    HarnessError,
    Hold,
    Replay,
    UsageError,
    let_pass,
    must_ping,
    ping,
    set_offloads,
    tcp_stream,
    udp_receiver,
    wait_for,
)
from harness.wire.rules import Rules

if TYPE_CHECKING:
    from harness import Lab, Wire

V4, V6 = "192.168.1.2", "fd00:aa::2"
PORT = 7
RESPONSE, DATA = b"\2\0\0\0".ljust(92, b"r"), b"\4\0\0\0".ljust(48, b"d")


class Ends:
    """Both nodes of a wire, and sockets that send and receive bytes that look like WireGuard's messages."""

    def __init__(self, lab: Lab, address: str) -> None:
        self.nodes = WIRED.build(lab)
        (self.wire,) = lab.wires
        self.receiver = udp_receiver(self.nodes["ns2"], address, PORT)
        self.sender = self.nodes["ns1"].socket(self.receiver.family, socket.SOCK_DGRAM)
        self.sender.connect((address, PORT))
        lab.undo(self.receiver.close)
        lab.undo(self.sender.close)
        # Fill the neighbour tables: a datagram that waits for ARP or ND is overtaken by the next one.
        self.send(b"first")
        self.receive(1)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.sender.send(message)

    def receive(self, count: int, deadline: float = 5.0) -> list[bytes]:
        """Receive this many datagrams. The wire keeps order: once the last one sent arrives, no other can follow."""
        return [wait_for(Datagram(self.receiver), deadline, f"datagram {n} of {count}")[0] for n in range(count)]


@pytest.fixture(params=[V4, V6], ids=["v4", "v6"])
def ends(lab: Lab, request: pytest.FixtureRequest) -> Ends:
    return Ends(lab, request.param)


@pytest.fixture
def v4(lab: Lab) -> Ends:
    return Ends(lab, V4)


def numbered(count: int) -> list[bytes]:
    """Return transport messages with the counters 0, 1, 2 and so on."""
    return [DATA[:8] + number.to_bytes(8, "little") + DATA[16:] for number in range(count)]


def counters(messages: list[bytes]) -> list[int]:
    return [int.from_bytes(message[8:16], "little") for message in messages]


def test_wire_carries_traffic_in_both_directions(ends: Ends) -> None:
    address = ends.sender.getpeername()[0]
    must_ping(ends.nodes["ns1"], address, count=2, size=3000)
    tcp_stream(ends.nodes["ns1"], ends.nodes["ns2"], address)
    tcp_stream(ends.nodes["ns2"], ends.nodes["ns1"], ends.sender.getsockname()[0])
    assert ends.wire.unexplained_losses == 0


def test_wire_completes_frames_left_to_offload(v4: Ends) -> None:
    set_offloads(v4.nodes["ns1"], "veth1", tx=True)
    v4.send(b"its checksum is left to the card")
    assert v4.receive(1) == [b"its checksum is left to the card"]
    tcp_stream(v4.nodes["ns1"], v4.nodes["ns2"], V4, size=1 << 16)


def test_vlan_tag_is_carried(v4: Ends) -> None:
    frame = bytes(6) + b"\2" * 6 + b"\x81\x00\x00\x05" + b"\x88\xb5" + b"tagged".ljust(46)
    raw = [v4.nodes[name].socket(socket.AF_PACKET, socket.SOCK_RAW) for name in ("ns1", "ns2")]
    for sock, device in zip(raw, ("veth1", "veth2"), strict=True):
        sock.setsockopt(263, 8, 1)
        sock.bind((device, 3))
    with raw[0] as sender, raw[1] as receiver:
        sender.send(frame)
        while (data := receiver.recvmsg(2048, 128))[0][12:14] != b"\x88\xb5":
            pass
    # The kernel keeps the tag beside the frame: struct tpacket_auxdata in packet(7).
    ((_, _, auxdata),) = data[1]
    assert struct.unpack("IIIHHHH", auxdata)[5] == 5


def test_drop_rule_drops_only_second_response(ends: Ends) -> None:
    ends.wire.apply(Drop(message="response", nth=2))
    ends.send(RESPONSE + b"no message", DATA, RESPONSE, DATA, RESPONSE, RESPONSE, b"end")
    assert ends.receive(6) == [RESPONSE + b"no message", DATA, RESPONSE, DATA, RESPONSE, b"end"]
    assert [s.did for s in ends.wire.sightings("response")] == ["passed", "dropped", "passed"]


def test_hold_rule_delivers_counters_5_to_9_behind_10(v4: Ends) -> None:
    v4.wire.apply(Hold(message="data", counters="5-9", behind=1))
    v4.send(*numbered(12))
    assert counters(v4.receive(12)) == [0, 1, 2, 3, 4, 10, 5, 6, 7, 8, 9, 11]


def test_messages_are_held_until_they_are_released(v4: Ends) -> None:
    v4.wire.apply(Hold(message="data"))
    v4.send(*numbered(2), b"end")
    assert v4.receive(1) == [b"end"]
    with pytest.raises(UsageError, match="holds 2 messages"):
        v4.wire.apply()
    v4.wire.release()
    assert counters(v4.receive(2)) == [0, 1]


def test_messages_are_held_until_all_are_gathered(v4: Ends) -> None:
    v4.wire.apply(Hold(message="data", gather=3))
    v4.send(*numbered(2), b"between")
    assert v4.receive(1) == [b"between"]
    v4.send(numbered(3)[2])
    assert counters(v4.receive(3)) == [0, 1, 2]


@pytest.mark.parametrize("bit", [0, 127])
def test_flip_rule_changes_one_bit_of_field(ends: Ends, bit: int) -> None:
    ends.wire.apply(Flip(message="response", field="mac1", bit=bit))
    ends.send(RESPONSE)
    (arrived,) = ends.receive(1)
    different = [(i, a ^ b) for i, (a, b) in enumerate(zip(arrived, RESPONSE, strict=True)) if a != b]
    assert different == [(60 + bit // 8, 1 << bit % 8)]


def test_copies_follow_duplicated_message(v4: Ends) -> None:
    v4.wire.apply(Duplicate(message="data", copies=2, nth=1))
    v4.send(*numbered(2))
    assert counters(v4.receive(4)) == [0, 0, 0, 1]


def test_replay_rule_sends_copy_later_from_given_port(ends: Ends) -> None:
    ends.wire.apply(Replay(message="response", behind=2, port=7777))
    ends.send(RESPONSE, *numbered(2))
    *_, (last, (_, port)) = [wait_for(Datagram(ends.receiver), 5.0, "a datagram") for _ in range(4)]
    assert (last, port) == (RESPONSE, 7777)


def test_delayed_message_is_late_by_given_seconds(v4: Ends) -> None:
    v4.wire.apply(Delay(message="data", seconds=0.2))
    started = time.monotonic()
    v4.send(*numbered(3))
    assert counters(v4.receive(3)) == [0, 1, 2]
    assert time.monotonic() - started >= 0.2


def test_drop_rule_with_share_drops_same_messages_again(v4: Ends) -> None:
    decisions = []
    for _ in range(2):
        v4.wire.apply(Drop(message="data", share=0.1))
        v4.send(*numbered(200), b"end")
        wait_for(Datagram(v4.receiver, lambda data: data == b"end"), 5.0, "the end")
        decisions.append([s.did for s in v4.wire.sightings()])
    assert decisions[0] == decisions[1]
    assert 5 <= decisions[0].count("dropped") <= 45


def test_idle_wire_sleeps(v4: Ends) -> None:
    for node, device in (("ns1", "veth1"), ("ns2", "veth2")):
        v4.nodes[node].sysctl(f"net.ipv6.conf.{device}.disable_ipv6", 1)
    v4.send(DATA)
    v4.receive(1)
    let_pass(0.1, "the wire has nothing more to do")
    before = voluntary_switches("wire ns1-ns2")
    let_pass(0.3, "a wire that polls would wake in this time")
    assert voluntary_switches("wire ns1-ns2") == before


def voluntary_switches(name: str) -> str:
    """Return how often a thread has gone to sleep voluntarily (proc(5), voluntary_ctxt_switches)."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == name]
    lines = Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("voluntary_ctxt_switches"))


def test_closed_wire_removes_its_devices_and_thread(lab: Lab) -> None:
    nodes = WIRED.build(lab)
    lab.wires[0].close()
    assert [set(node.links()) for node in nodes.values()] == [{"lo"}, {"lo"}]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wire ")]


def test_wire_survives_device_set_down_or_deleted(v4: Ends) -> None:
    must_ping(v4.nodes["ns1"], V4)
    v4.nodes["ns2"].set_link("veth2", up=False)
    v4.send(DATA)
    v4.wire.wait_for("data", "the message that is not received")
    v4.nodes["ns2"].set_link("veth2", up=True)
    # The carrier of the other end comes back a moment later, so the first pings may be lost.
    assert ping(v4.nodes["ns1"], V4, count=50, timeout=0.2).answered
    v4.nodes["ns2"].delete_link("veth2")
    v4.send(DATA)
    v4.wire.wait_for("data", "the message to the deleted device", nth=2)


def test_broken_wire_raises_in_wait_for_and_close(v4: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rules, "decide", lambda *_: 1 / 0)
    v4.send(DATA)
    with pytest.raises(HarnessError, match="wire ns1-ns2: its thread failed: ZeroDivisionError"):
        v4.wire.wait_for("data", "a message")
    with pytest.raises(HarnessError, match="wire ns1-ns2: its thread failed"):
        v4.wire.close()


def test_capture_survives_deletion_of_its_device(v4: Ends) -> None:
    with Capture(v4.nodes["ns1"], "veth1") as capture:
        v4.send(DATA)
        v4.receive(1)
        v4.nodes["ns1"].delete_link("veth1")
        assert [message.payload for message in capture.messages()] == [DATA]


def test_error_for_unknown_message_or_node_lists_valid_ones(v4: Ends) -> None:
    with pytest.raises(UsageError, match="unknown kind of message 'datum'; there are: any, handshake, "):
        v4.wire.sightings("datum")
    with pytest.raises(UsageError, match="wire ns1-ns2 has no node ns3; it connects ns1 and ns2"):
        v4.wire.inject(b"", sender="ns3")
    with pytest.raises(UsageError, match=r"rule 1 \(drop sender=ns3\): sender: this wire has no node ns3"):
        v4.wire.apply(Drop(sender="ns3"))


# Messages in fragments


LONG = b"\4\0\0\0".ljust(3000, b"l")


def raw_sender(ends: Ends) -> socket.socket:
    """A packet socket that sends frames from ns1 into the wire."""
    sender = ends.nodes["ns1"].socket(socket.AF_PACKET, socket.SOCK_RAW)
    sender.bind(("veth1", 0))
    return sender


def fragments_of(ends: Ends, message: bytes = LONG) -> list[bytes]:
    """Let the kernel send a message in fragments, which the wire drops; return their frames."""
    ends.wire.apply(Drop(message="transport"))
    ends.send(message)
    return list(ends.wire.wait_for("transport", "the message in fragments").fragments)


def numbers(wire: Wire) -> list[tuple[str, int]]:
    """Return the decision on each message, and the number of its fragments."""
    return [(s.did, len(s.fragments)) for s in wire.sightings("transport")]


def test_message_in_fragments_is_dropped_with_all_of_them(ends: Ends) -> None:
    ends.wire.apply(Drop(message="data", nth=2))
    with Capture(ends.nodes["ns1"], "veth1") as capture:
        ends.send(LONG, LONG[:-1] + b"2", LONG[:-1] + b"3", b"end")
        assert ends.receive(3) == [LONG, LONG[:-1] + b"3", b"end"]
        assert [message.payload[-1:] for message in capture.messages(kind=4)] == [b"l", b"2", b"3"]
    assert numbers(ends.wire) == [("passed", 3), ("dropped", 3), ("passed", 3)]


def test_message_in_fragments_is_held_duplicated_and_flipped(ends: Ends) -> None:
    ends.wire.apply(Hold(message="data", nth=1), Duplicate(message="data", nth=1), Flip(message="data", field="tag"))
    ends.send(LONG[:-1] + b"1", LONG[:-1] + b"2", LONG, b"end")
    assert [data[-1:] for data in ends.receive(4)] == [b"2", b"2", b"l", b"d"]
    ends.wire.release()
    assert ends.receive(1) == [LONG[:-1] + b"1"]
    assert numbers(ends.wire) == [("held", 3), ("duplicated", 3), ("flipped", 3)]


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 1, 0, 1, 2]], ids=["disorder", "duplicates"])
def test_fragments_in_any_order_are_one_message(ends: Ends, order: list[int]) -> None:
    parts = fragments_of(ends)
    with raw_sender(ends) as sender:
        ends.wire.apply(Duplicate(message="data"))
        for number in order:
            sender.send(parts[number])
        # The kernel of ns2 takes both copies for whole datagrams, too.
        assert ends.receive(2) == [LONG, LONG]
        ends.wire.apply(Drop(message="data"))
        for number in order:
            sender.send(parts[number])
        ends.wire.wait_for("data", "the message in fragments")
        ends.send(b"end")
        assert ends.receive(1) == [b"end"]
    assert numbers(ends.wire) == [("dropped", len(order))]


def test_message_without_one_fragment_is_counted_as_incomplete(ends: Ends) -> None:
    parts = fragments_of(ends)
    with raw_sender(ends) as sender:
        ends.wire.apply(Drop(message="data", optional=True), Drop(message="fragment", nth=1))
        sender.send(parts[0])
        sender.send(parts[2])
        lost = ends.wire.wait_for("fragment", "the wire to give up")
        assert (lost.did, lost.message.detail, len(lost.fragments)) == ("dropped", "incomplete", 2)
        sender.send(parts[0])
        sender.send(parts[2])
        passed = ends.wire.wait_for("fragment", "the wire to give up again", nth=2)
    assert (passed.did, ends.wire.sightings()) == ("passed", [])
    assert "2 fragment (incomplete)" in str(ends.wire)
    ends.wire.inject(parts[1], sender="ns1")
    assert ends.receive(1) == [LONG]


def test_fragments_keep_their_place_when_no_rule_can_apply(ends: Ends, lab: Lab) -> None:
    parts, one = fragments_of(ends), ends.nodes["ns2"].socket(socket.AF_PACKET, socket.SOCK_RAW)
    ends.wire.apply(Drop(sender="ns2", optional=True))
    with raw_sender(ends) as sender, one as receiver:
        receiver.bind(("veth2", 3))
        other = bytes(6) + b"\2" * 6 + b"\x88\xb5" + bytes(46)
        sent = [parts[1], other, parts[0], other, parts[2]]
        for frame in sent:
            sender.send(frame)
        arrived = [wait_for(Datagram(receiver, lambda data: data in sent), 5.0, "a frame")[0] for _ in sent]
    assert arrived == sent
    assert ends.receive(1) == [LONG]
    assert numbers(ends.wire) == [("passed", 3)]
    lab.save_captures()
    written = (lab.directory / "ns1-ns2.pcapng").read_bytes()
    # Once as the wire dropped it before, then as sent by ns1 and as received by ns2.
    assert [written.count(f"fragment {n} of 3 of data".encode()) for n in (1, 2, 3)] == [3, 3, 3]
    assert b"(incomplete)" not in written


def test_fragments_are_named_in_capture(v4: Ends, lab: Lab) -> None:
    v4.wire.apply(Drop(message="data", nth=1))
    v4.send(LONG, LONG)
    v4.receive(1)
    lab.save_captures()
    written = (lab.directory / "ns1-ns2.pcapng").read_bytes()
    for number in (1, 2, 3):
        assert f"dropped: data 1 (rule 1: drop message=data nth=1); fragment {number} of 3 of data".encode() in written
        # As sent by ns1 and as received by ns2.
        assert written.count(f"fragment {number} of 3 of data".encode()) == 3


def test_replayed_and_reflected_message_leaves_in_fragments(ends: Ends) -> None:
    ends.wire.apply(Drop(message="data"))
    ends.send(LONG)
    lost = ends.wire.wait_for("data", "the message in fragments")
    ends.wire.replay(lost, port=7777)
    assert wait_for(Datagram(ends.receiver), 5.0, "the replayed message")[0] == LONG
    ends.sender.close()
    source, port = lost.message.source
    with udp_receiver(ends.nodes["ns1"], source, port) as sender:
        ends.wire.reflect(lost)
        data, (_, from_port, *_) = wait_for(Datagram(sender), 5.0, "the reflected message")
    assert (data, from_port) == (LONG, PORT)


# What is not a WireGuard message


@pytest.mark.parametrize("word", ["unknown", "other"])
def test_rule_drops_what_is_not_wireguard_when_it_names_it(ends: Ends, word: str) -> None:
    ns1, address = ends.nodes["ns1"], ends.sender.getpeername()[0]
    assert not ping(ns1, address).lost
    ends.wire.apply(Drop(message=word, sender="ns1"))
    ends.send(b"text", DATA)
    assert ends.receive(1 if word == "unknown" else 2)[-1] == DATA
    assert bool(ping(ns1, address, timeout=0.2).lost) == (word == "other")
    sorts = {s.message.sort for s in ends.wire.sightings(word, did="dropped")}
    assert sorts == {"datagram" if word == "unknown" else "other"}


def test_everything_that_passes_is_counted_by_kind(v4: Ends) -> None:
    v4.wire.apply()
    v4.send(DATA, RESPONSE, b"text", b"text")
    v4.receive(4)
    must_ping(v4.nodes["ns1"], V4)
    assert re.search(r"^wire ns1-ns2: ns1: 1 data, 1 response, 2 unknown, .*1 other \(ICMP\)", str(v4.wire))
    with pytest.raises(DeadlineExceeded, match=r"seen: .*; in all, wire ns1-ns2: ns1: 1 data, 1 response, 2 unknown"):
        v4.wire.wait_for("initiation", "an initiation", deadline=0.01)
    with Capture(v4.nodes["ns1"], "veth1") as capture:
        v4.send(DATA, b"text")
        v4.receive(2)
        assert str(capture) == "ns1-veth1: 1 data, 1 unknown"
        with pytest.raises(DeadlineExceeded, match=r"seen: .*; in all, ns1-veth1: 1 data, 1 unknown"):
            capture.wait_for(lambda message: message.kind == 1, 0.01, "an initiation")


# Superframes, which a network card would split


def superframe(sender: socket.socket, messages: list[bytes]) -> None:
    """Send messages of one size in one call (UDP_SEGMENT, udp(7))."""
    size = struct.pack("H", len(messages[0]))
    sender.sendmsg([b"".join(messages)], [(socket.IPPROTO_UDP, 103, size)])


def with_counters(*values: int) -> list[bytes]:
    return [DATA[:8] + value.to_bytes(8, "little") + DATA[16:] for value in values]


@pytest.mark.parametrize("values", [(5, 7, 9), (5, 5, 5)])
def test_superframe_is_as_many_messages_as_were_sent(ends: Ends, lab: Lab, values: tuple[int, ...]) -> None:
    set_offloads(ends.nodes["ns1"], "veth1", tx=True, gso=True)
    ends.wire.apply(Drop(message="data", nth=2))
    with Capture(ends.nodes["ns1"], "veth1") as capture:
        superframe(ends.sender, with_counters(*values))
        assert counters(ends.receive(2)) == [values[0], values[2]]
        assert [message.counter for message in capture.messages()] == [*values]
        capture.save(lab.directory / "capture.pcapng")
    assert [s.message.counter for s in ends.wire.sightings()] == [*values]
    lab.save_captures()
    for name in ("capture", "ns1-ns2"):
        comment = b"segment 3 of a superframe of 3 segments of 48 bytes"
        assert comment in (lab.directory / f"{name}.pcapng").read_bytes()
