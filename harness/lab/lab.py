"""Make what one test uses, keep its evidence, and undo everything in reverse order.

Whatever makes something registers its undo at once. Undo runs last in, first out; if one fails, the test fails.
"""

from __future__ import annotations

import hashlib
import random
import shlex
import shutil
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec

from harness import steps
from harness.control.base import EVIDENCE_TIMEOUT
from harness.control.records import Key
from harness.errors import HarnessError, Unavailable
from harness.implementations import interface, keylog
from harness.lab.kernel_log import KernelLog
from harness.lab.timeline import of_log, of_recording, of_steps, timeline
from harness.net import stamps
from harness.net.netns import NetNS
from harness.sandbox import logs
from harness.wait import scaled
from harness.wire.capture import EVIDENCE_BUFFER, Capture
from harness.wire.inner import decrypt, read_keys
from harness.wire.script import Script
from harness.wire.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness.implementations.interface import Interface
    from harness.implementations.manifest import Manifest
    from harness.lab.timeline import Entry
    from harness.sandbox.process import Completed
    from harness.wire.capture import Recording
    from harness.wire.inner import Inner


_P = ParamSpec("_P")
# The name of the file with the steps, in a test's evidence.
STEPS: Final = "commands.txt"
# The name of the file with everything by time.
TIMELINE: Final = "timeline.txt"
_READING: Final = "read for the evidence: state of nodes and interfaces"
# The name of the file that counts by kind what passed each wire and capture.
CAPTURES: Final = "captures.txt"
# Seconds to read the state of all nodes for the evidence, and for one command of that; both scaled.
_SNAPSHOT: Final = 20.0
_STATE: Final = 5.0


class Unhealthy(HarnessError):
    """A health check found something wrong with a process under test."""


class NothingMatchedError(HarnessError):
    """A rule of a fault script matched no message, so its test proved nothing about that fault."""


