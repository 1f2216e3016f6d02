"""Flood a WireGuard port with datagrams.

    python -m selftests.support.attack KIND COUNT RATE PORT KEY

KIND: `garbage` (random bytes), `initiations` (with a wrong mac1) or `forged` (initiations with a correct mac1, which
cost the target more). COUNT: datagrams to send. RATE: datagrams per second; 0 means no limit. PORT: the target's UDP
port at 127.0.0.1. KEY: the target's public key in hexadecimal. Prints how many datagrams were sent, and the rate.
"""

from __future__ import annotations

import random
import signal
import socket
import sys
import time
from hashlib import blake2s
from typing import TYPE_CHECKING, Final

from harness.wait import let_pass

if TYPE_CHECKING:
    from collections.abc import Callable

INITIATION_UP_TO_MAC1: Final = 116  # bytes; the whitepaper's section 5.4.2
BURST: Final = 64  # datagrams that are sent between two checks of the rate
VARIETY: Final = 256  # datagrams that are built in advance, and then sent in turn


def garbage(rng: random.Random, _: bytes) -> bytes:
    """Return random bytes; lengths include those of all four messages, and an initiation's plus and minus one."""
    return rng.randbytes(rng.choice([0, 1, 31, 32, 64, 92, 147, 148, 149, 1000]))


def initiation(rng: random.Random, _: bytes) -> bytes:
    """Return an initiation with random fields; its mac1 is wrong."""
    return b"\1\0\0\0" + rng.randbytes(144)


def forged(rng: random.Random, public_key: bytes) -> bytes:
    """Return an initiation with random fields and a correct mac1.

    Without load, the target computes a Diffie-Hellman before it finds out that the initiation is forged.
    """
    start = b"\1\0\0\0" + rng.randbytes(INITIATION_UP_TO_MAC1 - 4)
    key = blake2s(b"mac1----" + public_key).digest()
    return start + blake2s(start, key=key, digest_size=16).digest() + bytes(16)


KINDS: Final[dict[str, Callable[[random.Random, bytes], bytes]]] = {
    "garbage": garbage,
    "initiations": initiation,
    "forged": forged,
}


def main() -> None:
    """Send the flood that the command line asks for."""
    kind, count, rate, port, key = sys.argv[1:]
    rng = random.Random(kind)  # noqa: S311 - not a secret
    datagrams = [KINDS[kind](rng, bytes.fromhex(key)) for _ in range(VARIETY)]
    started, sent = time.monotonic(), 0

    def end(*_: object) -> None:
        """End the flood early; the line with the rate is printed all the same."""
        report(sent, started)
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", int(port)))
        for number in range(int(count)):
            sender.send(datagrams[number % VARIETY])
            sent = number + 1
            if number % BURST:
                continue
            ahead = number / int(rate) - (time.monotonic() - started) if int(rate) else 0
            if ahead > 0:
                let_pass(ahead, "the rate of the flood")
    report(sent, started)


def report(sent: int, started: float) -> None:
    """Print how many datagrams were sent since `started`, and their rate."""
    sys.stdout.write(f"{sent} {sent / (time.monotonic() - started):.0f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
