"""Name the lanes, the suites, and the environment variables that a run passes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from harness.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Lanes on this kernel: `core` without namespaces, `netns` with them.
HERE: Final = ("core", "netns")
# Lanes in a guest with another kernel; in `warp` the guest's clock skips idle time.
GUESTS: Final = ("vm", "warp")
# Values of `--suite`: tests of two implementations, of one, of the lab itself (those in a folder `lab`), and of one
# requirement after the other, by peers that misbehave (those in a folder `conformance`).
SUITES: Final = ("pairs", "alone", "lab", "conformance")
# Values of `--keep`: the tests whose evidence a report keeps.
KEEP: Final = ("failed", "all", "none")
# Environment variable of a guest, and on a host of `--on`: the lane of its results. It says that another pytest takes
# the reports, so that this one reads no settings, names nobody to blame and draws no page.
LANE: Final = "WG_INTEROP_LANE"
# Environment variable, set by `--nightly`: tests send as much as the catalogue of requirements asks.
NIGHTLY: Final = "WG_INTEROP_NIGHTLY"
# Environment variable of a guest that runs only a shard of the tests: `0/2` is the first of two.
SHARD: Final = "WG_INTEROP_SHARD"
# Environment variable: where to write each finished result as a line of JSON, for `wg-interop run`. Its value is the
# descriptor of a pipe. In a guest and on a host it is `stdout`; then every report is written completely, and each line
# begins with a record separator (RFC 7464).
EVENTS: Final = "WG_INTEROP_EVENTS"
# Set by `wg-interop run`: the directory that the run writes its report in (harness/plugin/publish.py).
REPORT: Final = "WG_INTEROP_REPORT"
# Set by `wg-interop run --on ssh:HOST`: the connections to the hosts, as JSON (harness/plugin/hosts.py).
HOSTS: Final = "WG_INTEROP_HOSTS"
# The word before the colon of `--on` for a machine; for guests it is the name of their lane.
SSH: Final = "ssh"


@dataclass(frozen=True, slots=True)
class Places:
    """The places of `--on`. hosts: names for ssh. guests: by lane, how many share its tests."""

    hosts: tuple[str, ...] = ()
    guests: Mapping[str, int] = field(default_factory=dict)

    def lanes(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """Return the lanes of a run: those given, and those that these places need."""
        if not self.guests:
            return given
        own = given or (HERE if self.hosts else ())
        return tuple(dict.fromkeys((*own, *self.guests)))


def read_places(words: Iterable[str]) -> Places:
    """Read the values of `--on`; raises UsageError."""
    hosts: list[str] = []
    guests: dict[str, int] = {}
    for word in words:
        kind, _, value = word.partition(":")
        if kind == SSH and value and not value.startswith("-"):
            if value in hosts:
                raise UsageError(f"--on {word}: given twice; -n N runs N tests at a time on each host")
            hosts.append(value)
        elif kind in GUESTS and value.isdecimal() and int(value):
            guests[kind] = int(value)
        else:
            raise UsageError(f"--on {word}: want ssh:HOST, vm:N or warp:N, N guests of that lane")
    return Places(tuple(hosts), guests)
