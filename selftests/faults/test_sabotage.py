"""Sabotage a program in one way: exactly its scenario fails, with the cause."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.implementations.registry import Registry
from harness.report.invariants import PREFIX
from selftests.support import host

if TYPE_CHECKING:
    from collections.abc import Iterator

HONEST = "wireguard-go-debian"
MANIFESTS = Path(__file__).parent / "sabotage"
DEADLINE = 90.0

N02 = "test_transfer_counters_are_exact_after_ten_pings"
N13 = "test_endpoint_follows_peer_to_new_ipv4_address_and_port"
N15 = "test_packet_with_foreign_source_is_dropped_but_sets_endpoint"
N20 = "test_persistent_keepalive_keeps_peer_behind_nat_reachable"
TESTS = {
    N02: "test_ping_and_counters.py",
    N13: "test_roaming.py",
    N15: "test_cryptokey_routing.py",
    N20: "test_roaming.py",
}


@pytest.fixture
def honest() -> Path:
    """Path of the program to sabotage."""
    manifest = Registry().get(HONEST)
    if reason := manifest.why_unavailable():
        pytest.skip(reason)
    return manifest.find_program()


@pytest.fixture
def results(tmp_path: Path, honest: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Run the four scenarios with the sabotaged program as A; the results by test name."""
    path = tmp_path / "report" / "results.json"
    tests = [f"selftests/netns/{file}::{name}" for name, file in TESTS.items()]
    chosen = ["--impl-manifest", str(MANIFESTS / f"{request.param}.toml"), "--pair", f"{request.param}~{HONEST}"]
    # The Python saboteur needs the packages of this interpreter.
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"SABOTAGED_PROGRAM": str(honest), "PATH": search, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = host.Run(host.pytest_command(*tests, *chosen, "--results", str(path)), env=env, output=tmp_path / "output")
    try:
        run.process.wait(DEADLINE)
        assert path.exists(), run.output.read_text()
        entries = json.loads(path.read_text())["results"]
        by_name = {entry["id"].partition("::")[2].partition("[")[0]: entry for entry in entries}
        yield {name: entry for name, entry in by_name.items() if not entry["id"].startswith(PREFIX)}
    finally:
        run.close()


@pytest.mark.parametrize(
    ("results", "red", "cause"),
    [
        ("miscounts", N02, "A received 1280 bytes, not 1428: 148 too few, as long as an initiation"),
        ("lossy", N02, "192.168.241.1: 8 of 10 answered, not [3, 7]"),
        ("wrong-port", N13, "B's endpoint for A is 127.212.121.99:7777, expected 127.212.121.99:9999"),
        ("stuck-port", N13, "A's listen port is 1, expected 9999"),
        ("wide-allowed-ips", N15, "A delivered a datagram whose source 192.168.241.2 is another peer's allowed ip"),
        ("keepalives-dropped", N20, "the NAT mapping expired; 0 bytes of keepalives arrived at B in 3 s"),
    ],
    indirect=["results"],
)
def test_sabotaged_program_fails_exactly_its_scenario(results: dict[str, Any], red: str, cause: str) -> None:
    assert {name: entry["state"] for name, entry in results.items()} == {
        name: "failed" if name == red else "passed" for name in TESTS
    }
    assert cause in results[red]["message"]


@pytest.mark.parametrize("results", ["unspoilt"], indirect=True)
def test_proxy_without_sabotage_passes_all_scenarios(results: dict[str, Any]) -> None:
    assert {name: entry["state"] for name, entry in results.items()} == dict.fromkeys(TESTS, "passed")
