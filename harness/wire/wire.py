"""Connect two nodes by a link that loses, delays, replays or changes messages by a script.

Each end is a veth pair from a node into a network namespace of the wire's own, where a thread carries frames from one
to the other through packet sockets (packet(7)). What is not WireGuard's passes. The thread sleeps until a frame comes
or one that waits is due.
"""

from __future__ import annotations

import errno
import os
import selectors
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from harness.errors import HarnessError, UsageError
from harness.net.veth import add_veth, set_offloads
from harness.wait import wait_for
from harness.wire import capture, frames, pcapng
from harness.wire.messages import NANOSECONDS
from harness.wire.rules import ENDS, Rules
from harness.wire.script import MESSAGES, Script, is_a

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from harness.net.netns import NetNS
    from harness.net.veth import Veth
    from harness.wire.messages import Message
    from harness.wire.rules import Delivery
    from harness.wire.script import Rule

# The ends in the wire's namespace let through whatever a node sends: its own MTU is what counts.
_MTU: Final = 65535
_PACKET_IGNORE_OUTGOING: Final = 23
# What is kept for the capture, in bytes; a flood goes on unrecorded.
_KEPT: Final = 64 << 20
_BATCH: Final = 64
_FULL: Final = {errno.ENOBUFS, errno.EAGAIN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A message that has come onto the wire: which, from which node, and what the script did (`rules.Decision`)."""

    message: Message
    sender: str
    did: str
    rule: int | None
    frame: bytes

    def is_a(self, word: str) -> bool:
        """Whether it is one of those that a word of `faults.MESSAGES` stands for."""
        return is_a(self.message, word)

    def __str__(self) -> str:
        return f"{self.sender}: {self.message} {self.did}"


class Wire:
    """A wire between two nodes, carrying frames from the moment it is made; `close` ends it.

    a, b: each end as (node, device); the devices are made. middle: a node of the wire's own. seed: of what the script
    leaves to chance.
    """

    def __init__(self, a: tuple[NetNS, str], b: tuple[NetNS, str], middle: NetNS, *, seed: int, script: Script) -> None:
        self._ends = (a, b)
        self._nodes = (a[0].name, b[0].name)
        self.name = "-".join(self._nodes)
        self._seed = seed
        self._rules = Rules(script, self._nodes, seed=seed)
        self._sightings: list[Sighting] = []
        self._packets: list[pcapng.Packet] = []
        self._kept = 0
        self._missed = [0, 0]
        self._unrecorded = [0, 0]
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._is_closing = False
        middle.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        self._links = [_plug(node, device, middle, f"end{side}") for side, (node, device) in enumerate(self._ends)]
        self._sockets = [_socket(middle, f"end{side}") for side in ENDS]
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=f"wire {self.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and delete the devices, once; raises HarnessError if the thread had broken."""
        if self._is_closing:
            return
        self._is_closing = True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        # The kernel takes some milliseconds for each.
        closing = [threading.Thread(target=tapped.close) for tapped in self._sockets]
        for thread in closing:
            thread.start()
        for link in self._links:
            link.close()
        for thread in closing:
            thread.join()
        os.close(self._news)
        os.close(self._bell)
        self._raise_failure()

    # What a test does with it

    def apply(self, *rules: Rule | Script) -> None:
        """Replace the script: numbers (`nth`) and the list of sightings begin anew.

        Raises UsageError while messages are held.
        """
        script = rules[0] if rules and isinstance(rules[0], Script) else Script(tuple(_only_rules(rules)))
        with self._lock:
            if self._rules.holds:
                raise UsageError(f"wire {self.name}: holds {self._rules.holds} messages; release() them first")
            self._rules = Rules(script, self._nodes, seed=self._seed)
            self._sightings.clear()

    def release(self) -> None:
        """Let all messages go on that wait, in the order in which they came."""
        with self._lock:
            self._send(self._rules.release())

    def replay(self, sighting: Sighting, *, port: int | None = None, payload: bytes | None = None) -> None:
        """Send a message again, as it came, towards where it went.

        port: from this source port of the same address. payload: with this inside, of the same length.
        """
        datagram = frames.udp(sighting.frame)
        original = sighting.message.payload
        if datagram is None or len(payload or original) != len(original):
            raise UsageError(f"{sighting}: want a payload of {len(original)} bytes, as it had")
        frame = frames.changed(sighting.frame, datagram, payload or original, port=port)
        said = "forged" if payload else "replayed"
        self.inject(frame, sender=sighting.sender, comment=f"{said}: {sighting.message.name}")

    def reflect(self, sighting: Sighting, *, port: int | None = None) -> None:
        """Send a message back to its own sender, as if it came from where it went; port: from this one."""
        datagram = frames.udp(sighting.frame)
        if datagram is None:
            raise UsageError(f"{sighting}: no datagram to be reflected")
        (back,) = {*self._nodes} - {sighting.sender}
        frame = frames.reflected(sighting.frame, datagram)
        if port is not None:
            frame = frames.changed(frame, datagram, sighting.message.payload, port=port)
        self.inject(frame, sender=back, comment=f"reflected: {sighting.message.name}")

    def inject(self, frame: bytes, *, sender: str, comment: str = "injected") -> None:
        """Send a frame that comes from no one, as if this node had sent it; no rule looks at it."""
        side = self._side(sender)
        with self._lock:
            self._deliver(frame, side, comment)

    def sightings(self, word: str = "any", *, sender: str | None = None, did: str | None = None) -> list[Sighting]:
        """Messages that came onto the wire under this script: of one sort, from one node, with one decision."""
        return [s for s in self._seen_since(0, word, sender)[1] if did in {None, s.did}]

    def wait_for(
        self, word: str, what: str, *, sender: str | None = None, nth: int = 1, deadline: float = 5.0
    ) -> Sighting:
        """Wait until the nth such message under this script has come onto the wire."""
        position = 0
        found: list[Sighting] = []

        def look() -> Sighting | None:
            # Each is looked at once: there may be thousands.
            nonlocal position
            position, new = self._seen_since(position, word, sender)
            found.extend(new)
            return found[nth - 1] if len(found) >= nth else None

        return wait_for(_Look(self, look), deadline, what)

    def _seen_since(self, position: int, word: str, sender: str | None) -> tuple[int, list[Sighting]]:
        """How many sightings there are now, and which of those from this position on are meant."""
        if word not in MESSAGES:
            raise UsageError(f"no messages are called {word!r}; there are: {', '.join(MESSAGES)}")
        self._raise_failure()
        with self._lock:
            new = self._sightings[position:]
        return position + len(new), [s for s in new if s.is_a(word) and sender in {None, s.sender}]

    @property
    def lost_by_itself(self) -> int:
        """Frames that no rule took and that are lost all the same, because the buffers were full."""
        with self._lock:
            self._count_missed()
            return sum(self._missed)

    def save(self, path: Path, *, keys: str = "") -> None:
        """Write what has passed as pcapng: an interface for each end, decisions as comments, keys inside."""
        with self._lock:
            self._count_missed()
            ends = [
                pcapng.End(f"{node.name}-{device}", missed=self._missed[side] + self._unrecorded[side])
                for side, (node, device) in enumerate(self._ends)
            ]
            packets = sorted(self._packets, key=lambda packet: packet.time)
            pcapng.save(path, ends, packets, keys=keys, comment=f"wire {self.name}, seed {self._seed}")

    def fileno(self) -> int:
        return self._news

    def drain(self) -> None:
        """Take note that there was news."""
        try:
            os.eventfd_read(self._news)
        except BlockingIOError:
            return

    # What the thread does

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for side in ENDS:
                    selector.register(self._sockets[side], selectors.EVENT_READ, side)
                selector.register(self._bell, selectors.EVENT_READ, None)
                while not self._is_closing:
                    self._turn(selector)
        except Exception as error:  # noqa: BLE001 - told by whoever asks next
            self._failure = error
            os.eventfd_write(self._news, 1)

    def _turn(self, selector: selectors.BaseSelector) -> None:
        with self._lock:
            deadline = self._rules.next_deadline()
        timeout = None if deadline is None else max(0, deadline - time.monotonic_ns()) / NANOSECONDS
        for key, _ in selector.select(timeout):
            if key.data is None:
                os.eventfd_read(self._bell)
            else:
                self._carry(key.data)
        with self._lock:
            self._send(self._rules.due(time.monotonic_ns()))

    def _carry(self, side: int) -> None:
        """Take frames from one end; not without end, so that the other has its turn."""
        seen = False
        for _ in range(_BATCH):
            received = capture.receive(self._sockets[side])
            if received is None:
                break
            frame, stamp, _ = received
            with self._lock:
                decision, deliveries = self._rules.arrive(frame, side, time.monotonic_ns(), stamp)
                self._keep(pcapng.Packet(side, stamp, frame, is_outbound=True, comment=decision.comment))
                message = decision.message
                if message is not None and message.kind:
                    seen = True
                    sender, rule = self._nodes[side], decision.rule
                    self._sightings.append(
                        Sighting(message=message, sender=sender, did=decision.did, rule=rule, frame=frame)
                    )
                self._send(deliveries)
        if seen:
            os.eventfd_write(self._news, 1)

    def _send(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._deliver(delivery.frame, delivery.side, delivery.comment)

    def _deliver(self, frame: bytes, side: int, comment: str) -> None:
        """Let a frame leave by the end that is not `side`."""
        other = 1 - side
        try:
            self._sockets[other].send(frame)
        except OSError as error:
            # The node may have set its device down or deleted it: a cable would not tell either.
            self._missed[other] += error.errno in _FULL
            comment = f"{comment}; " * bool(comment) + f"not delivered: {error.strerror}"
        self._keep(pcapng.Packet(other, time.time_ns(), frame, is_outbound=False, comment=comment))

    def _keep(self, packet: pcapng.Packet) -> None:
        if self._kept > _KEPT:
            self._unrecorded[packet.end] += 1
            return
        self._kept += len(packet.frame)
        self._packets.append(packet)

    def _count_missed(self) -> None:
        for side in ENDS:
            self._missed[side] += capture.missed(self._sockets[side])

    def _side(self, node: str) -> int:
        if node not in self._nodes:
            raise UsageError(f"wire {self.name}: no node {node} here; {' and '.join(self._nodes)} are")
        return self._nodes.index(node)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise HarnessError(f"wire {self.name} broke: {self._failure!r}") from self._failure


class _Look:
    """A wire has seen something: what the function finds."""

    def __init__(self, wire: Wire, look: Callable[[], Sighting | None]) -> None:
        self._wire = wire
        self._look = look

    def fileno(self) -> int:
        return self._wire.fileno()

    def look(self) -> Sighting | None:
        self._wire.drain()
        return self._look()

    def seen(self) -> str:
        return "; ".join(str(sighting) for sighting in self._wire.sightings()[-6:]) or "no message"


def _only_rules(rules: tuple[Rule | Script, ...]) -> list[Rule]:
    if any(isinstance(rule, Script) for rule in rules):
        raise UsageError("apply: want rules, or one Script and nothing else")
    return [rule for rule in rules if not isinstance(rule, Script)]


def _plug(node: NetNS, device: str, middle: NetNS, end: str) -> Veth:
    """Connect a node with the wire's namespace. Frames must be whole: checksums filled in, none bigger than the MTU."""
    made = add_veth(node, device, middle, end)
    middle.set_link(end, mtu=_MTU)
    for place, name in ((node, device), (middle, end)):
        set_offloads(place, name, tx=False, tso=False, gso=False, gro=False)
    return made


def _socket(middle: NetNS, device: str) -> socket.socket:
    made = capture.tap(middle, device)
    made.setsockopt(frames.SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    return made
