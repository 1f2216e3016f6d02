from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refwg.counter import ReplayWindow
from refwg.messages import COUNTER_WINDOW_SIZE, REJECT_AFTER_MESSAGES

# Steps forward and back, short and long, around the sizes of a word, of the window and of the ring.
STEPS = st.one_of(st.integers(-10, 10), st.integers(-9000, 9000), st.sampled_from([64, -64, 8128, -8128, -8129, 8192]))


@pytest.mark.requirement("DT-05", "DT-06")
@given(st.integers(0, REJECT_AFTER_MESSAGES), st.lists(STEPS, max_size=60))
def test_replay_window_agrees_with_set_of_counters(start: int, steps: list[int]) -> None:
    window, seen = ReplayWindow(), set[int]()
    counter = start
    for step in [0, *steps]:
        counter = max(0, counter + step)
        highest = max(seen, default=0)
        expected = counter < REJECT_AFTER_MESSAGES and counter not in seen and counter + COUNTER_WINDOW_SIZE >= highest
        assert window.is_fresh(counter) is expected
        if expected:
            window.accept(counter)
            seen.add(counter)
