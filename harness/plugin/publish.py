"""Write a run's report beside the last one, and replace the last one when it is complete.

A report is the file of results and, beside it, `index.html`, `evidence/` and `pytest.log`. The report before
it stays in `previous/`. Other files in this directory are never moved or deleted: the file of results lists the entries
of its report.

A run writes into its own hidden directory on the same filesystem, and ends with renames. Before the first rename it
writes their plan to a file. If the run is killed between two renames, the next run carries out the rest.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from harness.errors import Unavailable, UsageError
from harness.plugin.owned import OwnedDirectory, abandoned
from harness.report.results import BESIDE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREVIOUS: Final = "previous"
_PREFIX: Final = ".wg-interop-"
# Names in a run's own directory: its report, the report that it replaces, and the plan of the renames.
_NEW, _OLD, _PLAN = "report", "previous", "plan.json"


class NewReport:
    """The report that this run writes. directory: where it writes results, evidence, page and log."""

    def __init__(self, results: Path) -> None:
        """Make the run's own directory, and remove the directories of dead runs.

        results: the path of the file of results. Raises UsageError if the report would replace a file that is not part
        of a report, Unavailable if nothing can be written there.
        """
        self.results = results
        self._made = [path for path in (results.parent, *results.parent.parents) if not os.path.lexists(path)]
        _check_name(results)
        try:
            with _locked(results.parent) as place:
                _recover(place)
                _check_entries(results)
                self._own = OwnedDirectory(place, _PREFIX)
            self.directory = self._own.path / _NEW
            self.directory.mkdir()
        except OSError as error:
            raise Unavailable(f"cannot write {results}: {error.strerror}; choose a place: --results FILE") from error

    def close(self) -> None:
        """Remove the run's own directory, and the report's directory if this run made it and it is empty."""
        # A report that could not be moved to its place stays here; the next run tries again.
        if not (self._own.path / _PLAN).exists():
            self._own.close()
            with suppress(OSError):
                for path in self._made:
                    path.rmdir()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The names of the entries that are renamed or deleted.

    new: of this report, the results last. old: of the report that it replaces. stale: of the one before that.
    """

    new: list[str]
    old: list[str]
    stale: list[str]


def publish(directory: Path, results: Path) -> None:
    """Move a complete report from a NewReport's directory to its place; the last one becomes `previous`.

    Raises UsageError if a file that is not part of a report has appeared there; the message names the directory in
    which the report is kept. After an OSError the next run tries again.
    """
    own = directory.parent
    with _locked(results.parent) as place:
        _recover(place)
        try:
            old, older = _check_entries(results)
        except UsageError as error:
            # No run removes a directory of this name.
            kept = own.rename(place / own.name.removeprefix("."))
            raise UsageError(f"{error}; this run's report: {kept / _NEW}") from None
        new = [name for name in (*BESIDE, results.name) if os.path.lexists(directory / name)]
        stale = [name for name in older if name not in old] if old else []
        part = own / f"{_PLAN}.part"
        part.write_text(json.dumps(asdict(_Plan(new=new, old=list(old), stale=stale))))
        part.replace(own / _PLAN)
        _carry_out(own, place)


def check_place(results: Path) -> None:
    """Raise UsageError if a report cannot be written there; writes nothing."""
    _check_name(results)
    # Path.is_dir() would raise where this user may not look.
    there = next(place for place in (results.parent, *results.parents) if os.access(place, os.F_OK))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"results {results}: cannot write to {there}; choose a place: --results FILE")
    _check_entries(results)


def recover(place: Path) -> None:
    """Complete or remove the reports of killed runs in a directory of reports; best effort."""
    with suppress(OSError):
        if place.is_dir():
            with _locked(place):
                _recover(place)


def _recover(place: Path) -> None:
    for own in abandoned(place, _PREFIX):
        with suppress(OSError, ValueError):
            if (own / _PLAN).exists():
                _carry_out(own, place)
            shutil.rmtree(own, ignore_errors=True)


def _carry_out(own: Path, place: Path) -> None:
    """Make the renames of the plan that have not been made yet."""
    plan = _Plan(**json.loads((own / _PLAN).read_text()))
    new, aside, previous = own / _NEW, own / _OLD, place / PREVIOUS
    aside.mkdir(exist_ok=True)
    for name in plan.old:
        # If the new entry was moved already, the entry in the place is the new one.
        if name not in plan.new or os.path.lexists(new / name):
            _move(name, place, aside)
    for name in plan.new:
        _move(name, new, place)
    for name in plan.stale:
        _remove(previous / name)
    for name in plan.old:
        if os.path.lexists(aside / name):
            previous.mkdir(exist_ok=True)
            _remove(previous / name)
            _move(name, aside, previous)
    (own / _PLAN).unlink()


def _move(name: str, source: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        (source / name).rename(target / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(place: Path) -> Iterator[Path]:
    """Make a directory if it is not there, and hold its lock."""
    while True:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # NFS cannot lock a directory (flock(2)); two runs rarely end at the same moment.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another run may have removed the empty directory before this run had the lock.
            if os.path.exists(place) and os.path.samestat(os.fstat(descriptor), os.stat(place)):  # noqa: PTH110, PTH116
                yield place
                return
        finally:
            os.close(descriptor)


# The entries of a report


def _check_name(results: Path) -> None:
    if results.is_dir():
        raise UsageError(f"--results {results}: is a directory; name a file: --results {results / 'results.json'}")
    if results.name in {*BESIDE, PREVIOUS}:
        raise UsageError(f"--results {results}: a report uses this name otherwise; name the file results.json")


def _check_entries(results: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the entries of the report there and of the previous one; UsageError for a file that is in neither."""
    place, name = results.parent, results.name
    old, older = _entries(place / name), _entries(place / PREVIOUS / name)
    for folder, known in ((place, old), (place / PREVIOUS, older)):
        for other in BESIDE:
            if other not in known and os.path.lexists(folder / other):
                raise UsageError(
                    f"{folder / other} is not part of the report of {folder / name}; "
                    f"choose another directory: --results DIRECTORY/results.json"
                )
    return old, older


def _entries(results: Path) -> tuple[str, ...]:
    """Return the names of a report's entries: the file of results, and the entries that it lists."""
    if not os.path.lexists(results):
        return ()
    wrong = UsageError(f"--results {results}: is not a file of results; choose another name")
    try:
        if not results.is_file():
            raise wrong
        text = results.read_text(encoding="utf-8", errors="replace")
        # An empty file, as mktemp(1) makes it, may be replaced.
        document = json.loads(text) if text else {"schema": 0, "results": [], "files": []}
    except ValueError:
        raise wrong from None
    if not isinstance(document, dict) or not {"schema", "results"} <= document.keys():
        raise wrong
    # Older files of results have no such list.
    listed = document.get("files", BESIDE)
    return results.name, *(name for name in BESIDE if name in listed and os.path.lexists(results.parent / name))
