"""Run a mutant of each area by `wg-interop mutants`: the test that it names detects it.

The first mutant of each table is run here. The nightly gate "mutants" runs all of them.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from harness.cli.mutants import PEER, read_mutants
from harness.implementations.registry import Registry
from selftests.support import host

if TYPE_CHECKING:
    from pathlib import Path

    from harness.cli.mutants import Mutant

DEADLINE = 110.0
ALL = read_mutants(host.ROOT)
FIRST = {mutant.area: mutant for mutant in reversed(ALL)}


def run(mutant: Mutant, directory: Path) -> tuple[int, str]:
    """Run the command for a mutant; returns its exit status and output."""
    command = [sys.executable, "-m", "harness", "mutants", mutant.name, "--json"]
    child = host.Run(command, output=directory / "output")
    try:
        return child.process.wait(DEADLINE), child.output.read_text()
    finally:
        child.close()


@pytest.mark.parametrize("mutant", FIRST.values(), ids=lambda mutant: mutant.name)
def test_first_mutant_of_area_is_caught(tmp_path: Path, mutant: Mutant) -> None:
    if mutant.role != "alone" and (reason := Registry().get(PEER).why_unavailable()):
        pytest.skip(reason)
    status, output = run(mutant, tmp_path)
    (found,) = json.loads(output)["mutants"]
    assert found["caught"], f"{mutant.killer} did not detect it: {found['reason']}"
    assert found["cited"], f"{mutant.killer} cites none of {mutant.requirements}"
    assert status == 0
