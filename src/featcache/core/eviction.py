"""Victim selection: the least recently used run of adjacent extents that frees a block of a size.

Where all features are of one size the victim is the least recently used feature. Where they are not,
evicting in that order alone frees many separate extents before one is large enough, and each costs a
hit. So a window of neighbours in the slab is built around each of a few of the coldest features, and
the window is evicted whose most recently used member was used the longest ago. That is the same work
whatever the number of features, and a request that takes very many neighbours tries fewer windows. Only
where none of those windows makes room, because pins or reads stand between, is the whole slab gone over
once, for the best of all windows.
"""

from collections import deque
from collections.abc import Iterator
from math import inf
from typing import Final

from featcache.core.allocator import Extent, OffsetAllocator
from featcache.core.recency import Held, Recency
from featcache.core.slots import Slot

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
    coldest = recency.coldest(held)
    if coldest is None:
        return []
    search = _Search(allocator, size_bytes, held, growth_bytes)
    best = search.window(coldest, inf)
    if len(best) == 1:
        return best
    for slot in recency.coldest_few(FEW, held)[1:]:
        if search.steps > _MAX_STEPS or (best and slot.tick > best[0].tick):
            break  # a window is no colder than its centre, and the next centres are warmer still
        best = search.window(slot, best[0].tick if best else inf) or best
    return best


class _Search:
    """One search for windows, and the extents that it has looked at."""

    def __init__(
        self, allocator: OffsetAllocator, size_bytes: int, held: Held, growth_bytes: int
    ) -> None:
        self._allocator, self._size_bytes, self._held = allocator, size_bytes, held
        self._growth_bytes = growth_bytes
        self.steps = 0

    def window(self, slot: Slot, before_tick: float) -> list[Slot]:
        """Return a feature and the neighbours that free one block with it, the warmest first.

        It grows by the colder of its two neighbours. Empty if both are in use, or no colder than
        `before_tick`.
        """
        extent, held, growth_bytes = slot.extent, self._held, self._growth_bytes
        assert extent is not None, "it is kept"
        previous, following = self._allocator.previous, self._allocator.following
        window, missing_bytes = [slot], self._size_bytes - extent.size_bytes
        before, after = previous(extent), following(extent)
        low, high = _tick(before, held), _tick(after, held)
        while missing_bytes > 0:
            self.steps += 1
            if after is None and growth_bytes:
                missing_bytes, growth_bytes = missing_bytes - growth_bytes, 0
                continue
            goes_low = low <= high
            if (low if goes_low else high) >= before_tick:
                return []
            taken = before if goes_low else after
            assert taken is not None, "it has a tick"
            missing_bytes -= taken.size_bytes
            if isinstance(taken.holder, Slot) and not taken.is_free:
                window.append(taken.holder)
            if goes_low:
                before = previous(taken)
                low = _tick(before, held)
            else:
                after = following(taken)
                high = _tick(after, held)
        return _warmest_first(window)


def best_victims(
    allocator: OffsetAllocator, size_bytes: int, held: Held, *, growth_bytes: int = 0
) -> list[Slot]:
    """As `victims`, of all windows that there are: the slab is gone over once, from its beginning."""
    passed: list[tuple[Extent | None, int, float]] = []  # extent, size, tick
    start = total_bytes = 0  # of the window, which ends with the last of these
    warmest: deque[float] = deque()  # of the window: each tick that no later one exceeds
    best_tick, best = inf, (0, 0)
    for extent, extent_bytes, tick in _extents(allocator, held, growth_bytes):
        passed.append((extent, extent_bytes, tick))
        if tick == inf:
            start, total_bytes = len(passed), 0
            warmest.clear()
            continue
        total_bytes += extent_bytes
        while warmest and warmest[-1] < tick:
            warmest.pop()
        warmest.append(tick)
        while total_bytes >= size_bytes:
            if 0 < warmest[0] < best_tick:
                best_tick, best = warmest[0], (start, len(passed))
            _, first_bytes, first_tick = passed[start]
            start += 1
            total_bytes -= first_bytes
            if first_tick == warmest[0]:
                warmest.popleft()
    holders = [one.holder for one, _, tick in passed[slice(*best)] if one is not None and tick]
    return _warmest_first([slot for slot in holders if isinstance(slot, Slot)])


def _extents(
    allocator: OffsetAllocator, held: Held, growth_bytes: int
) -> Iterator[tuple[Extent | None, int, float]]:
    extent = allocator.first
    while extent is not None:
        yield extent, extent.size_bytes, _tick(extent, held)
        extent = allocator.following(extent)
    if growth_bytes:
        yield None, growth_bytes, 0


def _warmest_first(slots: list[Slot]) -> list[Slot]:
    return sorted(slots, key=lambda one: one.tick, reverse=True)


def _tick(extent: Extent | None, held: Held) -> float:
    """Return the tick of an extent: 0 if it is free, infinity if it can't be evicted or is no extent."""
    if extent is None:
        return inf
    if extent.is_free:
        return 0
    slot = extent.holder
    return slot.tick if isinstance(slot, Slot) and slot.idle and not held(slot) else inf
