"""Send data messages in batches (UDP_SEGMENT), and take batches of the device: each message counts by itself."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from harness import Data, Target, differs, poll_until, stopped, twin
from harness.lab.target import DISCARD, INNER4
from harness.net.checksum import checksum
from selftests.support.packets import ip_packet
from selftests.support.superframe_traffic import Trace, has_batch_engine, must_have_used, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness import Lab, Manifest, ScriptedPeer
    from harness.scripted.received import ReceivedData

COUNT = 8
LENGTH = 100
UDP_SEGMENT = 103
# UDP_MAX_SEGMENTS: more than a WireGuard program can send by one system call on an older kernel.
MOST_SEGMENTS = 128 if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9) else 64
MTU, MESSAGE = 1420, 32
REJECT_AFTER_MESSAGES = (1 << 64) - 8130
# Inner ECN to outer ECN (DT-28); (outer, inner) to the ECN that is delivered, where that is not the inner one (DT-29).
ENCAPSULATED = {0: 0, 1: 1, 2: 2, 3: 2}
DECAPSULATED = {(1, 2): 1, (3, 1): 3, (3, 2): 3}


@dataclass(frozen=True, slots=True)
class Batched:
    """A device, and a trace of what it uses if it is refwg."""

    target: Target
    trace: Trace

    def must_have_used(self, direction: str, offload: str) -> None:
        """End the test as not reached if refwg's batch engine has not used an offload."""
        if has_batch_engine(self.target.implementation):
            must_have_used(self.target.interface, self.trace, direction, offload)

    def delivered(self, peer: ScriptedPeer) -> list[bytes]:
        """Return what was delivered, once a packet is that the peer sends now on its latest session."""
        marker = self.target.packet(peer, b"the last")
        session = [*peer.sessions.values()][-1]
        with twin("a packet that is sent after the batch is delivered"):
            peer.send(session.data(marker))
            self.target.inside.expect(marker)
        return [packet for packet in self.target.inside.packets() if packet != marker]


@pytest.fixture
def batched(lab: Lab, implementation: Manifest) -> Batched:
    """The implementation under test, without a peer."""
    trace = Trace(lab.directory / "device.trace", implementation.name)
    return Batched(Target(lab, traced(implementation, trace.file)), trace)


def packets_of(target: Target, peer: ScriptedPeer, count: int = COUNT, length: int = LENGTH) -> list[bytes]:
    """Return packets of one length and of different flows, so that no program joins them."""
    return [target.packet(peer, bytes([number]) * length) for number in range(count)]


# From the peer to the device.


@pytest.mark.bug("IB-57")
@pytest.mark.requirement("DT-03", "DT-22", "Q-05")
@pytest.mark.parametrize("last", [LENGTH, 1], ids=["equal", "short-tail"])
def test_batch_is_delivered_once_and_in_order(batched: Batched, last: int) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    packets = [*packets_of(target, peer, COUNT - 1), target.packet(peer, bytes([COUNT]) * last)]
    datagrams = peer.send_together([session.data(packet) for packet in packets])
    came = batched.delivered(peer)
    order = [packets.index(packet) if packet in packets else "changed" for packet in came]
    assert order == list(range(COUNT)), f"the packets of a batch were delivered in this order: {order}"
    target.inside.forget()
    peer.send_together(datagrams)
    again = batched.delivered(peer)
    assert not again, f"accepted {len(again)} of {COUNT} counters again when their batch was replayed"
    batched.must_have_used("in", "udp-gro")


@pytest.mark.requirement("DT-07", "Q-05")
@pytest.mark.parametrize("forged", [0, 3, COUNT - 1], ids=["first", "middle", "last"])
def test_forged_message_of_batch_is_lost_alone(batched: Batched, forged: int) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    packets = packets_of(target, peer)
    messages = [session.data(packet) for packet in packets]
    length = len(messages[0].plaintext) + MESSAGE // 2
    fake = session.data(packets[forged], counter=messages[forged].counter, ciphertext=bytes(length))
    peer.send_together([*messages[:forged], fake, *messages[forged + 1 :]])
    others = [*packets[:forged], *packets[forged + 1 :]]
    came = batched.delivered(peer)
    assert came == others, f"delivered {len(came)} packets of a batch of {COUNT} messages, one of them forged"
    target.inside.forget()
    peer.send(messages[forged])
    assert batched.delivered(peer) == [packets[forged]], "a forged message has used up the counter of the true one"
    batched.must_have_used("in", "udp-gro")


