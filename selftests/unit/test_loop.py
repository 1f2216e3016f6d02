from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from refwg import loop
from refwg.loop import Loop, SystemEnvironment, boot_clock

if TYPE_CHECKING:
    from refwg.device import Device


@pytest.mark.requirement("TM-31")
def test_the_clock_never_goes_back() -> None:
    first, second = boot_clock(), boot_clock()
    assert 0 < first <= second


def test_chance_and_the_time_of_day_are_those_of_the_system() -> None:
    environment = SystemEnvironment()
    assert len(environment.random_bytes(32)) == 32
    assert environment.random_bytes(32) != environment.random_bytes(32)
    assert environment.wall_clock() > 1_700_000_000 * 10**9


class Sleeper:
    """A device that counts how often it is told to forget its keys."""

    def __init__(self) -> None:
        self.forgotten = 0

    def forget_keys(self, now: int) -> None:
        del now
        self.forgotten += 1


@pytest.mark.requirement("TM-32")
@pytest.mark.parametrize(("asleep", "forgotten"), [(0, 0), (400_000_000, 0), (600_000_000, 1)])
def test_a_machine_that_was_asleep_forgets_its_keys_once(
    asleep: int, forgotten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, running = Sleeper(), object.__new__(Loop)
    running._device, running._sleep_seen = cast("Device", sleeper), 5
    monkeypatch.setattr(loop, "_time_asleep", lambda: 5 + asleep)
    for _ in range(3):
        running._notice_sleep()
    assert sleeper.forgotten == forgotten
