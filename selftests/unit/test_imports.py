"""Check every import of harness and refwg against the tables of support/layers.py.

Imports inside functions and imports for annotations count, too. Imports by string exist in two places, the
facade `harness/__init__.py` and `pytest_plugins`; both are read as imports.
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import harness
import refwg
from selftests.support.layers import CORE_ROWS, FOLDERS, IMPORTS_ONLY, REFWG_FOR, ROWS

ROOT = Path(refwg.__file__).parents[1]

# `address` imports `socket` for inet_pton and inet_ntop, which use no network.
CORE = [module for row in CORE_ROWS for module in row if module != "address"]
MODULES = [module for row in ROWS for module in row]
WORLD = {
    "socket",
    "time",
    "random",
    "secrets",
    "os",
    "threading",
    "asyncio",
    "select",
    "selectors",
    "subprocess",
    "sys",
}
IMPORTERS_OF_CRYPTOGRAPHY = {"crypto"}

HARNESS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in (ROOT / "harness").rglob("*.py")
)
# These run where nothing is installed, or where an import costs too much: the standard library, and each other.
STANDARD_LIBRARY_ONLY = {
    "harness.sandbox.launcher": {"harness.sandbox.launcher"},
    "harness.sandbox.fork_server": {"harness.sandbox.fork_server"},
    "harness.vm.init": {"harness.vm.init"},
} | {
    name: {"harness.errors", "harness.install", "harness.tables", "harness.wait"}
    for name in HARNESS
    if name.startswith("harness.install.")
}
IMPORTERS_OF_PYROUTE2 = {"harness.net.iproute"}
# Loaded into every pytest run of an environment that has the plugin.
LOADED_WITH_THE_PLUGIN = {
    "harness",
    "harness.errors",
    "harness.lanes",
    "harness.plugin",
    "harness.plugin.alone",
    "harness.plugin.assertions",
    "harness.plugin.fixtures",
    "harness.plugin.hooks",
    "harness.plugin.marks",
    "harness.plugin.options",
    "harness.plugin.oracle",
    "harness.plugin.past",
    "harness.plugin.phases",
    "harness.plugin.reporter",
    "harness.plugin.reruns",
    "harness.plugin.sandboxed",
    "harness.plugin.selection",
    "harness.plugin.session",
    "harness.plugin.verdicts",
    "harness.settings",
    "harness.sandbox",
    "harness.sandbox.launch",
    "harness.sandbox.launcher",
    "harness.suite",
}


def tree(module: str) -> ast.Module:
    """The syntax tree of `harness.net.netns`, or of the package `harness.net.__init__`, or `refwg.mutants`."""
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(module: str) -> set[str]:
    """Dotted names of all imported modules, late imports and those for annotations included."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{module}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if is_module(name) else node.module for name in inside}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytest_plugins":
            names |= set(ast.literal_eval(node.value))
        elif isinstance(node, ast.AnnAssign) and module == "harness.__init__" and ast.unparse(node.target) == "NAMES":
            assert node.value is not None
            names |= set(ast.literal_eval(node.value).values())
    return names


def folder(module: str) -> str:
    """`net` for harness.net.netns, `errors` for harness.errors."""
    return module.split(".")[1] if "." in module else "__init__"


def ours(module: str) -> set[str]:
    return {name for name in imported(module) if name.partition(".")[0] == "harness"}


def row_of(name: str) -> int:
    return next(number for number, row in enumerate(FOLDERS) if name in row)


def refwg_modules() -> set[str]:
    """All modules, and the packages that have code of their own."""
    paths = [path for path in (ROOT / "refwg").rglob("*.py") if len(ast.parse(path.read_text()).body) > 1]
    names = {str(path.relative_to(ROOT / "refwg").with_suffix("")).replace("/", ".") for path in paths}
    return {name.removesuffix(".__init__") for name in names}


def test_import_table_contains_every_module() -> None:
    assert refwg_modules() == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_modules_of_lower_rows(module: str) -> None:
    below = {other for row in ROWS[: next(i for i, row in enumerate(ROWS) if module in row)] for other in row}
    imports = {name.removeprefix("refwg.") for name in imported(f"refwg.{module}") if name.startswith("refwg.")}
    # For a mutant, `__main__` imports all modules again, itself too.
    assert imports - {module} <= below


@pytest.mark.parametrize("module", CORE)
def test_core_imports_no_clock_randomness_or_network(module: str) -> None:
    assert not {name.partition(".")[0] for name in imported(f"refwg.{module}")} & WORLD


@pytest.mark.parametrize("module", MODULES)
def test_cryptography_is_imported_only_by_crypto_module(module: str) -> None:
    imports_it = any(name.partition(".")[0] == "cryptography" for name in imported(f"refwg.{module}"))
    assert imports_it == (module in IMPORTERS_OF_CRYPTOGRAPHY)


