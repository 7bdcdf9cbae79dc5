"""Victim selection: the least recently used run of adjacent extents that frees a block of a size.

Where all features are of one size the victim is the least recently used feature. Where they are not,
evicting in that order alone frees many separate extents before one is large enough, and each costs a
hit. So a window of neighbours in the slab is built around each of a few of the coldest features, and
the window is evicted whose most recently used member was used the longest ago. That is the same work
whatever the number of features. Only where none of those windows makes room, because pins or reads
stand between, is a window tried around every feature.
"""

from functools import partial
from math import inf
from typing import Final

from featcache.core.allocator import Extent, OffsetAllocator
from featcache.core.recency import Held, Recency
from featcache.core.slots import Slot

FEW: Final = 32
"""Features, the coldest ones, around which a window is tried at first."""


def victims(
    recency: Recency,
    allocator: OffsetAllocator,
    size_bytes: int,
    held: Held,
    *,
    windows: int = FEW,
    growth_bytes: int = 0,
) -> list[Slot]:
    """Return the features to evict so that an extent of a size fits, or none if no window makes room.

    Tries up to `windows` of them. `growth_bytes` more may be committed behind the last extent, once
    the victims have gone.
    """
    window_of = partial(_window, allocator, size_bytes, held, growth_bytes)
    coldest = recency.coldest(held)
    if coldest is None:
        return []
    best = window_of(coldest, inf)
    if len(best) == 1:
        return best
    for slot in recency.coldest_few(windows, held)[1:]:
        if best and slot.tick > best[0].tick:
            break  # a window is no colder than its centre, and the next centres are warmer still
        best = window_of(slot, best[0].tick if best else inf) or best
    return best


def _window(
    allocator: OffsetAllocator,
    size_bytes: int,
    held: Held,
    growth_bytes: int,
    slot: Slot,
    before_tick: float,
) -> list[Slot]:
    """Return a feature and the neighbours that free one block of a size with it, the warmest first.

    It grows by the colder of its two neighbours. Empty if both are in use, or no colder than
    `before_tick`.
    """
    extent = slot.extent
    assert extent is not None, "it is kept"
    window, total_bytes = [slot], extent.size_bytes
    before, after = allocator.previous(extent), allocator.following(extent)
    while total_bytes < size_bytes:
        if after is None and growth_bytes:
            total_bytes, growth_bytes = total_bytes + growth_bytes, 0
            continue
        low, high = _tick(before, held), _tick(after, held)
        goes_low = low <= high
        if (low if goes_low else high) >= before_tick:
            return []
        taken = before if goes_low else after
        assert taken is not None, "it has a tick"
        total_bytes += taken.size_bytes
        if isinstance(taken.holder, Slot) and not taken.is_free:
            window.append(taken.holder)
        if goes_low:
            before = allocator.previous(taken)
        else:
            after = allocator.following(taken)
    return sorted(window, key=lambda one: one.tick, reverse=True)


def _tick(extent: Extent | None, held: Held) -> float:
    """Return the tick of an extent: 0 if it is free, infinity if it can't be evicted or is no extent."""
    if extent is None:
        return inf
    if extent.is_free:
        return 0
    slot = extent.holder
    return slot.tick if isinstance(slot, Slot) and slot.idle and not held(slot) else inf
