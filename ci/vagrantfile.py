"""Read the Vagrantfile without Ruby: box, host name, synced folder and shell provisioners.

It reads only the forms that the Vagrantfile of this project uses: `config.vm.NAME = VALUE`, and calls of
`config.vm.provision` and `config.vm.synced_folder` with literal arguments. Any other form of these raises UsageError.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import Final

from harness.errors import UsageError

Value = str | bool | list[str]

_SETTING: Final = re.compile(r'^ *config\.vm\.(\w+) *= *"([^"]*)"', re.MULTILINE)
_CALL: Final = re.compile(r"^ *(\S+)\.(provision|synced_folder)\b *", re.MULTILINE)
_SPACE: Final = re.compile(r"\s+")
_COMMENT: Final = re.compile(r"#.*")
_KEY: Final = re.compile(r"(\w+): ")
_TEXT: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
_WORD: Final = re.compile(r"true|false")
_LIST: Final = re.compile(r"\[([^\]]*)\]")
_HEREDOC: Final = re.compile(r"<<~(\w+)(?=([^\n]*)\n)")
_ESCAPES: Final = {"n": "\n", "t": "\t"}

_SHELL_OPTIONS: Final = {"type", "inline", "privileged", "run"}
_FOLDER_OPTIONS: Final = {"type", "rsync__exclude"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioner:
    """A shell provisioner.

    script: text for bash. privileged: vagrant runs it by sudo. on_request: runs only by name (run: "never").
    """

    name: str
    script: str
    privileged: bool = True
    on_request: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that rsync copies into the box. source: relative to the Vagrantfile. excluded: for rsync --exclude."""

    source: str
    target: str
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The contents of the Vagrantfile. provisioners: in the order in which vagrant runs them."""

    name: str
    hostname: str
    folder: Folder
    provisioners: tuple[Provisioner, ...]

    @property
    def suite(self) -> str:
        """The Debian release of the box, `bookworm` for debian/bookworm64; UsageError for another box."""
        match = re.fullmatch(r"debian/(\w+?)64", self.name)
        if match is None:
            raise UsageError(f"Vagrantfile: the box is {self.name}, expected debian/RELEASE64")
        return match[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    name: str
    line: int
    arguments: list[Value]
    options: dict[str, Value]

    def text(self, option: str, default: str | None = None) -> str:
        """Return an option that must be a string; UsageError if it is not, or is missing and has no default."""
        value = self.options.get(option, default)
        if not isinstance(value, str):
            raise UsageError(f"{self}: expected a text as {option}")
        return value

    def check(self, known: set[str], kind: str) -> None:
        """Raise UsageError for an option that this module does not know, and for another type than `kind`."""
        if unknown := self.options.keys() - known:
            raise UsageError(f"{self}: unknown option {', '.join(sorted(unknown))}; extend ci/vagrantfile.py")
        if self.text("type") != kind:
            raise UsageError(f"{self}: type is {self.text('type')}, expected {kind}")

    def __str__(self) -> str:
        return f"Vagrantfile:{self.line}: {self.name}"


def parse(text: str) -> Box:
    """Parse a Vagrantfile; UsageError names the line that this module cannot read."""
    settings = dict(_SETTING.findall(text))
    if missing := {"box", "hostname"} - settings.keys():
        raise UsageError(f"Vagrantfile: no config.vm.{min(missing)}")
    calls = [_parse_call(text, match) for match in _CALL.finditer(text)]
    folders = [_folder(call) for call in calls if call.name == "synced_folder"]
    if len(folders) != 1:
        raise UsageError(f"Vagrantfile: {len(folders)} synced folders, expected 1")
    provisioners = tuple(_provisioner(call) for call in calls if call.name == "provision")
    return Box(name=settings["box"], hostname=settings["hostname"], folder=folders[0], provisioners=provisioners)


def _provisioner(call: _Call) -> Provisioner:
    call.check(_SHELL_OPTIONS, "shell")
    name, script, run = call.arguments[0], call.text("inline"), call.text("run", "once")
    privileged = call.options.get("privileged", True)
    if run not in {"once", "always", "never"} or not isinstance(privileged, bool) or not isinstance(name, str):
        raise UsageError(f"{call}: a value that vagrant does not know")
    if script.startswith("#!"):
        raise UsageError(f"{call}: the script names its interpreter, expected one for bash")
    return Provisioner(name=name, script=script, privileged=privileged, on_request=run == "never")


def _folder(call: _Call) -> Folder:
    call.check(_FOLDER_OPTIONS, "rsync")
    source, target = map(str, call.arguments)
    excluded = call.options.get("rsync__exclude", [])
    if not isinstance(excluded, list):
        raise UsageError(f"{call}: expected a list as rsync__exclude")
    return Folder(source=source, target=target, excluded=tuple(excluded))


class _Scanner:
    """Reads the literals of a call one after the other. where: begins error messages."""

    def __init__(self, text: str, position: int, where: str) -> None:
        self.text = text
        self.position = position
        self.where = where

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Match a pattern here and step over it; None, without a step, if it does not match."""
        match = pattern.match(self.text, self.position)
        if match:
            self.position = match.end()
        return match

    def value(self) -> Value:
        """Take a string, true or false, a list of strings, or a here-document; UsageError for anything else."""
        if match := self.take(_TEXT):
            return self._unescaped(match[1])
        if match := self.take(_WORD):
            return match[0] == "true"
        if match := self.take(_LIST):
            return [self._unescaped(item) for item in _TEXT.findall(match[1])]
        if match := self.take(_HEREDOC):
            return self._heredoc(match)
        raise self.error("expected a text, a list, true or false")

    def next_argument(self) -> bool:
        """Step over a comma, spaces, line breaks and comments; False at the end of the call."""
        if not self.text.startswith(",", self.position):
            return False
        self.position += 1
        while self.take(_SPACE) or self.take(_COMMENT):
            pass
        return True

    def error(self, message: str) -> UsageError:
        """Return an error that quotes the rest of the line; the caller raises it."""
        rest = self.text[self.position :].split("\n", 1)[0]
        return UsageError(f"{self.where}: {message}, not `{rest}`")

    def _heredoc(self, match: re.Match[str]) -> str:
        if match[2].strip():
            raise self.error("expected the end of the line after <<~")
        body = re.compile(rf"\n((?:.*\n)*?) *{match[1]}\n").match(self.text, self.position)
        if body is None:
            raise self.error(f"expected a line {match[1]}")
        self.position = body.end() - 1
        return self._unescaped(textwrap.dedent(body[1]))

    def _unescaped(self, text: str) -> str:
        if re.search(r"(?<!\\)#\{", text):
            raise self.error("expected a text without #{...}")
        return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), text)


def _parse_call(text: str, match: re.Match[str]) -> _Call:
    name, line = match[2], text.count("\n", 0, match.start()) + 1
    scanner = _Scanner(text, match.end(), f"Vagrantfile:{line}: {name}")
    if match[1] != "config.vm":
        raise UsageError(f"{scanner.where}: called on {match[1]}, expected config.vm")
    arguments: list[Value] = []
    options: dict[str, Value] = {}
    while True:
        if key := scanner.take(_KEY):
            options[key[1]] = scanner.value()
        else:
            arguments.append(scanner.value())
        if not scanner.next_argument():
            break
    if not re.compile(r" *(#.*)?$", re.MULTILINE).match(text, scanner.position):
        raise scanner.error("expected the end of the line")
    return _Call(name=name, line=line, arguments=arguments, options=options)
