"""Make a run's scratch directory in the cache; the run's end or the next run removes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from harness.install.cache import Area, directory, locked
from harness.plugin.owned import OwnedDirectory, abandoned
from harness.plugin.publish import recover

# In it: where the run writes its report, so that what a killed run left there is found from here.
_REPORT: Final = "report"


class RunDirectory(OwnedDirectory):
    """One run's scratch directory; `owner` in it names the user and the start."""

    def __init__(self) -> None:
        """Make the directory, and remove those of runs that are dead."""
        runs = directory(Area.RUNS)
        with locked(runs):
            remove_abandoned(runs)
            super().__init__(runs)

    def note_report(self, place: Path) -> None:
        """Note the directory that the report of this run will lie in."""
        (self.path / _REPORT).write_text(str(place))


def remove_abandoned(runs: Path) -> list[Path]:
    """Remove the directories of runs that are dead, and their unfinished reports; returns the directories.

    To be called with `runs` locked.
    """
    removed = abandoned(runs)
    for path in removed:
        note = path / _REPORT
        # Empty if the run was killed at that very moment.
        if note.is_file() and (place := Path(note.read_text())).is_absolute():
            recover(place)
        shutil.rmtree(path, ignore_errors=True)
    return removed
