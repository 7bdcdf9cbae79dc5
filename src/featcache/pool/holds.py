"""Which slots are in use now, though no read of them is owed: what can't be evicted with any gain."""

from collections.abc import Callable, Mapping
from itertools import chain, islice
from typing import Final

import numpy as np

from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot, SlotTable
from featcache.memory.key_table import SLOT_BITS, SLOT_MASK, place_of
from featcache.memory.words import OwnerWords
from featcache.pool.page import SessionPage

_MOST: Final = 1024
"""Leases that are counted: more would hold up the loop at each tick."""
_FEW: Final = 64
"""Slots that are asked for one by one; after that all are looked at, as vectors."""
_SLOTS: Final = np.uint64(SLOT_MASK)
_SHIFT: Final = np.uint64(SLOT_BITS)


class Holds:
    """Whether a session reads a slot's bytes now, by a ref or by its own lease, or they are yet to come.

    A feature that is evicted before its bytes have come makes no room until they have.
    """

    def __init__(
        self, words: OwnerWords, table: SlotTable, pages: Mapping[int, SessionPage]
    ) -> None:
        self._words, self._table, self._pages = words, table, pages
        self.leases = 0
        """Leases that were out, as `of_many` looked last."""

    def __call__(self, slot: Slot) -> bool:
        """Whether a slot is held."""
        index, generation = slot.index, slot.generation
        return self._words.published[index] != generation or any(
            page.uses(index, generation) for page in self._pages.values()
        )

    def of_many(self) -> Callable[[Slot], bool]:
        """Return what says the same of many features under keys, as long as no other task runs."""
        known = b""
        leased: set[int] | None = None
        asked = 0

        def held(slot: Slot) -> bool:
            nonlocal asked, known, leased
            if known:
                return known[slot.index] != 0
            asked += 1
            if asked > _FEW:
                known = self._now()
            if leased is None:  # once: a session may have thousands
                self.leases = sum(page.leased_places().size for page in self._pages.values())
                if self.leases > _FEW:
                    known = self._now()
                    return known[slot.index] != 0
                leased = set().union(*(page.leased() for page in self._pages.values()))
            index, generation = slot.index, slot.generation
            return (
                self._words.published[index] != generation
                or place_of(index, generation) in leased
                or any(page.holds(index, generation) for page in self._pages.values())
            )

        return held

    def _now(self) -> bytes:
        """Return the same of each slot, 1 or 0."""
        high = self._table.high
        live = np.frombuffer(self._words.live, dtype=np.uint64)[:high]
        held = np.frombuffer(self._words.published, dtype=np.uint64)[:high] != live
        for page in self._pages.values():
            held |= page.holds_of(live)
            places = page.leased_places()  # a peer's words: any
            slots, generations = places & _SLOTS, places >> _SHIFT
            slots, generations = slots[slots < high], generations[slots < high]
            held[slots[live[slots] == generations]] = True
        known: bytes = held.tobytes()
        return known

    def any_read(self) -> bool:
        """Whether any session, the owner's own too, reads a feature now."""
        live = np.frombuffer(self._words.live, dtype=np.uint64)[: self._table.high]
        return any(page.is_reading(live) for page in self._pages.values())

    def count_leased(self, store: KeyedStore) -> None:
        """Note the bytes that can't be evicted with any gain, as sessions read them by lease entries."""
        leased = (page.leased() for page in self._pages.values())  # no more of them than it takes
        places = set(islice(chain.from_iterable(leased), _MOST))
        slots = (self._table.find(place & SLOT_MASK, place >> SLOT_BITS) for place in places)
        store.leased_bytes = sum(
            slot.extent.size_bytes
            for slot in slots
            if slot is not None and slot.idle and slot.extent is not None
        )

    def close(self) -> None:
        """Release the words, which must be unmapped with the pool."""
        del self._words
