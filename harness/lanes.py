"""The lanes: where a test runs."""

from __future__ import annotations

from typing import Final

# On this kernel: without namespaces, and in them.
HERE: Final = ("core", "netns")
# In a guest with a kernel of one's choice; `warp` with a clock that skips idle time.
GUESTS: Final = ("vm", "warp")
# Set in a guest: the lane that its results belong to.
LANE: Final = "WG_INTEROP_LANE"
