"""Try what a program can do: the smoke test, and one probe for each capability."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.control.records import DeviceConfig
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.implementations.manifest import Manifest
    from harness.lab.lab import Lab

# Seconds for the answer of a program that has nothing else to do.
_ANSWER: Final = 10.0
_PORT: Final = 51820


def smoke_test(lab: Lab, manifest: Manifest) -> None:
    """Check the least that every test needs: it starts, answers `get`, takes a key and a port, and ends in time.

    Raises HarnessError with what went wrong. No handshake is tried: that is what the tests are for.
    """
    wg0 = lab.interface("wg0", manifest, lab.node("smoke"))
    wg0.get(_ANSWER)
    key = lab.key("smoke")
    wg0.set(DeviceConfig(private_key=key, listen_port=_PORT))
    seen = wg0.get(_ANSWER)
    if seen.listen_port != _PORT:
        raise HarnessError(f"{manifest.name} was given the listen port {_PORT} and reports {seen.listen_port}")
    # Not every program reveals its private key, and not every one reports its public key.
    public = seen.public_key or (seen.private_key.public() if seen.private_key else None)
    if public not in {None, key.public()}:
        raise HarnessError(f"{manifest.name} was given a private key and reports another one")
    lab.check_health()
    lab.end(wg0)
