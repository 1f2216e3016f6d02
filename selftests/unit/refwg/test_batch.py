"""The batch engine does what the simple engine does, packet by packet; superframes and batches are all that differs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from refwg.boundary import Endpoint
from refwg.engine.batch import BatchEngine
from refwg.engine.offloads import OFFLOADS, enable, offload_of
from refwg.errors import DropReason
from refwg.messages import KEEPALIVE_TIMEOUT, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_TIME, SECOND
from refwg.peer import StagedPacket
from selftests.support import flows
from selftests.support.engines import Driven, both
from selftests.support.flows import ACK, PSH, UDP, Flow
from selftests.support.packets import ip_packet

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

PAYLOAD = bytes(number * 7 % 251 for number in range(30000))
# From A to B, which is what A's engine sends; and from B to A.
OUT, IN = Flow(), Flow(number=2)
PLAIN = bytes(10)


def single(packet: bytes) -> bytes:
    return PLAIN + packet


# From the interface.


@pytest.mark.parametrize(
    "flow", [OUT, replace(OUT, version=6), replace(OUT, protocol=UDP)], ids=["tcp4", "tcp6", "udp4"]
)
def test_superframes_become_same_datagrams(flow: Flow) -> None:
    batch = both(lambda side: side.send([flow.frame(PAYLOAD, 1300), flow.frame(PAYLOAD[:1500], 1300)]))
    assert len(batch.udp.sent) == 24 + 2
    assert batch.udp.calls == 2
    assert batch.offloads.used["out", "udp-segment"] == 2


def test_superframe_larger_than_batch_is_sent_in_parts() -> None:
    batch = both(lambda side: side.send([OUT.frame(bytes(65000), 1300), OUT.frame(bytes(2000), 10)]))
    assert batch.udp.calls == 2 + 4


@pytest.mark.parametrize("tos", range(4))
def test_ecn_bits_of_superframe_are_those_of_each_datagram(tos: int) -> None:
    batch = both(lambda side: side.send([replace(OUT, tos=0x28 | tos).frame(PAYLOAD, 1300)]))
    assert {traffic_class for _, _, traffic_class in batch.udp.sent} == {2 if tos == 3 else tos}


def test_equal_packets_are_sent_as_one_batch() -> None:
    packets = [ip_packet("192.168.241.1", "192.168.241.2", bytes([number]) * 99) for number in range(64)]
    other = [ip_packet("fd00::1", "fd00::2", b"six")] * 3 + [ip_packet("192.168.241.1", "192.168.241.2", b"four")] * 2
    batch = both(lambda side: side.send([*map(single, packets), *map(single, other)]))
    assert batch.udp.calls == 3


def test_packet_is_sent_before_next_read_if_last_one_was_alone() -> None:
    sent_at_read: list[int] = []

    def script(side: Driven) -> None:
        read = side.tun.read_into

        def counting_read(buffer: memoryview) -> int:
            sent_at_read.append(len(side.udp.sent))
            return read(buffer)

        side.send([single(OUT.packet(b"alone"))])
        side.tun.read_into = counting_read  # type: ignore[method-assign]
        for frames in (3, 2):
            side.tun.waiting += [single(OUT.packet(b"same"))] * frames
            side.engine.packets_waiting()

    batch = both(script)
    assert len(batch.udp.sent) == 1 + 3 + 2
    # The first of three leaves before the second is read; then two are sent together, because three came before them.
    assert (sent_at_read, batch.udp.calls) == ([1, 2, 2, 2, 4, 4, 4], 1 + 2 + 1)


def test_large_packets_that_fit_no_batch_are_sent_alone() -> None:
    packet = single(ip_packet("192.168.241.1", "192.168.241.2", bytes(8000)))
    batch = both(lambda side: side.send([packet] * 20))
    assert batch.udp.calls == 20


def test_batch_engine_reads_no_more_than_its_share_per_turn() -> None:
    side = Driven(is_batch=True)
    side.tun.waiting += [single(OUT.packet(b"x"))] * 100
    side.engine.packets_waiting()
    assert len(side.tun.waiting) == 36
    side.tun.waiting[:] = [OUT.frame(PAYLOAD, 1300)] * 10
    side.engine.packets_waiting()
    assert len(side.tun.waiting) == 6
    side.udp.waiting += [(b"", 1, 0)] * 10
    side.engine.datagrams_waiting(cast("socket.socket", None))
    assert len(side.udp.waiting) == 2


def test_partial_checksums_are_completed_in_batches_and_alone() -> None:
    datagrams = replace(OUT, protocol=UDP)
    frames = []
    for flow in (OUT, datagrams, replace(OUT, version=6)):
        for count in (1, 3):
            virtio = flow.frame(b"x", 1)[:10]
            partial = bytes([1, 0]) + bytes(4) + virtio[6:]
            frames += [
                partial + flow.packet(PAYLOAD[number : number + 101], is_partial=True) for number in range(count)
            ]
            frames.append(single(b"not ip"))
    batch = both(lambda side: side.send(frames))
    assert batch.device.statistics.drops[DropReason.NOT_IP] == 6


def test_checksum_of_zero_is_sent_as_ones_in_udp() -> None:
    flow = replace(OUT, protocol=UDP)
    rest = flow.packet(bytes(4))[-6:-4]
    virtio = flow.frame(b"x", 1)[:10]
    partial = bytes([1, 0]) + bytes(4) + virtio[6:]
    both(lambda side: side.send([partial + flow.packet(rest + bytes(2), is_partial=True)]))


REFUSED: dict[str, Callable[[Driven], None]] = {
    "no peer": lambda side: side.device.remove_allowed_ips(side.pair.a.peer),
    "no endpoint": lambda side: setattr(side.pair.a.peer, "endpoint", None),
    "no session": lambda side: side.device.clear_keys(0),
    "down": lambda side: side.device.down(0),
    "own address": lambda side: side.pair.a.peer.set_endpoint(Endpoint(OUT.addresses[4:], 2000), 0),
    "old session": lambda side: setattr(side.pair, "now", side.pair.now + REJECT_AFTER_TIME),
    "to be renewed": lambda side: setattr(side.pair, "now", side.pair.now + REKEY_AFTER_TIME),
}


@pytest.mark.parametrize("prepare", REFUSED.values(), ids=list(REFUSED))
def test_packets_that_cannot_be_sent_have_same_fate(prepare: Callable[[Driven], None]) -> None:
    def script(side: Driven) -> None:
        prepare(side)
        side.send([OUT.frame(PAYLOAD[:5000], 1300), *[single(OUT.packet(b"same"))] * 3])
        side.engine.time_passed()

    both(script)


def test_staged_packet_leaves_before_superframe() -> None:
    def script(side: Driven) -> None:
        side.pair.a.peer.staged.stage([StagedPacket(OUT.packet(b"waits"), 1420)])
        side.send([OUT.frame(PAYLOAD[:5000], 1300)])

    assert len(both(script).udp.sent) == 1 + 4


def test_last_counters_are_used_one_by_one() -> None:
    def script(side: Driven) -> None:
        keypair = side.pair.a.peer.keypairs.current
        assert keypair is not None
        keypair.sending_counter = REJECT_AFTER_MESSAGES - 2
        side.send([OUT.frame(PAYLOAD[:5000], 1300)])

    batch = both(script)
    assert len(batch.udp.sent) == 2


def test_superframes_without_session_are_staged_as_packets() -> None:
    def script(side: Driven) -> None:
        side.pair.a.peer.staged.restage([])
        side.device.clear_keys(0)
        side.send([OUT.frame(PAYLOAD[:3000], 1300)] * 60)

    batch = both(script)
    assert batch.device.statistics.drops[DropReason.QUEUE_OVERFLOW] == 180 - 129


def test_frame_that_is_no_superframe_is_counted() -> None:
    side = Driven(is_batch=True)
    frame = OUT.frame(PAYLOAD[:3000], 1300)
    side.send([frame[:1] + bytes([3]) + frame[2:]])
    assert side.udp.sent == []
    assert side.device.statistics.drops[DropReason.MALFORMED_SUPERFRAME] == 1


def test_kernel_is_asked_for_superframes_that_fit_batch() -> None:
    for mtu, largest in ((1420, 45 * 1360 + 60), (1280, 49 * 1220 + 60), (576, 64 * 516 + 60), (65535, 0)):
        side = Driven(is_batch=True)
        side.tun.link.mtu = mtu
        side.send([])
        side.engine.packets_waiting()
        assert side.tun.largest == largest


def test_interface_without_virtio_headers_has_plain_packets() -> None:
    def script(side: Driven) -> None:
        side.send([single(OUT.packet(b"one")), single(OUT.packet(b"two"))])
        side.receive(side.messages([IN.packet(b"back")]))
        side.receive(side.messages([ip_packet("192.168.241.2", "192.168.241.1", b"1")] * 2))

    both(script, has_headers=False)


# Refusals of the stack.


@pytest.mark.parametrize("error", ["EIO", "EMSGSIZE", "EINVAL", "EOPNOTSUPP"])
def test_batch_that_is_refused_is_sent_one_by_one(error: str) -> None:
    def script(side: Driven) -> None:
        side.udp.error = lambda _, segment: error if segment else ""
        side.send([OUT.frame(PAYLOAD[:5000], 1300)])

    batch = both(script)
    assert (len(batch.udp.sent), batch.udp.calls, batch.refused) == (4, 5, [])


@pytest.mark.parametrize("error", ["EPERM", "EAGAIN", "ENETUNREACH", "ENOBUFS"])
def test_refusal_of_batch_is_that_of_each_datagram(error: str) -> None:
    def script(side: Driven) -> None:
        side.udp.error = lambda _datagrams, _segment: error
        side.send([OUT.frame(PAYLOAD[:5000], 1300)])

    batch = both(script)
    assert batch.udp.calls == 1
    assert batch.device.statistics.drops[DropReason.SEND_FAILED] == 4


def test_without_udp_segment_each_datagram_is_sent_alone() -> None:
    side = Driven(is_batch=True)
    side.offloads.enabled -= {"udp-segment"}
    side.send([OUT.frame(PAYLOAD[:5000], 1300)])
    assert (len(side.udp.sent), side.udp.calls) == (4, 4)


# From the network.


@pytest.mark.parametrize("flow", [IN, replace(IN, version=6), replace(IN, protocol=UDP)], ids=["tcp4", "tcp6", "udp4"])
def test_batches_become_same_packets_in_one_superframe(flow: Flow) -> None:
    packets = flow.segments(PAYLOAD, 1300)
    batch = both(lambda side: side.receive(side.messages(packets)))
    assert len(batch.tun.written) == 1
    assert flows.cut(batch.tun.written[0])[0][-1300:] == packets[0][-1300:]


def test_superframe_that_kernel_refuses_is_taken_apart() -> None:
    def script(side: Driven) -> None:
        side.tun.refuses = lambda frame: bool(frame[1])
        side.receive(side.messages(IN.segments(PAYLOAD, 1300)))

    assert len(both(script).tun.written) == 24


def test_packets_that_kernel_refuses_are_counted() -> None:
    def script(side: Driven) -> None:
        side.tun.refuses = lambda _: True
        side.receive(side.messages(IN.segments(PAYLOAD[:5000], 1300)))

    assert both(script).device.statistics.drops[DropReason.NOT_DELIVERED] == 4


def tampered(message: bytes) -> bytes:
    return message[:-1] + bytes([message[-1] ^ 1])


MISCHIEF: dict[str, Callable[[list[bytes]], Sequence[bytes]]] = {
    "tag": lambda messages: [messages[0], tampered(messages[1]), *messages[2:]],
    "all tags": lambda messages: [*map(tampered, messages)],
    "last tag": lambda messages: [*messages[:-1], tampered(messages[-1])],
    "replay": lambda messages: [*messages, *messages],
    "replay inside": lambda messages: [messages[0], messages[0], messages[1], tampered(messages[2]), messages[2]],
    "backwards": lambda messages: messages[::-1],
    "gap": lambda messages: [messages[0], *messages[2:]],
    "other index": lambda messages: [messages[0][:4] + bytes(4) + messages[0][8:], *messages[1:]],
    "unknown index": lambda messages: [message[:4] + bytes(4) + message[8:] for message in messages],
    "other type": lambda messages: [bytes([9]) + messages[0][1:], *messages[1:]],
    "reserved": lambda messages: [message[:3] + b"\1" + message[4:] for message in messages],
    "counter limit": lambda messages: [message[:8] + b"\xff" * 8 + message[16:] for message in messages],
    "last is short": lambda messages: [*messages[:-1], messages[-1][:40]],
    "last is shorter": lambda messages: [*messages[:-1], messages[-1][:20]],
    "garbage": lambda _: [b"\1" * 20] * 3,
}


@pytest.mark.parametrize("mischief", MISCHIEF.values(), ids=list(MISCHIEF))
def test_messages_that_are_refused_have_same_fate(mischief: Callable[[list[bytes]], Sequence[bytes]]) -> None:
    both(lambda side: side.receive(mischief(side.messages(IN.segments(PAYLOAD[:5200], 1300)))))


def test_last_counter_ends_session_in_middle_of_batch() -> None:
    def script(side: Driven) -> None:
        keypair = side.pair.b.peer.keypairs.current
        assert keypair is not None
        keypair.sending_counter = REJECT_AFTER_MESSAGES - 2
        messages = side.messages(IN.segments(PAYLOAD[:2600], 1300))
        side.receive([messages[1], messages[0], messages[1]])
        side.receive(messages)

    assert both(script).device.statistics.drops[DropReason.SESSION_EXPIRED] > 0


INNER: dict[str, Callable[[list[bytes]], Sequence[bytes]]] = {
    "foreign source": lambda packets: [replace(IN, number=1).packet(b"x" * 60)] * len(packets),
    "foreign among others": lambda packets: [packets[0], replace(IN, number=1).packet(bytes(1300)), *packets[1:]],
    "not ip": lambda packets: [b"\x10" + packet[1:] for packet in packets],
    "both families": lambda packets: [packets[0], replace(IN, version=6).packet(bytes(1280)), packets[1]],
    "too long": lambda packets: [packet[:2] + b"\xff" + packet[3:] for packet in packets],
    "too short": lambda packets: [packet[:2] + b"\0\5" + packet[4:] for packet in packets],
    "last too long": lambda packets: [*packets[:-1], packets[-1][:2] + b"\x05\x20" + packets[-1][4:]],
    "other class": lambda packets: [packets[0], replace(IN, tos=1).packet(bytes(1300)), *packets[1:]],
    "wrong checksum": lambda packets: [packets[0], tampered(packets[1]), *packets[2:]],
    "two sizes": lambda packets: [packet[:-16] for packet in packets],
}


@pytest.mark.parametrize("change", INNER.values(), ids=list(INNER))
def test_inner_packets_that_differ_have_same_fate(change: Callable[[list[bytes]], Sequence[bytes]]) -> None:
    packets = change(IN.segments(PAYLOAD[:3900], 1300))

    def script(side: Driven) -> None:
        # B sends what its table of prefixes would not let it send as it is.
        side.receive(sealed(side, packets))

    both(script)


def sealed(side: Driven, packets: Sequence[bytes]) -> list[bytes]:
    """Seal packets on B's session, whatever they are."""
    keypair = side.pair.b.peer.keypairs.current
    assert keypair is not None
    messages = []
    for packet in packets:
        plaintext = packet + bytes(-len(packet) % 16)
        header = (
            b"\4\0\0\0" + keypair.remote_index.to_bytes(4, "little") + keypair.sending_counter.to_bytes(8, "little")
        )
        messages.append(header + keypair.sending.seal(keypair.sending_counter, plaintext))
        keypair.sending_counter += 1
    return messages


