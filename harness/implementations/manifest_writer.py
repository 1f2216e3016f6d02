"""Write a manifest as TOML, with a comment for each capability that the program lacks."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any, Final

from harness.implementations.manifest import CAPABILITIES
from harness.tables import toml_string

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.implementations.manifest import Manifest

_WIDTH: Final = 118
_LONGEST: Final = 400  # characters of what was seen


def manifest_values(manifest: Manifest) -> dict[str, Any]:
    """Return the keys of a manifest as in its file, or as they are for a program given by its path."""
    values: dict[str, Any] = {"name": manifest.name, "kind": manifest.kind}
    if manifest.source is not None:
        values = _read(manifest.source)
    elif manifest.like is not None and manifest.like.source is not None:
        # Title, variants and installation are left out: they belong to the other program.
        values |= {key: table for key, table in _read(manifest.like.source).items() if key in {"program", "watch"}}
    program = values.setdefault("program", {})
    program |= {"command": list(manifest.command), "version": list(manifest.version_command)}
    if not manifest.key_log:
        program.pop("key_log", None)
    if not manifest.preload:
        program.pop("preload", None)
    # Where the manifest is written to, a relative path may mean another file.
    if manifest.program is not None:
        program["path"] = str(manifest.program)
    if manifest.expectations is not None:
        values["expectations"] = str(manifest.expectations)
    return values


def _read(source: Path) -> dict[str, Any]:
    return tomllib.loads(source.read_text(encoding="utf-8"))


def write_manifest(values: Mapping[str, Any], lacking: Mapping[str, str], remarks: Sequence[str]) -> str:
    """The text of a manifest that declares all capabilities but those lacking, with what was seen of each of them.

    remarks: comment lines for the beginning.
    """
    top = {key: value for key, value in values.items() if not isinstance(value, dict) and key != "capabilities"}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"# {_one_line(remark)}" for remark in remarks]
    lines += _entries(top)
    declared = [json.dumps(name) for name in CAPABILITIES if name not in lacking]
    lines += ["capabilities = [", *_filled(declared), "]"]
    if lacking:
        lines += ["", "# It lacks:"]
    for name, seen in lacking.items():
        lines += [f"# {name} ({CAPABILITIES[name]})", f"#     {_one_line(seen)}"]
    for title, table in tables.items():
        lines += ["", f"[{title}]", *_entries(table)]
    return "\n".join(lines) + "\n"


def _entries(table: Mapping[str, Any]) -> Iterator[str]:
    return (f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _value(key)


def _value(value: object) -> str:
    match value:
        case dict():
            return "{ " + ", ".join(_entries(value)) + " }" if value else "{}"
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case str():
            return toml_string(value)
        case _:
            return json.dumps(value)


def _filled(words: Sequence[str]) -> Iterator[str]:
    line = "   "
    for word in words:
        if len(line) + len(word) + 2 > _WIDTH:
            yield line
            line = "   "
        line += f" {word},"
    if line.strip():
        yield line


def _one_line(text: str) -> str:
    """Return a program's output as one line that fits into a comment of TOML."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    whole = " ".join(words)
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]} ..."
