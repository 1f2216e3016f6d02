"""Read the kernel's log while a test runs: the lines since its beginning, as dmesg shows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from harness.lab.kernel_log import KernelLog, line_of, note_test

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Lab

KMSG = "/dev/kmsg"


def test_evidence_has_what_kernel_logs_during_test(lab: Lab) -> None:
    if not os.access(KMSG, os.R_OK | os.W_OK):
        pytest.skip(f"{KMSG} cannot be read and written here; run as root")
    note_test("a test of the kernel's log", level=6)
    lab.snapshot()
    lab.snapshot()
    lines = (lab.directory / "dmesg.txt").read_text().splitlines()
    found = [line for line in lines if line.endswith("] wg-interop: begins a test of the kernel's log")]
    assert len(found) == 1, lines
    before, *_ = found[0].partition("]")
    assert float(before.strip("[ ")) > 0


def test_log_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    log = KernelLog(tmp_path / "absent")
    assert log.text() == ""
    log.close()
    log.close()


def test_record_is_shown_as_dmesg_shows_it() -> None:
    record = "6,339,5140900,-;wireguard: wg0: Peer 1 created\n SUBSYSTEM=net\n DEVICE=n7\n"
    assert line_of(record) == "[    5.140900] wireguard: wg0: Peer 1 created"
