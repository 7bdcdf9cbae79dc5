"""`FeatureClient`: a reader and writer of other processes' pools, as users hold it."""

from types import EllipsisType
from typing import Any, Literal, Self

import torch

from featcache.api import forks as _forks
from featcache.api.arguments import check_ref, parse_device, parse_name, settings_with
from featcache.api.base import CacheBase
from featcache.client.keys import ClientKeys
from featcache.client.puts import ClientPuts, Places, StagedPut
from featcache.client.registry import ConnectionRegistry
from featcache.control import endpoint as endpoints
from featcache.errors import CacheClosed
from featcache.memory.pack import Feature
from featcache.memory.words import Header
from featcache.ref import FeatureRef
from featcache.session.offload import Offload
from featcache.session.reader import Reader
from featcache.settings import Settings, parse_timeout
from featcache.statistics import Statistics

OnFull = Literal["wait", "raise", "spill"]


class FeatureClient(CacheBase):
    """Reads the pools of other processes, and puts into the one that it is connected to. See `connect`."""

    def __init__(
        self,
        endpoint: str | None,
        device: torch.device | None,
        name: str | None,
        settings: Settings,
    ) -> None:
        self._endpoint = endpoint
        self._device = self._place = device
        self._name = name
        self._settings = settings
        self._offload: Offload | None = None
        self._registry: ConnectionRegistry | None = None
        self._directory: ClientKeys | None = None
        self._puts: ClientPuts | None = None

    async def open(self) -> Self:
        """Attach, if an endpoint was given.

        Raises:
            AttachRefused: the owner refused, or does not speak this protocol.
            OwnerUnreachable: (also AttachRefused and OwnerLost) nobody listens there.
            CacheClosed: it was open before; make another.

        """
        if self._reader is not None or self._why_closed is not None:
            raise CacheClosed("a client opens once: connect another")
        offload = Offload()
        registry = ConnectionRegistry(
            self._name, self._device, self._settings, offload, self._endpoint
        )
        try:
            if self._endpoint is not None:
                await registry.attach(self._endpoint)
        except BaseException:
            try:
                await registry.close()
                await registry.drain()  # what a failed attach had mapped
            finally:
                offload.close()
            raise
        self._offload, self._registry = offload, registry
        self._reader = Reader(registry, offload, self._settings.inline_bytes)
        self._directory = ClientKeys(registry.peek_bound, registry.bound_handle)
        self._puts = ClientPuts(registry, self._settings, offload)
        _forks.watch(self)
        return self

    async def aclose(self) -> None:
        """Say goodbye to every owner. Borrows that are still open keep theirs until they end."""
        registry, self._registry, self._reader = self._registry, None, None
        if registry is None:
            return
        self._why_closed = "this client was closed"
        try:
            await registry.close()
            await registry.drain()
        finally:
            if self._offload is not None:
                self._offload.close()

    def _forget(self) -> None:
        registry, self._registry, self._reader = self._registry, None, None
        self._why_closed = "this process was forked from the one that opened the client"
        if registry is not None:
            registry.forget()

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process."""
        return self._reader is not None

    def _reads(self) -> Reader:
        reader = self._reader
        if reader is None:
            raise self._closed()
        return reader

    def _keys(self) -> ClientKeys:
        self._reads()
        assert self._directory is not None, "an open client has its keys"
        return self._directory

    def _default_device(self) -> torch.device | None:
        return self._device

    # --- puts -----------------------------------------------------------------------------------

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
        """Copy a feature into the slab of the pool that this client is connected to.

        The arguments, the errors and what is promised are those of `FeatureCache.put`; `ttl` left out
        is as in this client's Settings. Waiting puts of all processes, the owner's too, stand in one
        queue. The copy is this process's own, on its torch stream; it takes two round trips besides.
        Where this client's device can't access the slab, the feature goes into host memory, and the
        owner copies it from there.

        Raises besides:
            OwnerLost: the owner died or closed the pool.

        """
        timeout_s = parse_timeout(timeout)
        places = await self.places(on_full, key)
        staged = self.stage(places, feature, readers=readers, key=key, ttl=ttl)
        return await self.put_staged(staged, timeout_s, on_full)

    async def put_made(self, feature: Feature, key: bytes) -> FeatureRef:
        """Put what `get_or_put` made."""
        return await self.put(feature, key=key)

    async def places(self, on_full: str, key: Any) -> Places:
        """Return where a put may go, attached; for `stage`."""
        return await self._writing().places(on_full, key)

    def stage(self, places: Places, feature: Any, *, readers: Any, key: Any, ttl: Any) -> StagedPut:
        """Return what a put asks for and where its caller's stream stands; for `put_staged`.

        In the thread of the caller.
        """
        return self._writing().stage(places, feature, readers, ttl, key)

    async def put_staged(
        self, staged: StagedPut, timeout_s: float | None, on_full: str
    ) -> FeatureRef:
        """Do the other half of `put`."""
        return await self._writing().put(staged, timeout_s, on_full)

    def _writing(self) -> ClientPuts:
        self._reads()
        assert self._puts is not None, "an open client has its puts"
        return self._puts

    async def discard(self, ref: FeatureRef) -> None:
        """Ask the owner to take a ref back: its request was cancelled. As `FeatureCache.discard`."""
        self._reads()
        assert self._registry is not None, "an open client has its handles"
        link = (await self._registry.connection(check_ref(ref))).link
        await link.discard(ref.slot, ref.generation)

    def statistics(self) -> Statistics:
        """Return this client's counters, and the gauges of the pools that it has attached."""
        reader = self._reads()
        assert self._registry is not None, "an open client has its handles"
        headers = [connection.attachment.header for connection in self._registry.connections]
        capacity_bytes = sum(header[Header.CAPACITY] for header in headers)
        used_bytes = sum(header[Header.USED] for header in headers)
        return Statistics(
            capacity_bytes=capacity_bytes,
            committed_bytes=sum(header[Header.COMMITTED] for header in headers),
            used_bytes=used_bytes,
            free_bytes=capacity_bytes - used_bytes,
            largest_free_bytes=max((header[Header.LARGEST_FREE] for header in headers), default=0),
            slots=sum(header[Header.SLOTS] for header in headers),
            slots_used=sum(header[Header.SLOTS_USED] for header in headers),
            waiters=sum(header[Header.WAITERS] for header in headers),
            waiting_bytes=sum(header[Header.WAITING_BYTES] for header in headers),
            sessions=len(headers),
            keys=sum(header[Header.KEYS] for header in headers),
            resident_bytes=sum(header[Header.RESIDENT] for header in headers),
            pinned_bytes=sum(header[Header.PINNED] for header in headers),
            evicted=sum(header[Header.EVICTED] for header in headers),
            puts=self._writing().puts,
            spilled=self._writing().spills.count,
            gets=reader.gets,
        )

    def __repr__(self) -> str:
        where = self._endpoint or "any endpoint"
        return f"<FeatureClient {self._name or 'unnamed'} of {where}>"


def connect(
    endpoint: str | None = None,
    *,
    device: Any = None,
    name: str | None = None,
    settings: Settings | None = None,
) -> FeatureClient:
    """Return a client to be opened with ``async with``.

    Args:
        endpoint: an owner's `FeatureCache.endpoint`; the client then reads that pool only, and can
            put into it and use its keys. None attaches to a pool when it first meets a ref of it.
        device: where `get` puts its copies, and the GPU that maps a slab on a GPU; None is the pool's
            own device where it is visible here, else torch's current one.
        name: the name by which puts may call for this session's reads; one session at a time has it.
        settings: bounds and intervals; without it, the environment's ``FEATCACHE_…``.

    Raises:
        SettingsError: an argument makes no sense.
        BackendUnavailable: the device is not there.

    """
    target = None if device is None else parse_device(device)
    path = None if endpoint is None else endpoints.check_endpoint(endpoint)
    return FeatureClient(path, target, parse_name(name), settings_with(settings))
