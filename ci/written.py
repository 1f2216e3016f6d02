"""Write tables into a document, or report which of them are out of date."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def run(
    module: str,
    description: str,
    document: Path,
    *,
    outdated: Callable[[str], list[str]],
    rewritten: Callable[[str], str],
    arguments: Sequence[str] | None,
) -> int:
    """Write the tables, or with --check only report which are out of date; return 1 if --check finds one, else 0.

    module, description: of the command. outdated: returns the names of a text's tables that are not current.
    rewritten: returns the text with current ones.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; report tables that are out of date and exit with 1"
    )
    check = parser.parse_args(arguments).check
    text = document.read_text()
    wrong = outdated(text)
    for name in wrong:
        print(f"{document.name}: {name}: {f'out of date; run python -m {module}' if check else 'written again'}")
    if not check:
        document.write_text(rewritten(text))
    return 1 if check and wrong else 0
