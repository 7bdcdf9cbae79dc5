"""Least recently used: a slot's rank is the tick of its last use."""

from featcache.core.recency.lazy_heap import LazyHeap
from featcache.core.slots import Slot


class Lru(LazyHeap):
    """Evictable slots, the least recently used first.

    Exactly so, save that what sessions used by themselves within one tick is in no order among itself.
    """

    def rank(self, slot: Slot, rank: int = 0) -> int:  # noqa: ARG002 - of an entry: see `_reach`
        """Return the tick of a slot's last use."""
        uses = self._uses
        use = self._look(slot) if uses is None else uses[slot.index]
        if use >= slot.tick:
            self._learn(slot, use)
        return slot.tick

    _reach = _renew = rank

    def _stand_at(self, slot: Slot) -> None:
        """The order has no position of its own."""

    def _known(self, slot: Slot) -> int:
        return slot.tick
