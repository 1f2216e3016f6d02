"""Check in the kernel log that the driver destroyed every object it created (N41).

Source: the pr_debug lines of drivers/net/wireguard/{device,peer,noise}.c, which dynamic debug turns on.
"""

from __future__ import annotations

import re
from collections import Counter

_LINE = re.compile(r"wireguard: [^:]+: (Interface|Peer|Keypair)\b.*? (created|destroyed)\b")
KINDS = ("Interface", "Peer", "Keypair")


def count(log: str) -> Counter[tuple[str, str]]:
    """How often the log says that an object of each kind was created, and destroyed."""
    found: Counter[tuple[str, str]] = Counter()
    for line in log.splitlines():
        if match := _LINE.search(line):
            found[match[1], match[2]] += 1
    return found


def leaks(log: str) -> list[str]:
    """What does not balance, in words; empty if all that was created is gone. A log without a word is one leaks."""
    counts = count(log)
    if not counts:
        return ["the kernel log says nothing of objects of WireGuard: is dynamic debug on?"]
    return [
        f"{counts[kind, 'created']} of {kind} created, {counts[kind, 'destroyed']} destroyed"
        for kind in KINDS
        if counts[kind, "created"] != counts[kind, "destroyed"]
    ]
