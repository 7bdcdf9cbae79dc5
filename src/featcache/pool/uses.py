"""When sessions used slots last, as they say in the `used` words of their pages."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from featcache.core.keyed_store import KeyedStore
from featcache.pool.page import SessionPage


class SessionUses:
    """The highest tick of each slot over all sessions, those that ended too. What they say is a peer's."""

    def __init__(self, slots: int, pages: Mapping[int, SessionPage]) -> None:
        self._pages: Final = pages
        self._past = np.zeros(slots, np.uint64)
        """What sessions said that have ended, each no later than its end."""
        self._past_words = self._past.data

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
