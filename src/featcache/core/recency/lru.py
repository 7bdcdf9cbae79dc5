"""Least recently used: a slot's rank is the tick of its last use."""

from featcache.core.recency.lazy_heap import LazyHeap
from featcache.core.slots import Slot


class Lru(LazyHeap):
    """Evictable slots, the least recently used first.

    Exactly so, save that what sessions used by themselves within one tick is in no order among itself.
    """

    def rank(self, slot: Slot) -> int:
        """Return the tick of a slot's last use."""
        self._learn(slot)
        return slot.tick

    _reach = _renew = rank

    def _known(self, slot: Slot) -> int:
        return slot.tick