def test_packets_of_other_lengths_in_rows_of_one_length_arrive() -> None:
    flow = replace(IN, protocol=UDP)
    packets = [flow.packet(PAYLOAD[:length]) for length in (128, 130, 126)]
    assert len(both(lambda side: side.receive(sealed(side, packets))).tun.written) == 2


def test_padding_does_not_make_wrong_checksum_right() -> None:
    flow = replace(IN, protocol=UDP)
    packets = flow.segments(PAYLOAD[:260], 130)
    place = flow.header_length - 2
    wrong = int.from_bytes(packets[1][place : place + 2]) - 1
    packets[1] = packets[1][:place] + wrong.to_bytes(2) + packets[1][place + 2 :] + b"\0\1"

    def script(side: Driven) -> None:
        side.receive(sealed(side, packets))

    assert len(both(script).tun.written) == 2


@pytest.mark.parametrize("outer", range(4))
@pytest.mark.parametrize("inner", range(4))
def test_ecn_marks_are_combined_in_same_way(outer: int, inner: int) -> None:
    flow = replace(IN, tos=inner)
    both(lambda side: side.receive(side.messages(flow.segments(PAYLOAD[:3900], 1300)), ecn=outer))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("keepalive_first", [False, True])
def test_timers_run_as_after_single_messages(count: int, keepalive_first: bool) -> None:
    def script(side: Driven) -> None:
        packets = IN.segments(PAYLOAD[: 1300 * count], 1300)
        if keepalive_first:
            side.receive(sealed(side, [b""]) + side.messages(packets))
        side.receive(side.messages(packets))
        side.pair.now += KEEPALIVE_TIMEOUT
        side.engine.time_passed()

    both(script)


