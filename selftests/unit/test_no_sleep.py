"""Check that harness and selftests never sleep: they use wait_for, poll_until or let_pass.

In the syntax trees it finds calls of any `sleep`, runs of the program `sleep`, waits that only the timeout can end, and
loops that only look at a clock. In programs in strings it finds the first two, as text.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import harness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

ROOT = Path(harness.__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("harness", "selftests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".sh"} and path != Path(__file__)
)
# The functions that may sleep. The guest's init needs one of its own, because it cannot import the harness.
MAY_SLEEP = {"harness/wait.py": {"let_pass", "poll_until"}, "harness/vm/init.py": {"let_pass"}}

CLOCKS = {
    "clock_gettime",
    "clock_gettime_ns",
    "monotonic",
    "monotonic_ns",
    "perf_counter",
    "perf_counter_ns",
    "time",
    "time_ns",
}
# Calls that wait for an event, inside a loop that has a deadline.
EVENTS = {
    "accept",
    "communicate",
    "get",
    "join",
    "poll",
    "readable",
    "read",
    "readline",
    "recv",
    "recvfrom",
    "recvmsg",
    "select",
    "wait",
    "wait_for",
}
# An object that is created and waited for in one expression: nothing else can cause its event.
EVENTLESS = {"Condition", "DefaultSelector", "Event", "Semaphore", "epoll", "poll"}
WAITS = {"acquire", "poll", "select", "wait"}
IN_TEXT = re.compile(r"\bsleep\s*\(|\bsleep\s+([\d.$]|\Z)")


def name_of(function: ast.expr) -> str:
    """The last part of a name: `sleep` of `time.sleep`."""
    return ast.unparse(function).rpartition(".")[2]


def calls(node: ast.AST) -> Iterator[ast.Call]:
    return (each for each in ast.walk(node) if isinstance(each, ast.Call))


def is_fresh(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and name_of(value.func) in EVENTLESS


def is_empty(value: ast.expr) -> bool:
    return isinstance(value, ast.List | ast.Tuple | ast.Set) and not value.elts


def reason(node: ast.AST, never_set: set[str]) -> str | None:  # noqa: PLR0911 - one for each way
    """Return why a node of the syntax tree sleeps; None if it does not."""
    match node:
        case ast.Call(func=function) if name_of(function) == "sleep":
            return "calls sleep"
        case ast.ImportFrom(names=names) if any(alias.name == "sleep" for alias in names):
            return "imports sleep"
        case ast.Call(func=ast.Attribute(value=value, attr=attribute)) if attribute in WAITS and is_fresh(value):
            return "waits for an event that cannot come"
        case ast.Call(func=ast.Attribute(value=value, attr="wait")) if ast.unparse(value) in never_set:
            return "waits for an event that nothing sets"
        case ast.Call(func=function, args=[first, second, third, *_]) if name_of(function) == "select":
            return "selects among nothing" if all(map(is_empty, (first, second, third))) else None
        case ast.List(elts=[ast.Constant(value="sleep"), *_]) | ast.Tuple(elts=[ast.Constant(value="sleep"), *_]):
            return "runs sleep"
        case ast.Constant(value=str(text)) if IN_TEXT.search(text):
            return "has a program that sleeps"
        case ast.While():
            called = {name_of(call.func) for call in calls(node)}
            return "loops by the clock" if called & CLOCKS and not called & EVENTS else None
    return None


def events_never_set(tree: ast.Module) -> set[str]:
    """Return the variables with an Event that no code of the file sets or passes on."""
    made = {
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and is_fresh(node.value) and name_of(node.value.func) == "Event"  # type: ignore[attr-defined]
        for target in node.targets
    }
    used = {
        ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "set"
    }
    passed = {ast.unparse(argument) for call in calls(tree) for argument in call.args}
    return made - used - passed


def sleeps(source: str, allowed: AbstractSet[str] = frozenset()) -> list[str]:
    """Return each line of a file that sleeps, as `LINE: why`; allowed: functions that may sleep."""
    tree = ast.parse(source)
    excused = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in allowed
        for child in ast.walk(node)
    }
    docstrings = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    never_set = events_never_set(tree)
    return [
        f"{getattr(node, 'lineno', 0)}: {why}"
        for node in ast.walk(tree)
        if node not in excused and node not in docstrings and (why := reason(node, never_set))
    ]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_waits_for_events_and_never_sleeps(path: Path) -> None:
    text = (ROOT / path).read_text()
    if path.suffix == ".sh":
        assert not IN_TEXT.search(text)
        return
    assert sleeps(text, MAY_SLEEP.get(str(path), set())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("time.sleep(1)", "1: calls sleep"),
        ("from time import sleep", "1: imports sleep"),
        ("await asyncio.sleep(1)", "1: calls sleep"),
        ("threading.Event().wait(1)", "1: waits for an event that cannot come"),
        ("select.poll().poll(1000)", "1: waits for an event that cannot come"),
        ("late = Event()\nlate.wait(1)", "2: waits for an event that nothing sets"),
        ("select.select([], (), [], 1)", "1: selects among nothing"),
        ("run(['sleep', '5'])", "1: runs sleep"),
        ("run('sh', '-c', 'echo; sleep 5')", "1: has a program that sleeps"),
        ("CODE = '''\nimport time\ntime.sleep(1)\n'''", "1: has a program that sleeps"),
        ("f'sleep {n}'", "1: has a program that sleeps"),
        ("while not ready() and time.monotonic() < end:\n    pass", "1: loops by the clock"),
        ("while not ready():\n    assert time.time() < end", "1: loops by the clock"),
    ],
)
def test_each_way_to_sleep_is_found(source: str, found: str) -> None:
    assert found in sleeps(source)


@pytest.mark.parametrize(
    "source",
    [
        "let_pass(1, 'time is tested')",
        "wait_for(Datagram(sock), 5, 'an answer')",
        "done = Event()\nThread(target=done.set).start()\ndone.wait(5)",
        "done = Event()\nstart(done)\ndone.wait(5)",
        "select.select([sock], [], [], 5)",
        "while left > 0:\n    left = end - time.monotonic()\n    sock.recv(9)",
        "'''What sleeps 5 s, sleep(5).'''",
        "SLEEP = 'a program sleeps'",
    ],
)
def test_waiting_for_event_is_not_sleep(source: str) -> None:
    assert sleeps(source) == []


def test_only_named_functions_may_sleep() -> None:
    source = "def let_pass(s): time.sleep(s)\ndef other(s): time.sleep(s)"
    assert sleeps(source, {"let_pass"}) == ["2: calls sleep"]
