"""`FeatureCache`: the owner of a pool, as users hold it."""

import contextlib
from types import EllipsisType
from typing import Any, Literal, Self

import torch

from featcache import _forks, events
from featcache._offload import Offload
from featcache.control import endpoint as endpoints
from featcache.control.server import Server
from featcache.core.store import Limits
from featcache.errors import BackendUnavailable, CacheClosed, SettingsError, UnknownPool
from featcache.gauge import Gauge, Pressure
from featcache.memory.host import HostSlab
from featcache.own_pool import OwnPool
from featcache.pool import Pool
from featcache.reader import Reader
from featcache.reads import NOT_OPENED, Reads, check_ref, parse_timeout
from featcache.reaper import Reaper
from featcache.ref import FeatureRef
from featcache.settings import Settings
from featcache.statistics import Statistics
from featcache.writer import Writer

__all__ = ["FeatureCache", "limits_of"]


class _Open:
    """What an open cache has, taken down in the reverse order of its making."""

    def __init__(
        self, pool: Pool, reaper: Reaper, server: Server, offload: Offload, name: str | None
    ) -> None:
        self.pool = pool
        self.reaper = reaper
        self.server = server
        self.offload = offload
        self.writer = Writer(pool)
        self.own = OwnPool(pool, reaper, name)
        self.reader = Reader(self.own, offload, pool.settings.inline_bytes)


