"""Play peers by hand: refwg's core behind a UDP socket beside the interface under test.

What such a peer sends, and with which counter, is the test's choice. Its time stands still; only where it would have to
wait, to answer with a keepalive or to try again with a cookie, it is so much later at once.

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
# Nothing that can be reached has the address of the peers' endpoint: whatever they send, the test takes.
ENDPOINT: Final = Endpoint(socket.inet_aton("127.0.0.1"), PORT_OF_A)
MTU: Final = 1420
HEADERS: Final = 20 + 8
# So many have not been answered yet at any time: few enough for every queue, and for no one to be under load.
AT_ONCE: Final = 16
_BUFFER: Final = 4 << 20


class Scripted:
    """A peer of the interface under test.

    heard: what was sent to it through the tunnel. cookies: how often it was asked for one.
    """

    def __init__(self, number: int) -> None:
        self._now = 0
        self.address = f"10.8.{number >> 8}.{number & 255}"
        self.heard: list[bytes] = []
        self.cookies = 0
        self._device = Device(SeededEnvironment(number, lambda: self._now), FakeSockets(), now=0)
        self._device.set_private_key(private_key(f"scripted peer {number}"), 0)
        identity = self._device.identity
        assert identity is not None
        self.public_key = Key(identity.public)

    def know(self, target: Key) -> None:
        """Take the interface under test for a peer."""
        peer = self._device.add_peer(target.raw, 0)
        assert peer is not None
        self._peer = peer
        peer.set_endpoint(ENDPOINT, 0)
        self._device.insert_allowed_ip(peer, Prefix(socket.inet_aton(V4_OF_A), 32))
        self._device.up(0)

    def say(self, payload: bytes) -> list[bytes]:
        """The datagrams that come of sending this much through the tunnel: a message, or an initiation first."""
        packet = ip_packet(self.address, V4_OF_A, udp(PORT_INSIDE, PORT_INSIDE, payload))
        return self._carry_out(self._device.send_packet(packet, MTU, self._now))

    def hear(self, datagram: bytes) -> list[bytes]:
        """Take a datagram; what has to be sent because of it."""
        effects = self._device.receive_datagram(datagram, ENDPOINT, 0, self._now)
        effects += self._device.process_handshakes(self._now)
        self.cookies += datagram[0] == COOKIE_REPLY
        if datagram[0] == COOKIE_REPLY or any(isinstance(effect, Deliver) for effect in effects):
            self._now = self._device.next_deadline() or self._now
            effects += self._device.expire_timers(self._now)
        return self._carry_out(effects)

    def count_from(self, counter: int) -> None:
        """Let the next data message have this counter."""
        session = self._peer.keypairs.current
        assert session is not None
        session.sending_counter = counter

    def _carry_out(self, effects: Sequence[Effect]) -> list[bytes]:
        self.heard += [effect.packet[HEADERS:] for effect in effects if isinstance(effect, Deliver)]
        return [effect.datagram for effect in effects if isinstance(effect, Transmit)]


class Stage:
    """An interface under test, and its scripted peers; what comes to it through the tunnel is sent back.

    arrived: that, in the order in which it came. answers: how much of it has come back to the peers. unowned: the names
    of messages that are for none of the peers.
    """

    def __init__(self, lab: Lab, implementation: Manifest, peers: Iterable[Scripted]) -> None:
        self.peers = tuple(peers)
        self.arrived: list[bytes] = []
        self.answers = 0
        self.unowned: list[str] = []
        # Whose handshake or session it is, by the index that the peer has given it.
        self._owners: dict[bytes, Scripted] = {}
        node = lab.node("ns0")
        self.wg0 = self._configured(lab, implementation, node)
        node.add_route(NETWORK, dev="wg0")
        self._outer = node.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._outer.connect(("127.0.0.1", PORT_OF_A))
        self._inner = udp_receiver(node, V4_OF_A, PORT_INSIDE)
        self._both = select.epoll()
        lab.undo(self._both.close)
        for one in (self._outer, self._inner):
            lab.undo(one.close)
            one.setblocking(False)
            enlarge_receive_buffer(one, _BUFFER)
            self._both.register(one.fileno(), select.EPOLLIN)

    def _configured(self, lab: Lab, implementation: Manifest, node: NetNS) -> Interface:
        made, key = lab.interface("wg0", implementation, node), lab.key("key1")
        for peer in self.peers:
            peer.know(key.public())
        peers = [PeerConfig(public_key=p.public_key, allowed_ips=allowed_ips(f"{p.address}/32")) for p in self.peers]
        made.set(DeviceConfig(private_key=key, listen_port=PORT_OF_A, peers=tuple(peers)))
        made.up(f"{V4_OF_A}/24")
        return made

    def say(self, peer: Scripted, payload: bytes) -> None:
        """Let a peer send this to the interface under test."""
        self._send(peer, peer.say(payload))

    def throw(self, datagram: bytes) -> None:
        """Send this to the interface under test, from where the peers are."""
        self._outer.send(datagram)

    def converse(self, payload: bytes, deadline: float) -> None:
        """Let every peer send this and get it back, AT_ONCE of them at any time."""
        before, begun = self.answers, 0

        def is_over() -> bool:
            nonlocal begun
            while begun < min(len(self.peers), self.answers - before + AT_ONCE):
                self.say(self.peers[begun], payload)
                begun += 1
            return self.answers - before == len(self.peers)

        self.wait_for(is_over, deadline, f"all {len(self.peers)} peers to be answered")

    def wait_for(self, accept: Callable[[], bool], deadline: float, what: str) -> None:
        """Carry datagrams both ways until this holds."""
        wait_for(_Carrying(self, accept), deadline, what)

    def __str__(self) -> str:
        said = f"{len(self.arrived)} datagrams arrived, and {self.answers} came back"
        for name, count in Counter(self.unowned).items():
            said += f"; {count} times a datagram for none of the peers: {name}"
        return said

    def fileno(self) -> int:
        return self._both.fileno()

    def carry(self) -> None:
        """Give to the peers what has come for them, and send back what has come through the tunnel."""
        for datagram, _ in _all_of(self._outer):
            start, end = FIELDS[datagram[0]].get("receiver", (0, 0))
            peer = self._owners.get(datagram[start:end])
            if peer is None:
                # An initiation, perhaps; nobody here has been silent for so long that there would have to be one.
                self.unowned.append(NAMES[datagram[0]])
                continue
            before = len(peer.heard)
            self._send(peer, peer.hear(datagram))
            self.answers += len(peer.heard) - before
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


def _all_of(one: socket.socket) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """What waits in a socket."""
    while True:
        try:
            yield one.recvfrom(65535)
        except BlockingIOError:
            return


class _Carrying:
    """The peers of a stage have what they wait for: True."""

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
