"""Check the recording of steps: fast, without side effects, bounded, and without keys."""

from __future__ import annotations

import base64
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from harness import steps
from harness.control.base import wg_set
from harness.control.records import DeviceConfig, Endpoint, Key, PeerConfig, PeerState, allowed_ips
from harness.steps import FIRST, LAST, LONGEST, Recorder, few, in_short, record, shortened, step, unfinished

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = Key(bytes(range(100, 132)))
PUBLIC = KEY.public()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder("here")
    made.start()
    yield made
    made.stop()


def texts(recorder: Recorder) -> list[str]:
    return [str(made) for made in recorder.steps]


def test_step_line_has_both_clocks_node_text_and_outcome(recorder: Recorder) -> None:
    record("ns1", "ip link add d0 type dummy")
    record("n", "ping 10.0.0.1", "1 of 1 answered")
    heading, day, first, second = str(recorder).splitlines()[-4:]
    assert heading == "# here"
    assert re.fullmatch(r"# \d{4}-\d\d-\d\d", day)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6}  \+0\.\d{3}  ns1  ip link add d0 type dummy", first)
    assert re.fullmatch(r"\S+  \S+  n    ping 10\.0\.0\.1   # 1 of 1 answered", second)


def test_wall_clock_that_is_set_does_not_move_seconds(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_123_456_789)
    record("", "before")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_123_456_789 + 86_400 * 10**9)
    record("", "after")
    lines = str(recorder).splitlines()[-4:]
    assert lines[0::2] == ["# 2001-09-09", "# 2001-09-10"]
    assert all(re.match(r"01:46:40\.123456  \+0\.", line) for line in lines[1::2])


def test_steps_of_other_threads_are_recorded(recorder: Recorder) -> None:
    thread = threading.Thread(target=record, args=("ns1", "from a thread"))
    thread.start()
    thread.join()
    assert texts(recorder) == ["from a thread"]


def test_last_recorder_started_takes_steps(recorder: Recorder) -> None:
    inner = Recorder()
    inner.start()
    record("", "inner")
    inner.stop()
    inner.stop()
    record("", "outer")
    assert (texts(inner), texts(recorder)) == (["inner"], ["outer"])


def test_step_without_recorder_is_only_known_while_it_lasts() -> None:
    with step("ns1", "ping 10.0.0.1"):
        assert re.fullmatch(r"ns1: ping 10\.0\.0\.1   # not finished after 0\.\d{3} s", unfinished()[0])
    assert not any("ping" in text for text in unfinished())


def test_unfinished_steps_are_innermost_first_with_what_was_seen() -> None:
    with step("ns1", "outer"), step("", "inner", seen=lambda: "nothing yet"):
        release = threading.Event()
        started = threading.Event()

        def run() -> None:
            with step("ns2", "elsewhere"):
                started.set()
                release.wait(30)

        thread = threading.Thread(target=run, name="other")
        thread.start()
        assert started.wait(30)
        found = [re.sub(r"\d+\.\d+ s", "N s", text) for text in unfinished()]
        release.set()
        thread.join()
    assert found == [
        "inner   # not finished after N s; seen: nothing yet",
        "ns1: outer   # not finished after N s",
        "ns2: elsewhere   # not finished after N s (thread other)",
    ]


def test_interrupted_steps_are_forgotten_on_request() -> None:
    step("", "never ended").__enter__()
    assert any("never ended" in text for text in unfinished())
    steps.forget_unfinished()
    assert unfinished() == []


def test_error_is_recorded_as_outcome_and_raised(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="no"), step("ns1", "try"):
        raise ValueError("no")
    assert re.fullmatch(r"try   # failed after 0\.\d{3} s: no", texts(recorder)[0])


@pytest.mark.parametrize(("is_listed", "is_wait"), [(False, False), (True, True)])
def test_read_or_inner_wait_is_listed_only_if_it_fails(recorder: Recorder, is_listed: bool, is_wait: bool) -> None:
    with step("ns1", "outer"):
        with step("ns1", "inner", is_listed=is_listed, is_wait=is_wait):
            pass
        with pytest.raises(ValueError, match="no"), step("ns1", "failing", is_listed=is_listed, is_wait=is_wait):
            raise ValueError("no")
    assert [text.partition(" ")[0] for text in texts(recorder)] == ["outer", "failing"]


def test_repeated_steps_become_one_with_their_number(recorder: Recorder) -> None:
    for text in ("a", "b", "b", "b", "a"):
        record("ns1", text)
    assert texts(recorder) == ["a", "b   # 3 times", "a"]


