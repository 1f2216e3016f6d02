"""Check the JSON schema of results.json against the records that write the file, and against mistakes."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest
from jsonschema import Draft202012Validator

from harness.lanes import GUESTS, HERE
from harness.report.results import BESIDE, STATES, Invocation, Result, Results
from selftests.support.results_schema import SCHEMA, faults, faults_of

pytest_plugins = ["pytester"]

PAGE: Final = Path(__file__).parents[3] / "docs" / "results.md"
TESTS: Final = """
import pytest
def test_good(): pass
def test_bad(): assert "moon" == "cheese"
@pytest.mark.skip(reason="no x; install x")
def test_skipped(): pass
@pytest.mark.xfail
def test_known(): assert False
@pytest.mark.xfail
def test_fixed(): pass
@pytest.fixture
def broken(): raise OSError(2, "gone")
def test_error(broken): pass
"""


def document() -> dict[str, Any]:
    """What results.py writes of a failure, a test of one implementation, and a test of none."""
    results = Results(7, Invocation(root="/x", programs={"mine": "/x/wg"}, kernels={"6.1.0": "6.1"}))
    mine, other = {"impl": "mine", "version": "1", "like": "wireguard-go"}, {"impl": "refwg", "version": "unknown"}
    for number, (a, b) in enumerate(((mine, other), (mine, None), (None, None))):
        result = Result(id=f"t.py::test[{number}]", a=a, b=b, state="failed", message="lost", requirements=["HS-08"])
        results.by_id[result.id, result.lane, result.kernel] = result
    return json.loads(json.dumps(results.document(["index.html"])))  # type: ignore[no-any-return]


def properties(name: str) -> set[str]:
    return {*SCHEMA["$defs"][name]["properties"]}


def test_schema_is_valid_itself() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_document_of_records_follows_schema() -> None:
    assert faults(document()) == []


def test_schema_describes_every_key_of_records() -> None:
    assert properties("result") == {field.name for field in fields(Result)} == {*SCHEMA["$defs"]["result"]["required"]}
    assert properties("run") == {field.name for field in fields(Invocation)} == {*SCHEMA["$defs"]["run"]["required"]}
    written = document()
    assert {*SCHEMA["properties"]} == written.keys() == {*SCHEMA["required"]}
    assert properties("host") == written["host"].keys()
    assert properties("cause") == written["causes"][0].keys()


def test_page_explains_every_key_of_schema() -> None:
    text = PAGE.read_text()
    keys = {*SCHEMA["properties"], *properties("result"), *(f"run.{name}" for name in properties("run"))}
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_schema_names_every_state_lane_and_file() -> None:
    assert SCHEMA["$defs"]["state"]["enum"] == [*STATES]
    assert SCHEMA["$defs"]["result"]["properties"]["lane"]["enum"] == [*HERE, *GUESTS]
    assert SCHEMA["properties"]["files"]["items"]["enum"] == [*BESIDE]


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (["schema"], 2, "$.schema: 1 was expected"),
        (["results", 0, "state"], "broken", "$.results[0].state: 'broken' is not one of"),
        (["results", 0, "id"], "", "$.results[0].id: '' should be non-empty"),
        (["results", 0, "seconds"], -1, "$.results[0].seconds: -1 is less than the minimum of 0"),
        (["results", 0, "a"], {"impl": "mine"}, "$.results[0].a: 'version' is a required property"),
        (["results", 0, "a"], None, "$.results[0].b: "),
        (["results", 0, "requirements"], "HS-08", "$.results[0].requirements: 'HS-08' is not of type 'array'"),
        (["run", "programs"], {"mine": 1}, "$.run.programs.mine: 1 is not of type 'string'"),
        (["causes", 0, "tests"], [], "$.causes[0].tests: [] should be non-empty"),
    ],
)
def test_schema_refuses_wrong_value(path: list[str | int], value: object, fault: str) -> None:
    wrong = deepcopy(document())
    place: Any = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (found,) = faults(wrong)
    assert found.startswith(fault)


def test_results_of_run_follow_schema(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "--results", "results.json")
    path = pytester.path / "results.json"
    assert faults_of(path) == []
    states = [result["state"] for result in json.loads(path.read_text())["results"]]
    assert sorted(states) == ["error", "failed", "passed", "skipped", "xfailed", "xpassed"]
