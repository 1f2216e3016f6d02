"""Find the first version or commit with which a test fails: `wg-interop bisect`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TextIO

import click

from harness import suite
from harness.cli.terminal import FAILED, OK
from harness.errors import HarnessError, Unavailable, UsageError
from harness.implementations.registry import Registry
from harness.install import installer
from harness.install.recipes import DebianProgram
from harness.install.releases import in_order, pick
from harness.install.tools import ToolFailed, exit_on_sigterm, run_tool
from harness.report.results import GATING, read_results
from harness.report.search import Judgement, narrow, steps_left
from harness.sandbox.launch import pytest_command
from harness.settings import variables
from harness.wire.compare import differences, read_messages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness.implementations.manifest import Manifest

_DEADLINE: Final = 600.0  # seconds for the test with one version
_SHORT: Final = 12  # digits of a commit's name
_GOOD: Final = frozenset({"passed", "differs", "xpassed"})
_BAD: Final = (GATING - {"error", "blocked", "not_reached", "xpassed"}) | {"xfailed"}


class Series(Protocol):
    """Versions of one program, from a good one to a bad one."""

    names: list[str]

    def option(self, name: str) -> str:
        """Make this version ready, and return the value of `--impl`; raises Unavailable if that fails."""

    def title(self, name: str) -> str:
        """Return this version in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """What the test said with one version. evidence: the directories of the tests that decided it."""

    version: str
    judgement: Judgement
    message: str
    seconds: float
    evidence: tuple[Path, ...] = ()

    def line(self) -> str:
        """Return the line for the terminal."""
        first = self.message.split("\n", 1)[0]
        return f"{self.judgement.value:<5} {self.version:<30} {self.seconds:6.1f} s  {first}".rstrip()


@dataclass(slots=True, kw_only=True)
class Order:
    """What the command line asks for. implementation: the name of the program whose versions are tried."""

    test: str
    implementation: str
    good: str
    bad: str
    pair: str = ""
    like: str = ""

    def options(self, given: str) -> list[str]:
        """Return pytest's options and the test for the version that `--impl GIVEN` names."""
        name = given.partition("=")[0]
        words = [f"--like={name}={self.like}"] if self.like else []
        file, bracket, parameters = self.test.partition("[")
        pair = self.pair or (_pair_of(parameters, self.implementation) if bracket else "")
        if "=" in given or not pair:
            words.append(f"--impl={given}")
        if pair:
            words.append(f"--pair={self._put(pair, name)}")
        return [*words, file + bracket + self._put(parameters, name)]

    def _put(self, text: str, version: str) -> str:
        """Put the name of a version in place of the program's."""
        name = self.implementation
        # wireguard-go-debian is not wireguard-go, and wireguard-go-v4 is wireguard-go in a test's row v4.
        longer = "|".join(
            re.escape(other.removeprefix(name)) for other in Registry().known if other.startswith(f"{name}-")
        )
        return re.sub(rf"(?<![\w.+@-]){re.escape(name)}(?![\w.+@]{f'|{longer}' if longer else ''})", version, text)


def _pair_of(parameters: str, name: str) -> str:
    """Return the pair that the parameters of a test's id begin with; empty if the test is of one implementation."""
    known = sorted({*Registry().known, name}, key=len, reverse=True)
    for a in known:
        for b in known:
            if name in {a, b} and re.match(rf"{re.escape(f'{a}~{b}')}(?=[-\]])", parameters):
                return f"{a}~{b}"
    return ""


class Releases:
    """Released versions of an implementation that the lab can install."""

    def __init__(self, manifest: Manifest, good: str, bad: str, versions: Sequence[str]) -> None:
        """versions: all of them in order; empty: those that manifest and source name. Raises UsageError."""
        self._manifest = manifest
        recipe = manifest.install
        if recipe is None or isinstance(recipe, DebianProgram):
            manifest.at(bad)
            raise UsageError(f"{manifest.name} has no versions that the lab can install; give --repo or --versions")
        every = list(versions)
        if not every:
            try:
                every = recipe.releases_found(lambda _: None)
            except HarnessError:
                every = recipe.releases_known()
        every = every if versions else in_order([*every, *(pick(end, every) for end in (good, bad))])
        ends = [pick(end, every) for end in (good, bad)]
        for end in ends:
            if end not in every:
                raise UsageError(f"{end} is not among the versions {' '.join(every)}")
        first, last = map(every.index, ends)
        if first >= last:
            raise UsageError(f"--good {good} has to come before --bad {bad}; the order is {' '.join(every)}")
        self.names = every[first : last + 1]

    def option(self, name: str) -> str:
        """Install a version, unless it is installed."""
        manifest = self._manifest.at(name)
        if manifest.why_unavailable() and manifest.install is not None:
            installer.install(manifest.name, manifest.install)
        return manifest.name

    def title(self, name: str) -> str:
        """Return NAME@VERSION."""
        return f"{self._manifest.name}@{name}"


