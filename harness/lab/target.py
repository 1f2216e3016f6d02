"""Set up one implementation under test, and scripted peers that talk to it.

ns1                              ns2
+---------------------+          +--------------------------------------------+
| wg0 192.168.241.1   |          |  scripted peers                            |
|     fd00::1         |          |  192.168.1.2, .3, ...   fd00:aa::2, 3, ... |
| veth1 192.168.1.1   |----------|  veth2                                     |
|       fd00:aa::1    |          |  inside: 192.168.241.2, ...   fd00::2, ... |
+---------------------+          +--------------------------------------------+
"""

from __future__ import annotations

import socket
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final
from zlib import crc32

from harness.control.records import ZERO_KEY, DeviceConfig, Endpoint, Key, PeerConfig, allowed_ips
from harness.errors import UsageError
from harness.lab.topology import End, Topology
from harness.scripted.exchange import EXCHANGE, Exchange
from harness.scripted.inside import Inside
from harness.scripted.intents import CookieReply, Initiation, Response
from harness.scripted.load import Load
from harness.scripted.packets import udp_packet
from harness.scripted.peer import ScriptedPeer
from harness.scripted.received import ReceivedCookieReply
from harness.traffic.udp import udp_message, udp_receiver
from harness.wait import poll_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.control.records import PeerState
    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab

_DRAWING: Final = __doc__.partition("\n\n")[2]
SCRIPTED: Final = Topology(
    name="scripted",
    drawing=_DRAWING,
    nodes=("ns1", "ns2"),
    links=(
        (
            End("ns1", "veth1", ("192.168.1.1/24", "fd00:aa::1/96")),
            End("ns2", "veth2", ("192.168.1.2/24", "fd00:aa::2/96")),
        ),
    ),
)
_PORT: Final = 1
DISCARD: Final = 9
INNER4, INNER6 = "192.168.241.1", "fd00::1"
# The device's address and port by family.
_TARGETS: Final[dict[int, tuple[str, int]]] = {
    socket.AF_INET: ("192.168.1.1", _PORT),
    socket.AF_INET6: ("fd00:aa::1", _PORT),
}
_SOURCE_OF_LOAD: Final = {4: "192.168.1.253", 6: "fd00:aa::fd"}
_MOST: Final = 250
_FIRST_PORT, _PORTS = 1024, 60000
# Seconds, scaled.
_ANSWER: Final = 2.0


