"""Check what the command line of bench/run selects, and what an interrupted run writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench import runner
from bench.catalogue import FULL, MEASUREMENTS, Measurement, chosen, measured_by
from bench.figures import Figure
from bench.latency import percentile, summary
from harness import HarnessError, Registry, UsageError
from selftests.support.floods import quiet

if TYPE_CHECKING:
    from pathlib import Path

    from bench.catalogue import Task

FIGURE = Figure(name="pace", title="Pace", unit="s", group="pace")


def measurement(run: list[float | BaseException]) -> Measurement:
    """Make a measurement that returns or raises one of these at each call."""

    def step(_: Task) -> dict[str, float]:
        value = run.pop(0)
        if isinstance(value, BaseException):
            raise value
        return {"pace": value}

    return Measurement(name="pace", title="Pace", figures=(FIGURE,), run=step)


def plan(measured: Measurement, rounds: int) -> runner.Plan:
    """Make a plan of two implementations."""
    asked = tuple(map(Registry().get, ("refwg", "refwg+simple")))
    return runner.Plan(asked=asked, measurements=(measured,), rounds=rounds, effort=FULL, baseline="refwg")


def test_rounds_measure_implementations_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    run = runner.Run(plan(measurement([1.0, 2.0, 3.0, 4.0]), 2), json_file=None, html_file=None)
    run.measure()
    assert run.results.values == {("pace", "refwg"): {1: 1.0, 2: 3.0}, ("pace", "refwg+simple"): {1: 2.0, 2: 4.0}}
    assert "round 2 of 2 is measured" in capsys.readouterr().out


def test_failed_measurement_does_not_end_run() -> None:
    run = runner.Run(plan(measurement([1.0, HarnessError("no route")]), 1), json_file=None, html_file=None)
    run.measure()
    assert run.results.failures == [{"round": 1, "measurement": "pace", "impl": "refwg+simple", "message": "no route"}]
    assert run.results.last("pace", "refwg") == 1.0


def test_interrupted_run_writes_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(runner, "_plan", lambda _: plan(measurement([1.0, 2.0, 3.0, KeyboardInterrupt()]), 3))
    monkeypatch.setattr(sys, "argv", ["bench/run", "--json", str(file)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert runner.main() == 130
    content = json.loads(file.read_text())
    assert content["interrupted"] is True
    assert [run["values"] for run in content["runs"]] == [[1.0, 3.0], [2.0]]
    assert content["ratios"] == {"pace_refwg_over_refwg_simple": 0.5}
    assert "interrupted" in (tmp_path / "out.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]


def test_only_selects_measurements_in_their_own_order() -> None:
    assert [made.name for made in chosen(["udp64", "tcp1", "udp64"], quick=True)] == ["tcp1", "udp64"]


def test_quick_leaves_out_long_measurements() -> None:
    assert {made.name for made in chosen([], quick=True)} < {made.name for made in chosen([], quick=False)}


def test_unknown_measurement_is_refused_with_known_ones() -> None:
    with pytest.raises(UsageError, match=r"--only tcp: no such measurement; there are: tcp1, tcp1_back"):
        chosen(["tcp"], quick=False)


def test_figure_names_are_unique() -> None:
    names = [figure.name for measured in MEASUREMENTS for figure in measured.figures]
    assert sorted(set(names)) == sorted(names)


def test_measurement_of_refwg_includes_its_engines_only() -> None:
    asked = list(map(Registry().get, ("refwg", "refwg+simple", "wireguard-go")))
    floods = next(made for made in MEASUREMENTS if made.name == "floods")
    assert [made.name for made in measured_by(floods, asked)] == ["refwg", "refwg+simple"]


def test_quiet_program_logs_neither_events_nor_keys() -> None:
    refwg = quiet(Registry().get("refwg"), GOMAXPROCS="1")
    assert refwg.env == {"LOG_LEVEL": "error", "GOMAXPROCS": "1"}
    assert refwg.key_log == ()
    gotatun = Registry().get("gotatun")
    assert quiet(gotatun).env == {**gotatun.env, "WG_LOG_LEVEL": "error"}
    mine = replace(gotatun, env={"FORMAT": "json"})
    assert quiet(mine).env == {"FORMAT": "json"}


@pytest.mark.parametrize(("percent", "value"), [(50, 5.0), (90, 9.0), (99, 10.0), (1, 1.0)])
def test_percentile_is_value_of_nearest_rank(percent: int, value: float) -> None:
    assert percentile([float(number) for number in range(10, 0, -1)], percent) == value


def test_round_trip_of_tunnel_that_loses_most_is_refused() -> None:
    with pytest.raises(HarnessError, match="ping: 4 of 10 requests were answered"):
        summary("ping_idle", [1.0] * 4, 10)
    assert summary("ping_idle", [1.0] * 5, 10)["ping_idle_avg"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--impl", "refwg", "--baseline", "gotatun"], "--baseline gotatun: it is not measured; add --impl gotatun"),
        (["--impl", "wireguard"], "unknown implementation 'wireguard'"),
    ],
)
def test_wrong_command_line_ends_with_status_2(arguments: list[str], message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bench.runner", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 2
    assert message in ended.stderr
