"""Check that the evidence of a failed test has a pcapng of each captured link and wire."""

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
