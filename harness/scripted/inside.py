"""Record the inner packets that a device delivers through its interface."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.net.netns import enlarge_receive_buffer
from harness.wait import wait_for
from harness.wire import capture, frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.net.netns import NetNS

_ETH_P_ALL: Final = 3
_BUFFER: Final = 4 << 20
_SHOWN: Final = 5


class NotDelivered(HarnessError, AssertionError):
    """A packet that had to come out of the interface has not come in time."""


class Inside:
    """All packets that the interface has delivered since this was made, in order.

    Not those that the node sends into the interface. Each is whole, from its IP header on. A program may join packets
    of one flow into a superframe (GRO); it is split again as the kernel would do it (`harness.wire.frames`).
    superframes: how many there were.
    """

    def __init__(self, node: NetNS, device: str, owner: str = "the device") -> None:
        self._owner = owner
        self._packets: list[bytes] = []
        self.superframes = 0
        # Without a protocol until bind(2), see harness.wire.capture.tap. A WireGuard interface has no link header.
        self._socket = node.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.setsockopt(frames.SOL_PACKET, frames.PACKET_VNET_HDR, 1)
        enlarge_receive_buffer(self._socket, _BUFFER)
        self._socket.bind((device, _ETH_P_ALL))
        self._socket.setblocking(False)

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()

    def packets(self) -> list[bytes]:
        """Return what was delivered so far, without waiting."""
        self._drain()
        return list(self._packets)

    def forget(self) -> None:
        """Forget what was delivered so far."""
        self._drain()
        self._packets.clear()

    def expect(self, packet: bytes | Callable[[bytes], bool], within: float = 5.0, what: str = "") -> bytes:
        """Wait until a packet is delivered that equals this one, or for which the call returns True; returns it.

        within: seconds, scaled. what: describes the packet. Raises NotDelivered, which lists what was delivered.
        """
        accept = packet if callable(packet) else packet.__eq__
        try:
            return wait_for(_Delivery(self, accept), within, what or "a packet to be delivered")
        except HarnessError:
            shown = ", ".join(one[:60].hex() for one in self._packets[-_SHOWN:]) or "nothing"
            raise NotDelivered(
                f"{self._owner} did not deliver {what or 'the packet'} within {within:g} s; it delivered: {shown}"
            ) from None

    def fileno(self) -> int:
        """Return the packet socket."""
        return self._socket.fileno()

    def _drain(self) -> None:
        while True:
            try:
                header, (packet, _, _, address) = capture.take(self._socket)
            except BlockingIOError:
                return
            except OSError as error:
                # The link went down; the socket goes on when it is up again (packet(7)).
                if error.errno != errno.ENETDOWN:
                    raise
                continue
            if address[2] != socket.PACKET_OUTGOING:
                self._add(header, packet)

    def _add(self, header: bytes | None, packet: bytes) -> None:
        # None: a superframe of UDP whose segment size this kernel does not report.
        self.superframes += header is None or frames.Offload.read(header) is not None
        self._packets += [packet] if header is None else frames.inner_segments(header, packet)


class _Delivery:
    """Event: the interface has delivered an accepted packet; its value is that packet."""

    def __init__(self, inside: Inside, accept: Callable[[bytes], bool]) -> None:
        self._inside = inside
        self._accept = accept

    def fileno(self) -> int:
        return self._inside.fileno()

    def look(self) -> bytes | None:
        return next((packet for packet in self._inside.packets() if self._accept(packet)), None)

    def seen(self) -> str:
        return f"{len(self._inside.packets())} packets"
