"""Break refwg in one way: the scenario that tests it fails, with the cause."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from harness.implementations.registry import Registry
from selftests.support import host

if TYPE_CHECKING:
    from pathlib import Path

HONEST = "wireguard-go-debian"
DEADLINE = 120.0
HANDSHAKE, ROAMING = "selftests/netns/test_ping_and_counters.py", "selftests/netns/test_roaming.py"


class Case(NamedTuple):
    """A mutant, its role, the test that must fail, and a part of its message."""

    mutant: str
    role: str
    test: str
    cause: str


CASES = [
    Case(
        "no-clamp",
        "alone",
        "selftests/netns/test_configuration.py::test_private_key_is_clamped",
        "not clamped to +",
    ),
    Case(
        "no-source-check",
        "a",
        "selftests/netns/test_cryptokey_routing.py::test_packet_with_foreign_source_is_dropped_but_sets_endpoint",
        "A delivered a datagram whose source 192.168.241.2 is another peer's allowed ip",
    ),
    Case(
        "no-roaming",
        "b",
        f"{ROAMING}::test_endpoint_follows_peer_to_new_ipv4_address_and_port",
        "B's endpoint for A is 127.0.0.1:1, A listens on 9999",
    ),
    Case(
        "no-keepalive",
        "a",
        f"{ROAMING}::test_persistent_keepalive_keeps_peer_behind_nat_reachable",
        "0 bytes of keepalives arrived at B",
    ),
    Case(
        "stale-counters",
        "a",
        f"{HANDSHAKE}::test_transfer_counters_are_exact_after_ten_pings",
        "A received 0 bytes, not 1428",
    ),
    Case("wrong-mac1", "a", f"{HANDSHAKE}::test_ten_pings_are_all_answered", "Received packet with invalid mac1"),
]


def run(case: Case, mutant: str, directory: Path) -> list[dict[str, Any]]:
    """Run the case's test with this variant of refwg in its role; returns the results."""
    pair = {"a": ["--pair", f"{mutant}~{HONEST}"], "b": ["--pair", f"{HONEST}~{mutant}"], "alone": ["--impl", mutant]}
    path = directory / mutant / "results.json"
    env = {"XDG_CACHE_HOME": str(directory / "cache")}
    output = directory / f"{mutant}.output"
    child = host.Run(host.pytest_command(case.test, *pair[case.role], "--results", str(path)), env=env, output=output)
    try:
        child.process.wait(DEADLINE)
        assert path.exists(), child.output.read_text()
        return list(json.loads(path.read_text())["results"])
    finally:
        child.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mutant)
def test_mutant_fails_its_scenario_and_refwg_passes_it(tmp_path: Path, case: Case) -> None:
    if reason := Registry().get(HONEST).why_unavailable():
        pytest.skip(reason)
    broken = run(case, f"refwg+{case.mutant}", tmp_path)
    assert {entry["state"] for entry in broken} == {"failed"}
    assert all(case.cause in entry["message"] for entry in broken)
    whole = run(case, "refwg", tmp_path)
    assert {entry["state"] for entry in whole} == {"passed"}