def test_first_batch_on_next_session_confirms_it() -> None:
    def script(side: Driven) -> None:
        side.device.clear_keys(side.pair.now)
        side.pair.run(20 * SECOND)
        side.send([OUT.frame(PAYLOAD[:3900], 1300)])
        for effect in side.pair.b.device.send_packet(IN.packet(b"new"), 1420, side.pair.now):
            side.receive([effect.datagram])  # type: ignore[union-attr]
        side.receive(side.messages(IN.segments(PAYLOAD[:3900], 1300)))

    both(script)


def test_batches_of_keepalives_and_of_too_many_are_taken_apart() -> None:
    both(lambda side: side.receive(sealed(side, [b""] * 5)))
    both(lambda side: side.receive(sealed(side, [IN.packet(b"0123456789")] * 70)))


def test_few_messages_are_taken_one_by_one() -> None:
    side = Driven(is_batch=True)
    side.engine = BatchEngine(side.surroundings, offloads=side.offloads)
    for count, frames in ((3, 3), (4, 1)):
        side.tun.written.clear()
        side.receive(side.messages(IN.segments(PAYLOAD[: 1300 * count], 1300)))
        assert len(side.tun.written) == frames


def test_more_messages_than_rows_are_taken_one_by_one() -> None:
    side = Driven(is_batch=True)
    messages = sealed(side, [IN.packet(b"0123456789")] * 130)
    side.udp.waiting.append((b"".join(messages), len(messages[0]), 0))
    side.receive([])
    assert len(side.tun.written) == 130


