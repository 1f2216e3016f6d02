"""Check the table of kernel defects, and how the results of a killer are judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.cli.kernel_defects import Defect, choose, judge, read_defects
from harness.errors import UsageError
from harness.report.citations import read_citations
from harness.report.results import Result
from harness.vm.driver import Replacement
from harness.vm.kernels import CATALOGUE

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]
KERNEL, DEFECTS = read_defects(ROOT)
KILLER = "selftests/netns/test_it.py::test_it"
CHANGE = Replacement(file="netlink.c", text="a", replacement="b")
DEFECT = Defect(name="wrong", requirements=("X-1",), change=CHANGE, killer=KILLER)


def result(state: str, name: str = "kernel", test: str = KILLER) -> Result:
    return Result(id=f"{test}[{name}]", state=state, requirements=["X-1"], message="said", seconds=1.5)


def test_kernel_of_table_is_known_and_names_are_unique() -> None:
    assert KERNEL in CATALOGUE.kernels
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_killer_cites_requirement_of_defect(defect: Defect) -> None:
    citations = read_citations(ROOT)
    assert any(defect.killer in citations.get(name, ()) for name in defect.requirements)
    assert defect.change.text != defect.change.replacement


@pytest.mark.parametrize(
    ("control", "ours", "reason"),
    [
        (["passed"], ["failed"], ""),
        (["passed"], ["differs"], ""),
        (["passed", "passed"], ["passed", "failed"], ""),
        (["passed"], ["passed"], f"{KILLER} is passed"),
        (["passed"], ["error"], f"{KILLER} is error"),
        (["differs"], ["differs"], f"{KILLER}[kernel] is differs with the driver as it is, too: said"),
    ],
)
def test_defect_is_caught_if_killer_fails_only_with_it(control: list[str], ours: list[str], reason: str) -> None:
    found = judge(DEFECT, [result(state) for state in control], [result(state) for state in ours])
    assert (found.caught, found.tested, found.reason) == (not reason, True, reason)
    assert found.cited == (("X-1",) if found.by else ())


@pytest.mark.parametrize(
    ("control", "ours"),
    [([], [result("failed")]), ([result("passed")], []), ([result("passed", test="other")], [result("failed")])],
)
def test_killer_that_did_not_run_decides_nothing(control: Sequence[Result], ours: Sequence[Result]) -> None:
    found = judge(DEFECT, control, ours, "vm: the guest hung")
    assert (found.caught, found.tested, found.reason) == (False, False, "vm: the guest hung")


def test_unknown_defect_is_refused_by_name() -> None:
    assert choose([DEFECT], []) == choose([DEFECT], ["wrong"]) == [DEFECT]
    with pytest.raises(UsageError, match=r"^no kernel defect right; there are: wrong$"):
        choose([DEFECT], ["right"])
