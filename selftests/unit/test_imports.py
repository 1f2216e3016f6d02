"""Who may import whom: each module only what stands below it. A cycle, or a clock in the core, fails here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import refwg

ROOT = Path(refwg.__file__).parent

# From the bottom to the top; modules of one row do not know each other.
ROWS = [
    ["errors"],
    ["messages", "packet", "address"],
    ["boundary", "crypto", "ratelimiter", "peerlookup", "timers", "queueing", "counter", "allowedips"],
    ["noise", "cookie"],
    ["peer"],
    ["send", "receive"],
    ["device"],
    ["uapi"],
    # From here on modules may touch the world.
    ["netlink", "inotify"],
    ["conntrack", "socket"],
    ["icmp"],
    ["tun", "control", "trace", "mutants", "selftest", "privileges"],
    ["engine/simple"],
    ["loop"],
    ["__main__"],
]
# Of sockets, address knows how the C library reads and writes addresses, and nothing of a network.
CORE = [module for row in ROWS[:8] for module in row if module != "address"]
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


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text())


def imported(module: str) -> set[str]:
    """Dotted names of all that a module imports, also what only its annotations need."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "refwg" else {node.module}
            )
    return names


def test_the_table_names_every_module() -> None:
    there = {str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("*.py") if path.stem != "__init__"}
    assert there == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    below = {other for row in ROWS[: next(i for i, row in enumerate(ROWS) if module in row)] for other in row}
    ours = {name.removeprefix("refwg.").replace(".", "/") for name in imported(module) if name.startswith("refwg.")}
    assert ours <= below


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_clock_no_chance_and_no_network(module: str) -> None:
    assert not {name.partition(".")[0] for name in imported(module)} & WORLD


@pytest.mark.parametrize("module", MODULES)
def test_only_crypto_imports_cryptography(module: str) -> None:
    imports_it = any(name.partition(".")[0] == "cryptography" for name in imported(module))
    assert imports_it == (module in IMPORTERS_OF_CRYPTOGRAPHY)
