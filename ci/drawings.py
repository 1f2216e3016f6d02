"""Draw the layers, timers, states and files of ARCHITECTURE.md: `python -m ci.drawings`.

Each drawing in ARCHITECTURE.md is made from a table that a test checks against the code: selftests/support/layers.py
(test_imports.py), selftests/support/transitions.py (test_transitions.py), or the first line of each module's docstring.
It replaces the text between its markers, `<!-- drawing: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from ci.setup_checkout import ROOT
from ci.written import Written
from refwg.messages import SECOND
from refwg.noise import HandshakeState
from refwg.timers import Timer
from selftests.support.layers import FOLDERS, IMPORTS_ONLY, ROWS, WORLD_ROWS
from selftests.support.transitions import EXPIRIES, HANDSHAKE, INTERVAL, JITTER, SESSIONS, STATES, TIMERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

DOCUMENT: Final = ROOT / "ARCHITECTURE.md"
# Widths of drawings, in characters: the boxes of the layers; a timer's three columns.
LAYER, EVENT, OUTCOME, ACTION = 110, 41, 23, 32

# Files without a docstring: path or pattern below the root, and what the file does.
OTHER_FILES: Final = {
    "bench/README.md": "Explain every figure that the benchmarks print.",
    "bench/page.html.j2": "Draw the page of bench/run.",
    "bench/run": "Start bench/runner.py.",
    "bench/suite": "Start bench/suite.py.",
    "ci/Containerfile": "Make an image with the lab and all that it needs, for any CI.",
    "ci/bootstrap.sh": "Find or install a Python for the four commands of this folder, which source it.",
    "ci/docs": "Start ci/docs_site.py.",
    "ci/docs.lock": "Pin the packages of ci/docs.",
    "ci/flakes": "Start ci/flakes.py.",
    "ci/interop": "Start ci/matrix.py.",
    "ci/packages.txt": "List the Debian packages that the lab needs, and what shows that each is installed.",
    "ci/setup": "Start ci/setup_checkout.py.",
    "ci/test": "Start ci/gates.py.",
    "harness/implementations/*.toml": "Describe one implementation: a manifest, explained in docs/manifests.md.",
    "harness/report/report.html.j2": "Draw the report's page.",
    "harness/install/packages.toml": "Name each distribution's command that installs packages, and its names for them.",
    "harness/report/results.schema.json": "Describe results.json as a JSON Schema (2020-12).",
    "harness/report/site.html.j2": "Draw a page of the site of `wg-interop site`.",
    "harness/report/states.html.j2": "Give each state its mark and meaning, for all pages.",
    "harness/report/style.css": "Set the colours, tables and texts that all pages share.",
    "harness/vm/debug.config": "List the options of a kernel that checks itself: KASAN, lockdep, kmemleak.",
    "harness/vm/image.toml": "List the programs and files of the guest's root.",
    "harness/vm/kernel.config": "List the options that a kernel of your own needs.",
    "harness/vm/kernels.toml": "Name the kernels that `--kernel` takes, and the modules that go with them.",
    "refwg/mutants/*.toml": "List the mutants of one area: what each changes, and which test detects it.",
}
TEST_FOLDERS: Final = {
    "conformance": "List scenarios, requirements and bugs, and test single ones of them by scripted peers.",
    "expectations": "Name the known failures of real programs, with evidence.",
    "faults": "Kill and break programs, guests and the run itself; the lab must detect each break.",
    "lab": "Test the lab itself, without a pair: nodes, wires, captures, health checks.",
    "mutants": "Run mutants of refwg by the command, and check that a test detects each.",
    "netns": "Test implementations: the scenarios, for every pair or every implementation.",
    "properties": "Test modules without I/O against other code and plain models, by random input.",
    "support": "Hold what tests share: helpers, and the tables behind the drawings of this file.",
    "unit": "Test one module per file, in folders like those of the code; without namespaces.",
    "vectors": "Test refwg against vectors of other projects, and hold transcripts for them.",
}


# Text in boxes.


def box(rows: Iterable[Sequence[str]], width: int = LAYER) -> list[str]:
    """Draw the rows, each of one line or more, below each other in one box; width: characters."""
    rule = f"+{'-' * (width - 2)}+"
    lines = [rule]
    for row in rows:
        lines += [f"| {text:{width - 4}} |" for text in row]
        lines.append(rule)
    return lines


def text_block(lines: Iterable[str]) -> str:
    """Return the lines as a code block of Markdown, without spaces at their ends."""
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


UNLESS: Final = "sets, unless set -->"


# Layers.


def layers_of_harness() -> str:
    """Draw one box per row of FOLDERS, the top layer first, with the summary of each folder."""
    names = max(len(name) for row in FOLDERS for name in row)
    rows = []
    for row in reversed(FOLDERS):
        lines = []
        for name in row:
            lines.append(f"{name:{names}}  {summary(_module_of(name))}")
            if only := IMPORTS_ONLY.get(name):
                lines.append(f"{'':{names}}  (imports only {', '.join(sorted(only))})")
        rows.append(lines)
    return text_block(box(rows))


def _module_of(name: str) -> Path:
    """Return `harness/net/__init__.py` for the folder net, `harness/errors.py` for the module errors."""
    folder = ROOT / "harness" / name
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def layers_of_refwg() -> str:
    """Draw one box per row of modules, the top layer first, with a line between I/O and core."""
    rows = [["   ".join(row)] for row in reversed(ROWS)]
    width = max(len(text) for (text,) in rows) + 4
    lines = box(rows, width)
    # Replace the rule between the two parts by a line with their names.
    lines[2 * len(WORLD_ROWS)] = f"{' world above, core without I/O below ':=^{width}}"
    return text_block(lines)


# Timers.


def timers() -> str:
    """Draw each timer as a box, with the events that set and stop it on the left, its expiry on the right."""
    return text_block(line for timer in Timer for line in _timer(timer))


def _timer(timer: Timer) -> list[str]:
    inside = [timer.name.lower().replace("_", " "), _delay_of(timer)]
    left, right = _events_of(timer), _actions_of(timer)
    width = max(len(other.name) for other in Timer)
    edge = f"{'':{EVENT}}+{'-' * (width + 2)}+"
    rows = zip_longest(left, inside, right, fillvalue="")
    return [edge, *(f"{a:{EVENT}}| {b:{width}} |{c}" for a, b, c in rows), edge]


def _delay_of(timer: Timer) -> str:
    """Return the delay that events set; it must be the same for all events."""
    (delay,) = {delay for _, _, changes in TIMERS if (delay := changes.get(timer)) is not None}
    if delay == INTERVAL * SECOND:
        return "as configured"
    return f"{delay % JITTER // SECOND} s{' + jitter' if delay >= JITTER else ''}"


def _events_of(timer: Timer) -> list[str]:
    """Return a line with an arrow per event; UNLESS if another row of the event leaves the timer unchanged."""
    changing = [(event, changes[timer]) for _, event, changes in TIMERS if timer in changes]
    leaving = {event for _, event, changes in TIMERS if timer not in changes}
    arrows = []
    for event, delay in dict.fromkeys(changing):
        arrows.append((event.value, "stops --x" if delay is None else "sets -->" if event not in leaving else UNLESS))
    arrows.sort(key=lambda arrow: arrow[1].startswith("stops"))
    return [f"{event} {f' {verb}':->{EVENT - 1 - len(event)}}" for event, verb in arrows]


def _actions_of(timer: Timer) -> list[str]:
    """Return lines with the actions on expiry, and the number of initiations after which the second one is taken."""
    lines: list[str] = []
    for action in dict.fromkeys(expiry.action for expiry in EXPIRIES if expiry.timer is timer):
        attempts = min(expiry.attempts for expiry in EXPIRIES if expiry.action is action)
        when = f" after {attempts + 1} in a row " if lines else " runs out "
        first, *rest = textwrap.wrap(action.value, ACTION)
        lines += [f"{f'{when:-^{OUTCOME - 2}}> ':{OUTCOME}}{first}", *(f"{'':{OUTCOME}}{text}" for text in rest)]
    return lines


# States.


def sessions() -> str:
    """Draw the occupied slots of a peer's keypairs as states, without events that change no slot and no permission."""
    arrows = []
    for before, event, after in SESSIONS:
        if after != before and "x" not in after:
            arrows.append((before, event.value, _occupied(after)))
    names = {state: ", ".join(_slots(state)) or "no session" for state in STATES}
    silencing = dict.fromkeys(event.value for _, event, after in SESSIONS if "x" in after)
    note = f"{' / '.join(silencing)}: all stay, but current and next may no longer send"
    return _diagram(names, arrows, note)


