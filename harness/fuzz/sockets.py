"""Play cases against a program over its sockets, and check its health.

hostile peer --- one datagram after the other ---> program ---> inside: packets that it delivers
control socket --- requests -----------------------^
legitimate peer <-- handshake, a packet each way: now and then -->
"""

from __future__ import annotations

import random
import select
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from harness.control.records import Endpoint
from harness.errors import HarnessError, Unavailable
from harness.fuzz import inputs
from harness.fuzz.findings import ANSWERED, CONTROL, DIED, SILENT, SPINS, Finding
from harness.fuzz.generator import CONFIGURATION, is_reached, length_of_way
from harness.fuzz.grammar import Inner
from harness.fuzz.memory import resident
from harness.fuzz.player import COOKIED, Player, WrongAnswer
from harness.implementations.interface import ProgramInterface
from harness.lab.target import DISCARD, INNER4, INNER6
from harness.scripted.intents import Data
from harness.scripted.peer_socket import PeerSocket
from harness.wait import Deadline, let_pass, poll_until, scaled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.fuzz.inputs import Case, Step
    from harness.lab.target import Target
    from harness.scripted.peer import ScriptedPeer

HOSTILE: Final = Inner("192.168.241.99", "fd00::63", INNER4, INNER6)
_ADDRESS: Final = "192.168.1.99"
# Seconds, scaled: for an answer that a correct device sends at once, and for one that has to come.
_SOON: Final = 0.15
_ANSWER: Final = 2.0
_REQUEST: Final = 1.0
# A short one first, so that a program that has just died is not waited for.
_TRIES: Final = (0.3, 1.0, 2.0)
_ENDS: Final = 2.0
# Seconds without input, and the part of them in which an idle program may use the CPU.
_IDLE: Final = 0.5
_MAY_USE: Final = 0.5
_LARGEST: Final = 1 << 16
_IPV4, _IPV6 = 4, 6
_IPV4_HEADER, _IPV6_HEADER = 20, 40


