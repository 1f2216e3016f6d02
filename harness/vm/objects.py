"""Check in the kernel log that the driver destroyed every object it created (N41).

Source: the pr_debug lines of drivers/net/wireguard/{device,peer,noise}.c, which dynamic debug turns on.
"""

from __future__ import annotations

import re
from collections import Counter

_LINE = re.compile(r"wireguard: [^:]+: (Interface|Peer|Keypair)\b.*? (created|destroyed)\b")
KINDS = ("Interface", "Peer", "Keypair")


def count(log: str) -> Counter[tuple[str, str]]:
    """Count the lines about each (kind, event); kind: of KINDS, event: `created` or `destroyed`."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.splitlines():
        if match := _LINE.search(line):
            counts[match[1], match[2]] += 1
    return counts


def leaks(log: str) -> list[str]:
    """Return one line per kind with leaked objects, empty if all were destroyed.

    A log without any line about objects is reported too: then the check proves nothing.
    """
    counts = count(log)
    if not counts:
        return ["the kernel log has no lines about WireGuard's objects: is dynamic debug on?"]
    return [
        f"{counts[kind, 'created']} of {kind} created, {counts[kind, 'destroyed']} destroyed"
        for kind in KINDS
        if counts[kind, "created"] != counts[kind, "destroyed"]
    ]
