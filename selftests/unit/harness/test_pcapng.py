"""Check pcapng files by Wireshark's programs, and key logs."""

from __future__ import annotations

import shutil
import subprocess
from base64 import b64encode
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from harness.control.base import EVIDENCE_TIMEOUT
from harness.control.records import DeviceState, Key
from harness.errors import HarnessError
from harness.implementations import keylog
from harness.wire import pcapng

if TYPE_CHECKING:
    from pathlib import Path

    from harness.implementations.interface import Interface

TIME = 1_700_000_000_123_456_789
FRAME = bytes(12) + b"\x88\xb5" + b"content"
PACKETS = [
    pcapng.Packet(0, TIME, FRAME, is_outbound=True, comment="dropped: response 2 (rule 1: drop)"),
    pcapng.Packet(1, TIME + 1, FRAME + b"!", is_outbound=False),
]
KEY = b64encode(bytes(32)).decode()


def wireshark(program: str, *arguments: str) -> str:
    """The output of one of Wireshark's programs."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt-get install --no-install-recommends tshark")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    capture = tmp_path / "a.pcapng"
    ends = [pcapng.End("ns1-veth1"), pcapng.End("ns2-veth2", missed=3)]
    pcapng.save(capture, ends, PACKETS, keys=f"PRESHARED_KEY = {KEY}\n", comment="seed 7")
    return capture


def test_packets_keep_time_interface_direction_and_comment(path: Path) -> None:
    fields = ("frame.time_epoch", "frame.interface_name", "frame.packet_flags_direction", "frame.len", "frame.comment")
    printed = wireshark(
        "tshark", "-r", str(path), "-T", "fields", *(word for field in fields for word in ("-e", field))
    )
    assert [line.split("\t") for line in printed.splitlines()] == [
        ["1700000000.123456789", "ns1-veth1", "0x00000002", "21", "dropped: response 2 (rule 1: drop)"],
        ["1700000000.123456790", "ns2-veth2", "0x00000001", "22", ""],
    ]


def test_file_holds_interfaces_missed_count_secrets_and_comment(path: Path) -> None:
    printed = wireshark("capinfos", str(path))
    for line in ("Number of interfaces in file: 2", "Number of decryption secrets in file: 1", "seed 7", "wg-interop"):
        assert line in printed
    # No program prints the number of missed frames: option 5 of the last block.
    assert path.read_bytes()[-16:-8] == (3).to_bytes(8, "little")


def test_file_without_keys_has_no_secrets_block(tmp_path: Path) -> None:
    pcapng.save(tmp_path / "b.pcapng", [pcapng.End("lo")], [])
    assert "secrets" not in wireshark("capinfos", str(tmp_path / "b.pcapng"))


class Dead:
    """An interface whose process has ended."""

    def __init__(self, key_log: Path | None) -> None:
        self.key_log = key_log

    def get(self, _timeout: float) -> Any:
        raise HarnessError("no answer")


def test_key_log_of_dead_program_keeps_only_valid_keys(tmp_path: Path) -> None:
    log = tmp_path / "keys"
    log.write_text(f"LOCAL_EPHEMERAL_PRIVATE_KEY = {KEY}\nPRESHARED_KEY = short\nnonsense\nPRESHARED_KEY = {KEY}\nPRE")
    interfaces = [cast("Interface", Dead(log)), cast("Interface", Dead(None)), cast("Interface", Dead(tmp_path / "no"))]
    assert keylog.key_log(interfaces) == f"LOCAL_EPHEMERAL_PRIVATE_KEY = {KEY}\nPRESHARED_KEY = {KEY}\n"


@dataclass
class Alive:
    """An interface that answers, without a key log. told: the key that was configured last."""

    reported: Key | None
    told: Key | None
    key_log: None = None

    def get(self, timeout: float) -> DeviceState:
        assert timeout == EVIDENCE_TIMEOUT
        return DeviceState(private_key=self.reported)


KEY_1, KEY_2 = (Key(bytes([number]) * 32) for number in (1, 2))


@pytest.mark.parametrize(
    ("reported", "told", "known"),
    [(KEY_1, None, KEY_1), (KEY_1, KEY_2, KEY_1), (None, KEY_2, KEY_2), (None, None, None)],
)
def test_private_key_is_reported_key_or_else_configured_key(
    reported: Key | None, told: Key | None, known: Key | None
) -> None:
    lines = keylog.key_log([cast("Interface", Alive(reported, told))])
    assert lines == (f"LOCAL_STATIC_PRIVATE_KEY = {known}\n" if known else "")


def test_packets_are_read_as_they_were_written(path: Path) -> None:
    ends, packets = pcapng.load(path)
    assert (ends, [replace(packet, comment="") for packet in PACKETS]) == (2, packets)


@pytest.mark.parametrize("kept", [5, -3, -60])
def test_file_that_is_cut_off_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="block at byte"):
        pcapng.load(path)
