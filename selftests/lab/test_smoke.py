"""Check the smoke test: a dead program fails once, and its other tests are blocked."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from harness import wait
from harness.net.netns import leftover_nodes
from harness.report.invariants import PREFIX
from selftests.support import host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["pytester"]

# Counts its starts, then runs the code of the test; `serve` starts refwg in its place.
PROGRAM = """\
#!{python}
import os, sys
sys.path.insert(0, {root!r})
os.environ["PYTHONPATH"] = {root!r}
if "--version" in sys.argv:
    sys.exit("mine 1.0")
with open({starts!r}, "a") as file:
    file.write("started\\n")
print("not a word", flush=True)

def serve():
    os.execv(sys.executable, [sys.executable, "-m", "refwg", *sys.argv[1:]])

{what}
"""
# Makes its link and its socket, and answers every request with `answer`; with None it never answers.
ANSWERING = """\
import fcntl, signal, socket, struct
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"wg0", 0x1001))
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/wireguard/wg0.sock")
listener.listen()
while {answer!r} is not None:
    connection, _ = listener.accept()
    if connection.recv(65536):
        connection.sendall({answer!r})
    connection.close()
signal.pause()
"""
TESTS = """
import pytest
from harness import DeviceConfig

@pytest.mark.parametrize("number", range(4))
def test_alone(lab, implementation, number):
    lab.interface("wg0", implementation, lab.node("here")).get()

def test_tunnel(loopback):
    loopback.must_ping("ns1", "192.168.241.2")

@pytest.mark.capability("roaming")
def test_core(implementation):
    pass
"""
SILENT = "import signal; signal.pause()"


def write_program(folder: Path, what: str) -> Path:
    path = folder / "program"
    starts = str(folder / "starts")
    path.write_text(PROGRAM.format(python=sys.executable, root=str(host.ROOT), starts=starts, what=what))
    path.chmod(0o755)
    return path


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


def states(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of tests, without those of the oracle."""
    entries = json.loads((folder / "report" / "results.json").read_text())["results"]
    tests = [entry for entry in entries if not entry["id"].startswith(PREFIX)]
    return {entry["id"].partition("::")[2]: entry for entry in tests}


@pytest.fixture
def scaled_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scale all deadlines by 0.3: these tests miss them anyway."""
    monkeypatch.setattr(wait, "_scale", 0.3)
    yield
    assert leftover_nodes() == []


@pytest.mark.usefixtures("inner_pytest", "scaled_down")
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (SILENT, "waited 4.5 s for mine to make /run/wireguard/wg0.sock; seen: nothing new; it still runs; not a word"),
        ("sys.exit('no such device')", "ended at its start:\nnot a word\nno such device"),
        (ANSWERING.format(answer=None), "wg0 (uapi): waited 3 s for the answer to get; seen: 0 bytes"),
        (ANSWERING.format(answer=b"errno=0\n\n"), "mine was given the listen port 51820 and reports 0"),
        (ANSWERING.format(answer=b"listen_port=51820\nprivate_key=" + b"0b" * 32 + b"\nerrno=0\n\n"),
         "mine was given a private key and reports another one"),
        (ANSWERING.format(answer=b"errno=-5\n\n"), "wg0 (uapi): EIO: get: Input/output error"),
    ],
    ids=["silent", "ends", "mute", "portless", "other-key", "refuses"],
)  # fmt: skip
def test_dead_program_fails_once_and_blocks_its_other_tests(pytester: pytest.Pytester, what: str, reason: str) -> None:
    program = write_program(pytester.path, what)
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("--impl", f"mine={program}", "--impl", "refwg")
    assert starts(pytester.path) == 1
    found = states(pytester.path)
    (failed,) = [name for name, entry in found.items() if entry["state"] == "error"]
    assert failed == "test_alone[mine-0]"
    assert found[failed]["message"].startswith("mine failed its smoke test: ")
    assert reason in found[failed]["message"]
    (log,) = (pytester.path / "report" / found[failed]["artifacts"]).glob("smoke-wg0-mine.log")
    assert "not a word" in log.read_text()
    blocked = {name: entry for name, entry in found.items() if entry["state"] == "blocked"}
    assert blocked.keys() == {
        "test_alone[mine-1]", "test_alone[mine-2]", "test_alone[mine-3]",
        "test_tunnel[mine~mine]", "test_tunnel[mine~refwg]", "test_tunnel[refwg~mine]",
    }  # fmt: skip
    assert all((entry["message"], entry["artifacts"]) == (found[failed]["message"], "") for entry in blocked.values())
    assert {name for name, entry in found.items() if entry["state"] == "passed"} == {
        *(f"test_alone[refwg-{number}]" for number in range(4)),
        "test_tunnel[refwg~refwg]", "test_core[mine]", "test_core[refwg]",
    }  # fmt: skip


@pytest.mark.usefixtures("inner_pytest", "scaled_down")
def test_program_that_does_not_stop_fails_smoke_test(pytester: pytest.Pytester) -> None:
    """The smoke test stops the program last, so all steps before that have worked."""
    answer = b"listen_port=51820\nerrno=0\n\n"
    what = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{ANSWERING.format(answer=answer)}"
    program = write_program(pytester.path, what)
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("--impl", f"mine={program}", "-k", "alone").assert_outcomes(errors=4)
    assert starts(pytester.path) == 1
    messages = {entry["message"] for entry in states(pytester.path).values()}
    assert all("still ran 0.6 s after SIGTERM" in message for message in messages)


@pytest.mark.usefixtures("inner_pytest")
def test_working_program_has_one_smoke_test_in_run(pytester: pytest.Pytester) -> None:
    program = write_program(pytester.path, "serve()")
    pytester.makepyfile(TESTS)
    assert pytester.runpytest_inprocess("--impl", f"mine={program}").ret == pytest.ExitCode.OK
    assert [entry["state"] for entry in states(pytester.path).values()] == ["passed"] * 6
    assert starts(pytester.path) == 1 + 4 + 2


@pytest.mark.usefixtures("inner_pytest")
def test_program_without_handshakes_passes_smoke_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("--pair", "refwg+wrong-mac1~refwg", "-k", "alone or tunnel")
    found = {name: entry["state"] for name, entry in states(pytester.path).items()}
    assert found.pop("test_tunnel[refwg+wrong-mac1~refwg]") == "failed"
    assert len(found) == 8
    assert set(found.values()) == {"passed"}


def test_workers_share_smoke_test_of_dead_program(tmp_path: Path) -> None:
    program = write_program(tmp_path, SILENT)
    (tmp_path / "test_it.py").write_text(TESTS.replace("range(4)", "range(100)"))
    command = host.pytest_command(
        "-n", "2", "--impl", f"mine={program}", "--rootdir", str(tmp_path), "--timeout-scale", "0.2", "test_it.py"
    )
    run = host.Run(command, output=tmp_path / "output", cwd=tmp_path, env={"PYTHONPATH": str(host.ROOT)})
    try:
        run.process.wait(60)
        found = [entry["state"] for entry in states(tmp_path).values()]
    finally:
        run.close()
    assert (found.count("error"), found.count("blocked"), found.count("passed")) == (1, 100, 1), run.output.read_text()
    assert starts(tmp_path) == 1
