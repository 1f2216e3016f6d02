"""Measure handshakes: the rate of one core, and how soon a thousand peers connect.

The load is a crowd of peers, each with an address of its own, because programs limit what one address may send. All
messages of the crowd have one ephemeral key, so that they cost the crowd much less than the device.
"""

from __future__ import annotations

import heapq
import random
import resource
import select
import socket
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from hashlib import blake2s
from typing import TYPE_CHECKING, Final

from bench.processes import cores, cpu_seconds, pinned
from bench.tunnels import ADDRESS_OF_A, ADDRESS_OF_B, connected, laboratory
from harness import DeviceConfig, HarnessError, Key, PeerConfig, allowed_ips
from refwg.cookie import CookieJar
from refwg.errors import RefwgError
from refwg.messages import CookieReply, Data, Initiation, MessageType, Response
from refwg.noise import TAI64_EPOCH, Handshake, HandshakeState, StaticIdentity, Transcript, static_static
from selftests.support.floods import quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness import Interface, Manifest, NetNS

PEERS: Final = 1000
AT_ONCE: Final = 32  # initiations on their way: too few for any program to be under load (wireguard-go: 128)
GIVEN_UP_AFTER: Final = 1.0  # seconds; a message without an answer counts as lost
CONNECTED_WITHIN: Final = 60.0  # seconds
RETRY: Final = (5.0, 0.333)  # seconds after which a peer sends a new initiation, and the range of the random addition
PORT: Final = 51820  # of the device
_CROWD: Final = "10.99.0.0/16"  # addresses of the crowd, all of them B's
_SWEEP: Final = 0.1  # seconds between two searches for lost messages
_DESCRIPTORS: Final = PEERS + 500
_LONGEST: Final = 2048
# Where the receiver index begins, by the type of the message (5.4.3, 5.4.7).
_RECEIVER_INDEX: Final[dict[int, int]] = {MessageType.RESPONSE: 8, MessageType.COOKIE_REPLY: 4}


class Peer:
    """A scripted peer of the device under test, as far as a handshake goes."""

    def __init__(self, number: int, crowd: Crowd, sock: socket.socket) -> None:
        self.identity = StaticIdentity.from_private(_private(f"peer {number}"))
        self.socket = sock
        self._crowd = crowd
        self._jar = CookieJar(crowd.device.public)
        transcript = copy(crowd.begun)
        # 5.4.2: tokens s and ss; the rest of an initiation is its timestamp.
        self._encrypted_static = transcript.seal(crowd.static_key, self.identity.public)
        self._static_static = static_static(self.identity, crowd.device.public)
        self._key = transcript.mix_key(self._static_static or b"")
        self._transcript = transcript
        self._handshake: Handshake | None = None

    def initiate(self) -> int:
        """Send a new initiation; returns its sender index."""
        index = self._crowd.next_index()
        transcript = copy(self._transcript)
        message = Initiation(
            sender_index=index,
            ephemeral=self._crowd.ephemeral.public,
            encrypted_static=self._encrypted_static,
            encrypted_timestamp=transcript.seal(self._key, self._crowd.timestamp(index)),
        )
        self._handshake = Handshake(
            remote_static=self._crowd.device.public,
            precomputed_static_static=self._static_static,
            state=HandshakeState.CREATED_INITIATION,
            local_index=index,
            ephemeral_key=self._crowd.ephemeral.key,
            transcript=transcript,
        )
        with suppress(OSError):  # a full buffer: the message is lost
            self.socket.send(self._jar.add_macs(message.to_bytes(), time.monotonic_ns()))
        return index

    def take_cookie(self, reply: bytes) -> None:
        """Store the cookie of a reply for the next initiation."""
        with suppress(RefwgError):  # a reply to an earlier message
            self._jar.consume_reply(CookieReply.parse(reply), time.monotonic_ns())

    def complete(self, response: bytes) -> bool:
        """Check a response, and send a keepalive, so that the device is connected, too; False if it is not valid."""
        if self._handshake is None:
            return False
        try:
            self._handshake.consume_response(self.identity, Response.parse(response))
        except RefwgError:
            return False
        keypair = self._handshake.begin_session(time.monotonic_ns())
        keepalive = Data(receiver_index=keypair.remote_index, counter=0, ciphertext=keypair.sending.seal(0, b""))
        self.socket.send(keepalive.to_bytes())
        return True


