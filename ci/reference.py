"""Write docs/reference.md from the plugin's registrations: `python -m ci.reference`.

The plugin registers options, settings and markers with pytest, and defines fixtures; the command line is click's. A
table replaces the text between its markers, `<!-- reference: NAME -->` and `<!-- end -->`. The prose around the tables
is written by hand.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

import harness
from ci.setup_checkout import ROOT
from ci.written import Written
from harness.cli.commands import cli
from harness.implementations.manifest import CAPABILITIES
from harness.lanes import GUESTS, HERE, SUITES
from harness.plugin import pytest_plugins
from harness.plugin.hooks import MARKERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

DOCUMENT: Final = ROOT / "docs" / "reference.md"
_STATUS: Final = re.compile(r"Exit status: (.+?)\.(?:\n\n|\Z)", re.DOTALL)


@dataclass
class Registrations:
    """Stands in for pytest's parser and option group: keeps what the plugin registers."""

    options: list[tuple[tuple[str, ...], dict[str, Any]]] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)

    def getgroup(self, *_: object) -> Registrations:
        """Return itself as the group."""
        return self

    def addoption(self, *names: str, **attributes: Any) -> None:
        """Keep an option."""
        self.options.append((names, attributes))

    def addini(self, name: str, help: str, **_: object) -> None:  # noqa: A002 - pytest's name
        """Keep a setting."""
        self.settings.append((name, help))


def registrations() -> Registrations:
    """Return what all modules of the plugin register, in their order."""
    kept = Registrations()
    for name in pytest_plugins:
        if register := getattr(importlib.import_module(name), "pytest_addoption", None):
            register(kept)
    return kept


def options() -> str:
    """Return a table of the options that the plugin adds to pytest."""
    rows = []
    for names, attributes in registrations().options:
        choices = "|".join(attributes.get("choices", ()))
        value = attributes.get("metavar") or choices
        words = f"{names[0]} {value}" if value else names[0]
        rows.append((code(words), escaped(attributes["help"])))
    return table(("option", "what it does"), rows)


def settings() -> str:
    """Return a table of the settings for pytest's configuration file."""
    return table(("setting", "what it does"), [(code(name), escaped(text)) for name, text in registrations().settings])


def markers() -> str:
    """Return a table of the markers that the plugin registers."""
    parts = (text.partition(": ") for text in MARKERS)
    return table(("marker", "meaning"), [(code(f"@pytest.mark.{name}"), escaped(text)) for name, _, text in parts])


def fixtures() -> str:
    """Return a table of the plugin's fixtures, with the class of each."""
    rows = []
    for name in pytest_plugins:
        for key, value in vars(importlib.import_module(name)).items():
            # pytest's definition of a fixture wraps the function.
            if type(value).__name__ == "FixtureFunctionDefinition":
                function = inspect.unwrap(value)
                gives = re.sub(r"Generator\[(\w+).*\]", r"\1", str(function.__annotations__["return"]))
                rows.append((code(key), code(gives), escaped(first_sentence(function.__doc__ or ""))))
    return table(("fixture", "gives", "what it is"), rows)


def capabilities() -> str:
    """Return a table of the capabilities that a manifest may declare."""
    return table(("capability", "meaning"), [(code(name), escaped(text)) for name, text in CAPABILITIES.items()])


def names() -> str:
    """Return a table of the names that `harness` exports, with the first sentence of each class and function."""
    rows = []
    for name in sorted(harness.NAMES):
        value = getattr(harness, name)
        described = inspect.isclass(value) or inspect.isfunction(value)
        rows.append((code(name), escaped(first_sentence(inspect.getdoc(value) or "")) if described else "a constant"))
    return table(("name", "what it is"), rows)


def commands() -> str:
    """Return a table of the commands of `wg-interop`."""
    rows = []
    for name, command in sorted(cli.commands.items()):
        usage = " ".join(["wg-interop", name, *(each.make_metavar(_context(command)) for each in _arguments(command))])
        rows.append((code(usage), escaped(first_sentence(command.help or ""))))
    return table(("command", "what it does"), rows)


def _context(command: click.Command) -> click.Context:
    return click.Context(command)


def _arguments(command: click.Command) -> list[click.Parameter]:
    return [each for each in command.params if isinstance(each, click.Argument)]


def exit_statuses() -> str:
    """Return a table of what the commands say of their exit status; 130 after Ctrl-C is the same for all."""
    rows = [(code("wg-interop"), escaped(status_of(cli)))]
    rows += [
        (code(f"wg-interop {name}"), escaped(text))
        for name, command in sorted(cli.commands.items())
        if (text := status_of(command))
    ]
    return table(("command", "exit status"), rows)


def status_of(command: click.Command) -> str:
    """Return what the help of a command says of its exit status; empty if it says nothing."""
    found = _STATUS.search(inspect.cleandoc(command.help or ""))
    return " ".join(found[1].split()) if found else ""


def lanes_and_suites() -> str:
    """Return the values of --lane and --suite."""
    return f"Lanes: {', '.join(map(code, (*HERE, *GUESTS)))}. Suites: {', '.join(map(code, (*SUITES, 'all')))}."


# Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def code(text: str) -> str:
    """Return text as code in a cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def escaped(text: str) -> str:
    """Return text in which Markdown finds no cells, tags or emphasis; code in it stays code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part.replace("|", r"\|") if part[:1] == "`" else _plain(part) for part in parts)


def _plain(text: str) -> str:
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text)


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring, from its first paragraph."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]


# The document

TABLES: Final[dict[str, Callable[[], str]]] = {
    "fixtures": fixtures,
    "markers": markers,
    "options": options,
    "settings": settings,
    "lanes": lanes_and_suites,
    "names": names,
    "capabilities": capabilities,
    "commands": commands,
    "exit statuses": exit_statuses,
}


WRITTEN: Final = Written("ci.reference", __doc__.partition("\n")[0], DOCUMENT, "reference", TABLES)


if __name__ == "__main__":
    sys.exit(WRITTEN.main())
