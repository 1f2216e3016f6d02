"""Describe findings: what the device did, and the cases that make it do so, as a test."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.fuzz.inputs import Case, Change, Step

# The kinds of findings; a reduced input must lead to the same kind.
RAISED: Final = "raised"
DIED: Final = "died"
ANSWERED: Final = "answered wrongly"
SILENT: Final = "serves no legitimate peer"
GREW: Final = "grew"
SPINS: Final = "spins"
UNCOUNTED: Final = "uncounted"
CONTROL: Final = "control socket"
_ZEROS: Final = re.compile(rb"(\0{12,})")


class Finding(HarnessError, AssertionError):
    """The device did what a correct device does not do; the message says what, in the words of the protocol.

    kind: one of the kinds above. detail: more lines, such as a traceback.
    """

    def __init__(self, kind: str, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.detail = detail


def as_test(cases: Sequence[Case], finding: Finding, *, origin: str, engine: str = "", repeat: int = 1) -> str:
    """Return a test for selftests/ that plays the cases.

    origin: the command that found them. engine: of refwg, for a run in process; empty: over sockets. repeat: how often
    they are played, if one time does not always lead to the finding.
    """
    names = sorted({"Case", "Step", *({"Change"} if any(s.changes for case in cases for s in case.steps) else ())})
    name = f"test_hostile_input_{finding.kind.replace(' ', '_')}"
    shown = ",\n".join(f"    {_case(case)}" for case in cases)
    times = f" * {repeat}" if repeat > 1 else ""
    if engine:
        imports = "from harness.fuzz.in_process import RefwgInProcess"
        body = (
            f'def {name}() -> None:\n    device = RefwgInProcess("{engine}")\n    for case in CASES{times}:\n'
            "        device.run(case)\n    device.check()\n"
        )
    else:
        imports = "from harness.fuzz.sockets import play\nfrom harness.lab.target import Target"
        body = f"def {name}(target: Target) -> None:\n    play(target, CASES{times})\n"
    message = " ".join(str(finding).split()).replace('"""', "'''").replace("\\", "/")
    return (
        f'"""Found by `{origin}`: the device {message}."""\n\n'
        f"from __future__ import annotations\n\nfrom harness.fuzz.inputs import {', '.join(names)}\n{imports}\n\n"
        f"CASES = [\n{shown},\n]\n\n\n{body}"
    )


def _case(case: Case) -> str:
    steps = "".join(f"            {_step(step)},\n" for step in case.steps)
    return f"Case(\n        {case.state!r},\n        (\n{steps}        ),\n    )"


def _step(step: Step) -> str:
    words = [repr(step.kind)]
    if step.argument:
        words.append(f"argument={_bytes(step.argument)}")
    if step.counter is not None:
        words.append(f"counter={step.counter}")
    if step.changes:
        words.append(f"changes=({''.join(f'{_change(change)}, ' for change in step.changes)})")
        words += [] if step.is_sealed else ["is_sealed=False"]
    return f"Step({', '.join(words)})"


def _change(change: Change) -> str:
    data = f", {_bytes(change.data)}" if change.data else ""
    return f"Change({change.kind!r}, {change.at}{data})"


def _bytes(data: bytes) -> str:
    """Return Python's text for bytes, in which long runs of zeros are short."""
    parts = filter(None, _ZEROS.split(data))
    return " + ".join(f'bytes.fromhex("{part.hex()}")' if any(part) else f"bytes({len(part)})" for part in parts)
