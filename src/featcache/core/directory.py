"""The directory: which feature is kept under which key, and which could go, the longest unused first.

The order of use is a heap of (tick, slot), with one entry at most of a slot. A tick is given at each
lookup, and they only grow: the entry of a slot that was used since tells too low a tick, and is put in
its place when it comes to the top. So a lookup costs neither a search nor an entry, whatever is kept.
An ordered dict would do for lookups, but each eviction would step over all that is pinned or being read.
"""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from featcache.core.slots import Slot, SlotState

_PUBLISHED = SlotState.PUBLISHED
_MANY_OLD: Final = 64
"""Entries of before that are put right one by one, besides an eighth of all, in one search."""


def _extent_bytes(slot: Slot) -> int:
    assert slot.extent is not None, "only FREE slots have no extent"
    return slot.extent.size_bytes


class Directory:
    """Keys with their slots, pins and order of use. Counts are kept as they change."""

    def __init__(self) -> None:
        self._slots: dict[bytes, Slot] = {}
        self._pins: dict[bytes, dict[int, int]] = {}
        """How often each session pinned a key."""
        self._coldest: list[tuple[int, Slot]] = []
        self._ticks = 0
        self._idle = 0
        self.resident_bytes = 0
        """Extents that are kept under a key."""
        self.pinned_bytes = 0
        self.idle_bytes = 0
        """Extents that could be evicted now."""

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def find(self, key: bytes) -> Slot | None:
        """Return the slot that is kept under a key. Not a use of it."""
        return self._slots.get(key)

    def keep(self, key: bytes, slot: Slot, now_s: float) -> Slot | None:
        """Keep a slot under a key; return the one that was before, which is dropped. Pins stay."""
        old = self._slots.get(key)
        if old is not None:
            self._leave(old)
        self._slots[key] = slot
        slot.key = key
        size_bytes = _extent_bytes(slot)
        self.resident_bytes += size_bytes
        if key in self._pins:
            self.pinned_bytes += size_bytes
        self.touch(slot, now_s)
        self.refresh(slot)
        return old

    def drop(self, slot: Slot) -> None:
        """Keep a slot no longer. Its pins go with the key."""
        assert slot.key is not None, "it is kept under a key"
        key = slot.key
        self._leave(slot)
        del self._slots[key]
        self._pins.pop(key, None)

    def _leave(self, slot: Slot) -> None:
        size_bytes = _extent_bytes(slot)
        self.resident_bytes -= size_bytes
        if slot.key in self._pins:
            self.pinned_bytes -= size_bytes
        slot.key = None
        self.refresh(slot)

    def touch(self, slot: Slot, now_s: float) -> None:
        """Count a use: the slot is the last to go. The caller then refreshes it."""
        self._ticks += 1
        slot.tick, slot.used_s = self._ticks, now_s

    def refresh(self, slot: Slot) -> None:
        """Look anew at whether a slot could be evicted."""
        idle = (
            slot.key is not None
            and not slot.grants
            and not slot.reads_left
            and slot.state is _PUBLISHED
            and slot.key not in self._pins
        )
        if idle is slot.idle:
            return
        slot.idle = idle
        if not idle:
            self._idle -= 1
            self.idle_bytes -= _extent_bytes(slot)
            return
        self._idle += 1
        self.idle_bytes += _extent_bytes(slot)
        if not slot.listed:
            self._list(slot)

    def _list(self, slot: Slot) -> None:
        slot.listed = True
        heappush(self._coldest, (slot.tick, slot))
        if len(self._coldest) > 2 * self._idle + 64:  # most are of what can't be evicted now
            self._order_anew()

    def coldest(self, held: Callable[[Slot], bool]) -> Slot | None:
        """Return the slot that was not used for the longest time, of those that could be evicted."""
        return next(iter(self.coldest_few(1, held)), None)

    def coldest_few(self, count: int, held: Callable[[Slot], bool]) -> list[Slot]:
        """Return up to so many of those that could be evicted, the longest unused first.

        Those that are `held`, by somebody who reads a ref of them, are passed over.
        """
        heap, taken, found = self._coldest, list[tuple[int, Slot]](), list[Slot]()
        old = 0
        while heap and len(found) < count:
            tick, slot = entry = heap[0]
            if slot.idle and slot.tick == tick:
                taken.append(heappop(heap))
                if not held(slot):
                    found.append(slot)
                continue
            old += 1
            if old > _MANY_OLD + len(heap) // 8:
                self._order_anew()
            elif slot.idle:
                heapreplace(heap, (slot.tick, slot))
            else:
                heappop(heap)
                slot.listed = False
        for entry in taken:
            heappush(heap, entry)
        return found

    def _order_anew(self) -> None:
        """Put all entries right at once, which costs less than one by one if many are of before."""
        heap = self._coldest
        for _, slot in heap:
            slot.listed = slot.idle
        heap[:] = [(slot.tick, slot) for _, slot in heap if slot.idle]
        heapify(heap)

    # --- pins -------------------------------------------------------------------------------------

    def pin(self, key: bytes, session: int) -> None:
        """Keep what is under a key from being evicted, until each pin was taken back."""
        slot = self._slots[key]
        pins = self._pins.get(key)
        if pins is None:
            pins = self._pins[key] = {}
            self.pinned_bytes += _extent_bytes(slot)
        pins[session] = pins.get(session, 0) + 1
        self.refresh(slot)

    def unpin(self, key: bytes, session: int) -> None:
        """Take back one pin: of this session, else the oldest of another's. Nothing if there is none."""
        pins = self._pins.get(key)
        if pins is None:
            return
        whose = session if session in pins else next(iter(pins))
        pins[whose] -= 1
        if not pins[whose]:
            self._unpin_session(key, whose)

    def unpin_all(self, session: int) -> None:
        """Take back all that a session pinned."""
        for key in [key for key, pins in self._pins.items() if session in pins]:
            self._unpin_session(key, session)

    def _unpin_session(self, key: bytes, session: int) -> None:
        pins = self._pins[key]
        del pins[session]
        if not pins:
            del self._pins[key]
            slot = self._slots[key]
            self.pinned_bytes -= _extent_bytes(slot)
            self.refresh(slot)

    def is_pinned(self, key: bytes) -> bool:
        """Whether anybody pinned it."""
        return key in self._pins

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._slots)
