"""Victim selection: the coldest run of adjacent extents that frees a block of a size.

How cold a feature is, its rank, is the policy's to say (`core.recency`). Where all features are of one
size the victim is the coldest. Where they are not, evicting in that order alone frees many separate
extents before one is large enough, and each costs a hit. So a window of neighbours in the slab is built
around each of a few of the coldest features, and the window is evicted whose warmest member is the
coldest. That is the same work whatever the number of features, and a request that takes very many
neighbours tries fewer windows. Only where none of those windows makes room, because pins or reads stand
between, is the whole slab gone over once, for the best of all windows.

A rank costs a look at the sessions' words, which the policy bounds in each search.
"""

from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from operator import itemgetter
from typing import Final

from featcache.core.allocator import Extent, OffsetAllocator
from featcache.core.recency import Held, Recency
from featcache.core.slots import Slot

Rank = Callable[[Slot], int]
"""Returns how cold a kept slot is: the coldest has the lowest."""

FEW: Final = 32
"""Features, the coldest ones, around which a window is tried at first."""
_MAX_STEPS: Final = 1024
"""Extents that are looked at for windows, after which no further window is tried."""


def victims(
    recency: Recency,
    allocator: OffsetAllocator,
    size_bytes: int,
    held: Held,
    *,
    growth_bytes: int = 0,
) -> list[Slot]:
    """Return the features to evict so that an extent of a size fits, or none if no window makes room.

    Tries windows around the coldest few. `growth_bytes` more may be committed behind the last extent,
    once the victims have gone.
    """
    search: _Search | None = None
    best, warmest = list[tuple[float, Slot]](), inf
    coldest = recency.by_rank(FEW, held)
    try:
        for rank, slot in coldest:
            if search is None:  # hot path: the coldest alone makes the room, as where all are alike
                extent = slot.extent
                if extent is not None and extent.size_bytes >= size_bytes:
                    return [slot]
                search = _Search(recency.rank, allocator, size_bytes, held, growth_bytes)
            if search.steps > _MAX_STEPS or rank > warmest:
                break  # a window is no colder than its centre, and the next centres are warmer still
            if window := search.window(slot, rank, warmest):
                best, warmest = window, window[0][0]
                if len(best) == 1:
                    break  # no other window can be colder than one of the coldest alone
    finally:
        coldest.close()
    return [slot for _, slot in best]


class _Search:
    """One search for windows, and the extents that it has looked at."""

    def __init__(
        self,
        rank: Rank,
        allocator: OffsetAllocator,
        size_bytes: int,
        held: Held,
        growth_bytes: int,
    ) -> None:
        self._allocator, self._size_bytes, self._held = allocator, size_bytes, held
        self._rank, self._growth_bytes = rank, growth_bytes
        self.steps = 0

    def window(self, slot: Slot, centre: int, before: float) -> list[tuple[float, Slot]]:
        """Return a feature and the neighbours that free one block with it, the warmest first.

        `centre` is the feature's rank. The window grows by the colder of its two neighbours. Empty if
        both are in use, or no colder than the rank `before`.
        """
        extent, held, growth_bytes = slot.extent, self._held, self._growth_bytes
        assert extent is not None, "it is kept"
        if extent.size_bytes >= self._size_bytes:
            return [(centre, slot)]  # without a look at its neighbours
        rank, previous, following = self._rank, self._allocator.previous, self._allocator.following
        window: list[tuple[float, Slot]] = [(centre, slot)]
        missing_bytes = self._size_bytes - extent.size_bytes
        lower, upper = previous(extent), following(extent)
        low, high = _rank_of(lower, held, rank), _rank_of(upper, held, rank)
        while missing_bytes > 0:
            self.steps += 1
            if upper is None and growth_bytes:
                missing_bytes, growth_bytes = missing_bytes - growth_bytes, 0
                continue
            goes_low = low <= high
            taken, colder = (lower, low) if goes_low else (upper, high)
            if colder >= before:
                return []
            assert taken is not None, "it has a rank"
            missing_bytes -= taken.size_bytes
            if isinstance(taken.holder, Slot) and not taken.is_free:
                window.append((colder, taken.holder))
            if goes_low:
                lower = previous(taken)
                low = _rank_of(lower, held, rank)
            else:
                upper = following(taken)
                high = _rank_of(upper, held, rank)
        return _warmest_first(window)


def best_victims(
    recency: Recency,
    allocator: OffsetAllocator,
    size_bytes: int,
    held: Held,
    *,
    growth_bytes: int = 0,
) -> list[Slot]:
    """As `victims`, of all windows that there are: the slab is gone over once, from its beginning."""
    passed: list[tuple[Extent | None, int, float]] = []  # extent, size, rank
    start = total_bytes = 0  # of the window, which ends with the last of these
    warmest: deque[float] = deque()  # of the window: each rank that no later one exceeds
    best_rank, best = inf, (0, 0)
    for extent, extent_bytes, rank in _extents(recency.rank, allocator, held, growth_bytes):
        passed.append((extent, extent_bytes, rank))
        if rank == inf:
            start, total_bytes = len(passed), 0
            warmest.clear()
            continue
        total_bytes += extent_bytes
        while warmest and warmest[-1] < rank:
            warmest.pop()
        warmest.append(rank)
        while total_bytes >= size_bytes:
            if 0 < warmest[0] < best_rank:
                best_rank, best = warmest[0], (start, len(passed))
            _, first_bytes, first_rank = passed[start]
            start += 1
            total_bytes -= first_bytes
            if first_rank == warmest[0]:
                warmest.popleft()
    window = [
        (rank, one.holder) for one, _, rank in passed[slice(*best)] if one is not None and rank
    ]
    going = _warmest_first([(rank, slot) for rank, slot in window if isinstance(slot, Slot)])
    return [slot for _, slot in going]


def _extents(
    rank: Rank, allocator: OffsetAllocator, held: Held, growth_bytes: int
) -> Iterator[tuple[Extent | None, int, float]]:
    extent = allocator.first
    while extent is not None:
        yield extent, extent.size_bytes, _rank_of(extent, held, rank)
        extent = allocator.following(extent)
    if growth_bytes:
        yield None, growth_bytes, 0


def _warmest_first(ranked: list[tuple[float, Slot]]) -> list[tuple[float, Slot]]:
    return sorted(ranked, key=itemgetter(0), reverse=True)


def _rank_of(extent: Extent | None, held: Held, rank: Rank) -> float:
    """Return the rank of an extent: 0 if it is free, infinity if it can't be evicted or is no extent."""
    if extent is None:
        return inf
    if extent.is_free:
        return 0
    slot = extent.holder
    return rank(slot) if isinstance(slot, Slot) and slot.idle and not held(slot) else inf
