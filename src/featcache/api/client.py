"""`FeatureClient`: a reader and writer of other processes' pools, as users hold it; `connect`."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import Iterable
from types import EllipsisType
from typing import Any, Literal, Self

import torch

from featcache.api import forks
from featcache.api.arguments import parse_device, parse_name, settings_with
from featcache.api.base import CacheBase
from featcache.api.lifecycle import Lifecycle
from featcache.client.deadlines import UNATTACHED, UNENTERED, at_most, give_up_at
from featcache.client.keys import ClientKeys
from featcache.client.puts import ClientPuts
from featcache.client.reconnect import Reconnector
from featcache.client.registry import ConnectionRegistry
from featcache.control import endpoint as endpoints
from featcache.control.turns import CALL_UNITS
from featcache.errors import SettingsError
from featcache.pool import gauges
from featcache.ref import FeatureRef
from featcache.session.line import Line
from featcache.session.offload import Offload
from featcache.session.reader import Reader
from featcache.session.staging import SpillCounter, Writers
from featcache.settings import Settings, parse_timeout
from featcache.statistics import Statistics

OnFull = Literal["wait", "raise", "spill"]


class OpenClient:
    """The engine of an open `FeatureClient`: its attached pools, their reader, its keys and puts."""

    def __init__(self, registry: ConnectionRegistry, settings: Settings, offload: Offload) -> None:
        self.registry = registry
        self._offload = offload
        self.reader = Reader(registry, offload, settings.inline_bytes)
        self.keys = ClientKeys(registry)
        self.puts = ClientPuts(registry, settings, offload)
        self.entering = 0
        """Puts that wait for their turn of the loop, or were let in and have not gone on yet."""
        self._line = Line()
        """Puts that wait for a pool to be attached."""
        self.spills = SpillCounter(registry.bound_name, settings.log_interval)
        self.reconnector: Reconnector | None = None
        """Of a client that attaches anew when its owner is gone."""

    @classmethod
    async def open(
        cls,
        endpoint: str | None,
        device: torch.device | None,
        name: str | None,
        settings: Settings,
        *,
        reconnect: bool,
    ) -> "OpenClient":
        """Attach, if an endpoint was given."""
        offload = Offload()
        registry = ConnectionRegistry(name, device, settings, offload, endpoint)
        opened = cls(registry, settings, offload)
        try:
            if endpoint is not None and reconnect:
                interval_s = settings.reconnect_interval
                opened.reconnector = Reconnector(registry, endpoint, interval_s)
                await opened.reconnector.start()
            elif endpoint is not None:
                await registry.attach(endpoint)
        except BaseException:
            await opened.registry.close()
            await offload.drain()  # a slab that a thread was mapping is unmapped when it is mapped
            await opened.aclose()
            raise
        return opened

    async def enter(self, timeout_s: float | None) -> None:
        """Return at a put's turn; no later put overtakes it meanwhile. Raises PutTimeout if it is late."""
        if timeout_s is None:  # a scope takes as long as a third of a round trip
            await self._enter()
            return
        with at_most(give_up_at(timeout_s), UNENTERED):
            await self._enter()

    async def _enter(self) -> None:
        self.entering += 1
        try:
            await self.reader.turn.wait()
            if self._line.busy:
                await self._line.go(self.reader.turn.wait)
        finally:
            self.entering -= 1

    def writers_nowait(self, on_full: str, key: Any) -> Writers | None:  # noqa: ARG002 - see Engine
        """Return the writers of a put that does not spill, if the pool is attached and has one."""
        writer = self.puts.bound_writer()
        return None if writer is None or on_full not in ("wait", "raise") else Writers(writer)

    async def writers(self, on_full: str, key: Any, timeout_s: float | None) -> Writers:
        """Return the writers of the pools that a put may go to, attaching first, in the order of calls."""
        until_s = None if timeout_s is None else give_up_at(timeout_s)
        self.entering += 1
        try:
            with at_most(until_s, UNATTACHED):
                return await self._line.go(lambda: self.puts.writers(on_full, key))
        finally:
            self.entering -= 1

    async def discard(self, ref: FeatureRef) -> None:
        """Have the owner cancel the reads that a ref still owes."""
        turn = self.reader.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        if not self.registry.has(ref) and self.registry.is_far(ref):
            await self.registry.end_far(ref, "discard")
            return
        link = (await self.registry.connection(ref)).link
        await link.discard(ref.slot, ref.generation)

    def statistics(self, *, in_loop: bool) -> Statistics:  # noqa: ARG002 - see Engine
        """Return this client's counters, and the gauges of the pools that it has attached."""
        headers = [one.attachment.header for one in self.registry.connections]
        return Statistics(
            **gauges.of_headers(headers),
            sessions=len(headers),
            puts=self.puts.puts,
            spilled=self.spills.count,
            gets=self.reader.gets,
        )

    async def aclose(self) -> None:
        """Say goodbye to every owner."""
        try:
            if self.reconnector is not None:
                await self.reconnector.close()
            await self.registry.close()
            await self.registry.drain()
        finally:
            self._offload.close()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self.registry.forget()


