"""Reads by key: granted by the owner in a message, or taken by the session itself in a lease entry.

A lease entry is a hazard pointer with an end of its own. Its three words are in the session's page:

| word | written | says |
| --- | --- | --- |
| `lease` | first | the place (slot and generation) of the feature that is read |
| `serial` | second | the serial number of this read: the entry is in use while it differs from `ended` |
| `ended` | last, behind the last use in stream order | the serial number of the last read that is done |

A reader writes `lease` and `serial`, fences, then looks at `live`; the owner clears `live`, fences, then
looks at the entries. Whichever comes second sees the other's word. A lease that is in use has the same
two words as long as it is, so an owner that reads an entry's words one by one misses none; an entry is
taken again only when its `ended` word has landed, so that no end on a stream overtakes the next read.
A count a slot would not do: reads on several streams end out of order, and one that is given up must
not be overtaken by an end that is still on its way.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from featcache.core.recency.policy import STEP
from featcache.errors import FeatcacheError, MalformedRef
from featcache.memory.key_table import SLOT_BITS, SLOT_MASK
from featcache.memory.slab import Mapping, Order, PageWords
from featcache.memory.words import (
    TSO,
    Counts,
    Header,
    SessionWords,
    fence_after_lock,
    fence_stores,
)
from featcache.ref import FeatureRef

_WAITING, _TICK = Header.WAITING, Header.TICK
_now_ns: Final = time.monotonic_ns
_WITHIN_TICK: Final = STEP - 1
_GRANTED, _ENDED = 1, 3  # indices into PageWords
REVOKED: Final = -1
NO_ENTRY: Final = -2


class Uses:
    """The uses of one pinned slot in progress, and the orders behind which its read is paid."""

    __slots__ = ("behind", "count", "pays")

    def __init__(self) -> None:
        self.count = 1
        self.pays = False
        self.behind: list[Order] = []


ONE_USE: Final = Uses()
"""Of a slot with a single use, which almost all have; never written, but replaced."""


class LeasedReads:
    """The part of an `Attachment` that reads by key."""

    mapping: Mapping
    pool_id: bytes
    header: memoryview
    _gone: FeatcacheError | None
    _lock: threading.Lock
    _pins: dict[tuple[int, int], Uses]
    _on_idle: Callable[[], object] | None
    _in_flight: dict[tuple[int, int], int]
    _page_header: memoryview
    _plain: PageWords
    _adopted: PageWords
    _live: memoryview
    _offset: memoryview
    _nbytes: memoryview
    _slots: int
    _unrung: int
    _ring: Callable[[], object]

    def __init__(self, page: SessionWords) -> None:
        self._lease, self._serial, self._ended = page.lease, page.serial, page.ended
        self._used = page.used
        self._free = list(range(len(page.lease) - 1, -1, -1))
        """Lease entries that can be taken, the lowest last: the owner looks no further than the highest."""
        self._landing: deque[tuple[int, int]] = deque()
        """Entries whose `ended` words are on a stream, with the serials that are to land."""
        self._high = 0
        self._serials = self._revoked = self._misses = 0
        self._leases_out = self._grants_out = 0
        """Reads by key that have begun, and not ended for their callers: of entries, and granted."""

    # --- lease entries ----------------------------------------------------------------------------

    def begin_lease(self, place: int) -> tuple[int, int]:
        """Take an entry for a read of the slot at a place; return its index and serial.

        The index is REVOKED if the slot was taken back meanwhile, NO_ENTRY if none is free. Raises as
        `check`.
        """
        slot = place & SLOT_MASK
        if slot >= self._slots:
            return NO_ENTRY, 0  # no owner writes that
        with self._lock:
            if self._gone is not None:  # in the lock, in which its end looks for reads that are out
                self.check()
            if self._landing:
                self._take_landed()
            # A session may have as many reads by key out as it has entries, whoever gave them out.
            if len(self._free) <= self._grants_out:
                return NO_ENTRY, 0
            index = self._free.pop()
            self._serials = serial = self._serials + 1
            if index >= self._high:
                self._high = self._page_header[Counts.LEASES_HIGH] = index + 1
            self._lease[index] = place
            if not TSO:
                fence_stores()  # the place before the serial that puts the entry in use
            self._serial[index] = serial
            self._leases_out += 1
        # The hazard pointer: the entry must be visible to the owner before `live` is read, or the
        # owner could revoke, find no lease, and recycle the extent under this read.
        if not TSO:
            fence_after_lock()
        if self._live[slot] != place >> SLOT_BITS:
            self.take_back_lease(index, serial)
            return REVOKED, 0
        # While it is leased: later this would count as a use of the slot's next feature. The clock, in
        # microseconds, gives uses within one tick their order, whichever sessions' they are.
        self._used[slot] = self.header[_TICK] + (_now_ns() >> 10 & _WITHIN_TICK)
        return index, serial

    def take_back_lease(self, index: int, serial: int) -> None:
        """Undo a lease under which nothing was read: nothing of it is on a stream, and it is no hit."""
        with self._lock:
            self._leases_out -= 1
            self._revoked += 1
            self._page_header[Counts.REVOKED] = self._revoked
            self._ended[index] = serial
            self._free.append(index)
            idle = None if self._on_idle is None else self._idle()
        if self.header[_WAITING]:  # the owner may have found the entry in use
            self._ring_if_due()
        if idle is not None:
            idle()

    def _take_landed(self) -> None:
        """Free entries whose reads ended on a stream and landed since, with the lock held."""
        landing, ended = self._landing, self._ended
        while landing and ended[landing[0][0]] == landing[0][1]:
            self._free.append(landing.popleft()[0])
        if self._free:
            return
        for index, serial in list(landing):  # streams end out of order
            if ended[index] == serial:
                self._free.append(index)
        free = set(self._free)
        self._landing = deque(each for each in landing if each[0] not in free)

    def end_lease(self, index: int, serial: int, order: Order, behind: list[Order] | None) -> None:
        """End the read of an entry, behind `order` and all of `behind`."""
        with self._lock:
            self._leases_out -= 1
            if behind:
                order = self.mapping.follow(order, behind)
            if order is not None and self.mapping.deferred:
                self.mapping.signal(self._adopted[_ENDED], index, serial, order)
                self._landing.append((index, serial))
            else:  # as a mapping's `signal` of what is done, inline
                if not TSO:
                    fence_stores()  # the reads before the word that ends them
                self._ended[index] = serial
                self._free.append(index)
            idle = None if self._on_idle is None else self._idle()
        # After the word: an owner that is woken must find it.
        if self.header[_WAITING]:
            self._ring_if_due()
        if idle is not None:
            idle()

    def count_miss(self) -> None:
        """Count a lookup for which the key table alone was enough to say that there is nothing."""
        with self._lock:
            self._misses += 1
            self._page_header[Counts.MISSES] = self._misses

    @property
    def lookups(self) -> tuple[int, int]:
        """Lookups that the key table answered: hits and misses."""
        return self._serials - self._revoked, self._misses

    @property
    def leases_ended(self) -> bool:
        """Whether the ends of all reads have landed."""
        ended = np.frombuffer(self._ended, dtype=np.uint64)[: self._high]
        return bool((np.frombuffer(self._serial, dtype=np.uint64)[: self._high] == ended).all())

    def forget_leases(self) -> None:
        """Cut a forked child off."""
        nowhere = memoryview(bytearray(8 * max(self._slots, len(self._lease)))).cast("Q")
        self._lease = self._serial = self._ended = self._used = nowhere

    # --- grants -----------------------------------------------------------------------------------

    def take_grant(self, index: int, serial: int) -> None:
        """Pin a read granted by the owner. No `held` word: the owner tracks grants."""
        with self._lock:
            self._grants_out += 1
            self._pins[-1 - index, serial] = ONE_USE  # further uses are counted by the lease

    def pay_grant(self, index: int, serial: int, order: Order, behind: list[Order] | None) -> None:
        """Pay it, once, behind `order` and all of `behind`."""
        with self._lock:
            del self._pins[-1 - index, serial]
            self._grants_out -= 1
            if behind:
                order = self.mapping.follow(order, behind)
            self._signal(_GRANTED, index, serial, order)
            idle = None if self._on_idle is None else self._idle()
        if self.header[_WAITING]:
            self._ring_if_due()
        if idle is not None:
            idle()

    def return_grant(self, index: int, serial: int) -> None:
        """Pay a granted read that was never taken."""
        self.check_grant(index, serial)
        self._signal(_GRANTED, index, serial, None)
        self._ring_if_due()

    def check_grant(self, index: int, serial: int) -> None:
        """Raise MalformedRef if the page has no such grant word, or it is out already."""
        if index >= len(self._plain.granted) or (-1 - index, serial) in self._pins:
            raise MalformedRef(f"no grant {index}:{serial} can be had: the owner is at fault")

    def check_leased_ref(self, ref: FeatureRef) -> None:
        """Raise MalformedRef if a ref that came with a grant or lease is not of this pool or its slot.

        As `check` besides.
        """
        index = ref.slot
        if self._gone is not None:
            self.check()
        if (
            ref.pool_id != self.pool_id
            or index >= self._slots
            or self._offset[index] != ref.offset_bytes
            or self._nbytes[index] != ref.nbytes
        ):
            raise MalformedRef("the granted ref is not its slot's: the owner is at fault")

    # --- what all reads share -----------------------------------------------------------------------

    def check(self) -> None:
        """Raise the reason why no new read may begin, if there is one."""
        if self._gone is not None:
            raise type(self._gone)(*self._gone.args)

    def _idle(self) -> Callable[[], object] | None:
        """Return the callback that is due, with the lock held, if nothing is pinned any more."""
        idle = None
        if not self._pins and not self._leases_out:
            idle, self._on_idle = self._on_idle, None
        return idle

    def _ring_if_due(self) -> None:
        ring_at = self.header[_WAITING]
        if ring_at:
            self._unrung += 1
            if self._unrung >= ring_at:
                self._unrung = 0
                self._ring()

    def _signal(self, which: int, index: int, value: int, order: Order) -> None:
        if self.mapping.deferred and order is not None:
            self._in_flight[which, index] = value
        else:
            self._in_flight.pop((which, index), None)  # the CPU writes it now
        self.mapping.signal(self._adopted[which], index, value, order)
