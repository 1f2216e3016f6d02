"""Add each run to the history of runs, and begin with the longest tests under xdist."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.plugin.session import is_worker, state_of_run

if TYPE_CHECKING:
    import pytest

    from harness.plugin.session import State

# In the run directory: the durations that all workers of a run order their tests by.
_DURATIONS: Final = "durations.json"
_GIT_TIMEOUT: Final = 5.0  # seconds


def note_run(state: State, root: Path) -> None:
    """Add the finished run to history/runs.jsonl beside its results; a history that cannot be written is left."""
    from harness.report import history

    now = f"{datetime.now(UTC).isoformat(timespec='seconds')}"
    programs = [Path(text.partition("=")[2]) for text in state.plan.programs if "=" in text]
    commits = (_commit(place) for place in [*(program.expanduser().absolute().parent for program in programs), root])
    commit = next(filter(None, commits), "")
    with suppress(OSError):
        history.add(_file(state), history.run_of(state.results.by_id.values(), now, commit))


def _commit(folder: Path) -> str:
    """Return the commit of the git tree that a folder is in, with a + if files were changed; empty without one."""
    try:
        changed = _git(folder, "diff", "HEAD", "--name-only")
        return _git(folder, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={folder}", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT, check=True)
    return done.stdout.strip()


def _file(state: State) -> Path:
    from harness.report import history

    return state.results_path.parent / history.FOLDER / history.FILE


def pass_durations_on(config: pytest.Config) -> None:
    """Write the durations of the history where the workers find them: all must put the tests into the same order.

    Not if the user has asked for a random order.
    """
    from harness.report import history

    state = state_of_run(config)
    path = state.scratch() / _DURATIONS
    if not path.exists() and not _is_random(config) and (known := history.durations(history.read(_file(state)))):
        part = path.with_suffix(".part")
        part.write_text(json.dumps(known))
        part.replace(path)


def _is_random(config: pytest.Config) -> bool:
    words = [*config.invocation_params.args, *config.getini("addopts")]
    return any(str(word).startswith("--random-order") for word in words)


def put_longest_first(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests of an xdist worker, if the run has a history."""
    if not is_worker(config):
        return
    path = state_of_run(config).scratch() / _DURATIONS
    if not path.exists():
        return
    from harness.report import history

    # `worksteal` cuts the list into one part for each worker; the other schedulers hand it out from its start.
    stealing = getattr(config.option, "dist", "") == "worksteal"
    workers = int(getattr(config, "workerinput", {}).get("workercount", 1)) if stealing else 1
    order = history.longest_first([item.nodeid for item in items], json.loads(path.read_text()), parts=workers)
    items[:] = [items[index] for index in order]
