"""Render report/index.html, one self-contained page, from the results of one or more runs.

What it shows is gathered here into the records of `page.py`, and drawn by `report.html.j2`. All that a test wrote is
hostile text: the template escapes everything, files are read only below the directory of the results, and links lead
there or to the web.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import cache
from hashlib import blake2s, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from harness import suite
from harness.errors import HarnessError
from harness.implementations.manifest import load_manifest
from harness.report import expectations
from harness.report.agreement import disagreements
from harness.report.bench import figure
from harness.report.causes import CITED, find_causes, tally_by_program, tally_of_causes
from harness.report.conformance import read_conformance
from harness.report.evidence import Reader, clean
from harness.report.expectations import ReportedProgram
from harness.report.invariants import PREFIX
from harness.report.page import (
    DID_NOT_RUN,
    Coverage,
    Group,
    Page,
    Panel,
    Row,
    Run,
    Share,
    Shown,
    ShownCause,
    Skip,
    is_only_shared,
    rank,
    rank_of,
    seconds,
)
from harness.report.results import in_words, read_results, write_in_one_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from jinja2 import Template

    from harness.report.blame import Blame
    from harness.report.causes import Cause
    from harness.report.conformance import Conformance, Entry
    from harness.report.expectations import Expectation
    from harness.report.results import Invocation, Result

_T = TypeVar("_T")
_K = TypeVar("_K")

_AGAIN: Final = "again"
_ORACLE: Final = PREFIX.removesuffix("::")
_ORDER: Final = ("kernel", "refwg", "wireguard-go", "wireguard-go-debian", "boringtun", "gotatun")


def render(
    results: Sequence[Path], out: Path, *, root: Path | None = None, complaint: str = "", place: Path | None = None
) -> Path:
    """Write the page of these results to `out`, an .html file or a directory for index.html; returns its path.

    If two results have the same identity, the later one counts. root: the directory with the suite, which has the
    scenarios, requirements and expectations. complaint: why a run failed, if not by its tests. place: the later path of
    the file of results, if it is still to be moved there.
    Raises UsageError for a file that holds no results.
    """
    target = out if out.suffix == ".html" else out / "index.html"
    runs = [read_run(path, place) for path in results]
    gathered = gather(runs, target.absolute().parent, root or suite.root(), complaint)
    write_in_one_step(target, _draw(gathered))
    return target


def _draw(gathered: Page) -> str:
    return template("report.html.j2").render(page=gathered)


@cache
def template(name: str) -> Template:
    """Return a template of this folder, which escapes all that it is given."""
    # Imported late, so that reading results does not import a template engine.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters |= {"seconds": seconds, "sha256": _sha256, "in_words": in_words, "figure": figure}
    environment.globals["CITED"] = CITED
    return environment.get_template(name)


def _sha256(text: str) -> str:
    """Return the hash by which the page's Content-Security-Policy allows its own script only."""
    return b64encode(sha256(text.encode()).digest()).decode()


# Reading


def read_run(path: Path, place: Path | None = None) -> Run:
    """Read a file of results; raises UsageError. place: the path that the page shows for it."""
    contents = read_results(path)
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return Run(
        path=(place or path).absolute(),
        folder=path.absolute().parent,
        seed=contents.seed,
        host=contents.host,
        results=[_clean(result) for result in contents.results],
        written=f"{written:%Y-%m-%d %H:%M:%S} UTC",
        invocation=contents.invocation,
        bench=contents.bench,
    )


def _clean(result: Result) -> Result:
    """Make invisible characters in a result's texts visible: programs under test wrote some of them."""
    return replace(
        result,
        id=clean(result.id),
        a=_clean_side(result.a),
        b=_clean_side(result.b),
        lane=clean(result.lane),
        kernel=clean(result.kernel),
        state=clean(result.state),
        message=clean(result.message),
        artifacts=clean(result.artifacts),
        blame=_clean_blame(result.blame),
    )


