"""What the policies share: a heap of slots that is put right only as far as a search comes."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from featcache.core.recency.policy import STEP, Held, LatestUse, LatestUses, never_used, none_used
from featcache.core.recency.tick_times import TickTimes
from featcache.core.slots import Slot

_SLACK: Final = 64
"""Stale entries that are tolerated, beside a share of the heap, before it is rebuilt."""
_PARKED_LOOKS: Final = 64
"""Slots that were held as a search came to them, of which the next one asks anew."""
_MOST_REBUILT: Final = 2048
"""Entries of the largest heap that is rebuilt in one piece; others are put right by searches alone."""
LOOKS: Final = 8
"""Slots whose uses are looked at one by one in a search, beside a share of all, before all are."""
LOOKS_SHARE: Final = 512
"""A look at one slot takes about as long as a look at so many among all."""


class LazyHeap(ABC):
    """Evictable slots by rank, the lowest first, with one entry of a slot that counts: its last.

    A use writes the slot, or a word of a session, and no entry: an entry's rank may be too low from then
    on, never too high. So a search meets it too early, and repairs it. A hit costs neither a search nor
    an entry, however many slots there are. An ordered dict would do for hits that are counted, but each
    eviction would step over every slot that is pinned or being read.
    """

    def __init__(
        self, latest_use: LatestUse = never_used, latest_uses: LatestUses | None = None
    ) -> None:
        # In steps: what sessions use while a tick lasts goes between it and the next.
        self.tick = 0
        self._latest_use = latest_use
        self._latest_uses = none_used if latest_use is never_used else latest_uses
        self._uses: Sequence[int] | None = None
        """All slots' uses by sessions, if this search has looked at them."""
        self._looks = 0
        self._high = 0
        """One more than the highest index of a slot that was ever added."""
        self._times = TickTimes()
        self._heap: list[tuple[int, int, Slot]] = []
        """Rank, number, slot: of equal ranks the one that was added first goes first."""
        self._parked: deque[tuple[int, int, Slot]] = deque()
        """Entries of slots that were held, out of the heap: thousands would be in each search's way."""
        self.unfinished = False
        """Whether the last search ended at the most that it may pass: the next may find more."""
        self._max_entries = _SLACK
        self._entries = 0

    # --- uses -------------------------------------------------------------------------------------

    def touch(self, slot: Slot, now_s: float) -> None:
        """Count a use."""
        # Only the slot is written. Its entry in the heap is stale from here on, which is safe.
        self.tick += STEP
        slot.tick, slot.used_s = self.tick, now_s

    def enter(self, slot: Slot, now_s: float) -> None:
        """Count a feature as new."""
        self.tick += STEP
        slot.tick, slot.used_s = self.tick, now_s
        if now_s >= self._times.due_s:
            self._times.note(self.tick, now_s)

    def pass_time(self, now_s: float) -> None:
        """Advance the tick if it has stood still for long."""
        if now_s >= self._times.due_s:
            self.tick += STEP
            self._times.note(self.tick, now_s)

    def _look(self, slot: Slot) -> int:
        """Return when sessions used a slot last, in a search that has not looked at all of them."""
        self._looks += 1
        if self._looks > LOOKS + self._high // LOOKS_SHARE:
            self._survey()
        return self._latest_use(slot.index)

    def _learn(self, slot: Slot, use: int) -> None:
        """Count what sessions wrote: due if it is not below `slot.tick`, no harm else."""
        # A use in the tick at which the slot was entered is the present tenant's: it comes after.
        slot.tick = max(slot.tick, min(use, self.tick + STEP - 1) | 1)

    def _survey(self) -> None:
        """Look at the uses of all slots at once."""
        if self._latest_uses is not None:
            self._uses = self._latest_uses(self._high)

    def last_used_s(self, slot: Slot) -> float:
        """Return when a kept slot was last entered or used."""
        self._learn(slot, self._latest_use(slot.index))
        if slot.tick & 1:
            return max(slot.used_s, self._times.of(slot.tick))
        return slot.used_s

    # --- ranks ------------------------------------------------------------------------------------

    @abstractmethod
    def rank(self, slot: Slot) -> int:
        """Return a slot's rank, up to date."""

    @abstractmethod
    def _known(self, slot: Slot) -> int:
        """Return a slot's rank as far as is known without a look; it may be too low."""

    @abstractmethod
    def _reach(self, slot: Slot, rank: int, /) -> int:
        """Return the rank of a slot that a search has come to, up to date; its entry has `rank`."""

    @abstractmethod
    def _stand_at(self, slot: Slot) -> None:
        """Note the slot that should go first."""

    @abstractmethod
    def _renew(self, slot: Slot) -> int:
        """Return a slot's rank for a heap that is rebuilt because many were used."""

    # --- searches ---------------------------------------------------------------------------------

    def look_anew(self) -> None:
        """Forget what sessions said before: `rank` is as of now."""
        self._uses, self._looks = None, 0

    def add(self, slot: Slot) -> None:
        """Take in a slot that became evictable and has no entry."""
        slot.listed = True
        if slot.index >= self._high:
            self._high, self._uses = slot.index + 1, None
        self._entries += 1
        slot.entry = self._entries
        heappush(self._heap, (self._known(slot), self._entries, slot))
        if self._max_entries < len(self._heap) <= _MOST_REBUILT:
            self._rebuild(self._known)

    def coldest(self, held: Held, passes: int | None = None) -> Slot | None:
        """Return the evictable slot that should go first and is not held, or None."""
        found = [slot for _, slot in self.by_rank(1, held, passes)]
        return found[0] if found else None

    def coldest_few(self, count: int, held: Held) -> list[Slot]:
        """Return up to `count` evictable slots that are not held, the first to go first."""
        return [slot for _, slot in self.by_rank(count, held)]

    def by_rank(  # noqa: C901 - one loop, on the path of each eviction
        self, most: int, held: Held, passes: int | None = None
    ) -> Generator[tuple[int, Slot]]:
        """Go through the same, with their ranks. To be closed before any call but `rank`."""
        heap, taken, found = self._heap, list[tuple[int, int, Slot]](), 0
        self._uses, self._looks, self.unfinished = None, 0, False
        passed, most_stale = 0, _SLACK + len(heap) // 8
        unasked = len(self._parked)
        if unasked:
            unasked -= self._unpark(_PARKED_LOOKS, held)
        try:
            while found < most:
                if not heap:
                    unasked, asked = 0, self._unpark(unasked, held)
                    if asked:
                        continue
                    break
                if (entry := self._pop_first(held)) is not None:
                    taken.append(entry)
                    rank, _, slot = entry
                    if not found:
                        self._stand_at(slot)
                    elif self._uses is None:
                        self._look_ahead(most)
                    found += 1
                    yield rank, slot
                    continue
                passed += 1
                if passed == passes:
                    self.unfinished = True
                    break
                if passed == most_stale and (passes is None or len(heap) <= _MOST_REBUILT):
                    # Many slots were used since the last search: one heapify costs less than repairs.
                    self._rebuild(self._renew)
        finally:
            # Back they go: the caller may drop none of them.
            for entry in taken:
                heappush(heap, entry)

    def _pop_first(self, held: Held) -> tuple[int, int, Slot] | None:
        """Take out the first entry if its slot can go; else put it where it belongs, and return None."""
        heap = self._heap
        rank, number, slot = heap[0]
        if number != slot.entry:
            heappop(heap)  # there is a later one
            return None
        if not slot.idle:
            # `add` is due when it is evictable again, so the flag goes with the entry.
            heappop(heap)
            slot.listed = False
            return None
        reached = self._reach(slot, rank)
        if reached != rank:
            heapreplace(heap, (reached, number, slot))
            return None
        entry = heappop(heap)
        if not held(slot):
            return entry
        self._parked.append(entry)
        return None

    def _unpark(self, most: int, held: Held) -> int:
        """Put the next parked slots that are held no more into the heap; return how many were asked."""
        parked = self._parked
        count = min(most, len(parked))
        for _ in range(count):
            entry = parked.popleft()
            slot = entry[2]
            if entry[1] != slot.entry:
                continue
            if not slot.idle:
                slot.listed = False  # as in a search
            elif held(slot):
                parked.append(entry)
            else:
                heappush(self._heap, entry)
        return count

    def _look_ahead(self, count: int) -> None:
        """Look at all uses at once if so many looks at one would take longer."""
        if self._high <= count * LOOKS_SHARE:
            self._survey()

    def _rebuild(self, ranked: Callable[[Slot], int]) -> None:
        """Drop the entries of slots that are not evictable and rank all others anew."""
        heap = self._heap
        last = [(number, slot) for _, number, slot in heap if number == slot.entry]
        for _, slot in last:
            slot.listed = slot.idle
        # In place: `coldest_few` holds the list while it calls this.
        heap[:] = [(ranked(slot), number, slot) for number, slot in last if slot.idle]
        heapify(heap)
        self._max_entries = 2 * len(heap) + _SLACK
