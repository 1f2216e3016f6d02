"""Run cases against refwg's device in this process, with either engine.

Time is virtual, and there are no sockets.

    hostile peer (Player) --- datagrams ---> engine, device ---> packets for the interface
    legitimate peer       <-- answers ------

After each datagram it must be accounted for: accepted, or dropped under a reason. Nothing of refwg may raise.
"""

from __future__ import annotations

import errno
import os
import random
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, cast

from harness.fuzz import inputs
from harness.fuzz.findings import ANSWERED, CONTROL, GREW, RAISED, SILENT, UNCOUNTED, Finding
from harness.fuzz.generator import CONFIGURATION, is_reached
from harness.fuzz.grammar import Inner
from harness.fuzz.inputs import Step
from harness.fuzz.memory import resident
from harness.fuzz.player import RESPONDED, SENT, Player, WrongAnswer
from harness.scripted.packets import udp_packet
from refwg import ip
from refwg.allowedips import Prefix
from refwg.boundary import Endpoint, LocalAddress
from refwg.device import Device
from refwg.engine.batch import BatchEngine
from refwg.engine.offloads import OFFLOADS, Offloads
from refwg.engine.simple import SimpleEngine, Surroundings
from refwg.engine.virtio import HEADER_LENGTH
from refwg.errors import ConfigError
from refwg.messages import MILLISECOND, SECOND, MessageType
from refwg.queueing import LastUnderLoad
from refwg.socket import ReceivedBatch
from refwg.uapi import Conversation

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from harness.fuzz.inputs import Case
    from refwg.boundary import Transmit
    from refwg.ip import IcmpError
    from refwg.peer import Peer
    from refwg.socket import UdpSockets
    from refwg.tun import Tun

ENGINES: Final = ("simple", "batch")
INNER: Final = Inner("192.168.241.2", "fd00::2", "192.168.241.1", "fd00::1")
_LEGITIMATE: Final = "192.168.241.3"
_START: Final = 1_700_000_000 * SECOND
_MTU: Final = 1420
_DISCARD: Final = 9
# Batches of datagrams that UDP_GRO joins.
_LARGEST_BATCH: Final = 65507
_SEGMENTS: Final = 64
# Per peer: a handshake, and three sessions.
_INDICES_PER_PEER: Final = 4
# Cases after which the device is replaced by a fresh one.
_CASES_PER_DEVICE: Final = 512
# Virtual time between two cases.
_PAUSE: Final = SECOND
_CHECKED_EACH: Final = 16
_BATCHED: Final = (inputs.DATA, inputs.REPLAY, inputs.BYTES)


