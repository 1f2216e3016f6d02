"""Check that harness raises only HarnessErrors, and the drawing in their docstring."""

from __future__ import annotations

import ast
import errno
import re
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

import pytest

import harness
from harness.errors import HarnessError, error_name, refusal, unreadable

PACKAGE = Path(harness.__file__).parent
ROOT = "harness.errors.HarnessError"
# The exceptions that are not HarnessErrors, and why.
ELSEWHERE = {
    "harness.sandbox.launcher.Refused": "that file imports the standard library only",
    "harness.plugin.phases.Overdue": "an outcome of a test: pytest's Failed",
    "harness.plugin.verdicts.Differs": "an outcome of a test: pytest's Skipped",
    "harness.plugin.verdicts.Blocked": "an outcome of a test: pytest's Failed",
    "harness.plugin.verdicts.NotReached": "an outcome of a test: pytest's Failed",
    "harness.plugin.verdicts.SmokeFailed": "an outcome of a test: pytest's Failed",
}
# A branch of the drawing: the text left of the name has three characters for each level.
BRANCH = re.compile(r"^((?:[| ]  )*)[|`]- (\w+) {2,}\S", re.MULTILINE)


def classes() -> dict[str, list[str]]:
    """Every class that harness defines, with its bases; all by dotted names."""
    bases_of = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("harness", *path.relative_to(PACKAGE).with_suffix("").parts))
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {
            a.asname or a.name: f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names
        }
        definitions = [node for node in nodes if isinstance(node, ast.ClassDef)]
        names |= {node.name: f"{module}.{node.name}" for node in definitions}
        for node in definitions:
            bases = [ast.unparse(base) for base in node.bases]
            bases_of[names[node.name]] = [names.get(b, b if "." in b else f"builtins.{b}") for b in bases]
    return bases_of


def is_exception(name: str, bases_of: dict[str, list[str]]) -> bool:
    if name in bases_of:
        return any(is_exception(base, bases_of) for base in bases_of[name])
    module, _, own = name.rpartition(".")
    value = getattr(import_module(module), own, None)
    return isinstance(value, type) and issubclass(value, BaseException)


def subclasses(name: str, bases_of: dict[str, list[str]]) -> dict[str, str]:
    """All direct and indirect subclasses of a class, each with its base."""
    children = {child: name for child, bases in bases_of.items() if name in bases}
    return children | {k: v for child in children for k, v in subclasses(child, bases_of).items()}


def drawn() -> dict[str, str]:
    """The drawing in the docstring: every name with its parent."""
    parents, path = {}, ["HarnessError"]
    for indent, name in BRANCH.findall(cleandoc(HarnessError.__doc__ or "")):
        depth = len(indent) // 3
        path[depth + 1 :] = [name]
        parents[name] = path[depth]
    return parents


def test_exceptions_of_harness_derive_from_harness_error() -> None:
    bases_of = classes()
    exceptions = {name for name in bases_of if is_exception(name, bases_of)}
    assert exceptions - {ROOT, *subclasses(ROOT, bases_of)} == set(ELSEWHERE)


def test_drawing_of_harness_error_has_every_subclass() -> None:
    defined = subclasses(ROOT, classes())
    assert drawn() == {name.rpartition(".")[2]: parent.rpartition(".")[2] for name, parent in defined.items()}


@pytest.mark.parametrize(("detail", "reason"), [("", "Invalid argument"), ("bad key", "Invalid argument (bad key)")])
def test_refusal_carries_errno_and_reason(detail: str, reason: str) -> None:
    error = refusal("wg0 (genl)", "set listen_port 5", errno.EINVAL, detail)
    assert (error.errno, error.reason) == (errno.EINVAL, reason)
    assert str(error) == f"wg0 (genl): EINVAL: set listen_port 5: {reason}"


def test_unreadable_answer_carries_its_reason() -> None:
    error = unreadable("rtnetlink", "cut off after 5 bytes")
    assert (error.errno, error.reason) == (errno.EBADMSG, "unreadable answer: cut off after 5 bytes")


@pytest.mark.parametrize(
    ("number", "name"), [(errno.EADDRINUSE, "EADDRINUSE"), (errno.EOPNOTSUPP, "EOPNOTSUPP"), (9999, "errno 9999")]
)
def test_error_number_has_its_usual_name(number: int, name: str) -> None:
    assert error_name(number) == name
