"""The eviction order: which evictable slot goes first. Least recently used, and the seam for others.

Another policy (S3-FIFO, SIEVE) replaces this class and its slot fields, nothing else. `Directory` and
`KeyedStore` share one instance and make these calls, all of them in the owner's loop:

| call | when |
| --- | --- |
| `enter(slot, now_s)` | a slot was put under a key, at its publish; `slot.key` is set, `slot.idle` is not |
| `touch(slot, now_s)` | a read of it was granted: a lookup, or a waiter for its key. At every hit |
| `add(slot)` | it became evictable (`slot.idle`) while not `slot.listed`. Any number of times |
| `coldest(held)`, `coldest_few(count, held)` | a victim is needed: for room, by the watermark |

There is no call when a slot stops being evictable, or leaves its key: that would be one more call at
every hit. An entry is checked when a search comes to it: the slot counts only while `slot.idle`. So the
same slot may have been recycled and entered under another key since its entry was made.

The fields of `Slot` that belong to the policy, the only writer of them:

- `listed`: the policy has an entry of the slot, so `add` is not called. False again once the entry is
  dropped, or the slot is never evicted.
- `tick`: the slot's rank, the lowest goes first. `core.eviction` compares the ranks of neighbours, also
  of slots that no search has returned.
- `used_s`: when it was last entered or touched, for the `Evicted` event.

The order is a heap of (tick, slot) with at most one entry of a slot. A tick is given at each use, and
ticks only grow: the entry of a slot that was used since holds too low a tick, and is repaired when it
comes to the top. So a hit costs neither a search nor an entry, however many slots there are. An ordered
dict would do for hits, but each eviction would step over every slot that is pinned or being read.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from featcache.core.slots import Slot

_SLACK: Final = 64
"""Stale entries that are tolerated, beside a share of the heap, before it is rebuilt."""

Held = Callable[[Slot], bool]
"""Whether evicting a slot would free nothing now: it is read by a ref, or its bytes are yet to come."""


class Recency:
    """Evictable slots, the least recently used first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Slot]] = []
        self._max_entries = _SLACK
        self._ticks = 0

    def touch(self, slot: Slot, now_s: float) -> None:
        """Count a use: of all slots this one now goes last."""
        # Only the slot is written. Its entry in the heap is stale from here on, which is safe: the
        # entry's tick is too low, never too high, so a search meets it too early and repairs it.
        self._ticks += 1
        slot.tick, slot.used_s = self._ticks, now_s

    enter = touch
    """A new feature counts as just used."""

    def add(self, slot: Slot) -> None:
        """Take in a slot that became evictable and has no entry."""
        slot.listed = True
        heappush(self._heap, (slot.tick, slot))
        if len(self._heap) > self._max_entries:
            self._rebuild()

    def coldest(self, held: Held) -> Slot | None:
        """Return the evictable slot that was used the longest ago and is not held, or None."""
        return next(iter(self.coldest_few(1, held)), None)

    def coldest_few(self, count: int, held: Held) -> list[Slot]:
        """Return up to `count` evictable slots that are not held, the least recently used first."""
        heap, taken, found = self._heap, list[tuple[int, Slot]](), list[Slot]()
        stale = 0
        while heap and len(found) < count:
            tick, slot = entry = heap[0]
            if slot.idle and slot.tick == tick:
                taken.append(heappop(heap))
                if not held(slot):
                    found.append(slot)
                continue
            stale += 1
            if stale > _SLACK + len(heap) // 8:
                # Many slots were used since the last search: one heapify costs less than repairs.
                self._rebuild()
            elif slot.idle:
                heapreplace(heap, (slot.tick, slot))
            else:
                # `add` is due when it is evictable again, so the flag goes with the entry.
                heappop(heap)
                slot.listed = False
        # Back they go, the held and the found: the caller may drop none of them.
        for entry in taken:
            heappush(heap, entry)
        return found

    def _rebuild(self) -> None:
        """Drop the entries of slots that are not evictable and repair the ticks of all others."""
        heap = self._heap
        for _, slot in heap:
            slot.listed = slot.idle
        # In place: `coldest_few` holds the list while it calls this.
        heap[:] = [(slot.tick, slot) for _, slot in heap if slot.idle]
        heapify(heap)
        self._max_entries = 2 * len(heap) + _SLACK
