"""Choose the tests of a run: pairs as parameters, lanes, suites, a guest's shard."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from harness.plugin.marks import wrong_marks
from harness.plugin.past import put_longest_first
from harness.plugin.session import is_worker, state_of_run
from harness.sandbox import launch

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from harness.implementations.manifest import Manifest
    from harness.plugin.options import RunPlan
    from harness.plugin.session import State

FIXTURES: Final = "harness.plugin.fixtures"
# Key in xdist's `workeroutput` for a worker's usage error.
USAGE: Final = "wg_usage"
# In the run directory: the files with tests that only guests run, one a line; the xdist workers write it.
_GUEST_FILES: Final = "guest-files"


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that use `pair` or `implementation` with the programs of the run (hook)."""
    if uses(metafunc.definition, "pair"):
        metafunc.parametrize("pair", state_of_run(metafunc.config).programs.pairs, ids=str, indirect=True)
    if uses(metafunc.definition, "implementation"):
        chosen = state_of_run(metafunc.config).programs.alone
        metafunc.parametrize("implementation", chosen, ids=[manifest.name for manifest in chosen], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Check the markers, keep the tests of the suites and lanes chosen, and put those marked `alone` last (hook)."""
    state = state_of_run(config)
    if not state.plan.lane_of_guest and (wrong := wrong_marks(state.suite, items)):
        if is_worker(config):
            config.workeroutput[USAGE] = "\n".join(wrong)  # type: ignore[attr-defined]
        raise pytest.UsageError(*wrong)
    _choose(config, items, [item for item in items if _is_chosen(item, state.plan)])
    yield
    put_longest_first(config, items)
    # All other plugins have selected and ordered their tests now.
    if is_worker(config) and state.plan.guest_lanes:
        _leave_to_guests(config, state, items)
    if state.plan.shard is not None:
        number, count = state.plan.shard
        _choose(config, items, items[number::count])
    items.sort(key=is_alone)


def _choose(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item]) -> None:
    kept = set(chosen)
    if others := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def _is_chosen(item: pytest.Item, plan: RunPlan) -> bool:
    """Whether the item belongs to the suites and lanes of the run; tests for guests are collected here too."""
    if plan.suites and suite_of(item) not in plan.suites:
        return False
    if item.get_closest_marker("nightly") is not None and not plan.nightly:
        return False
    if waits(item) and plan.lane_of_guest != "warp":
        return "warp" in plan.lanes
    return not plan.lanes or lane_of(item) in {"netns" if lane == "vm" else lane for lane in plan.lanes}


def runs_here(item: pytest.Item, plan: RunPlan) -> bool:
    """Whether a chosen item runs in this process, on this kernel; in a guest all do."""
    if plan.lane_of_guest or not plan.lanes:
        return True
    if lane_of(item) not in plan.lanes or waits(item):
        return False
    # With lane vm, a guest tests kernel WireGuard. Here the test would only be skipped if this kernel lacks it.
    return not ("vm" in plan.lanes and any(side.kind == "kernel" for side in sides(item)) and not _kernel_has_it())


def _kernel_has_it() -> bool:
    """Whether this kernel has WireGuard; False outside a sandbox, because to find out creates an interface."""
    from harness.implementations.manifest import kernel_has_wireguard

    return launch.inside() and kernel_has_wireguard()


def _leave_to_guests(config: pytest.Config, state: State, items: list[pytest.Item]) -> None:
    """Deselect the tests that only guests run, and write their files down for the controller, which collects none."""
    here = [item for item in items if runs_here(item, state.plan)]
    elsewhere = dict.fromkeys(file_of(item) for item in items if item not in set(here))
    path = state.scratch() / _GUEST_FILES
    # All workers write the same list; the rename lets a reader see all of it or nothing.
    part = path.with_name(f"{_GUEST_FILES}.{os.getpid()}")
    part.write_text("".join(f"{name}\n" for name in elsewhere))
    part.replace(path)
    _choose(config, items, here)


def files_left_to_guests(scratch: Path) -> list[str]:
    """Return the files whose tests xdist workers have left to guests, relative to the root directory."""
    path = scratch / _GUEST_FILES
    return path.read_text().splitlines() if path.exists() else []


def file_of(item: pytest.Item) -> str:
    """Return the file of a test, relative to the root directory."""
    return item.nodeid.partition("::")[0]


def uses(item: pytest.Item, fixture: str) -> bool:
    """Whether a test uses our fixture of this name; another project may have its own `lab` or `pair`."""
    info = getattr(item, "_fixtureinfo", None)
    for definition in reversed(info.name2fixturedefs.get(fixture, ()) if info else ()):
        if getattr(definition.func, "__module__", None) == FIXTURES:
            return True
        # Theirs may use ours.
        if fixture not in definition.argnames:
            break
    return False


def sides(item: pytest.Item) -> tuple[Manifest, ...]:
    """Return the implementations under test: A and B of a pair, one, or none."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if uses(item, "pair"):
        return tuple(params["pair"])
    return (params["implementation"],) if uses(item, "implementation") else ()


def suite_of(item: pytest.Item) -> str:
    """Return the suite of a test, one of `lanes.SUITES`; empty if it does not use the lab."""
    if lane_of(item) == "core" and not uses(item, "pair"):
        return ""
    folder = item.path.parent.name
    if folder == "conformance":
        return folder
    if uses(item, "pair"):
        return "pairs"
    return "lab" if folder == "lab" else "alone"


def lane_of(item: pytest.Item) -> str:
    """Return `netns` for a test that uses the lab, else `core`."""
    return "netns" if uses(item, "lab") else "core"


def waits(item: pytest.Item) -> bool:
    """Whether a test is marked `waiting`: minutes of protocol time pass in it, so it runs in lane `warp` only."""
    return item.get_closest_marker("waiting") is not None


def is_alone(item: pytest.Item) -> bool:
    """Whether a test is marked `alone`: no other test of the run may run at the same time."""
    return item.get_closest_marker("alone") is not None


def label_of(item: pytest.Item) -> str:
    """Return the lane for the results: in a guest, that of the guest."""
    lane = lane_of(item)
    return (state_of_run(item.config).plan.lane_of_guest or lane) if lane == "netns" else lane
