"""Report a run to continuous integration: KTAP, and annotations and a summary for GitHub."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO, TypeVar

import click

from harness.errors import Unavailable
from harness.report import github
from harness.report.ktap import ktap_text
from harness.report.results import write_in_one_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.report.results import Result, RunResults

_Command = TypeVar("_Command", bound="Callable[..., object]")
# The variables of a step on GitHub: `true`, the file of the step's summary, the directory of the caller's checkout.
_ON_GITHUB: Final = "GITHUB_ACTIONS"
_SUMMARY: Final = "GITHUB_STEP_SUMMARY"
_WORKSPACE: Final = "GITHUB_WORKSPACE"


class Outlet:
    """The places that a run reports to, besides its report.

    ktap: a file, `-` for stdout, or empty. on_github: whether the run is a step on GitHub; None: look at the
    environment.
    """

    def __init__(self, ktap: str = "", *, on_github: bool | None = None) -> None:
        self._ktap = ktap
        self._on_github = os.environ.get(_ON_GITHUB) == "true" if on_github is None else on_github
        self.stream: TextIO = sys.stderr if ktap == "-" else sys.stdout
        """Where the run prints for people: stderr if stdout is for KTAP."""

    @contextmanager
    def folded(self, title: str) -> Iterator[None]:
        """Fold what is printed inside the block, and let nothing there command GitHub's runner."""
        if not self._on_github:
            yield
            return
        token = secrets.token_hex(16)
        self._command(f"::group::{github.escape_data(title)}", f"::stop-commands::{token}")
        try:
            yield
        finally:
            self._command(f"::{token}::", "::endgroup::")

    @contextmanager
    def quoted(self) -> Iterator[None]:
        """Let nothing that is printed inside the block command GitHub's runner."""
        if not self._on_github:
            yield
            return
        token = secrets.token_hex(16)
        self._command(f"::stop-commands::{token}")
        try:
            yield
        finally:
            self._command(f"::{token}::")

    def finish(self, contents: RunResults | None, failure: str) -> None:
        """Write everything at the end of a run. contents: its results, if it has any; failure: as for `ktap_text`."""
        results = contents.results if contents else []
        if self._ktap:
            self._write_ktap(ktap_text(results, failure))
        if self._on_github:
            self._command(*github.error_commands(results, failure, self._root(contents)))
            if path := os.environ.get(_SUMMARY):
                comparison = contents.comparison.lines() if contents and contents.comparison else []
                _append(Path(path), results, failure, comparison)

    def _write_ktap(self, text: str) -> None:
        if self._ktap == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            write_in_one_step(Path(self._ktap), text)
        except OSError as error:
            raise Unavailable(f"--ktap {self._ktap}: {error.strerror}") from error

    def _command(self, *lines: str) -> None:
        for line in lines:
            self.stream.write(f"{line}\n")
        self.stream.flush()

    @staticmethod
    def _root(contents: RunResults | None) -> str | None:
        """Return what stands before a test's file in the caller's repository; None if the tests are not in it."""
        workspace, root = os.environ.get(_WORKSPACE, ""), contents.invocation.root if contents else ""
        if not workspace or not root or not Path(root).is_relative_to(workspace):
            return None
        below = Path(root).relative_to(workspace).as_posix()
        return "" if below == "." else f"{below}/"


def _append(path: Path, results: list[Result], failure: str, comparison: list[str]) -> None:
    """Append the summary to the step's file, which must stay below GitHub's limit."""
    used = path.stat().st_size if path.exists() else 0
    text = github.summary(results, failure, comparison, room=github.SUMMARY_LIMIT - used)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def take_outlet(values: dict[str, tuple[str, ...] | str | bool | None]) -> Outlet:
    """Make the outlet of a run from the values of its options, and remove those that pytest does not have."""
    ktap, on_github = values.pop("ktap"), values.pop("on_github")
    return Outlet(str(ktap), on_github=None if on_github is None else bool(on_github))


def options(command: _Command) -> _Command:
    """Add the options of this module to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "--baseline", type=click.Path(dir_okay=False), metavar="FILE",
        help="Fail only for failures that FILE does not list, and name those in FILE that no longer fail (docs/ci.md).",
    ),
    click.option(
        "--update-baseline", is_flag=True,
        help="Write this run's failures to the FILE of --baseline: add new ones, remove those that no longer fail.",
    ),
    click.option(
        "--must-include", multiple=True, metavar="NAME",
        help="Fail, with status 1, unless a test of this implementation has passed. May be repeated.",
    ),
    click.option(
        "--ktap", default="", metavar="FILE|-",
        help="Write the results to FILE as KTAP version 1, the kernel's format, nested by file and pair; - writes them "
        "to stdout, and all else to stderr.",
    ),
    click.option(
        "--github/--no-github", "on_github", default=None,
        help="Print annotations for the worst failures, fold the progress, and write the matrix into the step's "
        "summary. Default: yes if GITHUB_ACTIONS is true.",
    ),
)  # fmt: skip
