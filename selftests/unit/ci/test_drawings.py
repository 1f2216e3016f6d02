"""Check that ARCHITECTURE.md has the current drawings, and that they show every row."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Final

import pytest

from ci import drawings
from ci.setup_checkout import ROOT
from refwg.noise import HandshakeState
from refwg.timers import Timer
from selftests.support.layers import FOLDERS, ROWS
from selftests.support.transitions import EXPIRIES, HANDSHAKE, SESSIONS, STATES, TIMERS, Event

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

TEXT: Final = (ROOT / "ARCHITECTURE.md").read_text()
CODE: Final = ("harness", "refwg", "ci", "bench", "selftests/support")
MODULES: Final = sorted(str(path.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawing_is_up_to_date(name: str) -> None:
    assert drawings.WRITTEN.found(TEXT)[name] == f"{drawings.DRAWINGS[name]()}\n", "run python -m ci.drawings"


@pytest.mark.parametrize("module", MODULES)
def test_first_line_of_docstring_is_one_short_sentence(module: str) -> None:
    first = (ast.get_docstring(ast.parse((ROOT / module).read_text())) or "").partition("\n")[0]
    assert re.fullmatch(r"[A-Z].{10,87}\.", first)


def test_table_of_files_names_every_module() -> None:
    lines = {match[1]: match[2] for match in re.finditer(r"^\| `([\w/.]+)` \| (.+) \|$", TEXT, re.MULTILINE)}
    assert {module.removesuffix("__init__.py") for module in MODULES} <= lines.keys()


def test_table_of_tests_names_every_folder() -> None:
    folders = {path.parent.relative_to(ROOT / "selftests").parts[0] for path in ROOT.glob("selftests/*/**/*.*")}
    assert folders - {"__pycache__"} == drawings.TEST_FOLDERS.keys()


def boxes(name: str) -> list[str]:
    return [part for part in re.split(r"^[+=].*[+=]$", drawings.DRAWINGS[name](), flags=re.MULTILINE) if "|" in part]


def test_boxes_of_harness_are_rows_of_table() -> None:
    named = [re.findall(r"^\| (\w+) ", part, re.MULTILINE) for part in boxes("layers of harness")]
    assert named == FOLDERS[::-1]


def test_boxes_of_refwg_are_rows_of_table() -> None:
    assert [part.strip("| \n").split() for part in boxes("layers of refwg")] == ROWS[::-1]


@pytest.mark.parametrize("timer", Timer)
def test_timer_has_arrow_for_each_event(timer: Timer) -> None:
    box = re.split(r"^ +\+-+\+$", drawings.timers(), flags=re.MULTILINE)[1::2][list(Timer).index(timer)]
    assert timer.name.lower().replace("_", " ") in box
    arrows = set(re.findall(r"^(\w.*?) -+ (sets|stops)", box, re.MULTILINE))
    changing = [(event.value, changes[timer]) for _, event, changes in TIMERS if timer in changes]
    assert arrows == {(event, "stops" if delay is None else "sets") for event, delay in changing}
    outcome = " ".join(" ".join(line.partition("|")[2].partition("|")[2] for line in box.splitlines()).split())
    assert all(expiry.action.value in outcome for expiry in EXPIRIES if expiry.timer is timer)


def arrows_of(name: str, states: Iterable[str]) -> set[tuple[str, str, str]]:
    """Source, target and label of every arrow; one from any state counts for each state."""
    diagram = drawings.DRAWINGS[name]()
    names = {match[2]: [match[1]] for match in re.finditer(r'state "(.+)" as (\w+)', diagram)}
    names["any_state"] = list(states)
    arrows = re.findall(r"^ +(\w+) --> (\w+): (.+)$", diagram, re.MULTILINE)
    return {
        (source, target, label)
        for start, end, labels in arrows
        for label in labels.split(" / ")
        for source in names.get(start, [start])
        for target in names.get(end, [end])
    }


def slots(state: str) -> str:
    names = [name for name, key in zip(("previous", "current", "next"), state.split(), strict=True) if key != "-"]
    return ", ".join(names) or "no session"


def test_sessions_have_arrow_for_each_row() -> None:
    rows = {(slots(a), slots(b), event.value) for a, event, b in SESSIONS if "x" not in b and (a != b or a == "- - -")}
    assert arrows_of("sessions", map(slots, STATES)) == rows
    assert all(event.value in drawings.sessions() for _, event, b in SESSIONS if "x" in b)


def test_handshake_has_arrow_for_each_row() -> None:
    rows = {(a.name, b.name, step) for a, step, b in HANDSHAKE if b is not None}
    assert arrows_of("handshake", HandshakeState.__members__) == rows


@pytest.mark.parametrize(("options", "status"), [(["--check"], 1), ([], 0)])
def test_outdated_drawing_is_reported(
    options: Sequence[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current = drawings.WRITTEN.rewritten(TEXT)
    document = tmp_path / "ARCHITECTURE.md"
    document.write_text(current.replace("initiation sent -", "initiation lost -", 1))
    assert drawings.WRITTEN.main(options, document) == status
    assert capsys.readouterr().out.startswith("ARCHITECTURE.md: timers: ")
    assert (document.read_text() == current) is (options == [])


def test_check_of_current_drawings_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "ARCHITECTURE.md"
    document.write_text(drawings.WRITTEN.rewritten(TEXT))
    assert drawings.WRITTEN.main(["--check"], document) == 0
    assert capsys.readouterr().out == ""


def test_drawing_without_place_is_refused() -> None:
    with pytest.raises(ValueError, match="disagree about: timers"):
        drawings.WRITTEN.found(TEXT.replace("<!-- drawing: timers -->", ""))


def test_file_without_line_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ci/new\.sh has no line in the table of files"):
        drawings.summary(ROOT / "ci" / "new.sh")


def test_event_that_leaves_timer_set_is_marked() -> None:
    assert f"{Event.DATA_SENT.value} ---------- sets, unless set" in drawings.timers()