def _clean_blame(blame: Blame | None) -> Blame | None:
    if blame is None:
        return None
    return replace(
        blame,
        verdict=clean(blame.verdict),
        programs=tuple(map(clean, blame.programs)),
        first=clean(blame.first),
        text=clean(blame.text),
        wire=clean(blame.wire),
        reruns=tuple(
            replace(rerun, pair=clean(rerun.pair), state=clean(rerun.state), message=clean(rerun.message))
            for rerun in blame.reruns
        ),
    )


def _clean_side(side: Mapping[str, str] | None) -> dict[str, str] | None:
    if side is None:
        return None
    cleaned = {key: clean(value) for key, value in side.items()}
    # Wherever the version is shown, so is whose known failures are expected.
    shown = f"{cleaned.get('version', 'unknown')}, like {cleaned['like']}" if "like" in cleaned else None
    return cleaned | {"version": shown} if shown else cleaned


# Gathering


def gather(runs: Sequence[Run], place: Path, root: Path | None, complaint: str = "") -> Page:
    """Collect what the page shows. place: the directory of the page."""
    latest = {_identity(result): (run, result) for run in runs for result in run.results}
    # Failures first: if the budget runs out, the evidence of passed tests is linked only.
    ordered = sorted(latest.values(), key=lambda entry: rank_of(entry[1].state))
    reader = Reader(place)
    tests = [_shown(run, result, reader, root) for run, result in ordered]
    bad, passed = ([t.result for t in tests if t.bad], [t.result for t in tests if t.state == "passed"])
    causes = find_causes(bad, passed)
    conformance = read_conformance(root)
    return Page(
        runs=runs,
        tests=tests,
        groups=_groups(tests, conformance.scenarios),
        causes=_causes(causes, tests),
        tally=[tally_of_causes(len(bad), len(causes)), *tally_by_program(causes)],
        known=_known(tests),
        skips=_skips(tests),
        coverage=cover(tests, conformance),
        slowest=sorted(tests, key=lambda test: -test.result.seconds)[:10],
        complaint=complaint,
        conformance=conformance,
        disagreements=disagreements(test.result for test in tests),
    )


def _causes(causes: Sequence[Cause[Result]], tests: Sequence[Shown]) -> list[ShownCause]:
    """Return the causes, with each result as the page shows it."""
    shown = {id(test.result): test for test in tests}
    return [
        ShownCause(
            anchor=_anchor("c", f"{cause.blame} {cause.fingerprint}"),
            blame=cause.blame,
            typical=shown[id(cause.typical)],
            proof=shown[id(cause.proof)] if cause.proof else None,
            tests=[shown[id(result)] for result in cause.witnesses],
            requirements=cause.requirements,
            bugs=cause.bugs,
        )
        for cause in causes
    ]


def _identity(result: Result) -> str:
    return json.dumps([result.id, result.a, result.b, result.lane, result.kernel], sort_keys=True)


def _anchor(kind: str, text: str) -> str:
    """Make a name for links that is the same in every report."""
    return f"{kind}-{blake2s(text.encode(errors='replace'), digest_size=6).hexdigest()}"


def _shown(run: Run, result: Result, reader: Reader, root: Path | None) -> Shown:
    path, _, inside = result.id.partition("[")
    file, _, name = path.rpartition("::")
    rest = inside.removesuffix("]").removeprefix(result.pair).strip("-")
    return Shown(
        result=result,
        anchor=_anchor("t", _identity(result)),
        file=file,
        sentence=name.removeprefix("test_").replace("_", " "),
        rest=rest,
        message=result.message,
        again=clean(_again(result, run)),
        texts=reader.read(run.folder, result.artifacts),
        expectation=_expectation(result, root, run.invocation),
        reruns=[
            (rerun, reader.link(run.folder, rerun.artifacts)) for rerun in (result.blame.reruns if result.blame else ())
        ],
    )


