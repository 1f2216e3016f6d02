"""Check results: the state that a test's reports add up to, and the file of results."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.errors import UsageError
from harness.plugin.remote import revive
from harness.report.results import STATES, Result, Results, artifacts_in, read_results
from harness.sandbox.launcher import REFUSED

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

NOT_SHOWN = "positive control failed: it lives: assert not 'dead'"
# A module with one test, the state that its reports add up to, and the message.
CASES = [
    ("def test(): pass", "passed", ""),
    ("def test(): assert not 'wrong'", "failed", "assert not 'wrong'"),
    ("def test(): raise SystemExit('at once')", "failed", "SystemExit: at once"),
    ("def test(): assert not 'XPASS(strict)'", "failed", "assert not 'XPASS(strict)'"),
    ("def test(): pytest.fail('[XPASS(strict)] y', pytrace=False)", "failed", "[XPASS(strict)] y"),
    ("def test(): raise DeadlineExceeded('waited 3 s')", "failed", "waited 3 s"),
    ("def test(): pytest.fail('Blocked: y')", "failed", "Blocked: y"),
    ("def test(broken): pass", "error", "OSError: no way"),
    ("def test(no_such): pass", "error", "fixture 'no_such' not found"),
    ("def test(not_undone): pass", "error", "OSError: undo"),
    ("def test(not_undone): assert not 'wrong'", "failed", "assert not 'wrong'"),
    ("@known\ndef test(): assert not 'wrong'", "xfailed", "assert not 'wrong'"),
    ("@known\ndef test(broken): pass", "xfailed", "OSError: no way"),
    ("@known\ndef test(not_undone): assert not 'wrong'", "xfailed", "OSError: undo"),
    ("@pytest.mark.xfail(reason='known', strict=False)\ndef test(): pass", "xpassed", "known"),
    ("@pytest.mark.xfail(reason='known', strict=True)\ndef test(): pass", "xpassed", "[XPASS(strict)] known"),
    (
        f"@pytest.mark.xfail(reason='{'known-' * 200}', strict=True)\ndef test(): pass",
        "xpassed",
        f"[XPASS(strict)] {'known-' * 200}",
    ),
    ("def test(): pytest.xfail('known')", "xfailed", "known"),
    ("def test(): pytest.skip('no net')", "skipped", "no net"),
    ("@pytest.mark.skip(reason='no net')\ndef test(): pass", "skipped", "no net"),
    ("def test(): pytest.skip('unsupported: roaming')", "skipped", "unsupported: roaming"),
    ("def test(): raise Unsupported('roaming')", "unsupported", "roaming"),
    ("def test(undeclared): pass", "unsupported", "roaming"),
    ("def test(refused): pass", "skipped", "Differs: roaming"),
    ("def test(): differs('1360 bytes, not 1359')", "differs", "1360 bytes, not 1359"),
    ("def test(not_undone): differs('1360 bytes, not 1359')", "error", "OSError: undo"),
    (
        "def test():\n  with twin('it lives'): assert not 'dead'",
        "blocked",
        NOT_SHOWN,
    ),
    ("def test():\n  with twin('x'): pytest.fail('y')", "blocked", "positive control failed: x: y"),
    ("def test(): not_reached('no cookie reply in 9 s')", "not_reached", "no cookie reply in 9 s"),
    ("def test():\n  with twin('x'): not_reached('no load')", "not_reached", "no load"),
    ("def test(): raise LoadNotReached('no cookie reply')", "not_reached", "no cookie reply"),
    ("def test():\n  with twin('x'): raise LoadNotReached('no load')", "not_reached", "no load"),
    ("def test():\n  with twin('it lives'): pytest.skip('no net')", "skipped", "no net"),
    ("def test():\n  with twin('it lives'): raise Unsupported('roaming')", "unsupported", "roaming"),
    (
        "def test():\n  with twin('it lives'): pass\n  assert not 'refused'",
        "failed",
        "assert not 'refused'",
    ),
]
MODULE = """
import pytest
from harness.errors import DeadlineExceeded, LoadNotReached, Unsupported
from harness.plugin.verdicts import differs, not_reached, twin

known = pytest.mark.xfail(reason="known")

@pytest.fixture
def broken(): raise OSError("no way")

@pytest.fixture
def refused(): pytest.skip("Differs: roaming")

@pytest.fixture
def undeclared(): raise Unsupported("roaming")

@pytest.fixture
def not_undone():
    yield
    raise OSError("undo")

