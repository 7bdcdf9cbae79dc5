"""The owner: the served pool and its optional host-memory spill pool."""

import asyncio
import time
from functools import partial
from typing import Any, Final

import torch

from featcache import events
from featcache.control.turns import CALL_UNITS
from featcache.core.effects import Limits
from featcache.errors import CacheClosed, SettingsError, UnknownPool
from featcache.memory.backends import make_host_slab, make_slab, plan_for
from featcache.memory.host import slab as host
from featcache.memory.slab import Plan
from featcache.owner.beyond import Beyond, Cluster
from featcache.owner.keys import OwnerKeys
from featcache.owner.own_session import OwnPools
from featcache.owner.relay import Relay
from featcache.owner.served_pool import ServedPool, take_each
from featcache.pool import gauges
from featcache.pool.limits import limits_of
from featcache.pool.pool import Pool
from featcache.pool.refresh import refresh
from featcache.ref import FeatureRef
from featcache.session.arguments import check_on_full
from featcache.session.offload import Offload, SharedTask
from featcache.session.reader import Reader
from featcache.session.staging import SpillCounter, Writers
from featcache.settings import Settings
from featcache.statistics import Statistics

_DRAIN_POLL_S: Final = 0.005


class Owner:
    """The engine of an open `FeatureCache`. The host pool is made when it is first needed."""

    def __init__(
        self,
        main: ServedPool,
        plan: Plan,
        settings: Settings,
        spill_bytes: int | None,
        name: str | None,
        cluster: Cluster | None = None,
    ) -> None:
        self.main = main
        self.spill: ServedPool | None = None
        self.spill_bytes = spill_bytes
        self.offload = main.pool.offload
        self.turn = main.pool.turn
        self.stages_at_call = main.pool.slab.deferred
        """Whether a put is to note its place on the caller's stream before it waits for anything."""
        self._plan = plan
        self._settings = settings
        self._name = name
        self._opening_host_pool = SharedTask(self._open_host_pool)
        self.relay = Relay(main, self.host_pool, self.offload)
        self._pools = OwnPools(self.offload, self.relay.copy, main.sessions, name)
        self._pools.add(main.pool.pool_id, main.own)
        self.keys = OwnerKeys(main.lookups, main.own)
        self.reader = Reader(self._pools, self.offload, settings.inline_bytes)
        self.spills = SpillCounter(lambda: main.pool.name, settings.log_interval)
        self._slab_only = Writers(main.writer)
        main.sessions.through_host = self.relay
        main.sessions.spills = spill_bytes is not None
        self.beyond = None if cluster is None else Beyond(main, cluster)
        """What it has for other hosts."""
        main.shown.hosts = self.beyond
        main.shown.statistics = partial(self.statistics, in_loop=True)

    @classmethod
    async def open(
        cls,
        device: torch.device,
        settings: Settings,
        spill_bytes: int | None,
        endpoint: str | None,
        name: str | None,
        cluster: Cluster | None = None,
    ) -> "Owner":
        """Open the pool, and the one that it spills to if there is to be one."""
        offload = Offload()
        main: ServedPool | None = None
        opened: Owner | None = None
        try:
            plan = await offload.run(lambda: plan_for(device, settings.backend))
            limits = limits_of(settings, plan.granularity_bytes, plan.max_segments)
            main = await ServedPool.open(
                lambda: make_slab(
                    plan,
                    limits.capacity_bytes,
                    limits.segment_bytes,
                    huge_pages=settings.huge_pages,
                ),
                limits,
                settings,
                offload,
                endpoint,
                name,
            )
            opened = cls(main, plan, settings, spill_bytes, name, cluster)
            if main.pool.slab.deferred:
                await main.own.prepare()
            if spill_bytes is not None or opened.beyond is not None:
                # A session is told of the spill pool, and the address in refs, when it is admitted.
                main.server.hold()
                if spill_bytes is not None:
                    await opened.host_pool()
                if opened.beyond is not None:
                    await opened.beyond.open()
                main.server.resume()
        except BaseException:
            if opened is not None:
                await opened._take_down()
            elif main is not None:
                await main.aclose()
            await offload.drain()  # a slab that a thread was making is closed when it is made
            offload.close()
            raise
        opened._report(limits, device)
        return opened

    @property
    def pool(self) -> Pool:
        """The pool that is served; its spill pool is beside it."""
        return self.main.pool

    def _report(self, limits: Limits, device: torch.device) -> None:
        pool = self.main.pool
        if self._plan.kind != host.KIND:
            events.emit(
                events.BackendChosen(
                    pool=pool.name,
                    backend=self._plan.kind,
                    device=pool.slab.device_name,
                    reason=self._plan.reason,
                )
            )
        events.emit(
            events.PoolOpened(
                pool=pool.name,
                endpoint=pool.endpoint,
                device=str(device),
                capacity_bytes=limits.capacity_bytes,
                committed_bytes=limits.initial_bytes,
            )
        )

    # --- the host pool ----------------------------------------------------------------------------

    async def host_pool(self) -> ServedPool:
        """Return the pool in host memory, opened once however many callers come at once."""
        return self.spill or await self._opening_host_pool.join()

    async def _open_host_pool(self) -> ServedPool:
        # A spill pool has a size of its own, pinned whole from the start: a GPU's copy can't cross
        # from one pinned piece to another. A pool that only serves reads through the host may be as
        # large as any feature, and its memory comes and goes with its use.
        pins = self.spill_bytes is not None
        capacity_bytes = self.spill_bytes or self.main.pool.store.limits.capacity_bytes
        limits = limits_of(
            self._settings,
            host.HostSlab.granularity_bytes,
            capacity_bytes=capacity_bytes,
            initial_bytes=capacity_bytes if pins else None,
        )
        spill = await ServedPool.open(
            lambda: make_host_slab(
                self._plan,
                limits.capacity_bytes,
                huge_pages=self._settings.huge_pages,
                pinned=pins,
            ),
            limits,
            self._settings,
            self.offload,
            None,
            self._name,
        )
        if self.main.pool.closed:
            await spill.aclose()
            self.main.pool.check_open()
        self.main.sessions.siblings.append(spill.pool)
        spill.sessions.siblings.append(self.main.pool)
        self.main.pool.attendance.siblings.append(spill.pool.attendance)
        spill.pool.attendance.siblings.append(self.main.pool.attendance)
        self._pools.add(spill.pool.pool_id, spill.own)
        self.spill = spill
        return spill

    @property
    def served(self) -> list[ServedPool]:
        """The pools there are."""
        return [self.main] if self.spill is None else [self.main, self.spill]

    # --- calls of the API --------------------------------------------------------------------------

    def writers_nowait(self, on_full: str, key: Any) -> Writers:
        """Return the writers of the pools that a put may go to.

        Raises:
            SettingsError: no such policy, or none that this owner or a keyed put can have.

        """
        check_on_full(on_full, key)
        if on_full != "spill":
            return self._slab_only
        if self.spill is None or self.spill_bytes is None:
            raise SettingsError("on_full='spill' needs a host slab: create(…, spill='2GiB')")
        return Writers(None if self._settings.spill_always else self.main.writer, self.spill.writer)

    async def writers(self, on_full: str, key: Any, timeout_s: float | None) -> Writers:  # noqa: ARG002 - see Engine
        """As `writers_nowait`."""
        return self.writers_nowait(on_full, key)

    async def discard(self, ref: FeatureRef) -> None:
        """Cancel the reads that a ref still owes, or raise StaleRef, MalformedRef or UnknownPool."""
        turn = self.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        for served in self.served:
            if served.pool.pool_id == ref.pool_id:
                if served.pool.ahead.is_coming(ref.slot, ref.generation):
                    await served.pool.ahead.arrival(ref.slot, ref.generation)
                served.sessions.discard_ref(ref)
                return
        if not self._pools.is_far(ref):
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}, not of this cache")
        await self._pools.end_far(ref, "discard")

    def statistics(self, *, in_loop: bool) -> Statistics:
        """Return the pool's gauges, and its counters with those of the spill pool that belong to it.

        What was released until now is counted; a word that is still on a GPU's stream is not. Outside
        the loop, where the store changes while it is read, the gauges are those last published.
        """
        if in_loop:
            for each in self.served:
                refresh(each.pool)
        main, store, spilled = self.main, self.main.pool.store, self.spills.count
        hits, misses, reads_paid = main.pool.uses.lookups(store)
        return Statistics(
            **(gauges.of_store(store) if in_loop else _published(main.pool)),
            sessions=len(main.server.sessions),
            puts=store.puts + spilled,
            gets=self.reader.gets,
            reads_paid=reads_paid,
            recycled=store.recycled,
            waited=store.waited,
            expired=sum(each.pool.store.expired for each in self.served),
            spilled=spilled,
            relayed=self.relay.relayed,
            hits=hits,
            misses=misses,
            discarded=sum(each.sessions.discarded for each in self.served),
            readers_lost=main.sessions.readers_lost,
            **({} if self.beyond is None else self.beyond.counts()),
        )

    # --- the end --------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> bool:
        """Take no more puts and end all waits; return whether all reads end within `timeout_s`."""
        for served in self.served:
            served.refuse_puts()
        give_up_s = time.monotonic() + timeout_s
        # Which reads end, and on which stream, no event tells.
        while any(served.pool.is_held.any_read() for served in self.served):
            if time.monotonic() >= give_up_s:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return True

    async def aclose(self) -> None:
        """Close both pools."""
        pool = self.main.pool
        await self._take_down()
        unpaid = sum(each.unpaid_refs for each in self.served)
        events.emit(events.PoolClosed(pool=pool.name, endpoint=pool.endpoint, unpaid_refs=unpaid))

    async def _take_down(self) -> None:
        # The threads last: a host pool that is still being opened needs them to close.
        beyond = () if self.beyond is None else (self.beyond.close,)
        await take_each(*beyond, self.main.aclose, self._close_host_pool, self.offload.close)

    async def _close_host_pool(self) -> None:
        if self._opening_host_pool.task is not None:
            await asyncio.gather(self._opening_host_pool.task, return_exceptions=True)
        if self.spill is not None:
            await self.spill.aclose()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        if self.beyond is not None:
            self.beyond.forget()
        for served in self.served:
            served.forget()


def _published(pool: Pool) -> dict[str, Any]:
    """Return a pool's gauges as sessions see them, in any thread: another may be closing it."""
    try:
        header = pool.words.header
    except AttributeError:
        raise CacheClosed("the cache was closed") from None
    return gauges.of_headers([header])