class FeatureClient(CacheBase):
    """Reads other processes' pools, and puts into the one it is connected to. Made by `connect`.

    It belongs to the event loop that opens it, as a `FeatureCache` does.
    """

    def __init__(
        self,
        endpoint: str | None,
        device: torch.device | None,
        name: str | None,
        settings: Settings,
        *,
        reconnect: bool = False,
    ) -> None:
        self._life: Lifecycle[OpenClient] = Lifecycle("client", "connect")
        self._endpoint = endpoint
        self._device = self._place = device
        self._name = name
        self._settings = settings
        self._reconnect = reconnect

    async def open(self) -> Self:
        """Attach, if an endpoint was given.

        Raises:
            AttachRefused: the owner refused, or does not speak this protocol.
            OwnerUnreachable: (also AttachRefused and OwnerLost) nobody listens there, and it was made
                without ``reconnect=True``.
            CacheClosed: it was opened before, or is closed meanwhile; connect another.
            WrongLoop: no asyncio loop runs here (trio's does, perhaps).

        """
        await self._life.open(
            lambda: OpenClient.open(
                self._endpoint,
                self._device,
                self._name,
                self._settings,
                reconnect=self._reconnect,
            )
        )
        forks.watch(self)
        loop = asyncio.get_running_loop()
        weakref.finalize(self, _close_forgotten, self._life, loop, os.getpid()).atexit = False
        return self

    async def aclose(self) -> None:
        """Say goodbye to every owner. Borrows that are still open keep theirs until they end.

        Idempotent; an `open` in progress is cancelled and raises CacheClosed.
        """
        await super().aclose()

    @property
    def is_attached(self) -> bool:
        """Whether the pool at this client's endpoint is attached now. Safe in any thread."""
        client = self._life.engine
        return client is not None and client.registry.peek_bound() is not None

    async def wait_attached(self, *, timeout: float | None = None) -> None:
        """Return when the pool at this client's endpoint is attached.

        Args:
            timeout: seconds to wait; None waits without limit. Only a client with ``reconnect=True`` waits.

        Raises:
            OwnerUnreachable: (also OwnerLost) no owner came in time.
            OwnerLost: the owner is gone, and this client does not attach anew.
            CacheClosed: this client is closed, or meanwhile.
            SettingsError: it is connected to no endpoint.

        """
        timeout_s, client = parse_timeout(timeout), self._life.here()
        if client.reconnector is None:
            await client.registry.bound()
        else:
            await client.reconnector.wait(timeout_s)

    def _opened(self) -> OpenClient:
        client = self._life.engine
        if client is None:
            raise self._life.closed()
        return client

    def _endpoints(self) -> set[str]:
        """Return the endpoints of the owners that it is, or is to be, attached to."""
        client = self._life.engine
        found = set() if client is None else {c.link.endpoint for c in client.registry.connections}
        return found if self._endpoint is None else found | {self._endpoint}

    async def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: OnFull = "wait",
    ) -> FeatureRef:
        """Copy a feature into the slab of the pool that this client is connected to.

        The arguments, the errors and the promises are those of `FeatureCache.put`; `ttl` left out
        is as in this client's Settings. Waiting puts of all processes, the owner's too, stand in one
        queue. The copy is this process's own, on its torch stream. After the first few, puts of about one
        size wait for no answer: their room was given ahead, and the ref is good at once (a reader that is
        faster than the owner waits). Under a key a put takes one round trip: then every session finds it.
        Where this client's device can't access the slab, the feature goes into host memory, and the
        owner copies it from there.

        Raises besides:
            OwnerLost: the owner died or closed the pool.

        """
        timeout_s = None if timeout is None else parse_timeout(timeout)
        client = self._life.here()
        turn = client.reader.turn
        turn.left -= CALL_UNITS
        if turn.left < 0 or client.entering:
            writer = client.puts.bound_writer() if on_full == "wait" else None
            if writer is not None and writer.connection.attachment.mapping.deferred:
                # At the call: the feature is ready on the stream that is current now.
                staged_now = writer.stage(feature, readers, ttl, key)
                await client.enter(timeout_s)
                return await writer.put(staged_now, timeout_s, wait=True)
            await client.enter(timeout_s)
        if on_full == "wait" and (writer := client.puts.bound_writer()) is not None:
            return await writer.put(writer.stage(feature, readers, ttl, key), timeout_s, wait=True)
        staged = (await client.writers(on_full, key, timeout_s)).stage(feature, readers, ttl, key)
        return await staged.put(timeout_s, client.spills, wait=on_full != "raise")

    def __repr__(self) -> str:
        where = self._endpoint or "any endpoint"
        return f"<FeatureClient {self._name or 'unnamed'} of {where}>"