@pytest.mark.parametrize("module", HARNESS)
def test_only_facade_imports_by_string(module: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    by_string = [call for call in calls if call.rpartition(".")[2] in {"import_module", "__import__"}]
    # The fork server imports modules of the program that it starts; they are no part of this package.
    exceptions = {"harness.__init__": ["import_module"], "harness.sandbox.fork_server": ["importlib.import_module"]}
    assert by_string == exceptions.get(module, [])


def test_folder_table_names_every_folder() -> None:
    assert {folder(module) for module in HARNESS} == {name for row in FOLDERS for name in row}


@pytest.mark.parametrize("module", HARNESS)
def test_harness_module_imports_only_folders_below_its_own(module: str) -> None:
    own = folder(module)
    below = {other for row in FOLDERS[: row_of(own)] for other in row}
    below = {*IMPORTS_ONLY.get(own, below), own}
    folders = {name: folder(name) for name in ours(module) if name != module}
    assert {name for name, other in folders.items() if other not in below} == set()


@pytest.mark.parametrize("module", HARNESS)
def test_harness_module_does_not_import_facade(module: str) -> None:
    assert "harness" not in imported(module)


@pytest.mark.parametrize("module", HARNESS)
def test_harness_module_imports_no_refwg_ci_bench_or_tests(module: str) -> None:
    allowed = {f"refwg.{name}" for name in REFWG_FOR.get(folder(module), ())}
    others = {name for name in imported(module) if name.partition(".")[0] in {"refwg", "ci", "bench", "selftests"}}
    assert others <= allowed


@pytest.mark.parametrize("name", sorted({folder(module) for module in HARNESS}))
def test_folder_has_no_import_cycle(name: str) -> None:
    modules = [module for module in HARNESS if folder(module) == name]
    # A package is imported before its modules; what its __init__ imports counts as the package's.
    graph = {module.removesuffix(".__init__"): ours(module) - {f"harness.{name}"} for module in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", sorted(STANDARD_LIBRARY_ONLY))
def test_module_imports_standard_library_only(module: str) -> None:
    allowed = STANDARD_LIBRARY_ONLY[module]
    for name in imported(module):
        inside = name in allowed or any(name.startswith(f"{package}.") for package in allowed)
        assert inside or name.partition(".")[0] in sys.stdlib_module_names, name


def test_plugin_loads_named_handful_of_modules() -> None:
    loaded, todo = set(), ["harness.plugin.__init__"]
    while todo:
        module = todo.pop()
        parents = module.removesuffix(".__init__").split(".")
        at_once = {name for name in imported_at_once(module) if name.partition(".")[0] == "harness"}
        for name in (*(".".join(parents[:end]) for end in range(1, len(parents) + 1)), *at_once):
            if name not in loaded:
                loaded.add(name)
                todo.append(name if (ROOT / f"{name.replace('.', '/')}.py").exists() else f"{name}.__init__")
    assert loaded == LOADED_WITH_THE_PLUGIN


def imported_at_once(module: str) -> set[str]:
    """Names that importing the module imports: no late imports and none for annotations."""
    top = ast.Module([node for node in tree(module).body if not isinstance(node, ast.If)], [])
    for function in [node for node in ast.walk(top) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
        function.body = []
    names: set[str] = set()
    for node in ast.walk(top):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if is_module(name) else node.module for name in inside}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytest_plugins":
            names |= set(ast.literal_eval(node.value))
    return names


@pytest.mark.parametrize("module", HARNESS)
def test_pyroute2_is_imported_only_by_iproute_module_and_late(module: str) -> None:
    def imports_it(names: set[str]) -> bool:
        return any(name.partition(".")[0] == "pyroute2" for name in names)

    assert imports_it(imported(module)) == (module in IMPORTERS_OF_PYROUTE2)
    assert not imports_it(imported_at_once(module))


def test_facade_table_matches_its_declarations() -> None:
    declared = {
        alias.asname: node.module
        for block in tree("harness.__init__").body
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == harness.NAMES


@pytest.mark.parametrize("name", sorted(harness.NAMES))
def test_facade_name_is_defined_in_named_module(name: str) -> None:
    value = getattr(harness, name)
    assert value is getattr(sys.modules[harness.NAMES[name]], name)
    assert getattr(value, "__module__", harness.NAMES[name]) == harness.NAMES[name]


def test_facade_imports_nothing_until_name_is_used() -> None:
    top = [node for node in tree("harness.__init__").body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node) for node in top} == {
        "from __future__ import annotations",
        "from importlib import import_module",
        "from typing import TYPE_CHECKING, Any, Final",
    }
    with pytest.raises(AttributeError, match="module 'harness' has no attribute 'Tunel'"):
        _ = harness.Tunel
