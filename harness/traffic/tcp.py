"""Send TCP streams by sendfile(2), and compare every byte as it arrives."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from harness.errors import DeadlineExceeded, HarnessError
from harness.traffic.udp import family_of
from harness.wait import scaled

if TYPE_CHECKING:
    from harness.net.netns import NetNS


_CHUNK: Final = 1 << 16
# By how many bytes a stream begins later than the one before.
_STRIDE: Final = 4099
# How long streams may take: seconds, and bytes per second of a slow program on a busy machine.
_PATIENCE: Final = 20.0
_SLOWEST: Final = 600_000
# struct tcp_info (linux/tcp.h) up to snd_cwnd, of which these are backoff, rto in microseconds, and snd_cwnd.
_TCP_INFO: Final = struct.Struct("=8B19I")
_BACKOFF, _RTO, _WINDOW = 4, 8, 26


def tcp_stream(
    sender: NetNS, receiver: NetNS, address: str, *, size: int = 1 << 20, deadline: float | None = None
) -> float:
    """Send `size` random bytes over one TCP connection; see `tcp_streams`."""
    return tcp_streams(sender, receiver, address, count=1, size=size, deadline=deadline)


def tcp_streams(
    sender: NetNS,
    receiver: NetNS,
    address: str,
    *,
    count: int,
    size: int = 1 << 20,
    deadline: float | None = None,
) -> float:
    """Send `size` random bytes by sendfile(2) over each of `count` TCP connections at once, and compare what arrives.

    address: of the receiver, where each connection has a port of its own. deadline: seconds, scaled; by default as many
    as a slow program on a busy machine may need. Returns bytes per second, of all together. Raises DeadlineExceeded, or
    HarnessError that says what arrived.
    """
    deadline = scaled(deadline or _PATIENCE + count * size / _SLOWEST)
    with ExitStack() as stack:
        transfer = _Transfer(sender, receiver, address, size, stack)
        started = time.monotonic()
        streams = [_Stream(transfer, number) for number in range(count)]
        while not all(stream.is_complete for stream in streams):
            left = started + deadline - time.monotonic()
            for key, _ in transfer.selector.select(left) if left > 0 else ():
                key.data()
            if left <= 0:
                done, arrived = sum(stream.is_complete for stream in streams), sum(stream.arrived for stream in streams)
                what = f"{done} of {count} streams and {arrived} of {count * size} bytes"
                left_behind = next(stream for stream in streams if not stream.is_complete)
                raise DeadlineExceeded(f"{transfer}: {what} arrived within {deadline:g} s; {left_behind}")
        return count * size / (time.monotonic() - started)


class _Transfer:
    """What the streams of one call have in common: the ends, the bytes, and who waits for events."""

    def __init__(self, sender: NetNS, receiver: NetNS, address: str, size: int, stack: ExitStack) -> None:
        self.sender, self.receiver, self.address, self.size = sender, receiver, address, size
        self.stack = stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        # Twice the same, so that a stream may begin anywhere.
        self.payload = memoryview(os.urandom(size) * 2)
        self.file = stack.enter_context(os.fdopen(os.memfd_create("payload"), "wb", buffering=0))
        self.file.write(self.payload)

    def __str__(self) -> str:
        return f"tcp {self.sender.name} to {self.receiver.name} {self.address}"

    def socket(self, node: NetNS) -> socket.socket:
        made = self.stack.enter_context(node.socket(family_of(self.address), socket.SOCK_STREAM))
        made.setblocking(False)
        return made


class _Stream:
    """One TCP connection, which the events of its transfer's selector move on."""

    def __init__(self, transfer: _Transfer, number: int) -> None:
        """Listen, and connect. number: each stream is another stretch of the bytes; none can stand in for another."""
        self._transfer = transfer
        self._number = number
        self._start = number * _STRIDE % transfer.size
        self._sent = self.arrived = 0
        self.is_complete = False
        self._listener = transfer.socket(transfer.receiver)
        self._listener.bind((transfer.address, 0))
        self._listener.listen(1)
        transfer.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._client = transfer.socket(transfer.sender)
        self._client.connect_ex(self._listener.getsockname()[:2])
        transfer.selector.register(self._client, selectors.EVENT_WRITE, self._send)

    def __str__(self) -> str:
        """How far it has come, and why it may be no further."""
        info = _TCP_INFO.unpack(self._client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        why = f"{info[_BACKOFF]} times in vain since the last answer, a window of {info[_WINDOW]} segments"
        return f"stream {self._number}: {self.arrived} bytes, retransmits after {info[_RTO] / 1000:.0f} ms, {why}"

    def _accept(self) -> None:
        self._server = self._transfer.stack.enter_context(self._listener.accept()[0])
        self._server.setblocking(False)
        self._transfer.selector.unregister(self._listener)
        self._transfer.selector.register(self._server, selectors.EVENT_READ, self._receive)

    def _send(self) -> None:
        left = self._transfer.size - self._sent
        try:
            with suppress(BlockingIOError):
                at = self._start + self._sent
                self._sent += os.sendfile(self._client.fileno(), self._transfer.file.fileno(), at, min(_CHUNK, left))
        except OSError as error:
            raise HarnessError(f"{self._transfer}: {error.strerror} after {self._sent} bytes") from error
        if self._sent == self._transfer.size:
            self._transfer.selector.unregister(self._client)
            self._client.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        chunk = self._server.recv(_CHUNK)
        at = self._start + self.arrived
        expected = self._transfer.payload[at : min(at + len(chunk), self._start + self._transfer.size)]
        if chunk != expected:
            raise HarnessError(f"{self._transfer}: {self._difference(chunk, expected)}")
        self.arrived += len(chunk)
        if not chunk:
            if self.arrived != self._transfer.size:
                raise HarnessError(f"{self._transfer}: {self.arrived} bytes arrived of {self._transfer.size}")
            self._transfer.selector.unregister(self._server)
            self.is_complete = True

    def _difference(self, chunk: bytes, expected: memoryview) -> str:
        for index, (is_, should_be) in enumerate(zip(chunk, expected, strict=False)):
            if is_ != should_be:
                return f"byte {self.arrived + index} arrived as 0x{is_:02x}, not 0x{should_be:02x}"
        return f"more than {self._transfer.size} bytes arrived"