def test_old_session_refuses_batch() -> None:
    def script(side: Driven) -> None:
        messages = side.messages(IN.segments(PAYLOAD[:3900], 1300))
        side.pair.now += REJECT_AFTER_TIME
        side.receive(messages)

    both(script)


def test_device_that_is_down_refuses_batch() -> None:
    def script(side: Driven) -> None:
        messages = side.messages(IN.segments(PAYLOAD[:3900], 1300))
        side.device.down(side.pair.now)
        side.receive(messages)

    both(script)


# Offloads.


class OldKernel:
    """An interface and sockets of a kernel that lacks some offloads; flags: what TUNSETOFFLOAD accepts."""

    has_headers = True

    def __init__(self, flags: int, *, joins: bool = True) -> None:
        self._flags = flags
        self._joins = joins
        self.on = 0

    def set_offloads(self, flags: int) -> bool:
        if flags & ~self._flags or (flags & 0x60 not in {0, 0x60}):
            return False
        self.on = flags
        return True

    def join_received(self) -> bool:
        return self._joins


def enabled(kernel: OldKernel, wanted: Sequence[str] = OFFLOADS) -> set[str]:
    return enable(kernel, kernel, wanted)  # type: ignore[arg-type]


def test_each_offload_that_kernel_lacks_is_left_out_alone() -> None:
    everything = {*OFFLOADS}
    assert enabled(OldKernel(0x6F)) == everything
    assert enabled(OldKernel(0x0F)) == everything - {"uso4", "uso6"}
    assert enabled(OldKernel(0x6F, joins=False)) == everything - {"udp-gro"}
    assert enabled(OldKernel(0x6B)) == everything - {"tso6"}
    assert enabled(OldKernel(0)) == {"udp-segment", "udp-gro"}


