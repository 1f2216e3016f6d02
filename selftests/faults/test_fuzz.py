"""`wg-interop fuzz` finds a planted crash, reduces it to a test, and ends as it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness.fuzz.inputs import Case

if TYPE_CHECKING:
    from pathlib import Path

MUTANT = "refwg+ends-at-empty-ipv6-packet"
COMMAND = [sys.executable, "-m", "harness", "fuzz", "--seed", "1"]
# The planted crash needs a session and one packet on it. Over sockets the answers come at their own times, and a step
# that is not needed may stay.
FEW_STEPS = {"in-process": 4, "sockets": 12}


def run(*arguments: str, corpus: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [*COMMAND, "--corpus", str(corpus), *arguments]
    # A busy machine needs its whole minute to reduce a finding.
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.requirement("ROB-02")
@pytest.mark.parametrize("where", [(), ("--in-process",)], ids=["sockets", "in-process"])
def test_planted_crash_is_found_and_reduced(where: tuple[str, ...], tmp_path: Path) -> None:
    results = tmp_path / "fuzz.json"
    arguments = ("--surface", "packets", "--minutes", "0.5", "--guide", "answers", "--json", str(results))
    ended = run("--impl", MUTANT, *where, *arguments, corpus=tmp_path / "corpus")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    finding = json.loads(results.read_text())["finding"]
    assert finding["kind"] == ("raised" if where else "died")
    assert "ValueError" in finding["message"] + finding["detail"]
    (folder,) = (tmp_path / "corpus" / "findings").iterdir()
    assert f"reproducer: {folder}" in ended.stdout
    assert {path.name for path in folder.iterdir()} == {
        "case.json", "exchange.pcapng", "finding.txt", "test_hostile_input.py",
    }  # fmt: skip
    cases = [Case.from_json(line) for line in (folder / "case.json").read_text().splitlines()]
    assert sum(len(case.steps) for case in cases) <= FEW_STEPS["in-process" if where else "sockets"]
    assert (folder / "exchange.pcapng").stat().st_size > 300
    test = folder / "test_hostile_input.py"
    compile(test.read_text(), str(test), "exec")
    # What was found is no accident of the program: refwg as it is survives the same input.
    impl = () if where else ("--impl=refwg",)
    passed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", f"--results={tmp_path}/r.json", *impl, test],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert passed.returncode == 0, passed.stdout


def test_device_in_process_shares_its_classes_with_its_peers() -> None:
    # The command has imported refwg for its lab, and imports it again for the device: an error of the one refwg must be
    # caught where the other one is used, or it is reported as a finding.
    program = """
import sys
from harness.fuzz import campaign
order = campaign.Order(impl="refwg", in_process=True)
assert "refwg.errors" in sys.modules
device = campaign.InProcess(order, order.find(), is_covered=False).fresh()
users = {
    name: module for name, module in sys.modules.items()
    if name.startswith(("refwg", "harness")) and hasattr(module, "NotAuthentic")
}
assert "harness.fuzz.player" in users and "harness.scripted.transcripts" in users, sorted(users)
stale = {name for name, module in users.items() if module.NotAuthentic is not sys.modules["refwg.errors"].NotAuthentic}
assert not stale, stale
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def test_finding_that_is_ignored_is_only_counted(tmp_path: Path) -> None:
    ended = run(
        "--impl", MUTANT, "--in-process", "--surface", "packets", "--guide", "nothing", "--count", "3000",
        "--ignore", "raised ValueError", corpus=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " ignored findings" in ended.stdout


def test_same_seed_makes_same_inputs(tmp_path: Path) -> None:
    figures = []
    for name in ("a", "b"):
        results = tmp_path / f"{name}.json"
        ended = run(
            "--impl", "refwg", "--in-process", "--count", "1500", "--json", str(results), corpus=tmp_path / name
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        figures.append(json.loads(results.read_text())["summary"])
    first, second = ([one[name] for name in ("cases", "packets", "requests", "features")] for one in figures)
    assert first == second
    assert {path.name for path in (tmp_path / "a" / "cases").iterdir()} == {
        path.name for path in (tmp_path / "b" / "cases").iterdir()
    }


def test_sigint_ends_run_with_its_figures(tmp_path: Path) -> None:
    command = [*COMMAND, "--impl", "refwg", "--in-process", "--minutes", "5", "--corpus", str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    # The first line of figures says that it fuzzes.
    assert any("packets" in line for line in iter(child.stderr.readline, ""))
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "states: " in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--impl", "nobody"), 2, "unknown implementation 'nobody'"),
        ((), 2, "name one program"),
        (("--impl", "refwg", "--minutes", "0"), 2, "--minutes 0: expected a number above 0"),
        (("--impl", "refwg", "--guide", "stars"), 2, "--guide stars: expected one of coverage, answers, nothing"),
        (("--impl", "refwg", "--ignore", "("), 2, "--ignore (: not a regular expression"),
        (("--impl", "wireguard-go", "--in-process"), 2, "--in-process runs refwg's device in this process"),
        (("--impl", "kernel"), 125, "--lane vm"),
    ],
    ids=["unknown", "none", "minutes", "guide", "ignore", "in-process", "kernel"],
)
def test_wrong_usage_is_refused_with_remedy(
    arguments: tuple[str, ...], status: int, message: str, tmp_path: Path
) -> None:
    ended = run(*arguments, corpus=tmp_path)
    assert ended.returncode == status, ended.stderr
    assert message in ended.stderr
