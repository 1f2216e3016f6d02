"""Run one smoke test for each implementation of a run, and block its tests if that fails.

The first test that needs the implementation runs the smoke test in its set-up and reports the failure as its own. All
others are `blocked` at once, with the same reason. The outcome is in a file of the run directory, which the xdist
workers share. A guest has its own run directory, so it runs a smoke test on its own kernel.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from _pytest.outcomes import Failed

from harness.errors import HarnessError
from harness.plugin.selection import uses
from harness.plugin.session import file_name, state_of_run
from harness.plugin.verdicts import Blocked, SmokeFailed
from harness.sandbox import launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab
    from harness.plugin.session import State

# Folder in the run directory.
_FOLDER: Final = "smoke"


def require_smoke(item: pytest.Item, manifest: Manifest) -> None:
    """Raise SmokeFailed in the first test if the smoke test fails, and Blocked in all that come after it.

    Tests that create no interface in a sandbox need no smoke test.
    """
    if not (uses(item, "lab") and launch.inside()):
        return
    state = state_of_run(item.config)
    if manifest.name not in state.smoke:
        state.smoke[manifest.name] = _run_once(state, manifest)
    if reason := state.smoke[manifest.name]:
        raise Blocked(reason, pytrace=False)


def _run_once(state: State, manifest: Manifest) -> str:
    """Run the smoke test, unless this run has done so; returns why it failed, empty if it passed.

    Raises SmokeFailed in the process that ran it.
    """
    from harness.lab.lab import Lab

    folder = state.scratch() / _FOLDER
    folder.mkdir(exist_ok=True)
    name = file_name(manifest.name)
    with _locked(folder / f"{name}.lock"):
        outcome = folder / f"{name}.json"
        if outcome.exists():
            return str(json.loads(outcome.read_text())["failure"])
        lab = Lab(folder / name, state.seed)
        failure = _failure(lab, manifest)
        outcome.write_text(json.dumps({"implementation": manifest.name, "failure": failure}))
    if failure:
        state.smoke[manifest.name] = failure
        raise SmokeFailed(failure, lab)
    shutil.rmtree(lab.directory, ignore_errors=True)
    return failure


def _failure(lab: Lab, manifest: Manifest) -> str:
    """Run the smoke test and return why it failed, with the evidence in its directory; empty if it passed."""
    from harness.lab.probes import smoke_test

    try:
        # Started as its users start it; the tests may get it from a fork server.
        smoke_test(lab, replace(manifest, preload=()))
    except (HarnessError, OSError, Failed) as error:  # Failed: the set-up of the test took too long
        with suppress(HarnessError, OSError):
            lab.snapshot()
        return f"{manifest.name} failed its smoke test: {type(error).__name__}: {error}"
    else:
        return ""
    finally:
        # The first error is the reason; an error of the undo would only hide it.
        with suppress(HarnessError, OSError):
            lab.close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; the kernel releases it if the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
