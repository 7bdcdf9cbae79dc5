"""The store decides: who gets which bytes, when they are taken back, whom that wakes.

Plain synchronous calls, no clock, no I/O, no torch: time comes in as ``now_s``, consequences go out
as effects for the caller to carry out. The state changes at the decision, not when the effect is
carried out, so no other call can come between (httpcore's connection pool is built so).
"""

from collections.abc import Iterable
from itertools import takewhile

from featcache.core.allocator import ALIGNMENT_BYTES, OffsetAllocator
from featcache.core.effects import Effect, Expired, Grow, Limits, Recycled, SlotRetired, Woken
from featcache.core.put_queue import Request, Waiter, WaitQueue
from featcache.core.slots import Slot, SlotState, SlotTable
from featcache.errors import FeatureTooLarge, PoolFull, StaleRef

# Members of an enum are slow to look up, and these are looked up at every put and payment.
_RESERVED, _PUBLISHED, _RETIRING = SlotState.RESERVED, SlotState.PUBLISHED, SlotState.RETIRING


def up(value: int, unit: int) -> int:
    """Return the least multiple of a unit that is no less."""
    return -(-value // unit) * unit


class Store:
    """Allocator, slot table and queue of one pool under one set of rules."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.max_feature_bytes = limits.capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        """Bytes of the largest feature that an empty pool could hold."""
        self.table = SlotTable(limits.slots)
        self.queue = WaitQueue()
        self.allocator = OffsetAllocator(0)
        self.owing: dict[int, Slot] = {}
        """PUBLISHED slots that owe reads, by index, the oldest first."""
        self._retiring: dict[int, Slot] = {}
        self._aging: dict[float, dict[int, Slot]] = {}  # by ttl: within one ttl age is order
        self._growing = False
        self._grow_after_s = float("-inf")
        self._tail_since_s: float | None = None
        self._tail_high_bytes = 0
        self.tail_in_use = False
        """Whether an idle window ended in which the last segment was in use throughout."""
        self.puts = self.recycled = self.expired = self.waited = 0

    # --- room -----------------------------------------------------------------------------------

    @property
    def committed_bytes(self) -> int:
        """Bytes of the slab that have memory behind them."""
        return self.allocator.end_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes not given out, committed or not: `used_bytes` and these make the capacity."""
        return self.limits.capacity_bytes - self.allocator.used_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest feature that would fit now, counting what the slab may still grow by."""
        growth = self.limits.capacity_bytes - self.allocator.end_bytes
        return max(self.allocator.largest_free_bytes, self.allocator.tail_free_bytes + growth)

    @property
    def retiring_bytes(self) -> int:
        """Extents that are free as soon as nobody holds them."""
        extents = [slot.extent for slot in self._retiring.values()]
        return sum(extent.size_bytes for extent in extents if extent is not None)

    @property
    def blocked_puts(self) -> int:
        """Puts that wait for others' bytes: not those that wait for the slab to change its size."""
        return 0 if self._growing else len(self.queue)

    def check_size(self, nbytes: int) -> None:
        """Raise FeatureTooLarge for what even an empty pool can't hold."""
        if nbytes > self.max_feature_bytes:
            raise FeatureTooLarge(
                f"a feature of {nbytes} bytes never fits a pool of {self.limits.capacity_bytes}: "
                "raise capacity or split the feature"
            )

    def reserve(self, request: Request, now_s: float, *, first: bool = False) -> Slot | None:
        """Return a RESERVED slot, or None if there is no room or others came first.

        Nobody comes before the head of the queue, which is `first`.
        """
        if (self.queue.count and not first) or not self.table.free:
            return None
        extent = self.allocator.allocate(request.nbytes)
        if extent is None:
            return None
        slot = self.table.take()
        slot.extent = extent
        extent.holder = slot
        slot.nbytes = request.nbytes
        slot.ttl_s = request.ttl_s
        slot.wanted_key = request.key
        slot.born_s = now_s
        readers = request.readers
        if type(readers) is int or isinstance(readers, int):
            slot.reads_left = readers
        else:
            slot.reads_left, slot.owed_by_names = len(readers), set(readers)
        return slot

    def wait(self, request: Request, now_s: float, tag: object) -> tuple[Waiter, list[Effect]]:
        """Stand in the queue for what `reserve` would give."""
        self.check_size(request.nbytes)
        if len(self.queue) >= self.limits.waiters:
            raise PoolFull(
                f"{len(self.queue)} puts wait already, the bound: shed load, or raise Settings.waiters"
            )
        waiter = self.queue.join(request, now_s, tag)
        self.waited += 1
        return waiter, self.serve(now_s)

    def accept(self, waiter: Waiter) -> Slot:
        """Finish the handshake: the granted slot is now the caller's."""
        return self.queue.accept(waiter)

    def leave(self, waiter: Waiter, now_s: float) -> list[Effect]:
        """Give up waiting (timeout, cancellation, death), whatever was granted meanwhile."""
        slot = self.queue.drop(waiter)
        if slot is not None:
            self._free(slot)
        return self.serve(now_s)

    def free_reserved(self, slot: Slot, now_s: float) -> list[Effect]:
        """Take back a RESERVED slot that will not be published. Nobody can have read it."""
        if slot.state is not _RESERVED:
            raise ValueError(f"slot {slot.label} is {slot.state.name}, not RESERVED")
        self._free(slot)
        return self.serve(now_s)

    def give_up_reserved(self, slot: Slot, now_s: float) -> list[Effect]:
        """Give up a RESERVED slot whose bytes may still be on their way: `recycle` frees it."""
        if slot.state is not _RESERVED:
            raise ValueError(f"slot {slot.label} is {slot.state.name}, not RESERVED")
        slot.state = _RETIRING
        slot.retired_s = slot.due_s = now_s
        self._retiring[slot.index] = slot
        return [SlotRetired(slot)]

    def publish(self, slot: Slot, now_s: float) -> list[Effect]:
        """Count the slot's bytes as readable, and its age from now."""
        if slot.state is not _RESERVED:
            raise ValueError(f"slot {slot.label} is {slot.state.name}, not RESERVED")
        slot.state = _PUBLISHED
        slot.born_s = now_s
        self.puts += 1
        if slot.reads_left:
            self.owing[slot.index] = slot
            if slot.ttl_s is not None:
                if slot.ttl_s not in self._aging:
                    self._aging[slot.ttl_s] = {}
                self._aging[slot.ttl_s][slot.index] = slot
            if slot.wanted_key is None:
                return []
        if slot.wanted_key is not None:
            return self._keep(slot, now_s)
        # Every named reader died while the bytes were being copied.
        return [self._retire(slot, now_s)]

    # --- reads ----------------------------------------------------------------------------------

    def find(self, index: int, generation: int) -> Slot:
        """Return the PUBLISHED slot that a ref names, or raise StaleRef."""
        slot = self.table.find(index, generation)
        if slot is None or slot.state is not _PUBLISHED:
            raise StaleRef(f"ref {index}:{generation} was recycled, expired or discarded")
        return slot

    def pay(
        self, index: int, generation: int, session: int, name: str | None, now_s: float
    ) -> list[Effect]:
        """Count one read as paid by `session`. What it does not owe, or paid before, is ignored."""
        if not 0 <= index < self.table.count:
            return []
        return self.pay_all([(index, generation)], session, name, now_s)

    def pay_all(
        self, reads: Iterable[tuple[int, int]], session: int, name: str | None, now_s: float
    ) -> list[Effect]:
        """Count many reads as `pay` does, each by an index of the table and a generation."""
        slots = self.table.slots
        effects: list[Effect] = []
        for index, generation in reads:
            slot = slots[index]
            if slot.generation != generation or slot.state is not _PUBLISHED or not slot.reads_left:
                continue
            if slot.owed_by_names is not None:
                if name not in slot.owed_by_names:
                    continue
                slot.owed_by_names.remove(name)
            elif slot.paid_by is None:
                slot.paid_by = {session}
            elif session in slot.paid_by:
                continue
            else:
                slot.paid_by.add(session)
            slot.reads_left -= 1
            if slot.reads_left:
                continue
            if slot.key is None and not slot.grants:  # as `_settle`, inline
                self._leave_owing(slot)
                effects.append(self._retire(slot, now_s))
            else:
                effects += self._settle(slot, now_s)
        return effects

    def waive_reads(self, name: str, now_s: float) -> tuple[int, list[Effect]]:
        """Pay everything that a dead named reader still owes; return how many reads that was."""
        paid, effects = 0, list[Effect]()
        for slot in self.table.in_use():
            if (
                slot.owed_by_names is None
                or name not in slot.owed_by_names
                or slot.state is _RETIRING
            ):
                continue
            slot.owed_by_names.remove(name)
            slot.reads_left -= 1
            paid += 1
            if slot.reads_left == 0 and slot.state is _PUBLISHED:
                effects += self._settle(slot, now_s)
        return paid, effects

    def revoke(self, index: int, generation: int, now_s: float) -> list[Effect]:
        """Cancel every read still owed (discard). Raise StaleRef if the ref is no more.

        What is kept under a key, or read by one, stays for those who come by the key.
        """
        return self._cancel(self.find(index, generation), now_s)

    def _cancel(self, slot: Slot, now_s: float) -> list[Effect]:
        if slot.key is not None or slot.grants:
            slot.reads_left, slot.owed_by_names = (
                0,
                None,
            )  # it is read by others, who do not owe these
        return self._settle(slot, now_s, self.limits.grace_s)

    def expire(self, now_s: float) -> list[Effect]:
        """Revoke what has outlived its ttl."""
        effects: list[Effect] = []
        for ttl_s, slots in list(self._aging.items()):
            # Taken out whole before any goes: a dict steps over every entry deleted from its front.
            ripe = list(takewhile(lambda slot: slot.born_s + ttl_s <= now_s, slots.values()))  # noqa: B023 - used here
            for slot in ripe:
                age_s = now_s - slot.born_s
                effects.append(Expired(slot.label, slot.nbytes, age_s, slot.owed_by))
                effects += self._cancel(slot, now_s)
                self.expired += 1
        return effects

    # --- recycling ------------------------------------------------------------------------------

    def due(self, now_s: float) -> list[Slot]:
        """Return retiring slots whose grace has passed: recycle those that no session holds."""
        return [slot for slot in self._retiring.values() if slot.due_s <= now_s and not slot.grants]

    def recycle(self, slots: Iterable[Slot], now_s: float) -> list[Effect]:
        """Free the extents of retired slots that nobody holds, and serve the queue."""
        effects: list[Effect] = []
        retiring = self._retiring
        for slot in slots:
            index = slot.index
            if index not in retiring or retiring[index] is not slot:
                raise ValueError(f"slot {slot.label} is {slot.state.name}, not RETIRING")
            del retiring[index]
            effects.append(Recycled(index, slot.generation, slot.nbytes))
            self._free(slot)
            self.recycled += 1
        return effects + self.serve(now_s) if self.queue.count else effects

    # --- size -----------------------------------------------------------------------------------

    def growth_for(self, nbytes: int, now_s: float) -> int:
        """Return the end in bytes to commit up to so that `nbytes` fit, or 0 if that can't help."""
        if self._growing or now_s < self._grow_after_s:
            return 0
        limits, end = self.limits, self.allocator.end_bytes
        size = max(up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES)
        missing = size - self.allocator.tail_free_bytes
        if missing <= 0 or end + missing > limits.capacity_bytes:
            return 0
        return min(up(end + missing, limits.segment_bytes), limits.capacity_bytes)

    def growing(self) -> None:
        """Note that a commit is under way outside; `grown` or `grow_failed` ends it."""
        self._growing = True

    def grown(self, end_bytes: int, now_s: float) -> list[Effect]:
        """Count the slab as committed up to `end_bytes` and serve the queue."""
        self._growing = False
        self.allocator.grow(end_bytes)
        self._tail_since_s = None
        self.tail_in_use = False
        return self.serve(now_s)

    def grow_failed(self, now_s: float) -> None:
        """Count the pool as full at its present size for a while."""
        self._growing = False
        self._grow_after_s = now_s + self.limits.grow_retry_s

    def shrink(self, now_s: float) -> int | None:
        """Cut off tail segments that were empty for `idle_s`; return the new end, or None.

        After an end was returned the caller gives the memory back and says `shrunk`.

        The window keeps the highest end that was in use since it began, as seen at each call.
        """
        allocator, limits = self.allocator, self.limits
        in_use = allocator.end_bytes - allocator.tail_free_bytes
        if self._tail_since_s is None:
            self._tail_since_s, self._tail_high_bytes = now_s, in_use
        self._tail_high_bytes = max(self._tail_high_bytes, in_use)
        if self._growing or self.queue or now_s - self._tail_since_s < limits.idle_s:
            return None
        keep = max(up(self._tail_high_bytes, limits.segment_bytes), limits.initial_bytes)
        self._tail_since_s = None
        self.tail_in_use = keep >= allocator.end_bytes
        if self.tail_in_use:
            return None
        allocator.shrink(keep)
        self._growing = True  # nothing grows into what is being given back
        return keep

    def shrunk(self, now_s: float) -> list[Effect]:
        """Note that what `shrink` cut off has been given back."""
        self._growing = False
        return self.serve(now_s)

    # --- the rules themselves -------------------------------------------------------------------

    def _settle(self, slot: Slot, now_s: float, grace_s: float = 0.0) -> list[Effect]:
        """Count a slot as owing no reads any more; retire it unless a key or a grant keeps it."""
        self._leave_owing(slot)
        if slot.key is None and not slot.grants:
            return [self._retire(slot, now_s, grace_s)]
        self._kept(slot)
        return []

    def _leave_owing(self, slot: Slot) -> None:
        index, ttl_s = slot.index, slot.ttl_s
        if index not in self.owing:
            return
        del self.owing[index]
        if ttl_s is None:
            return
        aging = self._aging[ttl_s]
        del aging[index]
        if not aging:
            del self._aging[ttl_s]

    def _retire(self, slot: Slot, now_s: float, grace_s: float = 0.0) -> SlotRetired:
        slot.state = _RETIRING
        slot.retired_s = now_s
        slot.due_s = now_s + grace_s
        self._retiring[slot.index] = slot
        return SlotRetired(slot)

    def _keep(self, slot: Slot, now_s: float) -> list[Effect]:
        """Keep a slot that was just published under the key that it wants (`KeyedStore`)."""
        raise NotImplementedError

    def _kept(self, slot: Slot) -> None:
        """Note that a slot which a key or a grant keeps owes no reads any more (`KeyedStore`)."""
        raise NotImplementedError

    def _free(self, slot: Slot) -> None:
        assert slot.extent is not None, "only FREE slots have no extent"
        self.allocator.free(slot.extent)
        self.table.give(slot)

    def serve(self, now_s: float) -> list[Effect]:
        """Grant the queue from its head while what it asks for fits."""
        effects: list[Effect] = []
        while (waiter := self.queue.head) is not None:
            slot = self.reserve(waiter.request, now_s, first=True)
            if slot is None:
                if not self.table.full and (end := self.growth_for(waiter.request.nbytes, now_s)):
                    self.growing()
                    effects.append(Grow(end))
                break
            self.queue.grant(waiter, slot)
            effects.append(Woken(waiter))
        return effects
