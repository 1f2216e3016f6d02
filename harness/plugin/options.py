"""Read the plugin's options from pytest's command line, once, into a frozen RunPlan."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from harness.lanes import GUESTS, HERE, KEEP, LANE, SHARD, SUITES, Places, read_places
from harness.settings import lines, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

    from harness.implementations.manifest import Manifest
    from harness.settings import Setting


class Pair(NamedTuple):
    """The implementations of A (in ns1) and B (in ns2)."""

    a: Manifest
    b: Manifest

    def __str__(self) -> str:
        return f"{self.a.name}~{self.b.name}"

    def __repr__(self) -> str:
        return f"Pair({self})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The options of a run, and in a guest also its environment variables.

    What the command line leaves open comes from variables `WG_...` and from wg-interop.toml (harness/settings.py).
    programs, manifests, likes and pairs are the words of the command line. `session.read_programs` looks them up, and
    only if they are needed: most runs of pytest do not use the lab and need not import those modules.
    """

    lanes: tuple[str, ...] = ()
    """`--lane`, in the order given; empty: core and netns, as far as they can run here."""
    places: Places = field(default_factory=Places)
    """`--on`: hosts, and the number of guests of a lane."""
    suites: frozenset[str] = frozenset()
    """`--suite`; empty: all tests."""
    programs: tuple[str, ...] = ()
    """`--impl`: NAME or NAME=PROGRAM."""
    manifests: tuple[Path, ...] = ()
    """`--impl-manifest`."""
    likes: tuple[str, ...] = ()
    """`--like`: LIKE or NAME=LIKE."""
    pairs: tuple[str, ...] = ()
    """`--pair`: A~B."""
    kernels: tuple[str, ...] = ()
    """`--kernel`; empty: the default of harness/vm/kernels.toml."""
    kernel_modules: tuple[Path, ...] = ()
    """`--kernel-module`."""
    results: Path | None = None
    """`--results`; None: report/results.json in the place that `State` chooses."""
    keep: str = "failed"
    seed: int | None = None
    timeout_scale: float = 1.0
    nightly: bool = False
    """`--nightly`."""
    baseline: Path | None = None
    """`--baseline`, an absolute path."""
    update_baseline: bool = False
    """`--update-baseline`."""
    must_include: tuple[str, ...] = ()
    """`--must-include`."""
    ktap: str = ""
    """`--ktap`: an absolute path, or `-`."""
    workers: int | str | None = None
    """`-n`: the number of xdist workers for the tests here, and of guests at a time."""
    blame: bool = False
    """`--blame`."""
    blame_seconds: float = 300.0
    """`--blame-seconds`."""
    pause: bool = False
    """`--pause-on-error`."""
    shell: str = ""
    """`--shell`: a node of the lab, as in `strace` and `gdb`."""
    strace: str = ""
    """`--strace`."""
    valgrind: str = ""
    """`--valgrind`."""
    gdb: str = ""
    """`--gdb`."""
    lane_of_guest: str = ""
    """The lane of this guest, or of a host of `--on`; empty where a run was started."""
    shard: tuple[int, int] | None = None
    """The number of this guest, counted from 0, and n, if each guest runs every n-th test."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    """The options that do not come from the command line, by name."""

    @property
    def concerns_lab(self) -> bool:
        """Whether the command line has an option that only the lab uses.

        wg-interop.toml may lie above tests that do not use the lab.
        """
        values = {
            "impl": self.programs, "impl-manifest": self.manifests, "like": self.likes, "pair": self.pairs,
            "suite": self.suites, "lane": set(self.lanes) - {"core"} - set(self.places.lanes(())),
            "on": (*self.places.hosts, *self.places.guests),
        }  # fmt: skip
        gated = self.baseline or self.update_baseline or self.must_include or self.ktap
        return bool(gated) or any(value for name, value in values.items() if name not in self.settings)

    @property
    def names_programs(self) -> bool:
        """Whether implementations were asked for, on the command line or in settings."""
        return bool(self.programs or self.manifests or self.pairs)

    @property
    def settings_lines(self) -> list[str]:
        """A line for each option that does not come from the command line, with its source."""
        return lines(self.settings)

    @property
    def keeps_lab_up(self) -> bool:
        """Whether the lab of a failed test stays up until the user goes on."""
        return self.pause or bool(self.shell)

    @property
    def asks_at_terminal(self) -> bool:
        """Whether the run stops and gives the terminal to the user."""
        return self.keeps_lab_up or bool(self.gdb)

    @property
    def is_watched(self) -> bool:
        """Whether one of the options of interactive.py was given."""
        return self.asks_at_terminal or bool(self.strace or self.valgrind)

    @property
    def guest_lanes(self) -> list[str]:
        """The lanes of `--lane` that need a guest."""
        return [lane for lane in GUESTS if lane in self.lanes]

    @property
    def only_guests(self) -> bool:
        """Whether all lanes of `--lane` need a guest, so that nothing runs on this kernel."""
        return bool(self.guest_lanes) and not set(self.lanes) & set(HERE)

    def guests_at_once(self, lane: str) -> int:
        """Return how many guests of a lane run at a time: the N of `--on LANE:N`, or else that of `-n`."""
        if isinstance(self.workers, str):
            # `auto` or `logical`, which xdist resolves only if it starts workers.
            return self.places.guests.get(lane) or len(os.sched_getaffinity(0))
        return self.places.guests.get(lane) or self.workers or 1

    @property
    def guests_have_more(self) -> bool:
        """Whether guests run tests that xdist workers on this kernel do not run."""
        return "warp" in self.lanes or ("vm" in self.lanes and "netns" not in self.lanes)


def read_plan(config: pytest.Config) -> RunPlan:
    """Read the plan from pytest's parsed options, settings, and the environment variables of a guest.

    Raises UsageError for a mistake in the settings.
    """
    option = config.option
    # An option that is not given is None, an empty list or text, or False; 0 is a value.
    attributes = {name: getattr(option, key) for name, key in _KEYS.items()}
    given = {name: value for name, value in attributes.items() if value not in (None, [], "") and value is not False}
    settings = read_settings().beside(given)
    values: dict[str, Any] = {**given, **{name: setting.value for name, setting in settings.items()}}
    number, _, count = os.environ.get(SHARD, "").partition("/")
    places = read_places(values.get("on", ()))
    return RunPlan(
        lanes=places.lanes(tuple(values.get("lane", ()))),
        places=places,
        suites=frozenset(values.get("suite", ())),
        programs=tuple(values.get("impl", ())),
        manifests=tuple(map(Path, values.get("impl-manifest", ()))),
        likes=tuple(values.get("like", ())),
        pairs=tuple(values.get("pair", ())),
        kernels=tuple(values.get("kernel", ())),
        kernel_modules=tuple(map(Path, values.get("kernel-module", ()))),
        results=Path(values["results"]) if "results" in values else None,
        keep=values.get("keep", KEEP[0]),
        seed=values.get("seed"),
        timeout_scale=values.get("timeout-scale", 1.0),
        nightly=values.get("nightly", False),
        blame=option.wg_blame,
        blame_seconds=values.get("blame-seconds", 300.0),
        baseline=Path(values["baseline"]).absolute() if "baseline" in values else None,
        update_baseline=option.wg_update_baseline,
        must_include=tuple(values.get("must-include", ())),
        ktap=ktap if (ktap := values.get("ktap", "")) in {"", "-"} else str(Path(ktap).absolute()),
        pause=option.wg_pause,
        shell=option.wg_shell,
        strace=option.wg_strace,
        valgrind=option.wg_valgrind,
        gdb=option.wg_gdb,
        workers=getattr(option, "numprocesses", None),
        lane_of_guest=os.environ.get(LANE, ""),
        shard=(int(number), int(count)) if count else None,
        settings=settings,
    )


# The attributes of pytest's options that settings may give, by the names of the options.
_KEYS: Final = {
    "impl": "wg_impl", "impl-manifest": "wg_manifest", "like": "wg_like", "pair": "wg_pair", "suite": "wg_suite",
    "on": "wg_on", "lane": "wg_lane", "nightly": "wg_nightly",
    "kernel": "wg_kernel", "kernel-module": "wg_kernel_module",
    "results": "wg_results", "keep": "wg_keep", "timeout-scale": "wg_timeout_scale", "seed": "wg_seed",
    "baseline": "wg_baseline", "must-include": "wg_must_include", "ktap": "wg_ktap",
    "blame-seconds": "wg_blame_seconds",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin to pytest (hook)."""
    group = parser.getgroup("wg-interop", "WireGuard interop lab; also by WG_IMPL, ..., and wg-interop.toml")
    _add_programs(group)
    _add_selection(group)
    _add_results(group)
    _add_blame(group)
    _add_gating(group)
    _add_debugging(group)
    parser.addini("wg_sandbox", "When to enter the sandbox: auto (a test uses the lab) or always.", default="auto")


