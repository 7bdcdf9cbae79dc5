"""The owner: the store's decisions carried out on a slab and its words."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from featcache import events
from featcache._offload import Offload
from featcache.core.slots import Slot, SlotState
from featcache.core.store import Effect, Expired, Grow, Limits, Retired, Store, Woken
from featcache.core.waiters import Waiter
from featcache.errors import BackendUnavailable, CacheClosed
from featcache.gauge import Gauge
from featcache.memory.slab import Order, Segment, Slab
from featcache.memory.words import Header, OwnerWords, fence_full
from featcache.page import Page
from featcache.recycler import Recycler
from featcache.ref import FeatureRef, TensorSpec
from featcache.settings import Settings

__all__ = ["Pool"]

_now: Final[Callable[[], float]] = time.monotonic
_MOST_UNRUNG: Final = 16
_BUSY_S: Final = 0.004


class Sessions(Protocol):
    """Who is told of the slab's size: the server."""

    def announce(self, segments: Sequence[Segment]) -> None:
        """Send every session the segments that were made."""

    def retire(self, layout: int, end_bytes: int, timeout_s: float) -> Coroutine[Any, Any, int]:
        """Have every session unmap from `end_bytes` on; awaited, tell how many have not in time."""


class Pool:
    """One slab, its store and words, in the event loop that opened it."""

    def __init__(self, slab: Slab, limits: Limits, settings: Settings, offload: Offload) -> None:
        self.pool_id = secrets.token_bytes(16)
        self.endpoint = ""
        self.slab = slab
        self.settings = settings
        self.offload = offload
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self.store = Store(limits)
        self.store.allocator.grow(limits.initial_bytes)
        self.words, self.words_fd = OwnerWords.create(limits.slots)
        try:
            self._complete = slab.adopt(self.words, self.words.published)
        except BaseException:
            os.close(self.words_fd)
            raise
        self.sessions: Sessions | None = None
        self.pages: dict[int, Page] = {}
        """What sessions say they hold and have released, by session number."""
        self.recycler = Recycler(
            self.collect, self._tick, settings.recycle_interval, deferred=slab.deferred
        )
        self.gauge = Gauge(self.name, self.store, settings)
        self.reads_paid = 0
        self.put_bytes = 0
        """Bytes asked for since the last look at what was released."""
        self._expiries = events.Throttle(settings.log_interval, burst=16)
        self._ring_at_now = 0
        self._busy_until_s = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self.words.header[Header.CAPACITY] = limits.capacity_bytes
        self._publish_gauges()

    @property
    def name(self) -> str:
        """The pool's id in hex, as events name it."""
        return self.pool_id.hex()

    def check_open(self) -> None:
        """Raise CacheClosed if it is closed."""
        if self.closed:
            raise CacheClosed("the cache was closed")

    @property
    def layout(self) -> int:
        """How often segments of the slab were taken away."""
        return self.words.header[Header.LAYOUT]

    def publish(self, slot: Slot, specs: tuple[TensorSpec, ...], order: Order) -> FeatureRef:
        """Let readers have a slot whose bytes were written, or will be at `order`; return its ref."""
        if self.closed:
            raise CacheClosed("the cache was closed while this put was copying")
        index, generation, nbytes = slot.index, slot.generation, slot.nbytes
        offset_bytes = slot.offset_bytes
        self.slab.signal(self._complete, index, generation, order)
        self.words.entitle(index, generation, offset_bytes, nbytes)
        effects = self.store.publish(slot, _now())
        if effects:
            self.apply(effects)
        else:
            self._observe()
        return FeatureRef(
            self.pool_id, self.endpoint, index, generation, offset_bytes, nbytes, specs
        )

    def withdraw(self, slot: Slot, order: Order) -> None:
        """Give a slot up whose put failed. On a GPU some of its bytes may still be on their way."""
        if self.closed:
            return
        if self.slab.deferred and order is not None:
            with contextlib.suppress(
                BackendUnavailable
            ):  # a broken context: nothing comes any more
                self.slab.signal(self._complete, slot.index, slot.generation, order)
                self.apply(self.store.withdraw(slot, _now()))
                self.recycler.look_at(0.0)
                return
        self.apply(self.store.abandon(slot, _now()))

    @property
    def settled(self) -> bool:
        """Whether every put's bytes are where they belong: nothing is on a stream any more."""
        published = self.words.published
        return all(
            published[slot.index] == slot.generation
            for slot in self.store.table.in_use()
            if slot.state is not SlotState.RESERVED
        )

    # --- carrying out ---------------------------------------------------------------------------

    def apply(self, effects: Sequence[Effect]) -> None:
        """Carry out what the store decided."""
        for effect in effects:
            if type(effect) is Retired:
                slot = effect.slot
                self.words.live[slot.index] = 0
                if slot.due_s > slot.retired_s:
                    self.recycler.look_at(slot.due_s - slot.retired_s)
            elif type(effect) is Woken:
                self._wake(effect.waiter)
            elif type(effect) is Expired:
                self._report_expiry(effect)
            elif type(effect) is Grow:
                self._spawn(self._grow(effect.end_bytes))
        self._observe()

    def _report_expiry(self, expired: Expired) -> None:
        unlogged = self._expiries.pass_(_now())
        if unlogged is not None:
            events.emit(
                events.RefExpired(
                    pool=self.name,
                    ref=expired.label,
                    nbytes=expired.nbytes,
                    age_s=expired.age_s,
                    owed_by=expired.owed_by,
                    unlogged=unlogged,
                )
            )

    def _wake(self, waiter: Waiter) -> None:
        future = waiter.tag
        assert isinstance(future, asyncio.Future), "waiters are tagged with their future"
        if not future.done():
            future.set_result(None)

    def _observe(self) -> None:
        """Tell readers whether to ring, and follow the pressure."""
        ring_at = self._ring_at() if self.store.queue else 0
        if ring_at != self._ring_at_now:
            self._ring_at_now = self.words.header[Header.WAITING] = ring_at
            self.recycler.hurry(ring_at > 0)
        self.gauge.observe()

    def _ring_at(self) -> int:
        """Return at which release of its own each session is to ring.

        Waking this process for each of a stream of releases would cost more than the features
        themselves, and a quarter of what is out keeps the readers busy meanwhile. So while releases
        stream in they ring rarely, and the timer, at a millisecond then, catches the rest; when a
        look finds none, each rings again.
        """
        if _now() >= self._busy_until_s:
            return 1
        return max(1, min(_MOST_UNRUNG, len(self.store.published) // 4))

    def collect(self) -> None:
        """Count what sessions released since the last look, and take back what nobody owes."""
        now_s = _now()
        self.put_bytes = 0
        high = self.store.table.high
        fence_full()  # after `waiting` was set, before the released words are looked at
        effects: list[Effect] = []
        pay = self.store.pay
        for page in self.pages.values():
            news = page.news(high)
            if news:
                self._busy_until_s = now_s + _BUSY_S
            for index, generation in news:
                self.reads_paid += 1
                effects += pay(index, generation, page.session, page.name, now_s)
        if effects:
            self.apply(effects)
        self._reclaim(now_s)

    def _reclaim(self, now_s: float) -> None:
        due = self.store.due(now_s)
        if not due:
            return
        fence_full()  # after `live` was cleared, before the holds are looked at
        pages, published = self.pages.values(), self.words.published
        ready = [
            slot
            for slot in due
            # What was taken back before its bytes came would get them after its next tenant's.
            if published[slot.index] == slot.generation
            and not any(page.holds(slot.index, slot.generation) for page in pages)
        ]
        if ready:
            self.apply(self.store.recycle(ready, now_s))

    def _tick(self) -> bool:
        """Do what time alone brings about; return whether releases stream in."""
        now_s = _now()
        if expired := self.store.expire(now_s):
            self.apply(expired)
        self.collect()
        if self.store.queue:
            self.apply(self.store.serve(now_s))  # a growth that failed may be tried again
            if self._ring_at_now == 1:
                self.collect()  # what was released, and not rung, before this was asked for
        old_end_bytes = self.store.committed_bytes
        if (end_bytes := self.store.shrink(now_s)) is not None:
            self._spawn(self._shrink(end_bytes, old_end_bytes))
        self._observe()
        self.gauge.report(now_s)
        self._publish_gauges()
        return now_s < self._busy_until_s

    def _publish_gauges(self) -> None:
        store, header = self.store, self.words.header
        header[Header.COMMITTED] = store.committed_bytes
        header[Header.USED] = store.allocator.used_bytes
        header[Header.SLOTS_USED] = store.table.used
        header[Header.WAITERS] = len(store.queue)
        header[Header.WAITING_BYTES] = store.queue.waiting_bytes
        header[Header.LARGEST_FREE] = store.largest_free_bytes

    # --- size -----------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _grow(self, end_bytes: int) -> None:
        start_bytes, slab = self.store.committed_bytes, self.slab
        prefault = self.settings.prefault
        try:
            await self.offload.run(
                lambda: slab.commit(start_bytes, end_bytes, prefault=prefault), lambda: None
            )
        except (MemoryError, OSError, BackendUnavailable) as error:
            self.grow_failed(end_bytes - start_bytes, error)
        else:
            self.grown(end_bytes)

    def grown(self, end_bytes: int) -> None:
        """Use what was committed up to `end_bytes`."""
        if self.closed:
            return
        start_bytes = self.store.committed_bytes
        added_bytes = end_bytes - start_bytes
        self.words.header[Header.COMMITTED] = end_bytes
        segments = self.slab.segments(start_bytes, end_bytes)
        if segments and self.sessions is not None:
            self.sessions.announce(segments)  # before any ref can lie there
        self.apply(self.store.grown(end_bytes, _now()))
        events.emit(
            events.SegmentsCommitted(
                pool=self.name, committed_bytes=end_bytes, added_bytes=added_bytes
            )
        )

    def grow_failed(self, wanted_bytes: int, error: Exception) -> None:
        """Go on at the present size; who waits goes on waiting."""
        self.store.grow_failed(_now())
        events.emit(
            events.CommitFailed(
                pool=self.name,
                committed_bytes=self.store.committed_bytes,
                wanted_bytes=wanted_bytes,
                error=str(error),
            )
        )

    async def _shrink(self, end_bytes: int, old_end_bytes: int) -> None:
        slab, timeout_s = self.slab, self.settings.attach_timeout
        retiring: Coroutine[Any, Any, int] | None = None
        if self.sessions is not None and slab.segments(end_bytes, old_end_bytes):
            # Before anything can be put where readers have the old segments mapped.
            layout = self.words.header[Header.LAYOUT] = self.words.header[Header.LAYOUT] + 1
            retiring = self.sessions.retire(layout, end_bytes, timeout_s)
        try:
            await self.offload.run(lambda: slab.decommit(end_bytes, old_end_bytes), lambda: None)
        except (OSError, BackendUnavailable) as error:  # the slab tries again before it grows there
            events.emit(
                events.ReturnFailed(
                    pool=self.name, returned_bytes=old_end_bytes - end_bytes, error=str(error)
                )
            )
        finally:
            if not self.closed:
                self.apply(self.store.shrunk(_now()))
        behind = 0 if retiring is None else await retiring
        events.emit(
            events.SegmentsReturned(
                pool=self.name,
                committed_bytes=end_bytes,
                returned_bytes=old_end_bytes - end_bytes,
                mapped_in_sessions=behind,
            )
        )

    # --- the end --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more puts, and fail who waits."""
        self.closed = True
        error = CacheClosed("the cache was closed")
        while (waiter := self.store.queue.head) is not None:
            self.store.queue.drop(waiter)
            self._fail(waiter, error)
        self.gauge.close(error)

    async def drain(self) -> None:
        """Wait for commits that are under way: a thread has the slab's descriptor in its hands."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Let go of everything but the slab. What a thread still copies keeps the mapping."""
        self.stop()
        self.recycler.close()
        for page in self.pages.values():
            page.close()
        self.pages.clear()
        os.close(self.words_fd)
        del self.words, self._complete  # unmapped now, not when the collector of cycles comes by

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child; the parent's pool is not touched.

        The words go by hand: the child's copy of the loop keeps this object.
        """
        del self.words, self._complete
        self.closed = True
        self.recycler.forget()
        for page in self.pages.values():
            page.close()
        self.pages.clear()
        os.close(self.words_fd)
        self.slab.forget()

    @staticmethod
    def _fail(waiter: Waiter, error: Exception) -> None:
        future = waiter.tag
        assert isinstance(future, asyncio.Future), "waiters are tagged with their future"
        if not future.done():
            future.set_exception(error)
