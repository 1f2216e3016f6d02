"""Group failures by cause: a deviation that shows in twelve tests has twelve witnesses.

Failures have the same cause if the first lines of their messages differ only in numbers, keys, addresses, names and a
word in parentheses, and if the same programs are to blame. If that line is too general, such as a bare assertion, the
test must be the same too. A blocked test has the cause of the failure that its positive control has met.
The program to blame is the one that reruns name (blame.py); without reruns it is the one that the failures have in
common.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence


class Witness(Protocol):
    """The fields of a result from which its cause is found; `Result` of results.py has them."""

    @property
    def id(self) -> str: ...
    @property
    def pair(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def requirements(self) -> Sequence[str]: ...
    @property
    def bugs(self) -> Sequence[str]: ...
    @property
    def blamed(self) -> tuple[str, ...] | None: ...
    @property
    def is_inferred(self) -> bool: ...


_W = TypeVar("_W", bound=Witness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause(Generic[_W]):
    """Results that fail by the same deviation, in the order of their ids.

    programs: the program to blame; several if any of them may be; empty for tests without an implementation.
    """

    fingerprint: str
    programs: tuple[str, ...]
    witnesses: tuple[_W, ...]

    @property
    def typical(self) -> _W:
        """The witness whose message is shown: the first one with the most frequent message, rather not blocked."""
        messages = Counter(witness.message for witness in self.witnesses)
        return max(self.witnesses, key=lambda witness: (witness.state != "blocked", messages[witness.message]))

    @property
    def states(self) -> list[tuple[str, int]]:
        """The number of witnesses in each state."""
        return list(Counter(witness.state for witness in self.witnesses).items())

    @property
    def requirements(self) -> list[str]:
        """The ids of all requirements that the witnesses check, those that most of them check first."""
        return _most_cited(witness.requirements for witness in self.witnesses)

    @property
    def bugs(self) -> list[str]:
        """The ids of all defects of real programs that the witnesses look for, the most frequent first."""
        return _most_cited(witness.bugs for witness in self.witnesses)

    @property
    def blame(self) -> str:
        """The programs as text: `mine`, or `mine or wireguard-go`; empty for tests without an implementation."""
        if not self.programs and self.proof is not None:
            return "the test or the machine"
        return " or ".join(self.programs)

    @property
    def proof(self) -> _W | None:
        """The first witness whose reruns name the programs to blame; None if those of no witness do."""
        named = [witness for witness in self.witnesses if witness.blamed is not None]
        return min(named, key=lambda witness: witness.is_inferred, default=None)


# Requirements, and bugs, of a cause that people are shown; results.json has all.
CITED: Final = 5


def _most_cited(citations: Iterable[Sequence[str]]) -> list[str]:
    """Return each id once, the one that most tests cite first."""
    return [name for name, _ in Counter(name for names in citations for name in dict.fromkeys(names)).most_common()]


def find_causes(failed: Iterable[_W], passed: Iterable[Witness] = ()) -> list[Cause[_W]]:
    """Group these failures by cause, the cause with the most witnesses first, then the one that says most.

    passed: results that clear a program, because it passes the same test with another peer.
    """
    alike: dict[str, list[_W]] = {}
    for witness in sorted(failed, key=lambda witness: witness.id):
        alike.setdefault(_deviation(witness), []).append(witness)
    passes = {part for witness in passed for part in _parts(witness)}
    found = [
        Cause(fingerprint=text, programs=programs, witnesses=tuple(of_program))
        for text, witnesses in alike.items()
        for programs, of_program in _by_program(witnesses, passes)
    ]
    return sorted(found, key=_rank)


def _rank(cause: Cause[_W]) -> tuple[object, ...]:
    """Return what orders causes: of equally frequent ones, the first one says best what the program does."""
    return (
        -len(cause.witnesses),
        # Under load much goes wrong at once.
        all(_UNDER_LOAD.search(witness.id) for witness in cause.witnesses),
        # The positive control of a blocked test is about another rule than the test.
        all(witness.state == "blocked" for witness in cause.witnesses),
        # One requirement names the rule; a test of several, or of none, does not.
        len(cause.requirements) or math.inf,
        cause.programs,
        cause.fingerprint,
    )


# The files of tests under floods and load.
_UNDER_LOAD: Final = re.compile(r"\btest_(?:\w+_under_)?(?:floods|load)\.py::")


def tally_of_causes(failures: int, causes: int) -> str:
    """Format two numbers as `38 failures of 7 causes`."""
    return f"{failures} failure{'s' * (failures != 1)} of {causes} cause{'s' * (causes != 1)}"


def tally_by_program(causes: Iterable[Cause[_W]]) -> list[str]:
    """Return `mine: 30 failures of 5 causes` for each program to blame, the one with the most failures first."""
    failures: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for cause in causes:
        failures[cause.blame] += len(cause.witnesses)
        number[cause.blame] += 1
    return [f"{blame or 'no program'}: {tally_of_causes(n, number[blame])}" for blame, n in failures.most_common()]


# The program to blame


def _by_program(witnesses: Sequence[_W], passes: Collection[_Part]) -> list[tuple[tuple[str, ...], list[_W]]]:
    """Split equal failures by the program to blame: whom their reruns name, then whoever is in most of those left."""
    found = _by_reruns(witnesses)
    taken_already = {id(witness) for _, taken in found for witness in taken}
    left = [witness for witness in witnesses if id(witness) not in taken_already]
    while left:
        counts = Counter(name for witness in left for name in _names(witness))
        # If two programs are in as many failures, blame the one that also fails with itself.
        alone = Counter(name for witness in left if len(names := _names(witness)) == 1 for name in names)
        chosen = min(counts, key=lambda name: (-counts[name], -alone[name], name), default="")
        taken = [witness for witness in left if not chosen or chosen in _names(witness)]
        left = [witness for witness in left if chosen and chosen not in _names(witness)]
        found.append((_suspects(taken, passes) if chosen else (), taken))
    return found


def _by_reruns(witnesses: Sequence[_W]) -> list[tuple[tuple[str, ...], list[_W]]]:
    """Return the failures whose reruns name a program, by program; with each, equal ones that were not run again."""
    named: dict[tuple[str, ...], list[_W]] = {}
    for witness in witnesses:
        if witness.blamed is not None:
            named.setdefault(tuple(sorted(witness.blamed)), []).append(witness)
    # One program explains more than two that fail only together.
    order = sorted((names for names in named if names), key=lambda names: (len(names), -len(named[names]), names))
    for witness in witnesses:
        if witness.blamed is None and witness.state != "flaky":
            names = next((names for names in order if _names(witness).issuperset(names)), None)
            if names is not None:
                named[names].append(witness)
    return [(names, sorted(found, key=lambda witness: witness.id)) for names, found in named.items()]


def _suspects(taken: Sequence[_W], passes: Collection[_Part]) -> tuple[str, ...]:
    """Return the programs that are in all of these tests, without those that pass all of them with another peer."""
    common = sorted(frozenset.intersection(*(_names(witness) for witness in taken)))

    def is_cleared(name: str) -> bool:
        parts = [part for witness in taken for part in _parts(witness) if part.program == name]
        return all(
            any(one.test == part.test and one.program == name and one.side == part.side and one.peer != part.peer
                for one in passes)
            for part in parts
        )  # fmt: skip

    return tuple(name for name in common if len(common) == 1 or not is_cleared(name)) or tuple(common)


class _Part(NamedTuple):
    """One side of a result. test: its id without the implementations. side: 0 for A, 1 for B."""

    test: str
    program: str
    side: int
    peer: str


def _parts(witness: Witness) -> list[_Part]:
    name, _, parameters = witness.id.partition("[")
    test = f"{name}[{parameters.removesuffix(']').removeprefix(witness.pair)}"
    a, _, b = witness.pair.partition("~")
    return [_Part(test, a, 0, b), _Part(test, b, 1, a)]


def _names(witness: Witness) -> frozenset[str]:
    return frozenset(witness.pair.split("~")[judged_side(witness.id)]) - {""}


# The id of a result of the oracle: it is about one side of its pair only.
_OF_ORACLE: Final = re.compile(r"oracle::.*-([ab])\]")


def judged_side(name: str) -> slice:
    """Return which programs of its pair a result is about, by its id: one for a result of the oracle, else both."""
    match = _OF_ORACLE.fullmatch(name)
    return slice(None) if match is None else slice(0, 1) if match[1] == "a" else slice(1, 2)


# Fingerprints of messages

# First lines that fit many defects: the test's name becomes part of the fingerprint.
_SAYS_LITTLE: Final = re.compile(r"$|assert |Timeout \(?>|DID NOT RAISE|[\w.]+(Error|Exception|Exit)\b")
# Left out, because it differs from run to run: what was seen while waiting, and the tests in which the oracle saw it.
_SEEN: Final = re.compile(r"; (?:seen: |in (?:\d+ tests, first in )?[\w./-]+\.py::).*")
# The attribute that an assertion compared, in pytest's line `where 0 = PeerState(...).rx_bytes`.
_COMPARED: Final = re.compile(r"(?:where|and) +\S.* = .*[\w)\]]\.(\w+)(?:\(.*\))?$", re.MULTILINE)
_LIST: Final = re.compile(r"\[#(?:, (?:and )?#(?: more)?)*\]")
_GENERAL: Final[tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = (
    (re.compile(r"\b[\w+/]{42,43}=|\b[\w+/]{8}\.\.\.="), "KEY"),
    (re.compile(r"\b0x[0-9a-f]+\b|\b(?=[a-f]*\d)[0-9a-f]{8,}\b"), "#"),
    # An address with its port, scope or prefix length: IPv6 in brackets, IPv4, then IPv6 without brackets.
    (re.compile(r"\[[0-9a-f]*:[0-9a-f:.]+(?:%\w+)?\](?::\d+)?", re.IGNORECASE), "ADDRESS"),
    (re.compile(r"\b\d+\.\d+\.\d+\.\d+(?:[:/]\d+)?"), "ADDRESS"),
    (re.compile(r"(?<![\w:])(?:[0-9a-f]{1,4}(?=:[0-9a-f]*:)|(?=::))[0-9a-f:]*(?:[0-9a-f]|::)(?:[/%]\w+)?(?!\w|:\w)",
                re.IGNORECASE), "ADDRESS"),
    (re.compile(r"\b0 of\b"), "none of"),
    # The id of a requirement, such as RT-11, stays, as do mac1 and mac2: they name what is compared.
    (re.compile(r"\b([A-Z]{2,5}-\d+|mac[12])\b|(?<![\w.])[+-]?\d+(?:\.\d+)?|\d+"), lambda found: found[1] or "#"),
    (re.compile(r"\b[AB]\b"), "SIDE"),
)  # fmt: skip


def fingerprint(witness: Witness) -> str:
    """Return a text that is equal for all messages of one deviation: without numbers, keys, addresses, sides, peers."""
    return _fingerprint(witness, witness.message)


# What a positive control shows, before the reason why it failed (harness/plugin/verdicts.py).
_CONTROL: Final = re.compile(r"positive control failed: .*?: ")
# One to three words in parentheses: the variant of the test, as in `a refused message (too old) moved data`.
_VARIANT: Final = re.compile(r" \([a-z#][\w#'-]*(?: [\w#'-]+){0,2}\)")
# What is wrong with a part of a message, whichever message that is: `mac2 of the next response is X, expected Y`. Both
# are words only, else they say little.
_PART: Final = re.compile(r"([a-z]\w*) of .+? is ([^#A-Z]+, expected [^#A-Z]+)")


def _deviation(witness: Witness) -> str:
    """Return a text that is equal for all failures of one cause: a fingerprint without what differs among its tests.

    A baseline compares fingerprints, because there another variant of the test is another failure.
    """
    message = witness.message.strip()
    control = _CONTROL.match(message)
    text = _VARIANT.sub("", _fingerprint(witness, message[control.end() :] if control else message))
    part = _PART.fullmatch(text)
    return f"{part[1]} is {part[2]}" if part else text


def _fingerprint(witness: Witness, message: str) -> str:
    first, _, rest = message.strip().partition("\n")
    first = _SEEN.sub("", first)
    clue = _generalise(first, _names(witness))
    if not _SAYS_LITTLE.match(first):
        return clue
    return " | ".join([clue, *sorted(set(_COMPARED.findall(rest))), witness.id.partition("[")[0]])


def essence(message: str) -> str:
    """Return the lines of a message that its fingerprint is made of; they have the same fingerprint."""
    first, _, rest = message.strip().partition("\n")
    first = _SEEN.sub("", first)
    compared = [found[0] for found in _COMPARED.finditer(rest)] if _SAYS_LITTLE.match(first) else []
    return "\n".join([first, *compared])


def _generalise(text: str, programs: Iterable[str]) -> str:
    for name in sorted(programs, key=len, reverse=True):
        text = re.sub(rf"(?<![\w+-]){re.escape(name)}(?![\w+-])", "PROGRAM", text)
    for pattern, word in _GENERAL:
        text = pattern.sub(word, text)
    return _LIST.sub("[#]", text)
