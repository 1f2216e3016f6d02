"""Check that each decision in refwg's core cites the paper or the driver, and rightly.

A citation is a comment on a line of its own: `# 5.4.6: reason` or `# counter_validate: reason`. A function of the core
that drops a packet, compares or computes with a constant of the protocol, or verifies something has at least one. Every
cited section and function exists, by the tables in selftests/conformance.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import refwg

CONFORMANCE = Path(__file__).parents[2] / "conformance"
SECTIONS: dict[str, str] = tomllib.loads((CONFORMANCE / "whitepaper-sections.toml").read_text())
BY_FILE: dict[str, list[str]] = tomllib.loads((CONFORMANCE / "driver-functions.toml").read_text())
DRIVER_FUNCTIONS = {name for names in BY_FILE.values() for name in names}

SOURCES = {path.stem: path.read_text() for path in sorted(Path(refwg.__file__).parent.glob("*.py"))}
# The modules that check messages and decide about sessions.
CHECKED = ("noise", "cookie", "receive", "send", "timers")
# Names by which a packet is dropped.
DROPS = {"DropReason", "Dropped", "Refused"}
# Functions and methods of refwg that verify a tag, a mac, a counter, an age, an address or a state.
VERIFIES = {
    "consume_initiation",
    "consume_reply",
    "consume_response",
    "has_expired",
    "is_fresh",
    "is_source_allowed",
    "may_initiate",
    "open",
    "open_data",
    "open_initiation",
    "same",
    "validate",
    "xopen",
}

CITATION = re.compile(r"# (?:(?P<section>\d+(?:\.\d+)*)|(?P<function>[a-z][a-z0-9]*(?:_[a-z0-9]+)+|send[46])): \S")
SNAKE_CASE = re.compile(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b")
SECTION_IN_DOCSTRING = re.compile(r"\((\d+(?:\.\d+)+)\)")
SECTIONS_IN_DOCSTRING = re.compile(r"\bsections? ((?:\d+(?:\.\d+)*(?:, | and | to )?)+) of the paper")


class Function(NamedTuple):
    """A function or method; first: the line of its first decorator or of `def`."""

    name: str
    node: ast.FunctionDef
    first: int
    last: int


def functions_of(source: str) -> list[Function]:
    """All functions and methods of a module; what is nested in one belongs to it."""
    tree = ast.parse(source)
    scopes = [("", tree.body), *((f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef))]
    return [
        Function(
            prefix + node.name, node, min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno
        )
        for prefix, body in scopes
        for node in body
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]


def constants_of(source: str) -> set[str]:
    """The constants of the protocol that a module imports."""
    return {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "refwg.messages"
        for alias in node.names
        if alias.name.isupper()
    }


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def decisions_of(function: Function, constants: set[str]) -> set[str]:
    """Return in words which decisions of a function need a citation."""
    decisions: set[str] = set()
    for node in ast.walk(function.node):
        if isinstance(node, ast.Compare | ast.BinOp):
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            decisions |= {f"uses {name}" for name in names & constants}
        elif isinstance(node, ast.Call) and called(node) in VERIFIES:
            decisions.add(f"calls {called(node)}")
        elif isinstance(node, ast.Name) and node.id in DROPS:
            decisions.add("drops")
    return decisions


def comments_of(source: str) -> dict[int, str]:
    """The comments that stand on a line of their own, by line number."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string
        for token in tokens
        if token.type == tokenize.COMMENT and token.line.strip() == token.string
    }


def uncited(source: str) -> dict[str, set[str]]:
    """The functions of a module that decide something without a citation, and what they decide.

    A citation stands inside the function or on the line directly above it.
    """
    constants = constants_of(source)
    citations = [line for line, comment in comments_of(source).items() if CITATION.match(comment)]
    return {
        function.name: decisions
        for function in functions_of(source)
        if (decisions := decisions_of(function, constants))
        and not any(function.first - 1 <= line <= function.last for line in citations)
    }


def docstrings_of(source: str) -> list[str]:
    nodes = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def cited_sections(source: str) -> set[str]:
    sections = {match["section"] for comment in comments_of(source).values() if (match := CITATION.match(comment))}
    for docstring in docstrings_of(source):
        sections |= set(SECTION_IN_DOCSTRING.findall(docstring))
        for group in SECTIONS_IN_DOCSTRING.findall(" ".join(docstring.split())):
            sections |= set(re.findall(r"\d+(?:\.\d+)*", group))
    return {section for section in sections if section}


