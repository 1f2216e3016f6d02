"""The check that a wait under warp took as long as it was to take."""

from __future__ import annotations

import pytest

from ci import vm_clock
from ci.vm_clock import SECOND, ClockRanOff, passes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The readings still to come."""
    readings: list[int] = []
    monkeypatch.setattr(vm_clock, "boottime", lambda: readings.pop(0))
    return readings


@pytest.mark.parametrize("passed", [119, 120, 121])
def test_wait_within_a_second_of_the_expected_is_fine(clock: list[int], passed: int) -> None:
    clock += [7 * SECOND, (7 + passed) * SECOND]
    with passes(120 * SECOND):
        pass


@pytest.mark.parametrize("passed", [118, 190])
def test_wait_of_another_length_is_an_error_of_the_lane(clock: list[int], passed: int) -> None:
    clock += [7 * SECOND, (7 + passed) * SECOND]
    with (
        pytest.raises(ClockRanOff, match=rf"^{passed}\.000 s passed on the guest's clock, and not 120\.000 s$"),
        passes(120 * SECOND),
    ):
        pass


def test_failure_inside_is_the_one_that_is_told(clock: list[int]) -> None:
    clock += [0, 500 * SECOND]
    with pytest.raises(ZeroDivisionError), passes(SECOND):
        _ = 1 / 0
