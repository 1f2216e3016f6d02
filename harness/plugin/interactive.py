"""Keep a failed test's lab up, print how to enter it, open a shell in it; trace programs.

The options are --pause-on-error, --shell, --gdb, --strace and --valgrind (docs/debugging.md).

nsenter(1) enters the lab. From another terminal it enters the sandbox first, because /run/netns is private to that.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Final

import pytest

from harness.install.packages import install_command
from harness.plugin import phases
from harness.plugin.session import LAB
from harness.sandbox.launcher import OUTER_PID
from harness.sandbox.terminal import TerminalSession, await_enter, our_terminal, write
from harness.wait import poll_until

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from harness.implementations.interface import Interface
    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab
    from harness.plugin.options import RunPlan

# The nodes of the two sides; the same in every topology of the lab.
_SIDES: Final = {"A": "ns1", "B": "ns2"}
_NODE: Final = re.compile(r"[A-Za-z0-9][\w.-]*")
# A system call of a traced program takes many times as long.
STRACE_SCALE: Final = 4.0
# Memcheck makes a program 10 to 50 times slower (its manual, 4.1), and starts in a second.
VALGRIND_SCALE: Final = 20.0
# A test waits for a program in a debugger as long as the user needs.
GDB_SCALE: Final = 1000.0
_ATTACHED: Final = 20.0
# Only memory that is lost for sure is an error: a program may leave the rest to its end. --error-exitcode is for users
# who read the status in the steps; the health check reads the log.
_VALGRIND: Final = (
    "valgrind", "--tool=memcheck", "--leak-check=full", "--show-leak-kinds=definite",
    "--errors-for-leak-kinds=definite", "--error-exitcode=99", "--",
)  # fmt: skip
# Errors as memcheck prints them (its manual, 4.2): the first line of each, then the number of all.
_MEMCHECK: Final = (
    r"^==\d+== (?:Invalid |Conditional jump |Use of uninit|Syscall param |Mismatched |Jump to the invalid )",
    r"^==\d+== (?:Source and destination overlap |Argument .* has a fishy )",
    r"^==\d+== [\d,]+ (?:\(.*\) )?bytes in [\d,]+ blocks are definitely lost",
    r"^==\d+== ERROR SUMMARY: [1-9]",
)
_MESSAGE_LINES: Final = 10


def timeout_factor(plan: RunPlan) -> float:
    """Return the factor for all deadlines: programs are slower under strace, valgrind or gdb."""
    factors = ((plan.gdb, GDB_SCALE), (plan.valgrind, VALGRIND_SCALE), (plan.strace, STRACE_SCALE))
    return next((factor for node, factor in factors if node), 1.0)


def check_options(config: pytest.Config, plan: RunPlan) -> None:
    """Raise pytest.UsageError, with the remedy, if the options of this module cannot be met."""
    if plan.guest_lanes:
        lane = plan.guest_lanes[0]
        raise pytest.UsageError(f"{_named(plan)} is for tests on this kernel, not in a guest: leave out --lane {lane}")
    for option, node in (("--shell", plan.shell), *_tracers(plan)):
        if node and not _NODE.fullmatch(node):
            raise pytest.UsageError(f"{option} {node}: want the name of a node, such as ns1, or A or B")
    _check_tracers(plan)
    if plan.asks_at_terminal:
        if plan.workers not in {None, 0, "0"}:
            several = f"-n {plan.workers}"
            raise pytest.UsageError(f"{_named(plan)} stops one test at a time, not several: leave out {several}")
        give_back_input(config)
        if not os.isatty(0):
            raise pytest.UsageError(f"{_named(plan)} needs a terminal, and standard input is not one: run it in one")


def _named(plan: RunPlan) -> str:
    """Return the first of these options that was given."""
    given = (("--pause-on-error", plan.pause), ("--shell", plan.shell), *_tracers(plan))
    return next(name for name, value in given if value)


def _tracers(plan: RunPlan) -> tuple[tuple[str, str], ...]:
    """Return the options that trace a program, which are called like the tracer, each with its node."""
    return ("--gdb", plan.gdb), ("--strace", plan.strace), ("--valgrind", plan.valgrind)


def _check_tracers(plan: RunPlan) -> None:
    asked = [(option, node) for option, node in _tracers(plan) if node]
    for (one, node), (other, same) in combinations(asked, 2):
        if place_of(node) == place_of(same):
            raise pytest.UsageError(f"{one} {node} {other} {same}: a program has one tracer; leave one out")
    for option, _ in asked:
        program = option.removeprefix("--")
        if shutil.which(program) is None:
            remedy = install_command([program])
            raise pytest.UsageError(f"{option}: {program} is not installed; to install it: {remedy}")


def give_back_input(config: pytest.Config) -> None:
    """Take standard input back from pytest, which captures it from its start, until the next phase of a test."""
    if capture := config.pluginmanager.getplugin("capturemanager"):
        capture.suspend_global_capture(in_=True)
    # Otherwise pytest's own output so far would appear when output is captured again.
    if reporter := config.pluginmanager.getplugin("terminalreporter"):
        reporter.flush()


def place_of(node: str) -> str:
    """Return the node that an option names: A and B stand for the nodes of their interfaces."""
    return _SIDES.get(node, node)


# How to enter a node


def ways_in(made: Lab) -> dict[str, list[str]]:
    """Return per node the command that enters it in the sandbox: its network, its program's /run/wireguard."""
    ways = {}
    for name, node in made.nodes.items():
        here = [each.mounts for each in made.interfaces if each.place is node and each.mounts]
        mounts = [f"--mount={here[0]}"] if here else []
        ways[name] = ["nsenter", *mounts, f"--net={node.handle}"]
    return ways


