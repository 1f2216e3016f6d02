"""Refuse replayed data packets: the replay window of counters already received.

Mirrors counter_validate in receive.c and selftest/counter.c of the driver; RFC 6479; section 5.4.6 of the paper.
"""

from __future__ import annotations

from typing import Final

from refwg.messages import COUNTER_BITS_PER_WORD, COUNTER_BITS_TOTAL, COUNTER_WINDOW_SIZE, REJECT_AFTER_MESSAGES

_WORDS: Final = COUNTER_BITS_TOTAL // COUNTER_BITS_PER_WORD
_ALL_BITS: Final = (1 << COUNTER_BITS_PER_WORD) - 1


class ReplayWindow:
    """A ring of 64-bit words with one bit per counter; words are cleared as the highest counter moves over them.

    There are two steps, because only an authenticated message may move the window. Call `is_fresh` before the tag is
    checked, so that a replay costs no decryption. Call `accept` after the tag has verified.
    """

    __slots__ = ("_next", "_seen")

    def __init__(self) -> None:
        self._next = 0
        self._seen = [0] * _WORDS

    @property
    def is_exhausted(self) -> bool:
        """True after REJECT_AFTER_MESSAGES - 1, the last valid counter, was received: nothing more is accepted."""
        # decrypt_packet: treated like an expired session
        return self._next >= REJECT_AFTER_MESSAGES

    def is_fresh(self, counter: int) -> bool:
        """Return True if the counter is below the limit, not behind the window and not yet received."""
        # 6.2: nothing at or beyond REJECT_AFTER_MESSAGES; counter_validate: nothing behind the window
        if counter >= REJECT_AFTER_MESSAGES or counter + COUNTER_WINDOW_SIZE + 1 < self._next:
            return False
        if counter >= self._next:
            return True
        # 5.4.6: counters may arrive out of order, but each only once
        word, bit = divmod(counter, COUNTER_BITS_PER_WORD)
        return not self._seen[word % _WORDS] >> bit & 1

    def accept(self, counter: int) -> None:
        """Mark a counter as received; the caller has called `is_fresh` and has verified the tag."""
        # counter_validate: the words between the old and the new highest counter are cleared (RFC 6479)
        word, bit = divmod(counter, COUNTER_BITS_PER_WORD)
        if counter >= self._next:
            # The next counter within a word moves over none.
            if counter != self._next or not bit:
                self._clear_up_to(word)
            self._next = counter + 1
        self._seen[word % _WORDS] |= 1 << bit

    def is_next_run(self, first: int, last: int) -> bool:
        """Return True if the counters `first` to `last` are above all that were received, and below the limit."""
        return self._next <= first <= last < REJECT_AFTER_MESSAGES

    def accept_run(self, first: int, last: int) -> None:
        """Mark the counters `first` to `last`, for which `is_next_run` is True, as received."""
        word = last // COUNTER_BITS_PER_WORD
        self._clear_up_to(word)
        self._next = last + 1
        bits = ((2 << (last - first)) - 1) << (first % COUNTER_BITS_PER_WORD)
        for number in range(first // COUNTER_BITS_PER_WORD, word + 1):
            self._seen[number % _WORDS] |= bits & _ALL_BITS
            bits >>= COUNTER_BITS_PER_WORD

    def _clear_up_to(self, word: int) -> None:
        newest = (self._next - 1) // COUNTER_BITS_PER_WORD
        for stale in range(newest + 1, min(word, newest + _WORDS) + 1):
            self._seen[stale % _WORDS] = 0
