"""Record the frames that pass a device, and find WireGuard's messages among them.

Each frame has the kernel's time stamp. Frames stay in the kernel's socket buffer until a method needs them, so an
unused capture costs very little. Sources: packet(7), SO_TIMESTAMPNS in socket(7); PACKET_VNET_HDR in
net/packet/af_packet.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Self

from harness import steps
from harness.net.netns import enlarge_receive_buffer
from harness.net.stamps import SO_TIMESTAMPNS
from harness.wait import wait_for
from harness.wire import frames, pcapng
from harness.wire.fragments import INCOMPLETE_FRAGMENT, KERNEL_TIMEOUT, Fragments, Piece
from harness.wire.frames import Fragment
from harness.wire.messages import (
    COOKIE_REPLY,
    DATA,
    DATAGRAM,
    INITIATION,
    KEEPALIVE_SIZE,
    NANOSECONDS,
    RESPONSE,
    Message,
    tally,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.net.netns import NetNS
    from harness.wire.frames import Contents

__all__ = ["COOKIE_REPLY", "DATA", "INITIATION", "KEEPALIVE_SIZE", "RESPONSE", "Capture", "Message"]

_ETH_P_ALL: Final = 3
_PACKET_STATISTICS: Final = 6
_SO_RXQ_OVFL: Final = 40
# Bytes.
_BUFFER: Final = 8 << 20
# For evidence: enough for handshakes, pings and the beginning of a stream. The kernel drops and counts the rest.
EVIDENCE_BUFFER: Final = 1 << 20
_ANCILLARY: Final = 128
# A frame without a stamp is read within so many ns. More is a clock that was set.
_READ_LATE: Final = 60 * NANOSECONDS
_FRAME: Final = 1 << 17
_Received = tuple[bytes, list[tuple[int, int, bytes]], int, Any]
_NO_OFFLOAD: Final = bytes(frames.VNET_HEADER.size)
# Whether PACKET_VNET_HDR describes superframes of UDP (virtio_net_hdr_from_skb).
_DESCRIBES_USO: Final = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 2)
NO_SEGMENT_SIZE: Final = "superframe whose segment size this kernel does not report"


def tap(node: NetNS, device: str, *, buffer: int = _BUFFER) -> socket.socket:
    """Open a non-blocking packet socket that receives all frames of a device, in both directions, with time stamps.

    buffer: bytes of the socket's receive buffer.
    """
    # Opened without a protocol: with one it would receive from all devices until bind(2), and bind(2) would have to
    # wait for all CPUs (synchronize_net in packet_do_bind).
    sock = node.socket(socket.AF_PACKET, socket.SOCK_RAW)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
    sock.setsockopt(frames.SOL_PACKET, frames.PACKET_AUXDATA, 1)
    sock.setsockopt(frames.SOL_PACKET, frames.PACKET_VNET_HDR, 1)
    enlarge_receive_buffer(sock, buffer)
    sock.bind((device, _ETH_P_ALL))
    sock.setblocking(False)
    return sock


@dataclass(frozen=True, slots=True)
class Taken:
    """What a tap has received at once: one frame, or the segments of a superframe.

    frames: as on a cable, with checksum and VLAN tag filled in. time: ns of wall time. is_outbound: the node sent it.
    note: for the capture; what a superframe was. is_unsplit: True for a superframe whose segments are unknown.
    follows_loss: True if the tap has lost frames before these.
    """

    frames: list[bytes] = field(repr=False)
    time: int
    is_outbound: bool
    note: str = ""
    is_unsplit: bool = False
    follows_loss: bool = False

    def read(self) -> Iterator[tuple[bytes, Contents, str]]:
        """Return each frame, with its contents and a note for the capture."""
        for number, frame in enumerate(self.frames, 1):
            contents = self.note if self.is_unsplit else frames.read(frame)
            note = f"segment {number} of a {self.note}" if len(self.frames) > 1 else self.note
            yield frame, contents, note or (INCOMPLETE_FRAGMENT if isinstance(contents, Fragment) else "")


def receive(tapped: socket.socket) -> Taken | None:
    """Take the next frame from a socket of `tap`; None if the buffer is empty.

    A superframe is split by the size that the kernel reports with it (PACKET_VNET_HDR).
    """
    while True:
        try:
            header, (data, ancillary, _, address) = take(tapped)
        except BlockingIOError:
            return None
        except OSError as error:
            # The socket reports ENETDOWN once when its device is set down or deleted (packet_notifier); frames received
            # before that are still in the buffer.
            if error.errno != errno.ENETDOWN:
                raise
        else:
            break
    (time, follows_loss), is_outbound = _time_and_loss(ancillary), address[2] == socket.PACKET_OUTGOING
    if header is None:
        whole = [frames.finished(data, ancillary)]
        return Taken(whole, time, is_outbound, NO_SEGMENT_SIZE, is_unsplit=True, follows_loss=follows_loss)
    offload = frames.Offload.read(header)
    if offload is None:
        return Taken([frames.finished(data, ancillary)], time, is_outbound, follows_loss=follows_loss)
    parts = frames.segments(data, offload)
    note = f"superframe of {frames.segment_count(data, offload)} segments of {offload.size} bytes"
    finished = [frames.finished(part, ancillary) for part in parts]
    return Taken(finished, time, is_outbound, note, follows_loss=follows_loss)


def take(tapped: socket.socket) -> tuple[bytes | None, _Received]:
    """Return the struct virtio_net_hdr of the next frame, and what recvmsg(2) returns for the frame.

    tapped: a socket of `tap`, or another packet socket with PACKET_VNET_HDR. Raises what recvmsg(2) raises. The header
    is None if the kernel has none for it: before Linux 6.2 that is a superframe of UDP, and recvmsg(2) drops it with
    EINVAL (virtio_net_hdr_from_skb).
    """
    if not _DESCRIBES_USO:
        try:
            tapped.recvmsg(frames.VNET_HEADER.size, 0, socket.MSG_PEEK)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            tapped.setsockopt(frames.SOL_PACKET, frames.PACKET_VNET_HDR, 0)
            try:
                return None, tapped.recvmsg(_FRAME, _ANCILLARY)
            finally:
                tapped.setsockopt(frames.SOL_PACKET, frames.PACKET_VNET_HDR, 1)
    data, ancillary, flags, address = tapped.recvmsg(_FRAME, _ANCILLARY)
    size = frames.VNET_HEADER.size
    return data[:size], (data[size:], ancillary, flags, address)


def send(tapped: socket.socket, frame: bytes) -> None:
    """Send a frame by a socket of `tap`; raises OSError."""
    tapped.sendmsg((_NO_OFFLOAD, frame))


def missed(tapped: socket.socket) -> int:
    """Return how many frames did not fit the buffer since the last call: reading resets the count (packet(7))."""
    answer = tapped.getsockopt(frames.SOL_PACKET, _PACKET_STATISTICS, 8)
    return int(struct.unpack("II", answer)[1])


@dataclass(frozen=True, slots=True)
class Recording:
    """What a capture or a wire has recorded so far.

    frames: each with the node that it left and the node that it reached, in the order in which they passed; a name is
    empty if the frame was not there, or if the node is not known. intact: how many of the frames precede the first
    loss; None without a loss.
    """

    name: str
    frames: list[tuple[pcapng.Packet, str, str]] = field(repr=False)
    intact: int | None


class Capture:
    """Records the frames of a device from its construction to `close`; a context manager.

    It has frames of both directions, but its messages are the UDP datagrams that leave the node; one that leaves in
    fragments is one message, once all have left. On the loopback device each packet passes twice; there it keeps
    outbound frames only. str() counts by kind what has left, also what is not understood.
    """

    def __init__(self, node: NetNS, device: str, *, buffer: int = _BUFFER, far: NetNS | None = None) -> None:
        """Start to record.

        buffer: bytes of the socket's buffer, frames and the kernel's overhead for each. far: the node at the other end
        of the link, None if that is not known; `recording` names it.
        """
        self.name = f"{node.name}-{device}"
        self._near = node.name
        self._far = self._near if device == "lo" else far.name if far is not None else ""
        self.is_loopback = device == "lo"
        self._messages: list[Message] = []
        self._names: Counter[str] = Counter()
        self._unsplit = 0
        self._fragments = Fragments(KERNEL_TIMEOUT)
        self._packets: list[pcapng.Packet] = []
        # The number of frames before the first loss; None while there is none.
        self._intact: int | None = None
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

    @property
    def unsplit(self) -> int:
        """Number of superframes whose datagrams are not among the messages, because the kernel is older than 6.2."""
        self._drain()
        return self._unsplit

    def wait_for(self, accept: Callable[[Message], bool], deadline: float, what: str) -> Message:
        """Wait for a message that `accept` returns True for; one that has already passed counts too.

        deadline: seconds, scaled. what: completes "waited for ...". Raises DeadlineExceeded.
        """
        return wait_for(_Seen(self, accept), deadline, what)

    def recording(self) -> Recording:
        """Return the frames so far, with the nodes that they left and reached."""
        self._drain()
        self._missed += missed(self._socket)
        if self._missed and self._intact is None:
            self._intact = len(self._packets)
        ways = {True: (self._near, self._far), False: (self._far, self._near)}
        frames_so_far = [(packet, *ways[packet.is_outbound]) for packet in self._packets]
        return Recording(self.name, frames_so_far, self._intact)

    def save(self, path: Path, *, keys: str = "") -> None:
        """Write the frames so far as pcapng; keys: text of `harness.implementations.keylog`, stored in the file."""
        self._drain()
        self._missed += missed(self._socket)
        pcapng.save(path, [pcapng.End(self.name, missed=self._missed)], self._packets, keys=keys)

    def __str__(self) -> str:
        """Say what has left so far: "ns1-veth1: 3 data, 2 other (ARP)"."""
        self._drain()
        waiting = [INCOMPLETE_FRAGMENT] * self._fragments.waiting
        return f"{self.name}: {tally(chain(self._names.elements(), waiting))}"

    def _drain(self) -> None:
        while (taken := receive(self._socket)) is not None:
            if not taken.is_outbound and self.is_loopback:
                continue
            self._unsplit += taken.is_unsplit
            if self._packets and 0 < self._packets[-1].time - taken.time < _READ_LATE:
                self._correct_times(taken.time)
            if taken.follows_loss and self._intact is None:
                self._intact = len(self._packets)
            for frame, contents, note in taken.read():
                self._packets.append(pcapng.Packet(0, taken.time, frame, taken.is_outbound, note))
                self._arrived(frame, contents, taken)

    def _correct_times(self, time: int) -> None:
        """Let no frame so far be later than the next one.

        The kernel begins to stamp frames a moment after the first socket has asked for it (net_enable_timestamp), and
        gives those before the time when they are read.
        """
        for index in range(len(self._packets) - 1, -1, -1):
            if self._packets[index].time <= time:
                break
            self._packets[index] = replace(self._packets[index], time=time)
        for index in range(len(self._messages) - 1, -1, -1):
            if self._messages[index].time <= time:
                break
            self._messages[index] = replace(self._messages[index], time=time)

    def _arrived(self, frame: bytes, contents: Contents, taken: Taken) -> None:
        """Count a frame, and keep its message if one has left."""
        complete = self._fragments.due(taken.time)
        if isinstance(contents, Fragment):
            piece = Piece(frame, contents, len(self._packets) - 1)
            complete += self._fragments.arrive(piece, int(taken.is_outbound), taken.time)
        elif taken.is_outbound:
            self._left(frames.message(frame, contents, taken.time))
        for is_outbound, arrival in complete:
            message = arrival.message(taken.time)
            for piece, note in zip(arrival.pieces, arrival.notes(message.name), strict=True):
                self._packets[piece.number] = replace(self._packets[piece.number], comment=note)
            if is_outbound:
                self._left(message)

    def _left(self, message: Message) -> None:
        self._names[message.name] += 1
        if message.sort == DATAGRAM:
            self._messages.append(message)


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
        """List the last five messages, and count what has left."""
        messages = self._capture.messages()[-5:]
        return f"{'; '.join(map(str, messages)) or 'no datagram'}; in all, {self._capture}"


def _time_and_loss(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, bool]:
    """Return the time stamp, and whether the socket has lost frames before this one (SO_RXQ_OVFL)."""
    time, follows_loss = 0, False
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            time = int(seconds * NANOSECONDS + nanoseconds)
        elif level == socket.SOL_SOCKET and kind == _SO_RXQ_OVFL:
            follows_loss = any(data)
    return time, follows_loss
