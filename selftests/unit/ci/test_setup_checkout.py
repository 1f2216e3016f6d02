"""Check what ci/setup refuses to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ci import setup_checkout
from harness.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path


def test_linked_environment_of_other_checkout_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "package").touch()
    link = tmp_path / ".venv"
    link.symlink_to(other)
    monkeypatch.setattr(setup_checkout, "VENV", link)
    monkeypatch.setattr(setup_checkout, "STAMP", link / "wg-interop.json")
    monkeypatch.setattr(setup_checkout, "_pip", lambda *_: None)
    with pytest.raises(Unavailable, match=r"\.venv is a symbolic link to .*/other, .*; remove the link"):
        setup_checkout.install_packages(lambda _: None)
    assert (other / "package").exists()