class Commits:
    """Commits of a git repository, by first parents, built in a worktree of their own."""

    def __init__(self, name: str, repository: Path, build: str, program: str, scratch: Path) -> None:
        """name: of the implementation. program: the path of what the build makes, relative to the repository."""
        self._name, self._repository, self._build, self._program = name, repository, build, program
        self._scratch, self._worktree = scratch, scratch / "worktree"
        self.names: list[str] = []

    @contextmanager
    def between(self, good: str, bad: str) -> Iterator[None]:
        """List the commits between two revisions, and keep the worktree for the length of the block."""
        ends = [
            self._git("rev-parse", "--verify", "--quiet", f"{end}^{{commit}}", what=f"no commit {end}")
            for end in (good, bad)
        ]
        between = self._git("rev-list", "--reverse", "--first-parent", "--ancestry-path", f"{ends[0]}..{ends[1]}")
        if ends[1] not in between.split():
            raise UsageError(f"--good {good} is not an ancestor of --bad {bad} in {self._repository}")
        self.names = [ends[0], *between.split()]
        self._git("worktree", "add", "--quiet", "--detach", str(self._worktree), ends[0])
        try:
            yield
        finally:
            with suppress(UsageError):
                self._git("worktree", "remove", "--force", str(self._worktree))

    def option(self, name: str) -> str:
        """Build a commit and keep its program."""
        run_tool(["git", "-C", self._worktree, "checkout", "--quiet", "--force", "--detach", name], lambda _: None)
        built = self._worktree / self._program
        built.unlink(missing_ok=True)
        try:
            run_tool(["sh", "-c", self._build], lambda _: None, cwd=self._worktree)
        except ToolFailed as error:
            raise Unavailable(f"the build failed: {error}") from error
        if not os.access(built, os.X_OK) or not built.is_file():
            raise Unavailable(f"the build made no program {self._program}")
        kept = self._scratch / name[:_SHORT] / built.name
        kept.parent.mkdir(exist_ok=True)
        shutil.copy2(built, kept)
        return f"{self._name}@{name[:_SHORT]}={kept}"

    def title(self, name: str) -> str:
        """Return the short name of a commit and its subject."""
        return self._git("show", "--no-patch", "--format=%h %s", "--abbrev=12", name)

    def _git(self, *arguments: str, what: str = "") -> str:
        try:
            return run_tool(["git", "-C", self._repository, *arguments], lambda _: None)
        except ToolFailed as error:
            raise UsageError(f"{self._repository}: {what or error}") from error


