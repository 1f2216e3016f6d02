"""Parse fault scripts: which WireGuard messages a wire loses, delays or changes.

A script is a list of rules: records, or a TOML file with the same keys. The first rule that takes a message decides
what happens to it; a message that no rule takes passes. Random choices come from the script's seed: the same messages
in the same order get the same faults.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, TypeGuard

from harness.errors import UsageError
from harness.tables import Table, read_toml
from harness.wire.messages import (
    COOKIE_REPLY,
    DATA,
    DATAGRAM,
    FIELDS,
    FRAGMENT,
    INITIATION,
    OTHER,
    RESPONSE,
    UNKNOWN,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness.wire.messages import Message

# The words that select messages: by type, and for transport messages by whether they carry a packet (`is_a`). The last
# three select what is not a WireGuard message; `any` does not select it.
MESSAGES: Final = (
    "any", "handshake", "initiation", "response", "cookie-reply", "transport", "data", "keepalive",
    UNKNOWN, FRAGMENT, OTHER,
)  # fmt: skip
_HANDSHAKE: Final = {"initiation": INITIATION, "response": RESPONSE, "cookie-reply": COOKIE_REPLY}
_RULES_SHOWN: Final = 3  # in the repr of a script
Numbers = int | str | tuple[int | str, ...]


def is_a(message: Message, word: str) -> bool:
    """Return whether a word of MESSAGES selects this message."""
    if word in {FRAGMENT, OTHER}:
        return message.sort == word
    kind = message.kind
    if word == "any":
        return kind != 0
    if word == UNKNOWN:
        return message.sort == DATAGRAM and kind == 0
    if word == "handshake":
        return kind in {INITIATION, RESPONSE, COOKIE_REPLY}
    if word in _HANDSHAKE:
        return kind == _HANDSHAKE[word]
    return kind == DATA and (word == "transport" or message.is_keepalive == (word == "keepalive"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The conditions under which a rule takes a message; all rules have them.

    message: a word of MESSAGES. sender: name of the node that sent it; None: either. nth: numbers among the messages
    that meet `message`, `sender` and `counters`, the first is 1: `2`, `"5-9"`, `"3-"`, `(1, "4-6")`. counters: of
    transport messages, written the same way. share: probability with which a message that meets the other conditions is
    taken. optional: the rule need not take any message; otherwise a test fails in which none met its conditions.
    """

    do: ClassVar[str] = ""

    message: str = "any"
    sender: str | None = None
    nth: Numbers | None = None
    counters: Numbers | None = None
    share: float = 1.0
    optional: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for a value that makes no sense."""
        _one_of("message", self.message, MESSAGES)
        if self.sender is not None and not isinstance(self.sender, str):
            raise UsageError(f"sender: want the name of a node, not {self.sender!r}")
        for key, value in (("nth", self.nth), ("counters", self.counters)):
            ranges(key, value)
        if self.counters is not None and self.message not in {"any", "transport", "data", "keepalive"}:
            raise UsageError(f'counters: {self.message} has none; use nth, or message = "transport"')
        if not _is_number(self.share) or not 0 < self.share <= 1:
            raise UsageError(f"share: want a number above 0 and at most 1, not {self.share!r}")
        if not isinstance(self.optional, bool):
            raise UsageError(f"optional: want true or false, not {self.optional!r}")
        self._check()

    def _check(self) -> None:
        """Check the keys that only this kind of rule has; UsageError for a wrong value."""

    def __str__(self) -> str:
        words = [self.do]
        for key in fields(self):
            value = getattr(self, key.name)
            if value != key.default:
                words.append(f"{key.name}={value}")
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop(Rule):
    """The message is lost."""

    do: ClassVar[str] = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(Rule):
    """The message is held until one of the conditions is met; messages released together keep their order.

    behind: this many other messages have passed in its direction. gather: this rule holds this many messages. seconds:
    this time has passed. Without any of them: until the test calls `Wire.release`.
    """

    do: ClassVar[str] = "hold"

    behind: int | None = None
    gather: int | None = None
    seconds: float | None = None

    def _check(self) -> None:
        _positive("behind", self.behind, int)
        _positive("gather", self.gather, int)
        _positive("seconds", self.seconds, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay(Rule):
    """The message arrives `seconds` later, plus a random part of `jitter` seconds, which may change the order."""

    do: ClassVar[str] = "delay"

    seconds: float = 0.0
    jitter: float = 0.0

    def _check(self) -> None:
        for key in ("seconds", "jitter"):
            value = getattr(self, key)
            if not _is_number(value) or value < 0:
                raise UsageError(f"{key}: want a number of seconds, not {value!r}")
        if not self.seconds and not self.jitter:
            raise UsageError("seconds: is missing; give the delay, for example seconds = 0.3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate(Rule):
    """The message arrives, and `copies` copies of it directly after it."""

    do: ClassVar[str] = "duplicate"

    copies: int = 1

    def _check(self) -> None:
        _positive("copies", self.copies, int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay(Rule):
    """The message arrives, and later a copy of it, as an attacker would send one.

    behind, seconds: as for Hold; one of them is needed. port: the copy comes from this port, not from the sender's.
    """

    do: ClassVar[str] = "replay"

    behind: int | None = None
    seconds: float | None = None
    port: int | None = None

    def _check(self) -> None:
        _positive("behind", self.behind, int)
        _positive("seconds", self.seconds, float)
        if self.behind is None and self.seconds is None:
            raise UsageError("behind: is missing; say when the copy comes: behind = 1, or seconds = 0.1")
        if self.port is not None and (not isinstance(self.port, int) or not 0 < self.port < 1 << 16):
            raise UsageError(f"port: want a number from 1 to 65535, not {self.port!r}")
        if self.port is not None and self.message in {FRAGMENT, OTHER}:
            raise UsageError(f"port: a message that is {self.message!r} has none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip(Rule):
    """The message arrives with one bit changed, and with a correct UDP checksum.

    field: one of messages.FIELDS. bit: number in the field, 0 is the lowest bit of its first byte.
    """

    do: ClassVar[str] = "flip"

    field: str = ""
    bit: int = 0

    def _check(self) -> None:
        kinds = [kind for word, kind in _HANDSHAKE.items() if self.message == word]
        if self.message in {"transport", "data", "keepalive"}:
            kinds = [DATA]
        if not kinds:
            raise UsageError("message: flip needs one kind of message that has fields: initiation, ...")
        _one_of("field", self.field, tuple(FIELDS[kinds[0]]))
        if self.message != "data" and self.field == "packet":
            raise UsageError('field: a keepalive carries no packet; use field = "tag", or message = "data"')
        start, end = FIELDS[kinds[0]][self.field]
        # The length of the packet is unknown until a message arrives; it has at least one byte.
        bits = 8 if self.field == "packet" else 8 * ((0 if end is None else end) - start)
        if not isinstance(self.bit, int) or not 0 <= self.bit < bits:
            raise UsageError(f"bit: {self.field} has the bits 0 to {bits - 1}, not {self.bit!r}")

    def apply(self, payload: bytes) -> bytes:
        """Return the message with the bit changed."""
        start, _ = FIELDS[payload[0]][self.field]
        place = (start if start >= 0 else len(payload) + start) + self.bit // 8
        return payload[:place] + bytes([payload[place] ^ 1 << self.bit % 8]) + payload[place + 1 :]


RULES: Final[dict[str, type[Rule]]] = {rule.do: rule for rule in (Drop, Hold, Delay, Duplicate, Replay, Flip)}


@dataclass(frozen=True, slots=True)
class Script:
    """Rules in the order in which they are tried. seed: of the random choices; None: the seed of the lab (`--seed`)."""

    rules: tuple[Rule, ...] = ()
    seed: int | None = None

    def __repr__(self) -> str:
        left_out = len(self.rules) - _RULES_SHOWN
        more = [f"and {left_out} more"] if left_out > 0 else []
        return f"Script({'; '.join([*map(str, self.rules[:_RULES_SHOWN]), *more])})"


def load_script(path: Path | str) -> Script:
    """Read a script from a TOML file; UsageError for a mistake names the file, the rule and the key."""
    path = Path(path)
    return _script(read_toml(path, f"fault script {path}"))


def parse_script(data: Mapping[str, object], name: str = "fault script") -> Script:
    """Make a script from parsed TOML: `[[rule]]` tables and an optional `seed`. name: begins error messages."""
    return _script(Table(name, data))


def _script(table: Table) -> Script:
    if unknown := sorted({*table.rest()} - {"rule", "seed"}):
        raise table.wrong(f"unknown key {unknown[0]}; there are: seed, rule (as [[rule]])")
    seed = table.take("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise table.wrong(f"seed: want a whole number, not {seed!r}")
    return Script(tuple(map(_rule, table.tables("rule"))), seed)


def _rule(table: Table) -> Rule:
    do = table.take("do")
    if not isinstance(do, str) or do not in RULES:
        problem = "do: is missing" if do is None else f"do: unknown fault {do!r}"
        raise table.wrong(f"{problem}; there are: {', '.join(RULES)}")
    known = [field.name for field in fields(RULES[do])]
    if unknown := sorted({*table.rest()} - {*known}):
        raise UsageError(f"{table.name} ({do}): unknown key {unknown[0]}; there are: {', '.join(known)}")
    # Values may have any type here: each rule checks its own.
    make: Callable[..., Rule] = RULES[do]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.take_rest().items()}
    try:
        return make(**values)
    except UsageError as error:
        raise UsageError(f"{table.name} ({do}): {error}") from None


def ranges(key: str, value: Numbers | None) -> tuple[tuple[int, int | None], ...] | None:
    """Parse `2`, `"5-9"`, `"3-"` or `(1, "4-6")` into (first, last) of each range; last: None if the end is open.

    key: begins the message of the UsageError for a malformed value.
    """
    if value is None:
        return None
    parts: Sequence[object] = value if isinstance(value, tuple) else (value,)
    return tuple(_range(key, part) for part in parts)


def _range(key: str, part: object) -> tuple[int, int | None]:
    if isinstance(part, int) and not isinstance(part, bool) and part >= 0:
        return part, part
    if isinstance(part, str):
        first, dash, last = (text.strip() for text in part.partition("-"))
        if first.isdecimal() and (last.isdecimal() or (dash and not last) or not dash):
            end = (int(last) if last else None) if dash else int(first)
            if end is None or int(first) <= end:
                return int(first), end
    raise UsageError(f'{key}: want a number, a range "5-9" or "3-", or a list of them, not {part!r}')


def _one_of(key: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        problem = f"unknown {value!r}" if value else "is missing"
        raise UsageError(f"{key}: {problem}; there are: {', '.join(words)}")


def _positive(key: str, value: object, kind: type[float]) -> None:
    is_whole = kind is int
    if value is not None and not (_is_number(value) and value > 0 and (isinstance(value, int) or not is_whole)):
        raise UsageError(f"{key}: want a {'whole ' * is_whole}number above 0, not {value!r}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