def _add_programs(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--impl", action="append", default=[], metavar="NAME[@VERSION][=PROGRAM]", dest="wg_impl",
        help="Test this implementation, this version of it, or PROGRAM under this name. May be repeated. Default: all "
        "known ones.",
    )  # fmt: skip
    group.addoption(
        "--impl-manifest", action="append", default=[], metavar="FILE", type=Path, dest="wg_manifest",
        help="Test the implementation that this manifest describes, with itself if no --impl or --pair is given.",
    )  # fmt: skip
    group.addoption(
        "--like", action="append", default=[], metavar="[NAME=]LIKE", dest="wg_like",
        help="Start the program of --impl NAME=PROGRAM like the implementation LIKE, with its capabilities and known "
        "failures in any version. Without NAME: every program that has no manifest.",
    )  # fmt: skip
    group.addoption(
        "--pair", action="append", default=[], metavar="A~B", dest="wg_pair",
        help="Test A in ns1 against B in ns2. May be repeated. Default: all ordered pairs.",
    )  # fmt: skip


def _add_selection(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--suite", action="append", default=[], choices=SUITES, dest="wg_suite",
        help="Run only these tests: pairs (of two implementations), alone (of one), lab (of the lab itself), "
        "conformance (of single requirements). May be repeated. Default: all tests.",
    )  # fmt: skip
    group.addoption(
        "--lane", action="append", default=[], choices=(*HERE, *GUESTS), dest="wg_lane",
        help="Run only this lane: core (no namespaces), netns (namespaces of this kernel), vm (a guest with a kernel "
        "of your choice), warp (a guest whose clock skips idle time). May be repeated. Default: core and netns.",
    )  # fmt: skip
    group.addoption(
        "--on", action="append", default=[], metavar="ssh:HOST|vm:N|warp:N", dest="wg_on",
        help="Run the tests on this machine, by ssh and with `wg-interop run` only; or share those of lane vm or warp "
        "among N guests. May be repeated: machines share the tests, too (docs/hosts.md).",
    )  # fmt: skip
    group.addoption(
        "--nightly", action="store_true", dest="wg_nightly",
        help="Run the tests marked `nightly` too, and send as much as the requirements ask; it takes hours.",
    )  # fmt: skip
    group.addoption(
        "--kernel", action="append", default=[], metavar="VERSION|PATH", dest="wg_kernel",
        help="The kernel of lanes vm and warp: a name of harness/vm/kernels.toml, a Debian version, a bzImage or a "
        "build tree.",
    )  # fmt: skip
    group.addoption(
        "--kernel-module", action="append", default=[], metavar="FILE", type=Path, dest="wg_kernel_module",
        help="In the guests of lanes vm and warp, load this wireguard.ko (or another module) instead of the kernel's "
        "own. May be repeated.",
    )  # fmt: skip


