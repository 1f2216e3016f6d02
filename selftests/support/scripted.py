"""Play peers by hand: refwg's core behind a UDP socket beside the interface under test.

The test chooses what a peer sends, and with which counter. A peer's clock stands still. Where
it would wait, before a keepalive or a retry with a cookie, the clock jumps to the next deadline.

      wg0 192.168.241.1 ...... scripted peers 10.8.0.1, 10.8.0.2, ...
              |                          |
         127.0.0.1:1                127.0.0.1:any         all in ns0
"""

from __future__ import annotations

import select
import socket
from collections import Counter
from typing import TYPE_CHECKING, Final

from harness import (
    COOKIE_REPLY,
    DATA,
    INITIATION,
    V4_OF_A,
    DeviceConfig,
    Key,
    PeerConfig,
    allowed_ips,
    udp_receiver,
    wait_for,
)
from harness.net.netns import enlarge_receive_buffer
from harness.wire.messages import FIELDS, NAMES
from refwg.allowedips import Prefix
from refwg.boundary import Deliver, Endpoint, Transmit
from refwg.device import Device
from selftests.support.packets import ip_packet, udp
from selftests.support.pair import FakeSockets, SeededEnvironment, private_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from harness import Interface, Lab, Manifest, NetNS
    from refwg.device import Effect

NETWORK: Final = "10.8.0.0/16"
PORT_OF_A, PORT_INSIDE = 1, 1111
# The core sends to this endpoint; the test takes each datagram and sends it itself.
ENDPOINT: Final = Endpoint(socket.inet_aton("127.0.0.1"), PORT_OF_A)
MTU: Final = 1420
HEADERS: Final = 20 + 8
# Peers that may wait for an answer at the same time: so few that no queue overflows and no program is under load.
AT_ONCE: Final = 16
_BUFFER: Final = 4 << 20


class Scripted:
    """A peer of the interface under test.

    received: the payloads that it received through the tunnel. cookies: how many cookie replies it received.
    """

    def __init__(self, number: int) -> None:
        self._now = 0
        self.address = f"10.8.{number >> 8}.{number & 255}"
        self.received: list[bytes] = []
        self.cookies = 0
        self._device = Device(SeededEnvironment(number, lambda: self._now), FakeSockets(), now=0)
        self._device.set_private_key(private_key(f"scripted peer {number}"), 0)
        identity = self._device.identity
        assert identity is not None
        self.public_key = Key(identity.public)

    def add_target(self, target: Key) -> None:
        """Add the interface under test as a peer."""
        peer = self._device.add_peer(target.raw, 0)
        assert peer is not None
        self._peer = peer
        peer.set_endpoint(ENDPOINT, 0)
        self._device.insert_allowed_ip(peer, Prefix(socket.inet_aton(V4_OF_A), 32))
        self._device.up(0)

    def encapsulated(self, payload: bytes) -> list[bytes]:
        """The datagrams that carry a payload: a data message, or an initiation first."""
        packet = ip_packet(self.address, V4_OF_A, udp(PORT_INSIDE, PORT_INSIDE, payload))
        return self._carry_out(self._device.send_packet(packet, MTU, self._now))

    def receive(self, datagram: bytes) -> list[bytes]:
        """Receive a datagram, and return those to be sent because of it."""
        effects = [*self._device.receive_datagram(datagram, ENDPOINT, 0, self._now)]
        effects += self._device.process_handshakes(self._now)
        self.cookies += datagram[0] == COOKIE_REPLY
        if datagram[0] == COOKIE_REPLY or any(isinstance(effect, Deliver) for effect in effects):
            self._now = self._device.next_deadline() or self._now
            effects += self._device.expire_timers(self._now)
        return self._carry_out(effects)

    def count_from(self, counter: int) -> None:
        """Set the counter of the next data message."""
        session = self._peer.keypairs.current
        assert session is not None
        session.sending_counter = counter

    def _carry_out(self, effects: Sequence[Effect]) -> list[bytes]:
        self.received += [effect.packet[HEADERS:] for effect in effects if isinstance(effect, Deliver)]
        return [effect.datagram for effect in effects if isinstance(effect, Transmit)]


