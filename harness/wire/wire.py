"""Connect two nodes by a link that loses, delays, replays or changes messages by a script.

A wire has a network namespace of its own, and a veth pair from each node into it. A thread in that
namespace carries frames from one end to the other through packet sockets (packet(7)). It sleeps until a frame arrives
or a held frame is due. Traffic that is not WireGuard's passes unchanged and is counted, unless a rule names it.
"""

from __future__ import annotations

import errno
import os
import selectors
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from harness import steps
from harness.errors import HarnessError, UsageError
from harness.net.veth import add_veth, set_offloads
from harness.wait import wait_for
from harness.wire import capture, frames, pcapng
from harness.wire.fragments import INCOMPLETE_FRAGMENT, Arrival, Fragments, Piece
from harness.wire.messages import DATAGRAM, NANOSECONDS, tally
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
    """A message, or another frame, that has arrived on the wire, before the script changed anything.

    sender: name of the node it came from. did, rule: the script's decision, see `rules.Decision`. arrival: its frames.
    """

    message: Message
    sender: str
    did: str
    rule: int | None
    arrival: Arrival

    @property
    def frame(self) -> bytes:
        """The frame with the message; for a message in fragments, one frame with all of it."""
        return self.arrival.frame

    @property
    def fragments(self) -> tuple[bytes, ...]:
        """The frames with the fragments, in their order of arrival; empty for a message in one frame."""
        return tuple(piece.frame for piece in self.arrival.pieces)

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
        self._fragments = Fragments()
        self._complaints: list[str] = []
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

        If a rule of the old script has matched nothing, `complaints` says so. rules: the rules of the new script, or
        one Script; nothing for a wire without faults. Raises UsageError while messages are held.
        """
        script = rules[0] if rules and isinstance(rules[0], Script) else Script(tuple(_only_rules(rules)))
        with self._lock:
            if self._rules.holds:
                raise UsageError(f"wire {self.name}: holds {self._rules.holds} messages; release() them first")
            rules_now = Rules(script, self._nodes, seed=self._seed)
            self._complaints += self._unmatched()
            self._rules = rules_now
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
        original = sighting.message.payload
        if sighting.message.sort != DATAGRAM or len(payload or original) != len(original):
            raise UsageError(f"{sighting}: want a payload of {len(original)} bytes, the length of the original")
        action = "forged" if payload else "replayed"
        self._inject(sighting.arrival.changed(payload or original, port=port), sighting, sighting.sender, action)

    def reflect(self, sighting: Sighting, *, port: int | None = None) -> None:
        """Send a message back to its own sender, with its destination as the source; port: another source port."""
        if sighting.message.sort != DATAGRAM:
            raise UsageError(f"{sighting}: its frame has no UDP datagram to reflect")
        (receiver,) = {*self._nodes} - {sighting.sender}
        self._inject(sighting.arrival.reflected(port=port), sighting, receiver, "reflected")

    def _inject(self, out: tuple[bytes, ...], sighting: Sighting, sender: str, action: str) -> None:
        for frame, note in zip(out, sighting.arrival.notes(sighting.message.name), strict=True):
            comment = f"{action}: {sighting.message.name}" + f"; {note}" * bool(note)
            self.inject(frame, sender=sender, comment=comment)

    def inject(self, frame: bytes, *, sender: str, comment: str = "injected") -> None:
        """Send a frame as if the node `sender` had sent it; no rule is applied. comment: for the capture."""
        side = self._side(sender)
        with self._lock:
            self._record(f"{comment}: send {len(frame)} bytes towards {self._nodes[1 - side]}")
            self._deliver(frame, side, comment)

    def sightings(self, word: str = "any", *, sender: str | None = None, did: str | None = None) -> list[Sighting]:
        """Return the messages that have arrived since the last `apply`, oldest first.

        word: of `script.MESSAGES`, which messages; `unknown`, `fragment` and `other` select what is not a WireGuard
        message, and `any` does not. sender: only from this node. did: only with this decision. Raises UsageError for
        an unknown word, HarnessError if the wire's thread has failed.
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

    def __str__(self) -> str:
        """Say what has arrived since the last `apply`: "wire ns1-ns2: ns1: 3 data, 1 other (ARP); ns2: nothing"."""
        with self._lock:
            return f"wire {self.name}: {self._tally()}"

    def _tally(self) -> str:
        arrived = [(s.sender, s.message.name) for s in self._sightings]
        return "; ".join(f"{node}: {tally(name for sender, name in arrived if sender == node)}" for node in self._nodes)

    def complaints(self) -> list[str]:
        """Return what is wrong with the scripts so far: rules that promise a fault, and matched nothing."""
        with self._lock:
            return [*self._complaints, *self._unmatched()]

    def _unmatched(self) -> list[str]:
        rules = self._rules.unmatched()
        if not rules:
            return []
        what = f"wire {self.name}: no message matched {' or '.join(rules)}, so the test proved nothing about that fault"
        return [f"{what}; arrived since apply(): {self._tally()}; correct the rule, or declare it optional=True"]

    @property
    def unexplained_losses(self) -> int:
        """Number of frames lost without a rule, because a buffer was full; a test of lossy wires wants 0."""
        with self._lock:
            self._count_missed()
            return sum(self._missed)

    def recording(self) -> capture.Recording:
        """Return the frames so far: one that a node sent has only left it, one that was delivered has only arrived."""
        with self._lock:
            self._count_missed()
            packets = sorted(self._packets, key=lambda packet: packet.time)
            # The first loss of a wire may have come before any frame; what was not recorded came after all of them.
            intact = 0 if sum(self._missed) else len(packets) if sum(self._unrecorded) else None
        nodes = self._nodes
        ways = [(nodes[p.end], "") if p.is_outbound else ("", nodes[p.end]) for p in packets]
        return capture.Recording(self.name, [(p, *way) for p, way in zip(packets, ways, strict=True)], intact)

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
            deadlines = [self._rules.next_deadline(), self._fragments.next_deadline()]
        earliest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        timeout = None if earliest is None else max(0, earliest - time.monotonic_ns()) / NANOSECONDS
        for key, _ in selector.select(timeout):
            if key.data is None:
                os.eventfd_read(self._bell)
            else:
                self._carry(key.data)
        with self._lock:
            now = time.monotonic_ns()
            self._send(self._rules.due(now))
            if late := self._fragments.due(now):
                self._decide(late, now, time.time_ns())
        if late:
            os.eventfd_write(self._news, 1)

    def _carry(self, side: int) -> None:
        """Take at most _BATCH frames from one end, and deliver them as the rules decide."""
        seen = False
        for _ in range(_BATCH):
            taken = capture.receive(self._sockets[side])
            if taken is None:
                break
            with self._lock:
                for frame, contents, note in taken.read():
                    index = self._keep(pcapng.Packet(side, taken.time, frame, is_outbound=True, comment=note))
                    now = time.monotonic_ns()
                    arrivals = self._arrivals(frame, contents, side, now, index)
                    self._decide(arrivals, now, taken.time, index)
                    seen |= bool(arrivals)
        if seen:
            os.eventfd_write(self._news, 1)

    def _arrivals(
        self, frame: bytes, contents: frames.Contents, side: int, now: int, index: int
    ) -> list[tuple[int, Arrival]]:
        """Return what the rules can decide about now: a frame, or a datagram of which the last fragment has arrived."""
        if not isinstance(contents, frames.Fragment):
            return [(side, Arrival(frame, contents))]
        piece = Piece(frame, contents, index)
        is_gone = self._fragments.is_gone(piece, side)
        if is_gone is None:
            # If no rule can apply, fragments do not wait for each other, and the order of all frames stays the same.
            is_gone = not self._rules.may_take(side)
        if is_gone:
            self._deliver(frame, side, INCOMPLETE_FRAGMENT)
        return self._fragments.arrive(piece, side, now, is_gone=is_gone)

    def _decide(self, arrivals: list[tuple[int, Arrival]], now: int, stamp: int, index: int = -1) -> None:
        """Apply the rules. stamp: of the last frame, ns of wall time. index: of the packet that is not a fragment."""
        for side, arrival in arrivals:
            decision, deliveries = self._rules.decide(arrival, side, now, stamp)
            numbers = [piece.number for piece in arrival.pieces] or [index]
            for number, comment in zip(numbers, decision.comments, strict=True):
                self._comment(number, comment)
                if arrival.is_gone:
                    self._comment(number + 1, comment)
            sender = self._nodes[side]
            self._sightings.append(
                Sighting(message=decision.message, sender=sender, did=decision.did, rule=decision.rule, arrival=arrival)
            )
            self._send(deliveries)

    def _comment(self, index: int, comment: str) -> None:
        """Add a comment to a recorded packet; index: negative if it was not recorded."""
        if comment and 0 <= index < len(self._packets):
            old = self._packets[index]
            words = [comment, "" if old.comment == INCOMPLETE_FRAGMENT else old.comment]
            self._packets[index] = replace(old, comment="; ".join(filter(None, words)))

    def _send(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._deliver(delivery.frame, delivery.side, delivery.comment)

    def _deliver(self, frame: bytes, side: int, comment: str) -> None:
        """Send a frame by the other end than `side`."""
        other = 1 - side
        # Before it is sent: the answer of a node must not have an earlier stamp.
        now = time.time_ns()
        try:
            capture.send(self._sockets[other], frame)
        except OSError as error:
            # Not an error: the node may have set its device down or deleted it, and a cable would not report that.
            self._missed[other] += error.errno in _FULL
            comment = f"{comment}; " * bool(comment) + f"not delivered: {error.strerror}"
        self._keep(pcapng.Packet(other, now, frame, is_outbound=False, comment=comment))

    def _keep(self, packet: pcapng.Packet) -> int:
        """Record a packet, and return its index; -2 if there is no room: the next number is not an index, either."""
        if self._kept > _MAX_RECORDED:
            self._unrecorded[packet.end] += 1
            return -2
        self._kept += len(packet.frame)
        self._packets.append(packet)
        return len(self._packets) - 1

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
        """List the last six messages, and count what has arrived."""
        last = [str(sighting) for sighting in self._wire.sightings()[-6:]]
        return f"{'; '.join(last) or 'no message'}; in all, {self._wire}"


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
