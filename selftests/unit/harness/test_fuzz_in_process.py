from __future__ import annotations

from typing import Literal

import pytest

from harness.fuzz import inputs
from harness.fuzz.findings import ANSWERED, RAISED, SILENT, UNCOUNTED, Finding
from harness.fuzz.generator import CONFIGURATION, STATES, is_reached
from harness.fuzz.in_process import ENGINES, INNER, RefwgInProcess
from harness.fuzz.inputs import XOR, Case, Change, Step
from harness.scripted.packets import udp_packet
from refwg import receive
from refwg.errors import DropReason
from refwg.peer import Shared

PACKET = udp_packet((INNER.source4, 1), (INNER.device4, 9), b"x")
# The sessions of the hostile peer in each state: previous, current, next.
SLOTS = {
    "no session": (False, False, False),
    "initiation sent": (False, False, False),
    "response sent": (False, False, True),
    "session as responder": (False, True, False),
    "session as initiator": (False, True, False),
    "session and next session": (False, True, True),
    "two sessions": (True, True, False),
    "under load": (False, False, False),
    "session under load": (False, True, False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("state", STATES)
def test_steps_of_state_lead_to_it(state: str, engine: Literal["simple", "batch"]) -> None:
    device = RefwgInProcess(engine)
    device.run(Case(state, STATES[state]))
    assert device.reached == {state}
    peer = device.device.peer(device.hostile.identity.public)
    assert peer is not None
    keypairs = peer.keypairs
    assert tuple(one is not None for one in (keypairs.previous, keypairs.current, keypairs.next)) == SLOTS[state]
    assert (peer.handshake.local_index is not None) == (state == "initiation sent")


def test_state_counts_as_reached_only_by_its_answers() -> None:
    assert is_reached("two sessions", ["response", "response", "data"])
    assert not is_reached("two sessions", ["response", "initiation"])
    assert is_reached(CONFIGURATION, [])


def test_reasons_and_answers_are_features() -> None:
    device = RefwgInProcess()
    wrong = Step(inputs.DATA, PACKET, changes=(Change(XOR, 20, b"\1"),))
    device.run(Case("session as responder", (*STATES["session as responder"], wrong, Step(inputs.REPLAY, counter=1))))
    expected = {"data: INVALID_TAG", "replay: REPLAY", "initiation: response"}
    assert {f"session as responder: {word}" for word in expected} <= device.features


def test_requests_are_answered_and_counted() -> None:
    device = RefwgInProcess()
    device.run(
        Case(CONFIGURATION, (Step(inputs.UAPI, b"set=1\nlisten_port=70000\n\n"), Step(inputs.UAPI, b"get=1\n\n")))
    )
    assert device.requests == 2
    assert any(feature.startswith("uapi: -22 ") for feature in device.features)


def fails(*_: object) -> None:
    raise KeyError("planted")


def found(case: Case) -> Finding:
    def play() -> None:
        device = RefwgInProcess()
        device.run(case)
        device.check()

    with pytest.raises(Finding) as caught:
        play()
    return caught.value


SESSION = Case("session as responder", (*STATES["session as responder"], Step(inputs.DATA, PACKET)))


def test_error_in_device_is_found_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "inner_packet", fails)
    finding = found(SESSION)
    assert finding.kind == RAISED
    assert "KeyError" in str(finding)
    assert "Traceback" in finding.detail


def test_drop_without_reason_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shared, "drop", lambda *_: None)
    finding = found(Case("no session", (Step(inputs.BYTES, b"\4\0\0\0"),)))
    assert finding.kind == UNCOUNTED
    assert "counted 0 drops for a datagram of 4 bytes" in str(finding)


def test_packet_from_other_source_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "is_source_allowed", lambda *_: True)
    stolen = udp_packet(("10.9.9.9", 1), (INNER.device4, 9), b"x")
    device = RefwgInProcess()
    monkeypatch.setattr(
        device.device, "is_source_allowed", lambda peer, address: peer is not None and address[0] == 192
    )
    with pytest.raises(Finding, match="from an address that is not the peer's") as caught:
        device.run(Case("session as responder", (*STATES["session as responder"], Step(inputs.DATA, stolen))))
    assert caught.value.kind == ANSWERED


def test_answer_to_replayed_initiation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from refwg.noise import Handshake  # noqa: PLC0415 - the class that is broken

    whole = Handshake.consume_initiation

    def forgets(self: Handshake, *arguments: object) -> None:
        self.latest_timestamp = bytes(12)
        self.last_initiation_consumption = None
        whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Handshake, "consume_initiation", forgets)
    steps = (*STATES["response sent"], Step(inputs.WAIT, counter=1000), Step(inputs.REPLAY, counter=0))
    finding = found(Case("response sent", steps))
    assert finding.kind == ANSWERED
    assert "answered an initiation twice" in str(finding)


def test_device_that_answers_nobody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "_initiation", lambda *_: receive.Dropped(DropReason.UNKNOWN_PEER))
    finding = found(Case("no session", ()))
    assert finding.kind == SILENT
    assert "no longer answers a legitimate peer's initiation" in str(finding)


def test_next_case_meets_device_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RefwgInProcess()
    with monkeypatch.context() as broken:
        broken.setattr(receive, "inner_packet", fails)
        with pytest.raises(Finding):
            device.run(SESSION)
    device.run(SESSION)
    device.check()
