"""Check what a wire leaves behind: captures, counts, and a failure if a rule of its script matched nothing."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("inner_pytest")

TESTS = """
from harness.lab.topology import NAT, WIRED

def test_link(lab):
    NAT.build(lab)["ns1"].run(["ping", "-c1", "-W1", "192.168.1.1"])
    assert not "wrong"

def test_wire(lab):
    WIRED.build(lab)["ns1"].run(["ping", "-c1", "-W1", "192.168.1.2"])
"""
MAGIC = b"\x0a\x0d\x0d\x0a"


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("failed", ["ns0-vethrs.pcapng", "ns1-vethc.pcapng"]),
        ("all", ["ns0-vethrs.pcapng", "ns1-ns2.pcapng", "ns1-vethc.pcapng"]),
    ],
)
def test_link_and_wire_captures_are_kept_as_evidence(pytester: pytest.Pytester, keep: str, kept: list[str]) -> None:
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("--keep", keep).assert_outcomes(failed=1, passed=1)
    files = sorted(pytester.path.glob("report/evidence/*/*.pcapng"), key=lambda path: path.name)
    assert [path.name for path in files] == kept
    assert all(path.read_bytes()[:4] == MAGIC for path in files)
    # The payload of ping(8)'s echo request, which passed the link of ns1.
    assert all(b"\x10\x11\x12\x13\x14\x15" in path.read_bytes() for path in files if path.name.startswith("ns1"))
    for counts in pytester.path.glob("report/evidence/*/captures.txt"):
        assert "other (ICMP)" in counts.read_text()


RULES = """
import pytest

from harness import Drop, Hold, differs
from harness.lab.topology import WIRED

@pytest.fixture
def wire(lab):
    nodes = WIRED.build(lab)
    nodes["ns1"].run(["ping", "-c1", "-W1", "192.168.1.2"])
    return lab.wires[0]

def test_last(wire):
    wire.apply(Drop(message="other", optional=True), Drop(message="data", nth=2))

def test_replaced(wire):
    wire.apply(Drop(message="data"), Hold(message="response", sender="ns2"))
    wire.apply()

def test_optional(wire):
    wire.apply(Drop(message="data", optional=True))

def test_fails(wire):
    wire.apply(Drop(message="data"))
    assert not "wrong"

def test_differs(wire):
    wire.apply(Drop(message="data"))
    differs("it has no such message")
"""


def test_rule_that_matched_nothing_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(RULES)
    run = pytester.runpytest_inprocess("--keep", "none")
    run.assert_outcomes(passed=1, failed=3)
    run.stdout.fnmatch_lines("*, 1 differs in *")
    for rules in (
        "rule 1 (drop message=data) or rule 2 (hold message=response sender=ns2)",
        "rule 2 (drop message=data nth=2)",
    ):
        assert f"wire ns1-ns2: no message matched {rules}, so the test proved nothing" in run.stdout.str()
    run.stdout.fnmatch_lines("E *arrived since apply(): ns1: *; correct the rule, or declare it optional=True")
    # The error of the test comes first.
    run.stdout.fnmatch_lines(["E *assert not 'wrong'*", "E *no message matched rule 1 (drop message=data), so *"])