def _slots(state: str) -> list[str]:
    return [name for name, key in zip(("previous", "current", "next"), state.split(), strict=True) if key != "-"]


def _occupied(after: str) -> str:
    """Return the state in which the same slots are occupied."""
    return next(state for state in STATES if _slots(state) == _slots(after))


def handshake() -> str:
    """Draw the states of refwg.noise.Handshake and its methods, without refused calls."""
    names = {state.name: state.name for state in HandshakeState}
    return _diagram(names, [(before.name, step, after.name) for before, step, after in HANDSHAKE if after is not None])


def _diagram(names: dict[str, str], arrows: list[tuple[str, str, str]], note: str = "") -> str:
    """Return a state diagram for Mermaid, which GitHub draws.

    A label that leads from every state to the same one gets a single arrow, from `any state`.
    """
    ids = {state: re.sub(r"\W+", "_", name) for state, name in names.items()}
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {ids[next(iter(names))]}"]
    lines += [f'    state "{name}" as {ids[state]}' for state, name in names.items() if ids[state] != name]
    merged: dict[tuple[str, str], list[str]] = {}
    for label in dict.fromkeys(label for _, label, _ in arrows):
        sources = {source: target for source, what, target in arrows if what == label}
        targets = set(sources.values())
        if len(targets) == 1 and names.keys() - targets <= sources.keys():
            sources = {"any": targets.pop()}
        for source, target in sources.items():
            merged.setdefault((ids.get(source, "any_state"), ids[target]), []).append(label)
    if any(source == "any_state" for source, _ in merged):
        lines.append('    state "any state" as any_state')
    lines += [f"    {source} --> {target}: {' / '.join(labels)}" for (source, target), labels in merged.items()]
    if note:
        lines += ["    note right of any_state", f"        {note}", "    end note"]
    return "\n".join([*lines, "```"])


