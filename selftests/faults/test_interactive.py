"""Check the options to debug a failed test: pause, shell, strace, valgrind, gdb."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import pytest

from harness import Registry
from selftests.support import host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMPLEMENTATION: Final = "wireguard-go-debian"
TESTS: Final = """
import os, pathlib

def test_bad(loopback):
    loopback.must_ping("ns1", "192.168.241.2")
    # Health checks look at the program itself, traced or not.
    assert pathlib.Path("/proc", str(loopback.a.pid), "comm").read_text() == "wireguard-go\\n"
    assert not "wrong"

def test_good(loopback):
    loopback.must_ping("ns1", "192.168.241.2")
    # Report to the terminal that the test has come to this line.
    with open(os.environ["AT_TERMINAL"], "w") as terminal:
        terminal.write("PINGED")

def test_half_built(lab):
    lab.node("left")
    1 / 0
"""
PYTEST: Final = ("-m", "pytest", "-p", "no:cacheprovider")
WG_INTEROP: Final = ("-m", "harness", "run", "test_it.py")
WHOLE_RUN: Final = 40.0
PAUSED: Final = r"Press Enter to continue the run, Ctrl-C to end it: "


class Dialogue:
    """A run in a terminal of its own; the test reads from this terminal and types into it."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        (directory / "test_it.py").write_text(TESTS)
        self._ours, inside = os.openpty()
        # Without the environment variables of this run, so that the child makes a sandbox of its own.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("WG_INTEROP", "PYTEST", "COLUMNS"))}
        words = [*arguments, f"--pair={IMPLEMENTATION}~{IMPLEMENTATION}"]
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, *words],
            cwd=directory,
            env=env | {"AT_TERMINAL": os.ttyname(inside), "SHELL": "/bin/sh", "TERM": "dumb"},
            stdin=inside,
            stdout=inside,
            stderr=inside,
        )
        os.close(inside)
        self.text = ""
        self._read = 0

    def expect(self, pattern: str) -> re.Match[str]:
        """Read until a pattern matches after the match of the last call."""
        end = time.monotonic() + WHOLE_RUN
        while (found := re.compile(pattern).search(self.text, self._read)) is None:
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not come within {WHOLE_RUN:g} s: {self.text}"
            assert self.read(left), f"the run ended without {pattern!r}: {self.text}"
        self._read = found.end()
        return found

    def read(self, seconds: float) -> bool:
        """Read more output, and wait for it at most this long; False at the end."""
        ready, _, _ = select.select([self._ours], [], [], max(0.0, seconds))
        if not ready:
            return True
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:
            # EIO: no process has the terminal open any more.
            return False
        self.text += data.decode(errors="replace").replace("\r", "")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """Read to the end; return the exit status."""
        end = time.monotonic() + WHOLE_RUN
        while self.read(end - time.monotonic()):
            assert time.monotonic() < end, self.text
        return self.process.wait(WHOLE_RUN)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def dialogue(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Dialogue]:
    made = Dialogue(tmp_path, *request.param)
    yield made
    made.close()


def enter(command: str, *words: str) -> str:
    """Run a program in a node by the printed command, and return its output."""
    return subprocess.run([*command.split(), *words], check=True, capture_output=True, text=True, timeout=30).stdout


def evidence(directory: Path, name: str) -> Path:
    (found,) = directory.glob(f"report/evidence/*{name}*")
    return found


@pytest.mark.parametrize(
    "dialogue",
    [(*PYTEST, "-k", "bad", "--pause-on-error"), (*WG_INTEROP, "-k", "bad", "--pause-on-error")],
    ids=["pytest", "wg-interop"],
    indirect=True,
)
def test_paused_lab_is_entered_by_printed_commands(dialogue: Dialogue, tmp_path: Path) -> None:
    dialogue.expect(r"test_bad\[.*\] failed:\n  assert not 'wrong'\n")
    commands = {node: dialogue.expect(rf"  {node}  (nsenter .*)\n")[1] for node in ("ns0", "ns1", "ns2")}
    dialogue.expect(PAUSED)
    assert enter(commands["ns1"], "wg", "show", "wg0", "listen-port") == "1\n"
    assert enter(commands["ns2"], "wg", "show", "wg0", "listen-port") == "2\n"
    assert "wg0" not in enter(commands["ns0"], "ip", "-br", "link")
    assert "3 received" in enter(commands["ns1"], "ping", "-c", "3", "-i", "0.01", "192.168.241.2")
    dialogue.type("\n")
    assert dialogue.end() == 1
    assert commands["ns2"] in (evidence(tmp_path, "bad") / "enter.txt").read_text()


