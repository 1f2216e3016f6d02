from __future__ import annotations

import errno

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


def test_docstring_of_refwg_error_names_its_direct_subclasses() -> None:
    assert RefwgError.__doc__ is not None
    assert all(kind.__name__ in RefwgError.__doc__ for kind in RefwgError.__subclasses__())
