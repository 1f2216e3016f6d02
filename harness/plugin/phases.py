"""Limit the time of each phase of a test, and report what an overdue phase waited for.

A timer interrupts the main thread by SIGALRM, as pytest-timeout's method `signal` does; the handler raises `Overdue` in
whatever the test is doing. So fixtures are still undone, evidence is kept, and the next test runs. pytest-timeout has
one limit for all phases together, or one for the call only, and cannot report what a test of the lab waits for.

Budgets are in seconds and multiplied by --timeout-scale; 0: no limit. They apply to tests that use the lab, and to all
tests of a project that sets one of the ini options. `@pytest.mark.timeout(SECONDS)` and pytest-timeout's own settings
are the budget of the call; pytest-timeout then sets no timer of its own. In lane warp there is no budget: where the
clock skips idle time a limit means nothing, and the guest has a deadline of its own.
"""

from __future__ import annotations

import concurrent.futures.thread
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
from _pytest.outcomes import Failed

from harness.plugin.selection import lane_of
from harness.plugin.session import LAB, state_of_run

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

# For each phase, by the name of its hook: its name in messages, and its budget unless an ini option sets it.
_PHASES: Final = {"setup": ("set-up", 60.0), "call": ("call", 120.0), "teardown": ("tear-down", 60.0)}
# Modules of debuggers, by the beginning of their names.
_DEBUGGERS: Final = ("bdb", "pdb", "pydevd", "_pydevd")
# The shortest time of a timer, in seconds: 0 would stop it.
_AT_ONCE: Final = 0.001
_HELP: Final = (
    "Seconds for the {} of a test that uses the lab, multiplied by --timeout-scale; 0: no limit. Default: {:g}."
)


class Overdue(Failed):
    """A phase of a test took longer than its budget."""

    # Like pytest's own outcomes, so that reports print the name without a module.
    __module__ = "builtins"


@dataclass(frozen=True, slots=True)
class Budget:
    """The time of one phase: its name, seconds, and the setting they come from."""

    phase: str
    seconds: float
    setting: str


def pytest_addoption(parser: pytest.Parser) -> None:
    for when, (name, seconds) in _PHASES.items():
        parser.addini(_ini(when), _HELP.format(name, seconds), default="")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout") and not config.pluginmanager.hasplugin("pytest_timeout"):
        config.addinivalue_line("markers", "timeout(SECONDS): the budget of this test's call; 0: none")
    for when in _PHASES:
        _seconds(config, when)


def _ini(when: str) -> str:
    return f"wg_{when}_timeout"


def _seconds(config: pytest.Config, when: str) -> float | None:
    """Return the value of the ini option; None if it is not set."""
    text = str(config.getini(_ini(when)))
    try:
        return float(text) if text else None
    except ValueError:
        raise pytest.UsageError(f"{_ini(when)} = {text}: want seconds, or 0 for no limit") from None


def budget_of(item: pytest.Item, when: str) -> Budget | None:
    """Return the budget of a phase (`setup`, `call`, `teardown`); None for no limit."""
    config = item.config
    name, default = _PHASES[when]
    given = _seconds(config, when)
    seconds, setting = default if given is None else given, _ini(when)
    # The setting of pytest-timeout, by its option, variable or ini option; 0: no limit for any phase.
    other = getattr(config, "_env_timeout", None)
    if other == 0:
        return None
    if when == "call":
        if (marked := _marked(item)) is not None:
            seconds, setting = marked, "mark `timeout`"
        elif other is not None:
            return Budget(name, other, "--timeout")
    seconds *= state_of_run(config).plan.timeout_scale
    return Budget(name, seconds, setting) if seconds > 0 else None


def _marked(item: pytest.Item) -> float | None:
    """Return the seconds of `@pytest.mark.timeout(...)`; None without it."""
    marker = item.get_closest_marker("timeout")
    if marker is None:
        return None
    try:
        return float(marker.kwargs["timeout"] if "timeout" in marker.kwargs else marker.args[0])
    except (IndexError, TypeError, ValueError):
        raise pytest.UsageError(f"{item.nodeid}: mark timeout: want seconds: timeout(60)") from None


def is_governed(item: pytest.Item) -> bool:
    """Return whether this module limits the phases of this test."""
    return lane_of(item) == "netns" or any(_seconds(item.config, when) is not None for when in _PHASES)


def _has_limits(item: pytest.Item) -> bool:
    is_debugged = (getattr(sys.gettrace(), "__module__", None) or "").startswith(_DEBUGGERS)
    return state_of_run(item.config).plan.lane_of_guest != "warp" and not is_debugged


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item) -> bool | None:
    """Keep pytest-timeout from setting a timer for a test that this module limits."""
    return True if is_governed(item) else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _limited(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _limited(item, "call"):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with _limited(item, "teardown"):
        return (yield)


def pytest_enter_pdb() -> None:
    """Remove the limit of the current phase, because the user debugs it."""
    stop()


@contextmanager
def _limited(item: pytest.Item, when: str) -> Iterator[None]:
    if not is_governed(item) or threading.current_thread() is not threading.main_thread():
        yield
        return
    # A test of this plugin runs pytest inside its own phase; the outer timer continues after that.
    handler, (left, again), begun = (
        signal.getsignal(signal.SIGALRM),
        signal.getitimer(signal.ITIMER_REAL),
        time.monotonic(),
    )
    try:
        start(item, when)
        yield
    finally:
        stop()
        if left:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, max(_AT_ONCE, left - (time.monotonic() - begun)), again)


def start(item: pytest.Item, when: str) -> None:
    """Start the budget of a phase now, in place of the current one.

    To pytest, health check, evidence and undo are part of the call. Here they get the budget of the tear-down.
    """
    stop()
    if not is_governed(item) or not _has_limits(item):
        return
    budget = budget_of(item, when)
    if budget is None:
        return
    # The clean-up after the first signal may hang too, so the timer repeats.
    again = budget_of(item, "teardown") or budget

    def interrupt(_: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True
        _interrupt(item, budget, frame)

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, budget.seconds, again.seconds)


def stop() -> None:
    """Stop the timer, if it runs."""
    if signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _interrupt(item: pytest.Item, budget: Budget, frame: FrameType | None) -> None:
    __tracebackhide__ = True
    waiting = _unfinished() or [f"no step of the lab; it was in {_place(frame)}"]
    text = f"{budget.phase} took longer than its {budget.seconds:g} s ({budget.setting}), waiting for: {waiting[0]}"
    # The stack of this thread is the traceback of the failure.
    others = _stacks_of_others()
    if others:
        item.add_report_section(budget.phase, "stacks of other threads,", others)
    lab = item.stash.get(LAB, None)
    if lab is not None:
        lab.note("stacks.txt", f"{text}\n\n{''.join(traceback.format_stack(frame))}\n{others}")
    raise Overdue("".join([text, *(f"\nwithin: {step}" for step in waiting[1:])]))


def _unfinished() -> list[str]:
    steps = sys.modules.get("harness.steps")
    return [] if steps is None else steps.unfinished()


def _place(frame: FrameType | None) -> str:
    return "C code" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _stacks_of_others() -> str:
    """Return the stacks of the other threads, except those that wait for a call or for a log to grow."""
    others = (thread for thread in threading.enumerate() if thread is not threading.current_thread())
    names = {thread.ident: thread.name for thread in others if thread.name != "log stamps"}
    frames = sys._current_frames()  # noqa: SLF001 - documented for debugging
    return "\n".join(
        f"{names[number]}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in frames.items()
        if number in names and frame.f_code.co_filename != concurrent.futures.thread.__file__
    )
