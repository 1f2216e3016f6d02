"""Check written manifests: they are read back equal, and programs' output stays comments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.implementations.manifest import CAPABILITIES, load_manifest
from harness.implementations.manifest_writer import manifest_values, write_manifest
from harness.implementations.registry import Registry
from harness.install.installer import MANIFESTS

if TYPE_CHECKING:
    from pathlib import Path

# All keys that a manifest of a program may have, but `preload`, which needs another command: that of refwg has it.
FULL = """\
name = "mine"
kind = "uapi"
title = 'my "own" \\ one'
capabilities = ["roaming", "fwmark"]

[program]
path = "program"
command = ["{program}", "--on", "{interface}", "a b", "\\u00e9\\u007f"]
version = ["{program}", "-V"]
env = { "A.B" = "1", LOG_LEVEL = "x y" }
key_log = ["--keylog", "{file}"]
control_socket = "/run/mine/{interface}.sock"
mtu = 1400

[watch]
complaints = ['^bad: \\d+', "quote\\""]
descriptors = 3
threads = 4
stop_after = 2.5

[variant]
args = ["--mutant", "{variant}"]
env = { X = "1" }

[install]
kind = "debian"
package = "mine"
binary = "/usr/bin/mine"
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def facts(path: Path) -> dict[str, object]:
    """Return all fields that were read, without the path of the file."""
    manifest = load_manifest(path)
    return {name: getattr(manifest, name) for name in manifest.__slots__ if name != "source"}


def test_written_manifest_is_read_back_whole(tmp_path: Path, program: Path) -> None:
    given, written = tmp_path / "given.toml", tmp_path / "deeper" / "written.toml"
    given.write_text(FULL)
    written.parent.mkdir()
    lacking = dict.fromkeys(CAPABILITIES.keys() - {"roaming", "fwmark"}, "nothing")
    written.write_text(write_manifest(manifest_values(load_manifest(given)), lacking, ["hello"]))
    assert facts(written) == facts(given)
    assert facts(written)["program"] == program


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("[!k]*.toml")), ids=lambda path: path.stem)
def test_shipped_manifest_is_read_back_whole(tmp_path: Path, path: Path) -> None:
    lacking = dict.fromkeys(CAPABILITIES.keys() - load_manifest(path).capabilities, "nothing")
    written = tmp_path / "written.toml"
    written.write_text(write_manifest(manifest_values(load_manifest(path)), lacking, []))
    assert facts(written) == facts(path)


@pytest.mark.parametrize("like", [(), ("boringtun",)])
def test_program_given_by_path_is_read_back_as_started(tmp_path: Path, program: Path, like: tuple[str, ...]) -> None:
    mine = Registry.of_options([f"mine={program}"], [], like).get("mine")
    written = tmp_path / "written.toml"
    lacking = dict.fromkeys(CAPABILITIES.keys() - mine.capabilities, "nothing")
    written.write_text(write_manifest(manifest_values(mine), lacking, []))
    found = load_manifest(written)
    assert (found.argv("wg0"), found.env, found.mtu) == (mine.argv("wg0"), mine.env, mine.mtu)
    assert (found.capabilities, found.descriptors) == (mine.capabilities, mine.descriptors)


@pytest.mark.parametrize("seen", ["no\n[program]\npath = 1", "bell \x07 and \x1b[31m red", "x" * 10_000, "\u2028line"])
def test_lacking_capability_has_one_comment_line(tmp_path: Path, program: Path, seen: str) -> None:
    mine = Registry().choose(f"mine={program}")
    text = write_manifest(manifest_values(mine), {"roaming": seen}, [seen])
    (tmp_path / "written.toml").write_text(text)
    assert load_manifest(tmp_path / "written.toml").capabilities == CAPABILITIES.keys() - {"roaming"}
    (after,) = [
        text.splitlines()[n + 1]
        for n, line in enumerate(text.splitlines())
        if line == f"# roaming ({CAPABILITIES['roaming']})"
    ]
    assert after.startswith("#     ")
    assert len(after) < 450
    assert all(c.isprintable() for c in text.replace("\n", ""))
