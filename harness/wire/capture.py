"""Record the frames that pass a device, and find WireGuard's messages among them.

Each frame has the kernel's time stamp. Until someone asks, the frames lie in the kernel, so that a capture costs next
to nothing where nobody looks. Sources: packet(7), SO_TIMESTAMPNS in socket(7).
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Final, Self

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
_BUFFER: Final = 8 << 20
# For evidence: handshakes, pings and the beginning of a stream. What does not fit is counted, and costs little.
EVIDENCE_BUFFER: Final = 1 << 20
_ANCILLARY: Final = 128
_FRAME: Final = 1 << 17


def tap(node: NetNS, device: str, *, buffer: int = _BUFFER) -> socket.socket:
    """A packet socket that hears all frames of a device, with their time stamps."""
    # With a protocol from the start it would hear all devices, and binding it would have to wait for the kernel.
    made = node.socket(socket.AF_PACKET, socket.SOCK_RAW)
    made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    made.setsockopt(frames.SOL_PACKET, frames.PACKET_AUXDATA, 1)
    enlarge_receive_buffer(made, buffer)
    made.bind((device, _ETH_P_ALL))
    made.setblocking(False)
    return made


def receive(tapped: socket.socket) -> tuple[bytes, int, bool] | None:
    """The next frame as it would be on a cable, its time in ns, and whether it left the node; None if there is none."""
    while True:
        try:
            data, ancillary, _, address = tapped.recvmsg(_FRAME, _ANCILLARY)
        except BlockingIOError:
            return None
        except OSError as error:
            # Told once, when the device was set down or deleted; what came before is still there.
            if error.errno != errno.ENETDOWN:
                raise
        else:
            break
    return frames.finished(data, ancillary), _time(ancillary), address[2] == socket.PACKET_OUTGOING


def missed(tapped: socket.socket) -> int:
    """How many frames did not fit the buffer since this was last asked."""
    answer = tapped.getsockopt(frames.SOL_PACKET, _PACKET_STATISTICS, 8)
    return int(struct.unpack("II", answer)[1])


class Capture:
    """Takes what passes by a device, from the moment it is made; as a context manager.

    As messages it gives those that leave: on the loopback device each packet passes twice, once in each direction.
    buffer: bytes of the kernel's memory, frames and what it keeps beside them, until someone looks.
    """

    def __init__(self, node: NetNS, device: str, *, buffer: int = _BUFFER) -> None:
        self.name = f"{node.name}-{device}"
        self._is_loopback = device == "lo"
        self._messages: list[Message] = []
        self._packets: list[pcapng.Packet] = []
        self._missed = 0
        self._socket = tap(node, device, buffer=buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def messages(self, *, kind: int | None = None, port: int | None = None) -> list[Message]:
        """What has left so far, oldest first: of one type, from one source port."""
        self._drain()
        return [m for m in self._messages if kind in {None, m.kind} and port in {None, m.source[1]}]

    def wait_for(self, accept: Callable[[Message], bool], deadline: float, what: str) -> Message:
        """Wait for a message that `accept` takes, among those already seen too."""
        return wait_for(_Seen(self, accept), deadline, what)

    def save(self, path: Path, *, keys: str = "") -> None:
        """Write what has passed so far as pcapng, with the keys (`harness.implementations.keylog`) inside."""
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
    """A capture has a message of a certain sort: the first one."""

    def __init__(self, capture: Capture, accept: Callable[[Message], bool]) -> None:
        self._capture = capture
        self._accept = accept

    def fileno(self) -> int:
        return self._capture.fileno()

    def look(self) -> Message | None:
        return next((message for message in self._capture.messages() if self._accept(message)), None)

    def seen(self) -> str:
        return "; ".join(str(message) for message in self._capture.messages()[-5:]) or "no datagram"


def _time(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return int(seconds * NANOSECONDS + nanoseconds)
    return 0