def _again(result: Result, run: Run) -> str:
    """Return the command that runs the test again, for a shell with pytest on its PATH.

    It is empty for the result of a guest and of the oracle, which are not tests; the oracle's names a test. A test of
    an installed suite is found by `wg-interop run` from any directory.

    Its report goes to a directory of its own, so that it does not replace this page.
    """
    if result.id.partition("::")[0] in {result.lane, _ORACLE}:
        return ""
    asked = run.invocation
    is_installed = asked.root and Path(asked.config_file) == Path(asked.root) / suite.INSTALLED
    words = ["wg-interop", "run", result.id] if is_installed else ["pytest", result.id, *_where(asked)]
    if result.lane not in {"core", "netns"}:
        words += ["--lane", result.lane]
        words += ["--kernel", asked.kernels[result.kernel]] if result.kernel in asked.kernels else []
        words += [word for path in asked.kernel_modules for word in ("--kernel-module", path)]
    words += [*_programs(result, asked), "--seed", str(run.seed)]
    if asked.timeout_scale != 1.0:
        words += ["--timeout-scale", f"{asked.timeout_scale:g}"]
    if asked.nightly:
        words.append("--nightly")
    if asked.keep != "failed":
        words += ["--keep", asked.keep]
    if not asked.root:
        return shlex.join(words)
    words += ["--results", _beside(asked)]
    return shlex.join(words) if is_installed else f"{shlex.join(['cd', asked.root])} && {shlex.join(words)}"


def _where(asked: Invocation) -> list[str]:
    """Return the options by which pytest finds the same root directory and configuration."""
    if not asked.root or (asked.config_file and Path(asked.config_file).parent == Path(asked.root)):
        return []
    return [*(["-c", asked.config_file] if asked.config_file else []), "--rootdir=."]


def _programs(result: Result, asked: Invocation) -> list[str]:
    """Return the options for the implementations of a test, with programs and manifests if the run was given any.

    The run's other implementations are left out: pytest would complain that they were asked for and not tested.
    """
    names = list(dict.fromkeys(side["impl"] for side in (result.a, result.b) if side))
    words: list[str] = []
    for name in names:
        # A variant, `mine+fast`, and a version, `mine@2`, are described by the manifest of `mine`.
        for known in dict.fromkeys((re.split("[+@]", name)[0], name)):
            words += ["--impl-manifest", asked.manifests[known]] if known in asked.manifests else []
            words += ["--impl", f"{known}={asked.programs[known]}"] if known in asked.programs else []
    likes = {side["impl"]: side["like"] for side in (result.a, result.b) if side and "like" in side}
    words += [word for name, like in likes.items() for word in ("--like", f"{name}={like}")]
    if result.b:
        return [*words, "--pair", result.pair]
    return [*words, *(word for name in names if name not in asked.programs for word in ("--impl", name))]


def _beside(asked: Invocation) -> str:
    """Return the path for the results of one test that runs again, in the report's directory `again`."""
    place = Path(asked.results)
    place = place if place.parent.name == _AGAIN else place.parent / _AGAIN / place.name
    return str(place.relative_to(asked.root) if place.is_relative_to(asked.root) else place)


def _expectation(result: Result, root: Path | None, asked: Invocation) -> Expectation | None:
    """Return the expectation that made a result an xfail or an xpass."""
    if result.state not in {"xfailed", "xpassed"}:
        return None
    try:
        # The name becomes part of a path, and the file of results is not trusted.
        sides = [_program(side, asked) if side and _is_name(side) else None for side in (result.a, result.b)]
        found = expectations.applying((root or Path(os.devnull)) / suite.EXPECTATIONS, result.id, sides)
    except (HarnessError, OSError):
        return None
    if result.state == "xfailed":
        # It explained the failure when the test ran, whatever the date is now.
        return expectations.explains(found, result.message, date.min)
    return next(iter(expectations.refuted(found)), None)


def _is_name(side: Mapping[str, str]) -> bool:
    return all(re.fullmatch(r"[\w.+@-]+", side[key]) for key in ("impl", "like") if key in side)


