"""SIEVE: first in, first out, but what was used since the hand passed it last stays where it is.

The hand goes from the oldest feature to the newest, then begins anew. What was used since it came by
last it passes; the first that was not is the victim. A use moves nothing, and a feature that is never
used again goes at the hand's next round, though it came just now: so a scan costs little.

Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. Here the queue and its hand are one order: a slot
has a place, the round in which the hand comes to it and its number of entry. Who is passed is given the
place of the next round. "Visited" is a comparison of ticks, so nobody clears bits: the slot was used at
a later tick than the last that the hand saw.
"""

from typing import Final

from featcache.core.recency.lazy_heap import LazyHeap
from featcache.core.recency.policy import LatestUse, LatestUses, never_used
from featcache.core.slots import Slot

_ROUND: Final = 1 << 64
"""A place is the number of entry, below this, and so many for each round."""


class Sieve(LazyHeap):
    """Evictable slots, the first that the hand would take first."""

    def __init__(
        self, latest_use: LatestUse = never_used, latest_uses: LatestUses | None = None
    ) -> None:
        super().__init__(latest_use, latest_uses)
        self._round = 0
        """Of the hand, as a multiple of `_ROUND`: what enters now is met at the end of it."""
        self._newest = 0
        """The number of the last entry."""

    def enter(self, slot: Slot, now_s: float) -> None:
        """Count a feature as new: at the end of the queue, not visited."""
        super().enter(slot, now_s)
        slot.mark = self._newest = slot.tick
        was, slot.place = slot.place, self._round + slot.tick
        if was > slot.place:  # an earlier tenant's entry, if there is one, would come too late
            slot.listed = False

    def _stand_at(self, slot: Slot) -> None:
        at, number = divmod(slot.place, _ROUND)
        # Behind the newest the hand begins anew: what enters now it meets at the end of that round.
        # Never back, to one that was not evictable as the hand came by.
        self._round = max(self._round, (at + (number == self._newest)) * _ROUND)

    def rank(self, slot: Slot) -> int:
        """Return where the hand would take a slot: at its place, or a round later if it was visited."""
        self._look_up(slot)
        return slot.place if slot.tick <= slot.mark else self._next_place(slot)

    def _known(self, slot: Slot) -> int:
        return slot.place

    # Not `_reach`: the hand passes only those that the search has come to.
    _renew = _known

    def _reach(self, slot: Slot, rank: int, /) -> int:
        if slot.place != rank:
            return slot.place  # an earlier tenant's entry: the hand has not come to this one yet
        self._look_up(slot)
        if slot.tick > slot.mark:
            slot.place, slot.mark = self._next_place(slot), slot.tick
        return slot.place

    def _look_up(self, slot: Slot) -> None:
        uses = self._uses
        use = self._look(slot) if uses is None else uses[slot.index]
        if use >= slot.tick:
            self._learn(slot, use)

    def _next_place(self, slot: Slot) -> int:
        # A slot that was not evictable for some rounds has a place that the hand passed long ago.
        return max(slot.place - slot.place % _ROUND, self._round) + _ROUND + slot.place % _ROUND
