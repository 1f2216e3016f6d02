"""Find the black-box tests of a checkout that cite each id, by reading their sources.

The marks are read without running the test, so that a test counts as citing an id even where it cannot run. Ids that
a mark takes from a variable are not seen here; the results of a run have them.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Final

from harness import suite
from harness.report.coverage import BLACK_BOX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_MARKS: Final = frozenset({"requirement", "bug"})


def read_citations(root: Path) -> dict[str, set[str]]:
    """Return the black-box tests, as `selftests/netns/test_x.py::test_y`, by the ids that their marks name."""
    cited: dict[str, set[str]] = {}
    for folder in BLACK_BOX:
        for path in sorted((root / suite.FOLDER / folder).rglob("test_*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for test, name in _citations(tree):
                cited.setdefault(name, set()).add(f"{path.relative_to(root).as_posix()}::{test}")
    return cited


def _citations(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each test of a module with each id that it cites.

    A test cites what its decorators cite, and the variables and functions of the module that they name.
    """
    defined = {name: node for statement in tree.body for name, node in _definitions(statement)}
    shared = _cited_by(defined["pytestmark"], defined, set()) if "pytestmark" in defined else []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            own = [name for decorator in node.decorator_list for name in _cited_by(decorator, defined, set())]
            for name in dict.fromkeys((*own, *shared)):
                yield node.name, name


def _definitions(statement: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """Yield the name and the value of what a statement of a module defines: a variable or a function."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value
        case ast.FunctionDef(name=name):
            yield name, statement


def _cited_by(node: ast.AST, defined: Mapping[str, ast.AST], seen: set[str]) -> list[str]:
    """Return the ids that an expression cites, itself or by the names in it. seen: names already looked up."""
    ids: list[str] = []
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) if name in defined and name not in seen:
                seen.add(name)
                ids += _cited_by(defined[name], defined, seen)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="mark"), attr=kind), args=args) if kind in _MARKS:
                ids += [arg.value for arg in args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return ids
