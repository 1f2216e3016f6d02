"""Read a run's options from the environment and from wg-interop.toml.

Each option of the lab has a variable, `WG_` and its name: WG_IMPL, WG_TIMEOUT_SCALE. The file is the first
`wg-interop.toml` in the current directory or above it (docs/settings.md):

manifests = ["implementations/"]        # files or folders: implementations that are known, and tested if asked for
[options]
impl = ["mine=./wireguard", "wireguard-go"]
timeout-scale = 2
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.lanes import GUESTS, HERE, KEEP, LANE, SUITES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness.tables import Table

FILE: Final = "wg-interop.toml"
_PREFIX: Final = "WG_"
_BETWEEN: Final = re.compile(r"[\s,]+")
_FLAGS: Final = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

# A list of words, a word, a whole number, a number, or true.
Value = tuple[str, ...] | str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """An option: how its value is written. choices: the values that it may have; empty: any."""

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    is_path: bool = False

    @property
    def variable(self) -> str:
        """The name of its environment variable."""
        return _PREFIX + self.name.upper().replace("-", "_")

    def checked(self, value: Value, where: str) -> Value:
        """Return the value; UsageError, beginning with `where`, if it is not among the choices."""
        for word in value if isinstance(value, tuple) else (value,):
            if self.choices and word not in self.choices:
                raise UsageError(f"{where}: {word!r} is not one of {', '.join(self.choices)}")
        return value


_OPTIONS: Final = {
    option.name: option
    for option in (
        _Option(name="impl", kind=tuple),
        _Option(name="impl-manifest", kind=tuple, is_path=True),
        _Option(name="like", kind=tuple),
        _Option(name="pair", kind=tuple),
        _Option(name="suite", kind=tuple, choices=SUITES),
        _Option(name="lane", kind=tuple, choices=(*HERE, *GUESTS)),
        _Option(name="on", kind=tuple),
        _Option(name="nightly", kind=bool),
        _Option(name="kernel", kind=tuple),
        _Option(name="kernel-module", kind=tuple, is_path=True),
        _Option(name="results", kind=str, is_path=True),
        _Option(name="keep", kind=str, choices=KEEP),
        _Option(name="timeout-scale", kind=float),
        _Option(name="seed", kind=int),
        _Option(name="baseline", kind=str, is_path=True),
        _Option(name="must-include", kind=tuple),
        _Option(name="ktap", kind=str),
        _Option(name="blame-seconds", kind=float),
    )
}


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of an option. source: the variable or the file that it comes from."""

    value: Value
    source: str
    rank: int  # the higher replaces the lower

    def __str__(self) -> str:
        value = " ".join(self.value) if isinstance(self.value, tuple) else f"{self.value}"
        return f"{value.lower() if isinstance(self.value, bool) else value} ({self.source})"


