"""Compare what two captures of one test hold, in the protocol's words.

Keys, indexes and times differ from run to run. What is compared is who sent which kind of message, its length and its
counter, and whether mac2 is set.
"""

from __future__ import annotations

from collections import Counter
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Final

from harness.wire import frames, pcapng
from harness.wire.frames import Fragment
from harness.wire.messages import DATAGRAM, FIELDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from harness.wire.messages import Message

_End = tuple[str, int]

_AT_MOST: Final = 6  # messages shown of each capture after the first difference


def read_messages(path: Path) -> list[Message]:
    """Read the UDP datagrams of a capture that the lab has written, each once, as they left their senders.

    Raises OSError, and ValueError for a file that is cut off.
    """
    ends, packets = pcapng.load(path)
    found = []
    for packet in packets:
        contents = frames.read(packet.frame)
        # A wire has both ends, so what arrives at one has left the other.
        if (ends > 1 and not packet.is_outbound) or isinstance(contents, Fragment):
            continue
        message = frames.message(packet.frame, contents, packet.time)
        if message.sort == DATAGRAM:
            found.append(message)
    return found


def differences(good: Sequence[Message], bad: Sequence[Message]) -> list[str]:
    """Return lines that say how the messages of a bad run differ from those of a good one; empty if they do not."""
    ends, others = _ends(good), _ends(bad)
    # With two ends in common, the others do not stand for each other.
    same = len(ends.keys() & others.keys()) > 1
    ours, theirs = _words(good, {} if same else ends), _words(bad, {} if same else others)
    if ours == theirs:
        return []
    return [*_counts(ours, theirs), *_first(ours, theirs)]


def _ends(messages: Sequence[Message]) -> dict[_End, str]:
    """Number the endpoints in the order in which they appear: those of a test may differ from run to run."""
    every = dict.fromkeys(end for message in messages for end in (message.source, message.destination))
    return {end: f"end {number}" for number, end in enumerate(every, 1)}


def _words(messages: Sequence[Message], names: Mapping[_End, str]) -> list[tuple[str, str]]:
    """Return sender, receiver and kind of each message, and what is told of this one: `counter 0`."""
    words = []
    for message in messages:
        source, destination = (names.get(end) or _address(end) for end in (message.source, message.destination))
        kind = f"{source} > {destination}: {message.name} of {len(message.payload)} bytes"
        words.append((kind, _detail(message)))
    return words


def _address(end: _End) -> str:
    host, port = end
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _detail(message: Message) -> str:
    if message.counter is not None:
        return f", counter {message.counter}"
    if "mac2" not in FIELDS.get(message.kind, {}):
        return ""
    return ", with mac2" if any(message.payload[-16:]) else ""


def _counts(good: Sequence[tuple[str, str]], bad: Sequence[tuple[str, str]]) -> list[str]:
    ours, theirs = (Counter(kind for kind, _ in words) for words in (good, bad))
    return [
        f"{kind}: good {ours[kind]}, bad {theirs[kind]}"
        for kind in dict.fromkeys([*ours, *theirs])
        if ours[kind] != theirs[kind]
    ]


def _first(good: Sequence[tuple[str, str]], bad: Sequence[tuple[str, str]]) -> list[str]:
    """Return the messages of both at their first difference."""
    blocks = SequenceMatcher(None, good, bad, autojunk=False).get_opcodes()
    tag, start, end, other, other_end = next(block for block in blocks if block[0] != "equal")
    lines = [f"first difference after {start} equal messages:"]
    lines += [f"  good: {kind}{detail}" for kind, detail in good[start:end][:_AT_MOST]]
    lines += [f"  bad:  {kind}{detail}" for kind, detail in bad[other:other_end][:_AT_MOST]]
    if tag == "insert":
        lines.append(f"  good: {''.join(good[start]) if start < len(good) else 'nothing more'}")
    if tag == "delete":
        lines.append(f"  bad:  {''.join(bad[other]) if other < len(bad) else 'nothing more'}")
    return lines