class _World:
    """Random bytes from a seed, the time, and sockets that only store what is set."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - not a secret
        self.now = SECOND

    def random_bytes(self, length: int) -> bytes:
        return self._random.randbytes(length)

    def wall_clock(self) -> int:
        return _START + self.now

    def clock(self) -> int:
        return self.now

    def open(self, port: int) -> int:
        return port or 40000

    def close(self) -> None:
        pass

    def set_fwmark(self, fwmark: int) -> None:
        pass

    def interface_index(self, name: str) -> int:
        if name != "lo":
            raise ConfigError(f"no interface {name}", errno.EINVAL)
        return 1


@dataclass
class _Link:
    mtu: int = _MTU


@dataclass
class _Tun:
    """The interface: what was written to it, and no packet to read but `waiting`."""

    has_headers: bool
    link: _Link = field(default_factory=_Link)
    waiting: list[bytes] = field(default_factory=list)
    written: list[bytes] = field(default_factory=list)

    def read(self) -> bytes | None:
        return self.waiting.pop(0) if self.waiting else None

    def read_into(self, buffer: memoryview) -> int:
        if not self.waiting:
            return 0
        frame = bytes(HEADER_LENGTH) + self.waiting.pop(0)
        buffer[: len(frame)] = frame
        return len(frame)

    def write(self, packet: bytes) -> bool:
        self.written.append(packet)
        return True

    def write_parts(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        header, *rest = parts
        # Superframes are refused, so that each packet is seen by itself.
        if any(bytes(header)):
            return False
        self.written.append(b"".join(rest))
        return True

    def mtu_to(self, destination: bytes) -> int:
        del destination
        return self.link.mtu

    def limit_superframes(self, size: int) -> None:
        pass

    def send_icmp(self, error: IcmpError, now: int) -> bool:
        del error, now
        return True


@dataclass
class _Udp:
    """The sockets: batches to receive, and what was sent."""

    waiting: deque[tuple[bytes, int, Endpoint]] = field(default_factory=deque)
    sent: list[tuple[bytes, Endpoint]] = field(default_factory=list)

    def send(self, transmit: Transmit[Peer], segment: int = 0) -> str:
        datagrams = bytes(transmit.datagram)
        length = segment or len(datagrams)
        for start in range(0, len(datagrams), length):
            self.sent.append((datagrams[start : start + length], transmit.endpoint))
        return ""

    def receive(self, sock: socket.socket) -> tuple[bytes, Endpoint, int] | None:
        del sock
        if not self.waiting:
            return None
        datagram, _, sender = self.waiting.popleft()
        return datagram, sender, 0

    def receive_into(self, sock: socket.socket, buffer: memoryview) -> ReceivedBatch | None:
        del sock
        if not self.waiting:
            return None
        datagrams, segment, sender = self.waiting.popleft()
        buffer[: len(datagrams)] = datagrams
        return ReceivedBatch(len(datagrams), segment, sender, 0)


def _endpoint(number: int) -> Endpoint:
    return Endpoint(bytes([10, 0, 0, number]), number, 0, LocalAddress(bytes([10, 0, 0, 1]), 3))


class RefwgInProcess:
    """refwg's device with a hostile and a legitimate peer; `run` takes a case.

    engine: simple, or batch, which gets datagrams in batches. features: what the last case led to, as words: a case
    that leads to a new one is worth keeping. packets, requests: how many were sent to it in all.
    """

    def __init__(self, engine: Literal["simple", "batch"] = "simple", seed: int = 1) -> None:
        self.engine_name = engine
        self._seed = seed
        self._cases = 0
        self.packets = self.requests = 0
        self.features: set[str] = set()
        # What passed in the last case: the peer's number, whether it sent it, the datagram.
        self.passed: list[tuple[int, bool, bytes]] = []
        self.reached: set[str] = set()
        self._renew()

    def _renew(self) -> None:
        self.world = _World(self._seed)
        self._udp, self._tun = _Udp(), _Tun(has_headers=self.engine_name == "batch")
        self._last_under_load = LastUnderLoad()
        self.device = Device(self.world, self.world, now=self.world.now, last_under_load=self._last_under_load)
        surroundings = Surroundings(
            self.device, cast("UdpSockets", self._udp), cast("Tun", self._tun), self.world.clock
        )
        self._engine = (
            BatchEngine(surroundings, offloads=Offloads(OFFLOADS, lambda *_: None), worthwhile=2)
            if self.engine_name == "batch"
            else SimpleEngine(surroundings)
        )
        self._random = random.Random(self._seed)  # noqa: S311 - not a secret
        self.device.set_listen_port(1)
        self.device.set_private_key(self._random.randbytes(32), self.world.now)
        self.device.up(self.world.now)
        self.hostile, self.legitimate = self._player(), self._player()
        self._players = {2: self.hostile, 3: self.legitimate}
        self._add(self.legitimate, 3, _LEGITIMATE)

    def _player(self) -> Player:
        identity = self.device.identity
        assert identity is not None  # noqa: S101 - a private key was set
        return Player(
            static=self._random.randbytes(32),
            device=identity.public,
            random=self._random,
            clock=self.world.wall_clock,
        )

    def _add(self, player: Player, number: int, *addresses: str) -> None:
        old = self.device.peer(player.identity.public)
        if old is not None:
            self.device.remove_peer(old, self.world.now)
        peer = self.device.add_peer(player.identity.public, self.world.now)
        assert peer is not None  # noqa: S101 - it is not the device's own key
        for address in addresses:
            packed = ip_bytes(address)
            self.device.insert_allowed_ip(peer, Prefix(packed, 8 * len(packed)))
        peer.set_endpoint(_endpoint(number), self.world.now)
        player.restart()

    def run(self, case: Case) -> None:
        """Play a case; raises Finding."""
        self.features.clear()
        self.passed.clear()
        self._cases += 1
        if self._cases % _CASES_PER_DEVICE == 0:
            self._renew()
        try:
            if case.state == CONFIGURATION:
                self._configure(case)
            else:
                self._play(case)
                if self._cases % _CHECKED_EACH == 0:
                    self.check_legitimate()
        except (Finding, WrongAnswer) as error:
            self._renew()
            raise error if isinstance(error, Finding) else Finding(ANSWERED, str(error)) from error
        except Exception as error:
            # The next case must not meet the device of this one.
            self._renew()
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{last.filename.rpartition('/')[2]}, {last.name}"
            message = f"raised {type(error).__name__} in {place}: {error}"
            raise Finding(RAISED, message, traceback.format_exc()) from error

    def _play(self, case: Case) -> None:
        self._add(self.hostile, 2, INNER.source4, INNER.source6)
        self._last_under_load.time = None
        seen: list[str] = []
        for steps in self._together(case.steps):
            before = self._drops()
            answers = self._step(steps)
            reasons = [reason for reason, count in self._drops().items() if count > before.get(reason, 0)]
            self.features |= {f"{case.state}: {steps[0].kind}: {word}" for word in (*reasons, *answers)}
            seen += answers
        self._check_bounds()
        if is_reached(case.state, seen):
            self.reached.add(case.state)
        self._pass(_PAUSE)

    def _drops(self) -> dict[str, int]:
        return {reason.name: count for reason, count in self.device.statistics.drops.items()}

    def _together(self, steps: Sequence[Step]) -> list[list[Step]]:
        """Group steps whose datagrams arrive together: the batch engine gets them as UDP_GRO would join them."""
        groups: list[list[Step]] = []
        for step in steps:
            is_batched = self.engine_name == "batch" and step.kind in _BATCHED
            if is_batched and groups and groups[-1][0].kind in _BATCHED:
                groups[-1].append(step)
            else:
                groups.append([step])
        return groups

    def _step(self, steps: Sequence[Step]) -> list[str]:
        """Carry out steps that belong together; returns the names of the device's answers."""
        step = steps[0]
        if step.kind == inputs.WAIT:
            self._pass((step.counter or 0) * MILLISECOND)
        elif step.kind == inputs.LOAD:
            self._last_under_load.time = self.world.now
        elif step.kind == inputs.TRIGGER:
            self._tun.waiting.append(udp_packet((INNER.device4, _DISCARD), (INNER.source4, _DISCARD), b"payload"))
            self._engine.packets_waiting()
        else:
            self.deliver([datagram for step in steps for datagram in self.hostile.datagrams(step)], 2)
        return self._answers(2)

    def deliver(self, datagrams: Sequence[bytes], number: int) -> None:
        """Give datagrams of a peer to the engine, and check that each is accepted or dropped under a reason."""
        self.packets += len(datagrams)
        self.passed += [(number, True, datagram) for datagram in datagrams]
        self._tun.written.clear()
        statistics = self.device.statistics
        before, rx_bytes, cookies = statistics.drops.total(), statistics.rx_bytes, self._cookies()
        for batch in _batches(datagrams) if self.engine_name == "batch" else [[one] for one in datagrams]:
            self._udp.waiting.append((b"".join(batch), len(batch[0]) or 1, _endpoint(number)))
        while self._udp.waiting:
            self._engine.datagrams_waiting(cast("socket.socket", None))
        self._engine.time_passed()
        dropped = statistics.drops.total() - before
        if len(datagrams) == 1:
            is_cookie = datagrams[0][:1] == bytes([MessageType.COOKIE_REPLY])
            is_accepted = statistics.rx_bytes != rx_bytes or (is_cookie and self._cookies() != cookies)
            if dropped + is_accepted != 1:
                what = f"accepted, and counted {dropped} drops for," if is_accepted else f"counted {dropped} drops for"
                raise Finding(UNCOUNTED, f"{what} a datagram of {len(datagrams[0])} bytes: {datagrams[0][:32].hex()}")
        self._check_delivered(number)

    def _cookies(self) -> list[tuple[object, ...]]:
        """Return what an accepted cookie reply changes; its bytes are not counted."""
        jars = [peer.cookie for peer in self.device.peers]
        return [(jar._cookie, jar._cookie_birthdate, jar._last_mac1_sent) for jar in jars]  # noqa: SLF001

    def _check_delivered(self, number: int) -> None:
        """Check that packets for the interface have the length that they claim, and a source of their sender's."""
        player = self._players[number]
        sender = self.device.peer(player.identity.public)
        for packet in self._tun.written:
            if not ip.version(packet) or ip.length_and_source(packet)[0] != len(packet):
                raise Finding(ANSWERED, f"delivered {len(packet)} bytes that are not a packet: {packet[:32].hex()}")
            if sender is None or not self.device.is_source_allowed(sender, ip.source(packet)):
                raise Finding(
                    ANSWERED, f"delivered a packet from an address that is not the peer's: {packet[:40].hex()}"
                )

    def _answers(self, number: int) -> list[str]:
        """Let each peer take what was sent to it; returns the names of the messages to this one."""
        names = []
        for datagram, endpoint in self._udp.sent:
            self.passed.append((endpoint.port, False, datagram))
            name = self._players[endpoint.port].heard(datagram)
            if endpoint.port == number:
                names.append(name)
        self._udp.sent.clear()
        return names

    def _pass(self, duration: int) -> None:
        """Let virtual time pass; timers run out on the way."""
        end = self.world.now + duration
        while (deadline := self._engine.next_deadline()) is not None and deadline <= end:
            self.world.now = max(self.world.now, deadline)
            self._engine.time_passed()
            self._answers(2)
        self.world.now = end

    def _check_bounds(self) -> None:
        """Check that what a hostile peer adds to is bounded."""
        shared = self.device._shared  # noqa: SLF001 - what no packet shows
        peers = len(shared.peers)
        if len(shared.indices) > _INDICES_PER_PEER * peers:
            raise Finding(GREW, f"keeps {len(shared.indices)} indices of {peers} peers")
        if self.device.has_waiting_handshakes:
            raise Finding(GREW, "leaves handshake messages in its queue")

    def check_legitimate(self) -> None:
        """Check that the legitimate peer connects, and that a packet passes in each direction; raises Finding."""
        self._last_under_load.time = None
        self._pass(SECOND)
        self.deliver(self.legitimate.datagrams(Step(inputs.INITIATION)), 3)
        answers = self._answers(3)
        if RESPONDED not in answers:
            raise Finding(SILENT, f"no longer answers a legitimate peer's initiation; it sent: {answers or 'nothing'}")
        packet = udp_packet((_LEGITIMATE, _DISCARD), (INNER.device4, _DISCARD), b"ping")
        self.deliver(self.legitimate.datagrams(Step(inputs.DATA, packet + bytes(-len(packet) % 16))), 3)
        if packet not in self._tun.written:
            raise Finding(SILENT, "no longer delivers a legitimate peer's packet")
        self._tun.waiting.append(udp_packet((INNER.device4, _DISCARD), (_LEGITIMATE, _DISCARD), b"pong"))
        self._engine.packets_waiting()
        if SENT not in self._answers(3):
            raise Finding(SILENT, "no longer sends to a legitimate peer")

    def check(self) -> None:
        """Check that it serves the legitimate peer; raises Finding."""
        try:
            self.check_legitimate()
        except (Finding, WrongAnswer) as error:
            self._renew()
            raise error if isinstance(error, Finding) else Finding(ANSWERED, str(error)) from error

    def check_idle(self) -> None:
        """Check nothing: virtual time stands still while nothing comes."""

    def memory(self) -> int:
        """Return the resident memory of this process in bytes."""
        return resident(os.getpid())

    def _configure(self, case: Case) -> None:
        """Give requests to a device of their own, then a valid one, which must be carried out."""
        device = Device(self.world, self.world, now=self.world.now)
        for step in case.steps:
            self.requests += 1
            conversation = Conversation(device, self.world)
            answer = conversation.feed(step.argument, self.world.now)
            self._check_answer(step.argument, answer.reply)
            last = answer.reply[-12:].rpartition(b"errno=")[2].strip().decode()
            key = step.argument[:300].rpartition(b"\n")[2][:1]
            self.features.add(f"uapi: {last or 'silent'} {answer.is_over} {len(list(device.peers))} {key!r}")
        valid = b"set=1\nprivate_key=%b\nreplace_peers=true\npublic_key=%b\nallowed_ip=10.0.0.0/8\n\n"
        reply = Conversation(device, self.world).feed(valid % (b"41" * 32, b"42" * 32), self.world.now).reply
        if reply != b"errno=0\n\n":
            raise Finding(CONTROL, f"no longer accepts a valid request: {reply!r}")
        self._check_answer(b"get=1\n\n", Conversation(device, self.world).feed(b"get=1\n\n", self.world.now).reply)
        if len(list(device.peers)) != 1 or len(device._shared.indices):  # noqa: SLF001 - what no packet shows
            raise Finding(GREW, "keeps peers or indices that a request has removed")
        self.reached.add(case.state)

    def _check_answer(self, request: bytes, reply: bytes) -> None:
        """Check that an answer is empty, or ends with an errno and an empty line."""
        ends = reply.endswith(b"\n\n") and reply[:-2].rpartition(b"\n")[2].startswith(b"errno=")
        if reply and not ends:
            raise Finding(CONTROL, f"answered the request {request[:200]!r} by {reply[-200:]!r}")


def ip_bytes(address: str) -> bytes:
    """Return an address as 4 or 16 bytes."""
    probe = udp_packet((address, 0), (address, 0), b"")
    return ip.source(probe)


def _batches(datagrams: Sequence[bytes]) -> list[list[bytes]]:
    """Join datagrams as UDP_GRO does: those of one length, with at most one shorter at the end."""
    batches: list[list[bytes]] = []
    for datagram in datagrams:
        last = batches[-1] if batches else []
        fits = last and len(last) < _SEGMENTS and len(last[-1]) == len(last[0]) >= len(datagram) > 0
        if fits and sum(map(len, last)) + len(datagram) <= _LARGEST_BATCH:
            last.append(datagram)
        else:
            batches.append([datagram])
    return batches
