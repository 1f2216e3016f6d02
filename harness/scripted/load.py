"""Bring a device under load by bursts of initiations, and show that it is under load.

Anyone who has a device's public key can make initiations with a valid mac1. They are forged: nobody has their keys, so
a device answers one only by a cookie reply, and only under load.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from harness.errors import DeadlineExceeded, LoadNotReached
from harness.net.netns import enlarge_receive_buffer
from harness.scripted.exchange import Line
from harness.scripted.peer import Unexpected
from harness.scripted.received import ReceivedCookieReply, ReceivedData, ReceivedInitiation
from harness.wait import Datagram, poll_until, readable, wait_for
from harness.wire.messages import COOKIE_REPLY, FIELDS, INITIATION, SIZES, kind_of, with_mac1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from random import Random

    from harness.control.records import Key
    from harness.net.netns import NetNS
    from harness.scripted.exchange import Exchange
    from harness.scripted.intents import Outgoing
    from harness.scripted.peer import ScriptedPeer
    from harness.scripted.peer_socket import PeerSocket
    from harness.scripted.received import Received

# udp(7). Messages that one system call sends: with a call for each, a driver would keep up.
_UDP_SEGMENT: Final = 103
_AT_ONCE: Final = 64
# The driver is under load when 512 messages wait, an eighth of its queue (5.3). Twice as many are sent, and then more.
BURST: Final = 1024
_LONGEST_BURST: Final = 4 * BURST
_BUFFER: Final = 8 << 20
_LONGEST: Final = 2048
# Seconds, scaled.
_ANSWER: Final = 2.0
_CANARY: Final = 0.5
_NO_REPLY: Final = 2.0
_BETWEEN_CANARIES: Final = 0.05
# Canaries after which a device that sends no cookie reply is not under load, however busy the machine is.
_QUIET: Final = 20
# Seconds. A device forgets load after one second (`IsUnderLoad`, last_under_load).
_RENEWED_EACH: Final = 0.4
_TRIES: Final = 8
_BURSTS: Final = 8
# Canaries that are answered one after the other, before silence is taken for silence.
_SETTLED: Final = 10
# What a device may send without being asked.
_OWN: Final = (ReceivedInitiation, ReceivedData)


class Load:
    """A sender of forged initiations, from as many addresses as a test needs.

    Some programs count the messages of each source address, and are under load for that source only. So the messages
    that bring about load come from the address whose messages the test is about.

    sent: initiations. replies: cookie replies to them that were read; others: what else came. began: when the last
    `renew` sent its first burst; emptied: when the device had emptied its queue after it (seconds, monotonic).
    """

    def __init__(
        self,
        node: NetNS,
        address: str,
        *,
        targets: Mapping[int, tuple[str, int]],
        device: Key,
        random: Random,
        exchange: Exchange,
    ) -> None:
        """address: of the node; the default source. targets: the device's address and port by family."""
        self._node = node
        self._address = address
        self._targets = targets
        self._device = device
        self._random = random
        self._exchange = exchange
        self._sockets: dict[str, socket.socket] = {}
        self._forged_ones = b"".join(self._forged() for _ in range(_AT_ONCE))
        self.sent = self.replies = 0
        self.others: list[bytes] = []
        self.began = self.emptied = -_RENEWED_EACH

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._sockets.values():
            opened.close()

    # Load

    def renew(self, at: str = "") -> None:
        """Bring the device under load, and wait until it has answered a canary behind the burst: its queue is empty.

        It stays under load for about a second. at: the source address, of this node. Raises LoadNotReached if no
        cookie reply comes.
        """
        # The load of a moment ago is good enough.
        if time.monotonic() < self.emptied + _RENEWED_EACH and self.lasts(at):
            return
        sent, self.began = self.sent, time.monotonic()
        self._note(f"{BURST} forged initiations with a valid mac1, no mac2", at)
        for number in range(_BURSTS):
            self.burst(min(BURST << number, _LONGEST_BURST), at)
            if self._is_answered(at):
                self.emptied = time.monotonic()
                return
        count, took = self.sent - sent, time.monotonic() - self.began
        raise LoadNotReached(
            f"no cookie reply to {count} initiations in {took:.1f} s, {count / took:.0f} a second, "
            f"at most {_LONGEST_BURST} at once"
        )

    def burst(self, size: int, at: str = "") -> None:
        """Send so many forged initiations at once, and do not wait for anything."""
        length = SIZES[INITIATION]
        for first in range(0, size, _AT_ONCE):
            self._send(self._forged_ones[: min(_AT_ONCE, size - first) * length], at)
        self.sent += size

    def lasts(self, at: str = "") -> bool:
        """Send a canary, a forged initiation; return True if a cookie reply to it shows that there is still load.

        Messages before the canary were taken out of the queue before it.
        """
        return self._reply_within(_CANARY, at, {self._send_canary(at)})

    def settles(self, at: str = "") -> bool:
        """Send canaries until the answers to all messages before have left; return True if there is still load.

        Another worker of the device may still be at a message when the first canary is answered.
        """
        return all(self.lasts(at) for _ in range(_SETTLED))

    def hold(self, seconds: float, at: str = "") -> None:
        """Keep the device under load for so many seconds, with short gaps."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self.lasts(at):
                self.renew(at)
            # A cookie reply that is left over ends the wait early, which does no harm.
            readable(self._socket(at).fileno(), min(left, _RENEWED_EACH))

    # Exchanges under load

    def answer(self, peer: ScriptedPeer, message: Outgoing | bytes, via: PeerSocket | None = None) -> Received:
        """Send a handshake message under load; return what the device answers: a response or a cookie reply.

        The device was under load before the message and after it, else the message is sent again. The answer is taken
        out of the inbox. Raises Unexpected if nothing comes, LoadNotReached if the load does not last.
        """
        for _ in range(_TRIES):
            before = {id(one) for one in peer.drain()}
            lasted = self.during(partial(peer.send, message, via), at=(via or peer.main).address)
            answers = poll_until(
                partial(_answers, peer, before), bool, _ANSWER if lasted else 0.0, what=f"an answer to {peer}"
            )
            for one in answers:
                peer.inbox.remove(one)
            # A cookie reply shows load. Without load a response shows nothing.
            if answers and (lasted or isinstance(answers[0], ReceivedCookieReply)):
                return answers[0]
            if lasted:
                raise Unexpected(
                    f"under load the device did not answer {message!r} of {peer} within {_ANSWER:g} s; "
                    f"the last messages: {self._exchange.last()}"
                )
        raise LoadNotReached(f"the load ended {_TRIES} times before the device had processed {message!r}")

    def during(self, action: Callable[[], object], at: str = "") -> bool:
        """Act while the device is under load; return True if it was still under load afterwards."""
        self.renew(at)
        action()
        return self.lasts(at)

    def must_be_silent(self, *peers: ScriptedPeer, action: Callable[[], object], after: str) -> None:
        """Act under load, and show that the device answers nothing to these peers, which have one address.

        Initiations and data of the device are no answers. after: completes the error "under load the device answered
        ...". Raises Unexpected with what came.
        """
        at = peers[0].main.address
        for _ in range(_TRIES):
            for peer in peers:
                peer.drain()
                peer.inbox.clear()
            lasted = self.during(action, at) and self.settles(at)
            came = [str(one) for peer in peers for one in peer.drain() if not isinstance(one, _OWN)]
            if came and lasted:
                raise Unexpected(f"under load the device answered {after}: {', '.join(came)}; {self._exchange.last()}")
            if lasted:
                return
        raise LoadNotReached(f"the load ended {_TRIES} times before the device had processed {after}")

    # Floods

    @contextmanager
    def flood(self, rate: int) -> Iterator[Flood]:
        """Send forged initiations in the background while the block runs. rate: per second."""
        opened = self._open(self._address)
        flood = Flood(opened, self._targets[opened.family], self._forged_ones, rate)
        self._note(f"from now on {rate} forged initiations a second")
        try:
            yield flood
        finally:
            flood.close()
            self._note(f"end of {flood.sent} forged initiations, {flood.rate:.0f} a second")

    # Inside

    def _socket(self, at: str) -> socket.socket:
        address = at or self._address
        if address not in self._sockets:
            self._sockets[address] = self._open(address)
        return self._sockets[address]

    def _send(self, datagrams: bytes, at: str) -> None:
        opened = self._socket(at)
        # Not connected, so a device that has closed its port, because its link is down, is not an error here.
        opened.sendto(datagrams, self._targets[opened.family])

    def _open(self, address: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        opened = self._node.socket(family, socket.SOCK_DGRAM)
        enlarge_receive_buffer(opened, _BUFFER)
        opened.bind((address, 0))
        opened.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, SIZES[INITIATION])
        return opened

    def _forged(self) -> bytes:
        return with_mac1(b"\1\0\0\0" + self._random.randbytes(128) + bytes(16), self._device.raw)

    def _send_canary(self, at: str) -> bytes:
        canary = self._forged()
        self.sent += 1
        self._send(canary, at)
        return canary[slice(*FIELDS[INITIATION]["sender"])]

    def _is_answered(self, at: str) -> bool:
        """Send canaries until one is answered, or until no cookie reply of any kind has come for a while."""
        canaries: set[bytes] = set()
        quiet = 0
        while quiet < _QUIET:
            replies = self.replies
            # The first ones may find the device's queue full.
            canaries.add(self._send_canary(at))
            if self._reply_within(_BETWEEN_CANARIES, at, canaries):
                return True
            quiet = 0 if self.replies > replies else quiet + 1
        return False

    def _reply_within(self, seconds: float, at: str, indices: set[bytes]) -> bool:
        arrival = Datagram(self._socket(at), lambda reply: self._is_reply_to(reply, indices))
        try:
            wait_for(arrival, seconds, "a cookie reply to a canary")
        except DeadlineExceeded:
            return False
        return True

    def _is_reply_to(self, reply: bytes, indices: set[bytes]) -> bool:
        # A cookie reply of another length, or with reserved bytes, shows load too. Tests of its form are elsewhere.
        if reply[:1] != bytes([COOKIE_REPLY]):
            self.others.append(reply)
            return False
        self.replies += 1
        return reply[slice(*FIELDS[COOKIE_REPLY]["receiver"])] in indices

    def _note(self, text: str, at: str = "") -> None:
        peer = f"load {at or self._address}"
        self._exchange.add(Line(time=time.time_ns(), peer=peer, is_sent=True, text=text))


class Flood:
    """A thread that sends forged initiations at a rate until `stop`. sent, replies: how many, and cookie replies."""

    def __init__(self, sock: socket.socket, target: tuple[str, int], burst: bytes, rate: int) -> None:
        self.sent = self.replies = 0
        self._socket = sock
        self._target = target
        self._burst = burst
        self._rate = rate
        self._began = self._ended = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flood", daemon=True)
        self._thread.start()

    @property
    def rate(self) -> float:
        """Initiations per second that were sent."""
        end = self._ended if self._stop.is_set() else time.monotonic()
        return self.sent / max(end - self._began, 1e-9)

    def stop(self) -> None:
        """End the flood; the device may be under load for a second more."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._ended = time.monotonic()
            self._drain()

    def late_replies(self, most: int) -> int:
        """End the flood; count the replies that still come, until none comes for two seconds or there are too many."""
        self.stop()
        before = self.replies
        arrival = Datagram(self._socket)
        with suppress(DeadlineExceeded):
            while self.replies - before <= most:
                wait_for(arrival, _NO_REPLY, "a late cookie reply")
                self.replies += 1
                self._drain()
        return self.replies - before

    def close(self) -> None:
        """End the flood and close its socket."""
        self.stop()
        self._socket.close()

    def _run(self) -> None:
        while True:
            ahead = self.sent / self._rate - (time.monotonic() - self._began)
            if self._stop.wait(max(0.0, ahead)):
                return
            self._socket.sendto(self._burst, self._target)
            self.sent += _AT_ONCE
            self._drain()

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while reply := self._socket.recv(_LONGEST, socket.MSG_DONTWAIT):
                self.replies += kind_of(reply) == COOKIE_REPLY


def _answers(peer: ScriptedPeer, before: set[int]) -> list[Received]:
    """Return the answers that came after the messages of `before`, which are ids of messages in the inbox."""
    return [one for one in peer.drain() if not isinstance(one, _OWN) and id(one) not in before]