_COMMAND_LINE, _VARIABLE, _FROM_FILE = 2, 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What environment and file give. options: by name; manifests: files and folders, absolute."""

    options: Mapping[str, Setting] = field(default_factory=dict)
    manifests: tuple[Path, ...] = ()

    def beside(self, given: Mapping[str, Value]) -> dict[str, Setting]:
        """Return the options to add to those that the command line has given.

        A list replaces that of a lower source, and is not added to it. Options about programs belong together: `like`
        and `pair` of a lower source than `impl` are left out, and of an `impl` of a lower source than `pair` only the
        programs that the pairs name are used.
        """
        every = {name: Setting(value, "", _COMMAND_LINE) for name, value in given.items()}
        every = {**self.options, **every}
        impl = every.get("impl")
        for name in ("like", "pair"):
            if impl is not None and name in every and every[name].rank < impl.rank:
                del every[name]
        pair = every.get("pair")
        if impl is not None and pair is not None and impl.rank < pair.rank:
            every["impl"] = Setting(_named(impl.value, pair.value), impl.source, impl.rank)
        return {
            name: setting for name, setting in every.items() if setting.rank < _COMMAND_LINE and setting.value != ()
        }


def _named(programs: Value, pairs: Value) -> Value:
    """Return those of `NAME=PROGRAM` whose name is in a pair, as it is or with a variant."""
    sides = {side for pair in _words(pairs) for side in pair.split("~")}
    names = sides | {side.partition("+")[0] for side in sides}
    return tuple(text for text in _words(programs) if "=" in text and text.partition("=")[0] in names)


def _words(value: Value) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()


def lines(settings: Mapping[str, Setting]) -> list[str]:
    """Return a line for each option, `timeout-scale 2 (WG_TIMEOUT_SCALE)`."""
    return [f"{name} {setting}" for name, setting in settings.items()]


def variables() -> frozenset[str]:
    """Return the names of all variables."""
    return frozenset(option.variable for option in _OPTIONS.values())


def read_settings(environment: Mapping[str, str] | None = None, start: Path | None = None) -> Settings:
    """Read the environment, and the file in `start` or above; raises UsageError for a mistake in either.

    In a guest there are none: it has the options of its host.
    """
    environment = os.environ if environment is None else environment
    if environment.get(LANE):
        return Settings()
    path = find_file(start or Path.cwd())
    found = _read_file(path) if path is not None else Settings()
    return Settings(options={**found.options, **_read_variables(environment)}, manifests=found.manifests)


def find_file(start: Path) -> Path | None:
    """Return the first wg-interop.toml in this directory or above it; None without one."""
    candidates = (folder / FILE for folder in (start, *start.parents))
    return next((path for path in candidates if os.access(path, os.F_OK)), None)


def _read_variables(environment: Mapping[str, str]) -> dict[str, Setting]:
    """Read the variables that are set and not empty; other variables WG_... belong to other programs."""
    read = {}
    for name, option in _OPTIONS.items():
        if text := environment.get(option.variable, "").strip():
            value = option.checked(_parse(text, option), option.variable)
            read[name] = Setting(value, option.variable, _VARIABLE)
    return read


def _parse(text: str, option: _Option) -> Value:
    if option.kind is tuple:
        return tuple(word for word in _BETWEEN.split(text) if word)
    if option.kind is bool:
        if text.lower() not in _FLAGS:
            raise UsageError(f"{option.variable}: want 1 or 0, not {text!r}")
        return _FLAGS[text.lower()]
    try:
        value: Value = option.kind(text)
    except ValueError:
        raise UsageError(f"{option.variable}: {text!r} is not {_kind(option)}") from None
    return value


def _kind(option: _Option) -> str:
    return "a whole number" if option.kind is int else "a number"


def _read_file(path: Path) -> Settings:
    from harness.tables import read_toml  # noqa: PLC0415 - most runs of pytest have no such file

    top = read_toml(path, str(path))
    manifests = tuple(_path(text, path) for text in top.words("manifests", ()))
    table = top.table("options")
    _refuse_unknown(top, ("manifests", "options"), top.rest())
    _refuse_unknown(table, _OPTIONS, table.rest())
    options = {}
    for name in table.rest():
        option = _OPTIONS[name]
        value = option.checked(_take(table, option), f"{path}: options.{name}")
        options[name] = Setting(_located(value, option, path), str(path), _FROM_FILE)
    return Settings(options=options, manifests=manifests)


def _refuse_unknown(table: Table, known: Sequence[str] | Mapping[str, object], found: Sequence[str]) -> None:
    for key in found:
        if key not in known:
            raise table.wrong(f"unknown key {table.title}{key}; there are: {', '.join(known)}")


def _take(table: Table, option: _Option) -> Value:
    take: dict[type, Callable[[str], Value]] = {
        tuple: table.words, bool: table.flag, str: table.text, int: table.number, float: table.decimal,
    }  # fmt: skip
    return take[option.kind](option.name)


def _located(value: Value, option: _Option, file: Path) -> Value:
    """Make the paths in a value absolute: in the file they are relative to its folder."""
    if option.is_path:
        return (
            tuple(str(_path(text, file)) for text in value)
            if isinstance(value, tuple)
            else str(_path(str(value), file))
        )
    if option.name == "ktap" and value != "-":
        return str(_path(str(value), file))
    if option.name == "impl" and isinstance(value, tuple):
        parts = (text.partition("=") for text in value)
        return tuple(f"{name}={_path(program, file)}" if equals else name for name, equals, program in parts)
    if option.name == "kernel" and isinstance(value, tuple):
        return tuple(str(_path(text, file)) if "/" in text else text for text in value)
    return value


def _path(text: str, file: Path) -> Path:
    try:
        return file.parent.absolute() / Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{file}: {text}: {error}") from error
