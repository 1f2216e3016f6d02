"""Merge the steps of a test, messages and lines of logs into one text by time.

All have the clock of this machine. A message has the time when the kernel saw it, a line of a log the time when the log
grew, a step the time when it began.
"""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from harness.steps import shortened
from harness.wire import frames
from harness.wire.messages import DATA, Message

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from harness.steps import Step
    from harness.wire.capture import Recording
    from harness.wire.pcapng import Packet

_SECOND: Final = 1_000_000_000
# Entries of the beginning and of the end that are kept.
_FIRST: Final = 1000
_LAST: Final = 2000
# Data messages one after the other in one direction: more than this are one entry.
_EACH: Final = 3
# Nanoseconds between two messages of one such entry.
_GAP: Final = _SECOND // 20
_HEADER: Final = """\
# What happened, by time of day (UTC). $: a step of the test. >: a message on a link, with the node that sent it.
# |: a line of a log. Keys are shortened; commands.txt, the logs and the captures have the whole.
"""


class Entry(NamedTuple):
    """What happened at a time: ns of wall time. where: a node, a link or a log. sort: the sign before the text."""

    time: int
    where: str
    sort: str
    text: str


def timeline(entries: Iterable[Entry]) -> str:
    """Return the entries as text, in the order of their times; too many are cut in the middle."""
    ordered = sorted(entries, key=lambda entry: entry.time)
    left_out = max(0, len(ordered) - _FIRST - _LAST)
    kept = [*ordered[:_FIRST], *ordered[_FIRST + left_out :]]
    width = max((len(entry.where) for entry in kept), default=0)
    lines = [_HEADER]
    date = None
    for number, entry in enumerate(kept):
        wall = datetime.fromtimestamp(entry.time // _SECOND, UTC)
        if left_out and number == _FIRST:
            lines.append(f"# {left_out} entries left out\n")
        if wall.date() != date:
            date = wall.date()
            lines.append(f"# {date}\n")
        stamp = f"{wall:%H:%M:%S}.{entry.time % _SECOND // 1000:06}"
        text = entry.text.replace("\n", f"\n{'':{len(stamp) + width + 6}}")
        lines.append(f"{stamp}  {entry.where:{width}}  {entry.sort} {text}\n")
    return "".join(lines)


def of_steps(steps: Iterable[Step], *, until: str) -> Iterator[Entry]:
    """Yield the steps, without those of the section `until`, which only read for the evidence."""
    for step in steps:
        if step.section != until:
            yield Entry(step.wall, step.node, "$", str(step))


def of_recording(recording: Recording) -> list[Entry]:
    """Return the messages on a link, each with what a wire did to it; runs of data messages are one entry each."""
    entries: list[Entry] = []
    for run in _runs(recording):
        _, node, comment = run[0]
        messages = [message for message, *_ in run]
        decision = f"   # {comment}" if comment else ""
        texts = [_run(messages)] if len(messages) > _EACH else map(_words, messages)
        entries += [
            Entry(message.time, recording.name, ">", f"{node}: {text}{decision}")
            for message, text in zip(messages, texts, strict=False)
        ]
    return entries


def _runs(recording: Recording) -> Iterator[list[tuple[Message, str, str]]]:
    """Yield each message, with its node and a wire's decision; data with the same way and decision as one list."""
    run: list[tuple[Message, str, str]] = []
    for packet, left, reached in recording.frames:
        # What a wire delivers unchanged was listed when it left.
        if not (left or packet.comment) or (message := _message(packet)) is None:
            continue
        one = (message, left or f"to {reached}", packet.comment)
        if run and not _belongs(one, run[-1]):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _belongs(one: tuple[Message, str, str], before: tuple[Message, str, str]) -> bool:
    (message, *rest), (last, *others) = one, before
    ways = [(each.kind, each.source, each.destination) for each in (message, last)]
    is_soon = message.time - last.time < _GAP
    return message.kind == DATA and is_soon and rest == others and ways[0] == ways[1]


def of_log(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Entry]:
    """Yield the lines of a log, with their times; those without one (0) have the time of the line before."""
    last = 0
    for time, line in lines:
        last = time or last
        if last:
            yield Entry(last, name, "|", shortened(line))


def _message(packet: Packet) -> Message | None:
    contents = frames.read(packet.frame)
    if not isinstance(contents, frames.Transport) or contents.protocol != socket.IPPROTO_UDP:
        return None
    frame = packet.frame
    return Message(
        time=packet.time,
        source=contents.source(frame),
        destination=contents.destination(frame),
        payload=contents.payload(frame),
    )


def _words(message: Message) -> str:
    (source, port), (destination, to) = message.source, message.destination
    counter = "" if message.counter is None else f" {message.counter}"
    return f"{source} {port} > {destination} {to}: {message.name}{counter}, {len(message.payload)} bytes"


def _run(messages: Sequence[Message]) -> str:
    seconds = (messages[-1].time - messages[0].time) / _SECOND
    first, last = messages[0], messages[-1]
    size = sum(len(message.payload) for message in messages)
    return (
        f"{_words(first).partition(': ')[0]}: {len(messages)} data messages, counters {first.counter} to "
        f"{last.counter}, {size} bytes in {seconds:.3f} s"
    )
