"""The plugin's options on pytest's command line, and what they ask for: lanes, pairs, guests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.lanes import GUESTS, HERE

if TYPE_CHECKING:
    import pytest

    from harness.implementations.manifest import (
        Manifest,
    )
from typing import TYPE_CHECKING


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wg-interop", "WireGuard interop lab")
    group.addoption(
        "--impl", action="append", default=[], metavar="NAME[=PROGRAM]", dest="wg_impl",
        help="Test this implementation, or this program as it; may be repeated. Default: all that are known.",
    )  # fmt: skip
    group.addoption(
        "--impl-manifest", action="append", default=[], metavar="FILE", type=Path, dest="wg_manifest",
        help="Test the implementation that this manifest describes: with itself, unless --impl or --pair names others.",
    )  # fmt: skip
    group.addoption(
        "--pair", action="append", default=[], metavar="A~B", dest="wg_pair",
        help="Test A in ns1 against B in ns2, more than once for several. Default: all ordered pairs.",
    )  # fmt: skip
    group.addoption(
        "--lane", action="append", default=[], choices=(*HERE, *GUESTS), dest="wg_lane",
        help="Run this lane only, may be repeated: core needs no namespaces, netns runs on this kernel, vm in a guest "
        "with a kernel of your choice, warp there with a clock that skips idle time.",
    )  # fmt: skip
    group.addoption(
        "--kernel", action="append", default=[], metavar="VERSION|PATH", dest="wg_kernel",
        help="The kernel of lanes vm and warp: a name of harness/vm/kernels.toml, a Debian version, a bzImage or a "
        "build tree.",
    )  # fmt: skip
    group.addoption(
        "--results", metavar="FILE", type=Path, dest="wg_results",
        help="Where the results go; index.html and evidence/ go beside them. Default: report/results.json below the "
        "root directory.",
    )  # fmt: skip
    group.addoption(
        "--keep", choices=("failed", "all", "none"), default="failed", dest="wg_keep",
        help="Of which tests the evidence stays in report/evidence/. Default: failed.",
    )  # fmt: skip
    group.addoption(
        "--timeout-scale", metavar="F", type=float, default=1.0, dest="wg_timeout_scale",
        help="Multiply every deadline by this factor, for slow machines.",
    )  # fmt: skip
    group.addoption(
        "--seed", metavar="N", type=int, dest="wg_seed",
        help="The seed of all random choices, as an earlier run printed it.",
    )  # fmt: skip
    parser.addini("wg_sandbox", "When to enter the sandbox: auto (a test uses the lab) or always.", default="auto")


class Pair(NamedTuple):
    """The implementations of A (in ns1) and B (in ns2)."""

    a: Manifest
    b: Manifest

    def __str__(self) -> str:
        return f"{self.a.name}~{self.b.name}"


def asked(config: pytest.Config) -> bool:
    """Whether an option was given that makes sense for the lab only."""
    option = config.option
    lanes = set(option.wg_lane) - {"core"}
    return bool(option.wg_impl or option.wg_manifest or option.wg_pair or lanes)


def guest_lanes(config: pytest.Config) -> list[str]:
    """The lanes asked for that need a guest, in order."""
    return [lane for lane in GUESTS if lane in config.option.wg_lane]


def only_guests(config: pytest.Config) -> bool:
    """Whether nothing is to run on this kernel."""
    return bool(guest_lanes(config)) and not set(config.option.wg_lane) & set(HERE)


def guests_have_more(config: pytest.Config) -> bool:
    """Whether guests may have tests that do not run on this kernel as well."""
    lanes = config.option.wg_lane
    return "warp" in lanes or ("vm" in lanes and "netns" not in lanes)
