"""`FeatureCache`: the owner of a pool, as users hold it."""

from types import EllipsisType
from typing import Any, Literal, Self

import torch

from featcache import events
from featcache.api import forks as _forks
from featcache.api.arguments import check_ref, parse_device, parse_name, settings_with
from featcache.api.base import CacheBase
from featcache.control import endpoint as endpoints
from featcache.errors import CacheClosed, SettingsError, UnknownPool
from featcache.memory.host.slab import HostSlab
from featcache.memory.pack import Feature
from featcache.owner.keys import OwnerKeys
from featcache.owner.owner import Owner, StagedPut
from featcache.owner.served_pool import limits_of
from featcache.pool.pressure import Pressure, PressureMonitor
from featcache.ref import FeatureRef
from featcache.session.arguments import check_on_full
from featcache.session.reader import Reader
from featcache.settings import Settings, parse_bytes, parse_timeout
from featcache.statistics import Statistics

OnFull = Literal["wait", "raise", "spill"]


class FeatureCache(CacheBase):
    """Owns a pool: a slab, its slots, and the socket that readers attach at. See `create`."""

    def __init__(
        self,
        device: torch.device,
        settings: Settings,
        endpoint: str | None,
        name: str | None,
        spill_bytes: int | None = None,
    ) -> None:
        self._device = device
        self._settings = settings
        self._wanted_endpoint = endpoint
        self._name = name
        self._spill_bytes = spill_bytes
        self._opening = False
        self._state: Owner | None = None
        self.pressure = Pressure(self._gauge)

    # --- life -----------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Make the slab and listen.

        Raises:
            BackendUnavailable: the memory or the kernel's help for it is not there.
            SettingsError: the endpoint can't be used.
            CacheClosed: it was open before; make another.

        """
        if self._state is not None or self._opening or self._why_closed is not None:
            raise CacheClosed("a cache opens once: create another")
        self._opening = True
        try:
            self._state = await Owner.open(
                self._device, self._settings, self._spill_bytes, self._wanted_endpoint, self._name
            )
        finally:
            self._opening = False
        _forks.watch(self)
        return self

    async def aclose(self) -> None:
        """Close the pool: waiting puts raise CacheClosed, sessions are told, the socket's file goes.

        What readers have mapped stays readable to them until their borrows end. Idempotent.
        """
        state, self._state = self._state, None
        if state is None:
            return
        self._why_closed = "this cache was closed"
        pool = state.main.pool
        reads_left = len(pool.store.owing)
        await state.aclose()
        events.emit(
            events.PoolClosed(pool=pool.name, endpoint=pool.endpoint, unpaid_refs=reads_left)
        )

    def _forget(self) -> None:
        state, self._state = self._state, None
        self._why_closed = "this process was forked from the one that opened the cache"
        if state is not None:
            state.forget()

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process."""
        return self._state is not None

    def _opened(self) -> Owner:
        state = self._state
        if state is None:
            raise self._closed()
        return state

    def _reads(self) -> Reader:
        return self._opened().reader

    def _keys(self) -> OwnerKeys:
        return self._opened().keys

    def _gauge(self) -> PressureMonitor:
        return self._opened().main.pool.gauge

    def _default_device(self) -> torch.device | None:
        return None

    # --- use ------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The path of the socket that `connect` takes."""
        return self._opened().main.pool.endpoint

    async def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: OnFull = "wait",
    ) -> FeatureRef:
        """Copy a feature into the slab and return its ref.

        Args:
            feature: a dense tensor of any dtype (but quantized ones) and shape, on any device,
                contiguous or not; or a dict of them, packed in one slot.
            readers: how many reads the ref owes, each by another session; or the names of the
                sessions that owe one each (`connect(name=…)`). 1 if it is left out; with a `key` none:
                the feature is there for whoever comes by its key, and what it owes besides keeps it
                from being evicted.
            key: a str or bytes of 1 to 1024 bytes (a str is its UTF-8; `content_key` makes one of the
                content). The feature is kept under it until it is evicted, the longest unused first,
                when a put needs its room. What was under the key before is dropped.
            ttl: seconds until the ref expires unpaid; None is never, left out is as in Settings. A
                feature that is kept under a key stays.
            timeout: seconds to wait for room; None is for ever.
            on_full: ``"wait"`` stands in the queue, first come, first served; ``"raise"`` does not;
                ``"spill"`` puts it into the host slab instead (`create(spill=…)`), and waits only
                when that is full too. The ref looks the same to its readers. Not with a `key`.

        Raises:
            FeatureTooLarge: it can never fit.
            PoolFull: no room and ``on_full="raise"``, or `Settings.waiters` puts wait already.
            PutTimeout: no room in time.
            CacheClosed: closed, also while waiting.
            SettingsError: an argument makes no sense.

        A feature on a GPU is copied in the order of the stream that is torch's current one at the
        call: what it is made by need not be done. One on the host can be changed once the call
        returns; copies of more than `Settings.inline_bytes` run in a thread. If the call is
        cancelled, its room or its place in the queue goes to the next.

        """
        timeout_s = None if timeout is None else parse_timeout(timeout)
        state = self._state
        if on_full == "wait" and state is not None:  # the most usual, by the shortest way
            writer = state.main.writer
            return await writer.put(writer.stage(feature, readers, ttl, key), timeout_s, wait=True)
        staged = self.stage(feature, readers=readers, key=key, ttl=ttl, on_full=on_full)
        return await self.put_staged(staged, timeout_s, on_full)

    async def put_made(self, feature: Feature, key: bytes) -> FeatureRef:
        """Put what `get_or_put` made."""
        return await self.put(feature, key=key)

    def stage(self, feature: Any, *, readers: Any, key: Any, ttl: Any, on_full: str) -> StagedPut:
        """Return what a put asks for and where its caller's stream stands; for `put_staged`.

        The first half of `put`, in the thread of the caller.
        """
        check_on_full(on_full)
        if key is not None and on_full == "spill":
            raise SettingsError("what is kept under a key makes its own room: it does not spill")
        return self._opened().stage(feature, readers, ttl, key, spills=on_full == "spill")

    async def put_staged(
        self, staged: StagedPut, timeout_s: float | None, on_full: str
    ) -> FeatureRef:
        """Do the other half of `put`, in the loop."""
        return await self._opened().put(staged, timeout_s, wait=on_full != "raise")

    def put_nowait(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
    ) -> FeatureRef:
        """`put` with no await: PoolFull at once if there is no room or others wait for it.

        The copy runs in the loop whatever its size, and so does the growth of the slab if it needs
        some. Call it in the loop's thread.
        """
        state = self._state
        writer = (self._opened() if state is None else state).main.writer
        return writer.put_nowait(writer.stage(feature, readers, ttl, key))

    async def put_staged_nowait(self, staged: StagedPut) -> FeatureRef:
        """Do the other half of `put_nowait`, in the loop."""
        assert staged[0] is not None, "staged for the slab"
        return self._opened().main.writer.put_nowait(staged[0])

    async def discard(self, ref: FeatureRef) -> None:
        """Take back a ref that was never sent, or whose request was cancelled.

        Who is reading it now may finish; its bytes are recycled after that. Everybody else gets
        StaleRef, as this call does if there is nothing left to take back; MalformedRef if the ref's
        extent is not its slot's. What is kept under a key stays there: nobody owes a read of it any
        more.
        """
        serving = self._opened().serving(check_ref(ref))
        if serving is None:
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}, not of this cache")
        serving.sessions.discard_ref(ref)

    def statistics(self) -> Statistics:
        """Return what the pool has and has done, now."""
        state = self._opened()
        main, store = state.main, state.main.pool.store
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
            sessions=len(main.server.sessions),
            puts=store.puts + state.spills.count,
            gets=state.reader.gets,
            reads_paid=main.pool.reads_paid,
            recycled=store.recycled,
            waited=store.waited,
            expired=sum(each.pool.store.expired for each in state.servings),
            spilled=state.spills.count,
            relayed=state.relay.relayed,
            keys=len(store.directory),
            resident_bytes=store.directory.resident_bytes,
            pinned_bytes=store.directory.pinned_bytes,
            hits=store.hits,
            misses=store.misses,
            evicted=store.evicted,
            discarded=sum(each.sessions.discarded for each in state.servings),
            readers_lost=main.sessions.readers_lost,
        )

    def __repr__(self) -> str:
        state = self._state
        where = str(self._closed()) if state is None else state.main.pool.endpoint
        return f"<FeatureCache on {self._device}: {where}>"


