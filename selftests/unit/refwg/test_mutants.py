"""Check the tables of mutants against refwg's modules, the catalogue and the tests, and how a mutant is loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from functools import cache
from typing import TYPE_CHECKING

import pytest

from harness.cli.mutants import ROLES
from harness.lanes import GUESTS
from refwg import mutants
from refwg.errors import OptionError
from refwg.mutants import Mutant
from selftests.support.sandbox import ROOT, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

MUTANTS = mutants.load_mutants()
CONFORMANCE = ROOT / "selftests" / "conformance"
AREAS = {
    "batch",
    "blind",
    "configuration",
    "cookies",
    "data",
    "handshake",
    "interface",
    "robustness",
    "routing",
    "timers",
}
ROW = """
[[mutant]]
name = "twice"
requirements = ["CR-18"]
module = "refwg.noise"
text = "a"
replacement = "b"
killer = "test_x.py::test_x"
role = "alone"
"""
# Prints the word of a module with and without a mutant, and whether the compiled file is unchanged.
LOAD_SAMPLE = """
import importlib, sys
from pathlib import Path
from refwg import mutants, sample
compiled = Path(sample.__cached__)
before = compiled.read_bytes()
mutant = mutants.Mutant(name="n", area="a", requirements=("X",), module="refwg.sample", text="honest",
                        replacement="broken", killer="k", role="alone")
mutants.install(mutant)
broken = importlib.import_module("refwg.sample")
print(sample.word(), broken.word(), compiled.read_bytes() == before, "refwg.mutants" in sys.modules)
"""


@cache
def cited_by(killer: str) -> set[str]:
    """The requirements and bugs that a test cites, in its own marks and in those of its parameters."""
    path, name = killer.split("::")
    tree = ast.parse((ROOT / path).read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    words = {node.id for mark in function.decorator_list for node in ast.walk(mark) if isinstance(node, ast.Name)}
    # A table of parameters may be a constant of the module.
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    tables = [node.value for node in assigned if {t.id for t in node.targets if isinstance(t, ast.Name)} & words]
    calls = [
        node
        for root in [*function.decorator_list, *tables]
        for node in ast.walk(root)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"pytest.mark.requirement", "pytest.mark.bug"}
    ]
    return {str(argument.value) for call in calls for argument in call.args if isinstance(argument, ast.Constant)}


@cache
def catalogue() -> set[str]:
    """The ids of all requirements and bugs."""
    rows = [
        row
        for name, key in (("requirements.toml", "requirement"), ("real-bugs.toml", "bug"))
        for row in tomllib.loads((CONFORMANCE / name).read_text())[key]
    ]
    return {row["id"] for row in rows}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_mutant_changes_one_place_and_its_module_compiles(mutant: Mutant) -> None:
    source = mutant.path.read_text()
    broken = mutant.applied_to(source)
    assert broken != source
    assert ast.dump(ast.parse(broken, mutant.module)) != ast.dump(ast.parse(source)), "only a comment has changed"


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_killer_of_mutant_exists_and_cites_its_requirement(mutant: Mutant) -> None:
    assert 1 <= len(mutant.requirements) <= 3
    assert set(mutant.requirements) <= catalogue()
    assert set(mutant.requirements) & cited_by(mutant.killer), f"{mutant.killer} cites none of {mutant.requirements}"
    assert mutant.role in ROLES
    assert mutant.lane in {"netns", *GUESTS}


def test_requirement_seen_to_fail_is_cited_by_its_killer() -> None:
    rows = tomllib.loads((CONFORMANCE / "requirements.toml").read_text())["requirement"]
    seen = {row["id"]: row["seen_to_fail"].split() for row in rows if "seen_to_fail" in row}
    named = {name: words[1] for name, words in seen.items() if words[0] == "mutant"}
    assert set(named.values()) <= set(MUTANTS)
    wrong = {
        name: mutant
        for name, mutant in named.items()
        if name not in MUTANTS[mutant].requirements or name not in cited_by(MUTANTS[mutant].killer)
    }
    assert wrong == {}, "the mutant does not violate this requirement, or its killer does not cite it"


def test_every_area_has_mutants() -> None:
    assert {mutant.area for mutant in MUTANTS.values()} == AREAS


def test_second_mutant_of_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for area in ("a", "b"):
        (tmp_path / f"{area}.toml").write_text(ROW)
    monkeypatch.setattr(mutants, "_TABLES", tmp_path)
    with pytest.raises(OptionError, match="mutant twice: two rows have this name"):
        mutants.load_mutants()


@pytest.mark.parametrize(("source", "times"), [("honest", 0), ("word word", 2)])
def test_text_that_does_not_occur_once_is_refused(source: str, times: int) -> None:
    mutant = Mutant(
        name="n", area="a", requirements=("X",), module="refwg.x", text="word", replacement="", killer="k", role="a"
    )
    with pytest.raises(OptionError, match=f"mutant n: its text occurs {times} times in refwg.x, expected once"):
        mutant.applied_to(source)


def test_mutant_neither_reads_nor_writes_compiled_module(tmp_path: Path) -> None:
    package = tmp_path / "refwg"
    (package / "mutants").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "mutants/__init__.py"):
        (package / name).write_text((ROOT / "refwg" / name).read_text())
    (package / "sample.py").write_text('def word():\n    return "honest"\n')
    for _ in ("the first run compiles the module", "the second finds it compiled"):
        completed = subprocess.run(
            [sys.executable, "-c", LOAD_SAMPLE],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (completed.stdout, completed.stderr) == ("honest broken True False\n", "")


@pytest.mark.parametrize("options", [(), ("--drop-privileges", "root")], ids=["kept", "dropped"])
def test_refwg_starts_with_mutant_in_background(options: tuple[str, ...]) -> None:
    code = f"""
        import os, subprocess, sys
        command = [sys.executable, "-m", "refwg", *{options!r}, "--mutant", "no-clamp", "wg0"]
        subprocess.run(command, env=dict(os.environ, REFWG_MUTANTS="allowed"), check=True)
        key = b"/" * 42 + b"8=\\n"
        subprocess.run(["wg", "set", "wg0", "private-key", "/dev/stdin"], input=key, check=True)
        print(subprocess.run(["wg", "show", "wg0", "private-key"], capture_output=True, text=True).stdout, end="")
    """
    assert run_in_sandbox("", code) == f"{'/' * 42}8=\n", "the private key is clamped, so the mutant was not loaded"
