"""Check `differs` and `not_reached`: what allows a difference, and what fails a run."""

from __future__ import annotations

import json
from typing import Final

import pytest
from _pytest.outcomes import Failed

from harness import suite
from harness.plugin.verdicts import Differs, differs
from selftests.support.inner_pytest import FAILED, LAB, OK, add_catalogue, leave_outer_run, refuse_sandbox

pytest_plugins = ["pytester"]

outside = pytest.fixture(leave_outer_run, autouse=True)
refused = pytest.fixture(refuse_sandbox)

LEVELS: Final = """
[[requirement]]
id = "ROB-04"
title = "loop"
level = "must"
[[requirement]]
id = "MTU-04"
level = "should"
[[requirement]]
id = "MTU-03"
level = "should"
"""
N12: Final = '[[scenario]]\nid = "N12"\nexpect = "1359, or 1360: differs"\n[[scenario]]\nid = "N01"\n'
NO_NAME: Final = (
    'ROB-04 (loop) allows no difference; name the should or the scenario that does: differs(..., requirement="ID") or '
    'scenario="ID"'
)


@pytest.mark.parametrize("by", [["kernel"], ["wireguard-go", "refwg"]])
def test_difference_of_kernel_or_refwg_is_failure(by: list[str]) -> None:
    with pytest.raises(Failed, match=f"^{by[-1]}: 1360 bytes, not 1359"):
        differs("1360 bytes, not 1359", by=by)
    with pytest.raises(Differs, match=r"^1360 bytes, not 1359"):
        differs("1360 bytes, not 1359", by=["wireguard-go"])


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("", NO_NAME),
        ("requirement='MTU-04'", None),
        ("scenario='N12'", None),
        ("requirement='ROB-04'", "ROB-04 (loop) is not a should"),
        ("requirement='MTU-03'", "the test does not cite requirement MTU-03"),
        ("scenario='N01'", "the text of scenario N01 has no word `differs`"),
    ],
)
@pytest.mark.parametrize("place", ["body", "parameter"])
def test_difference_needs_should_or_scenario_that_allows_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, named: str, why: str | None, place: str
) -> None:
    folder = add_catalogue(pytester, monkeypatch)
    (folder / "requirements.toml").write_text(LEVELS)
    (folder / "netns-scenarios.toml").write_text(N12)
    marks = ["requirement('ROB-04', 'MTU-04')", "scenario('N12', 'N01')"]
    texts = ", ".join(f"pytest.mark.{mark}" for mark in marks)
    above = "".join(f"@pytest.mark.{mark}\n" for mark in marks) if place == "body" else ""
    inside = "" if place == "body" else f", marks=[{texts}]"
    pytester.makepyfile(
        "import pytest\nfrom harness import differs\n"
        f"{above}@pytest.mark.parametrize('n', [pytest.param(1{inside})])\n"
        f"def test_it(n): differs('1360 bytes, not 1359', {named})\n"
    )
    pytester.runpytest_inprocess("--lane", "core", "--results", "results.json")
    (result,) = json.loads((pytester.path / "results.json").read_text())["results"]
    name = named.partition("=")[2].strip("'")
    message = f"1360 bytes, not 1359 (allowed by {name})" if name else "1360 bytes, not 1359"
    if why is None:
        assert (result["state"], result["message"]) == ("differs", message)
    else:
        assert (result["state"], result["message"].partition("\n")[0]) == ("failed", f"{message}; {why}")


@pytest.mark.usefixtures("refused")
def test_difference_in_test_of_shoulds_needs_no_name(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (add_catalogue(pytester, monkeypatch) / "requirements.toml").write_text(LEVELS)
    pytester.makepyfile("""
        import pytest
        from harness import differs
        @pytest.mark.requirement("MTU-03", "MTU-04")
        def test_it(): differs("1360 bytes, not 1359")
    """)
    pytester.runpytest_inprocess("--lane", "core", "--results", "results.json")
    (result,) = json.loads((pytester.path / "results.json").read_text())["results"]
    assert result["state"] == "differs"


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_difference_is_printed_and_does_not_fail_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "harness.plugin,xdist.plugin")
    pytester.makepyfile(
        f"from harness.plugin.verdicts import differs\n{LAB}\ndef test_it(): differs('1360 bytes, not 1359')"
    )
    run = pytester.runpytest_subprocess("--lane", "core", "--results", "results.json", *workers)
    assert run.ret == OK
    assert {"passed": 1, "differs": 1}.items() <= run.parseoutcomes().items()
    run.stdout.fnmatch_lines("DIFFERS *.py::test_it - 1360 bytes, not 1359")
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert {entry["state"]: entry["message"] for entry in results} == {"passed": "", "differs": "1360 bytes, not 1359"}


@pytest.mark.usefixtures("refused")
def test_state_not_reached_fails_run_and_may_be_expected(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (
        'test="*test_expected*"\nversions="*"\nrequirement="DOS-04"\nobserved="no cookie"\nmessage="no load"\nlink="x"'
    )
    pytester.mkdir("selftests").joinpath("expectations").mkdir()
    monkeypatch.setenv(suite.SUITE, str(pytester.path))
    (pytester.path / "selftests/expectations/mine.toml").write_text(f"[[expect]]\n{expected}\n")
    program = pytester.makefile("", program="#!/bin/sh\necho v1.5\n")
    program.chmod(0o755)
    pytester.makepyfile("""
        from harness import not_reached
        def test_it(implementation): not_reached("no load in 9 s")
        def test_expected(implementation): not_reached("no load in 9 s")
        def test_pass(): pass
    """)
    run = pytester.runpytest_inprocess(f"--impl=mine={program}", "--results", "results.json")
    assert run.ret == FAILED
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert [result["state"] for result in results] == ["not_reached", "xfailed", "passed"]
