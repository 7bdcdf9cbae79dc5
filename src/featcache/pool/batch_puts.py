"""The owner's puts of many features: room for all at once, one batch of words, all of them or none."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featcache.control.turns import BYTES_SHIFT, Turn
from featcache.core.put_queue import Batch, Request, Waiter
from featcache.core.slots import Slot
from featcache.errors import CacheClosed, FeatcacheError, at_member
from featcache.memory.pack import check_parts
from featcache.memory.slab import Order
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef
from featcache.session.staging import InLoop, Staged

if TYPE_CHECKING:
    from featcache.pool.writer import Place

_now = time.monotonic


class BatchPuts:
    """The part of an `OwnerWriter` that puts many."""

    _pool: Pool
    turn: Turn

    @property
    def has_callers(self) -> bool:
        """Whether puts of the owner's own wait for their turn: whoever asks now comes after them."""
        return self.turn.has_callers

    def enter(self, request: Request, *, wait: bool) -> "Slot | Waiter":
        """Reserve, or join the queue, at this call's turn."""
        raise NotImplementedError

    def ask(self, request: Request, *, wait: bool) -> "Place":
        """Take a place in the queue."""
        raise NotImplementedError

    async def slot_of(self, place: "Place", timeout_s: float | None, *, wait: bool) -> Slot:
        """Return the slot of a place, once it has one."""
        raise NotImplementedError

    def reserve_batch(self, batch: Batch) -> Slot | None:
        """As `reserve`, of a batch: the first of its slots."""
        pool = self._pool
        pool.put_bytes += batch.nbytes
        self.turn.left -= len(batch.members) // 4
        pool.collect()
        slot = pool.store.reserve_batch(batch, _now())
        if slot is None and not pool.store.queue.count:
            if pool.store.ahead and pool.ahead.take_back():
                slot = pool.store.reserve_batch(batch, _now())
            while slot is None and pool.collector.evict_some(batch):
                slot = pool.store.reserve_batch(batch, _now())
                if slot is not None or self.turn.left <= 0:
                    break
        return slot

    puts_here = False

    def put_here(self, staged: Staged, in_loop: InLoop) -> FeatureRef | None:
        """Return None: its puts are all the loop's."""

    async def put_many(
        self, staged: Sequence[Staged], timeout_s: float | None, *, wait: bool
    ) -> list[FeatureRef]:
        """Copy features in and return their refs, standing in the queue for the room of all if `wait`.

        Raises:
            FeatureTooLarge: they never fit together.
            PoolFull, PutTimeout, CacheClosed: as `OwnerWriter.put`.

        """
        pool = self._pool
        batch = pool.store.batch([each.request for each in staged])
        place: Place | None
        if self.turn.left < len(staged) // 8:  # its room is one piece of work: in a turn of its own
            place = self.turn.place(lambda: self.enter(batch, wait=wait))
        else:
            place = self.reserve_batch(batch) or self.ask(batch, wait=wait)
        slots = pool.store.apart(await self.slot_of(place, timeout_s, wait=wait))
        await self._write(slots, staged)
        return await self._publish(slots, staged)

    # --- the bytes --------------------------------------------------------------------------------

    async def _write(self, slots: list[Slot], staged: Sequence[Staged]) -> None:
        """Write all: here what is soon copied, all else in one run of a thread. If one fails, none stays."""
        pool, turn, at = self._pool, self.turn, [0]
        large: list[int] = []
        kept = set(range(len(slots)))  # those that are this task's to give up
        try:
            for member, (slot, each) in enumerate(zip(slots, staged, strict=True)):
                at[0] = member
                blocking_bytes = pool.slab.blocking_write_bytes(each.parts)
                if blocking_bytes > pool.settings.inline_bytes:
                    large.append(member)
                    continue
                turn.left -= 1 + (blocking_bytes >> BYTES_SHIFT)
                if turn.left < 0:
                    await turn.wait()
                self._check_open()
                check_parts(each.parts)  # its caller may have freed a tensor meanwhile
                pool.slab.write(slot.offset_bytes, each.parts, each.order)
            if large:
                kept -= set(large)
                await self._write_large(slots, staged, large, at)
                kept |= set(large)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                kept |= set(large)  # the thread is done
            for member in kept:
                pool.give_up_reserved(slots[member], staged[member].order)
            at_member(error, at[0])
            raise

    async def _write_large(
        self, slots: list[Slot], staged: Sequence[Staged], large: list[int], at: list[int]
    ) -> None:
        pool = self._pool
        work = [(n, slots[n].offset_bytes, staged[n].parts, staged[n].order) for n in large]

        def write() -> None:
            for member, offset_bytes, parts, order in work:
                at[0] = member
                pool.slab.write(offset_bytes, parts, order)

        def give_up(_: object) -> None:
            for member, _, _, order in work:
                pool.give_up_reserved(slots[member], order)

        await pool.offload.run(write, give_up)

    def _check_open(self) -> None:
        if self._pool.closed:
            raise CacheClosed("the cache was closed while this put was copying")

    # --- the words --------------------------------------------------------------------------------

    async def _publish(self, slots: list[Slot], staged: Sequence[Staged]) -> list[FeatureRef]:
        """Publish all, behind one batch of words for each stream; if this ends early, none stays."""
        pool, turn, refs = self._pool, self.turn, list[FeatureRef]()
        try:
            self._check_open()
            self._signal(slots, staged)
            for slot, each in zip(slots, staged, strict=True):
                turn.left -= 1 if slot.wanted_key is None else 2
                if turn.left < 0:
                    await turn.wait()
                    self._check_open()
                refs.append(pool.announce(slot, each.specs, slot.born_s))
        except BaseException:
            self._withdraw(slots, staged, len(refs))
            raise
        return refs

    def _signal(self, slots: list[Slot], staged: Sequence[Staged]) -> None:
        pool, words = self._pool, dict[int, tuple[Order, list[tuple[int, int]]]]()
        for slot, each in zip(slots, staged, strict=True):
            order = each.order
            words.setdefault(id(order), (order, []))[1].append((slot.index, slot.generation))
            if order:  # as `OwnerWriter`: the owner's own reads follow this stream
                pool.own_writes[slot.index] = slot.generation, order
        for order, values in words.values():
            pool.slab.signal_many(pool.complete, values, order)

    def _withdraw(self, slots: list[Slot], staged: Sequence[Staged], published: int) -> None:
        """Take back the first so many, which nobody was told of, and give up the others."""
        pool, store = self._pool, self._pool.store
        if pool.closed:
            return
        for slot in slots[:published]:
            if slot.key is not None and store.directory.find(slot.key) is slot:
                pool.apply(store.evict(slot.key, _now()))
            with contextlib.suppress(FeatcacheError):
                pool.apply(store.revoke(slot.index, slot.generation, _now()))
        for slot, each in zip(slots[published:], staged[published:], strict=True):
            pool.give_up_reserved(slot, each.order)
