from __future__ import annotations

import select
from typing import TYPE_CHECKING

import pytest

from refwg.inotify import RemovalWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    other.rename(path)


def beside(path: Path) -> None:
    path.with_name("other").touch()
    path.with_name("other").unlink()


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize(
    ("event", "is_removed"),
    [
        (lambda path: path.unlink(), True),
        (lambda path: path.rename(path.with_name("away")), True),
        (replaced, True),
        (beside, False),
    ],
    ids=["removed", "moved", "replaced", "beside"],
)
def test_what_happens_to_the_file_is_noticed(tmp_path: Path, event: Callable[[Path], object], is_removed: bool) -> None:
    path = tmp_path / "wg0.sock"
    path.touch()
    watch = RemovalWatch(path)
    assert select.select([watch], [], [], 0)[0] == []
    event(path)
    assert select.select([watch], [], [], 2)[0] == [watch]
    assert watch.is_removed() is is_removed


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such place"):
        RemovalWatch(tmp_path / "no such place" / "file")