# Bits of the longest replay window, and a place in it.
LARGEST_WINDOW, PLACE = 8192, 640
# By name: the counters of a batch, and which of its messages are accepted.
ORDERS = {
    "reversed": ((17, 16, 15, 14, 13, 12, 11, 10), "11111111"),
    "gaps": ((10, 12, 14, 900, 901, 13, 11, 902), "11111111"),
    "repeated": ((10, 11, 11, 12, 10, 13, 13, 14), "11010101"),
    "old": ((10, 20_000, 11, 19_999, 12, 20_001, 20_002, 13), "11010110"),
    "beyond-limit": ((10, 11, REJECT_AFTER_MESSAGES, 12, (1 << 64) - 1, 13, 14, 15), "11010111"),
}


@pytest.mark.requirement("DT-03", "DT-04", "DT-08")
@pytest.mark.parametrize("order", ORDERS)
def test_counters_of_batch_are_judged_one_by_one(batched: Batched, order: str) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    counters, accepted = ORDERS[order]
    packets = packets_of(target, peer)
    peer.send_together([session.data(p, counter=c) for p, c in zip(packets, counters, strict=True)])
    # Another peer sends the marker, because this one could send nothing behind a counter that is beyond the limit.
    other = target.peer()
    other.connect()
    wanted = [packet for packet, is_accepted in zip(packets, accepted, strict=True) if is_accepted == "1"]
    poll_until(target.inside.packets, lambda came: len(came) >= len(wanted), 2.0)
    came = [packets.index(packet) for packet in batched.delivered(other)]
    assert came == [packets.index(packet) for packet in wanted], (
        f"of the counters {counters} in one batch those of the messages {came} were accepted"
    )
    batched.must_have_used("in", "udp-gro")


@pytest.mark.requirement("DT-06", "DT-04")
def test_counter_left_out_before_batch_is_new_in_next_window(batched: Batched) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    packets = packets_of(target, peer)
    late = target.packet(peer, b"late")
    # The second batch is in the place of the first one, if the window is as long as the driver's.
    for first in (PLACE, LARGEST_WINDOW + PLACE + 1):
        peer.send_together([session.data(packet, counter=first + number) for number, packet in enumerate(packets)])
        session.counter = first + COUNT
        with twin("the batch is delivered"):
            assert batched.delivered(peer) == packets
        target.inside.forget()
    peer.send(session.data(late, counter=LARGEST_WINDOW + PLACE))
    is_accepted = batched.delivered(peer) == [late]
    assert is_accepted, (
        f"the device refused counter {LARGEST_WINDOW + PLACE}, which is new, after a batch that follows it"
    )
    batched.must_have_used("in", "udp-gro")


@pytest.mark.requirement("DT-33", "Q-05")
def test_messages_of_two_sessions_share_batch(batched: Batched) -> None:
    target, peer = batched.target, batched.target.peer()
    old, new = peer.connect(), peer.connect()
    packets = packets_of(target, peer)
    peer.send_together([(old, new)[number % 2].data(packet) for number, packet in enumerate(packets)])
    came = batched.delivered(peer)
    assert came == packets, f"delivered {len(came)} of {COUNT} packets of a batch that two sessions share"
    batched.must_have_used("in", "udp-gro")


# What makes a packet unacceptable, by name.
BAD: dict[str, Callable[[bytes], bytes]] = {
    "foreign-source": lambda packet: ip_packet("192.168.241.77", INNER4, packet[20:]),
    "longer-than-message": lambda packet: packet[:2] + (4 * LENGTH).to_bytes(2) + packet[4:],
    "shorter-than-header": lambda packet: packet[:2] + (19).to_bytes(2) + packet[4:],
    "version-1": lambda packet: b"\x15" + packet[1:],
    "zeros": lambda packet: bytes(len(packet)),
}


@pytest.mark.requirement("AIP-02", "DT-23", "DT-25")
@pytest.mark.parametrize("places", [(2, 5), (COUNT - 1,)], ids=["middle", "last"])
@pytest.mark.parametrize("kind", BAD)
def test_unacceptable_packet_of_batch_is_lost_alone(batched: Batched, kind: str, places: tuple[int, ...]) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    good = packets_of(target, peer)
    # Not the first one, whose headers others are compared with.
    bad = {place: BAD[kind](good[place]) for place in places}
    peer.send_together([session.data(bad.get(number, packet)) for number, packet in enumerate(good)])
    came = [good.index(packet) if packet in good else packet[:20].hex() for packet in batched.delivered(peer)]
    wanted = [number for number in range(COUNT) if number not in bad]
    assert came == wanted, f"of a batch in which the packets {places} are bad ({kind}) these were delivered: {came}"
    batched.must_have_used("in", "udp-gro")


@pytest.mark.requirement("DT-23")
def test_short_last_packet_with_length_of_others_is_lost_alone(batched: Batched) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    good = packets_of(target, peer)
    tail = target.packet(peer, b"tail")
    claims_more = tail[:2] + len(good[0]).to_bytes(2) + tail[4:]
    peer.send_together([session.data(packet) for packet in (*good, claims_more)])
    came = batched.delivered(peer)
    assert came == good, f"{len(came)} of {COUNT} packets came before one that is longer than its message"
    batched.must_have_used("in", "udp-gro")