_closing: set[asyncio.Task[None]] = set()


def _close_forgotten(life: Lifecycle[Any], loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """Close the session of a client object that was collected: its loop still refers to the session."""

    def close() -> None:
        task = loop.create_task(life.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    if life.engine is not None and os.getpid() == pid:
        with contextlib.suppress(RuntimeError):  # the loop is closed: see PoolConnection.abandon
            loop.call_soon_threadsafe(close)


def connect(
    endpoint: str | None = None,
    *,
    device: Any = None,
    name: str | None = None,
    reconnect: bool = False,
    settings: Settings | None = None,
) -> FeatureClient:
    """Return a client to be opened with ``async with``.

    Args:
        endpoint: an owner's `FeatureCache.endpoint`; the client then reads that pool only, and can
            put into it and use its keys. None attaches to a pool when it first meets a ref of it.
        device: where `get` puts its copies, and the GPU that maps a slab on a GPU; None is the pool's
            own device where it is visible here, else torch's current one.
        name: the name by which puts may call for this session's reads; one session at a time has it.
        reconnect: whether the client outlives its owner. It then opens although nobody listens at
            `endpoint` yet; while no owner is there its calls raise OwnerLost at once, and it attaches the
            pool of the next owner that listens there, with back-off (`Settings.reconnect_interval`). Refs
            of a pool that is gone stay lost; pins went with it.
        settings: bounds and intervals; without it, the environment's ``FEATCACHE_…``.

    Raises:
        SettingsError: an argument is invalid.
        BackendUnavailable: the device is not there.

    """
    target = None if device is None else parse_device(device)
    path = None if endpoint is None else endpoints.check_endpoint(endpoint)
    if not isinstance(reconnect, bool):
        raise SettingsError(f"reconnect={reconnect!r} must be True or False")
    if reconnect and path is None:
        raise SettingsError("reconnect=True needs the endpoint to come back to")
    chosen = settings_with(settings)
    return FeatureClient(path, target, parse_name(name), chosen, reconnect=reconnect)