class Lab:
    """All nodes, links, interfaces and captures of one test.

    directory: for its evidence. seed: of all random choices. steps: the Recorder of the test's steps.
    """

    def __init__(self, directory: Path, seed: int = 0) -> None:
        """Create the directory, and start to record steps."""
        self.directory = directory
        self.seed = seed
        self.random = random.Random(seed)  # noqa: S311 - reproducible on purpose
        self.nodes: dict[str, NetNS] = {}
        self.interfaces: list[Interface] = []
        self.made: list[Interface] = []
        """Every interface of the test, also those that have ended."""
        self.keys: list[Key] = []
        """The private keys that `key` has returned."""
        self.wires: list[Wire] = []
        self.captures: list[Capture] = []
        self.start_under: Callable[[Manifest, Lab, tuple[str, str]], Manifest] | None = None
        """Given the manifest of an interface and the nodes of its birth and place, returns how it is started."""
        self.started: Callable[[Interface], object] | None = None
        """Called with each new interface, at its place."""
        self._undo = ExitStack()
        self._kernel_log = KernelLog()
        self._recordings: list[Recording] = []
        self._texts: list[tuple[str, Callable[[], str]]] = []
        stamps.keep_on()
        directory.mkdir(parents=True, exist_ok=True)
        self.steps = steps.Recorder("set-up")
        self.steps.start()

    def close(self) -> None:
        """Undo everything, last in, first out; if some fail, the rest still runs, and the last failure is raised."""
        self.steps.section = "undo"
        # Closing a packet socket takes the kernel some milliseconds; let them pass while the programs end.
        closing = [threading.Thread(target=capture.close) for capture in self.captures]
        for thread in closing:
            thread.start()
        try:
            self._undo.close()
        finally:
            for thread in closing:
                thread.join()
            self.captures.clear()
            self._kernel_log.close()
            self.steps.stop()

    def undo(self, function: Callable[_P, object], *arguments: _P.args, **keywords: _P.kwargs) -> None:
        """Register a call that undoes what was just made."""
        self._undo.callback(function, *arguments, **keywords)

    def note(self, name: str, text: str) -> None:
        """Append a text to the file `name` of the evidence."""
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def evidence(self, name: str, text: Callable[[], str]) -> None:
        """Add a file to the evidence; text: returns its contents when the evidence is written."""
        self._texts.append((name, text))

    def node(self, name: str) -> NetNS:
        """Create a node, that is a network namespace; raises UsageError if the name is taken."""
        node = NetNS(name)
        self.nodes[name] = node
        self.undo(node.close)
        return node

    def interface(self, name: str, manifest: Manifest, birth: NetNS, place: NetNS | None = None) -> Interface:
        """Create a WireGuard interface in node `birth`, and move its link to node `place` if that is another one."""
        if self.start_under is not None:
            manifest = self.start_under(manifest, self, (birth.name, (place or birth).name))
        log = self.directory / f"{(place or birth).name}-{name}-{manifest.name}.log"
        made = interface.create(name, manifest, birth, log)
        self.interfaces.append(made)
        self.made.append(made)
        self.undo(self.end, made)
        if place is not None and place is not birth:
            made.move(place)
        if self.started is not None:
            self.started(made)
        return made

    def end(self, made: Interface) -> None:
        """End an interface, once; raises Unhealthy if the last health check of its program finds something."""
        if made not in self.interfaces:
            return
        self.interfaces.remove(made)
        complaints = made.close()
        made.ended = time.time_ns()
        if complaints:
            raise Unhealthy("; ".join(complaints))

    def wire(self, a: tuple[NetNS, str], b: tuple[NetNS, str], script: Script | None = None) -> Wire:
        """Connect two nodes by a wire; each end is (node, name of the device to create)."""
        middle = self.node(f"wire{len(self.wires)}")
        made = Wire(a, b, middle, seed=self.seed, script=script or Script())
        self.wires.append(made)
        self.undo(made.close)
        return made

    def capture(self, node: NetNS, device: str, *, far: NetNS | None = None) -> Capture:
        """Capture the frames of a device, for evidence and oracle; what exceeds the buffer is counted only.

        far: the node at the other end of its link.
        """
        made = Capture(node, device, buffer=EVIDENCE_BUFFER, far=far)
        self.captures.append(made)
        return made

    def key(self, name: str) -> Key:
        """Return the private key of this name, derived from the seed and clamped as by `wg genkey`."""
        made = Key.clamped(hashlib.blake2s(f"{self.seed} {name}".encode()).digest())
        if made not in self.keys:
            self.keys.append(made)
        return made

    def check_health(self) -> None:
        """Run the health check of every interface; raises Unhealthy with all findings."""
        complaints = [text for made in self.interfaces for text in made.complaints()]
        if complaints:
            raise Unhealthy("; ".join(complaints))

    def complaints_of_wires(self) -> list[str]:
        """Return which rules of the wires' scripts have matched no message, and what has arrived instead."""
        return [text for wire in self.wires for text in wire.complaints()]

    def check_scripts(self) -> None:
        """Check that each rule of the wires' scripts has matched a message, unless it is optional.

        Raises NothingMatchedError: a test of loss must not pass because its wire has recognized nothing.
        """
        if complaints := self.complaints_of_wires():
            raise NothingMatchedError("; ".join(complaints))

    def snapshot(self) -> None:
        """Write state of nodes and interfaces, captures and steps to the directory; errors are written there too."""
        section, self.steps.section = self.steps.section, _READING
        try:
            self._note_state()
        finally:
            self.steps.section = section
        for name, text in self._texts:
            (self.directory / name).write_text(text(), encoding="utf-8")
        if log := self._kernel_log.text():
            self.note("dmesg.txt", log)
        self.save_captures()
        self.save_steps()

    def save_steps(self) -> None:
        """Write the steps so far to commands.txt."""
        (self.directory / STEPS).write_text(str(self.steps), encoding="utf-8")

    def keep(self, target: Path) -> None:
        """Copy the evidence to `target`, replacing it; in the copy each line of a program's log has a time stamp."""
        self.save_steps()
        (self.directory / TIMELINE).write_text(timeline(self._happened()), encoding="utf-8")
        with suppress(FileNotFoundError):
            shutil.rmtree(target)
        shutil.copytree(self.directory, target, copy_function=_copy)
        for path in self.directory.iterdir():
            if (text := logs.stamped(path)) is not None:
                (target / path.name).write_bytes(text)

    def _happened(self) -> Iterator[Entry]:
        yield from of_steps(self.steps.steps, until=_READING)
        for recording in self._recordings:
            yield from of_recording(recording)
        for path in self.directory.glob("*.log"):
            yield from of_log(path.stem, logs.timed(path))
        yield from of_log("kernel", self._kernel_log.lines)

    def inner(self, capture: Capture) -> list[Inner]:
        """Return the data messages of a capture, decrypted, in the order in which they passed.

        Unavailable if the keys of a session are not known: A or B must log its ephemeral keys, as refwg does.
        """
        found = decrypt(capture.messages(), read_keys(keylog.key_log(self.made)))
        if found.unknown:
            names = ", ".join(sorted({made.manifest.name for made in self.made}))
            raise Unavailable(
                f"{len(found.unknown)} data messages of {capture.name} cannot be decrypted: one end must log its keys "
                f"(key_log in its manifest, as in that of refwg); the ends are {names}"
            )
        return found.inner

    def _note_state(self) -> None:
        end = time.monotonic() + scaled(_SNAPSHOT)
        for node in [node for node in self.nodes.values() if node.is_open]:
            for argv in (["ip", "-d", "-s", "link"], ["ip", "address"], ["ip", "route", "show", "table", "all"],
                         ["ip", "rule"], ["nft", "list", "ruleset"]):  # fmt: skip
                if time.monotonic() > end:
                    # The thread of a node may hang; then each command would wait for its own deadline.
                    self.note(f"{node.name}.txt", f"$ {shlex.join(argv)}\nnot run: reading the state took too long\n")
                    continue
                self._note_output(f"{node.name}.txt", argv, partial(node.run, argv, deadline=_STATE, check=False))
        for made in self.interfaces:
            name = f"{made.place.name}-{made.name}.wg.txt"
            show = partial(made.wg, "show", made.name, deadline=EVIDENCE_TIMEOUT, check=False)
            self._note_output(name, ["wg", "show"], show)

    def save_captures(self) -> None:
        """Write a pcapng file for each wire and capture, with all known keys inside, and what passed them by kind."""
        known = keylog.key_log(self.interfaces)
        recordings: list[Wire | Capture] = [*self.wires, *self.captures]
        self._recordings = [recorded.recording() for recorded in recordings]
        lines = []
        for recorded in recordings:
            try:
                recorded.save(self.directory / f"{recorded.name}.pcapng", keys=known)
                lines.append(f"{recorded}\n")
            except OSError as error:
                lines.append(f"{recorded.name}: {error}\n")
        (self.directory / CAPTURES).write_text("".join(lines), encoding="utf-8")

    def _note_output(self, name: str, argv: Sequence[str], start: Callable[[], Completed]) -> None:
        try:
            completed = start()
            text = completed.stdout + completed.stderr
        except (HarnessError, OSError) as error:
            text = f"{error}\n"
        self.note(name, f"$ {shlex.join(argv)}\n{text}\n")


def _copy(source: str, target: str) -> None:
    """Copy a file of the evidence; of a log that is too long, its beginning and its end."""
    if Path(source).suffix == ".log":
        Path(target).write_bytes(logs.read_log(Path(source)))
    else:
        shutil.copy2(source, target)
