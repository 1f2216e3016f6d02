"""Refuse replayed data packets: the replay window of counters already received.

Mirrors counter_validate in receive.c and selftest/counter.c of the driver; RFC 6479; section 5.4.6 of the paper.
"""

from __future__ import annotations

from typing import Final

from refwg.messages import COUNTER_BITS_PER_WORD, COUNTER_BITS_TOTAL, COUNTER_WINDOW_SIZE, REJECT_AFTER_MESSAGES

_WORDS: Final = COUNTER_BITS_TOTAL // COUNTER_BITS_PER_WORD


class ReplayWindow:
    """A ring of words with one bit per counter; words ahead of the highest counter are cleared when it gets there.

    Two steps, because only an authentic message may move the window: ask `is_fresh` before the tag is checked
    (it saves the work), call `accept` after.
    """

    __slots__ = ("_next", "_seen")

    def __init__(self) -> None:
        self._next = 0
        self._seen = [0] * _WORDS

    @property
    def is_exhausted(self) -> bool:
        """The last counter that exists was received: nothing can follow."""
        return self._next >= REJECT_AFTER_MESSAGES

    def is_fresh(self, counter: int) -> bool:
        """Whether this counter is neither too large, nor behind the window, nor seen before."""
        if counter >= REJECT_AFTER_MESSAGES or counter + COUNTER_WINDOW_SIZE + 1 < self._next:
            return False
        if counter >= self._next:
            return True
        word, bit = divmod(counter, COUNTER_BITS_PER_WORD)
        return not self._seen[word % _WORDS] >> bit & 1

    def accept(self, counter: int) -> None:
        """Remember a fresh counter; the caller has asked `is_fresh` and has checked the tag."""
        word, bit = divmod(counter, COUNTER_BITS_PER_WORD)
        if counter >= self._next:
            self._clear_up_to(word)
            self._next = counter + 1
        self._seen[word % _WORDS] |= 1 << bit

    def _clear_up_to(self, word: int) -> None:
        newest = (self._next - 1) // COUNTER_BITS_PER_WORD
        for stale in range(newest + 1, min(word, newest + _WORDS) + 1):
            self._seen[stale % _WORDS] = 0