def create(
    *,
    device: Any = "cpu",
    capacity: int | str | None = None,
    endpoint: str | None = None,
    name: str | None = None,
    spill: int | str | None = None,
    settings: Settings | None = None,
    initial: int | str | None = None,
    segment: int | str | None = None,
    idle: float | None = None,
) -> FeatureCache:
    """Return a cache to be opened with ``async with``: this process will own its slab.

    Args:
        device: where the slab is: ``"cpu"``, or a GPU such as ``"cuda:0"`` (which needs cuda-bindings).
        capacity: bytes the slab may grow to (or ``"512MiB"``); 1 GiB if neither this, `settings` nor
            ``FEATCACHE_CAPACITY`` says otherwise.
        endpoint: the path of the Unix socket to listen at; None makes one that only this user can
            reach.
        name: the name under which the owner itself owes reads (``readers=[name, …]``).
        spill: bytes of a second slab in host memory, which ``put(on_full="spill")`` uses when this one
            is full; pinned if this one is on a GPU.
        settings: everything else; without it, the environment's ``FEATCACHE_…``.
        initial: bytes committed from the beginning; ``initial=capacity`` fails at the start rather
            than under load. One segment by default.
        segment: bytes committed and given back at a time, 64 MiB by default.
        idle: seconds an empty tail is kept, 30 by default.

    Raises:
        SettingsError: an argument makes no sense.
        BackendUnavailable: the device is not there.

    """
    target = parse_device(device)
    chosen = settings_with(settings, capacity=capacity, initial=initial, segment=segment, idle=idle)
    limits_of(chosen, HostSlab.granularity_bytes)  # says now what makes no sense
    spill_bytes = None if spill is None else parse_bytes(spill, "spill")
    path = None if endpoint is None else endpoints.check_endpoint(endpoint)
    return FeatureCache(target, chosen, path, parse_name(name), spill_bytes)