class OverSockets:
    """A target with a hostile and a legitimate peer; `run` takes a case, `check` looks at the program's health.

    features: what the last case led to, as words. reached: states of the cases so far. packets, requests: how many were
    sent in all.
    """

    def __init__(self, target: Target, seed: int = 1) -> None:
        interface = target.interface
        if not isinstance(interface, ProgramInterface):
            raise Unavailable(
                f"{interface.manifest.name} is not a program: its memory, CPU time and end cannot be watched here; "
                "for a kernel: wg-interop run --suite conformance --lane vm"
            )
        self.target = target
        self._interface = interface
        self.legitimate: ScriptedPeer = target.peer("legitimate", endpoint=True)
        node = target.peers_node
        self._socket = PeerSocket(node, target.address(_ADDRESS), 0, self.legitimate.main.target)
        target.lab.undo(self._socket.close)
        self._inside = target.node.socket(socket.AF_INET, socket.SOCK_DGRAM)
        target.lab.undo(self._inside.close)
        self.player = Player(
            static=target.lab.key("hostile").raw,
            device=target.public_key.raw,
            random=random.Random(seed),  # noqa: S311 - not a secret
            clock=time.time_ns,
        )
        self.packets = self.requests = 0
        self.features: set[str] = set()
        self.reached: set[str] = set()
        self._sources = {socket.inet_pton(socket.AF_INET, HOSTILE.source4)}
        self._sources |= {socket.inet_pton(socket.AF_INET6, HOSTILE.source6)}
        for family, address in ((socket.AF_INET, self.legitimate.inner4), (socket.AF_INET6, self.legitimate.inner6)):
            self._sources.add(socket.inet_pton(family, address))
        self._restore()

    # Cases

    def run(self, case: Case) -> None:
        """Play a case; raises Finding."""
        self.features.clear()
        try:
            if case.state == CONFIGURATION:
                self._configure(case)
            else:
                self._play(case)
        except WrongAnswer as error:
            raise Finding(ANSWERED, str(error)) from error
        except HarnessError:
            self._require_alive()
            raise
        except OSError as error:
            self._await_end()
            raise Finding(CONTROL, f"takes no connection to its control socket: {error.strerror}") from error
        self._require_alive()

    def _play(self, case: Case) -> None:
        self._forget_hostile_peer()
        on_the_way: list[str] = []
        way = length_of_way(case)
        for number, step in enumerate(case.steps):
            # Only the steps that lead to the state are known to have an answer.
            is_on_the_way = number < way
            answers = self._step(step, waits=is_on_the_way)
            on_the_way += answers if is_on_the_way else []
            self.features |= {f"{case.state}: {step.kind}: {name}" for name in answers}
        if is_reached(case.state, on_the_way):
            self.reached.add(case.state)
        self._look_inside()

    def _step(self, step: Step, *, waits: bool) -> list[str]:
        """Carry out a step; returns the names of the answers so far. waits: for an answer, for a moment."""
        if step.kind == inputs.WAIT and waits:
            let_pass((step.counter or 0) / 1000, "a device refuses an initiation within 20 ms of the last one")
        if step.kind in {inputs.WAIT, inputs.LOAD}:
            return self._answers()
        is_correct = not step.changes and not step.argument
        if step.kind == inputs.TRIGGER:
            # A request may have changed the address of the interface's peer, or there is no route.
            with suppress(OSError):
                self._inside.sendto(b"payload", (HOSTILE.source4, DISCARD))
            return self._answers(_SOON if waits else 0)
        if step.kind != inputs.INITIATION or not is_correct or not waits:
            self._send(step)
            return self._answers()
        answers = self._send_and_wait(step)
        # Under load the device asks for a cookie, and the next initiation has it.
        return answers + self._send_and_wait(step) if COOKIED in answers else answers

    def _send_and_wait(self, step: Step) -> list[str]:
        return self._answers(_SOON) if self._send(step) else []

    def _send(self, step: Step) -> bool:
        datagrams = self.player.datagrams(step)
        for datagram in datagrams:
            self._socket.throw(datagram)
        self.packets += len(datagrams)
        return bool(datagrams)

    def _answers(self, within: float = 0.0) -> list[str]:
        """Take what has come; waits for the first answer up to `within` seconds, scaled."""
        if within:
            select.select([self._socket], [], [], scaled(within))
        names = []
        while (taken := self._socket.take()) is not None:
            names.append(self.player.heard(taken[0]))
        return names

    def _look_inside(self) -> None:
        """Check that each delivered packet has the length that it claims, and comes from an address of a peer."""
        inside = self.target.inside
        for packet in inside.packets():
            version = packet[0] >> 4 if packet else 0
            if version == _IPV4 and len(packet) >= _IPV4_HEADER:
                length, source = int.from_bytes(packet[2:4]), packet[12:16]
            elif version == _IPV6 and len(packet) >= _IPV6_HEADER:
                length, source = int.from_bytes(packet[4:6]) + _IPV6_HEADER, packet[8:24]
            else:
                raise Finding(ANSWERED, f"delivered {len(packet)} bytes that are not a packet: {packet[:32].hex()}")
            if length != len(packet):
                raise Finding(ANSWERED, f"delivered {len(packet)} bytes of a packet of {length}: {packet[:40].hex()}")
            if source not in self._sources:
                raise Finding(ANSWERED, f"delivered a packet from an address of no peer: {packet[:40].hex()}")
        inside.forget()

    def _configure(self, case: Case) -> None:
        for step in case.steps:
            self.requests += 1
            answer = self._ask(step.argument, is_hostile=True)
            last = answer[:-2].rpartition(b"\n")[2]
            if answer and not (answer.endswith(b"\n\n") and last.startswith(b"errno=")):
                raise Finding(CONTROL, f"answered the request {step.argument[:200]!r} by {answer[-200:]!r}")
            self.features.add(f"uapi: {last.decode(errors='replace') or 'silent'}: {len(answer).bit_length()}")
        self._restore()
        self.reached.add(case.state)

    # The control socket

    def _ask(self, request: bytes, *, is_hostile: bool = False) -> bytes:
        """Send a request and return the answer; of a hostile one, what comes until it is complete or late."""
        deadline = Deadline(_REQUEST if is_hostile else _ANSWER)
        answer = b""
        with self._interface.connect() as client:
            try:
                deadline.limit(client)
                with suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(request)
                    if is_hostile:
                        # A program that waits for the rest of a request sees that there is none.
                        client.shutdown(socket.SHUT_WR)
                while is_hostile or not answer.endswith(b"\n\n"):
                    deadline.limit(client)
                    data = client.recv(_LARGEST)
                    if not data:
                        return answer
                    answer += data
            except ConnectionResetError:
                return answer
            except TimeoutError:
                if not is_hostile:
                    raise Finding(CONTROL, f"did not answer a valid request within {_ANSWER:g} s") from None
        return answer

    def _ask_validly(self, request: bytes) -> bytes:
        """Send a valid request and return the answer; a program that closes the connection without one may be dying."""
        answer = self._ask(request)
        if not answer:
            self._await_end()
            raise Finding(CONTROL, "closed the connection of a valid request without an answer")
        return answer

    def _set(self, lines: Sequence[str]) -> None:
        request = "\n".join(["set=1", *lines, "", ""]).encode()
        answer = self._ask_validly(request)
        if answer != b"errno=0\n\n":
            self._require_alive()
            raise Finding(CONTROL, f"refused a valid request, {lines[0]} and {len(lines) - 1} lines more: {answer!r}")

    def _forget_hostile_peer(self) -> None:
        """Remove the hostile peer and add it again: for the device it has never been there."""
        key = f"public_key={self.player.identity.public.hex()}"
        self._set([key, "remove=true"])
        self._set(self._hostile_lines())
        self.player.restart()

    def _hostile_lines(self) -> list[str]:
        endpoint = Endpoint(self._socket.address, self._socket.port)
        return [
            f"public_key={self.player.identity.public.hex()}",
            f"endpoint={endpoint}",
            f"allowed_ip={HOSTILE.source4}/32",
            f"allowed_ip={HOSTILE.source6}/128",
        ]

    def _restore(self) -> None:
        """Configure the device as before: what a hostile request has changed is the client's right."""
        legitimate = self.legitimate
        self._set(
            [
                f"private_key={self.target.key.raw.hex()}",
                f"listen_port={self.legitimate.main.target[1]}",
                "fwmark=0",
                "replace_peers=true",
                f"public_key={legitimate.public_key.raw.hex()}",
                f"endpoint={Endpoint(legitimate.main.address, legitimate.main.port)}",
                f"allowed_ip={legitimate.inner4}/32",
                f"allowed_ip={legitimate.inner6}/128",
                *self._hostile_lines(),
            ]
        )
        self.player.restart()

    # Health

    def _require_alive(self) -> None:
        if not self._interface.process.running:
            self._require_health()

    def _await_end(self) -> None:
        """Give a program that has closed its sockets the time to end, and to write why."""
        process = self._interface.process
        poll_until(lambda: process.running, lambda running: not running, _ENDS)
        self._require_health()

    def _require_health(self) -> None:
        if complaints := self._interface.complaints():
            first, _, rest = "; ".join(complaints).partition("\n")
            first = first.removesuffix("; it last wrote:")
            raise Finding(DIED, first.partition(") ")[2] or first, rest)

    def check(self) -> None:
        """Check that it lives, and serves its control socket and the legitimate peer; raises Finding."""
        self._require_health()
        try:
            self._ask_validly(b"get=1\n\n")
            self._serve_legitimate_peer()
            self._answers()
        except WrongAnswer as error:
            raise Finding(ANSWERED, str(error)) from error
        except OSError as error:
            self._await_end()
            raise Finding(CONTROL, f"takes no connection to its control socket: {error.strerror}") from error
        self._look_inside()
        self._require_health()

    def _serve_legitimate_peer(self) -> None:
        """Let the legitimate peer connect and exchange a packet; three times, because load may cost it a message."""
        for within in _TRIES:
            try:
                session = self.legitimate.handshake(within=within)
                packet = self.target.packet(self.legitimate, b"ping %d" % self.packets)
                self.legitimate.send(session.data(packet))
                self.target.inside.expect(packet, within=within)
                self._inside.sendto(b"pong", (self.legitimate.inner4, DISCARD))
                self.legitimate.expect(Data, within=within, where=lambda received: not received.is_keepalive)
                break
            except HarnessError as error:
                self._require_health()
                if within == _TRIES[-1]:
                    raise Finding(SILENT, f"no longer serves a legitimate peer: {error}") from error
        self.legitimate.inbox.clear()
        self.legitimate.sent.clear()

    def check_idle(self) -> None:
        """Check that the program uses no CPU when nothing comes; raises Finding."""
        self._require_health()
        before = self._interface.cpu_seconds()
        let_pass(_IDLE, "an idle program uses no CPU")
        used = self._interface.cpu_seconds() - before
        if used > _IDLE * _MAY_USE:
            raise Finding(SPINS, f"used {used:.2f} s of CPU in {_IDLE:g} s without any input")

    def memory(self) -> int:
        """Return the program's resident memory in bytes."""
        return resident(self._interface.process.pid)


def play(target: Target, cases: Sequence[Case]) -> None:
    """Play cases against the device of a test, and check its health after them; raises Finding."""
    device = OverSockets(target)
    for case in cases:
        device.run(case)
    device.check()
