from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.errors import Unavailable, UsageError
from harness.fuzz import inputs
from harness.fuzz.corpus import Corpus
from harness.fuzz.findings import ANSWERED, DIED, Finding, as_test
from harness.fuzz.inputs import APPEND, CUT, Case, Change, Step
from harness.fuzz.memory import MAY_GROW, Growth

if TYPE_CHECKING:
    from pathlib import Path

CASES = [
    Case(
        "session as responder",
        (
            Step(inputs.INITIATION),
            Step(
                inputs.DATA,
                b"\x45" + bytes(2000) + b"\1",
                7,
                (Change(CUT, 40), Change(APPEND, 0, bytes(16))),
                is_sealed=False,
            ),
        ),
    )
]


def run(test: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(test, "test", "exec"), names)  # noqa: S102 - what as_test wrote
    return names


@pytest.mark.parametrize("engine", ["", "simple"])
def test_written_test_has_same_cases(engine: str) -> None:
    finding = Finding(ANSWERED, 'sent "a" \\ """ response')
    text = as_test(CASES, finding, origin="wg-interop fuzz --impl x", engine=engine)
    names = run(text)
    assert names["CASES"] == CASES
    assert "test_hostile_input_answered_wrongly" in names
    assert "wg-interop fuzz --impl x" in str(names["__doc__"])
    assert "bytes(2000)" in text
    assert "* 25" not in text


@pytest.mark.parametrize("engine", ["", "batch"])
def test_written_test_repeats_race(engine: str) -> None:
    assert "CASES * 25" in as_test(CASES, Finding(DIED, "ended"), origin="x", engine=engine, repeat=25)


def test_written_test_imports_only_what_it_uses() -> None:
    text = as_test([Case("no session", (Step(inputs.HOLD),))], Finding(DIED, "ended"), origin="x")
    assert "import Case, Step\n" in text
    assert run(text)["CASES"] == [Case("no session", (Step(inputs.HOLD),))]


def test_corpus_keeps_cases_for_next_run(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.cases == []
    corpus.add(CASES[0])
    corpus.add(CASES[0])
    assert Corpus(tmp_path / "corpus").cases == CASES


def test_finding_gets_folder_of_its_kind(tmp_path: Path) -> None:
    folder = Corpus(tmp_path).finding(ANSWERED, CASES)
    assert folder.parent == tmp_path / "findings"
    assert folder.name.startswith("answered-wrongly-")
    assert [Case.from_json(line) for line in (folder / "case.json").read_text().splitlines()] == CASES


def test_damaged_corpus_is_refused_by_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "1.json").write_text("{")
    with pytest.raises(UsageError, match=r"cases/1\.json: not a case"):
        Corpus(tmp_path)


def test_corpus_that_is_file_is_refused_with_remedy(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("")
    with pytest.raises(Unavailable, match="name a folder that you may write to"):
        Corpus(tmp_path / "corpus").add(CASES[0])


def test_memory_grows_only_beyond_its_first_sizes() -> None:
    growth = Growth()
    assert not growth.grown(100 << 20, is_warm=False)
    assert not growth.grown(180 << 20, is_warm=False)
    assert not growth.grown((180 << 20) + MAY_GROW, is_warm=True)
    assert growth.grown((180 << 20) + MAY_GROW + 1, is_warm=True)
    assert str(growth) == f"from 180 to {180 + (MAY_GROW >> 20)} MB"


def test_first_size_counts_even_when_it_is_late() -> None:
    assert not Growth().grown(500 << 20, is_warm=True)
