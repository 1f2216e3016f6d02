"""Measure `wg setconf` and `wg show` of refwg with 130 560 allowed-ips."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import Lab

if TYPE_CHECKING:
    from harness import Manifest

# 255 x 256 allowed-ips of each family, as in the kernel's netns.sh.
MANY: Final = tuple(text for a in range(1, 256) for b in range(256) for text in (f"{a}.{b}.0.0/16", f"{a}::{b}/128"))
DEADLINE: Final = 120.0  # seconds for each command


def measured(manifest: Manifest) -> dict[str, float]:
    """Measure both commands; return the seconds of each, keyed by the figure's name."""
    written, read = seconds_for_many_allowed_ips(manifest)
    return {"setconf_130560_allowed_ips": written, "show_130560_allowed_ips": read}


def seconds_for_many_allowed_ips(manifest: Manifest) -> tuple[float, float]:
    """Return the seconds of `wg setconf` and of `wg show` for one peer with 130 560 allowed-ips."""
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab(Path(directory))
        try:
            interface = lab.interface("wg0", manifest, lab.node("ns0"))
            configuration = f"[Peer]\nPublicKey = {lab.key('many').public()}\nAllowedIPs = {','.join(MANY)}\n"
            started = time.perf_counter()
            interface.wg("setconf", "wg0", "/dev/stdin", stdin=configuration, deadline=DEADLINE)
            written = time.perf_counter()
            shown = interface.wg("show", "wg0", "allowed-ips", deadline=DEADLINE).stdout
            read = time.perf_counter()
        finally:
            lab.close()
    if len(shown.split()) != len(MANY) + 1:
        raise AssertionError(f"{len(shown.split()) - 1} allowed-ips were read back, expected {len(MANY)}")
    return written - started, read - written