"""


# Every test uses it: an inner pytest must not enter a sandbox.
@pytest.fixture(autouse=True)
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSED, "unit tests need no sandbox")


@pytest.fixture
def results() -> Results:
    return Results(7)


def run(pytester: pytest.Pytester, results: Results, *tests: str) -> list[Result]:
    """Run each test as its own module, all in one pytest, and add its reports to the results."""
    pytester.makepyfile(**{f"test_{number:02}": MODULE + test for number, test in enumerate(tests)})
    for report in pytester.inline_run("-q").getreports("pytest_runtest_logreport"):
        results.add(report)
    return list(results.by_id.values())


def test_reports_of_one_test_add_up_to_one_state(pytester: pytest.Pytester, results: Results) -> None:
    single_results = run(pytester, results, *(test for test, _, _ in CASES))
    states = [
        (test, result.state, result.message.split("\n", 1)[0])
        for (test, _, _), result in zip(CASES, single_results, strict=True)
    ]
    assert states == CASES
    assert {state for _, state, _ in states} <= set(STATES)


def test_result_survives_transfer_from_guest(pytester: pytest.Pytester, results: Results) -> None:
    pytester.makepyfile(
        "".join(f"{MODULE}{test.replace('test', f'test_{n}', 1)}\n" for n, (test, _, _) in enumerate(CASES))
    )
    config, there = pytester.parseconfig(), Results(7)
    for report in pytester.inline_run("-q").getreports("pytest_runtest_logreport"):
        there.add(report)
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        results.add(revive(config, json.loads(json.dumps(data))))
    assert results.by_id == there.by_id


def test_result_takes_its_facts_from_report_properties(pytester: pytest.Pytester, results: Results) -> None:
    facts = {"a": {"impl": "x", "version": "1"}, "b": {"impl": "y", "version": "2"}, "scenarios": ["N02"]}
    pytester.makeconftest(
        f"""
        import pytest
        from harness.report.results import set_facts

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(report): set_facts(report, {facts})
        """
    )
    (result,) = run(pytester, results, "def test(): pass")
    assert (result.id, result.pair, result.scenarios) == ("test_00.py::test", "x~y", ["N02"])


IMPLEMENTED: Final = """
import pytest

@pytest.mark.scenario("N02", "N03")
@pytest.mark.requirement("HS-07")
@pytest.mark.bug("IB-05")
def test_one(implementation, record_property):
    record_property("theirs", "kept")
    assert not "wrong"