class Target:
    """The device under test, with as many scripted peers as a test makes.

    interface: under test. node: its node. peers_node: that of the peers. public_key: the device's. exchange: all
    messages. inside: the packets that the interface delivers.
    """

    def __init__(self, lab: Lab, implementation: Manifest) -> None:
        """Build the topology, start the program and set its key and port; it has no peer but the witness."""
        self.lab = lab
        self.implementation = implementation
        nodes = SCRIPTED.build(lab)
        self.node, self.peers_node = nodes["ns1"], nodes["ns2"]
        self.key = lab.key("device")
        self.exchange = Exchange()
        self.peers: list[ScriptedPeer] = []
        self._addresses = {"192.168.1.2", "fd00:aa::2"}
        lab.evidence(EXCHANGE, lambda: str(self.exchange))
        self.interface = lab.interface("wg0", implementation, self.node)
        self.interface.set(DeviceConfig(private_key=self.key, listen_port=_PORT))
        self.interface.up(f"{INNER4}/24", f"{INNER6}/112")
        self.inside = Inside(self.node, "wg0", implementation.name)
        lab.undo(self.inside.close)
        for address in (INNER4, INNER6):
            # So that the node does not answer the peers' datagrams by ICMP "port unreachable".
            lab.undo(udp_receiver(self.node, address, DISCARD).close)
        self._witnesses: dict[int, ScriptedPeer] = {}

    @property
    def public_key(self) -> Key:
        """The device's public key."""
        return self.key.public()

    def peer(
        self,
        name: str = "",
        *,
        static: Key | None = None,
        preshared_key: bytes = ZERO_KEY.raw,
        family: int = 4,
        address: str = "",
        port: int = 0,
        is_known: bool = True,
        endpoint: bool = False,
        persistent_keepalive: int | None = None,
    ) -> ScriptedPeer:
        """Make a peer with an address and a socket of its own, and add it to the device.

        static: its private key; default: one of the lab's. family: 4 or 6, of its outer address. address: one of its
        node, added if it is missing; default: the next free one. is_known: False leaves it out of the device's
        configuration. endpoint: True tells the device where the peer is, so that it can begin.
        """
        number = len(self.peers)
        if number > _MOST:
            raise UsageError(f"target: more than {_MOST} scripted peers; use raw sockets for a flood")
        name = name or f"p{number + 1}"
        address = self.address(address or self._free_address(family))
        made = ScriptedPeer(
            self.peers_node,
            name,
            static=static or self.lab.key(f"scripted {name}"),
            device=self.public_key,
            targets=_TARGETS,
            address=address,
            random=self.lab.random,
            exchange=self.exchange,
            preshared_key=preshared_key,
            inner4=f"192.168.241.{number + 2}",
            inner6=f"fd00::{number + 2:x}",
            port=port,
            round_trip=partial(self.round_trip, 6 if ":" in address else 4),
        )
        self.peers.append(made)
        self.lab.undo(made.close)
        if is_known:
            self.configure(made, endpoint=endpoint, persistent_keepalive=persistent_keepalive)
        return made

    def address(self, address: str) -> str:
        """Give the peers' node an address if it does not have it; returns it."""
        if address not in self._addresses:
            self._addresses.add(address)
            self.peers_node.add_address("veth2", f"{address}/{96 if ':' in address else 24}")
        return address

    def configure(self, peer: ScriptedPeer, *, endpoint: bool = False, persistent_keepalive: int | None = None) -> None:
        """Add a peer to the device."""
        self.interface.set(
            DeviceConfig(
                peers=(
                    PeerConfig(
                        public_key=peer.public_key,
                        preshared_key=None if peer.preshared_key == ZERO_KEY.raw else Key(peer.preshared_key),
                        allowed_ips=allowed_ips(f"{peer.inner4}/32", f"{peer.inner6}/128"),
                        endpoint=Endpoint(peer.main.address, peer.main.port) if endpoint else None,
                        persistent_keepalive=persistent_keepalive,
                    ),
                )
            )
        )

    def set_private_key(self, key: Key) -> None:
        """Change the device's private key; from now on all peers send to the new identity."""
        self.interface.set(DeviceConfig(private_key=key))
        self.key = key
        for peer in self.peers:
            peer.device = self.public_key

    def remove(self, peer: ScriptedPeer) -> None:
        """Remove a peer from the device."""
        self.interface.set(DeviceConfig(peers=(PeerConfig(public_key=peer.public_key, remove=True),)))

    def seen(self, peer: ScriptedPeer) -> PeerState:
        """Return the peer as the device reports it: endpoint, counters, latest handshake."""
        return self.interface.peer(peer.public_key)

    def send(self, peer: ScriptedPeer, payload: bytes = b"payload", *, family: int = 4) -> None:
        """Let the device's node send a UDP datagram to the peer's inner address, so that the device must send it."""
        udp_message(self.node, peer.inner4 if family == 4 else peer.inner6, DISCARD, payload)  # noqa: PLR2004

    def packet(self, peer: ScriptedPeer, payload: bytes = b"payload", *, family: int = 4, tos: int = 0) -> bytes:
        """Make the inner packet of a UDP datagram from a peer to the device's node, which takes it and is silent.

        Its source port follows from the payload, so that programs do not join different packets (UDP GRO).
        """
        source, destination = (peer.inner4, INNER4) if family == 4 else (peer.inner6, INNER6)  # noqa: PLR2004
        port = _FIRST_PORT + crc32(payload) % _PORTS
        return udp_packet((source, port), (destination, DISCARD), payload, tos=tos)

    def round_trip(self, family: int = 4) -> None:
        """Make a handshake of a witness, a peer that does nothing else: whatever came before it is done.

        family: 4 or 6, of its outer address.
        """
        if family not in self._witnesses:
            self._witnesses[family] = self.peer(f"witness{family}", family=family)
        witness = self._witnesses[family]
        witness.send(Initiation())
        # Under load the device asks for a cookie; the next initiation has it.
        if poll_until(witness.drain, bool, _ANSWER) and isinstance(witness.inbox[0], ReceivedCookieReply):
            witness.expect(CookieReply)
            witness.send(Initiation())
        witness.send(witness.expect(Response).session.keepalive())

    @contextmanager
    def load(self, family: int = 4) -> Iterator[Load]:
        """Bring the device under load by initiations with a valid mac1, from an address of their own.

        family: 4 or 6, of that address: that of the peers of the test. Raises LoadNotReached, the result `not_reached`,
        if no cookie reply comes. After the block the device may be under load for a second or more.
        """
        address = self.address(_SOURCE_OF_LOAD[family])
        load = Load(
            self.peers_node,
            address,
            targets=_TARGETS,
            device=self.public_key,
            random=self.lab.random,
            exchange=self.exchange,
        )
        with load:
            load.renew()
            yield load

    def _free_address(self, family: int) -> str:
        number = len(self.peers) + 2
        return f"192.168.1.{number}" if family == 4 else f"fd00:aa::{number:x}"  # noqa: PLR2004
