from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from refwg.boundary import Endpoint, LocalAddress
from refwg.ip import IcmpError
from refwg.messages import SECOND
from refwg.trace import FileWatcher, LineFile

if TYPE_CHECKING:
    from pathlib import Path


class Written:
    """Lines in memory instead of a file."""

    def __init__(self) -> None:
        self.text = ""

    def append(self, lines: str) -> None:
        self.text += lines


def test_event_is_written_as_one_line_of_json() -> None:
    file = Written()
    endpoint = Endpoint(b"\x0a\0\0\1", 7, 0, LocalAddress(b"\x0a\0\0\2"))
    watcher = FileWatcher(file, None, None, wall_clock=lambda: 7)
    watcher.note(5, "endpoint", b"key", endpoint=endpoint, count=3)
    assert json.loads(file.text) == {
        "time": 5,
        "wall": 7,
        "event": "endpoint",
        "peer": "a2V5",
        "endpoint": "10.0.0.1:7 from 10.0.0.2",
        "count": 3,
    }


def test_event_without_peer_has_null_peer() -> None:
    file = Written()
    before = time.time_ns()
    FileWatcher(file, None, None).note(5, "up", b"", endpoint=Endpoint(bytes(4), 7))
    record = json.loads(file.text)
    assert before <= record.pop("wall") <= time.time_ns()
    assert record == {"time": 5, "event": "up", "peer": None, "endpoint": "0.0.0.0:7"}


def test_dataclass_detail_is_logged_with_its_fields() -> None:
    error = IcmpError(destination=bytes(4), message=b"error")
    lines: list[str] = []
    FileWatcher(None, None, lines.append).note(5, "up", b"", error=error)
    assert lines == [f"up error={{'destination': {bytes(4)!r}, 'message': b'error'}}"]


def test_debug_log_receives_events_in_short_form() -> None:
    lines: list[str] = []
    watcher = FileWatcher(None, None, lines.append)
    watcher.note(5, "drop", b"key", reason="REPLAY")
    watcher.note(5, "up", b"")
    assert lines == ["drop peer=a2V5 reason=REPLAY", "up"]


def test_keys_are_written_in_wireshark_format() -> None:
    file = Written()
    FileWatcher(None, file, None).keys(b"a", b"b", b"c", b"d")
    FileWatcher(None, None, None).keys(b"a", b"b", b"c", b"d")
    assert file.text.splitlines() == [
        "LOCAL_STATIC_PRIVATE_KEY = YQ==",
        "REMOTE_STATIC_PUBLIC_KEY = Yg==",
        "LOCAL_EPHEMERAL_PRIVATE_KEY = Yw==",
        "PRESHARED_KEY = ZA==",
    ]


def test_log_lists_1000_drops_per_second_and_trace_all() -> None:
    lines: list[str] = []
    file = Written()
    for trace in (None, file):
        watcher = FileWatcher(trace, None, lines.append)
        for number in range(1500):
            watcher.note(5 * SECOND + number, "drop", b"", reason="MALFORMED")
        watcher.note(5 * SECOND, "up", b"")
        watcher.note(6 * SECOND, "drop", b"", reason="REPLAY")
        more = "drop: more packets are dropped in this second, and not listed here"
        assert lines == ["drop reason=MALFORMED"] * 1000 + [more, "up", "drop reason=REPLAY"]
        lines.clear()
    assert file.text.count("MALFORMED") == 1500


@pytest.mark.bug("IB-77")
def test_file_is_given_up_once_after_error_that_stays() -> None:
    reader, writer = os.pipe()
    complaints: list[str] = []
    file = LineFile(f"/dev/fd/{writer}", complaints.append)
    os.close(writer)
    file.append("one\n")
    assert os.read(reader, 100) == b"one\n"
    os.close(reader)
    file.append("two\n")
    file.append("three\n")
    assert complaints == [f"/dev/fd/{writer}: Broken pipe; no more is written to this file"]


def test_file_is_appended_to_and_has_mode_0600(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for word in ("one\n", "two\n"):
        LineFile(str(path), print).append(word)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("one\ntwo\n", 0o600)
