"""Open an initiation as its responder does, by the oracle's code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.wire.noise import static_key

if TYPE_CHECKING:
    from harness import Key


def opened(initiation: bytes, responder: Key) -> tuple[bytes, bytes]:
    """Open an initiation as its responder does; returns the initiator's static key and the timestamp.

    harness.wire.noise does it: no program under test has this code, and selftests/vectors/test_oracle_noise.py checks
    it against noiseprotocol.
    """
    found = static_key(responder.raw).open_initiation(initiation)
    assert found is not None, "the initiation's static key does not authenticate"
    assert found.timestamp is not None, "the initiation's timestamp does not authenticate"
    return found.static, found.timestamp
