"""Connect two nodes by a link that loses, delays, replays or changes messages by a script.

A wire has a network namespace of its own, and a veth pair from each node into it. A thread in that
namespace carries frames from one end to the other through packet sockets (packet(7)). It sleeps until a frame arrives
or a held frame is due. Traffic that is not WireGuard's passes unchanged.
"""

from __future__ import annotations

import errno
import os
import selectors
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from harness import steps
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

# MTU of the ends in the wire's namespace: large enough for every frame, so that only the nodes' own MTU limits it.
_MTU: Final = 65535
_PACKET_IGNORE_OUTGOING: Final = 23
# Bytes of frames kept for the capture; later frames are carried, but not recorded.
_MAX_RECORDED: Final = 64 << 20
# Frames taken from one end before the other gets its turn.
_BATCH: Final = 64
_FULL: Final = {errno.ENOBUFS, errno.EAGAIN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A WireGuard message that has arrived on the wire, before the script changed anything.

    sender: name of the node it came from. did, rule: the script's decision, see `rules.Decision`.
    """

    message: Message
    sender: str
    did: str
    rule: int | None
    frame: bytes

    def is_a(self, word: str) -> bool:
        """Return whether a word of `script.MESSAGES` selects this message."""
        return is_a(self.message, word)

    def __str__(self) -> str:
        return f"{self.sender}: {self.message} {self.did}"

    def __repr__(self) -> str:
        return f"Sighting({self})"


class Wire:
    """A wire between two nodes. It carries frames from its construction to `close`."""

    def __init__(self, a: tuple[NetNS, str], b: tuple[NetNS, str], middle: NetNS, *, seed: int, script: Script) -> None:
        """Create the devices of both ends, and start the thread.

        a, b: each end as (node, device name). middle: the wire's own node. seed: of the random choices of scripts that
        have no seed. Raises UsageError for a rule whose sender is at neither end.
        """
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
        self._record(f"carry frames; {_described(script)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and delete the devices; a second call does nothing. HarnessError if the thread had failed."""
        if self._is_closing:
            return
        self._is_closing = True
        self._record("carry no more frames")
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        # The kernel takes some milliseconds to close a packet socket (synchronize_net in packet_release).
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
        """Replace the script; `nth` counts from 1 again, and the list of sightings is cleared.

        rules: the rules of the new script, or one Script; nothing for a wire without faults. Raises UsageError while
        messages are held.
        """
        script = rules[0] if rules and isinstance(rules[0], Script) else Script(tuple(_only_rules(rules)))
        with self._lock:
            if self._rules.holds:
                raise UsageError(f"wire {self.name}: holds {self._rules.holds} messages; release() them first")
            self._rules = Rules(script, self._nodes, seed=self._seed)
            self._sightings.clear()
            self._record(_described(script))

    def release(self) -> None:
        """Deliver all held messages, in the order in which they arrived."""
        with self._lock:
            self._record(f"release the {self._rules.holds} messages held")
            self._send(self._rules.release())

    def replay(self, sighting: Sighting, *, port: int | None = None, payload: bytes | None = None) -> None:
        """Send a message again to its destination.

        port: source port, None for the message's own. payload: replaces the message's, UsageError unless it has the
        same length.
        """
        datagram = frames.udp(sighting.frame)
        original = sighting.message.payload
        if datagram is None or len(payload or original) != len(original):
            raise UsageError(f"{sighting}: want a payload of {len(original)} bytes, the length of the original")
        frame = frames.changed(sighting.frame, datagram, payload or original, port=port)
        action = "forged" if payload else "replayed"
        self.inject(frame, sender=sighting.sender, comment=f"{action}: {sighting.message.name}")

    def reflect(self, sighting: Sighting, *, port: int | None = None) -> None:
        """Send a message back to its own sender, with its destination as the source; port: another source port."""
        datagram = frames.udp(sighting.frame)
        if datagram is None:
            raise UsageError(f"{sighting}: its frame has no UDP datagram to reflect")
        (receiver,) = {*self._nodes} - {sighting.sender}
        frame = frames.reflected(sighting.frame, datagram)
        if port is not None:
            frame = frames.changed(frame, datagram, sighting.message.payload, port=port)
        self.inject(frame, sender=receiver, comment=f"reflected: {sighting.message.name}")

    def inject(self, frame: bytes, *, sender: str, comment: str = "injected") -> None:
        """Send a frame as if the node `sender` had sent it; no rule is applied. comment: for the capture."""
        side = self._side(sender)
        with self._lock:
            self._record(f"{comment}: send {len(frame)} bytes towards {self._nodes[1 - side]}")
            self._deliver(frame, side, comment)

    def sightings(self, word: str = "any", *, sender: str | None = None, did: str | None = None) -> list[Sighting]:
        """Return the messages that have arrived since the last `apply`, oldest first.

        word: of `script.MESSAGES`, which messages. sender: only from this node. did: only with this decision. Raises
        UsageError for an unknown word, HarnessError if the wire's thread has failed.
        """
        return [s for s in self._seen_since(0, word, sender)[1] if did in {None, s.did}]

    def wait_for(
        self, word: str, what: str, *, sender: str | None = None, nth: int = 1, deadline: float = 5.0
    ) -> Sighting:
        """Wait for the nth message of a kind since the last `apply`; one that has already arrived counts too.

        word, sender: as for `sightings`. what: completes "waited for ...". deadline: seconds, scaled. Raises
        DeadlineExceeded.
        """
        position = 0
        matches: list[Sighting] = []

        def look() -> Sighting | None:
            """Look at the new sightings only: there may be thousands."""
            nonlocal position
            position, new = self._seen_since(position, word, sender)
            matches.extend(new)
            return matches[nth - 1] if len(matches) >= nth else None

        return wait_for(_Look(self, look), deadline, what)

    def _seen_since(self, position: int, word: str, sender: str | None) -> tuple[int, list[Sighting]]:
        """Return the number of sightings, and those from `position` on that `word` and `sender` select."""
        if word not in MESSAGES:
            raise UsageError(f"unknown kind of message {word!r}; there are: {', '.join(MESSAGES)}")
        self._raise_failure()
        with self._lock:
            new = self._sightings[position:]
        return position + len(new), [s for s in new if s.is_a(word) and sender in {None, s.sender}]

    @property
    def unexplained_losses(self) -> int:
        """Number of frames lost without a rule, because a buffer was full; a test of lossy wires wants 0."""
        with self._lock:
            self._count_missed()
            return sum(self._missed)

    def save(self, path: Path, *, keys: str = "") -> None:
        """Write the frames of both ends as pcapng, with an interface per end and decisions as packet comments.

        keys: text of `harness.implementations.keylog`, stored in the file.
        """
        with self._lock:
            self._count_missed()
            ends = [
                pcapng.End(f"{node.name}-{device}", missed=self._missed[side] + self._unrecorded[side])
                for side, (node, device) in enumerate(self._ends)
            ]
            packets = sorted(self._packets, key=lambda packet: packet.time)
            pcapng.save(path, ends, packets, keys=keys, comment=f"wire {self.name}, seed {self._seed}")

    def fileno(self) -> int:
        """Return an eventfd that is readable after new sightings or a failure, until `drain`."""
        return self._news

    def drain(self) -> None:
        """Reset the eventfd of `fileno`; callers look at the sightings afterwards."""
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
        except Exception as error:  # noqa: BLE001 - raised in the test's thread, by _raise_failure
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
        """Take at most _BATCH frames from one end, and deliver them as the rules decide."""
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
        """Send a frame by the other end than `side`."""
        other = 1 - side
        try:
            self._sockets[other].send(frame)
        except OSError as error:
            # Not an error: the node may have set its device down or deleted it, and a cable would not report that.
            self._missed[other] += error.errno in _FULL
            comment = f"{comment}; " * bool(comment) + f"not delivered: {error.strerror}"
        self._keep(pcapng.Packet(other, time.time_ns(), frame, is_outbound=False, comment=comment))

    def _keep(self, packet: pcapng.Packet) -> None:
        if self._kept > _MAX_RECORDED:
            self._unrecorded[packet.end] += 1
            return
        self._kept += len(packet.frame)
        self._packets.append(packet)

    def _count_missed(self) -> None:
        for side in ENDS:
            self._missed[side] += capture.missed(self._sockets[side])

    def _side(self, node: str) -> int:
        if node not in self._nodes:
            raise UsageError(f"wire {self.name} has no node {node}; it connects {' and '.join(self._nodes)}")
        return self._nodes.index(node)

    def _record(self, text: str) -> None:
        steps.record(f"wire {self.name}", text)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise HarnessError(f"wire {self.name}: its thread failed: {self._failure!r}") from self._failure


class _Look:
    """Event: `look` returns a sighting on a wire, which is the event's value."""

    def __init__(self, wire: Wire, look: Callable[[], Sighting | None]) -> None:
        self._wire = wire
        self._look = look

    def fileno(self) -> int:
        """Return the wire's eventfd."""
        return self._wire.fileno()

    def look(self) -> Sighting | None:
        """Return the sighting, None if it has not arrived yet."""
        self._wire.drain()
        return self._look()

    def seen(self) -> str:
        """List the last six messages."""
        return "; ".join(str(sighting) for sighting in self._wire.sightings()[-6:]) or "no message"


def _described(script: Script) -> str:
    seed = "" if script.seed is None else f", seed {script.seed}"
    return f"script: {steps.few(script.rules, separator='; ') or 'no rules, all passes'}{seed}"


def _only_rules(rules: tuple[Rule | Script, ...]) -> list[Rule]:
    if any(isinstance(rule, Script) for rule in rules):
        raise UsageError("apply: want rules, or one Script and nothing else")
    return [rule for rule in rules if not isinstance(rule, Script)]


def _plug(node: NetNS, device: str, middle: NetNS, end: str) -> Veth:
    """Connect a node with the wire's namespace, without offloads: frames have checksums and fit the node's MTU."""
    veth = add_veth(node, device, middle, end)
    middle.set_link(end, mtu=_MTU)
    for place, name in ((node, device), (middle, end)):
        set_offloads(place, name, tx=False, tso=False, gso=False, gro=False)
    return veth


def _socket(middle: NetNS, device: str) -> socket.socket:
    sock = capture.tap(middle, device)
    sock.setsockopt(frames.SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    return sock
