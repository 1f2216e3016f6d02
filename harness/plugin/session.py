"""What the plugin keeps for one pytest process (seed, implementations, results), and what it knows of a test."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness.errors import UsageError
from harness.lanes import GUESTS, LANE
from harness.plugin.options import Pair, asked

if TYPE_CHECKING:
    from harness.implementations.manifest import (
        Manifest,
    )
    from harness.implementations.registry import (
        Registry,
    )
    from harness.lab.lab import Lab
    from harness.plugin.rundir import RunDirectory
    from harness.report.results import Results

# The name of the plugin that takes the reports.
REPORTER: Final = "wg-interop-reporter"


class State:
    """What the plugin keeps for one pytest process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        given = (_from_controller(config, "wg_seed"), config.option.wg_seed)
        self.seed: int = next((seed for seed in given if seed is not None), secrets.randbits(32))
        # Whether a test of the run uses the lab, or one of our options was given; until then all is silent.
        self.used = config.option.wg_results is not None or asked(config)
        self.results_path: Path = (config.option.wg_results or config.rootpath / "report" / "results.json").absolute()
        self.workers: int | str | None = getattr(config.option, "numprocesses", None)
        """What `-n` said: xdist workers for the tests here; and so many guests at once."""
        self._run_directory: RunDirectory | None = None
        self._registry: Registry | None = None
        self._results: Results | None = None

    @property
    def report_directory(self) -> Path:
        """Where evidence goes: beside the results."""
        return self.results_path.parent

    @property
    def registry(self) -> Registry:
        if self._registry is None:
            self._registry = _read_registry(self.config)
        return self._registry

    @property
    def results(self) -> Results:
        if self._results is None:
            from harness.report.results import Results

            self._results = Results(self.seed)
        return self._results

    def scratch(self) -> Path:
        """The run directory, made when first needed; the controller makes it for its workers."""
        given = _from_controller(self.config, "wg_run_directory")
        if given is not None:
            return Path(given)
        if self._run_directory is None:
            from harness.plugin.rundir import RunDirectory

            self._run_directory = RunDirectory()
        return self._run_directory.path

    def close(self) -> None:
        if self._run_directory is not None:
            self._run_directory.close()
            self._run_directory = None


LAB: Final[pytest.StashKey[Lab]] = pytest.StashKey()
_STATE: Final = pytest.StashKey[State]()


def state_of_run(config: pytest.Config) -> State:
    """The one State of this process."""
    if _STATE not in config.stash:
        config.stash[_STATE] = State(config)
    return config.stash[_STATE]


def _from_controller(config: pytest.Config, name: str) -> Any:
    return getattr(config, "workerinput", {}).get(name)


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _read_registry(config: pytest.Config) -> Registry:
    from harness.implementations.registry import Registry

    try:
        registry = Registry()
        for path in config.option.wg_manifest:
            registry.add(path)
        for text in config.option.wg_impl:
            registry.choose(text)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    return registry


def pairs(config: pytest.Config) -> list[Pair]:
    registry = state_of_run(config).registry
    if not config.option.wg_pair:
        names = registry.asked or list(registry.known)
        return [Pair(registry.get(a), registry.get(b)) for a in names for b in names]
    return [_pair(registry, text) for text in config.option.wg_pair]


def implementations(config: pytest.Config) -> list[Manifest]:
    """The implementations under test one by one: those of the pairs asked for, else those asked for, else all.

    In a guest only the kernel, if it is among them: the others are the same there as here.
    """
    registry = state_of_run(config).registry
    chosen = [registry.get(name) for name in registry.asked or registry.known]
    if config.option.wg_pair:
        chosen = list(dict.fromkeys(manifest for pair in pairs(config) for manifest in pair))
    kernels = [manifest for manifest in chosen if manifest.kind == "kernel"]
    return kernels or chosen if os.environ.get(LANE) in GUESTS else chosen


def _pair(registry: Registry, text: str) -> Pair:
    names = text.split("~")
    if len(names) != len(Pair._fields):
        raise pytest.UsageError(f"--pair {text}: want A~B, two implementations with a tilde between")
    try:
        return Pair(registry.get(names[0]), registry.get(names[1]))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def file_name(nodeid: str) -> str:
    return re.sub(r"[^\w.~+-]+", "_", nodeid)
