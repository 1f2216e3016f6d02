"""Send what an attacker would: `python -m bench.attack KIND COUNT RATE PORT KEY`.

KIND: `garbage` (random bytes of random lengths), `initiations` (well formed, with a wrong mac1) or `forged` (with the
right mac1, so that more is to be done until it fails). RATE: datagrams a second, 0 without limit. KEY: that of
the target at 127.0.0.1, in hexadecimal digits. Writes how many datagrams the stack took, and how many a second.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from hashlib import blake2s
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

INITIATION_UP_TO_MAC1: Final = 116
AT_ONCE: Final = 64
VARIETY: Final = 256


def garbage(chance: random.Random, _: bytes) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 31, 32, 64, 92, 147, 148, 149, 1000]))


def initiation(chance: random.Random, _: bytes) -> bytes:
    return b"\1\0\0\0" + chance.randbytes(144)


def forged(chance: random.Random, public_key: bytes) -> bytes:
    start = b"\1\0\0\0" + chance.randbytes(INITIATION_UP_TO_MAC1 - 4)
    key = blake2s(b"mac1----" + public_key).digest()
    return start + blake2s(start, key=key, digest_size=16).digest() + bytes(16)


KINDS: Final[dict[str, Callable[[random.Random, bytes], bytes]]] = {
    "garbage": garbage,
    "initiations": initiation,
    "forged": forged,
}


def main() -> None:
    kind, count, rate, port, key = sys.argv[1:]
    chance = random.Random(kind)  # noqa: S311 - not a secret
    datagrams = [KINDS[kind](chance, bytes.fromhex(key)) for _ in range(VARIETY)]
    started, taken = time.monotonic(), 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", int(port)))
        for number in range(int(count)):
            taken += sender.send(datagrams[number % VARIETY]) >= 0
            ahead = number / int(rate) - (time.monotonic() - started) if int(rate) and number % AT_ONCE == 0 else 0
            if ahead > 0:
                time.sleep(ahead)
    sys.stdout.write(f"{taken} {taken / (time.monotonic() - started):.0f}\n")


if __name__ == "__main__":
    main()
