"""The owner's puts: admission, waiting for room, and copying."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeAlias

import anyio

from featcache.control.turns import BYTES_SHIFT, LEAVE_QUEUE_UNITS
from featcache.core.put_queue import Batch, Request, Waiter, WaiterState
from featcache.core.slots import Slot
from featcache.errors import BackendUnavailable, CacheClosed, PoolFull, PutTimeout
from featcache.memory.pack import check_parts
from featcache.pool.batch_puts import BatchPuts
from featcache.pool.debtors import describe_room
from featcache.pool.late_puts import LatePut, Leavers
from featcache.pool.pool import Pool
from featcache.pool.refresh import hear
from featcache.pool.waits import PutWaits
from featcache.ref import FeatureRef
from featcache.session.arguments import parse_put
from featcache.session.staging import Staged

_COLLECT_BYTES: Final = 256 << 10
_MAX_UNCOLLECTED: Final = 64
"""Puts, however small, that count as `_collect_bytes`: a poll of thousands would hold up the loop."""
_now = time.monotonic


Place: TypeAlias = "Slot | Waiter | asyncio.Future[Slot | Waiter]"
"""A put's claim from its call on: a slot, a waiter in the queue, or a future in the line of callers."""


class OwnerWriter(BatchPuts):
    """The owner's puts into one of its pools."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # On the host the next put is to reuse an extent that is still warm in the cache; on a GPU it is
        # enough to look now and then, before the slab is full.
        self._collect_bytes = (
            pool.store.limits.capacity_bytes // 32 if pool.slab.deferred else _COLLECT_BYTES
        )
        self._least_bytes = 3 * self._collect_bytes
        self._put_bytes = self._collect_bytes // _MAX_UNCOLLECTED
        self.turn = pool.turn
        self.waits = PutWaits(pool)
        self.leavers = Leavers(pool, self.waits)

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any = None) -> Staged:
        """Validate a put, or raise SettingsError or FeatureTooLarge.

        Called in the caller's thread, whose current stream is the one that the feature is ready on.
        """
        pool = self._pool
        request, specs, packed = parse_put(feature, readers, ttl, key, pool.settings)
        if request.nbytes > pool.store.max_feature_bytes:
            pool.store.check_size(request.nbytes)  # which raises
        parts, order = pool.slab.stage(packed)
        return Staged(request, specs, parts, order)

    @property
    def stages_at_call(self) -> bool:
        """Whether a put is to note its place on the caller's stream before it waits for anything."""
        return self._pool.slab.deferred

    def put_nowait(self, staged: Staged) -> FeatureRef:
        """Copy a feature in and return its ref, or raise PoolFull. Growth happens inline."""
        request = staged.request
        slot = self.reserve(request, at_once=True) or self._reserve_now(request)
        if slot is None:
            raise self.full(request)
        return self._fill_now(slot, staged)

    def put(
        self, staged: Staged, timeout_s: float | None, *, wait: bool
    ) -> Coroutine[Any, Any, FeatureRef]:
        """Copy a feature in and return its ref, standing in the queue for room if `wait`.

        To be awaited at once: the room is the put's already.
        """
        in_line = self.turn.left < 0
        if not in_line:
            slot = self.reserve(staged.request)
            if slot is not None:
                return self.fill(slot, staged)
        late = LatePut(self, staged, wait=wait, timeout_s=timeout_s)
        if in_line or self.turn.has_callers:
            late.stand_in(self.turn)
        else:
            late.join()
        return late.run()

    def put_in_line(
        self, feature: Any, readers: Any, ttl: Any, key: Any, timeout_s: float | None
    ) -> Coroutine[Any, Any, FeatureRef]:
        """As `put`, of a feature that is staged when this call's turn comes."""
        late = LatePut(self, (feature, readers, ttl, key), wait=True, timeout_s=timeout_s)
        late.stand_in(self.turn)
        return late.run()

    async def fill(self, slot: Slot, staged: Staged) -> FeatureRef:
        pool = self._pool
        blocking_bytes = pool.slab.blocking_write_bytes(staged.parts)
        if blocking_bytes <= pool.settings.inline_bytes:
            self.turn.left -= blocking_bytes >> BYTES_SHIFT
            return self._fill_now(slot, staged)
        return await self._fill_in_thread(slot, staged)

    def check_parts(self, slot: Slot, staged: Staged) -> None:
        """Give the slot up if the caller freed or resized a tensor while its put waited."""
        try:
            check_parts(staged.parts)
        except BaseException:
            self._pool.give_up_reserved(slot, None)
            raise

    def _fill_now(self, slot: Slot, staged: Staged) -> FeatureRef:
        """Copy a feature into a slot that was just reserved, with the word that publishes it behind.

        Its age counts from when it got its room: one look at the clock is enough for a put.
        """
        pool, order, extent = self._pool, staged.order, slot.extent
        assert extent is not None, "it is reserved"
        if pool.closed:
            raise CacheClosed("the cache was closed while this put was on its way")
        try:
            word = (pool.complete, slot.index, slot.generation)
            pool.slab.write(extent.offset_bytes, staged.parts, order, word)
            if order:  # the owner's own reads need not wait for the word: they follow this stream
                pool.own_writes[slot.index] = slot.generation, order
        except BaseException:
            pool.give_up_reserved(slot, order)
            raise
        return pool.announce(slot, staged.specs, slot.born_s)

    async def _fill_in_thread(self, slot: Slot, staged: Staged) -> FeatureRef:
        offset_bytes, parts, order = slot.offset_bytes, staged.parts, staged.order
        pool = self._pool
        try:
            await pool.offload.run(
                lambda: pool.slab.write(offset_bytes, parts, order),
                lambda _: pool.give_up_reserved(slot, order),
            )
        except asyncio.CancelledError:
            raise  # the thread is still copying: the slot is given up when it is done
        except BaseException:
            pool.give_up_reserved(slot, order)
            raise
        return pool.publish(slot, staged.specs, order)

    def ask(self, request: Request, *, wait: bool, late: bool = False) -> Place:
        """Take a place after `reserve` found no room, behind all who asked before; or raise PoolFull.

        `slot_of` returns the slot, `withdraw` gives the place up: one of them is the caller's to call.
        """
        if late or self.turn.has_callers:
            return self.turn.place(lambda: self.enter(request, wait=wait))
        return self.enter_queue(request, wait=wait)

    async def slot_of(self, place: Place, timeout_s: float | None, *, wait: bool) -> Slot:
        """Return the slot of a place, once it has one. If this fails, or is cancelled, the place goes."""
        if isinstance(place, asyncio.Future):
            since_s = _now()
            try:
                entered = await place
            except asyncio.CancelledError:
                self.withdraw(place)
                raise
            if timeout_s is not None:
                timeout_s = max(0.0, timeout_s - (_now() - since_s))
        else:
            entered = place
        if isinstance(entered, Slot):
            return entered
        return await (self.granted(entered, timeout_s) if wait else self.coming(entered))

    def withdraw(self, place: Place) -> None:
        """Give up a place, and the slot that it has by now."""
        if isinstance(place, asyncio.Future):
            if place.cancel() or place.cancelled() or place.exception() is not None:
                return
            place = place.result()
        self.give_up(place)

    def give_up(self, claim: Slot | Waiter | None) -> None:
        """Give up a slot that was reserved, or a place in the queue with the slot that it has by now."""
        if claim is None or self._pool.closed:
            return
        if isinstance(claim, Slot):
            self._pool.apply(self._pool.store.free_reserved(claim, _now()))
        else:
            self.leave(claim)

    def check_open(self) -> None:
        """Raise CacheClosed if the pool is closed."""
        self._pool.check_open()

    def new_future(self) -> "asyncio.Future[None]":
        return self._pool.loop.create_future()

    def accept(self, waiter: Waiter) -> Slot:
        """Return the slot of a waiter that was told of it, or raise CacheClosed."""
        return self._pool.store.accept(waiter)

    def enter(self, request: Request, *, wait: bool) -> Slot | Waiter:
        """Reserve, or join the queue, at this call's turn."""
        self._pool.check_open()
        slot = self.reserve_batch(request) if isinstance(request, Batch) else self.reserve(request)
        return slot or self.enter_queue(request, wait=wait)

    def enter_queue(
        self, request: Request, *, wait: bool, tag: "asyncio.Future[None] | None" = None
    ) -> Waiter:
        """Join the queue; or raise PoolFull, if it may not `wait` for others' features.

        `tag` is the future to be told; without one the waiter has a new one.
        """
        if wait or self._is_coming(request):
            return self._join(request, tag)
        raise self.full(request)

    def _is_coming(self, request: Request) -> bool:
        """Whether room comes that is nobody else's: the slab grows, or more is recycled or evicted."""
        pool = self._pool
        return pool.store.comes_by_growth(request, _now()) or (
            not pool.store.queue.count and pool.collector.makes_room
        )

    async def coming(self, waiter: Waiter) -> Slot:
        """Return the slot of a waiter that has its place in the queue only for room that is coming."""
        pool, granted = self._pool, False
        try:
            while waiter.state is WaiterState.WAITING:
                if pool.growth.in_progress is not None:
                    await asyncio.shield(pool.growth.in_progress)  # other puts count on it too
                elif pool.collector.makes_room:
                    await self.turn.wait()
                else:
                    break
            pool.check_open()  # also if it was closed before this task ran: the queue is gone
            if waiter.state is WaiterState.WAITING:
                raise self.full(waiter.request)
            granted = True
            return pool.store.accept(waiter)
        finally:
            if not granted and not pool.closed:
                self.leave(waiter)

    def reserve(self, request: Request, *, at_once: bool = False) -> Slot | None:
        """Reserve, recycling released slots if that is due or needed, then evicting; at last what others did.

        As much as the loop's turn has units for, or all `at_once`; what is left is done for the queue.
        """
        pool = self._pool
        pool.put_bytes += max(request.nbytes, self._put_bytes)
        if pool.put_bytes > self._least_bytes and self._is_due(pool.put_bytes):
            (pool.collector.collect_all if at_once else pool.collect)()
        slot = pool.store.reserve(request, _now())
        if slot is None:
            pool.collect()
            slot = pool.store.reserve(request, _now())
            if slot is None and not pool.store.queue.count:
                if pool.store.ahead and pool.ahead.take_back(made=False):
                    slot = pool.store.reserve(request, _now())
                while slot is None and pool.collector.evict_some(request, waits=not at_once):
                    slot = pool.store.reserve(request, _now())
                    if self.turn.left <= 0:
                        break
                if slot is None and pool.store.ahead and pool.ahead.take_back():
                    slot = pool.store.reserve(request, _now())
        return slot

    def count_bytes(self, nbytes: int) -> None:
        """Count a put's bytes, and recycle released slots if that is due."""
        pool = self._pool
        pool.put_bytes += max(nbytes, self._put_bytes)
        if self._is_due(pool.put_bytes):
            pool.collect()

    def _reserve_now(self, request: Request) -> Slot | None:
        """Reserve after `reserve` found no room, whatever it takes. While others wait there is none."""
        pool = self._pool
        hear(pool)  # a put that is paid may not have been read yet
        pool.collector.collect_all()
        pool.ahead.take_back()  # what its session was given for the next
        slot = pool.store.reserve(request, _now())
        while slot is None and not pool.store.queue.count and pool.collector.make_room(request):
            slot = pool.store.reserve(request, _now())
        return slot or self._reserve_by_growing(request)

    def _is_due(self, put_bytes: int) -> bool:
        """Whether released slots are to be recycled after puts of so many bytes."""
        return put_bytes > self._collect_bytes * (len(self._pool.pages) + 3)

    def look_ahead(self) -> None:
        """Recycle released slots in the loop's next turn, if `reserve` will have to soon.

        For puts of sessions: while they copy, the owner is idle.
        """
        if self._is_due(2 * self._pool.put_bytes):
            self._pool.loop.call_soon(self._look_ahead)

    def _look_ahead(self) -> None:
        if not self._pool.closed and self._is_due(2 * self._pool.put_bytes):
            self._pool.collect()

    def _reserve_by_growing(self, request: Request) -> Slot | None:
        """Commit more of the slab in the caller's thread, for a put that may not wait."""
        store = self._pool.store
        if store.queue or store.table.full:
            return None
        # No more than the put needs: a segment of host memory would hold the loop for 20 ms.
        step_bytes = self._pool.slab.quick_commit_bytes
        end_bytes = store.size.growth_for(request.nbytes, _now(), step_bytes)
        if not end_bytes:
            return None
        start_bytes = store.committed_bytes
        try:
            self._pool.slab.commit(start_bytes, end_bytes, prefault=False)
        except (MemoryError, OSError, BackendUnavailable) as error:
            self._pool.growth.grow_failed(end_bytes - start_bytes, error)
            return self.reserve(request)  # a slab that can't grow may still evict
        self._pool.growth.grown(end_bytes)
        return store.reserve(request, _now())

    def _join(self, request: Request, tag: "asyncio.Future[None] | None") -> Waiter:
        """Join the queue, or raise PoolFull."""
        pool, store = self._pool, self._pool.store
        # Room that is being made for it alone is no others': there the bound does not hold.
        bounded = store.queue.count > 0 or not pool.collector.makes_room
        try:
            waiter, effects = store.wait(
                request, _now(), tag or pool.loop.create_future(), bounded=bounded
            )
        except PoolFull as full:
            raise PoolFull(f"{full}; {pool.debtors.holders()}") from None
        try:
            pool.apply(effects)
            if waiter is store.queue.head:
                # `apply` has told readers to ring. Only then are their earlier releases collected:
                # the other way round a release between the two would be neither seen nor rung.
                pool.collect()
        except BaseException:
            self.leave(waiter)
            raise
        return waiter

    async def granted(self, waiter: Waiter, timeout_s: float | None) -> Slot:
        """Return the slot of a waiter, when it is granted."""
        future, request, since_s = waiter.tag, waiter.request, _now()
        assert isinstance(future, asyncio.Future), "a waiter is tagged with its future"
        granted = False
        self.waits.begin(waiter, since_s)
        try:
            if timeout_s is None:  # a scope takes longer than the wait itself may
                await future
            else:
                with anyio.fail_after(timeout_s):
                    await future
            granted = True
            return self._pool.store.accept(waiter)
        except TimeoutError:
            if not self._pool.closed:
                self._pool.collect()  # what was released by now is not held, and may be enough
            if waiter.state is not WaiterState.GRANTED:
                raise PutTimeout(
                    f"no room for {request.nbytes} bytes within {timeout_s} s: "
                    + describe_room(self._pool, besides=waiter.state is WaiterState.WAITING)
                ) from None
            granted = True
            return self._pool.store.accept(waiter)
        finally:
            if not granted and not self._pool.closed:
                self.leave(waiter)
            self.waits.end(waiter, since_s, granted=granted)

    def leave(self, waiter: Waiter) -> None:
        """Give a place in the queue up, and the slot that was granted meanwhile."""
        # The accept handshake: a slot granted to a waiter whose task was cancelled meanwhile
        # was never accepted, and goes to the next waiter.
        pool, store = self._pool, self._pool.store
        if self.turn.left <= 0:  # of many that leave at once: the next is served in the next turn
            store.abandon(waiter)
            pool.collector.go_on()
            return
        self.turn.left -= LEAVE_QUEUE_UNITS
        passes_on = waiter is store.queue.head or waiter.state is WaiterState.GRANTED
        effects = store.leave(waiter, _now())
        if passes_on or not store.queue.count:
            pool.apply(effects)
            if store.queue.count:
                pool.collect()

    def full(self, request: Request) -> PoolFull:
        """Return the PoolFull of a put that does not wait."""
        return PoolFull(
            f"no room for {request.nbytes} bytes now: {describe_room(self._pool, besides=False)}"
        )
