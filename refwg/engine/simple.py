"""Move packets one at a time between interface, core and sockets: simple, but slow.

Does what the driver's workers do in send.c and receive.c, in one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from refwg import ip
from refwg.boundary import Deliver, Transmit
from refwg.errors import DropReason
from refwg.messages import MILLISECOND

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from refwg.device import Device, Effect
    from refwg.socket import UdpSockets
    from refwg.tun import Tun

# Most packets of the interface, and most datagrams of a socket, in one turn. Then the other sources have their turn.
_PACKETS_IN_TURN: Final = 64
_DATAGRAMS_IN_TURN: Final = 256
# Bounds the time spent on queued handshakes per turn, so that data is not delayed, and a flood does not fill a socket
# buffer: a fourth of the time that 256 datagrams take. A time, not a count, because a cookie reply takes far less time
# than a handshake.
_TIME_FOR_HANDSHAKES: Final = MILLISECOND


class Surroundings(NamedTuple):
    """What an engine moves packets between; clock: returns `now` for the device, in nanoseconds.

    not_sent: called with the name of the errno for each datagram that the network stack refused.
    """

    device: Device
    sockets: UdpSockets
    tun: Tun
    clock: Callable[[], int]
    not_sent: Callable[[str], None] = lambda _: None


class SimpleEngine:
    """Moves packets in both directions; is_busy: there were once so many in one turn that others had to wait."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._device, self._sockets, self._tun, self._clock, self._not_sent = surroundings
        self.is_busy = False

    def close(self) -> None:
        """End; the device and the interface are still there."""

    def settle(self) -> None:
        """Finish all that is in work; call it before the device's configuration or state changes."""

    def packets_waiting(self) -> None:
        """Read and encrypt packets of the interface, up to 64; call it when the interface is readable."""
        for _ in range(_PACKETS_IN_TURN):
            packet = self._tun.read()
            if packet is None:
                return
            if self._device.is_up:
                mtu = self._mtu_for(packet)
                self.carry_out(self._device.send_packet(packet, mtu, self._clock()))
        self.is_busy = True

    def datagrams_waiting(self, sock: socket.socket, most: int = _DATAGRAMS_IN_TURN) -> None:
        """Read and process datagrams of a socket, at most so many; call it when the socket is readable."""
        for _ in range(most):
            received = self._sockets.receive(sock)
            if received is None:
                return
            self.carry_out(self._device.receive_datagram(*received, self._clock()))

    def time_passed(self) -> None:
        """Process queued handshakes and expired timers; call it after all other events, and at `next_deadline`."""
        now = self._clock()
        end = now + _TIME_FOR_HANDSHAKES
        while self._device.has_waiting_handshakes and now < end:
            self.carry_out(self._device.process_handshakes(now, 1))
            now = self._clock()
        self.carry_out(self._device.expire_timers(now))

    def next_deadline(self) -> int | None:
        """Return when `time_passed` must be called even without an event, in nanoseconds; None: never."""
        return 0 if self._device.has_waiting_handshakes else self._device.next_deadline()

    def carry_out(self, effects: Sequence[Effect]) -> None:
        """Carry out the effects that the core returned, and report to it what was sent and what failed."""
        for effect in effects:
            if isinstance(effect, Transmit):
                error = self._sockets.send(effect)
                if error:
                    self._not_sent(error)
                    self._device.send_failed(effect, self._clock(), error)
                else:
                    self._device.sent(effect, self._clock())
            elif isinstance(effect, Deliver):
                if not self._tun.write(effect.packet):
                    self._device.drop(DropReason.NOT_DELIVERED, effect.peer, self._clock())
            else:
                self._tun.send_icmp(effect.error, self._clock())

    def _mtu_for(self, packet: bytes) -> int:
        destination = ip.destination(packet)
        return self._tun.mtu_to(destination) if destination else self._tun.link.mtu
