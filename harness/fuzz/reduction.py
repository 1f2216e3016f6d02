"""Reduce a list, and the cases in it, to a small input that still fails (delta debugging).

Source: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002, algorithm ddmin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from harness.fuzz.inputs import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness.fuzz.inputs import Step

T = TypeVar("T")


def ddmin(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """Return a part of a failing list that fails too, and that no longer does without any one of its items.

    fails: returns True if a list still fails; it is not called with the whole list or the empty one.
    """
    kept = list(items)
    parts = 2
    while len(kept) > 1:
        size = -(-len(kept) // parts)
        for start in range(0, len(kept), size):
            without = kept[:start] + kept[start + size :]
            if without and fails(without):
                kept, parts = without, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(kept))
    return kept


def reduce_cases(cases: Sequence[Case], fails: Callable[[list[Case]], bool]) -> list[Case]:
    """Reduce failing cases: first leave out cases, then steps of each, then changes and bytes of each step."""
    kept = ddmin(cases, fails)
    for number in range(len(kept)):

        def still_fails(steps: Sequence[Step], number: int = number) -> bool:
            return fails([*kept[:number], Case(kept[number].state, tuple(steps)), *kept[number + 1 :]])

        steps = ddmin(kept[number].steps, still_fails)
        for place in range(len(steps)):
            steps[place] = _smaller(steps, place, still_fails)
        kept[number] = Case(kept[number].state, tuple(steps))
    return kept


def _smaller(steps: list[Step], place: int, fails: Callable[[Sequence[Step]], bool]) -> Step:
    """Return the smallest form of one step with which the steps still fail."""
    step = steps[place]
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for form in _forms(step):
            if fails([*steps[:place], form, *steps[place + 1 :]]):
                step, is_smaller = form, True
                break
    return step


def _forms(step: Step) -> Iterator[Step]:
    """Yield simpler forms of a step: without changes, without one, without its argument or a half of it."""
    if len(step.changes) > 1:
        yield replace(step, changes=())
    for number in range(len(step.changes)):
        yield replace(step, changes=step.changes[:number] + step.changes[number + 1 :])
    if step.argument:
        if step.argument.endswith(b"\0"):
            yield replace(step, argument=step.argument.rstrip(b"\0"))
        half = len(step.argument) // 2
        yield replace(step, argument=step.argument[:half])
        if half:
            yield replace(step, argument=step.argument[half:])
    if step.counter is not None:
        yield replace(step, counter=None)