class Search:
    """One search: runs the test with one version after the other, and remembers what it said."""

    def __init__(self, order: Order, series: Series, scratch: Path, out: TextIO | None) -> None:
        self._order, self._series, self._scratch, self._out = order, series, scratch, out
        self.tested: dict[int, Tested] = {}
        self._counts_errors = False

    def ends(self) -> str:
        """Test both ends; returns why there is nothing to search, empty if good is good and bad is bad."""
        last = len(self._series.names) - 1
        bad = self._test(last)
        if bad.judgement is Judgement.SKIP and bad.message.startswith("error: "):
            # The bad one does not even start. Then others that do not are bad, too.
            self._counts_errors = True
            bad = self.tested[last] = self._as_bad(bad)
        good = self._test(0)
        for end, wanted in ((good, Judgement.GOOD), (bad, Judgement.BAD)):
            if end.judgement is Judgement.SKIP:
                raise Unavailable(f"{end.version} could not be tested: {end.message}")
            if end.judgement is not wanted:
                return f"{end.version} is {end.judgement.value}, not {wanted.value}: {end.message or 'the test passed'}"
        return ""

    def judge(self, index: int) -> Judgement:
        """Test a version between the ends."""
        return self._test(index).judgement

    def _test(self, index: int) -> Tested:
        name, started = self._series.names[index], time.monotonic()
        title = self._series.title(name)
        try:
            given = self._series.option(name)
            found = self._run(title, given, started)
        except (Unavailable, ToolFailed) as error:
            seconds = time.monotonic() - started
            found = Tested(version=title, judgement=Judgement.SKIP, message=str(error), seconds=seconds)
        if self._counts_errors and found.message.startswith("error: "):
            found = self._as_bad(found)
        self.tested[index] = found
        if self._out is not None:
            print(found.line(), file=self._out, flush=True)
        return found

    @staticmethod
    def _as_bad(found: Tested) -> Tested:
        return replace(found, judgement=Judgement.BAD)

    def _run(self, title: str, given: str, started: float) -> Tested:
        place = Path(tempfile.mkdtemp(dir=self._scratch, prefix="run-"))
        results, output = place / "results.json", place / "output"
        command = [*pytest_command(guests=False), "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:random_order"]
        clean = {
            key: text for key, text in os.environ.items() if key not in variables() and not key.startswith("PYTEST")
        }
        configuration = suite.pytest_options() if suite.contains(self._order.test) else []
        options = [*configuration, f"--results={results}", "--keep=all", *self._order.options(given)]
        with output.open("wb") as log:
            process = subprocess.Popen(
                [*command, *options], env=clean, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            process.wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the test did not end within {_DEADLINE:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
        judgement, message, evidence = _judged(results, output)
        return Tested(
            version=title, judgement=judgement, message=message, seconds=round(time.monotonic() - started, 1),
            evidence=tuple(place / path for path in evidence),
        )  # fmt: skip


def _judged(results: Path, output: Path) -> tuple[Judgement, str, list[str]]:
    """Return what the results of a run say of its version, with the message and the evidence that show it."""
    every = read_results(results).results if results.exists() else []
    if bad := [result for result in every if result.state in _BAD]:
        return Judgement.BAD, bad[0].message, [result.artifacts for result in bad if result.artifacts]
    if unclear := [result for result in every if result.state not in _GOOD]:
        return Judgement.SKIP, f"{unclear[0].state}: {unclear[0].message}", []
    if not every:
        lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        return Judgement.SKIP, f"no test ran: {' / '.join(lines[-2:])}", []
    return Judgement.GOOD, "", [result.artifacts for result in every if result.artifacts]


def compared(good: Tested, bad: Tested) -> list[str]:
    """Return how the captures of the bad version differ from those of the good one, capture by capture."""
    lines: list[str] = []
    twins = {_bare(path.name): path for path in good.evidence}
    for theirs in bad.evidence:
        ours = twins.get(_bare(theirs.name))
        if ours is None:
            continue
        for capture in sorted(theirs.glob("*.pcapng")):
            with suppress(OSError, ValueError):
                found = differences(read_messages(ours / capture.name), read_messages(capture))
                lines += [f"{capture.stem}:", *(f"  {line}" for line in found)] if found else []
        if lines:
            break
    return lines


def _bare(name: str) -> str:
    """Remove the versions from the name of a directory of evidence."""
    return re.sub(r"@[\w.+]+", "", name)


def search(order: Order, series: Series, scratch: Path, out: TextIO, *, as_json: bool, output: Path) -> int:
    """Search, print what was found, and copy the evidence of the last good and the first bad one; the exit status."""
    progress = sys.stderr if as_json else out
    print(f"{len(series.names)} versions, at most {2 + steps_left(len(series.names) - 1)} tests", file=progress)
    run = Search(order, series, scratch, progress)
    if why := run.ends():
        document: dict[str, object] = {"first_bad": None, "last_good": None, "reason": why}
        lines, status = [f"nothing to search: {why}"], FAILED
    else:
        found = narrow(len(series.names), run.judge)
        good, bad = run.tested[found.good], run.tested[found.bad]
        candidates = [series.title(series.names[index]) for index in found.candidates]
        status = OK if len(candidates) == 1 else FAILED
        difference = compared(good, bad)
        document = {
            "first_bad": bad.version if status == OK else None, "last_good": good.version, "message": bad.message,
            "candidates": candidates, "difference": difference,
        }  # fmt: skip
        lines = _report(good, bad, candidates, difference)
        lines += [f"evidence: {path}" for path in _keep(output, good, bad)]
    if as_json:
        document["tested"] = [_as_json(run.tested[index]) for index in sorted(run.tested)]
        lines = [json.dumps({"test": order.test, **document}, indent=1)]
    out.write("".join(f"{line}\n" for line in lines))
    return status


def _report(good: Tested, bad: Tested, candidates: Sequence[str], difference: Sequence[str]) -> list[str]:
    lines = ["", f"first bad: {bad.version}"]
    if len(candidates) > 1:
        lines = ["", "the first bad one is one of these; all but the last could not be tested:"]
        lines += [f"  {name}" for name in candidates]
    lines += [f"last good: {good.version}", "", *bad.message.splitlines()[:20], ""]
    if not difference:
        return [*lines, "captures: the same messages in both"]
    return [*lines, "captures, good and bad:", *(f"  {line}" for line in difference)]


def _as_json(tested: Tested) -> dict[str, object]:
    return {**asdict(tested), "judgement": tested.judgement.value, "evidence": len(tested.evidence)}


def _keep(output: Path, good: Tested, bad: Tested) -> list[Path]:
    """Copy the evidence of both; returns the directories."""
    kept = []
    for name, tested in (("good", good), ("bad", bad)):
        place = output / name
        shutil.rmtree(place, ignore_errors=True)
        for path in tested.evidence:
            shutil.copytree(path, place / path.name, dirs_exist_ok=True)
        kept += [place] if tested.evidence else []
    return kept


@click.command()
@click.option("--impl", "implementation", required=True, metavar="NAME", help="The program whose versions are tried.")
@click.option("--good", required=True, metavar="VERSION|REV", help="A version with which the test passes.")
@click.option("--bad", required=True, metavar="VERSION|REV", help="A later version with which it fails.")
@click.option(
    "--versions", metavar="LIST", default="", help="All versions in order, by spaces. Default: all known ones."
)
@click.option("--pair", metavar="A~B", default="", help="The pair to test; NAME in it is the version.")
@click.option("--like", metavar="LIKE", default="", help="Start the program like LIKE, if NAME has no manifest.")
@click.option(
    "--repo", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
    help="Try the commits of this git repository, built in a worktree of it.",
)  # fmt: skip
@click.option("--build", metavar="COMMAND", default="", help="With --repo: the command that builds, for a shell.")
@click.option("--program", metavar="PATH", default="", help="With --repo: the program that it builds, in DIR.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("report/bisect"), metavar="DIR",
    help="Directory for the evidence of the last good and the first bad one. Default: report/bisect.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the finding as JSON; progress goes to stderr.")
@click.argument("test")
def bisect(
    *, test: str, implementation: str, good: str, bad: str, versions: str, pair: str, like: str, repo: Path | None,
    build: str, program: str, output: Path, as_json: bool,
) -> int:  # fmt: skip
    """Find the first version with which a test fails.

    TEST is the id of a test, as a failure prints it, or a test file with ::NAME. In brackets and in --pair, the name of
    the program is replaced by that of each version. Without both, the test runs with the version on both sides.

    \b
      wg-interop bisect --impl wireguard-go --good 20220117 --bad 20230223 --pair wireguard-go~refwg \\
          selftests/netns/test_roaming.py::test_endpoint_follows_peer
      wg-interop bisect --impl mine --like wireguard-go --repo ~/src/wg --build make --program wireguard \\
          --good v1.0 --bad HEAD --pair mine~refwg selftests/netns/test_ping_and_counters.py

    Versions come from the manifest, the module proxy or crates.io, and are installed as needed (docs/versions.md).
    With --repo the commits between, by first parents, are tried; one that does not build is skipped. Both ends are
    tested first. Then the list is halved, and the messages in the captures of the last good and the first bad one are
    compared. Your checkout is not touched.

    Exit status: 0 found, 1 not found (an end is not as you say, or only skipped ones are left), 2 wrong usage, 125 an
    end could not be tested, 130 interrupted.
    """  # noqa: D301
    exit_on_sigterm()
    order = Order(
        test=suite.locate(test), implementation=implementation, good=good, bad=bad, pair=pair, like=like,
    )  # fmt: skip
    if bool(repo) != bool(build and program):
        raise UsageError("--repo, --build and --program belong together")
    with tempfile.TemporaryDirectory(prefix="wg-interop-bisect-") as scratch:
        if repo is None:
            manifest = Registry().get(implementation)
            series = Releases(manifest, good, bad, versions.replace(",", " ").split())
            return search(order, series, Path(scratch), sys.stdout, as_json=as_json, output=output)
        commits = Commits(implementation, repo.absolute(), build, program, Path(scratch))
        with commits.between(good, bad):
            return search(order, commits, Path(scratch), sys.stdout, as_json=as_json, output=output)
