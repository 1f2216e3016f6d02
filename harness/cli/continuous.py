"""Report a run to continuous integration: KTAP, and annotations and a summary for GitHub."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_Command = TypeVar("_Command", bound="Callable[..., object]")


def options(command: _Command) -> _Command:
    """Add the options of this module to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "--baseline", type=click.Path(dir_okay=False), metavar="FILE",
        help="Fail only for failures that FILE does not list. Names those in FILE that no longer fail.",
    ),
    click.option(
        "--update-baseline", is_flag=True,
        help="Write this run's failures to the FILE of --baseline: add new ones, remove those that no longer fail.",
    ),
    click.option(
        "--must-include", multiple=True, metavar="NAME",
        help="Fail, with status 1, unless a test of this implementation has passed. May be repeated.",
    ),
)  # fmt: skip