def _add_results(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--results", metavar="FILE", type=Path, dest="wg_results",
        help="Write the results to FILE, and index.html and evidence/ beside it. Default: report/results.json in the "
        "root directory; for the suite of a wheel, in the current directory.",
    )  # fmt: skip
    group.addoption(
        "--keep", choices=KEEP, dest="wg_keep",
        help="Keep evidence of failed tests (default), of all, or of none, in report/evidence/.",
    )  # fmt: skip
    group.addoption(
        "--timeout-scale", metavar="F", type=float, dest="wg_timeout_scale",
        help="Multiply every deadline by F, on a slow machine.",
    )  # fmt: skip
    group.addoption(
        "--seed", metavar="N", type=int, dest="wg_seed",
        help="Seed of all random choices. A run prints its seed; pass it to repeat them.",
    )  # fmt: skip


def _add_blame(group: pytest.OptionGroup) -> None:
    """Add the options that name the program to blame for a failed test."""
    group.addoption(
        "--blame", action=argparse.BooleanOptionalAction, default=False, dest="wg_blame",
        help="At the end run failed tests again, with refwg in the place of A, of B and of both, and name the program "
        "to blame. A test that then passes is flaky. Default: no; `wg-interop run` does.",
    )  # fmt: skip
    group.addoption(
        "--blame-seconds", metavar="N", type=float, dest="wg_blame_seconds",
        help="Run failed tests again for at most N seconds, the shortest test of each cause first. Default: 300.",
    )  # fmt: skip