@pytest.mark.parametrize(
    ("dialogue", "status"),
    [
        ((*PYTEST, "--pause-on-error", "-k", "bad or half"), 2),
        ((*WG_INTEROP, "--pause-on-error", "-k", "bad or half"), 130),
    ],
    ids=["pytest", "wg-interop"],
    indirect=["dialogue"],
)
def test_ctrl_c_ends_paused_run_with_its_report(dialogue: Dialogue, tmp_path: Path, status: int) -> None:
    command = dialogue.expect(r"  ns1  (nsenter .*)\n")[1]
    dialogue.expect(PAUSED)
    dialogue.type("\x03")
    assert dialogue.end() == status, dialogue.text
    assert "half_built" not in dialogue.text
    assert evidence(tmp_path, "bad").is_dir()
    # The sandbox has ended, and with it the lab.
    assert subprocess.run([*command.split(), "true"], check=False, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.parametrize("dialogue", [(*PYTEST, "-k", "half", "--pause-on-error")], indirect=True)
def test_test_without_program_is_paused_too(dialogue: Dialogue) -> None:
    command = dialogue.expect(r"  left  (nsenter .*)\n")[1]
    dialogue.expect(PAUSED)
    assert enter(command, "ip", "-br", "link").startswith("lo ")
    dialogue.type("\n")
    assert dialogue.end() == 1


@pytest.mark.parametrize(
    "dialogue",
    [(*PYTEST, "-k", "bad", "--shell", "B"), (*WG_INTEROP, "-k", "bad", "--shell", "ns2")],
    ids=["pytest", "wg-interop"],
    indirect=True,
)
def test_shell_opens_in_node_of_failed_test(dialogue: Dialogue, tmp_path: Path) -> None:
    dialogue.expect(r"A shell in ns2; `exit` ends it and continues the run.\n")
    dialogue.expect(r"# ")
    dialogue.type("wg show wg0 listen-port; pwd; test -t 0 && echo a terminal\n")
    dialogue.expect(rf"\n2\n{tmp_path}\na terminal\n")
    dialogue.expect(r"# ")
    # The shell has job control: Ctrl-C ends its job.
    dialogue.type("cat\n")
    dialogue.type("echoed\n")
    dialogue.expect(r"echoed\nechoed\n")
    dialogue.type("\x03")
    dialogue.expect(r"# ")
    dialogue.type("exit\n")
    assert dialogue.end() == 1


@pytest.mark.parametrize("dialogue", [(*PYTEST, "-k", "bad", "--shell", "left", "--pause-on-error")], indirect=True)
def test_shell_in_unknown_node_names_those_of_lab(dialogue: Dialogue) -> None:
    dialogue.expect(r"No shell: this lab has no node left; there are: ns0, ns1, ns2\n")
    dialogue.expect(PAUSED)
    dialogue.type("\n")
    assert dialogue.end() == 1


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace; apt-get install strace")
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb; apt-get install gdb")


@needs_strace
@pytest.mark.parametrize(("node", "traced"), [("A", ["strace.ns1.txt"]), ("ns0", ["strace.ns1.txt", "strace.ns2.txt"])])
def test_strace_is_evidence_of_failed_test(tmp_path: Path, node: str, traced: list[str]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = host.pytest_command("-k", "bad", "--strace", node, f"--pair={IMPLEMENTATION}~{IMPLEMENTATION}")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WG_INTEROP", "PYTEST"))}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout
    # The program is healthy and ends in time: strace does not take its place.
    assert "assert not 'wrong'" in done.stdout
    assert "Unhealthy" not in done.stdout
    files = sorted(evidence(tmp_path, "bad").glob("strace.*"))
    assert [file.name for file in files] == traced
    assert all("execve(" in file.read_text() and "/run/wireguard/wg0.sock" in file.read_text() for file in files)


@needs_strace
def test_strace_of_node_without_program_fails_run(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(loopback): pass")
    command = host.pytest_command("--strace", "left", f"--pair={IMPLEMENTATION}~{IMPLEMENTATION}")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WG_INTEROP", "PYTEST"))}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    complaint = "--strace left: no program was started in a node of this name; programs were in: ns0, ns1, ns2"
    assert f"wg-interop: {complaint}\n" in done.stdout


needs_valgrind = pytest.mark.skipif(
    not (shutil.which("valgrind") and shutil.which("gcc")), reason="no valgrind or gcc; apt-get install valgrind gcc"
)
# A library that is loaded into a program. The byte behind the block is padding: without memcheck nothing happens.
FAULT: Final = """
#include <stdlib.h>
static void *volatile kept;
__attribute__((constructor)) static void fault(void) { char *volatile block = kept = malloc(8); block[8] = 1; }
"""
MANIFEST: Final = """
name = "faulty"
kind = "uapi"
[program]
path = "{program}"
command = ["{{program}}", "-f", "--disable-drop-privileges", "--disable-multi-queue", "{{interface}}"]
mtu = 1420
[watch]
descriptors = 256
[program.env]
{env}
"""


@needs_valgrind
@pytest.mark.parametrize("is_faulty", [False, True], ids=["sound", "faulty"])
def test_memcheck_error_fails_test_of_sound_tunnel(tmp_path: Path, *, is_faulty: bool) -> None:
    boringtun = Registry().get("boringtun")
    if reason := boringtun.why_unavailable():
        pytest.skip(reason)
    (tmp_path / "fault.c").write_text(FAULT)
    library = tmp_path / "fault.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O0", "-g", "-o", library, tmp_path / "fault.c"], check=True, timeout=60
    )
    env = f'LD_PRELOAD = "{library}"' if is_faulty else ""
    (tmp_path / "faulty.toml").write_text(MANIFEST.format(program=boringtun.argv("")[0], env=env))
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["--impl-manifest=faulty.toml", "--pair=faulty~refwg", "--valgrind=A"]
    command = host.pytest_command("-k", "good", *options)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WG_INTEROP", "PYTEST"))}
    inherited["AT_TERMINAL"] = "/dev/null"
    done = subprocess.run(
        command, cwd=tmp_path, env=inherited, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == is_faulty, done.stdout
    assert ("Invalid write of size 1" in done.stdout) == is_faulty
    if is_faulty:
        assert re.search(r"faulty \(pid \d+\) wrote: ==\d+== Invalid write of size 1", done.stdout)
        (log,) = evidence(tmp_path, "good").glob("ns1-wg0-faulty.log")
        assert "fault.c:4" in log.read_text()


@needs_gdb
@pytest.mark.parametrize(
    "dialogue",
    [(*PYTEST, "-k", "good", "--gdb", "A"), (*WG_INTEROP, "-k", "good", "--gdb", "ns1")],
    ids=["pytest", "wg-interop"],
    indirect=True,
)
def test_test_goes_on_while_gdb_lets_program_run(dialogue: Dialogue) -> None:
    dialogue.expect(rf"wg-interop: gdb has stopped {IMPLEMENTATION} of ns1, pid \d+: `continue` lets the test go on")
    dialogue.expect(r"\(gdb\) ")
    assert "PINGED" not in dialogue.text
    dialogue.type("continue\n")
    dialogue.expect(r"PINGED")
    # The program runs. Ctrl-C stops it again, `quit` lets it run.
    dialogue.type("\x03")
    dialogue.expect(r"received signal SIGINT")
    dialogue.type("quit\n")
    dialogue.expect(r"\(y or n\) ")
    dialogue.type("y\n")
    assert dialogue.end() == 0
    # The test, and what the oracle judged.
    assert re.search(r"\b\d+ passed", dialogue.text)
    assert "failed" not in dialogue.text