@pytest.mark.requirement("IF-11")
def test_each_message_of_batch_counts_in_rx_bytes(batched: Batched) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    batched.delivered(peer)
    before = target.seen(peer).rx_bytes
    packets = [*packets_of(target, peer), target.packet(peer, b"short")]
    messages = [session.data(packet) for packet in packets] + [session.keepalive()]
    peer.send_together(messages)
    sent = sum(len(message.plaintext) + MESSAGE for message in messages)
    seen = poll_until(lambda: target.seen(peer).rx_bytes - before, lambda grown: grown >= sent, 2.0)
    assert seen == sent, f"rx_bytes grew by {seen} for a batch of {len(messages)} messages with {sent} bytes"
    batched.must_have_used("in", "udp-gro")


@pytest.mark.requirement("DT-29")
@pytest.mark.bug("IB-56")
@pytest.mark.parametrize("family", [4, 6])
def test_outer_ecn_of_batch_marks_each_inner_packet(batched: Batched, family: int) -> None:
    target, peer = batched.target, batched.target.peer()
    session = peer.connect()
    wrong = {}
    for outer in range(4):
        for ecn in range(4):
            target.inside.forget()
            payloads = [bytes([number]) * LENGTH for number in range(COUNT)]
            packets = [target.packet(peer, payload, family=family, tos=0xB8 | ecn) for payload in payloads]
            peer.send_together([session.data(packet) for packet in packets], tos=outer)
            came = batched.delivered(peer)
            assert [packet[-LENGTH:] for packet in came] == payloads, f"outer ECN {outer}, inner {ecn}: packets lost"
            seen = {(p[1] if family == 4 else p[0] << 4 & 0xF0 | p[1] >> 4) & 3 for p in came}
            if seen != {DECAPSULATED.get((outer, ecn), ecn)}:
                wrong[outer, ecn] = seen
    batched.must_have_used("in", "udp-gro")
    if wrong:
        differs(f"RFC 6040 wants another inner ECN for these (outer, inner): {wrong}", by=[target.implementation.name])


# From the device to the peer.


def send(target: Target, peer: ScriptedPeer, family: int, *batches: Sequence[bytes], tos: int = 0) -> None:
    """Let the device's node send UDP payloads to a peer, each batch by one system call, all before the device runs."""
    kind, address = (socket.AF_INET, peer.inner4) if family == 4 else (socket.AF_INET6, peer.inner6)
    with closing(target.node.socket(kind, socket.SOCK_DGRAM)) as sock, stopped(target.interface.pid):
        if family == 4:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        sock.connect((address, DISCARD))
        for batch in batches:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(batch[0]) if len(batch) > 1 else 0)
            sock.send(b"".join(batch))


def received(peer: ScriptedPeer, count: int) -> list[ReceivedData]:
    """Return as many data messages with a packet as were sent, in the order in which they come."""
    return [peer.expect(Data, where=lambda one: bool(one.plaintext)) for _ in range(count)]


def payload_of(packet: bytes, family: int) -> bytes:
    """Return the UDP payload of an inner packet; AssertionError if its lengths or checksums are wrong."""
    header, size = (20, int.from_bytes(packet[2:4])) if family == 4 else (40, 40 + int.from_bytes(packet[4:6]))
    datagram, addresses = packet[header:size], packet[12:20] if family == 4 else packet[8:40]
    assert size <= len(packet), f"a packet states {size} bytes, and its message holds {len(packet)}"
    assert int.from_bytes(datagram[4:6]) == len(datagram), "the UDP length of a packet is not that of its IP header"
    assert family == 6 or checksum(packet[:header]) == 0, "the IPv4 header of a packet has a wrong checksum"
    summed = checksum(addresses + struct.pack(">HH", socket.IPPROTO_UDP, len(datagram)) + datagram)
    assert datagram[6:8] != bytes(2), "a packet has no UDP checksum"
    assert summed == 0, f"a packet of {size} bytes has a wrong UDP checksum"
    return datagram[8:]


# Lengths of the payloads of batches: with padding and without, with short tails, and the longest.
BATCHES = [
    (1001,) * 12,
    (100,) * 20 + (1,),
    (1000,) * 5 + (999,),
    (1372,) * 10,
    (1, 1),
    (3,) * 9 + (2,),
    (20,) * MOST_SEGMENTS,
]


