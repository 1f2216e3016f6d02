"""Send TCP streams by sendfile(2), and compare every byte as it arrives."""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

from harness import steps
from harness.errors import DeadlineExceeded, HarnessError
from harness.traffic.udp import family_of
from harness.wait import scaled

if TYPE_CHECKING:
    from harness.net.netns import NetNS


# Bytes per system call.
_CHUNK: Final = 1 << 16
# Bytes between the starts of two streams in the payload.
_STRIDE: Final = 4099
# The default deadline: 20 seconds, and time for all bytes at the rate of a slow program on a loaded machine.
_BASE_DEADLINE: Final = 20.0
_SLOWEST_RATE: Final = 600_000  # bytes per second
# struct tcp_info (linux/tcp.h) up to snd_cwnd; the positions of backoff, rto (in microseconds) and snd_cwnd.
_TCP_INFO: Final = struct.Struct("=8B19I")
_BACKOFF, _RTO, _WINDOW = 4, 8, 26


def tcp_stream(
    sender: NetNS, receiver: NetNS, address: str, *, size: int = 1 << 20, deadline: float | None = None
) -> float:
    """Send `size` random bytes over one TCP connection; result and errors are those of `tcp_streams`."""
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

    address: of the receiver, which listens on one port per connection. deadline: seconds, scaled; the default is
    enough for a slow program on a loaded machine. Returns bytes per second, all connections together. Raises
    DeadlineExceeded with the state of an incomplete connection, HarnessError if a connection fails or wrong bytes
    arrive.
    """
    deadline = scaled(deadline or _BASE_DEADLINE + count * size / _SLOWEST_RATE)
    text = f"send {count} TCP streams of {size} bytes to {receiver.name} {address}"
    with steps.step(sender.name, text) as sending, ExitStack() as stack:
        transfer = _Transfer(sender, receiver, address, size, stack)
        started = time.monotonic()
        streams = [_Stream(transfer, number) for number in range(count)]
        while not all(stream.is_complete for stream in streams):
            left = started + deadline - time.monotonic()
            for key, _ in transfer.selector.select(left) if left > 0 else ():
                key.data()
            if left <= 0:
                done, arrived = sum(stream.is_complete for stream in streams), sum(stream.arrived for stream in streams)
                progress = f"{done} of {count} streams and {arrived} of {count * size} bytes"
                incomplete = next(stream for stream in streams if not stream.is_complete)
                raise DeadlineExceeded(f"{transfer}: {progress} arrived within {deadline:g} s; {incomplete}")
        rate = count * size / (time.monotonic() - started)
        sending.outcome = f"all arrived, {rate / 1e6:.3g} MB/s"
        return rate


class _Transfer:
    """State shared by the streams of one call: endpoints, payload, selector."""

    def __init__(self, sender: NetNS, receiver: NetNS, address: str, size: int, stack: ExitStack) -> None:
        self.sender, self.receiver, self.address, self.size = sender, receiver, address, size
        self.stack = stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        # The same bytes twice, so that a stream of `size` bytes can start anywhere in the first half.
        self.payload = memoryview(os.urandom(size) * 2)
        self.file = stack.enter_context(os.fdopen(os.memfd_create("payload"), "wb", buffering=0))
        self.file.write(self.payload)

    def __str__(self) -> str:
        return f"tcp {self.sender.name} to {self.receiver.name} {self.address}"

    def socket(self, node: NetNS) -> socket.socket:
        """Open a non-blocking TCP socket in a node; the transfer's stack closes it."""
        sock = self.stack.enter_context(node.socket(family_of(self.address), socket.SOCK_STREAM))
        sock.setblocking(False)
        return sock


class _Stream:
    """One TCP connection, driven by callbacks that it registers with the transfer's selector."""

    def __init__(self, transfer: _Transfer, number: int) -> None:
        """Listen and connect.

        number: selects where in the payload this stream starts. Streams differ, so that bytes of one that arrive on
        another are noticed.
        """
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
        """Format the number of bytes that arrived, and the sender's TCP state (TCP_INFO), which may explain a stall."""
        info = _TCP_INFO.unpack(self._client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
        timer = f"retransmission timeout {info[_RTO] / 1000:.0f} ms after {info[_BACKOFF]} unanswered retransmissions"
        return f"stream {self._number}: {self.arrived} bytes; {timer}, congestion window {info[_WINDOW]} segments"

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
        """Name the first byte that differs; `expected` ends where the stream should end."""
        for index, (actual, wanted) in enumerate(zip(chunk, expected, strict=False)):
            if actual != wanted:
                return f"byte {self.arrived + index} arrived as 0x{actual:02x}, not 0x{wanted:02x}"
        return f"more than {self._transfer.size} bytes arrived"