def _program(side: Mapping[str, str], asked: Invocation) -> ReportedProgram:
    # A variant, `mine+fast`, and a version, `mine@1.2`, are described by the manifest of `mine`.
    name = re.split("[+@]", side.get("like", side["impl"]))[0]
    known = asked.manifests.get(name)
    return ReportedProgram(side, load_manifest(Path(known)).expectations if known else None)


def _groups(tests: Sequence[Shown], scenarios: Mapping[str, Entry]) -> list[Group]:
    """Make one group for each lane and kernel; lanes with pairs come first."""
    ordered = sorted(tests, key=lambda test: test.result.id)
    lanes = _by(lambda test: (test.result.lane, test.result.kernel), ordered)
    groups = [_group(lane, kernel, found, scenarios) for (lane, kernel), found in lanes.items()]
    return sorted(groups, key=lambda group: (not group.matrix, not group.alone, group.lane == "core"))


def _group(lane: str, kernel: str, tests: Sequence[Shown], scenarios: Mapping[str, Entry]) -> Group:
    label = _Labels(tests)
    where = f"{lane}, {kernel}" if kernel else lane
    pairs = _by(lambda test: (label.of(test.result.a), label.of(test.result.b)), tests)
    names = sort_names({name for pair in pairs for name in pair if name})
    sides = [pair for pair in _columns(names) if any(test.result.scenarios for test in pairs.get(pair, ()))]
    alone = {a: _panel(where, a, pairs[a, ""]) for a in names if (a, "") in pairs}
    files = _by(lambda test: test.file, pairs.get(("", ""), ()))
    return Group(
        lane=lane,
        kernel=kernel,
        names=names,
        versions=label.versions(names),
        matrix={(a, b): _panel(where, f"{a} ~ {b}", pairs[a, b]) for a in names for b in names if (a, b) in pairs},
        scenarios=_scenarios([pairs[pair] for pair in sides], scenarios),
        sides=sides,
        alone=alone,
        configuration=_configuration([*alone], alone),
        others=[_panel(where, file, files[file]) for file in sorted(files)],
    )


