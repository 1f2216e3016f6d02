"""Write results for GitHub: annotations of the worst causes, and a summary in Markdown."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from harness.report.causes import tally_of_causes
from harness.report.evidence import clean
from harness.report.results import GATING, STATES, causes_of, in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from harness.report.causes import Cause
    from harness.report.results import Result

ANNOTATIONS: Final = 10  # errors of one step that GitHub shows
SUMMARY_LIMIT: Final = 1024 * 1024  # bytes of the summaries of one step; GitHub drops a larger one
_MESSAGE_LINES: Final = 20  # lines of a message, in an annotation and in the summary
_LINE: Final = 500  # characters of such a line
_TESTS: Final = 20  # tests of a cause that the summary names
# Bytes that are kept free for the sentence that says what was left out.
_RESERVE: Final = 200
_ALONE: Final = "(alone)"


# Annotations


def escape_data(text: str) -> str:
    """Escape the message of a workflow command: a percent sign and the ends of lines."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Escape a property of a workflow command: also the characters that end properties."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def error_commands(results: Iterable[Result], failure: str = "", root: str | None = None) -> list[str]:
    """Return a workflow command `::error` for each of the worst causes, at most ANNOTATIONS.

    failure: why the run failed, if not by its tests. root: what stands before the name of a test's file in the
    repository, such as `lab/`; None: the tests are not there, and annotations name no file.
    """
    causes = causes_of(results)
    lines = [f"::error title=wg-interop::{escape_data(failure)}"] if failure else []
    shown = causes[: ANNOTATIONS - len(lines)]
    lines += [_annotation(cause, root) for cause in shown]
    if left := len(causes) - len(shown):
        lines.append(f"::warning title=wg-interop::{left} more causes of failures are in the summary and the report")
    return lines


def _annotation(cause: Cause[Result], root: str | None) -> str:
    witness = cause.typical
    number = len(cause.witnesses)
    title = f"{cause.blame or 'wg-interop'}: {in_words(witness.state)}{f' in {number} tests' if number > 1 else ''}"
    file = witness.id.partition("::")[0]
    place = "" if root is None else f"file={escape_property(root + file)},"
    text = "\n".join([*_lines(witness.message), f"test: {witness.id}"])
    return f"::error {place}title={escape_property(title)}::{escape_data(text)}"


# The summary


def summary(
    results: Sequence[Result], failure: str = "", comparison: Iterable[str] = (), *, room: int = SUMMARY_LIMIT
) -> str:
    """Return the summary of a step: counts, a matrix for each lane, and each cause of failures.

    comparison: sentences about the baseline. room: bytes that the summary may have; what does not fit is left out, and
    a sentence says so.
    """
    blocks = list(_blocks(results, failure, comparison))
    text, left = "", room - _RESERVE
    for number, block in enumerate(blocks):
        left -= len(block.encode())
        if left < 0:
            rest = f"... {len(blocks) - number} more parts do not fit here; the report has them\n"
            return text + rest if len(rest.encode()) + len(text.encode()) <= room else text
        text += block
    return text


def _blocks(results: Sequence[Result], failure: str, comparison: Iterable[str]) -> Iterator[str]:
    counts = Counter(result.state for result in results)
    bad = failure or any(result.state in GATING for result in results)
    yield f"## {'❌' if bad else '✅'} wg-interop: {', '.join(_counted(counts)) or 'no test ran'}\n\n"
    yield from (f"**{_text(failure)}**\n\n",) if failure else ()
    yield from (f"{_text(sentence)}\n\n" for sentence in comparison)
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.pair:
            groups[result.lane, result.kernel].append(result)
    for (lane, kernel), found in groups.items():
        yield f"Lane {lane}, kernel {_text(kernel)}: A in the rows, B in the columns\n\n"
        yield _matrix(found)
    causes = causes_of(results)
    if causes:
        failures = sum(len(cause.witnesses) for cause in causes)
        yield f"### {tally_of_causes(failures, len(causes))}\n\n"
    yield from map(_cause, causes)


def _matrix(results: Iterable[Result]) -> str:
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for result in results:
        a, _, b = result.pair.partition("~")
        cells[a, b or _ALONE][result.state] += 1
    rows = sorted({a for a, _ in cells})
    columns = sorted({b for _, b in cells}, key=lambda name: (name == _ALONE, name))
    lines = [f"| A \\ B | {' | '.join(map(_text, columns))} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| **{_text(a)}** | {' | '.join(_cell(cells.get((a, b), Counter())) for b in columns)} |" for a in rows]
    return "\n".join(lines) + "\n\n"


def _cell(counts: Counter[str]) -> str:
    mark = "❌ " if set(counts) & GATING else "✅ " if counts["passed"] else ""
    return mark + "<br>".join(_counted(counts))


def _counted(counts: Counter[str]) -> list[str]:
    return [f"{counts[state]} {in_words(state)}" for state in STATES if counts[state]]


def _cause(cause: Cause[Result]) -> str:
    """Return a part that folds: the first line of the message, then all of it and the tests."""
    lines = _lines(cause.typical.message)
    number = len(cause.witnesses)
    title = (
        f"{_text(cause.blame or 'without an implementation')}: {number} test{'s' * (number != 1)}: {_text(lines[0])}"
    )
    tests = [witness.id for witness in cause.witnesses[:_TESTS]]
    if number > _TESTS:
        tests.append(f"... and {number - _TESTS} more")
    code = _fenced([*lines, "", *(f"test: {' '.join(clean(name).split())}" for name in tests)])
    return f"<details><summary>{title}</summary>\n\n{code}\n</details>\n\n"


def _fenced(lines: Sequence[str]) -> str:
    """Return lines as a block of code, with a fence that none of them ends."""
    ticks = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, ticks + 1)
    return "\n".join([f"{fence}text", *lines, fence])


def _text(text: str) -> str:
    """Escape a text for Markdown, so that it is shown as it is, also in a table and in HTML."""
    line = " ".join(clean(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"&#{ord(character)};" if character in "|`*_[]\\~!#@" else character for character in line)


def _lines(message: str) -> list[str]:
    """Return the first lines of a message, none of them long."""
    lines = clean(message).strip().splitlines() or ["no message"]
    cut = [line if len(line) <= _LINE else f"{line[:_LINE]} ..." for line in lines[:_MESSAGE_LINES]]
    return [*cut, f"... {len(lines) - _MESSAGE_LINES} more lines"] if len(lines) > _MESSAGE_LINES else cut
