"""The owner's puts: admission, waiting for room, and copying."""

import asyncio
import time
from typing import Any, Final

import anyio

from featcache.core.put_queue import Request, WaiterState
from featcache.core.slots import Slot
from featcache.errors import BackendUnavailable, CacheClosed, PoolFull, PutTimeout
from featcache.memory.pack import check_parts
from featcache.pool.pool import Pool
from featcache.pool.waits import PutWaits
from featcache.ref import FeatureRef
from featcache.session.arguments import parse_put
from featcache.session.staging import Staged

_COLLECT_BYTES: Final = 256 << 10
_MAX_UNCOLLECTED: Final = 64
"""Puts, however small, that count as `_collect_bytes`: a poll of thousands would hold up the loop."""
_YIELD_EVERY: Final = 32
_now = time.monotonic


class OwnerWriter:
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
        self._puts = 0
        self._waits = PutWaits(pool)

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

    def put_nowait(self, staged: Staged) -> FeatureRef:
        """Copy a feature in and return its ref, or raise PoolFull. Growth happens inline."""
        request = staged.request
        slot = self.reserve(request) or self._reserve_by_growing(request)
        if slot is None:
            raise self.full(request)
        return self._fill_now(slot, staged)

    async def put(self, staged: Staged, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Copy a feature in and return its ref, standing in the queue for room if `wait`."""
        request, waited = staged.request, False
        self._puts += 1
        if self._puts % _YIELD_EVERY == 0:
            waited = True
            await asyncio.sleep(0)  # a loop of puts that never wait must not starve the sessions
        slot = self.reserve(request)
        if slot is None:
            waited = True
            slot = await self.room(request, timeout_s, wait=wait)
        pool = self._pool
        if waited:
            self._check_parts(slot, staged)
        if pool.slab.blocking_write_bytes(staged.parts) <= pool.settings.inline_bytes:
            return self._fill_now(slot, staged)
        return await self._fill_in_thread(slot, staged)

    def _check_parts(self, slot: Slot, staged: Staged) -> None:
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

    async def room(self, request: Request, timeout_s: float | None, *, wait: bool) -> Slot:
        """Reserve after `reserve` found no room: wait in the queue, or raise PoolFull."""
        if wait:
            return await self.await_room(request, timeout_s)
        slot = await self.grow_for(request)
        if slot is None:
            raise self.full(request)
        return slot

    async def grow_for(self, request: Request) -> Slot | None:
        """Reserve after `reserve` found no room, if the slab can grow by it, which it does in a thread."""
        store, growth = self._pool.store, self._pool.growth
        if store.queue or store.table.full:
            return None
        if growth.in_progress is None:
            end_bytes = store.size.growth_for(request.nbytes, _now())
            if not end_bytes:
                return None
            store.size.begin_growth()
            growth.grow(end_bytes)
        if growth.in_progress is not None:
            await asyncio.shield(growth.in_progress)  # other puts count on it too
        self._pool.check_open()
        return self.reserve(request)

    def reserve(self, request: Request) -> Slot | None:
        """Reserve, recycling released slots if that is due or needed, then evicting."""
        pool = self._pool
        nbytes = request.nbytes
        pool.put_bytes += max(nbytes, self._put_bytes)
        if pool.put_bytes > self._least_bytes and self._is_due(pool.put_bytes):
            pool.collect()
        slot = pool.store.reserve(request, _now())
        if slot is None:
            pool.collect()
            slot = pool.store.reserve(request, _now())
            while slot is None and not pool.store.queue and pool.make_room(request):
                slot = pool.store.reserve(request, _now())
        return slot

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

    async def await_room(self, request: Request, timeout_s: float | None) -> Slot:
        """Reserve a slot, standing in the queue for it."""
        future: asyncio.Future[None] = self._pool.loop.create_future()
        since_s = _now()
        try:
            waiter, effects = self._pool.store.wait(request, since_s, future)
        except PoolFull as full:
            raise PoolFull(f"{full}; {self._pool.debtors.holders()}") from None
        granted = False
        self._waits.begin(waiter, since_s)
        try:
            self._pool.apply(effects)
            # `apply` has told readers to ring. Only then are their earlier releases collected:
            # the other way round a release between the two would be neither seen nor rung.
            self._pool.collect()
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
                    + self._room(besides=waiter.state is WaiterState.WAITING)
                ) from None
            granted = True
            return self._pool.store.accept(waiter)
        finally:
            if not granted and not self._pool.closed:
                # The accept handshake: a slot granted to a waiter whose task was cancelled meanwhile
                # was never accepted, and goes to the next waiter.
                self._pool.apply(self._pool.store.leave(waiter, _now()))
                if self._pool.store.queue:
                    self._pool.collect()
            self._waits.end(waiter, since_s, granted=granted)

    def full(self, request: Request) -> PoolFull:
        """Return the PoolFull of a put that does not wait."""
        return PoolFull(f"no room for {request.nbytes} bytes now: {self._room()}")

    def _room(self, *, besides: bool = False) -> str:
        """Describe the room there is, and who holds the rest; `besides` the waiter that is told."""
        store, refused = self._pool.store, self._pool.growth.refused
        grows = f"; the slab can't grow: {refused}" if refused else ""
        return (
            f"{store.free_bytes} of {store.limits.capacity_bytes} bytes are free, at most "
            f"{store.largest_free_bytes} in one piece, {store.table.count - store.table.used} of "
            f"{store.table.count} slots, and {len(store.queue) - besides} puts wait; "
            f"{self._pool.debtors.holders()}{grows}"
        )
