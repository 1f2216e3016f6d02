"""Run a TCP stream over five rekeys: nothing is lost (`loopback`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from harness import INITIATION, RESPONSE, V4_OF_B, Capture

if TYPE_CHECKING:
    from harness import Tunnel

pytestmark = pytest.mark.waiting

SECOND: Final = 1_000_000_000
REKEY_AFTER_TIME: Final = 120
REKEYS: Final = 5
# Seconds, until shortly after the fifth rekey. The stream is slow, so that lane warp can skip time between segments.
DURATION: Final = REKEYS * REKEY_AFTER_TIME + 15
INTERVAL: Final = 15
PORT: Final = 5201
STREAM: Final = ("-b", "16K", "-l", "500", "--pacing-timer", "1000000", "-t", str(DURATION), "-i", str(INTERVAL))


def iperf3(loopback: Tunnel, server_log: str = "iperf3-server.log") -> dict[str, Any]:
    """Run one TCP stream from A to B; return the report of the sender."""
    directory = loopback.lab.directory
    server = loopback.nodes["ns2"].spawn(["iperf3", "-s", "-1", "--forceflush"], log=directory / server_log)
    try:
        server.says("listening")
        argv = ["iperf3", "-c", V4_OF_B, "-J", *STREAM]
        return dict(json.loads(loopback.nodes["ns1"].run(argv, deadline=2 * DURATION).stdout))
    finally:
        server.terminate()
        server.close()


@pytest.mark.requirement("ROB-15", "TM-07")
def test_stream_loses_nothing_in_five_rekeys(loopback: Tunnel) -> None:
    # No tail loss probes (RFC 8985): they would retransmit a segment that waits 5 ms for a handshake.
    loopback.nodes["ns1"].sysctl("net.ipv4.tcp_early_retrans", 0)
    with Capture(loopback.nodes["ns0"], "lo") as wire:
        report = iperf3(loopback)
        initiations, responses = wire.messages(kind=INITIATION), wire.messages(kind=RESPONSE)
    sent, received = report["end"]["sum_sent"], report["end"]["sum_received"]
    assert (received["bytes"], sent["retransmits"]) == (sent["bytes"], 0), f"sent {sent}, received {received}"
    quiet = [interval["sum"]["start"] for interval in report["intervals"] if not interval["sum"]["bytes"]]
    assert not quiet, f"nothing was sent in the {INTERVAL} s after {quiet}"
    starts = [round((message.time - initiations[0].time) / SECOND) for message in initiations]
    assert len(starts) == len(responses) == REKEYS + 1, f"handshakes began after {starts} s"
    assert all(0 <= start - number * REKEY_AFTER_TIME <= number + 1 for number, start in enumerate(starts)), starts
