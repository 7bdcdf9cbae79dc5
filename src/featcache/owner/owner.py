"""What an open cache has: the pool that it serves, and the one on the host to which it spills."""

import asyncio

import torch

from featcache import events
from featcache.core.effects import Limits
from featcache.errors import FeatureTooLarge, SettingsError
from featcache.memory.backends import make_host_slab, make_slab, plan_for
from featcache.memory.host import slab as host
from featcache.memory.slab import Plan
from featcache.owner.keys import OwnerKeys
from featcache.owner.own_session import OwnPools
from featcache.owner.relay import Relay
from featcache.owner.served_pool import ServedPool, limits_of
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef
from featcache.session.offload import Offload
from featcache.session.reader import Reader
from featcache.session.staging import SpillCounter, Staged
from featcache.settings import Settings

StagedPut = tuple[Staged | None, Staged | None]
"""A put for the slab, and the same for the host slab where it may go there: at least one of them."""


class Owner:
    """A served pool with its reads; the host pool beside it is made when it is first needed."""

    def __init__(
        self,
        main: ServedPool,
        plan: Plan,
        settings: Settings,
        spill_bytes: int | None,
        name: str | None,
    ) -> None:
        self.main = main
        self.spill: ServedPool | None = None
        self.spills = SpillCounter(settings.log_interval)
        self.spill_bytes = spill_bytes
        self.offload = main.pool.offload
        self._plan = plan
        self._settings = settings
        self._name = name
        self._opening: asyncio.Task[ServedPool] | None = None
        self.relay = Relay(main, self.host_pool, self.offload)
        self._pools = OwnPools(self.offload, self.relay.copy)
        self._pools.add(main.pool.pool_id, main.own)
        self.keys = OwnerKeys(main.lookups, main.own)
        self.reader = Reader(self._pools, self.offload, settings.inline_bytes)
        main.sessions.through_host = self.relay
        main.sessions.spills = spill_bytes is not None

    @classmethod
    async def open(
        cls,
        device: torch.device,
        settings: Settings,
        spill_bytes: int | None,
        endpoint: str | None,
        name: str | None,
    ) -> "Owner":
        """Open the pool, and the one it spills to if there is to be one."""
        offload = Offload()
        main: ServedPool | None = None
        try:
            plan = await offload.run(lambda: plan_for(device, settings.backend), lambda: None)
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
            opened = cls(main, plan, settings, spill_bytes, name)
            if spill_bytes is not None:
                await opened.host_pool()
        except BaseException:
            if main is not None:
                await main.aclose()
            offload.close()
            raise
        opened.report(limits, device)
        return opened

    @property
    def pool(self) -> Pool:
        """The pool that is served; what it spills to is beside it."""
        return self.main.pool

    def report(self, limits: Limits, device: torch.device) -> None:
        """Say that the pool is open, and how a slab on a GPU is shared."""
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
        """Return the pool on the host, opened once however many ask at once."""
        if self.spill is not None:
            return self.spill
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open_host_pool())
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, task: "asyncio.Task[ServedPool]") -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # seen: who asked may have given up

    async def _open_host_pool(self) -> ServedPool:
        # What spills has a size of its own, pinned whole from the start: a GPU's copy can't cross from
        # one pinned piece to another. A pool that only serves reads through the host may be as large
        # as any feature, and its memory comes and goes with its use.
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
        self.main.sessions.kin.append(spill.pool)
        spill.sessions.kin.append(self.main.pool)
        self._pools.add(spill.pool.pool_id, spill.own)
        self.spill = spill
        return spill

    @property
    def servings(self) -> list[ServedPool]:
        """The pools there are."""
        return [self.main] if self.spill is None else [self.main, self.spill]

    def serving(self, ref: FeatureRef) -> ServedPool | None:
        """Return the pool of a ref, if it is one of these."""
        for serving in self.servings:
            if serving.pool.pool_id == ref.pool_id:
                return serving
        return None

    # --- puts that may spill --------------------------------------------------------------------------

    def stage(
        self, feature: object, readers: object, ttl: object, key: object, *, spills: bool
    ) -> StagedPut:
        """Return what a put asks for, in the caller's thread."""
        if not spills:
            return self.main.writer.stage(feature, readers, ttl, key), None
        if self.spill is None or self.spill_bytes is None:
            raise SettingsError("on_full='spill' needs a host slab: create(…, spill='2GiB')")
        there = self.spill.writer.stage(feature, readers, ttl)
        if self._settings.spill_always:
            return None, there
        try:
            return self.main.writer.stage(feature, readers, ttl), there
        except FeatureTooLarge:
            return None, there

    async def put(self, staged: StagedPut, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Put into the slab; if it is full and that was asked for, into the host slab."""
        here, there = staged
        if there is None:
            assert here is not None, "a put goes somewhere"
            return await self.main.writer.put(here, timeout_s, wait=wait)
        if here is not None:
            writer = self.main.writer
            slot = writer.reserve(here.request) or await writer.grow_for(here.request)
            if slot is not None:
                return await writer.fill(slot, here)
        assert self.spill is not None, "staged for it"
        ref = await self.spill.writer.put(there, timeout_s, wait=True)
        self.spills.add(self.main.pool.name, ref)
        return ref

    # --- the end --------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close both pools."""
        try:
            await self.main.aclose()
            if self._opening is not None:
                await asyncio.gather(self._opening, return_exceptions=True)
            if self.spill is not None:
                await self.spill.aclose()
        finally:
            self.offload.close()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self.main.forget()
        if self.spill is not None:
            self.spill.forget()
