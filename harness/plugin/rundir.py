"""Make a run's scratch directory in the cache; the run's end or the next run removes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from harness.install.cache import Area, directory, locked
from harness.plugin.owned import OwnedDirectory, abandoned
from harness.plugin.publish import recover

# File in it with the place of the run's report: the next run finds there what a killed run left.
_REPORT: Final = "report"


class RunDirectory(OwnedDirectory):
    """One run's scratch directory; `owner` in it names the user and the start."""

    def __init__(self) -> None:
        """Make the directory, and remove the directories of dead runs."""
        runs = directory(Area.RUNS)
        with locked(runs):
            remove_abandoned(runs)
            super().__init__(runs)

    def note_report(self, place: Path) -> None:
        """Note the directory of this run's report."""
        (self.path / _REPORT).write_text(str(place))


def remove_abandoned(runs: Path) -> list[Path]:
    """Remove the directories of dead runs and their unfinished reports; returns these directories.

    The caller holds the lock of `runs`.
    """
    removed = abandoned(runs)
    for path in removed:
        note = path / _REPORT
        # Empty if the run was killed while it wrote the file.
        if note.is_file() and (place := Path(note.read_text())).is_absolute():
            recover(place)
        shutil.rmtree(path, ignore_errors=True)
    return removed
