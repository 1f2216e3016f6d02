"""Check the files in `transcripts/`: refwg makes them again, other code derives them too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from selftests.vectors.transcripts import DIRECTORY, SCRIPTS, rendered
from selftests.vectors.witness import Witness, hchacha20

pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")


def transcript(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DIRECTORY / f"{name}.json").read_text())
    return loaded


@pytest.mark.requirement("HS-03", "MSG-05")
@pytest.mark.parametrize("name", SCRIPTS)
def test_refwg_reproduces_recorded_transcript(name: str) -> None:
    assert rendered(name) == (DIRECTORY / f"{name}.json").read_text()


@pytest.mark.requirement("CR-14", "CK-03", "CK-04")
@pytest.mark.parametrize("name", SCRIPTS)
def test_witness_derives_every_byte_of_transcript(name: str) -> None:
    recorded = transcript(name)
    witness = Witness(recorded)
    for message in recorded["messages"]:
        assert getattr(witness, message["type"])(message).hex() == message["bytes"], f"{name} at {message['at']}"


@pytest.mark.requirement("CR-08")
def test_witness_hchacha20_agrees_with_xchacha_draft() -> None:
    assert hchacha20(bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927")).hex() == (
        "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    )


@pytest.mark.requirement("CK-13", "MSG-13")
def test_transcripts_contain_every_kind_of_message() -> None:
    messages = [message for name in SCRIPTS for message in transcript(name)["messages"]]
    assert {(message["type"], message["from"]) for message in messages} >= {
        (kind, side) for kind in ("cookie_reply", "data") for side in "AB"
    }
    assert any(message["type"] == "data" and not message["packet"] for message in messages)
    handshakes = [message for message in messages if "sender_index" in message]
    assert {(message["type"], message["bytes"].endswith("0" * 32)) for message in handshakes} == {
        (kind, is_zero) for kind in ("initiation", "response") for is_zero in (True, False)
    }
