"""Nothing that a peer, a client of the control socket or the kernel sends makes refwg or the lab fail.

Each example is structure-aware: a real handshake leads to a state, and messages of it are then changed
(`harness.fuzz.generator`). The budget is fixed, and each run tries the same examples; `wg-interop fuzz` tries others.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.control.genl import decode_dump, encode_set
from harness.control.records import AllowedIP, DeviceConfig, Endpoint, Key, PeerConfig
from harness.errors import ControlError, UsageError
from harness.fuzz import inputs
from harness.fuzz.findings import Finding
from harness.fuzz.generator import CONFIGURATION, STATES, Generator
from harness.fuzz.in_process import ENGINES, INNER, RefwgInProcess
from harness.fuzz.inputs import Case
from harness.net.netlink import NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NLMSG_DONE, Message, parse_messages
from harness.wire import frames
from harness.wire.fragments import MOST_BYTES, MOST_DATAGRAMS, Fragments, Piece
from harness.wire.frames import Fragment
from selftests.support.strategies import flip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.fuzz.inputs import Step

MESSAGES = (inputs.INITIATION, inputs.RESPONSE, inputs.COOKIE, inputs.DATA)
ATTRIBUTE = struct.Struct("=HH")


class Drawn:
    """Choices of hypothesis, so that it can simplify them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def below(self, limit: int) -> int:
        return self._draw(st.integers(0, limit - 1))

    def content(self, length: int) -> bytes:
        content = self._draw(st.binary(min_size=1, max_size=4))
        return (content * (length // len(content) + 1))[:length]


@st.composite
def cases(draw: st.DrawFn, surface: str) -> Case:
    return Generator(INNER, (surface,)).case(Drawn(draw))


@st.composite
def changed_messages(draw: st.DrawFn, kind: str) -> list[Step]:
    generator = Generator(INNER, ("packets",))
    return [generator.message(Drawn(draw), kind) for _ in range(draw(st.integers(1, 4)))]


def survives(engine: Literal["simple", "batch"], case: Case) -> None:
    """Play a case against a fresh device, which must then still serve a legitimate peer."""
    target = RefwgInProcess(engine)
    try:
        target.run(case)
        target.check_legitimate()
    except Finding as finding:
        pytest.fail(f"refwg {finding}\n{case.to_json()}\n{finding.detail}")


@pytest.mark.requirement("ROB-01", "ROB-02")
@pytest.mark.parametrize("engine", ENGINES)
@settings(derandomize=True, max_examples=250, deadline=None)
@given(case=cases("packets"))
def test_device_survives_hostile_peer(engine: Literal["simple", "batch"], case: Case) -> None:
    survives(engine, case)


@pytest.mark.requirement("ROB-01", "ROB-02")
@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("state", STATES)
@settings(derandomize=True, max_examples=12, deadline=None)
@given(data=st.data())
def test_device_survives_each_message_in_each_state(state: str, kind: str, data: st.DataObject) -> None:
    steps = data.draw(changed_messages(kind))
    for engine in ENGINES:
        survives(engine, Case(state, (*STATES[state], *steps)))


@pytest.mark.requirement("CFG-45")
@settings(derandomize=True, max_examples=150, deadline=None)
@given(case=cases("uapi"))
def test_device_answers_hostile_requests(case: Case) -> None:
    assert case.state == CONFIGURATION
    survives("simple", case)


CONFIG = DeviceConfig(
    listen_port=1,
    fwmark=2,
    private_key=Key(b"\1" * 32),
    peers=(
        PeerConfig(
            public_key=Key(b"\2" * 32),
            preshared_key=Key(b"\3" * 32),
            endpoint=Endpoint("192.0.2.1", 51820),
            persistent_keepalive=25,
            allowed_ips=(AllowedIP(bytes(4), 0), AllowedIP(bytes(16), 0)),
        ),
        PeerConfig(public_key=Key(b"\4" * 32), endpoint=Endpoint("2001:db8::1", 1, 3)),
    ),
)
# A request has the attributes of an answer, so what we encode stands for what the kernel sends.
DUMP = parse_messages(encode_set("wg0", CONFIG, 30)[0])[0].payload
LENGTHS = (0, 1, 3, 4, 5, 8, 0xFFFF)


@st.composite
def dumps(draw: st.DrawFn) -> bytes:
    """Change bits, attribute lengths and the length of a dump."""
    payload = DUMP
    for how, at, value in draw(
        st.lists(
            st.tuples(st.sampled_from(["bit", "length", "cut", "insert"]), st.integers(0, 2000), st.integers(0, 255)),
            max_size=6,
        )
    ):
        at %= len(payload) or 1  # noqa: PLW2901 - the offset that applies
        if how == "bit" and payload:
            payload = flip(payload, at * 8 + value % 8)
        elif how == "length":
            start = at // 4 * 4
            payload = payload[:start] + struct.pack("=H", LENGTHS[value % len(LENGTHS)]) + payload[start + 2 :]
        elif how == "cut":
            payload = payload[:at]
        else:
            payload = payload[:at] + ATTRIBUTE.pack(4 + value, value % 12) + payload[at:]
    return payload


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    payloads=st.lists(dumps(), max_size=3),
    flags=st.sampled_from([0, NLM_F_DUMP_INTR, NLM_F_CAPPED, NLM_F_ACK_TLVS, NLM_F_CAPPED | NLM_F_ACK_TLVS]),
    end=st.binary(max_size=60),
    has_end=st.booleans(),
)
def test_hostile_dump_is_refused_by_control_error(
    payloads: Sequence[bytes], flags: int, end: bytes, *, has_end: bool
) -> None:
    messages = [Message(30, flags, 1, bytes(4) + payload) for payload in payloads]
    last = [Message(NLMSG_DONE, flags, 1, end)] if has_end else []
    try:
        state = decode_dump([*messages, *last])
    except ControlError as error:
        assert str(error).startswith("genl: ")  # noqa: PT017 - a dump may be valid, too
    else:
        assert len(state.peers) <= sum(map(len, payloads))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(payload=dumps(), at=st.integers(0, 15), value=st.integers(0, 255), rest=st.binary(max_size=20))
def test_hostile_datagram_of_netlink_is_split_or_refused(payload: bytes, at: int, value: int, rest: bytes) -> None:
    datagram = bytearray(Message(30, 0, 1, payload).to_bytes() + rest)
    datagram[at] = value
    try:
        messages = parse_messages(bytes(datagram))
    except ValueError:
        return
    assert sum(len(message.body) for message in messages) <= len(datagram)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(case=cases("packets"), prefix=st.sampled_from([b"", b"\x81\0\0\1", b"\x88\xa8\0\1\x81\0\0\1"]), data=st.data())
def test_hostile_frames_are_read_and_split(case: Case, prefix: bytes, data: st.DataObject) -> None:
    fragments = Fragments()
    for step in case.steps:
        ethertype = b"\x86\xdd" if step.argument[:1] and step.argument[0] >> 4 == 6 else b"\x08\0"
        frame = bytes(12) + prefix + ethertype + inputs.apply(step.changes, step.argument)
        contents = frames.read(frame)
        if isinstance(contents, Fragment):
            fragments.arrive(Piece(frame, contents), 0, 0)
        header = data.draw(st.binary(min_size=frames.VNET_HEADER.size, max_size=frames.VNET_HEADER.size))
        assert len(frames.inner_segments(header, frame[14 + len(prefix) :])) <= max(1, len(frame))
    assert len(fragments._partials) <= MOST_DATAGRAMS  # noqa: SLF001 - nothing else shows it
    assert fragments._bytes <= MOST_BYTES  # noqa: SLF001 - nothing else shows it


@settings(derandomize=True, max_examples=100, deadline=None)
@given(case=cases("packets"), at=st.integers(0, 2000), length=st.integers(0, 9), text=st.text(max_size=9))
def test_damaged_file_of_corpus_is_read_or_refused(case: Case, at: int, length: int, text: str) -> None:
    written = case.to_json()
    at %= len(written)
    try:
        read = Case.from_json(written[:at] + text + written[at + length :], "damaged.json")
    except UsageError as error:
        assert "damaged.json" in str(error)  # noqa: PT017 - it may be read, too
    else:
        assert Case.from_json(read.to_json()) == read
