"""Record the steps of a test with their times, in the words of `ip`, `wg` and `ping`.

The mechanisms that make, change, send or wait call `record` or `step`. A step goes to the current `Recorder`, which
the lab of the test starts. Without a recorder a step is listed only while it runs (`unfinished`). The current recorder
takes the steps of all threads of the process.

Each step has two stamps. One is of CLOCK_REALTIME, like the stamps of captured frames (pcapng) and of lines in
programs' logs, so all of these can be read side by side. A test may set that clock. So the other stamp is the time
since the start of the recorder by CLOCK_MONOTONIC, which cannot be set. In lane warp both clocks skip idle time.

Recording never raises, costs microseconds, and keeps no key in full: masking, cutting and formatting happen when the
steps are printed.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

# The number of steps that are kept from the beginning of a test, and from its end.
FIRST: Final = 500
LAST: Final = 500
# The largest number of characters of a step's text, and of its outcome.
LONGEST: Final = 1000
# The number of characters of a key that are shown.
_SHOWN: Final = 6
# A key in base64, as in wg(8), or in hexadecimal, as in UAPI.
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{43}=|[0-9A-Fa-f]{64,}")
# Seconds: the outcome of a step that took this long includes its duration.
_WORTH_SAYING: Final = 0.1
_FEW: Final = 4
_SECOND: Final = 1_000_000_000
_HEADER: Final = """\
# The steps of this test. First column: the time of day, UTC, by the same clock as captures and stamps in logs. Second
# column: seconds since the lab was made, by a clock that cannot be set. Text after three blanks and a #: how the step
# ended. Keys are shortened.
"""

Words: TypeAlias = "str | Callable[[], str]"


class Step:
    """A step: where, what, when, and how it ended. A context manager: an exception is how it ended.

    outcome: set it before the end to record a result. seen: returns what a wait has seen so far.
    """

    __slots__ = (
        "_is_listed", "_is_wait", "_seen", "began", "count", "ended", "node", "outcome", "section", "text", "thread",
        "wall",
    )  # fmt: skip

    def __init__(
        self,
        node: str,
        text: Words,
        *,
        seen: Callable[[], str] | None = None,
        is_listed: bool = True,
        is_wait: bool = False,
    ) -> None:
        self.node = node
        self.text = _cut(text)
        self.outcome = ""
        self.section = ""
        self.count = 1
        self.wall = time.time_ns()
        self.ended: float | None = None
        self.thread = threading.get_ident()
        self.began = time.monotonic()
        self._seen = seen
        self._is_listed = is_listed
        self._is_wait = is_wait

    @property
    def seconds(self) -> float:
        """Its duration in seconds, until now if it has not ended."""
        return (time.monotonic() if self.ended is None else self.ended) - self.began

    def __enter__(self) -> Self:
        # A wait inside another step is part of that step, and listed only if it fails.
        if self._is_wait and any(other.thread == self.thread for other in _unfinished):
            self._is_listed = False
        _unfinished.append(self)
        if self._is_listed and _recorders:
            _recorders[-1].add(self)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.ended = time.monotonic()
        if self in _unfinished:
            _unfinished.remove(self)
        if error is not None:
            self.outcome = _cut(lambda: f"failed after {self.seconds:.3f} s: {error or type(error).__name__}")
        elif self._is_wait:
            self.outcome = _cut(f"{self.seconds:.3f} s{': ' * bool(self.outcome)}{self.outcome}")
        elif self.seconds >= _WORTH_SAYING:
            self.outcome = _cut(f"{self.outcome}{', ' * bool(self.outcome)}{self.seconds:.3f} s")
        if not _recorders:
            return
        if self._is_listed:
            _recorders[-1].ended(self)
        elif error is not None:
            _recorders[-1].add(self)

    def __str__(self) -> str:
        """Print it on one line or more, without stamps: `ip link add wg0 type wireguard   # failed after ...`."""
        outcome = self.outcome
        if self.ended is None:
            outcome = f"not finished after {self.seconds:.3f} s{self._so_far()}"
        elif self.count > 1:
            outcome = f"{self.count} times{': ' * bool(outcome)}{outcome}"
        return shortened(f"{self.text}{f'   # {outcome}' if outcome else ''}")

    def _so_far(self) -> str:
        return f"; seen: {_cut(self._seen)}" if self._seen is not None else ""


# Steps that have begun and not ended, of all threads, oldest first.
_unfinished: list[Step] = []
# The recorders of the open labs; the last one takes the steps.
_recorders: list[Recorder] = []


class Recorder:
    """Keeps the first and the last steps between `start` and `stop`.

    section: the heading of the next steps.
    """

    def __init__(self, section: str = "") -> None:
        self.section = section
        self._steps: list[Step] = []
        self._left_out = 0
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def start(self) -> None:
        """Take all steps of this process from now on, until `stop` or until another recorder starts."""
        _recorders.append(self)

    def stop(self) -> None:
        """Take no more steps; a second call does nothing."""
        if self in _recorders:
            _recorders.remove(self)

    def add(self, step: Step) -> None:
        """Take a step that begins now."""
        step.section = self.section
        with self._lock:
            self._steps.append(step)
            if len(self._steps) > FIRST + LAST:
                self._left_out += self._steps.pop(FIRST).count

    def ended(self, step: Step) -> None:
        """Count a step in the one before it if it repeats that, with the same outcome."""
        with self._lock:
            if len(self._steps) > 1 and self._steps[-1] is step and _is_repeated(self._steps[-2], step):
                self._steps.pop()
                self._steps[-1].count += 1

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that are kept, in the order in which they began."""
        with self._lock:
            return tuple(self._steps)

    def __str__(self) -> str:
        """Print all steps, a heading for each section, and how many are left out."""
        with self._lock:
            steps, left_out = list(self._steps), self._left_out
        width = max((len(step.node) for step in steps), default=0)
        lines = [_HEADER]
        date = section = None
        at = FIRST if left_out else -1
        for index, step in enumerate(steps):
            wall = datetime.fromtimestamp(step.wall // _SECOND, UTC)
            if step.section != section:
                section = step.section
                lines.append(f"\n# {section}\n")
            if wall.date() != date:
                date = wall.date()
                lines.append(f"# {date}\n")
            if index == at:
                lines.append(f"# {left_out} steps left out: {FIRST} are kept of the beginning, {LAST} of the end\n")
            stamp = f"{wall:%H:%M:%S}.{step.wall % _SECOND // 1000:06}  {step.began - self._began:+.3f}"
            lines.append(f"{stamp}  {step.node:{width}}  {step}\n".replace("\n", "\n    ").removesuffix("    "))
        return "".join(lines)


def _is_repeated(one: Step, other: Step) -> bool:
    return (one.node, one.text, one.outcome, one.section) == (other.node, other.text, other.outcome, other.section)


def record(node: str, text: Words, outcome: str = "") -> None:
    """Record a step that takes no time.

    node: where it happens; may be empty. text: as a command if there is one; may be a function that returns it.
    outcome: how it ended; may be empty.
    """
    with step(node, text) as made:
        made.outcome = outcome


def step(
    node: str, text: Words, *, seen: Callable[[], str] | None = None, is_listed: bool = True, is_wait: bool = False
) -> Step:
    """Make a step for a `with` statement around code that takes time or may fail.

    node, text: as for `record`. seen: returns what has been seen so far; called if the step does not end. is_listed:
    False for a step that only reads: it is listed only if it fails. is_wait: the same holds inside another step.
    """
    return Step(node, text, seen=seen, is_listed=is_listed, is_wait=is_wait)


def unfinished() -> list[str]:
    """Return the steps that have begun and not ended, innermost first; those of this thread before others."""
    own = threading.get_ident()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    innermost_first = _unfinished[::-1]
    open_steps = sorted(innermost_first, key=lambda step: step.thread != own)
    return [
        f"{f'{step.node}: ' * bool(step.node)}{step}"
        + (f" (thread {names.get(step.thread, '?')})" if step.thread != own else "")
        for step in open_steps
    ]


def forget_unfinished() -> None:
    """Forget this thread's unfinished steps: an interrupt may have come between a step and its end."""
    own = threading.get_ident()
    _unfinished[:] = [step for step in _unfinished if step.thread != own]


def shortened(text: str) -> str:
    """Return the text with each key cut to a few characters."""
    return _KEY.sub(lambda key: f"{key[0][:_SHOWN]}…", text)


def few(items: Iterable[object], limit: int = _FEW, separator: str = ", ") -> str:
    """Print the first items, and how many more there are."""
    every = list(items)
    more = f"{separator}and {len(every) - limit} more" if len(every) > limit else ""
    return separator.join(map(str, every[:limit])) + more


def in_short(value: object) -> str:
    """Format a value in few words, and fast even if it is large; empty for True and None."""
    if value is True or value is None:
        return ""
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, list | tuple | set | frozenset | dict) and type(value).__str__ is object.__str__:
        return f"{len(value)} items" if len(value) > _FEW else f"({', '.join(in_short(item) for item in value)})"
    if is_dataclass(value) and type(value).__str__ is object.__str__:
        return _fields_in_short(value)
    if isinstance(value, str | int | float) or type(value).__str__ is not object.__str__:
        return _cut(lambda: str(value))
    # Without its own __str__ a value would print its address.
    return type(value).__name__


def _fields_in_short(value: Any) -> str:
    words = ((field.name, getattr(value, field.name)) for field in fields(value))
    return f"{type(value).__name__}({', '.join(f'{name}={in_short(word)}' for name, word in words if word)})"


def _cut(text: Words) -> str:
    """Return the text, cut to LONGEST characters; never raises."""
    try:
        made = text if isinstance(text, str) else text()
    except Exception as error:  # noqa: BLE001 - a step without its text is better than a failed test
        made = f"({type(error).__name__}: {error})"
    if len(made) > LONGEST:
        # Keys first: half a key would not match _KEY.
        made = shortened(made)
        made = f"{made[:LONGEST]}… ({len(made)} characters)"
    return made
