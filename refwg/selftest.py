"""Check allowed-ips, replay window, rate limiter and primitives: `refwg selftest`.

Mirrors selftest/allowedips.c, selftest/counter.c and selftest/ratelimiter.c, which debug builds of the driver run when
it is loaded, and the known answers of lib/crypto. The source of each answer is named beside it. The checks need no
network, no privilege and no test suite.
"""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING, Final

from refwg import crypto
from refwg.allowedips import AllowedIPs, Prefix
from refwg.counter import ReplayWindow
from refwg.errors import CheckFailed, LowOrderPoint, NotAuthentic
from refwg.messages import REJECT_AFTER_MESSAGES, SECOND
from refwg.noise import INITIAL_HASH
from refwg.ratelimiter import RateLimiter

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIXES: Final = 400
_LOOKUPS: Final = 4000


def main() -> int:
    """Run all checks and print the result and time of each; returns the exit status, 1 if a check failed."""
    failed = 0
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            check()
            result = "ok"
        except Exception as error:  # noqa: BLE001 - after any failure the other checks are run too
            result = f"FAILED: {type(error).__name__}: {error}"
            failed += 1
        sys.stdout.write(f"{name:<44} {time.perf_counter() - started:6.3f} s  {result}\n")
    sys.stdout.write(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed\n")
    return 1 if failed else 0


def _expect(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise CheckFailed(f"{what}: {actual!r}, expected {expected!r}")


# allowedips: the trie against a list that is searched from one end to the other.


def _trie_agrees_with_a_list(width: int) -> None:
    rng = random.Random(width)  # noqa: S311 - the same prefixes in every run
    table: AllowedIPs[int] = AllowedIPs()
    listed: dict[tuple[int, int], int] = {}
    for number in range(_PREFIXES):
        length = rng.randint(0, width)
        # Only 64 different beginnings, so that prefixes contain each other.
        bits = (rng.getrandbits(6) << width - 6 | rng.getrandbits(width - 6)) >> width - length << width - length
        table.insert(Prefix(bits.to_bytes(width // 8), length), number % 7)
        listed[bits, length] = number % 7
        if number % 5 == 0:
            removed = rng.choice(list(listed))
            table.remove(Prefix(removed[0].to_bytes(width // 8), removed[1]), listed.pop(removed))
    for _ in range(_LOOKUPS):
        address = rng.choice(list(listed))[0] ^ rng.getrandbits(width) >> rng.randint(0, width - 1)
        owners = [(length, owner) for (bits, length), owner in listed.items() if _is_in(address, bits, length, width)]
        expected = max(owners, default=(0, None))[1]
        _expect(f"owner of {address:#x}", table.lookup(address.to_bytes(width // 8)), expected)


def _is_in(address: int, bits: int, length: int, width: int) -> bool:
    return (address ^ bits) >> width - length == 0


# counter: the counters in the order in which one window receives them, and whether it accepts each.

_WINDOW: Final = 8192 - 64
_COUNTERS: Final = (
    (0, True), (0, False), (1, True), (9, True), (8, True), (7, True), (7, False), (_WINDOW, True), (_WINDOW - 1, True),
    (_WINDOW - 1, False), (2, True), (2, False), (_WINDOW + 16, True), (3, False), (_WINDOW + 16, False),
    (_WINDOW * 4, True), (9 + 3 * 8192, True), (_WINDOW * 4 - (_WINDOW - 1), True), (10, False),
    (_WINDOW * 4 - _WINDOW, True), (_WINDOW * 4 - (_WINDOW + 1), False), (_WINDOW * 4 - (_WINDOW - 2), True),
    (_WINDOW * 4 + 1 - _WINDOW, False),
    (0, False), (REJECT_AFTER_MESSAGES, False), (REJECT_AFTER_MESSAGES - 1, True), (REJECT_AFTER_MESSAGES, False),
    (REJECT_AFTER_MESSAGES - 1, False), (REJECT_AFTER_MESSAGES - 2, True), (REJECT_AFTER_MESSAGES + 1, False),
    (REJECT_AFTER_MESSAGES + 2, False), (REJECT_AFTER_MESSAGES - 2, False), (REJECT_AFTER_MESSAGES - 3, True),
    (0, False),
)  # fmt: skip


def _replay_window() -> None:
    counter = ReplayWindow()
    for step, (number, expected) in enumerate(_COUNTERS):
        is_fresh = counter.is_fresh(number)
        _expect(f"step {step}, counter {number}", is_fresh, expected)
        if is_fresh:
            counter.accept(number)


# ratelimiter: milliseconds since the previous message, and whether this one is allowed.

_ARRIVALS: Final = (
    (0, True), (0, True), (0, True), (0, True), (0, True), (0, False), (50, True), (25, False), (25, True), (100, True),
    (0, True), (0, False), (1000, True), (0, True), (0, True), (0, True), (0, True), (0, False),
)  # fmt: skip


def _rate_limiter() -> None:
    limiter, now = RateLimiter(), SECOND
    for step, (milliseconds, expected) in enumerate(_ARRIVALS):
        now += milliseconds * SECOND // 1000
        for source in (bytes([10, 0, 0, 1]), bytes(15) + b"\1"):
            _expect(f"step {step}, address of {len(source)} bytes", limiter.allow(source, now), expected)


# crypto: known answers of RFC 7748 (5.2), of RFC 7693 (appendix B), and of a handshake with fixed keys in which the
# driver and wireguard-go give the same bytes (selftests/vectors/wireguard.json).

_SCALAR: Final = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
_POINT: Final = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
_SHARED: Final = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
_DIGEST_OF_ABC: Final = "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982"
_INITIAL_HASH: Final = "2211b361081ac566691243db458ad5322d9c6c662293e8b70ee19c65ba079ef3"
_SESSION_KEY: Final = "a007faf842d83f5bd3be20a14e0ffcec34c84867b78b051980602713205922de"
_SEALED_NOTHING: Final = "f1bce9fd9651b3f6b50c00179cbd1e01"
_RESPONDER: Final = bytes([0x22] * 32)
_INITIATION_UP_TO_MAC2: Final = (
    "01000000040302017b0d47d93427f8311160781c7c733fd89f88970aef490d8aa0ee19a4cb8a1b1481e498317da959fba46669572516a5e6c021"
    "bfa620bb6c56ca0082e1feae14988c2c64d024c617734a263f76a008df04d0f94bad8ee75ec8e1c26955d72d5dc0a3c87d5e6db7cf66723bf09d"
    "cbc0595bbe37451384922dda1f532802"
)
_COOKIE: Final = bytes(range(0xA0, 0xB0))
_MAC2: Final = "fa71dc882ebfcec6f2558f0ffaa0b6c9"
_SEALED_COOKIE: Final = "ba9041de2f6ecf7c7426c20b9219bb846cba5efda47c2433e046b3b3ae285036"


def _x25519() -> None:
    _expect("shared secret", crypto.dh(bytes.fromhex(_SCALAR), bytes.fromhex(_POINT)).hex(), _SHARED)
    try:
        crypto.dh(bytes.fromhex(_SCALAR), bytes(32))
    except LowOrderPoint:
        return
    raise CheckFailed("a point of low order was accepted")


def _blake2s() -> None:
    _expect("digest of 'abc'", crypto.blake2s_hash(b"a", b"bc").hex(), _DIGEST_OF_ABC)
    _expect("initial hash", INITIAL_HASH.hex(), _INITIAL_HASH)


def _keyed_blake2s() -> None:
    initiation = bytes.fromhex(_INITIATION_UP_TO_MAC2)
    key = crypto.blake2s_hash(b"mac1----", crypto.public_key_of(_RESPONDER))
    _expect("mac1", crypto.mac(key, initiation[:-16]), initiation[-16:])
    _expect("mac2", crypto.mac(_COOKIE, initiation).hex(), _MAC2)


def _aead() -> None:
    cipher = crypto.Aead(bytes.fromhex(_SESSION_KEY))
    _expect("sealed keepalive", cipher.seal(0, b"").hex(), _SEALED_NOTHING)
    _expect("plaintext of the keepalive", cipher.open(0, bytes.fromhex(_SEALED_NOTHING)), b"")
    for counter, change in ((1, 0), (0, 1)):
        forged = bytearray.fromhex(_SEALED_NOTHING)
        forged[0] ^= change
        try:
            cipher.open(counter, bytes(forged))
        except NotAuthentic:
            continue
        raise CheckFailed("a forged message was accepted")


def _xaead() -> None:
    key = crypto.blake2s_hash(b"cookie--", crypto.public_key_of(_RESPONDER))
    mac1 = bytes.fromhex(_INITIATION_UP_TO_MAC2)[-16:]
    _expect("sealed cookie", crypto.xseal(key, bytes(range(24)), _COOKIE, mac1).hex(), _SEALED_COOKIE)
    _expect("opened cookie", crypto.xopen(key, bytes(range(24)), bytes.fromhex(_SEALED_COOKIE), mac1), _COOKIE)


CHECKS: Final[dict[str, Callable[[], None]]] = {
    "allowed-ips: IPv4 trie against a list": lambda: _trie_agrees_with_a_list(32),
    "allowed-ips: IPv6 trie against a list": lambda: _trie_agrees_with_a_list(128),
    "replay window": _replay_window,
    "rate limiter": _rate_limiter,
    "X25519": _x25519,
    "BLAKE2s": _blake2s,
    "keyed BLAKE2s: mac1 and mac2": _keyed_blake2s,
    "ChaCha20-Poly1305": _aead,
    "XChaCha20-Poly1305": _xaead,
}
