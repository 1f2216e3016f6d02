"""Which tests a run has: pairs as parameters, lanes, shards of a guest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from harness.lanes import LANE, SHARD
from harness.plugin.session import (
    implementations,
    is_worker,
    pairs,
)

if TYPE_CHECKING:
    from collections.abc import Generator


MAX_REQUIREMENTS: Final = 3
# By what name a worker tells of a mistake.
USAGE: Final = "wg_usage"


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if uses(metafunc.definition, "pair"):
        metafunc.parametrize("pair", pairs(metafunc.config), ids=str, indirect=True)
    if uses(metafunc.definition, "implementation"):
        chosen = implementations(metafunc.config)
        metafunc.parametrize("implementation", chosen, ids=[manifest.name for manifest in chosen], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    for item in items:
        marks = [argument for marker in item.iter_markers("requirement") for argument in marker.args]
        if len(marks) > MAX_REQUIREMENTS:
            said = f"{item.nodeid}: a test cites at most {MAX_REQUIREMENTS} requirements, not {marks}"
            if is_worker(config):
                config.workeroutput[USAGE] = said  # type: ignore[attr-defined]
            raise pytest.UsageError(said)
    _choose(config, items, [item for item in items if _is_chosen(item)])
    yield
    # When all others have chosen, so that the shards are equal.
    if SHARD in os.environ:
        number, count = map(int, os.environ[SHARD].split("/"))
        _choose(config, items, items[number::count])


def _choose(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item]) -> None:
    kept = set(chosen)
    if others := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def _is_chosen(item: pytest.Item) -> bool:
    """Whether the item runs in one of the lanes asked for; what runs in guests is collected here too."""
    lanes = item.config.option.wg_lane
    if waits(item) and os.environ.get(LANE) != "warp":
        return "warp" in lanes
    return not lanes or lane_of(item) in {"netns" if lane == "vm" else lane for lane in lanes}


def runs_here(item: pytest.Item) -> bool:
    """Whether a chosen item runs on this kernel, be it a guest's."""
    lanes = item.config.option.wg_lane
    return LANE in os.environ or not lanes or (lane_of(item) in lanes and not waits(item))


FIXTURES: Final = "harness.plugin.fixtures"


def uses(item: pytest.Item, fixture: str) -> bool:
    """Whether a test uses our fixture of this name; other projects may well have a `lab` or a `pair` of their own."""
    info = getattr(item, "_fixtureinfo", None)
    for definition in reversed(info.name2fixturedefs.get(fixture, ()) if info else ()):
        if getattr(definition.func, "__module__", None) == FIXTURES:
            return True
        # Theirs may be built upon ours.
        if fixture not in definition.argnames:
            break
    return False


def lane_of(item: pytest.Item) -> str:
    """`netns` for a test that uses the lab, else `core`."""
    return "netns" if uses(item, "lab") else "core"


def waits(item: pytest.Item) -> bool:
    """Whether minutes of protocol time have to pass in a test, so that it runs in lane `warp` only."""
    return item.get_closest_marker("waiting") is not None


def label_of(item: pytest.Item) -> str:
    """The lane as results name it: in a guest, the guest's."""
    lane = lane_of(item)
    return os.environ.get(LANE, lane) if lane == "netns" else lane
