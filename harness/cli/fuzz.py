"""Fuzz a program and print progress, figures and findings: `wg-interop fuzz`.

The child `python -m harness.fuzz.campaign` does the work in a sandbox; docs/fuzzing.md explains it.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from harness.cli import terminal
from harness.cli.confined import run_confined
from harness.errors import HarnessError, Unavailable, UsageError
from harness.fuzz.campaign import COVERAGE, GUIDES, REASONS, Order, words
from harness.fuzz.generator import SURFACES
from harness.install import cache
from harness.report.results import write_in_one_step

if TYPE_CHECKING:
    from rich.console import Console

_AREA: Final = "fuzz"
_ERRORS: Final = {error.__name__: error for error in (HarnessError, UsageError, Unavailable)}
# Seconds beyond the time of fuzzing: to start, and to reduce a finding.
_MORE: Final = 400.0
_EACH: Final = 3.0  # seconds between two lines of progress without a terminal
_MOST_MINUTES: Final = 7 * 24 * 60


def run_command(results: Path | None, **options: Any) -> int:
    """Run the command with its options by name, as the command line gives them; returns the exit status."""
    given = {name: options.pop(name) for name in ("seed", "surfaces", "guide", "corpus")}
    return fuzz_program(complete(Order(**options), **given), results)


def complete(order: Order, *, seed: str, surfaces: tuple[str, ...], guide: str, corpus: str) -> Order:
    """Check the options, and fill in what was not given; raises UsageError or Unavailable."""
    if not 0 < order.seconds <= 60 * _MOST_MINUTES:
        raise UsageError(f"--minutes {order.seconds / 60:g}: expected a number above 0, up to {_MOST_MINUTES}")
    if seed and not seed.isdecimal():
        raise UsageError(f"--seed {seed}: expected a decimal number")
    has_atheris = importlib.util.find_spec("atheris") is not None
    if guide == COVERAGE and not has_atheris:
        raise Unavailable("--guide coverage: atheris is not installed; to install it: pip install 'wg-interop[fuzz]'")
    for pattern in order.ignore:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--ignore {pattern}: not a regular expression: {error}") from error
    if guide and guide not in GUIDES:
        raise UsageError(f"--guide {guide}: expected one of {', '.join(GUIDES)}")
    name = (order.impl or Path(order.manifest).stem).partition("=")[0]
    order = replace(
        order,
        seed=int(seed) if seed else random.SystemRandom().randrange(2**32),
        surfaces=tuple(surface for surface in SURFACES if surface in surfaces) or SURFACES,
        guide=guide or (COVERAGE if order.in_process and has_atheris and not order.count else REASONS),
        corpus=corpus or str(cache.cache_root() / _AREA / name),
    )
    order.find()
    return order


def fuzz_program(order: Order, results: Path | None) -> int:
    """Fuzz, print progress on stderr and the findings on stdout, and return the exit status."""
    screen = _Screen(terminal.console(sys.stderr), sys.stderr)
    said: dict[str, Any] = {"seed": order.seed, "command": order.command, "corpus": order.corpus, "finding": None}
    click.echo(f"seed {order.seed}; corpus {order.corpus}; guided by {order.guide}", err=True)
    deadline = (order.seconds + _MORE) * max(1.0, order.timeout_scale)
    for event in run_confined("fuzz", "harness.fuzz.campaign", words(order), deadline=deadline, is_interruptible=True):
        if "error" in event:
            screen.end()
            raise _ERRORS.get(event["kind"], HarnessError)(event["error"])
        if "progress" in event:
            screen.progress(figures(event["progress"]), event["progress"]["seconds"])
        elif "found" in event:
            screen.line(f"found: {_who(order)} {event['found']['message']}; reducing it")
        elif "reducing" in event:
            now = event["reducing"]
            text = f"reducing: {now['steps']} steps in {now['cases']} cases, try {now['tries']}"
            screen.progress(text, now["seconds"])
        else:
            said |= event
    screen.end()
    if "summary" not in said:
        raise HarnessError("fuzz: the run ended without a summary")
    if results is not None:
        write_in_one_step(results, json.dumps(said, indent=1))
    return _conclude(order, said)


def _who(order: Order) -> str:
    return (order.impl or order.manifest).partition("=")[0]


def _conclude(order: Order, said: dict[str, Any]) -> int:
    """Print the finding or that there is none; returns the exit status."""
    summary, finding = said["summary"], said["finding"]
    click.echo(f"{figures(summary)}; states: {', '.join(summary['states']) or 'none'}")
    if finding is not None:
        how = (
            f"{finding['steps']} steps in {finding['cases']} cases lead to it{_often(finding['tries'])}"
            if finding["reproduced"]
            else "it did not happen again; the last cases were kept"
        )
        click.echo(f"\n{_who(order)} {finding['message']}\n{finding['detail']}\n{how}:\n\n{finding['test']}")
        click.echo(f"reproducer: {finding['folder']}\nfound by: {order.command}")
        return terminal.FAILED
    if summary["interrupted"]:
        click.echo("interrupted; nothing was found until then", err=True)
        return 128 + signal.SIGINT
    click.echo(f"nothing found; seed {order.seed}")
    return terminal.OK


def _often(tries: int) -> str:
    return f", within {tries} tries" if tries > 1 else ""


def figures(now: dict[str, Any]) -> str:
    """Return the figures of a run as one line."""
    memory = f", {now['memory_mb'][0]} MB" if now["memory_mb"] else ""
    ignored = f", {now['ignored']} ignored findings" if now["ignored"] else ""
    return (
        f"{now['seconds']:.0f} s: {now['packets']} packets and {now['requests']} requests in {now['cases']} cases, "
        f"{now['rate']}/s, {len(now['states'])} states, {now['features']} behaviours, corpus {now['corpus']}"
        f"{memory}{ignored}"
    )


class _Screen:
    """Prints progress: one line that is drawn again at a terminal, else a line every few seconds."""

    def __init__(self, console: Console, out: TextIO) -> None:
        self._console = console
        self._out = out
        self._is_terminal = out.isatty()
        self._next = 0.0

    def progress(self, text: str, seconds: float) -> None:
        """Show a line of progress. seconds: since what is in progress began; a line ends that."""
        if self._is_terminal:
            self._out.write(f"\r\x1b[K{text[: self._console.width - 1]}")
            self._out.flush()
        elif seconds >= self._next:
            self._next = seconds + _EACH
            click.echo(text, file=self._out)

    def line(self, text: str) -> None:
        self._next = _EACH
        self.end()
        click.echo(text, file=self._out)

    def end(self) -> None:
        if self._is_terminal:
            self._out.write("\r\x1b[K")