def _columns(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the columns of a table in order: all pairs, each implementation alone, no implementation."""
    return [*((a, b) for a in names for b in names), *((name, "") for name in names), ("", "")]


def _panel(where: str, title: str, tests: Sequence[Shown]) -> Panel:
    ordered = sorted(tests, key=lambda test: (rank(test), test.result.id))
    return Panel(anchor=_anchor("p", f"{where} {title}"), title=title, where=where, tests=ordered)


def _scenarios(columns: Sequence[Sequence[Shown]], catalogue: Mapping[str, Entry]) -> list[Row]:
    """Make a row for each scenario that the catalogue has or a test cites; no row if no test cites any."""
    cited = {entry for tests in columns for test in tests for entry in test.result.scenarios}
    return [
        Row(
            id=entry,
            title=catalogue[entry].title if entry in catalogue else "",
            cells=[[test for test in tests if entry in test.result.scenarios] for tests in columns],
        )
        for entry in (*(catalogue if cited else ()), *sorted(cited - catalogue.keys()))
    ]


def _by(key: Callable[[_T], _K], things: Iterable[_T]) -> dict[_K, list[_T]]:
    """Group things by key, in order."""
    groups: dict[_K, list[_T]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


class _Labels:
    """Label implementations in tables by name, and by version too if there are several versions."""

    def __init__(self, tests: Sequence[Shown]) -> None:
        self._versions: dict[str, set[str]] = {}
        for side in (side for test in tests for side in (test.result.a, test.result.b) if side):
            known = self._versions.setdefault(side["impl"], set())
            known.update({side.get("version", "unknown")} - {"unknown"})

    def of(self, side: Mapping[str, str] | None) -> str:
        """Return the label of an implementation; empty for none."""
        if side is None:
            return ""
        several = len(self._versions[side["impl"]]) > 1
        return f"{side['impl']} {side.get('version', '')}" if several else side["impl"]

    def versions(self, labels: Sequence[str]) -> list[str]:
        """Return the version of each label; empty for a label that has it."""
        return [" ".join(self._versions.get(label, ())) for label in labels]


def sort_names(names: Iterable[str]) -> list[str]:
    """Sort implementations in the order of all tables."""

    def key(name: str) -> tuple[int, str]:
        known = re.split(r"[+ ]", name, maxsplit=1)[0]
        return (_ORDER.index(known) if known in _ORDER else len(_ORDER), name)

    return sorted(names, key=key)


def _configuration(names: Sequence[str], alone: Mapping[str, Panel]) -> list[Row]:
    cells: dict[tuple[str, str, str], dict[str, list[Shown]]] = {}
    for name in names:
        for test in alone[name].tests:
            cells.setdefault((test.file, test.sentence, test.rest), {}).setdefault(name, []).append(test)
    return [
        Row(id=rest, title=sentence, cells=[found.get(name, []) for name in names])
        for (_, sentence, rest), found in sorted(cells.items())
    ]


def cover(tests: Sequence[Shown], conformance: Conformance) -> Coverage:
    """Collect the tests of each scenario, requirement and bug by implementation; its name is empty without one.

    A failure counts against the program to blame, and against all programs of its test until that is known.
    """
    cited: dict[str, dict[str, list[Shown]]] = {}
    for test in tests:
        for entry in dict.fromkeys([*test.result.scenarios, *test.result.requirements, *test.result.bugs]):
            for name in test.against:
                cited.setdefault(entry, {}).setdefault(name, []).append(test)
    every = {name for found in cited.values() for name in found} | {name for test in tests for name in test.names}
    names = sort_names(every - {""}) + sorted(every & {""})

    def rows(catalogue: Mapping[str, Entry]) -> list[Row]:
        return [
            Row(
                id=entry.id,
                title=entry.title,
                level=entry.level,
                cells=[cited.get(entry.id, {}).get(name, []) for name in names],
                by_program=True,
            )
            for entry in catalogue.values()
        ]

    covered, demanded, bugs = map(rows, (conformance.scenarios, conformance.requirements, conformance.bugs))
    parts = {
        "scenarios": covered,
        "must": [row for row in demanded if row.level == "must"],
        "should": [row for row in demanded if row.level == "should"],
        "bugs": bugs,
    }
    return Coverage(
        names=names,
        scenarios=covered,
        areas=_by(lambda row: row.id.split("-")[0], demanded),
        bugs=bugs,
        shares={name: {part: _share(rows, n) for part, rows in parts.items()} for n, name in enumerate(names)},
        unknown=sorted(name for name in cited if not conformance.knows(name)),
    )


def _share(rows: Sequence[Row], column: int) -> Share:
    cells = [row.cells[column] for row in rows]
    bad = [cell for cell in cells if any(test.bad for test in cell)]
    shared = sum(map(is_only_shared, bad))
    return Share(
        covered=sum(any(test.state not in DID_NOT_RUN for test in cell) for cell in cells),
        of=len(rows),
        bad=len(bad) - shared,
        shared=shared,
    )


def _known(tests: Sequence[Shown]) -> list[list[Shown]]:
    found = [test for test in tests if test.state in {"xfailed", "xpassed"}]
    return list(_by(lambda test: test.expectation or test.first_line, found).values())


def _skips(tests: Sequence[Shown]) -> list[Skip]:
    found = [test for test in tests if test.state in DID_NOT_RUN]
    skips = []
    for (state, message), same in _by(lambda test: (test.state, test.first_line), found).items():
        reason, _, remedy = message.partition("; ")
        names = sort_names({name for test in same for name in test.names})
        remedy = remedy.removeprefix("to install it: ")
        skips.append(Skip(state=state, reason=reason, remedy=remedy, count=len(same), names=names))
    return sorted(skips, key=lambda skip: -skip.count)
