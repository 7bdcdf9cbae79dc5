"""When sessions used slots last, as they say in the `used` words of their pages."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot, SlotTable
from featcache.pool.page import SessionPage

_COUNT_S: Final = 1.0


class SessionUses:
    """The highest tick of each slot over all sessions, those that ended too. What they say is a peer's."""

    def __init__(self, slots: int, pages: Mapping[int, SessionPage]) -> None:
        self._pages: Final = pages
        self._past = np.zeros(slots, np.uint64)
        """What sessions said that have ended, each no later than its end."""
        self._past_words = self._past.data
        self._counts = np.zeros(slots, np.uint32)
        self._counted = np.zeros(slots, np.uint64)
        """The generation of each slot whose uses `_counts` has."""
        self._counts_at_s = 0.0

    def latest(self, index: int) -> int:
        """Return the highest tick that any session wrote for a slot, 0 if none did."""
        latest: int = self._past_words[index]
        for page in self._pages.values():
            use = page.words.used[index]
            if use > latest:  # noqa: PLR1730 - `max` is a call, and each eviction comes here
                latest = use
        return latest

    def latest_up_to(self, high: int) -> memoryview:
        """Return the same for each slot before `high`."""
        latest = self._past[:high].copy()
        for page in self._pages.values():
            np.maximum(latest, np.frombuffer(page.words.used, np.uint64, high), out=latest)
        return latest.data

    def hits_of(self, slot: Slot) -> int:
        """Return the lookups of a slot that the owner answered, and the uses by sessions that `count` saw."""
        of_it = int(self._counted[slot.index]) == slot.generation
        return slot.hits + (int(self._counts[slot.index]) if of_it else 0)

    def count(self, table: SlotTable, now_s: float) -> None:
        """Count, once a second at most, which slots each session has used since: for reports alone."""
        if now_s >= self._counts_at_s:
            self._counts_at_s = now_s + _COUNT_S
            for page in self._pages.values():
                self.count_of(page, table)

    def count_of(self, page: SessionPage, table: SlotTable) -> None:
        """As `count`, of one session, now."""
        high = table.high
        used, seen = np.frombuffer(page.words.used, np.uint64, high), page.uses_seen[:high]
        changed = (used != seen).nonzero()[0]
        if changed.size:
            seen[changed] = used[changed]
            slots = table.slots
            generations = np.array([slots[i].generation for i in changed.tolist()], np.uint64)
            self._counts[changed[self._counted[changed] != generations]] = 0
            self._counted[changed] = generations
            self._counts[changed] += 1

    def lookups(self, store: KeyedStore) -> tuple[int, int, int]:
        """Return hits, misses, and reads that were paid, with those that sessions counted themselves."""
        hits = misses = out = 0
        for page in self._pages.values():
            own = page.own_lookups
            hits, misses, out = hits + own[0], misses + own[1], out + page.leases_out
        return store.hits + hits, store.misses + misses, store.reads_paid + max(0, hits - out)

    def fold(self, page: SessionPage, tick: int) -> None:
        """Remember what a session said that ends, of which nothing can be later than now."""
        said = np.frombuffer(page.words.used, np.uint64)
        np.maximum(self._past, np.minimum(said, np.uint64(tick)), out=self._past)
