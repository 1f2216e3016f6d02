from __future__ import annotations

import errno
import pkgutil
import re
from importlib import import_module

import refwg
from refwg.errors import ConfigError, DropReason, Refused, RefwgError


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
