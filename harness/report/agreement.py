"""Find tests that pass in one lane or on one kernel, and fail in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.report.results import Result

# The states in which a test says that the program works, and those in which it says that it does not.
_GOOD: Final = frozenset({"passed"})
_BAD: Final = frozenset({"failed", "error"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A test with different results. good, bad: where it passed and where it failed, such as `netns` or `vm, 6.1.0`."""

    id: str
    good: tuple[str, ...]
    bad: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.id} passes in {' and '.join(self.good)}, and fails in {' and '.join(self.bad)}"


def disagreements(results: Iterable[Result]) -> list[Disagreement]:
    """Return the tests that passed somewhere and failed elsewhere, in the order of the results.

    Only results of the same versions are compared; the driver's version is that of the kernel, and differs by purpose.
    """
    places: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if result.state in _GOOD | _BAD:
            places.setdefault((result.id, *_programs(result)), []).append(result)
    found = []
    for (name, *_), same in places.items():
        good = [_place(result) for result in same if result.state in _GOOD]
        bad = [_place(result) for result in same if result.state in _BAD]
        if good and bad:
            found.append(Disagreement(id=name, good=tuple(good), bad=tuple(bad)))
    return found


def _programs(result: Result) -> list[str]:
    sides = [side for side in (result.a, result.b) if side]
    return [side["impl"] if side["impl"] == "kernel" else f"{side['impl']} {side['version']}" for side in sides]


def _place(result: Result) -> str:
    return f"{result.lane}, Linux {result.kernel}" if result.kernel else result.lane