"""


def junit_properties(path: Path) -> dict[str, dict[str, str]]:
    """Return the properties of each test case by file and test."""
    cases = ET.parse(path).iter("testcase")  # noqa: S314 - our own pytest wrote it
    return {
        f"{case.get('classname')}.{case.get('name')}": {
            str(entry.get("name")): str(entry.get("value")) for entry in case.iter("property")
        }
        for case in cases
    }


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_junit_file_has_result_as_properties(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    program = pytester.makefile("", program="#!/bin/sh\necho v1.5\n")
    program.chmod(0o755)
    tests = {f"test_{number:02}": MODULE + test for number, (test, _, _) in enumerate(CASES)}
    pytester.makepyfile(**tests, test_impl=IMPLEMENTED)
    pytester.runpytest_subprocess(
        f"--impl=mine={program}", "--seed=7", "--results=results.json", "--junit-xml=junit.xml", *workers
    )
    found = junit_properties(pytester.path / "junit.xml")
    assert {name: properties["wg.state"] for name, properties in found.items() if "impl" not in name} == {
        f"test_{number:02}.test": state for number, (_, state, _) in enumerate(CASES)
    }
    assert found["test_00.test"] == {"wg.lane": "core", "wg.kernel": os.uname().release, "wg.seed": "7"} | {
        "wg.state": "passed"
    }
    assert found["test_impl.test_one[mine]"] == {
        "theirs": "kept", "wg.impl.a": "mine", "wg.impl.a.version": "1.5", "wg.lane": "core",
        "wg.kernel": os.uname().release, "wg.seed": "7", "wg.state": "failed", "wg.scenarios": "N02 N03",
        "wg.requirements": "HS-07", "wg.bugs": "IB-05",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "shown"),
    [
        ({"impl": "x"}, {"impl": "y"}, "x~y"),
        ({"impl": "x"}, None, "x"),
        (None, None, ""),
    ],
)
def test_pair_lists_only_existing_sides(a: dict[str, str] | None, b: dict[str, str] | None, shown: str) -> None:
    assert Result(id="test", a=a, b=b).pair == shown


def test_seconds_of_all_phases_are_added(pytester: pytest.Pytester, results: Results) -> None:
    pytester.makepyfile("def test(): pass")
    for report in pytester.inline_run().getreports("pytest_runtest_logreport"):
        report.duration = 0.25
        results.add(report)
    assert [result.seconds for result in results.by_id.values()] == [0.75]


def written(results: Results, path: Path) -> Any:
    results.write(path)
    return json.loads(path.read_text())


def test_results_file_has_keys_of_schema_1(tmp_path: Path) -> None:
    results = Results(7)
    results.by_id["test", "core", ""] = Result(id="test", state="passed")
    document = written(results, tmp_path / "report" / "results.json")
    top = "schema seed date host run files complaint baseline bench results causes"
    assert list(document) == top.split()
    assert (document["schema"], document["seed"]) == (1, 7)
    assert datetime.now(UTC) - datetime.fromisoformat(document["date"]) < timedelta(minutes=1)
    assert read_results(tmp_path / "report" / "results.json").date == document["date"]
    assert {"kernel", "python"} <= document["host"].keys()
    keys = "id a b lane kernel state seconds scenarios requirements bugs message artifacts blame baseline"
    assert list(document["results"][0]) == keys.split()


def test_results_file_lists_failures_by_cause(tmp_path: Path) -> None:
    results, a, b = Results(7), {"impl": "x", "version": "1"}, {"impl": "y", "version": "1"}
    for n, (state, message) in enumerate(
        [("passed", ""), ("failed", "1 lost"), ("blocked", "2 lost"), ("xfailed", "3 lost")]
    ):
        facts = {"state": state, "message": message, "requirements": ["RT-11"], "bugs": ["IB-05"], "a": a, "b": b}
        results.by_id[f"t{n}", "core", ""] = Result(id=f"t{n}", **facts)  # type: ignore[arg-type]
    assert written(results, tmp_path / "results.json")["causes"] == [
        {"programs": ["x", "y"], "message": "1 lost", "tests": ["t1", "t2"], "requirements": ["RT-11"],
         "bugs": ["IB-05"]}
    ]  # fmt: skip


def test_old_results_file_is_replaced_without_leftover_files(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    assert written(Results(7), path)["results"] == []
    assert list(tmp_path.iterdir()) == [path]


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results(7)
    bare = Result(id="bare", state="passed")
    full = Result(
        id="full",
        a={"impl": "x", "version": "1"},
        b={"impl": "y", "version": "2"},
        lane="vm",
        kernel="6.1",
        state="failed",
        seconds=1.5,
        scenarios=["N02"],
        requirements=["RT-11"],
        bugs=["IB-05"],
        message="why",
        artifacts="evidence/full",
    )
    results.by_id = {(result.id, result.lane, result.kernel): result for result in (bare, full)}
    results.write(tmp_path / "results.json")
    restored = read_results(tmp_path / "results.json")
    assert (restored.seed, restored.host, restored.results) == (7, results.document()["host"], [bare, full])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schema": 2}, "schema 2 is not supported, only 1"),
        ({"seed": "7"}, "seed must be an integer, not '7'"),
        ({"host": []}, "host must be a table, not []"),
        ({"results": 5}, "results must be a list, not 5"),
        ({"results": [5]}, "results must be a list of tables"),
        ({"results": [{"id": 5}]}, "result 1: id must be a string, not 5"),
        ({"results": [{"id": "x", "a": "y"}]}, "result 1: a must be a table, not 'y'"),
        ({"results": [{"id": "x", "a": {"version": "1"}}]}, "result 1: a.impl is missing"),
        ({"results": [{"id": "x", "seconds": "1"}]}, "result 1: seconds must be a number, not '1'"),
        ({"results": [{"id": "x", "scenarios": [5]}]}, "result 1: scenarios must be a list of strings"),
    ],
)
def test_mistake_in_results_file_is_named_in_error(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(Results(7).document() | changes))
    with pytest.raises(UsageError) as refusal:
        read_results(path)
    assert str(refusal.value) == f"{path}: {complaint}"


def test_unknown_key_in_results_is_ignored_and_version_optional(tmp_path: Path) -> None:
    entry = {"id": "x", "a": {"impl": "y"}, "b": None, "moon": "full"}
    (tmp_path / "results.json").write_text(json.dumps(Results(7).document() | {"results": [entry]}))
    (result,) = read_results(tmp_path / "results.json").results
    assert result == Result(id="x", a={"impl": "y", "version": "unknown"})


@pytest.mark.parametrize(
    ("facts", "place"), [({"artifacts": "evidence/7"}, "evidence/7"), ({"artifacts": None}, ""), (None, "")]
)
def test_evidence_of_report_in_json_is_found(facts: dict[str, object] | None, place: str) -> None:
    assert artifacts_in({"outcome": "failed", "wg_interop": facts}) == place
