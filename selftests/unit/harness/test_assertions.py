"""Check messages of failures: the clue first, and records compared field by field."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from harness import AllowedIP, DeviceState, Endpoint, Key, PeerState
from harness.plugin.assertions import pytest_assertrepr_compare as explain
from harness.report.results import without_class

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

KEY, OTHER = Key(b"A" * 32), Key(b"B" * 32)
PEER = PeerState(public_key=KEY, endpoint=Endpoint.parse("192.0.2.1:1"), rx_bytes=148)


@pytest.fixture
def program(pytester: pytest.Pytester) -> Path:
    path = pytester.path / "program"
    path.write_text("#!/bin/sh\necho 1.2\n")
    path.chmod(0o755)
    return path


# The body of a test, and the first line of its message.
FAILURES = [
    ("raise HarnessError('ns1: ping ::1: 0 of 1 answered\\nA logs x')", "ns1: ping ::1: 0 of 1 answered"),
    ("raise DeadlineExceeded('waited 3 s')", "waited 3 s"),
    ("raise Unhealthy('mine (pid 7) ended')", "mine (pid 7) ended"),
    ("pytest.fail('it is late')", "it is late"),
    ("assert 1 == 2, 'it is late'", "it is late"),
    ("raise OSError('no way')", "OSError: no way"),
    ("raise HarnessError('it is late') from OSError('no way')", "it is late"),
]
MODULE = """
import pytest
from harness.errors import DeadlineExceeded, HarnessError
from harness.lab.lab import Unhealthy
"""


def test_failure_begins_with_its_clue_everywhere(
    pytester: pytest.Pytester, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tests = [f"def test_{n}(implementation): {body}\n" for n, (body, _) in enumerate(FAILURES)]
    pytester.makepyfile(test_it=MODULE + "".join(tests))
    options = ["--impl", f"mine={program}", "--results", "results.json", "--junit-xml", "junit.xml"]
    output = pytester.runpytest_subprocess(*options).stdout.str()
    clues = [clue for _, clue in FAILURES]
    assert not [name for name in ("harness.errors.", "harness.lab.") if name in output]
    assert not [n for n, clue in enumerate(clues) if f"FAILED test_it.py::test_{n}[mine] - {clue}" not in output]
    results = json.loads((pytester.path / "results.json").read_text())["results"]
    assert [result["message"].split("\n")[0] for result in results] == clues
    failures = ET.parse(pytester.path / "junit.xml").iter("failure")  # noqa: S314 - it is ours
    assert [failure.attrib["message"].split("\n")[0] for failure in failures] == clues


def test_failure_of_another_project_keeps_its_class(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from harness.errors import HarnessError

        def test_it(): raise HarnessError("it is late")
        """
    )
    pytester.runpytest_subprocess().stdout.fnmatch_lines(["E *harness.errors.HarnessError: it is late"])


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ("harness.errors.HarnessError: ns1: ping", "ns1: ping"),
        ("harness.lab.lab.Unhealthy: ended", "ended"),
        ("AssertionError: A's endpoint\nassert 1 == 2", "A's endpoint\nassert 1 == 2"),
        ("refwg.errors.ConfigError: no", "refwg.errors.ConfigError: no"),
        ("A's endpoint: AssertionError: x", "A's endpoint: AssertionError: x"),
        ("Failed: Failed: x", "Failed: x"),
        ("", ""),
    ],
)
def test_class_that_says_nothing_is_taken_from_message(message: str, plain: str) -> None:
    assert without_class(message) == plain


@pytest.mark.parametrize(
    ("left", "right", "differences"),
    [
        (PEER, PeerState(public_key=OTHER, rx_bytes=148), [
            "public_key: Key(QUFBQUFB...=) != Key(QkJCQkJC...=)", "endpoint: Endpoint(192.0.2.1:1) != None",
        ]),
        (
            DeviceState(listen_port=1, peers=(PEER, PEER)),
            DeviceState(listen_port=1, peers=(PEER, PeerState(public_key=KEY, endpoint=PEER.endpoint, rx_bytes=92))),
            ["peers[1].rx_bytes: 148 != 92"],
        ),
        (DeviceState(peers=(PEER,)), DeviceState(), [f"peers: ({PEER!r},) != ()"]),
        (KEY, OTHER, []),
        (AllowedIP.parse("::/0"), AllowedIP.parse("::/1"), []),
    ],
    ids=["peer", "peer within device", "number of peers", "key", "allowed ip"],
)  # fmt: skip
def test_records_are_compared_field_by_field(left: object, right: object, differences: list[str]) -> None:
    assert explain("==", left, right) == [f"{left!r} == {right!r}", *differences]


@pytest.mark.parametrize(("left", "right"), [(1, 2), (KEY, "key"), ((KEY,), (OTHER,)), (KEY, None)])
def test_other_values_are_left_to_pytest(left: object, right: object) -> None:
    assert explain("==", left, right) is None


def test_order_of_records_is_left_to_pytest() -> None:
    assert explain("!=", KEY, KEY) is None