def _add_gating(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--baseline", metavar="FILE", type=Path, dest="wg_baseline",
        help="Failures that FILE lists do not fail the run; they are `xfailed`. New ones do, and the summary names "
        "those that no longer fail. Write the file with --update-baseline (docs/ci.md).",
    )  # fmt: skip
    group.addoption(
        "--update-baseline", action="store_true", dest="wg_update_baseline",
        help="Write this run's failures to the FILE of --baseline: add new ones, and remove those that no longer fail. "
        "Then no failure fails the run.",
    )  # fmt: skip
    group.addoption(
        "--must-include", action="append", default=[], metavar="NAME", dest="wg_must_include",
        help="Fail, with status 1, unless a test of this implementation has passed. May be repeated.",
    )  # fmt: skip
    group.addoption(
        "--ktap", metavar="FILE|-", default="", dest="wg_ktap",
        help="Write the results to FILE as KTAP version 1, the kernel's format, nested by file and pair; - writes them "
        "into pytest's summary.",
    )  # fmt: skip


def _add_debugging(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--pause-on-error", action="store_true", dest="wg_pause",
        help="After a failed test, keep its lab up, print how to enter each node, and wait for Enter.",
    )  # fmt: skip
    group.addoption(
        "--shell", metavar="NODE", default="", dest="wg_shell",
        help="After a failed test, open a shell in this node of its lab; `wg` works there. A and B are the nodes of "
        "these implementations.",
    )  # fmt: skip
    group.addoption(
        "--strace", metavar="NODE", default="", dest="wg_strace",
        help="Run the program of this node, or of A or B, under strace. The trace is evidence: strace.NODE.txt.",
    )  # fmt: skip
    group.addoption(
        "--valgrind", metavar="NODE", default="", dest="wg_valgrind",
        help="Run the program of this node, or of A or B, under valgrind's memcheck. Its errors, and memory that is "
        "lost, fail the test. Deadlines become 20 times as long.",
    )  # fmt: skip
    group.addoption(
        "--gdb", metavar="NODE", default="", dest="wg_gdb",
        help="Attach gdb to the program of this node, or of A or B, when it has started. Deadlines become 1000 times "
        "as long.",
    )  # fmt: skip