class FeatureCache(Reads):
    """Owns a pool: a slab, its slots, and the socket that readers attach at. See `create`."""

    def __init__(
        self, device: torch.device, settings: Settings, endpoint: str | None, name: str | None
    ) -> None:
        self._device = device
        self._settings = settings
        self._wanted_endpoint = endpoint
        self._name = name
        self._state: _Open | None = None
        self.pressure = Pressure(self._gauge)

    # --- life -----------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Make the slab and listen.

        Raises:
            BackendUnavailable: the memory or the kernel's help for it is not there.
            SettingsError: the endpoint can't be used.
            CacheClosed: it was open before; make another.

        """
        if self._state is not None or self._why_closed != NOT_OPENED:
            raise CacheClosed("a cache opens once: create another")
        settings = self._settings
        with contextlib.ExitStack() as undo:
            offload = Offload()
            undo.callback(offload.close)
            limits = limits_of(settings, HostSlab.granularity_bytes)
            slab = HostSlab(limits.capacity_bytes, huge_pages=settings.huge_pages)
            undo.callback(slab.close)
            try:
                await offload.run(
                    lambda: slab.commit(0, limits.initial_bytes, prefault=settings.prefault),
                    lambda: None,
                )
            except MemoryError as error:
                raise BackendUnavailable(f"the slab could not be made: {error}") from error
            sock, path = endpoints.listen(self._wanted_endpoint)
            undo.callback(endpoints.unlink, path)
            undo.callback(sock.close)
            pool = Pool(slab, limits, settings, offload)
            undo.callback(pool.close)
            pool.endpoint = path
            reaper = Reaper(pool, self._name)
            undo.callback(reaper.close)
            server = Server(sock, path, settings, reaper)
            self._state = _Open(pool, reaper, server, offload, self._name)
            undo.pop_all()
        _forks.watch(self)
        events.emit(
            events.PoolOpened(
                pool=pool.name,
                endpoint=path,
                device=str(self._device),
                capacity_bytes=limits.capacity_bytes,
                committed_bytes=limits.initial_bytes,
            )
        )
        return self

    async def aclose(self) -> None:
        """Close the pool: waiting puts raise CacheClosed, sessions are told, the socket's file goes.

        What readers have mapped stays readable to them until their borrows end. Idempotent.
        """
        state, self._state = self._state, None
        if state is None:
            return
        self._why_closed = "this cache was closed"
        state.server.close()
        state.own.close()
        unpaid = len(state.pool.store.published)
        state.pool.stop()
        try:
            await state.pool.drain()
        finally:
            state.pool.close()
            state.reaper.close()
            slab = state.pool.slab
            # Giving a gigabyte back takes a tenth of a second: not in the loop.
            try:
                await state.offload.run(slab.close, slab.close)
            finally:
                state.offload.close()
        events.emit(
            events.PoolClosed(
                pool=state.pool.name, endpoint=state.pool.endpoint, unpaid_refs=unpaid
            )
        )

    def _forget(self) -> None:
        state, self._state = self._state, None
        self._why_closed = "this process was forked from the one that opened the cache"
        if state is not None:
            state.server.forget()
            state.own.forget()
            state.pool.forget()
            state.reaper.close()

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process."""
        return self._state is not None

    def _opened(self) -> _Open:
        state = self._state
        if state is None:
            raise CacheClosed(self._why_closed)
        return state

    def _reads(self) -> Reader:
        return self._opened().reader

    def _gauge(self) -> Gauge:
        return self._opened().pool.gauge

    def _default_device(self) -> torch.device | None:
        return None

    # --- use ------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The path of the socket that `connect` takes."""
        return self._opened().pool.endpoint

    async def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = 1,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: Literal["wait", "raise"] = "wait",
    ) -> FeatureRef:
        """Copy a feature into the slab and return its ref.

        Args:
            feature: a dense tensor of any dtype (but quantized ones) and shape, on any device,
                contiguous or not; or a dict of them, packed in one slot.
            readers: how many reads the ref owes, each by another session; or the names of the
                sessions that owe one each (`connect(name=…)`).
            ttl: seconds until the ref expires unpaid; None is never, left out is as in Settings.
            timeout: seconds to wait for room; None is for ever.
            on_full: ``"wait"`` stands in the queue, first come, first served; ``"raise"`` does not.

        Raises:
            FeatureTooLarge: it can never fit.
            PoolFull: no room and ``on_full="raise"``, or `Settings.waiters` puts wait already.
            PutTimeout: no room in time.
            CacheClosed: closed, also while waiting.
            SettingsError: an argument makes no sense.

        Copies of more than `Settings.inline_bytes` run in a thread. If the call is cancelled, its
        room or its place in the queue goes to the next.

        """
        if on_full not in {"wait", "raise"}:
            raise SettingsError(f"on_full={on_full!r} is neither 'wait' nor 'raise'")
        return await self._opened().writer.put(
            feature, readers, ttl, parse_timeout(timeout), wait=on_full == "wait"
        )

    def put_nowait(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = 1,
        ttl: float | EllipsisType | None = ...,
    ) -> FeatureRef:
        """`put` with no await: PoolFull at once if there is no room or others wait for it.

        The copy runs in the loop whatever its size, and so does the growth of the slab if it needs
        some. Call it in the loop's thread.
        """
        return self._opened().writer.put_nowait(feature, readers, ttl)

    async def discard(self, ref: FeatureRef) -> None:
        """Take back a ref that was never sent, or whose request was cancelled.

        Who is reading it now may finish; its bytes are recycled after that. Everybody else gets
        StaleRef, as this call does if there is nothing left to take back.
        """
        state = self._opened()
        if check_ref(ref).pool_id != state.pool.pool_id:
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}, not of this cache")
        state.reaper.discard(ref.slot, ref.generation)

    def statistics(self) -> Statistics:
        """Return what the pool has and has done, now."""
        state = self._opened()
        pool, store = state.pool, state.pool.store
        return Statistics(
            capacity_bytes=store.limits.capacity_bytes,
            committed_bytes=store.committed_bytes,
            used_bytes=store.allocator.used_bytes,
            free_bytes=store.free_bytes,
            largest_free_bytes=store.largest_free_bytes,
            slots=store.table.count,
            slots_used=store.table.used,
            waiters=len(store.queue),
            waiting_bytes=store.queue.waiting_bytes,
            sessions=len(state.server.sessions),
            puts=store.puts,
            gets=state.reader.gets,
            reads_paid=pool.reads_paid,
            recycled=store.recycled,
            waited=store.waited,
            expired=store.expired,
            discarded=state.reaper.discarded,
            readers_lost=state.reaper.readers_lost,
        )

    def __repr__(self) -> str:
        where = self._state.pool.endpoint if self._state is not None else self._why_closed
        return f"<FeatureCache on {self._device}: {where}>"


def limits_of(settings: Settings, granularity_bytes: int) -> Limits:
    """Return the sizes of a pool, rounded up to what its slab can do; SettingsError if they clash."""

    def up(size_bytes: int, unit_bytes: int) -> int:
        return -(-size_bytes // unit_bytes) * unit_bytes

    capacity_bytes = up(settings.capacity, granularity_bytes)
    segment_bytes = min(up(settings.segment, granularity_bytes), capacity_bytes)
    wanted_bytes = segment_bytes if settings.initial is None else settings.initial
    if wanted_bytes > capacity_bytes:
        raise SettingsError(f"initial={settings.initial} is more than capacity={capacity_bytes}")
    return Limits(
        capacity_bytes=capacity_bytes,
        segment_bytes=segment_bytes,
        initial_bytes=min(up(wanted_bytes, segment_bytes), capacity_bytes),
        slots=settings.slots,
        waiters=settings.waiters,
        grace_s=settings.grace,
        idle_s=settings.idle,
    )
