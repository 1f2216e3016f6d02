"""Record the inner packets that a device delivers through its interface."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.net.netns import enlarge_receive_buffer
from harness.wait import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.net.netns import NetNS

_ETH_P_ALL: Final = 3
_PACKET_OUTGOING: Final = 4
_BUFFER: Final = 4 << 20
_LONGEST: Final = 1 << 17
_SHOWN: Final = 5


class NotDelivered(HarnessError, AssertionError):
    """A packet that had to come out of the interface has not come in time."""


class Inside:
    """All packets that the interface has delivered since this was made, in order.

    Not those that the node sends into the interface. Each is whole, from its IP header on.
    """

    def __init__(self, node: NetNS, device: str, owner: str = "the device") -> None:
        self._owner = owner
        self._packets: list[bytes] = []
        # Without a protocol until bind(2), see harness.wire.capture.tap. SOCK_DGRAM: without a link header.
        self._socket = node.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
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
                data, address = self._socket.recvfrom(_LONGEST)
            except BlockingIOError:
                return
            except OSError as error:
                # The link went down; the socket goes on when it is up again (packet(7)).
                if error.errno != errno.ENETDOWN:
                    raise
                continue
            if address[2] != _PACKET_OUTGOING:
                self._packets.append(data)


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
