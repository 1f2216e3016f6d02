"""Flood refwg, and measure its CPU and memory, and how soon a peer connects."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import (
    LOOPBACK,
    V4_OF_A,
    CookieReply,
    Datagram,
    DeadlineExceeded,
    HarnessError,
    Initiation,
    Registry,
    Response,
    Target,
    Tunnel,
    let_pass,
    poll_until,
    udp_message,
    udp_receiver,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Interface, Key, Lab, Manifest, NetNS, ScriptedPeer
    from harness.sandbox.process import Process

MEBIBYTE: Final = 1 << 20
FULL_RATE: Final = 64_000  # datagrams per second
MAX_GROWTH: Final = 10 * MEBIBYTE  # of resident memory during one flood
_TALKATIVE: Final = frozenset({"verbose", "trace", "debug", "info"})  # values of variables such as LOG_LEVEL
PORT_OF_A, DISCARD = 1, 9  # UDP ports: A's listen port, and the discard service (RFC 863)
INITIATIONS_WITH_COOKIE: Final = 40
CONNECTS_WITHIN: Final = 5.4  # seconds: one initiation and one retry
RETRY: Final = 5.1  # seconds after which an initiation is sent again: REKEY_TIMEOUT and some jitter
_LONGEST_FLOOD: Final = 60  # seconds; it is ended before
_UNDER_LOAD_WITHIN: Final = 20.0  # seconds
_FOR_A_REPLY: Final = 0.25  # seconds
_SPACING: Final = 0.06  # seconds; less would use up the tokens of the source
_IDLE_TIME: Final = 0.2  # seconds without CPU time after which A counts as idle
_TICKS: Final = os.sysconf("SC_CLK_TCK")  # clock ticks per second, the unit of CPU time in /proc
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")  # bytes, the unit of memory in /proc


@dataclass(frozen=True, slots=True, kw_only=True)
class FloodResult:
    """The figures of one flood.

    sent: datagrams sent. read: datagrams that the target read from its socket; the others found its buffer full. cpu:
    seconds of CPU that the target used. growth: bytes by which its resident memory grew. connected: seconds until the
    first packet of B arrived; None if none arrived in time.
    """

    sent: int
    read: int
    cpu: float
    growth: int
    connected: float | None

    def __str__(self) -> str:
        connected = "no peer connected" if self.connected is None else f"a peer connected after {self.connected:.1f} s"
        cost = self.cpu * 1e6 / max(1, self.read)
        return (
            f"{self.sent} sent, {self.read} read, {cost:.1f} us of CPU each, memory grew by "
            f"{self.growth / MEBIBYTE:.1f} MiB, {connected}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CookieResult:
    """How a peer fares that has a cookie, during a flood.

    waited: seconds until the first cookie reply. connected: seconds from an initiation with this cookie to a response,
    for a peer that sends again after `RETRY`; None if the second one was not answered either. answered: how many of
    `INITIATIONS_WITH_COOKIE` were answered. rate: datagrams per second that the attacker sent. share: CPU seconds of
    refwg per second; if it had less than it can use, the result is that of a slower machine.
    """

    waited: float
    connected: float | None
    answered: int
    rate: float
    share: float

    def __str__(self) -> str:
        connected = "no peer connected" if self.connected is None else f"a peer connected after {self.connected:.1f} s"
        return (
            f"{self.rate:.0f} datagrams per second, the first cookie reply after {self.waited:.1f} s, {connected}, "
            f"{self.answered} of {INITIATIONS_WITH_COOKIE} initiations with a valid mac2 answered, "
            f"refwg had {self.share:.0%} of a CPU"
        )


def quiet(manifest: Manifest, **env: str) -> Manifest:
    """Return a program as users run it: the lab lets it log each event and its keys, which costs time.

    env: variables to add.
    """
    silenced = {name: "error" if value in _TALKATIVE else value for name, value in manifest.env.items()}
    return dataclasses.replace(manifest, env={**silenced, **env}, key_log=())


def quiet_refwg() -> Manifest:
    """Return refwg as users run it: in the lab it logs each event, and a flood would measure the log."""
    refwg = Registry().get("refwg")
    return dataclasses.replace(refwg, env=quiet(refwg).env)


def answered_with_cookie(lab: Lab, kind: str, rate: int) -> CookieResult:
    """Flood refwg and send it initiations with a valid mac2, at the rate that one source may have (RL-01).

    kind: of selftests/support/attack.py; one that puts refwg under load. rate: datagrams per second.
    """
    target = Target(lab, quiet_refwg())
    peer = target.peer()
    log, count = lab.directory / "attack.log", rate * _LONGEST_FLOOD
    with attack(target.node, log, target.public_key, kind, count=count, rate=rate) as attacker:
        waited = _cookie(peer)
        began, cpu = time.monotonic(), cpu_seconds(target.interface)
        connected = _connected(peer)
        answered = sum(_is_answered(peer, _FOR_A_REPLY) for _ in range(INITIATIONS_WITH_COOKIE))
        share = (cpu_seconds(target.interface) - cpu) / (time.monotonic() - began)
        if not attacker.running:
            raise HarnessError(f"the flood ended before the last initiation: {attacker.tail()}")
        # The attacker prints its rate when it is asked to end.
        attacker.terminate()
        attacker.wait(60)
    rate_sent = float(attacker.tail().split()[-1])
    return CookieResult(waited=waited, connected=connected, answered=answered, rate=rate_sent, share=share)


def _cookie(peer: ScriptedPeer) -> float:
    """Send initiations without mac2 until a cookie reply comes; returns the seconds that it took."""

    def ask() -> bool:
        peer.send(Initiation())
        with suppress(HarnessError):
            peer.expect(CookieReply, within=_FOR_A_REPLY)
        return bool(peer.cookie)

    started = time.monotonic()
    if not poll_until(ask, bool, _UNDER_LOAD_WITHIN):
        raise HarnessError(f"refwg sent no cookie reply within {_UNDER_LOAD_WITHIN} s: it is not under load")
    return time.monotonic() - started


def _connected(peer: ScriptedPeer) -> float | None:
    """Send an initiation, and one retry if needed; returns the seconds until the response."""
    started = time.monotonic()
    if _is_answered(peer, RETRY) or _is_answered(peer, _FOR_A_REPLY):
        return time.monotonic() - started
    return None


def _is_answered(peer: ScriptedPeer, within: float) -> bool:
    started = time.monotonic()
    peer.send(Initiation())
    try:
        peer.expect(Response, within=within)
    except HarnessError:
        return False
    left = _SPACING - (time.monotonic() - started)
    if left > 0:
        let_pass(left, "a source may send 20 initiations per second")
    return True


@contextmanager
def attack(node: NetNS, log: Path, key: Key, kind: str, *, count: int, rate: int) -> Iterator[Process]:
    """Flood the port 1 of a node while the block runs, with at most `count` datagrams.

    key: the target's public key. kind: of selftests/support/attack.py. rate: datagrams per second; 0 means no limit.
    """
    argv = [
        sys.executable,
        "-m",
        "selftests.support.attack",
        kind,
        str(count),
        str(rate),
        str(PORT_OF_A),
        key.raw.hex(),
    ]
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = node.spawn(argv, log=log, env=env)
    try:
        yield process
    finally:
        process.terminate()
        process.close()


class Flood:
    """A tunnel between two refwg. A receives the flood, and B connects to A during it."""

    def __init__(self, lab: Lab, refwg: Manifest | None = None) -> None:
        """Make the tunnel in topology `loopback`; no handshake has taken place yet. refwg: a variant of it, if any."""
        refwg = refwg or quiet_refwg()
        self.tunnel = Tunnel(lab, LOOPBACK, refwg, refwg)
        self._lab = lab

    def run(self, kind: str, count: int, rate: int, *, patience: float = 5.0) -> FloodResult:
        """Flood A, and connect B during the flood.

        kind: of selftests/support/attack.py. count: datagrams. rate: datagrams per second; 0 means no limit. patience:
        seconds that B has to connect.
        """
        # A first handshake allocates memory, which must not count as growth.
        self.tunnel.must_ping("ns2", V4_OF_A)
        self._forget_sessions()
        target = self.tunnel.a
        cpu, memory, dropped = cpu_seconds(target), resident(target), self._dropped()
        with self.attack(kind, count, rate) as attack:
            connected = self._connect(patience)
            attack.wait(count / (rate or count) * 10 + 60)
            sent = int(attack.tail().split()[0])
            self._wait_until_idle()
        return FloodResult(
            sent=sent,
            read=sent - (self._dropped() - dropped),
            cpu=cpu_seconds(target) - cpu,
            growth=resident(target) - memory,
            connected=connected,
        )

    @contextmanager
    def attack(self, kind: str, count: int, rate: int) -> Iterator[Process]:
        """Flood A while the block runs, with at most `count` datagrams; the arguments are those of `run`."""
        log = self._lab.directory / f"{kind}.log"
        with attack(self.tunnel.nodes["ns0"], log, self.tunnel.pub_a, kind, count=count, rate=rate) as attacker:
            yield attacker

    def _forget_sessions(self) -> None:
        """Set B's interface down and up: refwg then erases its sessions, so that B needs a new handshake."""
        let_pass(0.025, "A refuses an initiation within 20 ms of the last one")
        for up in (False, True):
            self.tunnel.nodes["ns2"].set_link("wg0", up=up)

    def _connect(self, patience: float) -> float | None:
        """Send a packet from B to A; return the seconds until it arrives, None if it does not arrive in time."""
        receiver = udp_receiver(self.tunnel.nodes["ns1"], V4_OF_A, DISCARD)
        started = time.monotonic()
        with receiver:
            udp_message(self.tunnel.nodes["ns2"], V4_OF_A, DISCARD, b"through the flood")
            try:
                wait_for(Datagram(receiver), patience, "B's packet during the flood")
            except DeadlineExceeded:
                return None
        return time.monotonic() - started

    def _wait_until_idle(self) -> None:
        """Wait until A uses no more CPU time: then it has read all datagrams that were in its socket."""
        before = -1.0
        while (now := cpu_seconds(self.tunnel.a)) > before:
            before = now
            let_pass(_IDLE_TIME, "another process's empty queue causes no event")

    def _dropped(self) -> int:
        """Return the number of datagrams to A that found its socket's buffer full (/proc/net/udp, column drops)."""
        table = self.tunnel.nodes["ns0"].thread.call(Path("/proc/thread-self/net/udp").read_text)
        rows = [row.split() for row in table.splitlines()[1:]]
        return sum(int(row[-1]) for row in rows if int(row[1].rpartition(":")[2], 16) == PORT_OF_A)


def cpu_seconds(side: Interface) -> float:
    """Return the program's user and system time in seconds (proc(5), /proc/PID/stat: utime, stime)."""
    fields = Path(f"/proc/{pid(side)}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident(side: Interface) -> int:
    """Return the program's resident memory in bytes (proc(5), /proc/PID/statm)."""
    return int(Path(f"/proc/{pid(side)}/statm").read_text().split()[1]) * _PAGE


def pid(side: Interface) -> int:
    """Return the process id of the program behind an interface."""
    return int(side.process.pid)  # type: ignore[attr-defined]
