"""Run bench/run for short measurements, and check what it leaves."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from bench import handshakes, runner
from bench.tunnels import connected, laboratory
from harness import Registry, offloads
from harness.net.netns import leftover_nodes

if TYPE_CHECKING:
    from pathlib import Path

# bench/run makes labs of its own; the fixture puts the test into the sandbox.
pytestmark = pytest.mark.usefixtures("lab")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs bench/run with these arguments, and returns the content of its JSON file."""

    def run(*arguments: str, status: int = 0) -> dict[str, Any]:
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["bench/run", "--rounds", "1", "--quick", "--json", str(file), *arguments])
        assert runner.main() == status
        assert "<svg" in file.with_suffix(".html").read_text()
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    return run


def values(content: dict[str, Any]) -> dict[str, int]:
    """Return how many positive values each run of the content has."""
    return {run["name"]: sum(value > 0 for value in run["values"]) for run in content["runs"]}


def test_bench_measures_engine_of_refwg_beside_refwg(measured: Any) -> None:
    content = measured("--impl", "refwg", "--impl", "refwg+simple", "--only", "tcp1,ping_idle,start")
    names = [
        *("tcp1", "tcp1_cpu", "tcp1_cpu_sender", "tcp1_cpu_receiver", "tcp1_memory"),
        *(f"ping_idle_{kind}" for kind in ("avg", "p50", "p90", "p99")),
        *("start", "start_cpu", "start_memory"),
    ]
    assert values(content) == {f"{name}_{program}": 1 for name in names for program in ("refwg", "refwg_simple")}
    # The same program: what differs more is a mistake of the measurement.
    assert 0.1 < content["ratios"]["tcp1_cpu_refwg_over_refwg_simple"] < 10
    assert content["failures"] == []
    assert leftover_nodes() == []


def test_bench_searches_rate_and_counts_handshakes(measured: Any) -> None:
    content = measured("--impl", "refwg", "--only", "udp1400,handshakes")
    counts = values(content)
    assert counts["udp1400_refwg"] == counts["handshakes_refwg"] == counts["handshakes_by_clock_refwg"] == 1


def test_program_that_ends_at_its_start_is_reported(measured: Any, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho no such flag >&2; exit 3\n")
    program.chmod(0o755)
    content = measured("--impl", "refwg", "--impl", f"mine={program}", "--only", "start", "--rounds", "2", status=1)
    assert values(content) == {f"{name}_refwg": 2 for name in ("start", "start_cpu", "start_memory")}
    assert [(failure["impl"], failure["round"]) for failure in content["failures"]] == [("mine", 1), ("mine", 2)]
    assert "no such flag" in content["failures"][0]["message"]


def test_response_of_device_without_its_key_is_no_handshake() -> None:
    with handshakes.crowd_and_device(Registry().get("refwg"), None) as (crowd, _):
        peer = crowd.peers[0]
        peer.initiate()
        ((_, response),) = crowd.answers(5.0)
        assert not peer.complete(response[:-40] + bytes([response[-40] ^ 1]) + response[-39:])
        assert peer.complete(response)


def test_veth_pair_has_its_offloads_and_no_capture() -> None:
    with laboratory() as lab:
        nodes = connected(lab)
        for node in nodes.values():
            assert {name for name, on in offloads(node, "veth0").items() if on} >= {"tx", "sg", "tso", "gso"}
        assert lab.captures == []
