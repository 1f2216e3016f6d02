"""Print the clue of a failure first: fields that differ, no class name of the harness.

pytest's own explanation of two records cuts them after thirty characters, and its messages begin with the dotted name
of an exception's class.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

# The line of a traceback that names the exception: `E       harness.errors.HarnessError: ns1: ping ...`.
_RAISED: Final = re.compile(r"^(E +)harness\.[\w.]+: ")


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Explain why two records of the harness are not equal; None leaves everything else to pytest."""
    if op != "==" or type(left) is not type(right) or not _is_record(left):
        return None
    return [f"{left!r} == {right!r}", *_differences("", left, right)]


def _is_record(value: object) -> bool:
    return type(value).__module__.startswith("harness.") and (is_dataclass(value) or hasattr(value, "_fields"))


def _differences(name: str, left: object, right: object) -> Iterator[str]:
    """Yield each field that differs: `peers[0].rx_bytes: 0 != 1428`."""
    if left == right:
        return
    if type(left) is type(right) and is_dataclass(left) and type(left).__str__ is object.__str__:
        for field in fields(left):
            own = f"{name}.{field.name}" if name else field.name
            yield from _differences(own, getattr(left, field.name), getattr(right, field.name))
    elif type(left) is tuple and type(right) is tuple and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from _differences(f"{name}[{index}]", one, other)
    elif name:
        # A record with its own __str__, such as a key, is shown whole.
        yield f"{name}: {left!r} != {right!r}"


def put_clue_first(report: pytest.TestReport) -> None:
    """Remove an exception class of the harness from a failure's message and from the line of its traceback."""
    # Imported late: a run of pytest without the lab does not need it.
    from harness.report.results import without_class

    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return
    crash.message = without_class(crash.message)
    chain = getattr(report.longrepr, "chain", None) or [(getattr(report.longrepr, "reprtraceback", None), None, None)]
    for entry in (entry for traceback, *_ in chain for entry in getattr(traceback, "reprentries", ())):
        entry.lines = [_RAISED.sub(r"\1", line) for line in entry.lines]