def test_first_and_last_steps_are_kept_and_others_counted(recorder: Recorder) -> None:
    for number in range(FIRST + LAST + 7):
        record("ns1", f"step {number}")
    assert [text.split()[1] for text in texts(recorder)][FIRST - 1 : FIRST + 1] == ["499", "507"]
    text = str(recorder)
    assert text.count("\n") == FIRST + LAST + 7
    assert "  step 499\n# 7 steps left out: 500 are kept of the beginning, 500 of the end\n" in text


def test_key_in_long_text_is_shortened_before_text_is_cut(recorder: Recorder) -> None:
    for before in range(LONGEST - 50, LONGEST + 1):
        record("", f"{'x ' * (before // 2)}{KEY}{' ' * 100}{before}")
    for text in texts(recorder):
        assert str(KEY)[:7] not in text
        assert len(text) < LONGEST + 40


def test_words_that_cannot_be_made_do_not_fail_test(recorder: Recorder) -> None:
    record("", lambda: str(1 // 0))
    with step("", "wait", seen=lambda: str(1 // 0)):
        assert "seen: (ZeroDivisionError: integer division" in unfinished()[0]
    assert texts(recorder)[0].startswith("(ZeroDivisionError: integer division")


@pytest.mark.parametrize("text", [str(KEY), KEY.raw.hex(), KEY.raw.hex().upper(), f"a/{KEY}", f"={KEY.raw.hex()}="])
def test_key_is_shortened_in_either_notation(text: str) -> None:
    for whole in (str(KEY), KEY.raw.hex(), KEY.raw.hex().upper(), repr(KEY.raw)):
        assert whole[:7] not in shortened(text) + shortened(in_short(KEY))
    assert "…" in shortened(text)


def test_text_that_is_not_key_stays() -> None:
    text = f"sha {'ab' * 20} base64 {base64.b64encode(b'x' * 30).decode()} path /usr/lib/python3/dist-packages"
    assert shortened(text) == text


@dataclass
class Seen:
    """Values that a wait may have seen: most of them empty."""

    name: str = "x"
    none: None = None
    numbers: tuple[int, ...] = field(default_factory=lambda: tuple(range(9)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, ""),
        (False, "False"),
        (0, "0"),
        (b"abc", "3 bytes"),
        ((b"abc", ("10.0.0.1", 7)), "(3 bytes, (10.0.0.1, 7))"),
        (list(range(5)), "5 items"),
        (Seen(), "Seen(name=x, numbers=9 items)"),
        (Endpoint("1.2.3.4", 5), "1.2.3.4:5"),
        (object(), "object"),
    ],
)
def test_value_is_described_in_few_words(value: object, text: str) -> None:
    assert in_short(value) == text


def test_large_state_is_described_without_its_allowed_ips() -> None:
    state = PeerState(public_key=PUBLIC, allowed_ips=allowed_ips("10.0.0.0/8") * 100_000, rx_bytes=5)
    assert (
        shortened(in_short(state))
        == f"PeerState(public_key={str(PUBLIC)[:6]}…, rx_bytes=5, allowed_ips=100000 items, protocol_version=1)"
    )


def test_few_items_are_named_and_others_counted() -> None:
    assert few(range(3)) == "0, 1, 2"
    assert few(range(9), limit=2, separator="; ") == "0; 1; and 7 more"


PEER = PeerConfig(public_key=PUBLIC, allowed_ips=allowed_ips("10.0.0.0/8", "-10.1.0.0/16"))


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (DeviceConfig(), "wg set wg0"),
        (DeviceConfig(listen_port=0, fwmark=5), "wg set wg0 fwmark 5 listen-port 0"),
        (DeviceConfig(private_key=KEY), f"wg set wg0 private-key <(echo {str(KEY)[:6]}…)"),
        (DeviceConfig(replace_peers=True), "wg set wg0 (in place of all peers)"),
        (DeviceConfig(peers=(PEER,)), f"wg set wg0 peer {str(PUBLIC)[:6]}… allowed-ips +10.0.0.0/8,-10.1.0.0/16"),
        (
            DeviceConfig(peers=(PeerConfig(public_key=PUBLIC, replace_allowed_ips=True, persistent_keepalive=0),)),
            f"wg set wg0 peer {str(PUBLIC)[:6]}… persistent-keepalive 0 allowed-ips ''",
        ),
        (
            DeviceConfig(peers=(PeerConfig(public_key=PUBLIC, remove=True, preshared_key=KEY),)),
            f"wg set wg0 peer {str(PUBLIC)[:6]}… remove preshared-key <(echo {str(KEY)[:6]}…)",
        ),
    ],
)
def test_configuration_is_printed_as_wg_set(config: DeviceConfig, command: str) -> None:
    assert wg_set("wg0", config) == command