def enter_text(made: Lab) -> str:
    """Return a line for each node with the command that enters it from another terminal."""
    outer = os.environ.get(OUTER_PID)
    first = ["nsenter", f"--target={outer}", "--all", "--preserve-credentials"] if outer else []
    commands = {name: shlex.join([*first, *way]) for name, way in ways_in(made).items()}
    width = max(map(len, commands), default=0)
    return "".join(f"  {name:<{width}}  {command}\n" for name, command in commands.items())


class Interactive:
    """The plugin of a run with one of these options."""

    def __init__(self, config: pytest.Config, plan: RunPlan) -> None:
        self._config = config
        self._plan = plan
        self._debuggers: list[Thread] = []
        self._traced: set[str] = set()
        self._nodes: set[str] = set()
        self._descriptor = -1

    # Programs

    def watch(self, item: pytest.Item, made: Lab) -> None:
        """Let the lab start programs under strace or valgrind, and call back for each."""
        made.start_under = self._under
        made.started = lambda interface: self._started(item, interface)

    def _under(self, manifest: Manifest, made: Lab, nodes: tuple[str, str]) -> Manifest:
        """Return the manifest to start; under a tracer if its option names one of the nodes, birth or place."""
        self._nodes.update(nodes)
        if manifest.kind == "kernel":
            return manifest
        if place_of(self._plan.valgrind) in nodes:
            self._traced.add(self._plan.valgrind)
            # Python's own allocator would hide from memcheck what a Python program allocates.
            return replace(
                manifest,
                command=(*_VALGRIND, *manifest.command),
                complaints=(*manifest.complaints, *_MEMCHECK),
                env={"PYTHONMALLOC": "malloc", **manifest.env},
            )
        if place_of(self._plan.strace) not in nodes:
            return manifest
        self._traced.add(self._plan.strace)
        file = str(made.directory / f"strace.{nodes[1]}.txt").replace("{", "{{").replace("}", "}}")
        # -D: strace runs as a grandchild, so the program is still our child, with the pid that we expect.
        words = ("strace", "-D", "-f", "-qq", "-tt", "-y", "-o", file, "--")
        return replace(manifest, command=(*words, *manifest.command))

    def _started(self, item: pytest.Item, interface: Interface) -> None:
        nodes = {interface.birth.name, interface.place.name}
        pid = interface.pid
        if place_of(self._plan.gdb) not in nodes or pid is None:
            return
        self._traced.add(self._plan.gdb)
        phases.stop()
        if cancel := getattr(self._config.hook, "pytest_timeout_cancel_timer", None):
            cancel(item=item)
        arguments = (interface.manifest.name, pid, interface.place.name)
        thread = Thread(target=self._debug, args=arguments, name="gdb", daemon=True)
        thread.start()
        self._debuggers.append(thread)
        # gdb must have stopped the program before the test goes on. There is no event for that.
        poll_until(lambda: _is_traced(pid) or not thread.is_alive(), bool, _ATTACHED, interval=0.01)

    def _debug(self, name: str, pid: int, node: str) -> None:
        with self._terminal() as terminal:
            write(
                terminal,
                f"\nwg-interop: gdb has stopped {name} of {node}, pid {pid}: `continue` lets the test go on, "
                f"Ctrl-C stops the program again, `quit` ends gdb and lets the program run\n",
            )
            TerminalSession(["gdb", "-q", "-p", str(pid)], terminal).connect()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """Wait until gdb has ended: health check and undo need a program that runs."""
        try:
            return (yield)
        finally:
            for thread in self._debuggers:
                thread.join()
            self._debuggers.clear()

    # Failures

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self, node: pytest.Item, report: pytest.TestReport) -> None:
        made = node.stash.get(LAB, None)
        if made is None or not self._plan.keeps_lab_up:
            return
        give_back_input(self._config)
        with self._terminal() as terminal:
            write(terminal, f"\nwg-interop: {node.nodeid} failed:\n{_excerpt(report)}")
            write(terminal, f"Its lab is up. The commands that enter a node from another terminal:\n{enter_text(made)}")
            if self._plan.shell:
                self._open_shell(made, terminal)
            if self._plan.pause:
                await_enter(terminal, "Press Enter to continue the run, Ctrl-C to end it: ")

    def _open_shell(self, made: Lab, terminal: int) -> None:
        name = place_of(self._plan.shell)
        way = ways_in(made).get(name)
        if way is None:
            nodes = ", ".join(made.nodes) or "none"
            write(terminal, f"No shell: this lab has no node {self._plan.shell}; there are: {nodes}\n")
            return
        write(terminal, f"A shell in {name}; `exit` ends it and continues the run.\n")
        shell = os.environ.get("SHELL") or "sh"
        # Debian's bash prints this variable in its prompt.
        TerminalSession([*way, f"--wd={Path.cwd()}", shell], terminal, {"debian_chroot": name}).connect()

    @contextmanager
    def _terminal(self) -> Iterator[int]:
        """Yield the terminal that was standard input at the start; pytest's capture has replaced that."""
        descriptor = os.dup(self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def take_terminal(self) -> None:
        """Keep the terminal open for later, if it will be needed."""
        if self._plan.asks_at_terminal:
            give_back_input(self._config)
            with our_terminal() as terminal:
                self._descriptor = os.dup(terminal)

    # The end

    def untraced(self) -> str:
        """Return a complaint if no test started a program in the node of an option; else empty."""
        for option, node in _tracers(self._plan):
            if node and self._nodes and node not in self._traced:
                there = ", ".join(sorted(self._nodes))
                return f"{option} {node}: no program was started in a node of this name; programs were in: {there}"
        return ""


def _is_traced(pid: int) -> bool:
    """Return whether a debugger is attached to a process (TracerPid in /proc/PID/status, proc(5))."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return "\nTracerPid:\t0\n" not in Path("/proc", str(pid), "status").read_text()
    return True


def _excerpt(report: pytest.TestReport) -> str:
    from harness.report.results import message_of

    return "".join(f"  {line}\n" for line in message_of(report).splitlines()[:_MESSAGE_LINES])
