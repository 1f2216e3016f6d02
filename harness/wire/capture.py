"""Record the frames that pass a device, and find WireGuard's messages among them.

Each frame has the kernel's time stamp. Frames stay in the kernel's socket buffer until a method needs them, so an
unused capture costs very little. Sources: packet(7), SO_TIMESTAMPNS in socket(7).
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Final, Self

from harness import steps
from harness.net.netns import enlarge_receive_buffer
from harness.wait import wait_for
from harness.wire import frames, pcapng
from harness.wire.messages import (
    COOKIE_REPLY,
    DATA,
    INITIATION,
    KEEPALIVE_SIZE,
    NANOSECONDS,
    RESPONSE,
    Message,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness.net.netns import NetNS

__all__ = ["COOKIE_REPLY", "DATA", "INITIATION", "KEEPALIVE_SIZE", "RESPONSE", "Capture", "Message"]

_ETH_P_ALL: Final = 3
_PACKET_STATISTICS: Final = 6
_SO_TIMESTAMPNS: Final = 35
# Bytes.
_BUFFER: Final = 8 << 20
# For evidence: enough for handshakes, pings and the beginning of a stream. The kernel drops and counts the rest.
EVIDENCE_BUFFER: Final = 1 << 20
_ANCILLARY: Final = 128
_FRAME: Final = 1 << 17


def tap(node: NetNS, device: str, *, buffer: int = _BUFFER) -> socket.socket:
    """Open a non-blocking packet socket that receives all frames of a device, in both directions, with time stamps.

    buffer: bytes of the socket's receive buffer.
    """
    # Opened without a protocol: with one it would receive from all devices until bind(2), and bind(2) would have to
    # wait for all CPUs (synchronize_net in packet_do_bind).
    sock = node.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sock.setsockopt(frames.SOL_PACKET, frames.PACKET_AUXDATA, 1)
    enlarge_receive_buffer(sock, buffer)
    sock.bind((device, _ETH_P_ALL))
    sock.setblocking(False)
    return sock


def receive(tapped: socket.socket) -> tuple[bytes, int, bool] | None:
    """Take the next frame from a socket of `tap`: (frame, time, is_outbound); None if the buffer is empty.

    frame: as on a cable, with checksum and VLAN tag filled in. time: ns of wall time. is_outbound: the node sent it.
    """
    while True:
        try:
            data, ancillary, _, address = tapped.recvmsg(_FRAME, _ANCILLARY)
        except BlockingIOError:
            return None
        except OSError as error:
            # The socket reports ENETDOWN once when its device is set down or deleted (packet_notifier); frames received
            # before that are still in the buffer.
            if error.errno != errno.ENETDOWN:
                raise
        else:
            break
    return frames.finished(data, ancillary), _time(ancillary), address[2] == socket.PACKET_OUTGOING


def missed(tapped: socket.socket) -> int:
    """Return how many frames did not fit the buffer since the last call: reading resets the count (packet(7))."""
    answer = tapped.getsockopt(frames.SOL_PACKET, _PACKET_STATISTICS, 8)
    return int(struct.unpack("II", answer)[1])


class Capture:
    """Records the frames of a device from its construction to `close`; a context manager.

    It has frames of both directions, but its messages are the UDP datagrams that leave the node. On the loopback device
    each packet passes twice; there it keeps outbound frames only.
    """

    def __init__(self, node: NetNS, device: str, *, buffer: int = _BUFFER) -> None:
        """Start to record. buffer: bytes of the socket's buffer, frames and the kernel's overhead for each."""
        self.name = f"{node.name}-{device}"
        self._is_loopback = device == "lo"
        self._messages: list[Message] = []
        self._packets: list[pcapng.Packet] = []
        self._missed = 0
        with steps.step(node.name, f"tcpdump -i {device} -w {self.name}.pcapng &"):
            self._socket = tap(node, device, buffer=buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop to record. Frames that no method has read from the kernel by then are lost."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the packet socket, which is readable while unread frames are in its buffer."""
        return self._socket.fileno()

    def messages(self, *, kind: int | None = None, port: int | None = None) -> list[Message]:
        """Return the datagrams that have left so far, oldest first.

        kind: only of this message type (INITIATION, ...). port: only from this source port.
        """
        self._drain()
        return [m for m in self._messages if kind in {None, m.kind} and port in {None, m.source[1]}]

    def wait_for(self, accept: Callable[[Message], bool], deadline: float, what: str) -> Message:
        """Wait for a message that `accept` returns True for; one that has already passed counts too.

        deadline: seconds, scaled. what: completes "waited for ...". Raises DeadlineExceeded.
        """
        return wait_for(_Seen(self, accept), deadline, what)

    def save(self, path: Path, *, keys: str = "") -> None:
        """Write the frames so far as pcapng; keys: text of `harness.implementations.keylog`, stored in the file."""
        self._drain()
        self._missed += missed(self._socket)
        pcapng.save(path, [pcapng.End(self.name, missed=self._missed)], self._packets, keys=keys)

    def _drain(self) -> None:
        while (received := receive(self._socket)) is not None:
            whole, time, is_outbound = received
            if not is_outbound and self._is_loopback:
                continue
            for frame in frames.segments(whole):
                self._packets.append(pcapng.Packet(0, time, frame, is_outbound))
                datagram = frames.udp(frame) if is_outbound else None
                if datagram is not None:
                    self._messages.append(frames.message(frame, datagram, time))


class _Seen:
    """Event: a capture has a message that `accept` takes; its value is the first one."""

    def __init__(self, capture: Capture, accept: Callable[[Message], bool]) -> None:
        self._capture = capture
        self._accept = accept

    def fileno(self) -> int:
        """Return the capture's packet socket."""
        return self._capture.fileno()

    def look(self) -> Message | None:
        """Return the first accepted message, None if there is none yet."""
        return next((message for message in self._capture.messages() if self._accept(message)), None)

    def seen(self) -> str:
        """List the last five messages."""
        return "; ".join(str(message) for message in self._capture.messages()[-5:]) or "no datagram"


def _time(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return int(seconds * NANOSECONDS + nanoseconds)
    return 0
