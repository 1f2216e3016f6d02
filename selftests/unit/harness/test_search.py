"""Check the search for the first bad version: what it finds, in how few steps, around versions that it skips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.search import Judgement, Range, narrow, steps_left

if TYPE_CHECKING:
    from collections.abc import Callable


def oracle(first: int, skipped: set[int], asked: list[int]) -> Callable[[int], Judgement]:
    """Judge as if `first` were the first bad one, and note what was asked."""

    def judge(index: int) -> Judgement:
        asked.append(index)
        if index in skipped:
            return Judgement.SKIP
        return Judgement.BAD if index >= first else Judgement.GOOD

    return judge


@given(st.integers(2, 200), st.data())
def test_search_finds_first_bad_in_logarithmic_steps(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, count - 1))
    asked: list[int] = []
    found = narrow(count, oracle(first, set(), asked))
    assert found.candidates == [first]
    assert len(asked) <= steps_left(count - 1)
    assert 0 not in asked
    assert count - 1 not in asked


@given(st.integers(2, 60), st.data())
def test_search_leaves_only_skipped_ones_before_first_bad(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, count - 1))
    skipped = data.draw(st.sets(st.integers(1, max(1, count - 2)))) - {count - 1}
    asked: list[int] = []
    found = narrow(count, oracle(first, skipped, asked))
    # By hand: the last good one that can be judged, and the first bad one after it that can.
    assert found.good == max(index for index in range(first) if index not in skipped)
    assert found.bad == min(index for index in range(first, count) if index not in skipped)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(("count", "steps"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_steps_left_is_number_of_halvings(count: int, steps: int) -> None:
    assert steps_left(count) == steps


def test_candidates_are_those_after_last_good_one() -> None:
    assert Range(2, 5).candidates == [3, 4, 5]
