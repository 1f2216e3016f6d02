"""Check the verdict on a run in a VM, made from the records that the guest sent."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.vm.boot import Ending, VmResult, ending_of
from harness.vm.qemu import Hardware, Machine, Received, Stopped, command_line

if TYPE_CHECKING:
    from collections.abc import Iterator

NONCE = "n0nce"
PANIC = "Kernel panic - not syncing: x"


def records(**changes: Any) -> Received:
    """The records of a healthy guest, with changes; `verdict=None`: the guest sent no verdict."""
    received = Received()
    record = {"event": "verdict", "nonce": NONCE, "status": 0, "results": 0, "drifts": [0.0, 0.0], "interrupts": 0}
    if changes.get("verdict", record) is not None:
        received.read_verdict(repr(record | changes).encode() + b"\n", NONCE)
    return received


@pytest.mark.parametrize(
    ("received", "complaints", "ending", "words"),
    [
        (records(), [], Ending.EXITED, ""),
        (records(status=5), [], Ending.EXITED, ""),
        (records(verdict=None), [], Ending.LOST, "ended without a verdict, before it ran"),
        (records(nonce="guess"), [], Ending.LOST, "without a verdict"),
        (records(results=1), [], Ending.LOST, "without a verdict"),
        (records(verdict=None), [PANIC], Ending.PANICKED, PANIC),
        (records(), [PANIC], Ending.PANICKED, PANIC),
        (records(), ["BUG: y", "BUG: z"], Ending.COMPLAINED, "(2), first: BUG: y"),
        (records(status=None), [], Ending.OVERDUE, "exceeded its deadline"),
        (records(drifts=[0.0, 2.0], interrupts=900), [], Ending.EXITED, ""),
    ],
)
def test_vm_verdict_is_worst_finding_of_run(
    received: Received, complaints: list[str], ending: Ending, words: str
) -> None:
    actual, message = ending_of(received, complaints, in_time=True, warp=False)
    assert (actual, words in message) == (ending, True)


def test_guest_is_hung_when_verdict_misses_deadline() -> None:
    ending, message = ending_of(records(verdict=None), [], in_time=False, warp=False)
    assert (ending, message) == (Ending.HUNG, "the guest hung, before it ran the command")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"drifts": [0.0, -70.0]}, "by -70.000 s"), ({"interrupts": 900}, "900 interrupts from the host")],
)
def test_warp_run_is_drifted_by_clock_error_or_interrupts(changes: dict[str, Any], words: str) -> None:
    ending, message = ending_of(records(**changes), [], in_time=True, warp=True)
    assert (ending, words in message) == (Ending.DRIFTED, True)


@pytest.mark.parametrize("ending", list(Ending))
@pytest.mark.parametrize(("status", "expected"), [(0, 0), (3, 3), (-11, 139), (None, 1)])
def test_exit_status_is_passed_on_only_when_command_exited(ending: Ending, status: int | None, expected: int) -> None:
    result = VmResult(
        ending=ending, status=status, message="", kernel="", accelerator="", directory=Path(), durations={}
    )
    assert result.exit_status() == (expected if ending is Ending.EXITED else 1)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_results_arrive_in_pieces_of_any_size(step: int, tmp_path: Path) -> None:
    stream = b"5 kernel.log\na\nb\nc0 empty\n3 sub/x\n123"
    received = records(results=3)
    for start in range(0, len(stream), step):
        assert not received.complete()
        received.collect(stream[start : start + step])
    assert received.complete()
    received.save(tmp_path)
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"kernel.log": b"a\nb\nc", "empty": b"", "sub/x": b"123"}


@pytest.fixture
def sleeping() -> Iterator[tuple[Machine, socket.socket]]:
    """A machine that sends nothing, and the far end of its only port."""
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["tail", "-f", "/dev/null"]) as process:
        yield Machine(process, {"output": ours}, NONCE), theirs
        process.kill()


def test_guest_watch_raises_stopped_when_stop_pipe_is_closed(sleeping: tuple[Machine, socket.socket]) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(Stopped):
        sleeping[0].watch(time.monotonic() + 60, lambda _: None, reading)
    os.close(reading)


def test_guest_has_ended_when_its_channels_are_closed(sleeping: tuple[Machine, socket.socket]) -> None:
    reading, writing = os.pipe()
    sleeping[1].sendall(b"last words")
    sleeping[1].close()
    output: list[bytes] = []
    assert sleeping[0].watch(time.monotonic() + 60, output.append, reading)
    assert b"".join(output) == b"last words"
    for end in (reading, writing):
        os.close(end)


@pytest.mark.parametrize("name", ["../out", "{above}/out", "a/../../out"])
def test_result_path_outside_of_folder_is_not_saved(name: str, tmp_path: Path) -> None:
    received = records()
    received.collect(f"1 {name.format(above=tmp_path)}\nx".encode())
    received.save(tmp_path / "in")
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize(
    ("hardware", "present", "absent"),
    [
        (Hardware(cpus=2, memory="1G"), "tcg,thread=multi", "-icount"),
        (Hardware(cpus=2, memory="1G", kvm=True), "kvm", "tcg,thread=multi"),
        (Hardware(cpus=2, memory="1G", warp=True), "shift=0,sleep=off", "2"),
    ],
)
def test_qemu_command_line_matches_requested_hardware(
    hardware: Hardware, present: str, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.vm.qemu.find_qemu", lambda: "qemu")
    line = command_line(
        hardware, image=Path("/k"), append="a b", initrd="/i", console=Path("/a,b/c"), ports={"output": 9}
    )
    assert (present in line, absent in line) == (True, False)
    assert "file,id=console,path=/a,,b/c" in line
