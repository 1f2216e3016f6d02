from __future__ import annotations

import ast
import builtins
import errno
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import refwg
from refwg.address import parse_address
from refwg.allowedips import AllowedIPs, Prefix
from refwg.crypto import xseal
from refwg.errors import ConfigError, DropReason, InvalidArgument, Refused, RefwgError

if TYPE_CHECKING:
    from collections.abc import Callable

# A failed system call has no better error; an assertion that fails is a bug of refwg, not an error of its caller.
BUILTINS_THAT_MAY_BE_RAISED = {"AssertionError", "OSError"}


def test_drop_reasons_have_distinct_nonempty_texts() -> None:
    texts = [reason.value for reason in DropReason]
    assert len(set(texts)) == len(DropReason)
    assert all(texts)


def test_refusal_has_text_of_its_reason() -> None:
    refusal = Refused(DropReason.REPLAY)
    assert refusal.reason is DropReason.REPLAY
    assert str(refusal) == DropReason.REPLAY.value


def test_configuration_error_carries_its_errno() -> None:
    assert ConfigError("port 7 is taken", errno.EADDRINUSE).errno == errno.EADDRINUSE


def exceptions_of_package() -> set[type[Exception]]:
    """All exception classes that a module of refwg defines."""
    names = [module.name for module in pkgutil.walk_packages(refwg.__path__, "refwg.")]
    values = [value for name in names for value in vars(import_module(name)).values()]
    return {v for v in values if isinstance(v, type) and issubclass(v, Exception) and v.__module__ in names}


def descendants(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))


def test_all_exceptions_of_package_are_refwg_errors() -> None:
    assert ConfigError in exceptions_of_package()
    assert exceptions_of_package() <= descendants(RefwgError)


def test_docstring_of_refwg_error_draws_all_its_descendants() -> None:
    assert RefwgError.__doc__ is not None
    drawn = re.findall(r"^[ |]*[|`]- (\w+)  ", RefwgError.__doc__, re.MULTILINE)
    assert sorted(drawn) == sorted(kind.__name__ for kind in descendants(RefwgError) - {RefwgError})


def builtin_errors_raised(source: str) -> set[str]:
    raised = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise) and node.exc]
    names = {ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in raised}
    return names & set(dir(builtins))


def test_modules_raise_refwg_errors_or_system_errors() -> None:
    sources = {path.name: path.read_text() for path in Path(refwg.__path__[0]).rglob("*.py")}
    raised = {name: builtin_errors_raised(source) - BUILTINS_THAT_MAY_BE_RAISED for name, source in sources.items()}
    assert {name: errors for name, errors in raised.items() if errors} == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda: parse_address("10.0.0.1/8"),
        lambda: parse_address("10.0.0.1\0"),
        lambda: AllowedIPs[str]().insert(Prefix(bytes(4), 33), "a"),
        lambda: xseal(bytes(32), bytes(12), b"", b""),
    ],
    ids=["address", "zero byte", "prefix length", "nonce"],
)
def test_invalid_argument_is_refwg_error_and_value_error(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument) as failure:
        call()
    assert isinstance(failure.value, RefwgError)
    assert isinstance(failure.value, ValueError)
