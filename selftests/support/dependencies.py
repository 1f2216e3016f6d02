"""Link the wheel's installed run-time dependencies into a directory."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from harness.vm.image import closure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def link_dependencies(lines: Sequence[str], links: Path) -> None:
    """Link what these requirements, and theirs, have installed here, and nothing else, into a new directory."""
    links.mkdir()
    wanted = [Requirement(line) for line in lines]
    for name in {
        name
        for requirement in wanted
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
        for name in closure(requirement.name, ("", *requirement.extras))
    }:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (links / top).symlink_to(str(distribution.locate_file(top)))
