from __future__ import annotations

import errno

from refwg.errors import ConfigError, DropReason, Refused, RefwgError


def test_every_reason_says_something_of_its_own() -> None:
    texts = [reason.value for reason in DropReason]
    assert len(set(texts)) == len(DropReason)
    assert all(texts)


def test_a_refusal_reads_as_its_reason() -> None:
    refusal = Refused(DropReason.REPLAY)
    assert refusal.reason is DropReason.REPLAY
    assert str(refusal) == DropReason.REPLAY.value


def test_a_configuration_error_carries_its_errno() -> None:
    assert ConfigError("port 7 is taken", errno.EADDRINUSE).errno == errno.EADDRINUSE


def test_the_tree_in_the_docstring_names_every_exception() -> None:
    assert RefwgError.__doc__ is not None
    assert all(kind.__name__ in RefwgError.__doc__ for kind in RefwgError.__subclasses__())
