from __future__ import annotations

import pytest

from refwg.counter import ReplayWindow
from refwg.messages import COUNTER_WINDOW_SIZE as WINDOW
from refwg.messages import REJECT_AFTER_MESSAGES as LIMIT


def verdicts(counters: list[int]) -> list[bool]:
    """Whether each of these counters is accepted, one after the other."""
    window, answers = ReplayWindow(), []
    for counter in counters:
        answers.append(window.is_fresh(counter))
        if answers[-1]:
            window.accept(counter)
    return answers


@pytest.mark.requirement("DT-06")
def test_replay_window_follows_sequence_of_catalogue() -> None:
    before = [(0, True), (1, True), (1, False), (9, True), (8, True), (7, True), (7, False)]
    at_the_edge = [(8129, True), (8128, True), (8128, False), (8127, True), (2, True), (2, False)]
    after = [(8145, True), (3, False), (8145, False), (32516, True), (24388, True), (10, False)]
    counters, expected = zip(*before, *at_the_edge, *after, strict=True)
    assert verdicts(list(counters)) == list(expected)


@pytest.mark.requirement("DT-05")
@pytest.mark.parametrize(("behind", "is_taken"), [(0, False), (WINDOW - 1, True), (WINDOW, True), (WINDOW + 1, False)])
def test_replay_window_ends_8128_behind_greatest_counter(behind: int, is_taken: bool) -> None:
    assert verdicts([100_000, 100_000 - behind]) == [True, is_taken]


@pytest.mark.requirement("DT-03", "DT-04")
def test_late_counters_are_taken_exactly_once() -> None:
    late = list(range(1000, 0, -1))
    assert verdicts([0, 1001, *late, *late]) == [True] * 1002 + [False] * 1000


@pytest.mark.requirement("DT-06")
@pytest.mark.parametrize("jump", [63, 64, 65, 8127, 8128, 8191, 8192, 8193, 100_000])
def test_counter_jump_clears_bits_of_skipped_counters(jump: int) -> None:
    start = 20_000
    taken = verdicts([*range(start), start + jump, *range(start + jump)])[start + 1 :]
    assert taken == [start <= counter and counter >= start + jump - WINDOW for counter in range(start + jump)]


@pytest.mark.requirement("DT-08")
@pytest.mark.parametrize(("counter", "is_taken"), [(LIMIT - 1, True), (LIMIT, False), (2**64 - 1, False)])
def test_counters_from_reject_after_messages_on_are_refused(counter: int, is_taken: bool) -> None:
    assert verdicts([counter]) == [is_taken]


@pytest.mark.requirement("DT-10")
def test_replay_window_is_exhausted_after_last_counter() -> None:
    window = ReplayWindow()
    window.accept(LIMIT - 2)
    assert not window.is_exhausted
    window.accept(LIMIT - 1)
    assert window.is_exhausted