def test_each_offload_can_be_left_out() -> None:
    for name in OFFLOADS:
        kernel = OldKernel(0x6F)
        without = {*OFFLOADS} - {name}
        on = enabled(kernel, sorted(without))
        needs_others = {"csum": {"tso4", "tso6", "tso-ecn", "uso4", "uso6"}, "uso4": {"uso6"}, "uso6": {"uso4"}}
        assert on == without - needs_others.get(name, set())


def test_interface_without_virtio_headers_has_no_superframes() -> None:
    kernel = OldKernel(0x6F)
    kernel.has_headers = False
    assert enabled(kernel) == {"udp-segment", "udp-gro"}
    assert enabled(kernel, ["csum"]) == set()


def test_use_of_offloads_is_told_at_powers_of_two_and_at_end() -> None:
    side = Driven(is_batch=True)
    side.send([OUT.frame(PAYLOAD[:3900], 1300)] * 5)
    side.receive(side.messages(replace(IN, version=6).segments(PAYLOAD[:3900], 1300)))
    side.engine.close()
    told = [count for direction, offload, count in side.notes if (direction, offload) == ("out", "tso4")]
    assert told == [1, 2, 4, 5]
    assert [note for note in side.notes if note[0] == "in"] == [("in", "udp-gro", 1), ("in", "tso6", 1)]
    assert side.offloads.used["out", "udp-segment"] == 5


def test_kinds_of_superframes_belong_to_their_offloads() -> None:
    kinds = [(1, True), (0x81, True), (4, False), (5, True), (5, False)]
    assert [offload_of(kind, is_ipv4=is_ipv4) for kind, is_ipv4 in kinds] == ["tso4", "tso4", "tso6", "uso4", "uso6"]


def test_push_between_packets_gives_two_superframes() -> None:
    packets = [
        replace(IN, sequence=1 + 1300 * number, flags=ACK | (PSH if number == 1 else 0)).packet(bytes(1300))
        for number in range(4)
    ]
    batch = both(lambda side: side.receive(side.messages(packets)))
    assert len(batch.tun.written) == 2
