"""One pool: the store's decisions carried out on a slab and its control words."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from typing import Final

from featcache import events
from featcache.core.effects import (
    ClaimPassed,
    Effect,
    Evicted,
    Expired,
    Found,
    Grow,
    Limits,
    SlotRetired,
    Woken,
)
from featcache.core.keyed_store import KeyedStore, key_label
from featcache.core.put_queue import Request
from featcache.core.slots import Slot, SlotState
from featcache.errors import BackendUnavailable, CacheClosed, MalformedRef
from featcache.memory.slab import Order, Slab
from featcache.memory.words import Header, OwnerWords, fence_full
from featcache.pool import gauges
from featcache.pool.attendance import Attendance
from featcache.pool.debtors import Debtors
from featcache.pool.growth import Growth
from featcache.pool.page import SessionPage
from featcache.pool.pending_writes import PendingWrites
from featcache.pool.pressure import PressureMonitor
from featcache.pool.recycler import Recycler
from featcache.ref import FeatureRef, TensorSpec
from featcache.session.offload import Offload
from featcache.settings import Settings

_now: Final = time.monotonic
_MAX_UNRUNG: Final = 16
_BUSY_S: Final = 0.004


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
        self.store = KeyedStore(limits)
        self.store.allocator.grow(limits.initial_bytes)
        self.words, self.words_fd = OwnerWords.create(limits.slots)
        try:
            self.complete = slab.adopt(self.words, self.words.published)
            """The `published` words as the slab signals them."""
            self.recycler = Recycler(
                self.collect, self._tick, settings.recycle_interval, deferred=slab.deferred
            )
        except BaseException:
            os.close(self.words_fd)
            raise
        self.growth = Growth(
            *(self.name, slab, self.store, self.words.header, settings, offload, self.apply)
        )
        self.pages: dict[int, SessionPage] = {}
        """The control words and grants of each session, by session number."""
        self.kept: dict[int, FeatureRef] = {}
        """Refs of the features under keys, by slot; a slot's old one stays until it has a new one."""
        self.own_writes: dict[int, tuple[int, Order]] = {}
        """By slot: the generation that this process wrote there last on a stream, and where on it."""
        self.pending_writes = PendingWrites(self.words.published, self._set_busy)
        self.attendance = Attendance(self.pages)
        self.debtors = Debtors(self.store, self.attendance)
        self.pressure = PressureMonitor(self.name, self.store, settings, self.debtors)
        self.put_bytes = 0
        """Bytes reserved since the last `collect`; a small put counts for more."""
        self._expiries = events.Throttle(settings.log_interval, burst=256)
        self._evictions = events.Throttle(settings.log_interval, burst=16)
        self._ring_at_now = 0
        self._busy_until_s = float("-inf")
        gauges.publish(self.store, self.words.header)

    @property
    def name(self) -> str:
        """The pool's id in hex, as events name it."""
        return self.pool_id.hex()

    def check_open(self) -> None:
        """Raise CacheClosed if it is closed."""
        if self.closed:
            raise CacheClosed("the cache was closed")

    @property
    def shrink_epoch(self) -> int:
        """How often segments of the slab were taken away."""
        return self.words.header[Header.SHRINK_EPOCH]

    def find(self, ref: FeatureRef) -> Slot:
        """Return the slot of a peer's ref, of which no number is trusted.

        Raises:
            StaleRef: it was recycled, expired or discarded, or there is no such slot.
            MalformedRef: its extent is another than the slot's.

        """
        slot = self.store.find(ref.slot, ref.generation)
        if (slot.offset_bytes, slot.nbytes) != (ref.offset_bytes, ref.nbytes):
            raise MalformedRef("the ref's extent is not its slot's: it was forged or damaged")
        return slot

    def publish(self, slot: Slot, specs: tuple[TensorSpec, ...], order: Order) -> FeatureRef:
        """Publish a slot whose bytes were written, or will be at `order`; return its ref."""
        if self.closed:
            raise CacheClosed("the cache was closed while this put was copying")
        self.slab.signal(self.complete, slot.index, slot.generation, order)
        if order:
            self.own_writes[slot.index] = slot.generation, order
        return self.announce(slot, specs, _now())

    def publish_from(
        self, slot: Slot, specs: tuple[TensorSpec, ...], page: SessionPage
    ) -> FeatureRef:
        """Publish a slot that a session wrote, or that its stream will write; return its ref."""
        self.pending_writes.add(slot, page)
        return self.announce(slot, specs, _now())

    def announce(self, slot: Slot, specs: tuple[TensorSpec, ...], now_s: float) -> FeatureRef:
        """Publish a slot whose `published` word is signalled already; return its ref."""
        store, pressure, extent = self.store, self.pressure, slot.extent
        assert extent is not None, "it is reserved"
        index, generation, nbytes = slot.index, slot.generation, slot.nbytes
        offset_bytes = extent.offset_bytes
        self.words.make_live(index, generation, offset_bytes, nbytes)
        effects = store.publish(slot, now_s)
        if effects:
            self.apply(effects)
        elif (
            store.allocator.used_bytes >= pressure.quiet_below_bytes
            or store.queue.count
            or self._ring_at_now
            or not pressure.is_normal
        ):
            self._observe()  # else it would find nothing new
        ref = FeatureRef(
            self.pool_id, self.endpoint, index, generation, offset_bytes, nbytes, specs
        )
        if slot.key is not None:
            self.kept[index] = ref
            if store.queue.count:
                self.collect()  # a waiting put may have the room of a feature that can be evicted now
        return ref

    def give_up_reserved(self, slot: Slot, order: Order) -> None:
        """Give up the slot of a put that failed. On a GPU some of its bytes may still be on their way."""
        if self.closed:
            return
        if self.slab.deferred and order is not None:
            with contextlib.suppress(
                BackendUnavailable
            ):  # a broken context: nothing comes any more
                self.slab.signal(self.complete, slot.index, slot.generation, order)
                self.apply(self.store.give_up_reserved(slot, _now()))
                self.recycler.poll_after(0.0)
                return
        self.apply(self.store.free_reserved(slot, _now()))

    @property
    def settled(self) -> bool:
        """Whether every put of the owner's is where it belongs: nothing is on a stream of its own."""
        published = self.words.published
        return all(
            published[slot.index] == slot.generation
            for slot in self.store.table.in_use()
            if slot.state is not SlotState.RESERVED and self.pending_writes.state_of(slot) is None
        )

    # --- carrying out ---------------------------------------------------------------------------

    def apply(self, effects: Sequence[Effect]) -> None:
        """Carry out the store's decisions."""
        due_now = False
        for effect in effects:
            if type(effect) is SlotRetired:
                slot = effect.slot
                self.words.live[slot.index] = 0
                if slot.due_s > slot.retired_s:
                    self.recycler.poll_after(slot.due_s - slot.retired_s)
                else:
                    due_now = True
            elif type(effect) is Woken or type(effect) is Found or type(effect) is ClaimPassed:
                self._wake(effect.waiter.tag)
            elif type(effect) is Expired:
                self._report_expiry(effect)
            elif type(effect) is Evicted:
                self._report_eviction(effect)
            elif type(effect) is Grow:
                self.growth.grow(effect.end_bytes)
        if due_now:
            self._reclaim(_now())
        self._observe()

    def _report_eviction(self, evicted: Evicted) -> None:
        self._evictions.emit(
            _now(),
            lambda unlogged: events.KeyEvicted(
                pool=self.name,
                key=key_label(evicted.key)[:64],
                nbytes=evicted.nbytes,
                unused_s=evicted.unused_s,
                cause=evicted.cause,
                unlogged=unlogged,
            ),
        )

    def _report_expiry(self, expired: Expired) -> None:
        self._expiries.emit(
            _now(),
            lambda unlogged: events.RefExpired(
                pool=self.name,
                ref=expired.label,
                nbytes=expired.nbytes,
                age_s=expired.age_s,
                owed_by=expired.owed_by,
                never_attached=self.attendance.never_attached(expired.owed_by),
                unlogged=unlogged,
            ),
        )

    @staticmethod
    def _wake(future: object) -> None:
        assert isinstance(future, asyncio.Future), "a waiter is tagged with its future"
        if not future.done():
            future.set_result(None)

    def _observe(self) -> None:
        """Tell readers whether to ring, and follow the pressure."""
        ring_at = self._ring_at() if self.store.queue.count else 0
        if ring_at != self._ring_at_now:
            self._ring_at_now = self.words.header[Header.WAITING] = ring_at
            self._set_busy()
        self.pressure.observe()

    def _set_busy(self) -> None:
        self.recycler.set_busy(self._ring_at_now > 0 or bool(self.pending_writes.in_flight))

    def _ring_at(self) -> int:
        """Return at which release of its own each session is to ring.

        Waking this process for each of a stream of releases would cost more than the features
        themselves, and a quarter of the refs that are out keeps the readers busy meanwhile. So while releases
        stream in they ring rarely, and the timer, at a millisecond then, catches the rest; when a
        look finds none, each rings again.
        """
        if _now() >= self._busy_until_s:
            return 1
        return max(1, min(_MAX_UNRUNG, len(self.store.owing) // 4))

    def collect(self) -> None:
        """Count the reads paid since the last call, and recycle the slots that owe none."""
        now_s = _now()
        self.put_bytes = 0
        high = self.store.table.high
        fence_full()  # after `waiting` was set, before the released words are looked at
        effects: list[Effect] = []
        for page in self.pages.values():
            if newly_released := page.newly_released(high):
                self._busy_until_s = now_s + _BUSY_S
                effects += self.store.pay_all(newly_released, page.session, page.name, now_s)
            if page.grants:
                for grant in page.paid_grants():
                    self.store.reads_paid += 1
                    effects += self.store.pay_grant(grant.slot, now_s)
        if effects:
            self.apply(effects)
        if self.pending_writes.in_flight:
            self.pending_writes.poll()
        self._reclaim(now_s)
        queue = self.store.queue
        while queue.count and (head := queue.head) and self.make_room(head.request):
            pass

    def make_room(self, request: Request) -> bool:
        """Evict for a request, if that is the way to room for it; return whether anything went."""
        effects = self.store.evict_for(request, self.is_held, _now())
        self.apply(effects)
        return bool(effects)

    def is_held(self, slot: Slot) -> bool:
        """Whether a session reads a slot's bytes by a ref now, or they are yet to come.

        A feature that is evicted before its bytes have come makes no room until they have.
        """
        index, generation = slot.index, slot.generation
        return self.words.published[index] != generation or any(
            page.holds(index, generation) for page in self.pages.values()
        )

    def abandon_writes(self, page: SessionPage) -> list[Effect]:
        """Give up the reservations and unfinished writes of a session that ended."""
        effects: list[Effect] = []
        now_s = _now()
        for index, generation in self.pending_writes.abandon(page):
            slot = self.store.table.find(index, generation)
            if slot is not None and slot.state is SlotState.PUBLISHED:
                effects += self.store.fail_write(slot, now_s)
        for slot in page.reserved.values():
            effects += self.store.free_reserved(slot, now_s)
        page.reserved.clear()
        return effects

    def _reclaim(self, now_s: float) -> None:
        due = self.store.due(now_s)
        if not due:
            return
        fence_full()  # after `live` was cleared, before the holds are looked at
        published = self.words.published
        ready = [
            slot
            for slot in due
            # A slot recycled before its bytes came would get them on top of its next tenant's.
            if published[slot.index] == slot.generation or self.pending_writes.is_abandoned(slot)
        ]
        for page in self.pages.values():
            ready = page.not_held(ready)
        if ready:
            self.apply(self.store.recycle(ready, now_s))

    def _tick(self) -> bool:
        """Expire, trim, shrink, compact and report; return whether releases stream in."""
        now_s = _now()
        self.collect()  # first: what was paid in time does not expire
        if expired := self.store.expire(now_s):
            self.apply(expired)
        self.apply(self.store.trim(self.is_held, now_s))
        if self.store.queue:
            self.apply(self.store.serve(now_s))  # a growth that failed may be tried again
            if self._ring_at_now == 1:
                self.collect()  # for releases before the sessions were told to ring at each
        old_end_bytes = self.store.committed_bytes
        if (end_bytes := self.store.shrink(now_s)) is not None:
            self.growth.shrink(end_bytes, old_end_bytes)
        self.apply(self.store.compact(self.is_held, now_s))
        self.pressure.report(now_s)
        gauges.publish(self.store, self.words.header)
        return now_s < self._busy_until_s

    # --- the end --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more puts, and fail all waiters."""
        self.closed = self.growth.closed = True
        error = CacheClosed("the cache was closed")
        while (waiter := self.store.queue.head) is not None:
            self.store.queue.drop(waiter)
            self._fail(waiter.tag, error)
        for key_waiter in self.store.key_waiters.waiting():
            self._fail(key_waiter.tag, error)
        self.pressure.close(error)

    def close(self) -> None:
        """Release everything but the slab. A copy that a thread still makes keeps the mapping."""
        self.stop()
        self.growth.close()
        self.recycler.close()
        for page in self.pages.values():
            page.close()
        self.pages.clear()
        os.close(self.words_fd)
        self.pending_writes.close()
        self.own_writes.clear()
        del self.words, self.complete  # unmapped now, not when the collector of cycles comes by

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child; the parent's pool is not touched.

        The words go by hand: the child's copy of the loop keeps this object.
        """
        self.growth.close()
        self.pending_writes.close()
        del self.words, self.complete
        self.closed = True
        self.recycler.forget()
        for page in self.pages.values():
            page.close()
        self.pages.clear()
        os.close(self.words_fd)
        self.slab.forget()

    @staticmethod
    def _fail(future: object, error: Exception) -> None:
        assert isinstance(future, asyncio.Future), "a waiter is tagged with its future"
        if not future.done():
            future.set_exception(error)
