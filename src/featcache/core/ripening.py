"""Which refs have outlived their ttl, found without a look at all ttls there are."""

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice, takewhile
from typing import Final

from featcache.core.slots import Slot

_SLACK: Final = 64
"""Entries of ttls that no slot has any more, beside as many as there are ttls, before they are dropped."""


class Ripening:
    """For each ttl the time before which no slot of it expires: a heap, with at most one entry of a ttl.

    An entry's time may be too early, never too late: it is put right when it comes to the top.
    """

    def __init__(self, aging: Mapping[float, Mapping[int, Slot]]) -> None:
        """`aging` has the slots by ttl, those of one ttl in the order of their age."""
        self._aging = aging
        self._heap: list[tuple[float, float]] = []
        self._known: set[float] = set()
        """The ttls in the heap; some may be of no slot any more."""

    def learn(self, ttl_s: float, now_s: float) -> None:
        """Note that a slot of this ttl ages from now on, the first of its ttl."""
        if ttl_s in self._known:
            return
        if len(self._heap) > 2 * len(self._aging) + _SLACK:
            self._rebuild()
        self._known.add(ttl_s)
        heappush(self._heap, (now_s + ttl_s, ttl_s))

    def _rebuild(self) -> None:
        firsts = [(ttl_s, next(iter(slots.values()), None)) for ttl_s, slots in self._aging.items()]
        self._heap = [(slot.born_s + ttl_s, ttl_s) for ttl_s, slot in firsts if slot is not None]
        self._known = {ttl_s for _, ttl_s in self._heap}
        heapify(self._heap)

    def ripe(self, now_s: float, most: int) -> Iterator[Slot]:
        """Yield up to `most` slots that have outlived their ttl. Each is to leave its ttl's slots."""
        heap = self._heap
        while most and heap and heap[0][0] <= now_s:
            ttl_s = heap[0][1]
            slots = self._aging.get(ttl_s, {})
            # Collected before any is deleted: a dict steps over every entry deleted from its front.
            aged = takewhile(lambda slot: slot.born_s + ttl_s <= now_s, slots.values())  # noqa: B023 - used here
            going = list(islice(aged, most))
            yield from going
            most -= len(going)
            first = next(iter(slots.values()), None)
            if first is None:
                heappop(heap)
                self._known.discard(ttl_s)
            else:
                heapreplace(heap, (first.born_s + ttl_s, ttl_s))
