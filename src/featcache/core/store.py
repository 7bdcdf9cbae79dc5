"""A slot's life: room reserved or waited for, bytes published, reads paid, the extent recycled.

Plain synchronous calls, no clock, no I/O, no torch: time comes in as ``now_s``, consequences go out
as effects for the caller to carry out. The state changes at the decision, not when the effect is
carried out, so no other call can come between (httpcore's connection pool is built so).
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from featcache.core.allocator import ALIGNMENT_BYTES, OffsetAllocator
from featcache.core.batches import Batches
from featcache.core.directory import Directory
from featcache.core.effects import (
    Effect,
    Expired,
    Found,
    Grow,
    Limits,
    Recycled,
    SlotRetired,
    Woken,
)
from featcache.core.endings import Ending, Endings
from featcache.core.key_queue import KeyQueue
from featcache.core.put_queue import Batch, Request, Waiter, WaitQueue
from featcache.core.recency import Lru, Recency
from featcache.core.ripening import Ripening
from featcache.core.rooms import Rooms
from featcache.core.slab_size import SlabSize
from featcache.core.slots import Slot, SlotState, SlotTable
from featcache.errors import PoolFull, StaleRef

# Members of an enum are slow to look up, and these are looked up at every put and payment.
_RESERVED, _PUBLISHED, _RETIRING = SlotState.RESERVED, SlotState.PUBLISHED, SlotState.RETIRING
_BOUND = "{} puts wait already, the bound: shed load, or raise Settings.waiters"


class Store(Batches, Rooms):
    """Slots of one pool, and what keeps each: its writer, reads owed, its key, grants.

    `KeyedStore` adds the calls that name a key.
    """

    def __init__(self, limits: Limits, recency: Recency | None = None) -> None:
        self.limits = limits
        self.max_feature_bytes = limits.capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        """Bytes of the largest feature that an empty pool could hold."""
        self.ahead: dict[int, Slot] = {}
        self.ahead_bytes = 0
        self.table = SlotTable(limits.slots)
        self.queue = WaitQueue()
        self.allocator = OffsetAllocator(0)
        self.size = SlabSize(limits, self.allocator)
        self.recency: Recency = recency or Lru()
        self.directory = Directory(self.recency)
        self.key_waiters = KeyQueue()
        self.endings = Endings(limits.slots)
        self.owing: dict[int, Slot] = {}
        """PUBLISHED slots that owe reads, by index, the oldest first."""
        self._retiring: dict[int, Slot] = {}
        self.serve_most: int | None = None
        """Waiters that are granted at one call; `serving` says that there may be more."""
        self.serving = False
        self._aging: dict[float, dict[int, Slot]] = {}  # by ttl: within one ttl age is order
        self._ripening = Ripening(self._aging)
        self.puts = self.recycled = self.expired = self.waited = self.reads_paid = 0

    # --- room -----------------------------------------------------------------------------------

    def reserve(self, request: Request, now_s: float, *, first: bool = False) -> Slot | None:
        """Return a RESERVED slot, or None if there is no room or others wait.

        The head of the queue is `first`: no waiter is before it.
        """
        if (self.queue.count and not first) or not self.table.free_slots:
            return None
        extent = self.allocator.allocate(request.nbytes)
        if extent is None:
            return None
        slot = self.table.allocate()
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

    def wait(
        self, request: Request, now_s: float, tag: object, *, bounded: bool = True
    ) -> tuple[Waiter, list[Effect]]:
        """Join the queue. `Limits.waiters` bounds those that wait for others' features.

        Not those whose room the slab can grow by, nor one whose room is made in pieces (not `bounded`).
        """
        self.check_size(request.nbytes)
        queue = self.queue
        by_growth = self.comes_by_growth(request, now_s)
        if bounded and not by_growth:
            growing = queue.growing if self.size.can_grow(now_s) else 0
            if queue.count - growing >= self.limits.waiters:
                raise PoolFull(_BOUND.format(queue.count - growing))
        waiter = queue.join(request, tag, by_growth=by_growth)
        self.waited += 1
        return waiter, self.serve(now_s)

    def accept(self, waiter: Waiter) -> Slot:
        """Finish the handshake: from here on the granted slot is the caller's to end."""
        return self.queue.accept(waiter)

    def leave(self, waiter: Waiter, now_s: float) -> list[Effect]:
        """Give up waiting (timeout, cancellation, death), whatever was granted meanwhile."""
        was_head = waiter is self.queue.head
        if not self.abandon(waiter) and not was_head:
            return []  # the head did not fit before, and does not now
        return self.serve(now_s)

    def abandon(self, waiter: Waiter) -> bool:
        """As `leave`, but `serve` is the caller's to call; return whether a slot came free."""
        # A grant that was not accepted comes back here, or its bytes would be lost.
        slot = self.queue.drop(waiter)
        if slot is None:
            return False
        self._free_all(self.apart(slot))
        return True

    def free_reserved(self, slot: Slot, now_s: float) -> list[Effect]:
        """Free a RESERVED slot that will not be published. No reader can have seen it."""
        if slot.state is not _RESERVED:
            raise ValueError(f"slot {slot.label} is {slot.state.name}, not RESERVED")
        slots = self.apart(slot)
        for each in slots:
            self.endings.note(each, Ending.WRITER_LOST)
        self._free_all(slots)
        return self.serve(now_s)

    def give_up_reserved(self, slot: Slot, now_s: float) -> list[Effect]:
        """Give up a RESERVED slot into which a copy may still be running: `recycle` frees it."""
        if slot.state is not _RESERVED:
            raise ValueError(f"slot {slot.label} is {slot.state.name}, not RESERVED")
        self.endings.note(slot, Ending.WRITER_LOST)
        return [self._retire(slot, now_s)]

    def publish(self, slot: Slot, now_s: float) -> list[Effect]:
        """Make a slot readable; its age counts from now."""
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
                    self._ripening.learn(slot.ttl_s, now_s)
                self._aging[slot.ttl_s][slot.index] = slot
            if slot.wanted_key is None:
                return []
        if slot.wanted_key is not None:
            return self._keep(slot, slot.wanted_key, now_s)
        # All named readers died while the bytes were being copied.
        self.endings.note(slot, Ending.READER_LOST)
        return [self._retire(slot, now_s)]

    # --- reads ----------------------------------------------------------------------------------

    def find(self, index: int, generation: int) -> Slot:
        """Return the PUBLISHED slot that a ref names, or raise StaleRef."""
        slot = self.table.find(index, generation)
        if slot is None or slot.state is not _PUBLISHED:
            raise StaleRef(self.why_stale(index, generation))
        return slot

    def why_stale(self, index: int, generation: int) -> str:
        """Say why a ref can't be read (`Endings`)."""
        return self.endings.why_stale(self.table, index, generation)

    def pay(
        self, index: int, generation: int, session: int, name: str | None, now_s: float
    ) -> list[Effect]:
        """Count one read as paid by `session`. A read that it does not owe, or paid, is ignored."""
        if not 0 <= index < self.table.count:
            return []
        return self.pay_all([(index, generation)], session, name, now_s)

    def pay_all(
        self, reads: Sequence[tuple[int, int]], session: int, name: str | None, now_s: float
    ) -> list[Effect]:
        """Count many reads as `pay` does, each by an index of the table and a generation."""
        slots = self.table.slots
        effects: list[Effect] = []
        unowed = 0
        for index, generation in reads:
            slot = slots[index]
            if slot.generation != generation or slot.state is not _PUBLISHED or not slot.reads_left:
                unowed += 1
                if slot.generation == generation and slot.state is _RESERVED:
                    self.paid_early(slot, session, name)  # its publish is still on its way
                continue
            if slot.owed_by_names is not None:
                if name not in slot.owed_by_names:
                    unowed += 1
                    continue
                slot.owed_by_names.remove(name)
            elif slot.paid_by is None:
                slot.paid_by = {session}
            elif session in slot.paid_by:
                unowed += 1
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
        self.reads_paid += len(reads) - unowed
        return effects

    def revoke(self, index: int, generation: int, now_s: float) -> list[Effect]:
        """Cancel every read still owed (discard). Raise StaleRef if the ref is no more.

        A slot that is kept under a key, or granted, stays readable by key.
        """
        return self._cancel(self.find(index, generation), now_s, Ending.DISCARDED)

    def _cancel(self, slot: Slot, now_s: float, ending: Ending) -> list[Effect]:
        self.endings.note(slot, ending)
        if slot.key is not None or slot.grants:
            slot.reads_left, slot.owed_by_names = 0, None  # it stays, for readers that owe none
        # A reader writes `held` before it looks at `live`. The hold of one that looked just before
        # `live` is cleared may still be on its way: the holds are looked at only after the grace.
        return self._settle(slot, now_s, self.limits.grace_s)

    def expire(self, now_s: float, most: int | None = None) -> list[Effect]:
        """Revoke the refs that have outlived their ttl, or `most` of them."""
        effects: list[Effect] = []
        for slot in self._ripening.ripe(now_s, len(self.owing) if most is None else most):
            effects.append(Expired(slot.label, slot.nbytes, now_s - slot.born_s, slot.owed_by))
            effects += self._cancel(slot, now_s, Ending.EXPIRED)
            self.expired += 1
        return effects

    # --- recycling ------------------------------------------------------------------------------

    def due(self, now_s: float) -> list[Slot]:
        """Return retiring slots whose grace has passed: the caller recycles those that are not held."""
        return [slot for slot in self._retiring.values() if slot.due_s <= now_s and not slot.grants]

    def first_retiring(self, most: int) -> list[Slot]:
        """Return the slots that have been RETIRING the longest."""
        return list(islice(self._retiring.values(), most))

    def recycle(self, slots: Iterable[Slot], now_s: float) -> list[Effect]:
        """Free the extents of retired slots that no session holds, and serve the queue."""
        effects: list[Effect] = []
        retiring = self._retiring
        for slot in slots:
            index = slot.index
            if index not in retiring or retiring[index] is not slot:
                raise ValueError(f"slot {slot.label} is {slot.state.name}, not RETIRING")
            del retiring[index]
            if slot.of is not None:
                effects += self._unshare(slot, now_s)
                continue
            effects.append(Recycled(index, slot.generation, slot.nbytes))
            self._free(slot)
            self.recycled += 1
        return effects + self.serve(now_s) if self.queue.count else effects

    # --- size -----------------------------------------------------------------------------------

    def grown(self, end_bytes: int, now_s: float) -> list[Effect]:
        self.size.grown(end_bytes)
        return self.serve(now_s)

    def shrink(self, now_s: float) -> int | None:
        """Cut off idle tail segments, see `SlabSize.shrink`; then `shrunk` is due."""
        return self.size.shrink(now_s, wanted=bool(self.queue))

    def shrunk(self, now_s: float) -> list[Effect]:
        self.size.shrunk()
        return self.serve(now_s)

    # --- the rules themselves -------------------------------------------------------------------

    def _settle(self, slot: Slot, now_s: float, grace_s: float = 0.0) -> list[Effect]:
        """Note that a slot owes no reads any more; retire it unless a key or a grant keeps it."""
        self._leave_owing(slot)
        if slot.key is None and not slot.grants:
            return [self._retire(slot, now_s, grace_s)]
        self.directory.refresh(slot)
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

    def _keep(self, slot: Slot, key: bytes, now_s: float) -> list[Effect]:
        """Keep a slot that was just published under its key; grant it to those that wait for it."""
        slot.wanted_key = None
        replaced = self.directory.keep(key, slot, now_s)
        if replaced is not None and not replaced.reads_left:
            self.endings.note(replaced, Ending.REPLACED)
        effects = [] if replaced is None else self._unkept(replaced, now_s, self.limits.grace_s)
        if found := self.key_waiters.found(key, slot):
            # Granted before they are told: until they take the slot, only these grants keep the bytes.
            self._grant(slot, now_s, len(found))
            effects += [Found(waiter) for waiter in found]
        return effects

    def _unkept(self, slot: Slot, now_s: float, grace_s: float) -> list[Effect]:
        """Retire a slot whose key was dropped, unless reads are owed or granted."""
        return [] if slot.reads_left or slot.grants else [self._retire(slot, now_s, grace_s)]

    def _grant(self, slot: Slot, now_s: float, count: int = 1) -> None:
        """Give out reads by key, which count as a use."""
        slot.grants += count
        self.recency.touch(slot, now_s)
        if slot.idle:
            self.directory.refresh(slot)

    def _free(self, slot: Slot) -> None:
        assert slot.extent is not None, "only FREE slots have no extent"
        self.allocator.free(slot.extent)
        self.table.free(slot)

    def serve(self, now_s: float) -> list[Effect]:
        """Grant the queue from its head, for as long as the head fits: no waiter is overtaken."""
        effects: list[Effect] = []
        self.serving = False
        while (waiter := self.queue.head) is not None:
            if len(effects) == self.serve_most:
                # The rest is for the next call; meanwhile nobody overtakes them.
                self.serving = True
                break
            request = waiter.request
            reserve = self.reserve_batch if type(request) is Batch else self.reserve
            slot = reserve(request, now_s, first=True)  # type: ignore[arg-type]  # each its own
            if slot is None:
                end = self.growth_of(request, now_s)
                if end and not self.table.full:
                    self.size.begin_growth()
                    effects.append(Grow(end))
                break
            self.queue.grant(waiter, slot)
            effects.append(Woken(waiter))
        return effects
