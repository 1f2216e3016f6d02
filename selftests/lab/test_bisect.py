"""Check `wg-interop bisect` with commits of a real repository: refwg, broken on purpose by one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli.bisect import Order

ROOT = Path(__file__).parents[2]
TEST = (
    str(ROOT / "selftests" / "netns" / "test_ping_and_counters.py")
    + "::test_transfer_counters_are_exact_after_ten_pings"
)


@pytest.mark.parametrize(
    ("test", "pair", "given", "words"),
    [
        ("t.py::t", "", "wireguard-go@1", ["--impl=wireguard-go@1", "t.py::t"]),
        ("t.py::t", "refwg~wireguard-go", "wireguard-go@1", ["--pair=refwg~wireguard-go@1", "t.py::t"]),
        (
            "t.py::t[wireguard-go~wireguard-go-debian-v4]", "", "wireguard-go@1=/x",
            [
                "--impl=wireguard-go@1=/x", "--pair=wireguard-go@1~wireguard-go-debian",
                "t.py::t[wireguard-go@1~wireguard-go-debian-v4]",
            ],
        ),
        ("t.py::t[wireguard-go-v4]", "", "wireguard-go@1", ["--impl=wireguard-go@1", "t.py::t[wireguard-go@1-v4]"]),
    ],
)  # fmt: skip
def test_name_of_program_becomes_that_of_version(test: str, pair: str, given: str, words: list[str]) -> None:
    order = Order(test=test, implementation="wireguard-go", good="", bad="", pair=pair)
    assert order.options(given) == words


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Five commits: the fourth plants a defect, the second does not build."""
    folder = tmp_path / "repo"
    folder.mkdir()

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=folder, check=True)

    git("init", "-q")
    for number in range(1, 6):
        mutant = " --mutant pads-nothing" if number > 3 else ""
        command = f'exec env REFWG_MUTANTS=allowed PYTHONPATH={ROOT} {sys.executable} -m refwg{mutant} "$@"'
        (folder / "source").write_text(f"#!/bin/sh\n# {number}\n{command}\n")
        (folder / "build").write_text("exit 1\n" if number == 2 else "cp source wg; chmod +x wg\n")
        git("add", ".")
        git("commit", "-qm", f"commit {number}")
    return folder


def bisect(repository: Path, good: str, bad: str) -> tuple[int, dict[str, object], str]:
    command = [sys.executable, "-m", "harness", "bisect", "--json", "--repo", str(repository), "--good", good]
    more = ["--build", "sh build", "--program", "wg", "--bad", bad, "--impl", "mine", "--pair", "mine~refwg", TEST]
    done = subprocess.run(
        [*command, *more, "-o", str(repository.parent / "kept")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_first_bad_commit_is_found_with_its_captures(repository: Path) -> None:
    status, found, printed = bisect(repository, "HEAD~4", "HEAD")
    assert status == 0, printed
    assert str(found["first_bad"]).endswith(" commit 4")
    assert str(found["last_good"]).endswith(" commit 3")
    assert list((repository.parent / "kept" / "bad").rglob("*.pcapng"))
    worktrees = subprocess.run(
        ["git", "-C", repository, "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(worktrees.stdout.splitlines()) == 1


def test_good_end_that_fails_is_no_search(repository: Path) -> None:
    status, found, printed = bisect(repository, "HEAD~1", "HEAD")
    assert (status, found.get("first_bad")) == (1, None), printed
    assert "commit 4 is bad, not good: " in str(found["reason"])


def test_end_that_does_not_build_cannot_be_tested(repository: Path) -> None:
    status, found, printed = bisect(repository, "HEAD~3", "HEAD")
    assert (status, found) == (125, {})
    assert "commit 2 could not be tested: the build failed: " in printed


def test_revision_that_does_not_exist_is_usage_error(repository: Path) -> None:
    status, _, printed = bisect(repository, "nope", "HEAD")
    assert (status, "no commit nope" in printed) == (2, True)
