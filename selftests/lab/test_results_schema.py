"""Check results.json of a run with a pair, one implementation and a failure against its JSON schema."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from selftests.support.results_schema import faults_of

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.requirement("HS-01")
def test_tunnel(loopback):
    loopback.must_ping("ns1", "192.168.241.2")

@pytest.mark.scenario("N03")
def test_alone(lab, implementation):
    lab.interface("wg0", implementation, lab.node("here")).get()
    assert implementation.name == "cheese"

@pytest.mark.capability("fwmark")
def test_marked(implementation): pass
"""


@pytest.mark.usefixtures("inner_pytest")
def test_results_of_pair_and_of_failure_follow_schema(pytester: pytest.Pytester, tmp_path: Path) -> None:
    manifest = tmp_path / "mine.toml"
    manifest.write_text(
        'name = "mine"\nkind = "uapi"\n[program]\ncommand = ["{python}", "-m", "refwg", "-f", "{interface}"]\n'
    )
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("--impl-manifest", str(manifest), "--impl", "refwg", "--results", "results.json")
    path = pytester.path / "results.json"
    assert faults_of(path) == []
    written = json.loads(path.read_text())
    # The others are what the oracle judged in their captures.
    own = [result for result in written["results"] if "::test_" in result["id"]]
    assert len(own) < len(written["results"])
    pairs = [result for result in own if result["b"]]
    assert len(pairs) == 4
    assert {result["state"] for result in pairs} == {"passed"}
    assert sorted(result["state"] for result in own if not result["b"]) == [
        "failed", "failed", "passed", "unsupported",
    ]  # fmt: skip
    assert len(written["causes"]) == 2
    assert [*written["run"]["manifests"]] == ["mine"]
