"""Define the inputs of a fuzzer: cases, steps, and changes of bytes.

A case is what to do, not the bytes of it: a handshake depends on what the device answers. Played again, with other keys
and at another time, a case brings a device into the same state. Its text form is JSON, one case per file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from harness.errors import UsageError

# What a step does; `argument` and `counter` are explained where they are used.
INITIATION: Final = "initiation"  # send an initiation; argument: a timestamp in place of the right one
RESPONSE: Final = "response"  # answer the device's last initiation; argument: a payload that should not be there
COOKIE: Final = "cookie"  # answer the device's last handshake message by a cookie reply; argument: the cookie
DATA: Final = "data"  # send data on the newest session; argument: the plaintext
BYTES: Final = "bytes"  # send the argument as it is
REPLAY: Final = "replay"  # send an earlier datagram again; counter: how many datagrams back
HOLD: Final = "hold"  # let the next datagram be overtaken by the one after it
TRIGGER: Final = "trigger"  # let the device send a packet to this peer
WAIT: Final = "wait"  # let time pass; counter: milliseconds. Over sockets nothing waits
LOAD: Final = "load"  # bring the device under load; in process only
UAPI: Final = "uapi"  # send the argument to the control socket
STEPS: Final = (INITIATION, RESPONSE, COOKIE, DATA, BYTES, REPLAY, HOLD, TRIGGER, WAIT, LOAD, UAPI)

# What a change does with the bytes of a message.
WRITE, XOR, INSERT, CUT, APPEND = "write", "xor", "insert", "cut", "append"
CHANGES: Final = (WRITE, XOR, INSERT, CUT, APPEND)


class Change(NamedTuple):
    """A change of the bytes of a message.

    WRITE: overwrite from byte `at` on; XOR: the same, by exclusive or; neither makes it longer. INSERT: before byte
    `at`. CUT: to `at` bytes. APPEND: `data` at the end.
    """

    kind: str
    at: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Step:
    """What the hostile peer does once.

    kind: one of STEPS. argument: bytes; empty: what a correct peer sends. counter: of data, in place of the next one,
    and what the kind says. changes: of the message, in order. is_sealed: the macs are computed after the changes.
    """

    kind: str
    argument: bytes = b""
    counter: int | None = None
    changes: tuple[Change, ...] = ()
    is_sealed: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """An input of the fuzzer. state: the name of the state that its first steps reach."""

    state: str
    steps: tuple[Step, ...]

    def to_json(self) -> str:
        """Return the case as one line of JSON."""
        return json.dumps({"state": self.state, "steps": [_step_to_json(step) for step in self.steps]})

    @classmethod
    def from_json(cls, text: str, where: str = "case") -> Case:
        """Read what `to_json` wrote; where: begins the error. Raises UsageError."""
        try:
            read = json.loads(text)
            return cls(str(read["state"]), tuple(_step_from_json(step) for step in read["steps"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where}: not a case of wg-interop fuzz: {error}") from error


def apply(changes: tuple[Change, ...], message: bytes) -> bytes:
    """Return the message with all changes, in order; an offset beyond its end means its end."""
    for kind, at, data in changes:
        at = min(at, len(message))  # noqa: PLW2901 - the offset that applies
        if kind == CUT:
            message = message[:at]
        elif kind == APPEND:
            message += data
        elif kind == INSERT:
            message = message[:at] + data + message[at:]
        else:
            old = message[at : at + len(data)]
            new = data[: len(old)] if kind == WRITE else bytes(a ^ b for a, b in zip(old, data, strict=False))
            message = message[:at] + new + message[at + len(old) :]
    return message


def _step_to_json(step: Step) -> dict[str, Any]:
    written: dict[str, Any] = {"do": step.kind}
    if step.argument:
        written["argument"] = step.argument.hex()
    if step.counter is not None:
        written["counter"] = step.counter
    if step.changes:
        written["changes"] = [[kind, at, data.hex()] for kind, at, data in step.changes]
        written["sealed"] = step.is_sealed
    return written


def _step_from_json(read: dict[str, Any]) -> Step:
    changes = tuple(Change(str(kind), int(at), bytes.fromhex(data)) for kind, at, data in read.get("changes", ()))
    counter = read.get("counter")
    step = Step(
        kind=read["do"],
        argument=bytes.fromhex(read.get("argument", "")),
        counter=None if counter is None else int(counter),
        changes=changes,
        is_sealed=bool(read.get("sealed", True)),
    )
    if step.kind not in STEPS or any(change.kind not in CHANGES or change.at < 0 for change in changes):
        raise ValueError(f"unknown step or change in {read}")
    return step
