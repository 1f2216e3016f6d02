"""Check that test names, which are ids in reports, are short and begin with a subject."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SELFTESTS = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(SELFTESTS)) for path in SELFTESTS.rglob("test_*.py"))
# Characters that fit in a terminal line beside a pair and a state.
LONGEST = 60
ARTICLES = {"a", "an", "the"}
# Words that stand for a subject instead of naming it.
HEADLESS = {"who", "what", "whose", "whoever", "whatever", "of", "where"}


@pytest.mark.parametrize("file", FILES)
def test_name_is_short_and_begins_with_its_subject(file: str) -> None:
    names = [
        node.name
        for node in ast.walk(ast.parse((SELFTESTS / file).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    words = {name: name.split("_")[1:] for name in names}
    wrong = [n for n in names if len(n) > LONGEST or ARTICLES & set(words[n]) or words[n][0] in HEADLESS]
    assert wrong == []
