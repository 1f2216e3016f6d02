"""Check which lines of a kernel log are complaints, and which are noise."""

from __future__ import annotations

import re
import tomllib

import pytest

from harness.vm import boot, kernel_log
from harness.vm.kernel_log import Noise, complaints, excerpt, running_test

# Sources: messages of Linux 6.1 and 6.12, as printed by lib/, kernel/ and mm/.
FAULTS = [
    "Kernel panic - not syncing: sysrq triggered crash",
    "Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "kernel BUG at net/core/skbuff.c:110!",
    "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP",
    "WARNING: CPU: 1 PID: 212 at drivers/net/wireguard/peer.c:168 peer_remove_after_dead+0x1e/0x60 [wireguard]",
    "INFO: task wg-crypt-wg0:77 blocked for more than 60 seconds.",
    "rcu: INFO: rcu_preempt self-detected stall on CPU",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "watchdog: BUG: soft lockup - CPU#1 stuck for 134s! [ping:311]",
    "BUG: KASAN: slab-use-after-free in wg_packet_receive+0x14/0x20 [wireguard]",
    "UBSAN: array-index-out-of-bounds in net/ipv4/fib.c:10:3",
    "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
    "WARNING: possible circular locking dependency detected",
    "WARNING: suspicious RCU usage",
    "refcount_t: underflow; use-after-free.",
    "unregister_netdevice: waiting for wg0 to become free. Usage count = 2",
    "Out of memory: Killed process 400 (python) total-vm:100kB",
    "lab: guest failed: OSError: [Errno 19] no virtio port lab.output",
]
HARMLESS = [
    "Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)",
    "mtrr: your CPUs had inconsistent fixed MTRR settings",
    "[Firmware Bug]: TSC not synchronous to P0",
    "sysrq: Show Blocked State",
    "wireguard: wg0: Peer 1 created",
    "Warning: unmaintained driver",
    "rcu: Preemptible hierarchical RCU implementation.",
]


@pytest.mark.parametrize("stamp", ["", "[    1.234567] ", "<4>[   12.000001] ", "[    0.1] [    T1] "])
@pytest.mark.parametrize("line", FAULTS)
def test_kernel_fault_is_reported_with_any_time_stamp(line: str, stamp: str) -> None:
    assert list(complaints(f"quiet\n{stamp}{line}\n", ())) == [line]


@pytest.mark.parametrize("line", HARMLESS)
def test_ordinary_kernel_line_is_not_reported(line: str) -> None:
    assert not list(complaints(f"[    1.0] {line}", ()))


@pytest.mark.parametrize(
    ("complaint", "test"),
    [
        ("BUG: early", ""),
        ("BUG: of first", "t.py::test_a[x~y]"),
        ("BUG: of second", "t.py::test_b"),
        ("BUG: absent", ""),
    ],
)
def test_complaint_belongs_to_test_that_began_last(complaint: str, test: str) -> None:
    log = """\
[    0.1] BUG: early
[    1.0] wg-interop: begins t.py::test_a[x~y]
<4>[    1.5] BUG: of first
[    2.0] wg-interop: begins t.py::test_b
[    2.5] BUG: of second
"""
    assert running_test(log, complaint) == test


def test_same_fault_with_different_stamps_counts_once() -> None:
    assert len(list(complaints("[ 1.0] BUG: x\n<1>[ 1.000] BUG: x", ()))) == 1


def test_noise_entry_hides_only_matching_lines() -> None:
    noise = Noise(pattern=re.compile("BUG: soft lockup"), reason="a test")
    assert list(complaints("BUG: soft lockup - CPU#0\nBUG: other", [noise])) == ["BUG: other"]


def test_every_noise_table_entry_has_reason() -> None:
    entries = tomllib.loads(boot.NOISE_TABLE.read_text()).get("noise", [])
    assert len(kernel_log.load_noise(boot.NOISE_TABLE)) == len(entries)
    assert all(entry["reason"] for entry in entries)


@pytest.mark.parametrize(("reported", "expected"), [((), ["d", "[ 4.0] e"]), (("b",), ["[ 2.0] b", "c"])])
def test_excerpt_starts_at_first_complaint_or_shows_log_end(reported: tuple[str, ...], expected: list[str]) -> None:
    assert excerpt("[ 1.0] a\n[ 2.0] b\nc\n\nd\n[ 4.0] e\n", reported, 2) == expected