def cited_functions(source: str) -> set[str]:
    """Functions at the head of a citation or in its text, and backticked ones in docstrings."""
    names: set[str] = set()
    own = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    for comment in comments_of(source).values():
        if match := CITATION.match(comment):
            names |= {match["function"]} - {None}
            names |= set(SNAKE_CASE.findall(comment)) - own
        names |= {word for word in SNAKE_CASE.findall(comment) if word.startswith("wg_")}
    for docstring in docstrings_of(source):
        names |= {word for word in re.findall(r"`(\w+)`", docstring) if word.startswith("wg_") or word == "send4"}
    return names


DECIDING = [
    (module, function.name)
    for module in CHECKED
    for function in functions_of(SOURCES[module])
    if decisions_of(function, constants_of(SOURCES[module]))
]


@pytest.mark.parametrize("module", CHECKED)
def test_every_deciding_function_has_citation(module: str) -> None:
    assert uncited(SOURCES[module]) == {}


@pytest.mark.parametrize(("module", "name"), DECIDING)
def test_missing_citation_of_any_function_is_found(module: str, name: str) -> None:
    lines = SOURCES[module].splitlines(keepends=True)
    (function,) = (f for f in functions_of(SOURCES[module]) if f.name == name)
    for number in range(function.first - 1, function.last + 1):
        if CITATION.match(lines[number - 1].strip()):
            lines[number - 1] = lines[number - 1].replace("# ", "# See ", 1)
    assert name in uncited("".join(lines))


@pytest.mark.parametrize(
    "line",
    [
        "raise Refused(reason)",
        "return Dropped(DropReason.REPLAY)",
        "reason = DropReason.REPLAY",
        "return counter >= REJECT_AFTER_MESSAGES",
        "return now + REKEY_TIMEOUT",
        "return cipher.open(0, data)",
        "return same(left, right)",
    ],
)
def test_decision_without_citation_is_found(line: str) -> None:
    imports = "from refwg.messages import REJECT_AFTER_MESSAGES, REKEY_TIMEOUT\n"
    assert set(uncited(f"{imports}def check():\n    {line}\n")) == {"check"}
    assert uncited(f"{imports}def check():\n    # 5.4.6: why\n    {line}\n") == {}
    assert uncited(f"{imports}class C:\n    # decrypt_packet: why\n    def check(self):\n        {line}\n") == {}


@pytest.mark.parametrize("comment", ["# 5.4.6", "# see 5.4.6: why", "# Always: why", "# 5.4.6:"])
def test_malformed_citation_does_not_count(comment: str) -> None:
    assert set(uncited(f"def check():\n    {comment}\n    raise Refused(reason)\n")) == {"check"}


@pytest.mark.parametrize("module", SOURCES)
def test_cited_sections_are_in_whitepaper(module: str) -> None:
    assert cited_sections(SOURCES[module]) - set(SECTIONS) == set()


@pytest.mark.parametrize("module", SOURCES)
def test_cited_functions_are_in_driver(module: str) -> None:
    assert cited_functions(SOURCES[module]) - DRIVER_FUNCTIONS == set()


def test_misspelled_citations_are_found() -> None:
    source = (
        '"""Check; section 5.9 of the paper (6.9), `wg_xmitt`."""\n# 5.4.8: a\n# decrypt_pakcet: b; keep_key_frsh\n'
    )
    assert cited_sections(source) - set(SECTIONS) == {"5.9", "6.9", "5.4.8"}
    assert cited_functions(source) - DRIVER_FUNCTIONS == {"wg_xmitt", "decrypt_pakcet", "keep_key_frsh"}


def test_every_listed_driver_function_is_cited() -> None:
    cited = set().union(*(cited_functions(source) for source in SOURCES.values()))
    assert DRIVER_FUNCTIONS - cited == set()


def test_verifying_functions_exist_and_are_called() -> None:
    nodes = [node for module in CHECKED for node in ast.walk(ast.parse(SOURCES[module]))]
    assert {called(node) for node in nodes if isinstance(node, ast.Call)} >= VERIFIES
