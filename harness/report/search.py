"""Find the first bad one of an ordered list by halving it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Judgement(Enum):
    """What a test said of a version; SKIP: it could not be built or tested."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Range:
    """Where a list turns bad: `good` is the index of the last good one, `bad` that of the first known bad one."""

    good: int
    bad: int

    @property
    def candidates(self) -> list[int]:
        """Indexes of those that may be the first bad one; those before the last of them were skipped."""
        return list(range(self.good + 1, self.bad + 1))


def narrow(count: int, judge: Callable[[int], Judgement]) -> Range:
    """Narrow down where a list of `count` turns bad, whose first is good and whose last is bad.

    judge: called at most once for each index between; of those that are left, for the one nearest to the middle.
    """
    found, skipped = Range(0, count - 1), set[int]()
    while left := [index for index in found.candidates[:-1] if index not in skipped]:
        middle = (found.good + found.bad) / 2
        index = min(left, key=lambda candidate: abs(candidate - middle))
        judgement = judge(index)
        if judgement is Judgement.GOOD:
            found = Range(index, found.bad)
        elif judgement is Judgement.BAD:
            found = Range(found.good, index)
        else:
            skipped.add(index)
    return found


def steps_left(count: int) -> int:
    """Return how many more judgements `count` candidates need at most, if none is skipped."""
    return max(0, count - 1).bit_length()
