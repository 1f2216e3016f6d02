"""Break guests: each fails with its reason, and no QEMU outlives its runner."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.install.packages import install_command
from harness.vm import qemu

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "harness.vm", "run"]
UP = b"the guest is up"

pytestmark = [
    pytest.mark.skipif(
        not shutil.which(qemu.QEMU), reason=f"QEMU is not installed: {install_command([qemu.QEMU_PACKAGE])}"
    ),
    pytest.mark.timeout(240),
]


@pytest.mark.parametrize(
    ("script", "deadline", "words"),
    [
        ("echo c > /proc/sysrq-trigger", 120, "the kernel panicked: Kernel panic - not syncing: sysrq triggered crash"),
        (
            "kill -KILL $PPID; tail -f /dev/null",
            120,
            "the guest ended without a verdict, after it had started the command",
        ),
        ("kill -STOP $PPID; tail -f /dev/null", 30, "the guest hung, after it had started the command"),
        ("tail -f /dev/null", 30, "the command exceeded its deadline"),
        ("echo 'BUG: pretended' > /dev/kmsg; exit 0", 120, "the kernel log contains complaints (1), first: BUG: pret"),
    ],
    ids=["panic", "no verdict", "hang", "overdue", "complaint"],
)
def test_guest_failure_is_reported_with_reason(script: str, deadline: int, words: str) -> None:
    completed = subprocess.run(
        [*RUN, "--deadline", str(deadline), "--", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    console = completed.stderr.partition("console log: ")[2].splitlines()
    assert (completed.returncode, words in completed.stderr, Path(console[0]).is_file()) == (1, True, True), (
        completed.stderr
    )


@pytest.fixture
def runner() -> Iterator[subprocess.Popen[bytes]]:
    command = [*RUN, "--", "sh", "-c", f"echo {UP.decode()}; tail -f /dev/null"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def guest_of(runner: subprocess.Popen[bytes]) -> int:
    """Return a pidfd of the runner's QEMU once its guest is up."""
    assert runner.stdout
    assert runner.stdout.readline().strip() == UP
    for entry in Path("/proc").glob("[0-9]*/stat"):
        name, _, rest = entry.read_text().rpartition(")")
        if rest.split()[1] == str(runner.pid):
            assert "qemu" in name
            return os.pidfd_open(int(entry.parent.name))
    raise AssertionError("the runner has no child")


@pytest.mark.parametrize(
    ("fatal", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)],
)
def test_runner_ended_by_signal_leaves_no_qemu(
    runner: subprocess.Popen[bytes], fatal: signal.Signals, status: int
) -> None:
    guest = guest_of(runner)
    runner.send_signal(fatal)
    assert runner.wait(30) == status
    assert select.select([guest], [], [], 30)[0]
    os.close(guest)


def test_frequent_output_does_not_fail_warp_clock_check() -> None:
    script = "from harness import let_pass\nfor n in range(500): print(n, flush=True); let_pass(0.5, 'idle time')"
    completed = subprocess.run(
        [*RUN, "--warp", "--", "python", "-c", script], capture_output=True, text=True, check=False
    )
    assert (completed.returncode, completed.stdout.split()[-1]) == (0, "499"), completed.stderr


def test_user_manifest_and_its_capabilities_reach_guest(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/mine"
    program.write_text('#!/bin/sh\nexec python -m refwg "$@"\n')
    program.chmod(0o755)
    manifest = tmp_path / "mine.toml"
    manifest.write_text('name = "mine"\nkind = "uapi"\ncapabilities = []\n[program]\npath = "bin/mine"\n')
    words = ["selftests/netns/test_roaming.py", "--lane", "vm", "--pair", "mine~kernel", "--impl-manifest"]
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(manifest), "--results", str(tmp_path / "results.json")],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert "unsupported: mine does not declare the capability roaming" in completed.stdout, (
        completed.stdout + completed.stderr
    )
    assert "failed" not in completed.stdout.splitlines()[-1], completed.stdout