class Stage:
    """An interface under test and its scripted peers; payloads that arrive are sent back.

    arrived: these payloads, in the order of arrival. answers: the number of them that came back to the peers. unowned:
    the names of messages that are for none of the peers. on_data: called with each data message for a peer.
    """

    def __init__(self, lab: Lab, implementation: Manifest, peers: Iterable[Scripted]) -> None:
        self.peers = tuple(peers)
        self.arrived: list[bytes] = []
        self.answers = 0
        self.unowned: list[str] = []
        self.on_data: Callable[[bytes], object] = lambda _: None
        self._private_key = lab.key("key1")
        # The peer of each handshake or session, by the index that the peer has chosen.
        self._owners: dict[bytes, Scripted] = {}
        node = lab.node("ns0")
        self.wg0 = self._configured(lab, implementation, node)
        node.add_route(NETWORK, dev="wg0")
        self._outer = node.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._outer.connect(("127.0.0.1", PORT_OF_A))
        self._inner = udp_receiver(node, V4_OF_A, PORT_INSIDE)
        self._both = select.epoll()
        lab.undo(self._both.close)
        for sock in (self._outer, self._inner):
            lab.undo(sock.close)
            sock.setblocking(False)
            enlarge_receive_buffer(sock, _BUFFER)
            self._both.register(sock.fileno(), select.EPOLLIN)

    def _configured(self, lab: Lab, implementation: Manifest, node: NetNS) -> Interface:
        interface, key = lab.interface("wg0", implementation, node), self._private_key
        for peer in self.peers:
            peer.add_target(key.public())
        peers = [PeerConfig(public_key=p.public_key, allowed_ips=allowed_ips(f"{p.address}/32")) for p in self.peers]
        interface.set(DeviceConfig(private_key=key, listen_port=PORT_OF_A, peers=tuple(peers)))
        interface.up(f"{V4_OF_A}/24")
        return interface

    def add(self, peer: Scripted, *, preshared_key: Key) -> None:
        """Add a peer, whose preshared key is set explicitly, in place of all others."""
        peer.add_target(self._private_key.public())
        self.peers = (peer,)
        self.wg0.set_peer(peer.public_key, preshared_key=preshared_key, allowed_ips=allowed_ips(f"{peer.address}/32"))

    def send(self, peer: Scripted, payload: bytes) -> None:
        """Send a payload from a peer to the interface under test."""
        self._send(peer, peer.encapsulated(payload))

    def send_datagram(self, datagram: bytes) -> None:
        """Send a datagram to the interface under test, from the address of the peers."""
        self._outer.send(datagram)

    def exchange(self, payload: bytes, deadline: float) -> None:
        """Send a payload from every peer and wait for its return, for AT_ONCE peers at any time."""
        before, started = self.answers, 0

        def is_over() -> bool:
            nonlocal started
            while started < min(len(self.peers), self.answers - before + AT_ONCE):
                self.send(self.peers[started], payload)
                started += 1
            return self.answers - before == len(self.peers)

        self.wait_for(is_over, deadline, f"all {len(self.peers)} peers to be answered")

    def wait_for(self, accept: Callable[[], bool], deadline: float, what: str) -> None:
        """Carry datagrams both ways until `accept` returns True."""
        wait_for(_Carrying(self, accept), deadline, what)

    def __str__(self) -> str:
        summary = f"{len(self.arrived)} datagrams arrived, and {self.answers} came back"
        for name, count in Counter(self.unowned).items():
            summary += f"; {count} times a datagram for none of the peers: {name}"
        return summary

    def fileno(self) -> int:
        return self._both.fileno()

    def carry(self) -> None:
        """Hand datagrams to their peers, and send payloads back that came through the tunnel."""
        for datagram, _ in _all_of(self._outer):
            start, end = FIELDS[datagram[0]].get("receiver", (0, 0))
            peer = self._owners.get(datagram[start:end])
            if peer is None:
                # For example an initiation, which the interface need not send: no peer is silent for 15 s.
                self.unowned.append(NAMES[datagram[0]])
                continue
            if datagram[0] == DATA:
                self.on_data(datagram)
            before = len(peer.received)
            self._send(peer, peer.receive(datagram))
            self.answers += len(peer.received) - before
        for data, sender in _all_of(self._inner):
            self.arrived.append(data)
            self._inner.sendto(data, sender)

    def _send(self, peer: Scripted, datagrams: Iterable[bytes]) -> None:
        for datagram in datagrams:
            if datagram[0] == INITIATION:
                start, end = FIELDS[INITIATION]["sender"]
                assert datagram[start:end] not in self._owners, "two handshakes have the same index: take another seed"
                self._owners[datagram[start:end]] = peer
            self._outer.send(datagram)


def _all_of(sock: socket.socket) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """The datagrams that wait in a socket, and their senders."""
    while True:
        try:
            yield sock.recvfrom(65535)
        except BlockingIOError:
            return


class _Carrying:
    """Event: `accept` returns True after datagrams were carried."""

    def __init__(self, stage: Stage, accept: Callable[[], bool]) -> None:
        self._stage = stage
        self._accept = accept

    def fileno(self) -> int:
        return self._stage.fileno()

    def look(self) -> bool | None:
        self._stage.carry()
        return self._accept() or None

    def seen(self) -> str:
        return str(self._stage)