@pytest.mark.bug("IB-58")
@pytest.mark.requirement("DT-31", "Q-04", "Q-11")
@pytest.mark.parametrize("family", [4, 6])
def test_batch_leaves_as_one_message_for_each_packet(batched: Batched, family: int) -> None:
    target, peer = batched.target, batched.target.peer()
    peer.connect()
    with twin("a single packet is sent"):
        send(target, peer, family, [b"single"])
        counters = [one.counter for one in received(peer, 1)]
    for lengths in BATCHES:
        payloads = [bytes([number + 1]) * length for number, length in enumerate(lengths)]
        send(target, peer, family, payloads)
        messages = received(peer, len(lengths))
        counters += [one.counter for one in messages]
        assert [payload_of(one.plaintext, family) for one in messages] == payloads, f"a batch of {lengths} has changed"
    assert counters == list(range(counters[0], counters[0] + len(counters))), f"counters are not in order: {counters}"
    for offload in (f"uso{family}", "udp-segment"):
        batched.must_have_used("out", offload)


@pytest.mark.requirement("MSG-12", "MTU-03")
@pytest.mark.parametrize("family", [4, 6])
def test_packets_of_batch_are_padded_with_zeros(batched: Batched, family: int) -> None:
    target, peer = batched.target, batched.target.peer()
    peer.connect()
    header = 28 if family == 4 else 48
    wrong = {}
    longest: dict[int, int] = {}
    for lengths in BATCHES:
        # What is in a buffer before must not be left behind a shorter packet.
        send(target, peer, family, [b"\xff" * (MTU - header)] * 20)
        received(peer, 20)
        send(target, peer, family, [b"\xaa" * length for length in lengths])
        for length, one in zip(lengths, received(peer, len(lengths)), strict=True):
            padding = one.plaintext[length + header :]
            if len(one.plaintext) > MTU:
                longest[length] = len(one.plaintext)
            wanted = min(-(length + header) % 16, MTU - length - header)
            if padding != bytes(wanted):
                wrong[length, len(lengths)] = padding.hex()
    for offload in (f"uso{family}", "udp-segment"):
        batched.must_have_used("out", offload)
    if longest:
        differs(
            f"packets of a batch are padded beyond the MTU of {MTU}; by payload, to these bytes: {longest}",
            requirement="MTU-03",
            by=[target.implementation.name],
        )
    if wrong:
        differs(
            f"the padding of packets in a batch is not zeros to 16 bytes, by payload and number: {wrong}",
            requirement="MSG-12",
            by=[target.implementation.name],
        )


@pytest.mark.requirement("IF-11")
@pytest.mark.parametrize("family", [4, 6])
def test_batch_is_counted_by_bytes_of_its_messages(batched: Batched, family: int) -> None:
    target, peer = batched.target, batched.target.peer()
    peer.connect()
    before, sent = target.seen(peer).tx_bytes, 0
    for lengths in BATCHES:
        send(target, peer, family, [b"\xaa" * length for length in lengths])
        sent += sum(len(one.datagram) for one in received(peer, len(lengths)))
    for offload in (f"uso{family}", "udp-segment"):
        batched.must_have_used("out", offload)
    counted = poll_until(lambda: target.seen(peer).tx_bytes - before, sent.__eq__, 2.0)
    assert counted == sent, f"the device counts {counted} bytes as sent for batches of {sent} bytes of messages"


@pytest.mark.requirement("DT-28", "DT-30")
@pytest.mark.parametrize("family", [4, 6])
def test_ecn_of_batch_is_copied_to_outer_header(batched: Batched, family: int) -> None:
    target, peer = batched.target, batched.target.peer()
    peer.connect()
    wrong = {}
    for ecn, wanted in ENCAPSULATED.items():
        send(target, peer, family, [bytes(LENGTH)] * COUNT, tos=0xB8 | ecn)
        classes = {one.tos for one in received(peer, COUNT)}
        assert not {one & ~3 for one in classes} - {0}, f"the inner DSCP of a batch is in its outer headers: {classes}"
        if classes != {wanted}:
            wrong[ecn] = classes
    for offload in (f"uso{family}", "udp-segment"):
        batched.must_have_used("out", offload)
    if wrong:
        differs(
            f"by inner ECN, the outer ECN of a batch is {wrong}", requirement="DT-28", by=[target.implementation.name]
        )


@pytest.mark.bug("IB-58")
@pytest.mark.requirement("Q-04")
@pytest.mark.parametrize("family", [4, 6])
def test_packets_and_batches_leave_in_order(batched: Batched, family: int) -> None:
    target, peer = batched.target, batched.target.peer()
    peer.connect()
    batches = [
        [f"{number} {part}".encode().ljust(200) for part in range(count)]
        for number, count in enumerate((1, 5, 1, 1, 7, 2, 1, 3))
    ]
    send(target, peer, family, *batches)
    sent = [payload for batch in batches for payload in batch]
    came = [payload_of(one.plaintext, family) for one in received(peer, len(sent))]
    assert came == sent, f"packets and batches left in another order: {[payload[:4] for payload in came]}"
    batched.must_have_used("out", f"uso{family}")
