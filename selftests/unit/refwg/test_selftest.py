from __future__ import annotations

import pytest

from refwg import crypto, selftest
from refwg.__main__ import main
from refwg.allowedips import AllowedIPs, Trie
from refwg.counter import ReplayWindow
from refwg.ratelimiter import RateLimiter


def test_selftest_checks_pass_and_print_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == list(selftest.CHECKS)
    assert all(line.endswith(" ok") for line in lines[:-1])
    assert lines[-1] == f"{len(selftest.CHECKS)} of {len(selftest.CHECKS)} checks passed"


def shortest_prefix(self: Trie[int], address: int) -> int | None:
    """A wrong lookup: it stops at the first prefix that contains the address."""
    node = self.root
    while node is not None and (address ^ node.bits) >> self._width - node.length == 0:
        if node.owner is not None or node.length == self._width:
            return node.owner
        node = node.children[address >> self._width - node.length - 1 & 1]
    return None


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ((Trie, "lookup", shortest_prefix), 2),
        ((AllowedIPs, "remove", lambda *_: None), 2),
        ((ReplayWindow, "_clear_up_to", lambda *_: None), 1),
        ((ReplayWindow, "is_fresh", lambda *_: True), 1),
        ((RateLimiter, "allow", lambda *_: True), 1),
        ((crypto, "dh", lambda *_: bytes(32)), 1),
        ((crypto, "mac", lambda key, *parts: crypto.blake2s_hash(key, *parts)[:16]), 1),
        ((crypto, "same", lambda *_: 1 / 0), 0),
    ],
    ids=["first match", "nothing removed", "stale bits", "replays", "no limit", "low order", "not keyed", "unused"],
)
def test_selftest_reports_broken_function(
    broken: tuple[object, str, object],
    failed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(*broken)
    assert selftest.main() == (1 if failed else 0)
    assert capsys.readouterr().out.count("FAILED: ") == failed
