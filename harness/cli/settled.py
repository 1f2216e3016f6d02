"""Complete the options of `wg-interop run` by those of environment and wg-interop.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.settings import lines, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness.settings import Value

# The value of an option: a tuple if it may be repeated, a bool for a flag, None if not given.
_Option = tuple[str, ...] | str | bool | None


class Settled(NamedTuple):
    """Options as the command line would have given them. lines: those that it has not, each with its source."""

    options: dict[str, _Option]
    results: Path | None
    suites: tuple[str, ...]
    lines: list[str]


def settle(options: Mapping[str, _Option], results: Path | None, suites: tuple[str, ...]) -> Settled:
    """Add what the command line has left open; raises UsageError for a mistake in environment or file."""
    given: dict[str, Value] = {name.replace("_", "-"): value for name, value in options.items() if value}
    given |= {"results": str(results)} if results is not None else {}
    given |= {"suite": suites} if suites else {}
    found = read_settings().beside(given)
    added = {name: _as_given(setting.value) for name, setting in found.items()}
    place, tests = added.pop("results", None), added.pop("suite", suites)
    return Settled(
        options={**options, **{name.replace("-", "_"): value for name, value in added.items()}},
        results=Path(place) if isinstance(place, str) else results,
        suites=tests if isinstance(tests, tuple) else suites,
        lines=lines(found),
    )


def _as_given(value: Value) -> tuple[str, ...] | str | bool:
    return value if isinstance(value, tuple | bool) else str(value)
