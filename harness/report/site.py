"""Write the public site of an interop matrix: an index, and a page for each implementation.

`wg-interop site` makes it from one or more files of results, of any lanes and kernels. The pages show what is of use to
others: states, messages, findings, coverage. They do not show paths of the machine or evidence. All that a run wrote is
hostile text: the template `site.html.j2` escapes everything, and links lead to pages of the site or to the web.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Final

from harness import suite
from harness.errors import UsageError
from harness.implementations.manifest import CAPABILITIES
from harness.implementations.registry import Registry
from harness.report import coverage
from harness.report.conformance import read_conformance
from harness.report.evidence import clean
from harness.report.expectations import SEVERITIES, load_expectations
from harness.report.gather import cover, gather, read_run, sort_names, template
from harness.report.page import DID_NOT_RUN, Panel, count, rank, tone
from harness.report.results import causes_of, read_results, write_in_one_step
from harness.tables import read_toml

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.implementations.manifest import Manifest
    from harness.report.causes import Cause
    from harness.report.conformance import Conformance, Entry
    from harness.report.expectations import Expectation
    from harness.report.page import Coverage, Run, Share, Shown
    from harness.report.results import Result

_KERNEL: Final = "kernel"
# The first bytes of each page, by which a later call knows the pages that it may replace.
_MARK: Final = "<!-- wg-interop site -->\n"
# States that say little about an implementation.
_LITTLE: Final = frozenset({"unsupported", "skipped"})
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")
_LACKS: Final = re.compile(r"(\S+) does not declare the capability (\S+)")
_NUMBERS: Final = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of results: when and where it was made, and what it adds to the site."""

    date: str
    machine: str
    lanes: Sequence[str]
    results: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """A capability. has: whether the implementation declares it; None if no manifest and no test says so."""

    name: str
    meaning: str
    has: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A known failure with its evidence. seen: the number of results in which it shows."""

    severity: str
    entry: Entry
    observed: str
    always: bool
    link: str
    seen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A way in which a program differs from the kernel where it may. results: the number of tests that show it."""

    message: str
    entries: Sequence[Entry]
    results: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The tests of an implementation with one peer. panels: as A and as B, where there are tests."""

    peer: str
    panels: Sequence[Panel]

    @property
    def notable(self) -> list[Shown]:
        """The tests that ran and did not simply pass, the worst first."""
        unique = {test.anchor: test for panel in self.panels for test in panel.tests}
        found = [test for test in unique.values() if test.state not in _LITTLE | {"passed"}]
        return sorted(found, key=lambda test: (rank(test), test.result.id))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One implementation, as its page shows it. name: with its version, if there are several. slug: names its page."""

    name: str
    slug: str
    title: str
    versions: Sequence[str]
    places: Sequence[str]
    """Lanes and kernels in which it was tested: `netns, kernel 6.1.0-38-amd64`."""
    counts: Sequence[tuple[str, int]]
    """The states of its results, without failures of its peers."""
    of_peers: int
    """The number of failures of its peers, and of their differences, in tests with it."""
    capabilities: Sequence[Capability]
    failures: Sequence[Cause[Result]]
    findings: Sequence[Finding]
    differences: Sequence[Difference]
    meetings: Sequence[Meeting]
    alone: Meeting | None
    """Its tests without a peer."""
    shares: Mapping[str, Share]
    """Its share of `scenarios`, `must`, `should` and `bugs`."""
    column: int
    """Its column in the rows of the coverage."""

    @property
    def tone(self) -> str:
        """The colour of its results."""
        return tone(state for state, _ in self.counts)

    @property
    def ran(self) -> list[tuple[str, int]]:
        """The counts without tests that could not run or do not concern it."""
        return [(state, number) for state, number in self.counts if state not in _LITTLE]

    @property
    def by_severity(self) -> list[tuple[str, int]]:
        """The number of its findings of each severity, the worst first."""
        numbers = Counter(finding.severity for finding in self.findings)
        return [(severity, numbers[severity]) for severity in SEVERITIES if numbers[severity]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """All that the site shows. left_out: implementations of which every test was skipped."""

    sources: Sequence[Source]
    programs: Sequence[Program]
    matrix: Mapping[tuple[str, str], Panel]
    coverage: Coverage
    conformance: Conformance
    counts: Sequence[tuple[str, int]]
    left_out: Sequence[str]

    @property
    def results(self) -> int:
        """The number of results of implementations."""
        return sum(number for _, number in self.counts)

    @property
    def dates(self) -> str:
        """The first and the last day of its results."""
        days = sorted({source.date for source in self.sources})
        return " to ".join(dict.fromkeys((days[0], days[-1])))

    @property
    def paired(self) -> list[Program]:
        """The implementations that were tested with a peer: the rows and columns of the matrix."""
        return [each for each in self.programs if any(each.name in pair for pair in self.matrix)]


def write_site(results: Sequence[Path], out: Path) -> list[Path]:
    """Write the pages of these results into a directory, and return their paths, the index first.

    If two results have the same identity, the one of the later file counts. Pages of an earlier call are replaced.
    Raises UsageError for a file without results, and if the directory has an HTML file that is not of this site.
    """
    earlier = _earlier_pages(out)
    site = build(results)
    pages = {out / "index.html": None} | {out / f"{program.slug}.html": program for program in site.programs}
    slugs = {each.name: each.slug for each in site.programs}
    for path, program in pages.items():
        write_in_one_step(path, _MARK + template("site.html.j2").render(site=site, program=program, slugs=slugs))
    for path in earlier - pages.keys():
        path.unlink()
    return list(pages)


def _earlier_pages(out: Path) -> set[Path]:
    found = set(out.glob("*.html"))
    for path in sorted(found):
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.read(len(_MARK)) != _MARK:
                raise UsageError(f"{path} is not a page of this site; name another directory, or remove it")
    return found


def build(results: Sequence[Path]) -> Site:
    """Collect what the site shows; raises UsageError as `write_site`."""
    if not results:
        raise UsageError("no file of results; make one by wg-interop run, or name it: --results FILE")
    root = suite.root()
    # Without evidence: it may hold whatever a program printed on the machine of the tests.
    runs = [_without_evidence(read_run(path)) for path in results]
    gathered = gather(runs, results[0].absolute().parent, root)
    labels = _Labels([test.result for test in gathered.tests])
    every = [labels.applied(test) for test in gathered.tests if test.names]
    names = {name for test in every for name in test.names}
    ran = {name for test in every if test.state != "skipped" for name in test.names}
    tests = [test for test in every if ran.issuperset(test.names)]
    conformance = read_conformance(root)
    blame = _Blame(root, labels, tests)
    covered = cover([each for test in tests for each in blame.split(test)], conformance)
    slugs = _slugs(covered.names)
    builder = _Builder(root, runs, labels, tests, covered, conformance, slugs, blame)
    return Site(
        sources=[_source(path, run) for path, run in zip(results, runs, strict=True)],
        programs=[builder.program(name) for name in covered.names],
        matrix={pair: _panel(slugs, *pair, found) for pair, found in _by_pair(tests).items() if all(pair)},
        coverage=covered,
        conformance=conformance,
        counts=count(test.state for test in tests),
        left_out=sort_names(names - ran),
    )


def _without_evidence(run: Run) -> Run:
    return replace(run, results=[replace(result, artifacts="") for result in run.results])


def _source(path: Path, run: Run) -> Source:
    date = _DATE.match(read_results(path).date)
    machine = ", ".join(f"{key} {clean(str(run.host[key]))}" for key in ("kernel", "machine") if key in run.host)
    return Source(
        date=date[0] if date else run.written[:10],
        machine=machine,
        lanes=sorted({result.lane for result in run.results}),
        results=len(run.results),
    )


class _Labels:
    """Name implementations so that each version has a page of its own: kernels by their series, others if needed."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._versions: dict[str, set[str]] = {}
        self.versions: dict[str, set[str]] = {}
        """Label -> versions that were tested under it."""
        self.sides: dict[str, dict[str, str]] = {}
        """Label -> one of the sides of results that have it."""
        for side in (side for result in results for side in (result.a, result.b) if side):
            self._versions.setdefault(side["impl"], set()).add(side.get("version", "unknown"))

    def _label(self, side: dict[str, str] | None, kernel: str) -> dict[str, str] | None:
        if side is None:
            return None
        name, version = side["impl"], side.get("version", "unknown")
        several = len(self._versions[name] - {"unknown"}) > 1
        label = coverage.implementation(name, kernel)
        if name != _KERNEL and several and version != "unknown":
            label = f"{name} {version}"
        self.versions.setdefault(label, set()).add(kernel if name == _KERNEL and kernel else version)
        self.sides.setdefault(label, side)
        return side | {"impl": label}

    def applied(self, test: Shown) -> Shown:
        """Return a test with the labels as the names of its implementations."""
        result = test.result
        a, b = (self._label(side, result.kernel) for side in (result.a, result.b))
        return replace(test, result=replace(result, a=a, b=b))


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Return a file name, without its ending, for each implementation; none is that of the index."""
    slugs: dict[str, str] = {}
    for name in names:
        base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "program"
        taken = {*slugs.values(), "index"}
        numbered = (base if number == 1 else f"{base}-{number}" for number in range(1, len(taken) + 2))
        slugs[name] = next(slug for slug in numbered if slug not in taken)
    return slugs


def _by_pair(tests: Iterable[Shown]) -> dict[tuple[str, str], list[Shown]]:
    """Group tests by A and B; B is empty for tests of one implementation."""
    pairs: dict[tuple[str, str], list[Shown]] = {}
    for test in tests:
        a, b = (side["impl"] if side else "" for side in (test.result.a, test.result.b))
        pairs.setdefault((a or b, b if a else ""), []).append(test)
    return pairs


def _panel(slugs: Mapping[str, str], a: str, b: str, tests: Sequence[Shown]) -> Panel:
    """Return the panel of a pair; its anchor is the section of B on the page of A."""
    anchor = f"{slugs[a]}.html#with-{slugs[b]}" if b else f"{slugs[a]}.html#alone"
    return Panel(anchor=anchor, title=f"{a}~{b}" if b else a, where="", tests=tests)


class _Blame:
    """Tells whose a failure is, so that a program does not answer for those of its peers."""

    def __init__(self, root: Path | None, labels: _Labels, tests: Sequence[Shown]) -> None:
        self.known: dict[str, tuple[Expectation, ...]] = {}
        """Label -> the expectations of its program, of any version."""
        for name, side in labels.sides.items():
            program = side.get("like", side["impl"])
            # The name becomes part of a path, and the file of results is not trusted.
            if root is not None and re.fullmatch(r"[\w.+-]+", program):
                self.known[name] = load_expectations(root / "selftests" / "expectations" / f"{program}.toml")
        self._sides = labels.sides
        self._passed_alone = {
            (*_row(test), test.names[0]) for test in tests if test.state == "passed" and len(test.names) == 1
        }
        self.causes = causes_of(test.result for test in tests)
        self._blamed = {id(result): cause.programs for cause in self.causes for result in cause.witnesses}

    def is_of(self, test: Shown, name: str) -> bool:
        """Return whether a result says something about this program: not if it is its peer that fails or differs."""
        if test.state == "xfailed" and test.expectation is not None:
            return test.expectation in self.known.get(name, ())
        if test.state == "differs":
            return name in self._differing(test)
        return name in self._blamed.get(id(test.result), (name,))

    def _differing(self, test: Shown) -> list[str]:
        """Return the program that the message names, else those that do not pass the same test with themselves."""
        words = set(re.findall(r"[\w.+-]*\w", test.first_line))
        named = [name for name in test.names if self._sides[name]["impl"] in words]
        suspects = [name for name in test.names if (*_row(test), name) not in self._passed_alone]
        return named or suspects or test.names

    def split(self, test: Shown) -> Iterator[Shown]:
        """Yield a test once for each of its programs, without citations for one about which it says nothing."""
        for name in test.names:
            result = replace(test.result, a=self._sides[name] | {"impl": name}, b=None)
            if not self.is_of(test, name):
                result = replace(result, scenarios=[], requirements=[], bugs=[])
            yield replace(test, result=result)


def _row(test: Shown) -> tuple[str, str, str]:
    return test.file, test.sentence, test.rest


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds the record of each implementation from all tests."""

    root: Path | None
    runs: Sequence[Run]
    labels: _Labels
    tests: Sequence[Shown]
    covered: Coverage
    conformance: Conformance
    slugs: Mapping[str, str]
    blame: _Blame

    def program(self, name: str) -> Program:
        """Return the record of this implementation."""
        every = [test for test in self.tests if name in test.names]
        own = [test for test in every if self.blame.is_of(test, name)]
        side, versions = self.labels.sides[name], sorted(self.labels.versions[name] - {"unknown"})
        manifest = self._manifest(side)
        pairs = _by_pair(every)
        peers = sort_names({peer for a, b in pairs if b for peer in ((b,) if a == name else (a,))})
        ran = (test.result for test in own if test.state not in DID_NOT_RUN)
        return Program(
            name=name,
            slug=self.slugs[name],
            title=f"a build of {side['like']}" if "like" in side else manifest.title if manifest else "",
            versions=versions,
            places=sorted({f"{each.lane}, kernel {each.kernel}" if each.kernel else each.lane for each in ran}),
            counts=count(test.state for test in own),
            of_peers=len(every) - len(own),
            capabilities=self._capabilities(manifest, side, own, versions),
            failures=[cause for cause in self.blame.causes if name in cause.programs],
            findings=self._findings(name, "like" in side, versions, own),
            differences=self._differences(own),
            meetings=[self._meeting(pairs, name, peer) for peer in peers],
            alone=self._meeting(pairs, name, "") if (name, "") in pairs else None,
            shares=self.covered.shares[name],
            column=list(self.covered.names).index(name),
        )

    def _meeting(self, pairs: Mapping[tuple[str, str], list[Shown]], name: str, peer: str) -> Meeting:
        roles = dict.fromkeys([(name, peer), (peer, name)])  # one role only if it met itself, or no peer
        return Meeting(peer=peer, panels=[_panel(self.slugs, *role, pairs[role]) for role in roles if role in pairs])

    def _manifest(self, side: Mapping[str, str]) -> Manifest | None:
        """Return the manifest that comes with the lab; None for a program that a run was given in another way."""
        name = side.get("like", side["impl"])
        if any(name in run.invocation.manifests for run in self.runs):
            return None
        try:
            return Registry().get(name)
        except UsageError:
            return None

    def _capabilities(
        self, manifest: Manifest | None, side: Mapping[str, str], own: Sequence[Shown], versions: Sequence[str]
    ) -> list[Capability]:
        lacking = {
            found[2]
            for test in own
            if test.state == "unsupported" and (found := _LACKS.match(test.message)) and found[1] == side["impl"]
        }
        declared: Mapping[str, bool] = {}
        if manifest is not None:
            declared = {name: name in _declared(manifest, versions) for name in CAPABILITIES}
        return [
            Capability(name=name, meaning=meaning, has=False if name in lacking else declared.get(name))
            for name, meaning in CAPABILITIES.items()
        ]

    def _findings(self, name: str, is_like: bool, versions: Sequence[str], own: Sequence[Shown]) -> list[Finding]:
        """Return the known failures of these versions, the worst first, with the number of results that show each."""
        known = [each for each in self.blame.known.get(name, ()) if is_like or each.concerns(versions)]
        seen = Counter(test.expectation for test in own if test.state == "xfailed")

        def fact(each: Expectation) -> tuple[int, str, str]:
            return SEVERITIES.index(each.severity), each.requirement, each.observed

        groups = [list(group) for _, group in groupby(sorted(known, key=fact), fact)]
        return [
            Finding(
                severity=group[0].severity,
                entry=self.conformance.entry(group[0].requirement),
                observed=group[0].observed,
                always=any(each.always for each in group),
                link=next((each.link for each in group if each.link.startswith(("https://", "http://"))), ""),
                seen=sum(seen[each] for each in group),
            )
            for group in groups
        ]

    def _differences(self, own: Sequence[Shown]) -> list[Difference]:
        """Return what differs, each once however many tests show it."""
        found: dict[str, list[Shown]] = {}
        for test in own:
            if test.state == "differs":
                found.setdefault(_NUMBERS.sub("0", test.first_line), []).append(test)
        return [
            Difference(
                message=same[0].first_line,
                entries=[
                    entry
                    for name in dict.fromkeys(name for test in same for name in test.result.requirements)
                    if (entry := self.conformance.entry(name)).level != "must"
                ],
                results=len(same),
            )
            for same in sorted(found.values(), key=lambda same: -len(same))
        ]


def _declared(manifest: Manifest, versions: Sequence[str]) -> frozenset[str]:
    """Return the capabilities that a manifest declares; for the kernel, those of these versions."""
    if manifest.kind != _KERNEL or manifest.source is None:
        return manifest.capabilities
    since = read_toml(manifest.source, str(manifest.source)).strings("capabilities_since", {})
    return manifest.capabilities - since.keys() | {
        name
        for name, first in since.items()
        if versions and all(_numbers(each) >= _numbers(first) for each in versions)
    }


def _numbers(version: str) -> list[int]:
    """Return the first two numbers of a kernel's version, for comparison."""
    return [int(number) for number in _NUMBERS.findall(version)[:2]]
