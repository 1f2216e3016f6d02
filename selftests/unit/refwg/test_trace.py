from __future__ import annotations

import json
import time
from io import StringIO

from refwg.boundary import Endpoint, LocalAddress
from refwg.ip import UdpAddresses
from refwg.trace import FileWatcher


def test_event_is_written_as_one_line_of_json() -> None:
    file = StringIO()
    endpoint = Endpoint(b"\x0a\0\0\1", 7, 0, LocalAddress(b"\x0a\0\0\2"))
    watcher = FileWatcher(file, None, None, wall_clock=lambda: 7)
    watcher.note(5, "endpoint", b"key", endpoint=endpoint, count=3)
    assert json.loads(file.getvalue()) == {
        "time": 5,
        "wall": 7,
        "event": "endpoint",
        "peer": "a2V5",
        "endpoint": "10.0.0.1:7 from 10.0.0.2",
        "count": 3,
    }


def test_event_without_peer_has_null_peer() -> None:
    file = StringIO()
    before = time.time_ns()
    FileWatcher(file, None, None).note(5, "up", b"", endpoint=Endpoint(bytes(4), 7))
    record = json.loads(file.getvalue())
    assert before <= record.pop("wall") <= time.time_ns()
    assert record == {"time": 5, "event": "up", "peer": None, "endpoint": "0.0.0.0:7"}


def test_dataclass_detail_is_logged_with_its_fields() -> None:
    addresses = UdpAddresses(source_port=1, destination=b"", destination_port=2)
    lines: list[str] = []
    FileWatcher(None, None, lines.append).note(5, "up", b"", addresses=addresses)
    assert lines == ["up addresses={'source_port': 1, 'destination': b'', 'destination_port': 2}"]


def test_debug_log_receives_events_in_short_form() -> None:
    lines: list[str] = []
    watcher = FileWatcher(None, None, lines.append)
    watcher.note(5, "drop", b"key", reason="REPLAY")
    watcher.note(5, "up", b"")
    assert lines == ["drop peer=a2V5 reason=REPLAY", "up"]


def test_keys_are_written_in_wireshark_format() -> None:
    file = StringIO()
    FileWatcher(None, file, None).keys(b"a", b"b", b"c", b"d")
    FileWatcher(None, None, None).keys(b"a", b"b", b"c", b"d")
    assert file.getvalue().splitlines() == [
        "LOCAL_STATIC_PRIVATE_KEY = YQ==",
        "REMOTE_STATIC_PUBLIC_KEY = Yg==",
        "LOCAL_EPHEMERAL_PRIVATE_KEY = Yw==",
        "PRESHARED_KEY = ZA==",
    ]
