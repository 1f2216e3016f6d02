from __future__ import annotations

from harness.fuzz import inputs
from harness.fuzz.inputs import CUT, WRITE, Case, Change, Step
from harness.fuzz.reduction import ddmin, reduce_cases


def test_ddmin_keeps_only_items_that_are_needed() -> None:
    tried = []

    def fails(items: list[int]) -> bool:
        tried.append(items)
        return {3, 57, 58} <= set(items)

    assert ddmin(range(100), fails) == [3, 57, 58]
    assert len(tried) < 100


def test_ddmin_keeps_order_and_whole_list_when_all_is_needed() -> None:
    assert ddmin("abcd", lambda items: len(items) == 4) == ["a", "b", "c", "d"]


def test_ddmin_never_tries_empty_list() -> None:
    assert ddmin([1, 2], bool) == [2]
    assert ddmin([7], lambda _: True) == [7]


def test_cases_are_reduced_to_step_and_change_that_fail() -> None:
    bad = Change(WRITE, 4, b"\xff")
    needed = Step(inputs.DATA, b"x" * 64 + b"!" + b"y" * 63, 2**64 - 1, (Change(CUT, 90), bad, Change(CUT, 50)))
    cases = [Case("a", (Step(inputs.HOLD),) * 5) for _ in range(20)]
    cases[13] = Case("b", (Step(inputs.INITIATION), Step(inputs.WAIT, counter=9), needed, Step(inputs.HOLD)))

    def fails(tried: list[Case]) -> bool:
        steps = [step for case in tried for step in case.steps]
        hit = [number for number, step in enumerate(steps) if bad in step.changes and b"!" in step.argument]
        return bool(hit) and Step(inputs.INITIATION) in steps[: hit[0]]

    reduced = reduce_cases(cases, fails)
    assert reduced == [Case("b", (Step(inputs.INITIATION), Step(inputs.DATA, b"!", None, (bad,))))]


def test_two_cases_are_kept_when_both_are_needed() -> None:
    cases = [Case(name, (Step(inputs.HOLD), Step(inputs.TRIGGER))) for name in "abcd"]

    def fails(tried: list[Case]) -> bool:
        return {"b", "d"} <= {case.state for case in tried if Step(inputs.TRIGGER) in case.steps}

    assert reduce_cases(cases, fails) == [Case(name, (Step(inputs.TRIGGER),)) for name in "bd"]


def test_all_changes_are_left_out_at_once_when_none_is_needed() -> None:
    step = Step(inputs.DATA, changes=(Change(CUT, 1), Change(CUT, 2), Change(CUT, 3)))
    tried = []

    def fails(cases: list[Case]) -> bool:
        tried.append(cases)
        return True

    assert reduce_cases([Case("a", (step,))], fails) == [Case("a", (Step(inputs.DATA),))]
    assert len(tried) == 1


def test_zeros_at_end_of_argument_are_left_out_first() -> None:
    tried = []

    def fails(cases: list[Case]) -> bool:
        (step,) = cases[0].steps
        tried.append(step.argument)
        return step.argument.startswith(b"ab")

    assert reduce_cases([Case("a", (Step(inputs.DATA, b"ab" + bytes(9000)),))], fails)[0].steps[0].argument == b"ab"
    assert tried[0] == b"ab"