class Crowd:
    """A thousand peers of one device, each with a socket of its own."""

    def __init__(self, node: NetNS, device: StaticIdentity) -> None:
        """node: that has the addresses of the crowd. device: the keys of the device under test."""
        self.device = device
        self.ephemeral = StaticIdentity.from_private(_private("ephemeral"))
        # 5.4.2: tokens e and es.
        self.begun = Transcript.start(device.public)
        self.begun.mix_ephemeral(self.ephemeral.public)
        self.static_key = self.begun.mix_dh(self.ephemeral.key, device.public)
        self._index = 0
        self._seconds = (TAI64_EPOCH + time.time_ns() // 10**9).to_bytes(8)
        self._poll = select.epoll()
        self.peers = [Peer(number, self, self._open(node, number)) for number in range(PEERS)]
        self._by_descriptor = {peer.socket.fileno(): peer for peer in self.peers}

    def next_index(self) -> int:
        """Return an index that no message has had yet."""
        self._index += 1
        return self._index

    def timestamp(self, index: int) -> bytes:
        """Return the timestamp of the message with this index: greater than those of all earlier messages."""
        return self._seconds + index.to_bytes(4)

    def answers(self, timeout: float) -> Iterator[tuple[Peer, bytes]]:
        """Wait for messages of the device, and yield them with the peers that they are for; timeout: seconds."""
        for descriptor, _ in self._poll.poll(max(0.0, timeout)):
            peer = self._by_descriptor[descriptor]
            with suppress(OSError):  # an ICMP error
                yield peer, peer.socket.recv(_LONGEST)

    def close(self) -> None:
        """Close all sockets."""
        for peer in self.peers:
            peer.socket.close()
        self._poll.close()

    def _open(self, node: NetNS, number: int) -> socket.socket:
        sock = node.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind((f"10.99.{number >> 8}.{number & 255}", 0))
        sock.connect((ADDRESS_OF_A, PORT))
        self._poll.register(sock, select.EPOLLIN)
        return sock


@contextmanager
def crowd_and_device(manifest: Manifest, core: int | None) -> Iterator[tuple[Crowd, Interface]]:
    """Start a device with a thousand peers in A, and the peers in B. core: the only CPU of the device; None: all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with laboratory() as lab, ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, _DESCRIPTORS), hard), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        nodes = connected(lab)
        nodes["ns1"].add_route(_CROWD, via=ADDRESS_OF_B)
        nodes["ns2"].run(["ip", "route", "add", "local", _CROWD, "dev", "lo"])
        device = StaticIdentity.from_private(_private("device"))
        crowd = Crowd(nodes["ns2"], device)
        stack.callback(crowd.close)
        if core is None:
            interface = lab.interface("wg0", quiet(manifest), nodes["ns1"])
        else:
            with pinned(core):
                interface = lab.interface("wg0", quiet(manifest, GOMAXPROCS="1"), nodes["ns1"])
        peers = tuple(
            PeerConfig(public_key=Key(peer.identity.public), allowed_ips=allowed_ips(f"10.98.{n >> 8}.{n & 255}/32"))
            for n, peer in enumerate(crowd.peers)
        )
        interface.set(DeviceConfig(private_key=Key(device.private), listen_port=PORT, peers=peers))
        interface.up("10.98.255.254/16")
        yield crowd, interface


def per_second(name: str, manifest: Manifest, *, seconds: float) -> dict[str, float]:
    """Measure how many initiations a second one core answers; returns the figures.

    The device has one CPU, and the crowd another one if there is one. The crowd sends as fast as it gets answers.
    The rate is that of a core which does nothing else: answers per CPU second. By the clock it is lower if other
    programs use the core.
    """
    first, *_, last = [*cores(), *cores()]
    with crowd_and_device(manifest, first) as (crowd, interface), pinned(last):
        # The first handshakes of a program take longer: it loads code and allocates memory.
        _answered(crowd, seconds / 4)
        cpu, started = cpu_seconds(interface), time.monotonic()
        answered = _answered(crowd, seconds)
        took, spent = time.monotonic() - started, cpu_seconds(interface)
    if not answered:
        raise HarnessError(f"{manifest.name} answered no initiation")
    rate = answered / took
    # By its CPU time, the rate of one core does not depend on what else runs there. The driver has no CPU clock.
    return {name: rate if cpu is None or spent is None else answered / (spent - cpu), f"{name}_by_clock": rate}


def _answered(crowd: Crowd, seconds: float) -> int:
    """Keep AT_ONCE initiations on their way for so many seconds; returns how many were answered.

    The first answer is verified, so that a program cannot gain by sending rubbish.
    """
    answered, turn, verified = 0, 0, False
    waiting: dict[int, float] = {}
    now = time.monotonic()
    ends, sweep = now + seconds, now
    while now < ends:
        while len(waiting) < AT_ONCE:
            waiting[crowd.peers[turn % PEERS].initiate()] = now
            turn += 1
        for peer, message in crowd.answers(_SWEEP):
            index = _receiver_index(message)
            if waiting.pop(index, None) is None:
                continue
            if message[0] == MessageType.COOKIE_REPLY:
                peer.take_cookie(message)
            elif message[0] == MessageType.RESPONSE:
                answered += 1
                if not verified and not peer.complete(message):
                    raise HarnessError("the device sent a response that does not verify")
                verified = True
        now = time.monotonic()
        if now > sweep + _SWEEP:
            waiting = {index: sent for index, sent in waiting.items() if now < sent + GIVEN_UP_AFTER}
            sweep = now
    return answered


def _receiver_index(message: bytes) -> int:
    """Return the index of the initiation that a response or a cookie reply is for; 0 for any other message."""
    offset = _RECEIVER_INDEX.get(message[0]) if message else None
    return int.from_bytes(message[offset : offset + 4], "little") if offset else 0


def thousand_peers(name: str, manifest: Manifest, *, note: Callable[[str], None]) -> dict[str, float]:
    """Let a thousand peers send initiations at once; returns the seconds until all are connected.

    A peer that is not answered sends a new initiation after five seconds and some jitter, with the cookie if it has
    got one, as the protocol demands. note: gets a line of progress.
    """
    with crowd_and_device(manifest, None) as (crowd, _):
        started = time.monotonic()
        took = _connect_all(crowd, started, note) - started
    return {name: took}


def _connect_all(crowd: Crowd, started: float, note: Callable[[str], None]) -> float:
    """Shake hands with all peers; returns the time when the last one was connected."""
    rng = random.Random(0)  # noqa: S311 - jitter
    left = set(crowd.peers)
    seen = Counter[str]()
    retries: list[tuple[float, int]] = []

    def initiate(number: int) -> None:
        seen["initiations"] += 1
        crowd.peers[number].initiate()
        heapq.heappush(retries, (time.monotonic() + RETRY[0] + rng.uniform(0, RETRY[1]), number))

    for number in range(PEERS):
        initiate(number)
    now = time.monotonic()
    while left:
        for peer, message in crowd.answers(min(_SWEEP, retries[0][0] - now)):
            if message[0] == MessageType.COOKIE_REPLY:
                seen["cookie replies"] += 1
                peer.take_cookie(message)
            elif message[0] == MessageType.RESPONSE and peer in left:
                # Only the last initiation of a peer can be answered.
                is_valid = peer.complete(message)
                seen["responses" if is_valid else "late responses"] += 1
                left -= {peer} if is_valid else set()
        now = time.monotonic()
        note(f"{PEERS - len(left)} of {PEERS} peers are connected")
        if now > started + CONNECTED_WITHIN:
            counts = ", ".join(f"{count} {what}" for what, count in seen.items())
            raise HarnessError(
                f"{PEERS - len(left)} of {PEERS} peers were connected after {CONNECTED_WITHIN:g} s: {counts}"
            )
        while retries and retries[0][0] <= now:
            _, number = heapq.heappop(retries)
            if crowd.peers[number] in left:
                initiate(number)
    return now


def _private(name: str) -> bytes:
    """Return a private key that is the same in every run."""
    return blake2s(f"bench {name}".encode()).digest()