# Files.


def summary(path: Path) -> str:
    """Return the first line of a module's docstring, or the line of OTHER_FILES; ValueError if there is none."""
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    relative = path.relative_to(ROOT)
    lines = [line for pattern, line in OTHER_FILES.items() if relative.match(pattern)]
    if not lines:
        raise ValueError(f"{relative} has no line in the table of files; add one to OTHER_FILES of ci/drawings.py")
    return lines[0]


def files_below(folder: Path) -> list[Path]:
    """List all files of a package but py.typed; folders of harness in the order of their layers, the top first."""
    order = {name: number for number, row in enumerate(FOLDERS) for name in row}

    def key(path: Path) -> tuple[int, str, bool, str]:
        top = path.relative_to(folder).parts[0].removesuffix(".py")
        layer = order.get(top, 0) if folder.name == "harness" else 0
        return (-layer, str(path.parent), path.name != "__init__.py", path.name)

    paths = (path for path in folder.rglob("[!.]*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted((path for path in paths if path.suffix != ".typed"), key=key)


def files(folder: str) -> str:
    """Return a table with a line for each file below the folder; a package's line is that of its `__init__.py`."""
    rows = []
    for path in files_below(ROOT / folder):
        name = str(path.relative_to(ROOT / folder)).removesuffix("__init__.py")
        line = summary(path).replace("|", r"\|")
        rows.append(f"| `{folder}/{name}` | {line} |")
    return _table(rows)


def folders_of_tests() -> str:
    """Return a table with a line for each folder of selftests."""
    return _table(f"| `selftests/{name}/` | {line} |" for name, line in TEST_FOLDERS.items())


def _table(rows: Iterable[str]) -> str:
    return "\n".join(["| file | what it does |", "|---|---|", *rows])


# The document.

DRAWINGS: Final[dict[str, Callable[[], str]]] = {
    "layers of harness": layers_of_harness,
    "layers of refwg": layers_of_refwg,
    "timers": timers,
    "sessions": sessions,
    "handshake": handshake,
    "files of harness": lambda: files("harness"),
    "files of refwg": lambda: files("refwg"),
    "files of ci": lambda: files("ci"),
    "files of bench": lambda: files("bench"),
    "folders of selftests": folders_of_tests,
    "files of selftests/support": lambda: files("selftests/support"),
}
WRITTEN: Final = Written("ci.drawings", __doc__.partition("\n")[0], DOCUMENT, "drawing", DRAWINGS)


if __name__ == "__main__":
    sys.exit(WRITTEN.main())
