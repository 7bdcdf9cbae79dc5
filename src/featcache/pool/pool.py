"""One pool: the store's decisions carried out on a slab and its control words."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from featcache.control.turns import EVICT_UNITS, EXPIRE_UNITS, LEAST, QUANTUM_UNITS, turn_of
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
from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot, SlotState
from featcache.errors import BackendUnavailable, CacheClosed, MalformedRef
from featcache.memory.key_table import OwnKeyTable
from featcache.memory.slab import Order, Slab
from featcache.memory.words import Header, fence_full
from featcache.pool import gauges
from featcache.pool.ahead import RoomsAhead
from featcache.pool.attendance import Attendance
from featcache.pool.block import PoolBlock
from featcache.pool.collector import STEPS_A_UNIT, Collector
from featcache.pool.debtors import Debtors
from featcache.pool.growth import Growth
from featcache.pool.holds import Holds
from featcache.pool.page import SessionPage
from featcache.pool.pending_writes import PendingWrites
from featcache.pool.pressure import PressureMonitor
from featcache.pool.recycler import Recycler
from featcache.pool.reports import Reports
from featcache.pool.uses import SessionUses
from featcache.pool.wakes import Wakes
from featcache.ref import FeatureRef, TensorSpec
from featcache.session.offload import Offload
from featcache.settings import Settings

_now: Final = time.monotonic
_MAX_UNRUNG: Final = 16
_TICK: Final = Header.TICK


class Pool:
    """One slab, its store and words, in the event loop that opened it."""

    def __init__(
        self, slab: Slab, block: PoolBlock, limits: Limits, settings: Settings, offload: Offload
    ) -> None:
        """Take `block` over, also if this fails."""
        self.pool_id = secrets.token_bytes(16)
        self.endpoint = ""
        self.ref_endpoint = ""
        """The endpoint as refs have it: with the address for other hosts before it, if there is one."""
        self.slab = slab
        self.settings = settings
        self.offload = offload
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self.turn = turn_of(self.loop)
        self.wakes = Wakes(self.turn)
        self._upkeep = False
        self.pages: dict[int, SessionPage] = {}
        """The control words and grants of each session, by session number."""
        self.uses = SessionUses(limits.slots, self.pages)
        self.store = KeyedStore(limits, self.uses.latest, self.uses.latest_up_to)
        self.store.serve_most = LEAST
        self.store.allocator.grow(limits.initial_bytes)
        self.collector = Collector(self)
        self.collect = self.collector.collect
        self.words, self.words_fd, self.complete = block
        try:
            self.key_table = OwnKeyTable(self.words)
            self.recycler = Recycler(
                self.collector, self._tick, settings.recycle_interval, deferred=slab.deferred
            )
        except BaseException:
            os.close(self.words_fd)
            for name in ("words", "key_table", "complete"):  # unmapped now: the pool is in a cycle
                vars(self).pop(name, None)
            raise
        self.growth = Growth(
            *(self.name, slab, self.store, self.words.header, settings, offload, self.apply)
        )
        self.kept: dict[int, FeatureRef] = {}
        """Refs of the features under keys, by slot; a slot's old one stays until it has a new one."""
        self.own_writes: dict[int, tuple[int, Order]] = {}
        """By slot: the generation that this process wrote there last on a stream, and where on it."""
        self.is_held = Holds(self.words, self.store.table, self.pages)
        self.pending_writes = PendingWrites(
            self.words.published, self.words.reserved, self._set_busy
        )
        self.ahead = RoomsAhead(self)
        self.attendance = Attendance(self.pages)
        self._reports = Reports(self.name, settings, self.turn, self.attendance)
        self.debtors = Debtors(self.store, self.attendance)
        self.pressure = PressureMonitor(self.name, self.store, settings, self.debtors)
        self.put_bytes = 0
        """Bytes reserved since the last `collect`; a small put counts for more."""
        self.ring_at = 0
        self.on_kept: Callable[[bytes], object] | None = None
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

    def tell_tick(self) -> None:
        """Tell sessions the tick with which they mark what they use (`Header.TICK`)."""
        self.words.header[_TICK] = self.store.recency.tick

    def publish(self, slot: Slot, specs: tuple[TensorSpec, ...], order: Order) -> FeatureRef:
        """Publish a slot whose bytes were written, or will be at `order`; return its ref."""
        if self.closed:
            raise CacheClosed("the cache was closed while this put was copying")
        self.slab.signal(self.complete, slot.index, slot.generation, order)
        if order:
            self.own_writes[slot.index] = slot.generation, order
        return self.announce(slot, specs, _now())

    def publish_from(self, slot: Slot, ref: FeatureRef, page: SessionPage) -> None:
        """Publish a slot that a session wrote, or that its stream will write, as this ref of it."""
        index, generation = slot.index, slot.generation
        self.pending_writes.add(slot, page)
        self.announce(slot, ref.specs, _now(), ref)
        self.ahead.published(slot, index, generation)

    def announce(
        self, slot: Slot, specs: tuple[TensorSpec, ...], now_s: float, ref: FeatureRef | None = None
    ) -> FeatureRef:
        """Publish a slot whose `published` word is signalled already; return its ref."""
        store, pressure, extent = self.store, self.pressure, slot.extent
        assert extent is not None, "it is reserved"
        index, generation, nbytes = slot.index, slot.generation, slot.nbytes
        offset_bytes, keyed = extent.offset_bytes, slot.wanted_key is not None
        if ref is None:
            ref = FeatureRef(
                self.pool_id, self.ref_endpoint, index, generation, offset_bytes, nbytes, specs
            )
        if keyed:  # before `live`, which vouches for it
            self.kept[index] = ref
            self.key_table.write_record(index, ref.to_bytes())
        self.words.make_live(index, generation, offset_bytes, nbytes)
        effects = store.publish(slot, now_s)
        if slot.key is not None:
            # The slot is live before sessions find it, and they find it before `live` of the one that it
            # replaces is cleared: whoever finds that revoked finds this in its place.
            self.key_table.keep(slot.key, index, generation)
            self.words.header[_TICK] = store.recency.tick
            if self.on_kept is not None:
                self.on_kept(slot.key)
        if effects:
            self.apply(effects)
        elif (
            store.allocator.used_bytes >= pressure.quiet_below_bytes
            or store.queue.count
            or self.ring_at
            or not pressure.is_normal
        ):
            self._observe()  # else it would find nothing new
        if keyed and store.queue.count:
            self.collect()  # a waiting put may have the room of a feature that can be evicted now
        return ref

    def share(self, base: Slot, readers: int | frozenset[str], ttl_s: float | None) -> FeatureRef:
        """Return a ref of its own of a kept slot whose bytes are there; a grant on it goes with it.

        Raises:
            PoolFull: no slot is free; the grant is still the caller's.

        """
        slot = self.store.share(base, readers, ttl_s, _now())
        index, generation, nbytes = slot.index, slot.generation, slot.nbytes
        # The word of the bytes was seen; the share's vouches for them too, so it comes after that.
        fence_full()
        self.words.published[index] = generation
        self.words.make_live(index, generation, slot.offset_bytes, nbytes)
        self._observe()
        specs = self.kept[base.index].specs  # of this generation: it has a grant
        return FeatureRef(
            self.pool_id, self.ref_endpoint, index, generation, slot.offset_bytes, nbytes, specs
        )

    def give_up_reserved(self, slot: Slot, order: Order) -> None:
        """Give up the slot of a put that failed. On a GPU some of its bytes may still be on their way."""
        if self.closed:
            return
        if self.slab.deferred and order is not None:
            with contextlib.suppress(BackendUnavailable):  # a broken context: nothing comes
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
        due_now, grace_s = 0, 0.0
        told: list[Evicted | Expired] = []
        if self.store.endings.untold:  # before `live` is cleared: then a session asks why
            self.words.tell_endings(self.store.endings.untold)
        for effect in effects:
            if type(effect) is SlotRetired:
                slot = effect.slot
                self.words.live[slot.index] = 0
                if slot.due_s > slot.retired_s:
                    grace_s = slot.due_s - slot.retired_s  # the same for all
                else:
                    due_now += 1
            elif type(effect) is Woken or type(effect) is Found or type(effect) is ClaimPassed:
                self.wakes.wake(effect.waiter.tag)
            elif type(effect) is Evicted or type(effect) is Expired:
                told.append(effect)
                if type(effect) is Evicted:
                    # Before its `live` is cleared, by the next effect.
                    self.key_table.drop(effect.key)
            elif type(effect) is Grow:
                self.growth.grow(effect.end_bytes)
        if grace_s:
            self.recycler.poll_after(grace_s)
        self._go_on(due_now, told)
        self._observe()

    def _go_on(self, due_now: int, told: Sequence[Evicted | Expired]) -> None:
        """See to what effects leave to do: slots that may be free, waiters that may have room."""
        self._reports.tell(told)  # now that every `live` is cleared: a hook may put, which recycles
        if self.store.serving:
            self.turn.left -= LEAST
            self.collector.go_on()
        if due_now and self.collector.reclaim(_now(), max(self.turn.left, due_now)):
            self.collector.go_on()

    def _observe(self) -> None:
        """Tell readers whether to ring, and follow the pressure."""
        ring_at = self._ring_at() if self.store.queue.count else 0
        if ring_at != self.ring_at:
            self.ring_at = self.words.header[Header.WAITING] = ring_at
            self._set_busy()
        self.pressure.observe()

    def _set_busy(self) -> None:
        self.recycler.set_busy(self.ring_at > 0 or bool(self.pending_writes.in_flight))

    def _ring_at(self) -> int:
        """Return at which release of its own each session is to ring.

        Waking this process for each of a stream of releases would cost more than the features
        themselves, and a quarter of the refs that are out keeps the readers busy meanwhile. So while releases
        stream in they ring rarely, and the timer, at a millisecond then, catches the rest; when a
        look finds none, each rings again.
        """
        if _now() >= self.collector.busy_until_s:
            return 1
        return max(1, min(_MAX_UNRUNG, len(self.store.owing) // 4))

    def abandon_writes(self, page: SessionPage) -> list[Effect]:
        """Give up the reservations and unfinished writes of a session that ended."""
        return [effect for step in self.abandon_writes_by_steps(page) for effect in step]

    def abandon_writes_by_steps(self, page: SessionPage) -> Iterator[list[Effect]]:
        """As `abandon_writes`, one of them at each step."""
        now_s = _now()
        for index, generation in self.pending_writes.abandon(page):
            slot = self.store.table.find(index, generation)
            if slot is not None and slot.state is SlotState.PUBLISHED:
                yield self.store.fail_write(slot, now_s)
        while page.reserved:
            yield self.ahead.free_reserved(page, now_s)
        self.ahead.end_session(page)

    def _tick(self) -> bool:
        """Expire, trim, shrink, compact and report; return whether releases stream in."""
        now_s = _now()
        self.collector.look()  # first: what was paid in time does not expire
        self.ahead.take_back_idle(now_s)
        if not self._upkeep:
            self._upkeep = True
            self.turn.do(self._keep_up)
        if self.store.queue:
            self.apply(self.store.serve(now_s))  # a growth that failed may be tried again
            if self.ring_at == 1:
                self.collector.collect_soon()  # for releases before the sessions were told to ring at each
        old_end_bytes = self.store.committed_bytes
        if (end_bytes := self.store.shrink(now_s)) is not None:
            self.growth.shrink(end_bytes, old_end_bytes)
        self.is_held.count_leased(self.store)
        self.uses.count(self.store.table, now_s)
        self.pressure.observe()
        self.pressure.report(now_s)
        gauges.publish(self.store, self.words.header)
        return now_s < self.collector.busy_until_s

    def _keep_up(self) -> bool:
        """Expire and evict by the watermarks, as far as this turn goes; return whether there is more."""
        self._upkeep = False
        if self.closed:
            return False
        now_s, turn, store = _now(), self.turn, self.store
        most = min(QUANTUM_UNITS, max(turn.left, LEAST))
        before, steps_before = (store.expired, store.evicted), store.evicting.steps
        store.recency.pass_time(now_s)
        self.tell_tick()
        self.apply(store.expire(now_s, max(1, most // EXPIRE_UNITS)))
        to_evict = max(1, most // EVICT_UNITS)
        self.apply(store.trim(self.is_held.of_many(), now_s, to_evict))
        self.apply(store.compact(self.is_held.of_many(), now_s, to_evict))
        turn.left -= EXPIRE_UNITS * (store.expired - before[0])
        turn.left -= EVICT_UNITS * (store.evicted - before[1])
        turn.left -= (store.evicting.steps - steps_before) // STEPS_A_UNIT
        self._upkeep = (store.expired, store.evicted) != before or store.trimming
        return self._upkeep

    # --- the end --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more puts, and fail all waiters, in pieces: `wakes.told` returns once it is done."""
        if not self.closed:
            self.closed = self.growth.closed = True
            self.pressure.close(CacheClosed("the cache was closed"))
            for waiter in self.store.queue.clear():
                self.wakes.fail(waiter.tag)
            for key_waiter in self.store.key_waiters.waiting():
                self.wakes.fail(key_waiter.tag)

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
        self.is_held.close()
        del self.words, self.key_table, self.complete  # unmapped now, not when the gc comes by

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child; the parent's pool is not touched.

        The words go by hand: the child's copy of the loop keeps this object.
        """
        self.growth.close()
        self.pending_writes.close()
        self.is_held.close()
        del self.words, self.key_table, self.complete
        self.closed = True
        self.recycler.forget()
        for page in self.pages.values():
            page.close()
        self.pages.clear()
        os.close(self.words_fd)
        self.slab.forget()
