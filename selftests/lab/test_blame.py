"""Check `--blame` end to end: failed tests are run again with other pairs, and the culprit is named."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from harness import V4_OF_B, Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("inner_pytest")

# The port of A changes, so B must follow it. refwg+no-roaming does not, and sends its reply to the old port.
ROAMS = f"""
from harness import DeviceConfig

def test_b_follows_a(loopback):
    loopback.must_ping("ns1", "{V4_OF_B}")
    loopback.a.set(DeviceConfig(listen_port=9998))
    loopback.nodes["ns1"].run(["ping", "-c1", "-W0.5", "{V4_OF_B}"], check=False)
    assert str(loopback.seen_by_b().endpoint) == "127.0.0.1:9998"
"""
# Fails when it is run for the first time; a file beside it says that it was.
FLAKY = """
from pathlib import Path

def test_it(lab, implementation):
    mark = Path(__file__).with_name("mark")
    was_there = mark.exists()
    mark.touch()
    assert was_there, "the first run fails"

def test_other(lab, implementation):
    assert implementation.name == "refwg", "not refwg"
"""
# Two tests of one cause. The longer one, which comes first, does not end when it is run again.
SLOW = """
import subprocess
from pathlib import Path
from threading import Event

def test_long(lab, implementation):
    for _ in range(99):
        subprocess.run(["true"])
    mark = Path(__file__).with_name("mark")
    was_there = mark.exists()
    mark.touch()
    if was_there:
        Event().wait()
    assert False, "it is not refwg"

def test_short(lab, implementation):
    assert implementation.name == "refwg", "it is not refwg"
"""
NO_ROAMING = "refwg+no-roaming"
PEER = "wireguard-go-debian"


def results(pytester: pytest.Pytester) -> list[dict[str, Any]]:
    """The results of the tests, without those that the oracle adds."""
    found: list[dict[str, Any]] = json.loads((pytester.path / "report" / "results.json").read_text())["results"]
    return [result for result in found if not result["id"].startswith("oracle::")]


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_it=source)
    return pytester.runpytest_inprocess(*options)


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pytest that runs the tests again import the same harness."""
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))


def shape(blame: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(rerun["pair"], rerun["state"]) for rerun in blame["reruns"]]


def test_program_that_deviates_as_b_is_to_blame(pytester: pytest.Pytester) -> None:
    if reason := Registry().get(PEER).why_unavailable():
        pytest.skip(reason)
    # `wg-interop run` gives pytest the directory of its cache.
    cache = f"-ocache_dir={pytester.path / 'cache'}"
    outcome = run(pytester, ROAMS, f"--pair={PEER}~{NO_ROAMING}", "--blame", "--seed=7", cache)
    assert outcome.ret == pytest.ExitCode.TESTS_FAILED
    (result,) = results(pytester)
    blame = result["blame"]
    assert (result["state"], blame["verdict"], blame["programs"]) == ("failed", "b_does_not_tolerate", [NO_ROAMING])
    assert shape(blame) == [
        (f"{PEER}~{NO_ROAMING}", "failed"),
        (f"{PEER}~refwg", "passed"),
        (f"refwg~{NO_ROAMING}", "failed"),
        ("refwg~refwg", "passed"),
        (f"{NO_ROAMING}~{PEER}", "passed"),
    ]
    # The sixth datagram is the reply to the second ping.
    ways = [f"from 127.0.0.1:2 to 127.0.0.1:{port}" for port in (9998, 1)]
    assert blame["wire"] == f"message 6: in refwg~refwg B sends data {ways[0]}, here {ways[1]}"
    for rerun in blame["reruns"]:
        kept = (pytester.path / "report" / rerun["artifacts"] / "ns0-lo.pcapng").exists()
        assert kept == (rerun["state"] == "failed" or rerun["pair"] == "refwg~refwg")
    outcome.stdout.fnmatch_lines(["*who is to blame*", f"B DOES NOT TOLERATE IT *{NO_ROAMING} does not tolerate it*"])
    page = (pytester.path / "report" / "index.html").read_text()
    assert f"to blame: <b>{NO_ROAMING}</b>" in page


def test_test_that_passes_when_run_again_is_flaky(pytester: pytest.Pytester) -> None:
    outcome = run(pytester, FLAKY, f"--impl={NO_ROAMING}", "--blame")
    assert outcome.ret == pytest.ExitCode.TESTS_FAILED
    flaky, deviating = results(pytester)
    assert (flaky["state"], flaky["blame"]["first"], flaky["blame"]["programs"]) == ("flaky", "failed", [])
    assert "the first run fails" in flaky["message"]
    assert shape(flaky["blame"]) == [(NO_ROAMING, "passed"), ("refwg", "passed")]
    assert (deviating["state"], deviating["blame"]["programs"]) == ("failed", [NO_ROAMING])
    assert shape(deviating["blame"]) == [(NO_ROAMING, "failed"), ("refwg", "passed")]


def test_test_that_was_not_run_again_is_blamed_like_shorter_one(pytester: pytest.Pytester) -> None:
    run(pytester, SLOW, f"--impl={NO_ROAMING}", "--blame", "--blame-seconds=12")
    late, short = results(pytester)
    assert shape(short["blame"]) == [(NO_ROAMING, "failed"), ("refwg", "passed")]
    assert (short["blame"]["verdict"], short["blame"]["inferred"]) == ("a_deviates", False)
    assert (late["blame"]["verdict"], late["blame"]["programs"]) == ("a_deviates", [NO_ROAMING])
    assert late["blame"]["inferred"]
    assert late["blame"]["text"].endswith("like the other tests of this cause; not run again itself")


@pytest.mark.parametrize(
    ("options", "blame"),
    [((), None), (("--blame", "--no-blame"), None), (("--blame", "--blame-seconds=0"), "the 0 s for that were over")],
    ids=["default", "no-blame", "no-time"],
)
def test_failure_is_not_run_again(pytester: pytest.Pytester, options: tuple[str, ...], blame: str | None) -> None:
    run(pytester, FLAKY, f"--impl={NO_ROAMING}", "-k", "not other", *options).assert_outcomes(failed=1)
    (result,) = results(pytester)
    assert result["state"] == "failed"
    if blame is None:
        assert result["blame"] is None
    else:
        assert blame in result["blame"]["text"]
    assert not (pytester.path / "report" / "evidence" / "again").exists()
