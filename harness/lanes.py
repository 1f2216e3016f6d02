"""Name lanes (where a test runs), suites (what it is about), variables a run hands down."""

from __future__ import annotations

from typing import Final

# On this kernel: without namespaces, and in them.
HERE: Final = ("core", "netns")
# In a guest with a kernel of one's choice; `warp` with a clock that skips idle time.
GUESTS: Final = ("vm", "warp")
# What `--suite` takes: tests of two implementations, of one, and of the lab itself (those in a folder `lab`).
SUITES: Final = ("pairs", "alone", "lab")
# Set in a guest: the lane that its results belong to.
LANE: Final = "WG_INTEROP_LANE"
# Set in a guest that has a shard of the tests only, as `0/2`: the first of two.
SHARD: Final = "WG_INTEROP_SHARD"
# Where each finished result is written as a line of JSON, for `wg-interop run`: the descriptor of a pipe. In a guest it
# is `stdout`, every report is written whole, and each line begins with a record separator (RFC 7464).
EVENTS: Final = "WG_INTEROP_EVENTS"
