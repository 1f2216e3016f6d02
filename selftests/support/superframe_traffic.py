"""Send patterned data through a tunnel, check every byte, and read the offloads used.

A superframe is a packet that the kernel passes whole and that stands for many: TSO and USO on an interface, UDP_SEGMENT
and UDP_GRO on a socket. What refwg used is in its trace; what the kernel has is asked here, of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import select
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from harness import DeadlineExceeded, HarnessError, not_reached, offloads, poll_until, scaled
from harness.net.netns import enlarge_receive_buffer
from harness.traffic.udp import family_of
from refwg.mutants import load_mutants

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness import Interface, Manifest, NetNS

# Offloads of the interface by the flag that TUNSETOFFLOAD takes (linux/if_tun.h); each needs the first.
_CHECKSUM: Final = 0x01
_TUN_FLAGS: Final = {"csum": 0, "tso4": 0x02, "tso6": 0x04, "tso-ecn": 0x02 | 0x08, "uso4": 0x60, "uso6": 0x60}
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN: Final = 0x0001 | 0x1000 | 0x4000  # with IFF_NO_PI and IFF_VNET_HDR
_UDP_SEGMENT: Final = 103
_UDP_OPTIONS: Final = {"udp-segment": _UDP_SEGMENT, "udp-gro": 104}
OFFLOADS: Final = (*_TUN_FLAGS, *_UDP_OPTIONS)
# What is off as well if one is off: without checksums no interface has others, and TUN has both of USO or none.
_OFF_WITH: Final = {"csum": {*_TUN_FLAGS}, "uso4": {"uso4", "uso6"}, "uso6": {"uso4", "uso6"}, "all": {*OFFLOADS}}
# UDP_MAX_SEGMENTS, and the largest payload of a UDP datagram over IPv4.
_SEGMENTS: Final = 128 if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9) else 64
_LARGEST: Final = 65507
# The length of the IPv6 and UDP headers: a datagram then fits into the MTU over IPv4 too.
_HEADERS: Final = 40 + 8
# Bytes of the longest write to a TCP connection, and of one read.
_LONGEST_WRITE: Final = 200_000
_READ: Final = 1 << 18
_BUFFER: Final = 16 << 20
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_DISCARD: Final = 9
# Seconds without any progress.
PATIENCE: Final = 15.0
_MILLISECONDS: Final = 1000
_LOOKED: Final = 5.0
# The pattern repeats after a prime number of bytes, so that segments and batches never begin at the same byte again.
_PERIOD: Final = 1_000_003
_WORD: Final = 16


class Pattern:
    """A fixed sequence of bytes that differ from those at any other place of the same period."""

    def __init__(self) -> None:
        period = random.Random(1).randbytes(_PERIOD)  # noqa: S311 - not a secret
        self._bytes = period + period[: max(_READ, _LONGEST_WRITE)]
        self._view = memoryview(self._bytes)

    def at(self, start: int, length: int) -> memoryview:
        """Return the bytes at a place; length: at most 256 KiB."""
        start %= _PERIOD
        return self._view[start : start + length]

    def compare(self, received: memoryview, start: int, what: str) -> None:
        """Raise HarnessError unless these are the bytes at a place."""
        wanted = self.at(start, len(received))
        if received == wanted:
            return
        at = next(i for i, (actual, right) in enumerate(zip(received, wanted, strict=True)) if actual != right)
        place = self._bytes.find(bytes(received[at : at + _WORD]))
        known = place >= 0 and len(received) - at >= _WORD
        there = f"; the bytes there are those of {start + at + place - (start + at) % _PERIOD}" if known else ""
        raise HarnessError(f"{what}: byte {start + at} arrived as 0x{received[at]:02x}, not 0x{wanted[at]:02x}{there}")


PATTERN: Final = Pattern()


def send_tcp(
    ends: tuple[NetNS, NetNS], address: str, size: int, chance: random.Random, *, segment: int | None = None
) -> None:
    """Send `size` bytes of the pattern over one TCP connection by writes of random length, and check each byte.

    ends: sender and receiver. address: of the receiver. segment: the most bytes in a segment; None: as the MTU allows.
    Every other connection is without Nagle's delay, so that its short writes leave as short segments. Raises
    HarnessError if other bytes arrive, DeadlineExceeded without progress.
    """
    sender, receiver = ends
    what = f"tcp {sender.name} to {address}"
    with ExitStack() as stack:
        listener = stack.enter_context(receiver.socket(family_of(address), socket.SOCK_STREAM))
        listener.bind((address, 0))
        listener.listen(1)
        listener.settimeout(scaled(PATIENCE))
        client = stack.enter_context(sender.socket(family_of(address), socket.SOCK_STREAM))
        client.settimeout(scaled(PATIENCE))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, chance.randrange(2))
        if segment is not None:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        try:
            client.connect(listener.getsockname()[:2])
            server = stack.enter_context(listener.accept()[0])
        except OSError as error:
            raise HarnessError(f"{what}: {error}") from error
        _pump(client, server, size, chance, what)


def _pump(client: socket.socket, server: socket.socket, size: int, chance: random.Random, what: str) -> None:
    client.setblocking(False)
    server.setblocking(False)
    buffer = memoryview(bytearray(_READ))
    sent = arrived = 0
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(client, select.POLLOUT)
    while arrived < size:
        ready = dict(poll.poll(scaled(PATIENCE) * _MILLISECONDS))
        if not ready:
            raise DeadlineExceeded(
                f"{what}: nothing arrived for {scaled(PATIENCE):g} s after {arrived} of {size} bytes"
            )
        try:
            if client.fileno() in ready:
                sent += client.send(PATTERN.at(sent, min(size - sent, chance.randrange(1, _LONGEST_WRITE))))
            length = server.recv_into(buffer) if server.fileno() in ready else None
        except OSError as error:
            raise HarnessError(f"{what}: {error} after {arrived} of {size} bytes") from error
        if sent == size and client.fileno() in ready:
            poll.unregister(client)
        if length is not None:
            if not length:
                raise HarnessError(f"{what}: the connection ended after {arrived} of {size} bytes")
            PATTERN.compare(buffer[:length], arrived, what)
            arrived += length


def send_udp(
    ends: tuple[NetNS, NetNS], address: str, size: int, mtu: int, chance: random.Random, *, is_ordered: bool
) -> None:
    """Send `size` bytes of the pattern or more by batches (UDP_SEGMENT) of random shape, and check each datagram.

    The next batch is sent when the last one has arrived, so that no queue is full. Half of the batches have datagrams
    as long as the MTU allows. is_ordered: those of a batch arrive in order. Raises HarnessError if another datagram
    arrives, or the next one does not.
    """
    sender, receiver = ends
    with ExitStack() as stack:
        arrivals = stack.enter_context(receiver.socket(family_of(address), socket.SOCK_DGRAM))
        enlarge_receive_buffer(arrivals, _BUFFER)
        arrivals.bind((address, 0))
        sock = stack.enter_context(sender.socket(family_of(address), socket.SOCK_DGRAM))
        sock.connect(arrivals.getsockname()[:2])
        start = number = 0
        shapes = _edges(mtu - _HEADERS)
        while shapes or start < size:
            length, count, last = shapes.pop() if shapes else _shape(mtu - _HEADERS, chance)
            what = f"udp {sender.name} to {address}: batch {number} of {count} datagrams of {length} bytes, last {last}"
            lengths = [length] * (count - 1) + [last]
            send_batch((sock, arrivals), start, lengths, what=what, is_ordered=is_ordered)
            start += length * (count - 1) + last
            number += 1


def _edges(longest: int) -> list[tuple[int, int, int]]:
    """Return the shortest and the longest batches: length of the datagrams, number, length of the last."""
    most = _most(longest)
    return [(1, 2, 1), (2, 2, 1), (1, _SEGMENTS, 1), (3, 5, 2), (longest, most, 1), (longest, most, longest)]


def _shape(longest: int, chance: random.Random) -> tuple[int, int, int]:
    length = longest if chance.randrange(2) else chance.randint(1, longest)
    return length, chance.randint(1, _most(length)), chance.choice((length, chance.randint(1, length)))


def _most(length: int) -> int:
    """Return how many datagrams of this length a batch holds."""
    return max(1, min(_SEGMENTS, _LARGEST // length))


def send_batch(
    ends: tuple[socket.socket, socket.socket],
    start: int,
    lengths: Sequence[int],
    *,
    what: str,
    patience: float = PATIENCE,
    is_ordered: bool = True,
) -> None:
    """Send datagrams of the pattern by one system call (UDP_SEGMENT, udp(7)), and check that just these arrive.

    ends: a connected socket, and a bound one. start: the place of the first byte in the pattern. lengths: all equal,
    but that the last may be shorter. patience: seconds for each datagram. is_ordered: they arrive in the order in which
    they were sent. Raises HarnessError, with `what` in front, if another one arrives, or the next does not.
    """
    sock, arrivals = ends
    sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, lengths[0])
    arrivals.settimeout(scaled(patience))
    try:
        sock.send(PATTERN.at(start, sum(lengths)))
    except OSError as error:
        raise HarnessError(f"{what}: {error}") from error
    left = list(range(len(lengths)))
    while left:
        try:
            data = memoryview(arrivals.recv(_LARGEST))
        except TimeoutError as error:
            raise HarnessError(f"{what}: datagram {left[0]} did not arrive in {scaled(patience):g} s") from error
        number = left[0]
        if not is_ordered:
            places = (one for one in left if PATTERN.at(start + one * lengths[0], lengths[one]) == data)
            number = next(places, number)
        if len(data) != lengths[number]:
            raise HarnessError(f"{what}: datagram {number} arrived with {len(data)} bytes, not {lengths[number]}")
        PATTERN.compare(data, start + number * lengths[0], f"{what}: datagram {number}")
        left.remove(number)


@dataclass(frozen=True, slots=True)
class Trace:
    """What the batch engine of a refwg wrote to its trace; name: of the side, for messages."""

    file: Path
    name: str

    def _events(self, event: str) -> list[dict[str, object]]:
        # The last line may be half written.
        lines = self.file.read_text().split("\n")[:-1] if self.file.exists() else []
        return [record for record in map(json.loads, lines) if record["event"] == event]

    def switched_on(self) -> frozenset[str] | None:
        """Return the offloads that the engine switched on; None: the batch engine did not start."""
        for record in self._events("engine"):
            names = record["offloads"]
            assert isinstance(names, list)
            return frozenset(names)
        return None

    def used(self) -> dict[tuple[str, str], int]:
        """Return how many superframes or batches there were, rounded down to a power of two.

        The keys are the direction ("in", "out") and the offload.
        """
        return {
            (str(record["direction"]), str(record["offload"])): int(str(record["count"]))
            for record in self._events("offload")
        }


def traced(manifest: Manifest, file: Path, *words: str) -> Manifest:
    """Return how a refwg is started with a trace and further words; other implementations as they are."""
    if "refwg" not in {manifest.name, manifest.base}:
        return manifest
    return replace(manifest, command=(*manifest.command, "--trace", str(file), *words))


def has_batch_engine(manifest: Manifest) -> bool:
    """Return whether this is refwg with the batch engine from the start, or a mutant of it."""
    variant = manifest.name.partition("+")[2]
    mutant = load_mutants().get(variant)
    engine = mutant.engine if mutant is not None else variant
    return manifest.base == "refwg" and engine in {"batch", "workers"}


def sends_batches(manifest: Manifest) -> bool:
    """Return whether a program is known to send batches by UDP_SEGMENT when it gets superframes."""
    return has_batch_engine(manifest) or manifest.name == "wireguard-go"


def of_kernel(node: NetNS) -> frozenset[str]:
    """Return the offloads that this kernel has, as a new TUN interface and a new socket take them."""
    return frozenset(node.thread.call(_of_kernel))


def _of_kernel() -> list[str]:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"probe%d", _IFF_TUN))
        names = [name for name, flags in _TUN_FLAGS.items() if _takes(descriptor, _CHECKSUM | flags)]
    finally:
        os.close(descriptor)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for name, option in _UDP_OPTIONS.items():
            try:
                sock.setsockopt(socket.IPPROTO_UDP, option, 1)
            except OSError:
                continue
            names.append(name)
    return names


def _takes(descriptor: int, flags: int) -> bool:
    try:
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, flags)
    except OSError:
        return False
    return True


def off_with(name: str) -> set[str]:
    """Return the offloads that are off if this one is switched off; name: may be `all`."""
    return _OFF_WITH.get(name, {name})


def must_pass_superframes(node: NetNS, device: str) -> None:
    """End the test as not reached if a link would cut superframes."""
    off = [name for name in ("tx", "sg", "tso", "gso") if not offloads(node, device)[name]]
    if off:
        not_reached(f"{device} of {node.name} has its offloads {', '.join(off)} off, so it cuts superframes")


def refusal_of_batch(node: NetNS, address: str, length: int) -> str:
    """Send two datagrams of this length as a batch to a closed port; return the name of the errno, empty for none.

    They may be fragmented, as those of WireGuard.
    """
    with node.socket(family_of(address), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, 0)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, 0)
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, length)
        try:
            sock.sendto(bytes(2 * length), (address, _DISCARD))
        except OSError as error:
            return errno.errorcode[error.errno or errno.EIO]
    return ""


def must_have_used(side: Interface, trace: Trace, direction: str, offload: str) -> None:
    """End the test as not reached if a side did not use an offload that the kernel has.

    Raises HarnessError if the kernel has it, and refwg did not switch it on.
    """
    if offload not in of_kernel(side.place):
        return
    on = trace.switched_on()
    if on is None:
        not_reached(f"{trace.name}: the batch engine did not start")
    if offload not in on:
        raise HarnessError(f"{trace.name}: {offload} is off, although the kernel has it; on: {', '.join(sorted(on))}")
    # It counts a superframe a moment after it has passed it on.
    if not poll_until(lambda: (direction, offload) in trace.used(), bool, _LOOKED):
        not_reached(f"{trace.name} passed no superframe by {offload}, direction {direction}")
