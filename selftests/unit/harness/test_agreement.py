"""Find tests that pass in one lane or on one kernel, and fail in another."""

from __future__ import annotations

from harness.report.agreement import disagreements
from harness.report.results import Result

NAME = "t.py::test_it[kernel~mine]"


def result(lane: str, state: str, *, kernel: str = "", version: str = "1", name: str = NAME) -> Result:
    a = {"impl": "kernel", "version": kernel}
    return Result(id=name, a=a, b={"impl": "mine", "version": version}, lane=lane, kernel=kernel, state=state)


def test_test_that_passes_here_and_fails_there_is_named() -> None:
    (found,) = disagreements(
        [
            result("vm", "passed", kernel="6.1"),
            result("vm", "failed", kernel="6.12"),
            result("warp", "error", kernel="6.1"),
            result("core", "passed"),
        ]
    )
    assert str(found) == (f"{NAME} passes in vm, Linux 6.1 and core, and fails in vm, Linux 6.12 and warp, Linux 6.1")


def test_equal_results_and_those_of_other_programs_agree() -> None:
    assert disagreements([result("netns", "passed"), result("vm", "passed", kernel="6.1")]) == []
    assert disagreements([result("netns", "passed"), result("vm", "failed", version="2")]) == []
    assert (
        disagreements([result("netns", "passed"), result("vm", "failed", name="t.py::test_other[kernel~mine]")]) == []
    )


def test_test_that_did_not_run_or_differs_disagrees_with_none() -> None:
    states = ("skipped", "unsupported", "differs", "xfailed", "blocked", "flaky")
    for decided in ("failed", "passed"):
        assert disagreements([result("netns", decided), *(result("vm", state) for state in states)]) == []


def test_test_without_implementation_is_compared_by_its_id() -> None:
    results = [
        Result(id="t.py::test_x", lane=lane, state=state) for lane, state in (("netns", "passed"), ("vm", "failed"))
    ]
    assert [found.bad for found in disagreements(results)] == [("vm",)]
