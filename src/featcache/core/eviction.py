"""Whom to evict for a feature of some size: the longest unused, of those whose going makes the room.

Where all features are of one size that is the longest unused one. Where they are not, evicting in the
order of use alone frees many pieces before one is large enough, and each costs a hit. So a few of the
coldest are each looked at with their neighbours in the slab, and the window goes whose most recently
used feature was used the longest ago. That is the same work whatever the number of features. Only where
none of those windows makes room, because pins or reads stand between, are all features looked at.
"""

from collections.abc import Callable
from math import inf
from typing import Final

from featcache.core.allocator import Extent, OffsetAllocator
from featcache.core.directory import Directory
from featcache.core.slots import Slot

Held = Callable[[Slot], bool]
"""Whether evicting a slot would free nothing now: it is read by a ref, or its bytes are yet to come."""

FEW: Final = 32
"""Coldest features around which a window is tried at first."""


def victims(
    directory: Directory,
    allocator: OffsetAllocator,
    size_bytes: int,
    held: Held,
    *,
    windows: int = FEW,
    growth_bytes: int = 0,
) -> list[Slot]:
    """Return features to evict so that an extent of a size fits, of `windows` tried; none if none does.

    `growth_bytes` more may come behind the last extent, once these have gone.
    """

    def window_of(slot: Slot, before_tick: float) -> list[Slot]:
        return _window(allocator, slot, size_bytes, held, growth_bytes, before_tick)

    coldest = directory.coldest(held)
    if coldest is None:
        return []
    best = window_of(coldest, inf)
    if len(best) == 1:
        return best
    for slot in directory.coldest_few(windows, held)[1:]:
        if best and slot.tick > best[0].tick:
            break  # no window around this one or a warmer one is colder
        best = window_of(slot, best[0].tick if best else inf) or best
    return best


def _window(
    allocator: OffsetAllocator,
    slot: Slot,
    size_bytes: int,
    held: Held,
    growth_bytes: int,
    before_tick: float,
) -> list[Slot]:
    """Return a feature and neighbours whose going frees one piece of a size, the warmest first.

    Empty if what can't go is in the way, or something that was not used before a tick. Of two
    neighbours the colder one goes.
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
    """Return how recently an extent was used, 0 if it is free; infinity if it can't go, or is none."""
    if extent is None:
        return inf
    if extent.is_free:
        return 0
    slot = extent.holder
    return slot.tick if isinstance(slot, Slot) and slot.idle and not held(slot) else inf
