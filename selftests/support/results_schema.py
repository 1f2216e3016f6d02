"""Validate files of results by the JSON schema that comes with the package."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from jsonschema import Draft202012Validator

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: Final[dict[str, Any]] = json.loads(
    resources.files("harness.report").joinpath("results.schema.json").read_text(encoding="utf-8")
)
_VALIDATOR: Final = Draft202012Validator(SCHEMA)


def faults(document: object) -> list[str]:
    """Return a line for each violation of the schema: its place in the document, and what is wrong."""
    return sorted(f"{error.json_path}: {error.message}" for error in _VALIDATOR.iter_errors(document))


def faults_of(path: Path) -> list[str]:
    """Return the violations of a file of results."""
    return faults(json.loads(path.read_text(encoding="utf-8")))
