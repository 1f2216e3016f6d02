"""Name the lanes, the suites, and the environment variables that a run passes on."""

from __future__ import annotations

from typing import Final

# Lanes on this kernel: `core` without namespaces, `netns` with them.
HERE: Final = ("core", "netns")
# Lanes in a guest with another kernel; in `warp` the guest's clock skips idle time.
GUESTS: Final = ("vm", "warp")
# Values of `--suite`: tests of two implementations, of one, of the lab itself (those in a folder `lab`), and of one
# requirement after the other, by peers that misbehave (those in a folder `conformance`).
SUITES: Final = ("pairs", "alone", "lab", "conformance")
# Values of `--keep`: the tests whose evidence a report keeps.
KEEP: Final = ("failed", "all", "none")
# Environment variable of a guest: the lane of its results.
LANE: Final = "WG_INTEROP_LANE"
# Environment variable, set by `--nightly`: tests send as much as the catalogue of requirements asks.
NIGHTLY: Final = "WG_INTEROP_NIGHTLY"
# Environment variable of a guest that runs only a shard of the tests: `0/2` is the first of two.
SHARD: Final = "WG_INTEROP_SHARD"
# Environment variable: where to write each finished result as a line of JSON, for `wg-interop run`. Its value is the
# descriptor of a pipe. In a guest it is `stdout`; then every report is written completely, and each line begins with a
# record separator (RFC 7464).
EVENTS: Final = "WG_INTEROP_EVENTS"
# Set by `wg-interop run`: the directory that the run writes its report in (harness/plugin/publish.py).
REPORT: Final = "WG_INTEROP_REPORT"
