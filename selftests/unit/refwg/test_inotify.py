from __future__ import annotations

import select
from typing import TYPE_CHECKING

import pytest

from refwg.inotify import RemovalWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.requirement("CFG-54")
@pytest.mark.parametrize(
    "event",
    [
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("away")),
        lambda path: path.with_name("other").rename(path),
    ],
    ids=["removed", "moved", "replaced"],
)
def test_removal_or_replacement_of_file_is_reported_once(tmp_path: Path, event: Callable[[Path], object]) -> None:
    path = tmp_path / "wg0.sock"
    path.touch()
    path.with_name("other").touch()
    watch = RemovalWatch(tmp_path)
    watch.drain()
    assert select.select([watch], [], [], 0)[0] == []
    event(path)
    assert select.select([watch], [], [], 2)[0] == [watch]
    watch.drain()
    assert select.select([watch], [], [], 0)[0] == []


def test_missing_directory_raises_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such place"):
        RemovalWatch(tmp_path / "no such place")
