"""Check how machines share tests: the values of --on, the parts that they get, what comes back, what is copied."""

from __future__ import annotations

import base64
import io
import tarfile
import threading
from typing import TYPE_CHECKING

import pytest

from harness.errors import HarnessError, UsageError
from harness.lanes import HOSTS, read_places
from harness.plugin.hosts import Deck
from harness.plugin.options import read_plan
from harness.plugin.remote import pack, unpack
from harness.plugin.session import state_of_run

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

IDS = [f"test_it.py::test_{number}" for number in range(100)]


@pytest.mark.parametrize(
    ("words", "lanes", "expected"),
    [
        (["vm:3"], (), ("vm",)),
        (["vm:3"], ("netns",), ("netns", "vm")),
        (["ssh:a", "vm:3"], (), ("core", "netns", "vm")),
        (["ssh:a"], (), ()),
        (["ssh:a"], ("netns",), ("netns",)),
    ],
)
def test_places_add_lanes_that_they_need(words: list[str], lanes: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert read_places(words).lanes(lanes) == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["build1"], "--on build1: want ssh:HOST, vm:N or warp:N"),
        (["ssh:"], "--on ssh:: want ssh:HOST"),
        (["ssh:-oProxyCommand=x"], "--on ssh:-oProxyCommand=x: want ssh:HOST"),
        (["vm:0"], "--on vm:0: want ssh:HOST"),
        (["netns:2"], "--on netns:2: want"),
        (["ssh:a", "ssh:a"], "--on ssh:a: given twice"),
    ],
)
def test_wrong_place_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_places(words)


def test_number_of_guests_is_that_of_their_lane(pytester: pytest.Pytester) -> None:
    plan = read_plan(pytester.parseconfig("--on=vm:3", "--lane=warp", "-n", "2"))
    assert (plan.guests_at_once("vm"), plan.guests_at_once("warp")) == (3, 2)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--on=ssh:a"], "`wg-interop run` connects to hosts"),
        (["--on=ssh:a", "--shell=A"], "a lab on another machine cannot be entered"),
        (["--on=ssh:a", "--lane=vm"], "hosts run lanes core and netns: add --lane netns"),
    ],
)
def test_run_that_cannot_use_hosts_is_refused(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, words: list[str], reason: str
) -> None:
    from harness.plugin.hosts import Hosts  # noqa: PLC0415 - as the hook does

    monkeypatch.delenv(HOSTS, raising=False)
    config = pytester.parseconfig(*words)
    monkeypatch.setattr(type(state_of_run(config)), "runs_suite", True)
    with pytest.raises(pytest.UsageError, match=reason):
        Hosts(config, state_of_run(config)).check()


def test_parts_become_smaller_until_each_test_is_dealt_once() -> None:
    deck = Deck(IDS, ["a", "b"])
    parts = []
    for host in ["a", "b"] * 4:
        parts.append(deck.draw(host))
        for name in parts[-1]:
            assert deck.reported(host, name)
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 25
    assert [name for part in parts for name in part] == IDS


def test_few_tests_are_dealt_to_all_hosts() -> None:
    deck = Deck(IDS[:5], ["a", "b"])
    assert [len(deck.draw(host)) for host in ("a", "b")] == [3, 2]


def test_idle_host_waits_for_tests_that_lost_host_gives_back() -> None:
    deck = Deck(IDS[:4], ["a", "b"])
    held = deck.draw("b")
    for name in deck.draw("a"):
        deck.reported("a", name)
    assert deck.reported("b", held[0])
    drawn: list[str] = []
    thread = threading.Thread(target=lambda: drawn.extend(deck.draw("a")))
    thread.start()
    assert deck.lose("b") == 1
    thread.join(10.0)
    assert drawn == held[1:]
    # What a lost host reports late is not taken.
    assert not deck.reported("b", held[1])


def test_tests_stay_here_when_no_host_has_run_them() -> None:
    deck = Deck(IDS[:4], ["a"])
    part = deck.draw("a")
    deck.leave("a", part[:1])
    deck.reported("a", part[1])
    deck.lose("a")
    assert sorted(deck.rest()) == [IDS[0], *IDS[2:4]]


def test_packed_folder_is_unpacked_with_modes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "wg").write_bytes(b"\x7fELF")
    (source / "wg").chmod(0o755)
    unpack(pack([(source, "peers/mine")]), tmp_path / "there")
    copied = tmp_path / "there/peers/mine/wg"
    assert (copied.read_bytes(), copied.stat().st_mode & 0o777) == (b"\x7fELF", 0o755)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside"])
def test_archive_cannot_write_outside_its_folder(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(HarnessError, match="an archive has the path"):
        unpack(base64.b64encode(buffer.getvalue()).decode(), tmp_path / "there")
    assert not list(tmp_path.rglob("outside"))
