"""Let the oracle judge what a lab's captures have recorded, with the lab's keys.

Only what the lab itself has set is known. From the moment when a test writes to a control socket, or lets `wg setconf`
read a file, the oracle no longer judges that device.
"""

from __future__ import annotations

import base64
import re
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.implementations import keylog
from harness.steps import FIRST, LAST
from harness.wire import frames, noise
from harness.wire.capture import NO_SEGMENT_SIZE
from harness.wire.inner import Handshakes, read_keys
from harness.wire.messages import INITIATION, RESPONSE, kind_of
from harness.wire.oracle import Datagram, Device, Oracle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from harness.implementations.interface import Change, Interface
    from harness.lab.lab import Lab
    from harness.steps import Step
    from harness.wire.capture import Recording
    from harness.wire.oracle import Finding
    from harness.wire.pcapng import Packet

_NANOSECONDS: Final = 1_000_000_000
# Keys of scripted peers that are looked at: each costs as much as reading an initiation.
_MOST_KEYS: Final = 64
_KEY: Final = re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}=")
_MTU: Final = re.compile(r"\bmtu (?:lock )?(\d+)")
# The kernel learns no path MTU below this (net.ipv4.route.min_pmtu).
_LEAST_PATH_MTU: Final = 552
# Seconds by which the distance of two clocks may change.
_STEADY: Final = 0.25
# What a step changes that may keep a datagram from leaving: then counters may be missing.
_HINDERS: Final = re.compile(
    r"nft|iptables|tc |ip (-\S+ )*(link|route|rule|address|addr|neigh)|sysctl|conntrack|ethtool|mount|ip netns"
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the oracle says about one lab.

    findings: by the interface, the first violation of each invariant. checked: datagrams, by interface and invariant.
    """

    findings: tuple[tuple[Interface, Finding], ...]
    checked: Mapping[tuple[Interface, str], int]


def judge(lab: Lab) -> Judgement:
    """Judge what all captures and wires of a lab have recorded so far."""
    recordings = [*(capture.recording() for capture in lab.captures), *(wire.recording() for wire in lab.wires)]
    interfaces = {str(number): interface for number, interface in enumerate(lab.made)}
    known = _Known(lab)
    datagrams = _datagrams(recordings, {interface.birth.name for interface in lab.made})
    transport_keys, responses = _opened(lab, datagrams)
    oracle = Oracle(
        [known.device(name, interface) for name, interface in interfaces.items()],
        privates=[key.raw for key in lab.keys[:_MOST_KEYS]],
        publics=known.publics,
        transport_keys=transport_keys,
        responses=responses,
        knows_all_keys=not known.is_changed_unseen,
        has_steady_clock=known.is_steady,
    )
    for datagram in datagrams:
        oracle.take(datagram)
    found = oracle.findings
    for gap in oracle.gaps:
        is_new = all((gap.requirement, gap.device) != (finding.requirement, finding.device) for finding in found)
        if is_new and not known.explains(gap):
            found.append(gap)
    return Judgement(
        tuple((interfaces[finding.device], finding) for finding in found),
        {(interfaces[name], requirement): count for (name, requirement), count in oracle.checked.items()},
    )


def _opened(lab: Lab, datagrams: Iterable[Datagram]) -> tuple[dict[int, bytes], dict[bytes, bool]]:
    """Open the handshakes whose ephemeral keys a program has logged.

    Returns the keys of their sessions, by the receiver index of their data, and whether their responses authenticate.
    An index that two handshake messages have as their sender's is left out: data to it may be of either session, also
    where the keys of one are not known; so may a response.
    """
    logs = [line for interface in lab.made for line in keylog.revealed(interface)]
    if not logs:
        return {}, {}
    statics = {key for interface in lab.made for change in interface.changes for key in _privates(change)}
    lines = [f"LOCAL_STATIC_PRIVATE_KEY = {base64.b64encode(key).decode()}" for key in statics]
    handshakes = Handshakes(read_keys("\n".join(lines + logs)))
    found: dict[int, bytes] = {}
    senders: dict[int, bytes] = {}
    shared = set()
    for datagram in datagrams:
        kind = kind_of(datagram.payload)
        if kind in {INITIATION, RESPONSE}:
            sender = noise.index(datagram.payload)
            if senders.setdefault(sender, datagram.payload) != datagram.payload:
                shared.add(sender)
        found |= handshakes.take(kind, datagram.payload)
    return (
        {index: key for index, key in found.items() if index not in shared},
        {payload: ok for payload, ok in handshakes.responses.items() if noise.receiver(payload) not in shared},
    )


def _datagrams(recordings: Iterable[Recording], nodes: set[str]) -> list[Datagram]:
    """Return the UDP datagrams of all recordings that left or reached a node, until the first loss in any of them."""
    found: list[Datagram] = []
    end = time.time_ns()
    for recording in recordings:
        whole = recording.frames if recording.intact is None else recording.frames[: recording.intact]
        if recording.intact is not None:
            end = min(end, max((packet.time for packet, *_ in whole), default=0))
        for number, (packet, left, reached) in enumerate(whole, 1):
            if left not in nodes and reached not in nodes:
                continue
            contents = frames.read(packet.frame)
            if isinstance(contents, frames.Fragment) or packet.comment == NO_SEGMENT_SIZE:
                # A datagram that is not put together here may have brought anything.
                end = min(end, packet.time - 1)
                break
            if isinstance(contents, frames.Transport) and contents.protocol == socket.IPPROTO_UDP:
                found.append(_datagram(packet, contents, left, reached, f"{recording.name}.pcapng, frame {number}"))
    found.sort(key=lambda datagram: datagram.time)
    return [datagram for datagram in found if datagram.time <= end]


def _datagram(packet: Packet, contents: frames.Transport, left: str, reached: str, place: str) -> Datagram:
    frame = packet.frame
    return Datagram(
        packet.time, left, reached, contents.source(frame), contents.destination(frame), contents.payload(frame), place
    )


class _Known:
    """What the lab has set, and when."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._steps = lab.steps.steps
        self._all = len(self._steps) < FIRST + LAST
        self._texts = [str(step.text) for step in self._steps]
        self.is_steady = self._all and _is_steady(self._steps)
        self.publics: set[bytes] = set()
        self.is_changed_unseen = False
        for interface in lab.made:
            for change in interface.changes:
                self.is_changed_unseen |= _is_unseen(change)
                self.publics.update(_publics(change))
        added = sum(" type veth" in text and text.startswith("ip link add") for text in self._texts)
        links = sum(not capture.is_loopback for capture in lab.captures) + 2 * len(lab.wires)
        self._sees_all = self._all and added <= links
        mentioned = [int(mtu) for text in self._texts for mtu in _MTU.findall(text)]
        self._least_mtu = min([_LEAST_PATH_MTU, *mentioned]) if self._all else 0

    def device(self, name: str, interface: Interface) -> Device:
        """Describe an interface for the oracle."""
        unseen = [change.began for change in interface.changes if _is_unseen(change)]
        # Whoever can send from the program's port need not be the program.
        ended = [time for time in (interface.ended, interface.birth.forged_since) if time is not None]
        return Device(
            name=name,
            node=interface.birth.name,
            privates=tuple(dict.fromkeys(key for change in interface.changes for key in _privates(change))),
            ports=tuple((change.began, port) for change in interface.changes for port in _ports(change)),
            began=interface.began,
            ended=min([*unseen, *ended], default=1 << 63),
            resets=tuple(self._resets(interface)),
            least_mtu=self._least_mtu,
            sees_all=self._sees_all,
        )

    def _resets(self, interface: Interface) -> Iterator[int]:
        for change in interface.changes:
            yield from (change.began, change.ended)
        nodes = {interface.place.name, interface.birth.name}
        for step, text in zip(self._steps, self._texts, strict=True):
            is_of_it = step.node in nodes and text.startswith(f"ip link set {interface.name} ")
            if is_of_it or "netns" in text:
                yield from (step.wall, _end(step))

    def explains(self, gap: Finding) -> bool:
        """Return whether counters may be missing because a send has failed or was filtered."""
        if not (self._sees_all and self._all):
            return True
        return any(
            _HINDERS.match(text) and step.wall <= gap.datagram.time and _end(step) >= gap.since
            for step, text in zip(self._steps, self._texts, strict=True)
        )


def _end(step: Step) -> int:
    return step.wall + int(step.seconds * _NANOSECONDS)


def _is_steady(steps: Iterable[Step]) -> bool:
    """Return whether nobody has set the wall clock between the first step and the last one."""
    distances = [step.wall / _NANOSECONDS - step.began for step in steps]
    return max(distances, default=0) - min(distances, default=0) < _STEADY


def _is_unseen(change: Change) -> bool:
    return change.config is None and change.words[:1] != ("set",)


def _ports(change: Change) -> list[int]:
    if change.config is not None:
        return [] if change.config.listen_port is None else [change.config.listen_port]
    return [
        int(value) if value.isdecimal() else 0
        for word, value in zip(change.words, change.words[1:], strict=False)
        if word == "listen-port"
    ]


def _privates(change: Change) -> list[bytes]:
    if change.config is not None:
        key = change.config.private_key
        return [] if key is None or not any(key.raw) else [key.raw]
    return _keys(change.words[-1:])


def _publics(change: Change) -> list[bytes]:
    if change.config is not None:
        return [peer.public_key.raw for peer in change.config.peers]
    return _keys(change.words)


def _keys(words: Iterable[str]) -> list[bytes]:
    return [base64.b64decode(key) for word in words for key in _KEY.findall(word)]
