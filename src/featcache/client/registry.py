"""The pools that a client has attached, each attached with single-flight."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import torch

from featcache import events
from featcache.client.connection import PoolConnection, abandon_the_loopless, return_unclaimed
from featcache.client.far import FarPools
from featcache.client.mapping import map_pool
from featcache.control import messages
from featcache.control.descriptors import close_all
from featcache.control.link import Link, dial
from featcache.control.messages import Welcome
from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    CacheClosed,
    FeatcacheError,
    OwnerLost,
    PoolFull,
    SettingsError,
    UnknownPool,
    system_errors,
)
from featcache.memory.slab import Unreachable
from featcache.memory.unreachable import UnreachableSlab
from featcache.ref import FeatureRef, path_of
from featcache.session.attachment import Attachment
from featcache.session.offload import Offload, SharedTask
from featcache.settings import Settings

_MAX_LOST = 1024
"""Pools remembered as lost."""


class ConnectionRegistry(FarPools):
    """Connections by pool. A client bound to one endpoint has that pool's, and its spill pool's, only."""

    def __init__(
        self,
        name: str | None,
        device: torch.device | None,
        settings: Settings,
        offload: Offload,
        bound: str | None,
    ) -> None:
        self._name = name
        self._device = device
        self._settings = settings
        self._offload = offload
        self._bound = bound
        self.bound_pool = b""
        """The id of the pool at this client's endpoint; empty before it is attached."""
        self._lost: str | None = None  # why the pool that this client is bound to is gone
        self._lost_pools: dict[bytes, str] = {}  # and others, of a client that is bound to none
        self._connections: OrderedDict[bytes, PoolConnection] = OrderedDict()
        self.by_pool = self._connections
        """The open connections by the ids of their pools; for a hot path to look into."""
        self._opening: dict[str, SharedTask[PoolConnection]] = {}
        self._siblings: set[bytes] = set()  # host pools beside those of other connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreachable: set[tuple[bytes, torch.device]] = set()
        self._closed = False
        self.on_gone: list[Callable[[bytes], object]] = []
        """Told the id of a pool whose owner is gone."""

    # --- reader.Pools ---------------------------------------------------------------------------

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return the attachment of the ref's pool if it is open."""
        try:
            return self._connections[ref.pool_id].attachment
        except KeyError:
            pass  # the reason is found below
        if self._closed:
            raise CacheClosed("this client was closed, or is another process's")
        if not (self._bound is None or ref.pool_id in self._siblings or self.is_far(ref)):
            self.check_not_lost()
            self.check(ref)  # of an owner before this one
            raise UnknownPool(
                f"the ref is of pool {ref.pool_id.hex()}, this client is connected to another"
            )
        return None

    def has(self, ref: FeatureRef) -> bool:
        """Whether the ref's pool is open now."""
        return ref.pool_id in self._connections

    def check(self, ref: FeatureRef) -> None:
        """Raise OwnerLost for a pool that was attached, and whose owner is gone."""
        lost = self._lost_pools.get(ref.pool_id)  # one look: this runs in any thread
        if lost is not None:
            raise OwnerLost(lost)

    async def open(self, ref: FeatureRef) -> Attachment:
        """Return the attachment of the ref's pool, attaching first. Single flight by endpoint."""
        return (await self.connection(ref)).attachment

    async def connection(self, ref: FeatureRef) -> PoolConnection:
        """Return the connection of the ref's pool, attaching first."""
        if self.peek(ref) is not None:
            return self._connections[ref.pool_id]
        connection = await self.attach(path_of(ref.endpoint), sibling=ref.pool_id in self._siblings)
        if connection.attachment.pool_id != ref.pool_id:
            raise UnknownPool(f"{ref.endpoint} serves another pool now than {ref.pool_id.hex()}")
        return connection

    def is_open(self, connection: PoolConnection) -> bool:
        """Whether this is the connection of its pool now."""
        return self._connections.get(connection.attachment.pool_id) is connection

    def bound_name(self) -> str:
        """Return the id in hex of the pool that this client is connected to, as events name it."""
        return self.bound_pool.hex()

    def peek_bound(self) -> PoolConnection | None:
        """Return the connection of the pool that this client is connected to, if it is open."""
        return self._connections.get(self.bound_pool)

    def check_not_lost(self) -> None:
        """Raise OwnerLost while the pool that this client is connected to is gone."""
        if self._lost is not None:
            raise OwnerLost(self._lost)

    def bound_now(self) -> PoolConnection:
        """Return the connection of the pool that this client is connected to, in any thread.

        Raises:
            OwnerLost: it is gone; UnknownPool: it is not attached yet.
            CacheClosed, SettingsError: as `bound`.

        """
        connection = self._connections.get(self.bound_pool)
        if connection is not None:
            return connection
        self._check_bound()
        raise UnknownPool(
            "this pool is not attached yet: await a call of it first, or connect to it"
        )

    def _check_bound(self) -> str:
        """Return the endpoint that this client is connected to."""
        if self._closed:
            raise CacheClosed("this client was closed, or is another process's")
        if self._bound is None:
            raise SettingsError("keys and puts need a client that is connected: connect(endpoint)")
        self.check_not_lost()
        return self._bound

    async def bound(self) -> PoolConnection:
        """Return the connection of the pool that this client is connected to.

        Raises:
            OwnerLost: it is gone.
            SettingsError: the client is connected to none.

        """
        return await self.attach(self._check_bound())

    async def reach(self, attachment: Attachment, device: torch.device | None) -> bool:
        """Open a pool for another device of this process; False, said once, where that can't be."""
        mapping = attachment.mapping
        if device is None or isinstance(mapping, UnreachableSlab):
            return False
        try:
            await self._offload.run(lambda: mapping.enable_device(device))
        except Unreachable as error:
            if (attachment.pool_id, device) not in self._unreachable:
                self._unreachable.add((attachment.pool_id, device))
                self._report_unreachable(attachment.pool_id, device, str(error))
            return False
        return True

    def _report_unreachable(self, pool_id: bytes, device: torch.device, reason: str) -> None:
        events.emit(events.PeerUnreachable(pool=pool_id.hex(), device=str(device), reason=reason))

    async def relay(self, ref: FeatureRef) -> FeatureRef:
        """Have the owner copy a held ref into host memory."""
        link = (await self.connection(ref)).link
        there = FeatureRef.from_bytes(await link.relay(ref.to_bytes()))
        self._siblings.add(there.pool_id)
        return there

    def pay_copy(self, copied: FeatureRef) -> None:
        """Pay a relay's copy that nobody is going to get; where its pool can't be attached it expires."""
        connection = self._connections.get(copied.pool_id)
        if connection is not None:
            with contextlib.suppress(FeatcacheError):
                connection.attachment.pay(copied)
        elif not self._closed:
            self._spawn(self._attach_and_pay(copied))

    async def _attach_and_pay(self, copied: FeatureRef) -> None:
        with contextlib.suppress(FeatcacheError):
            host_pool = await self.attach(path_of(copied.endpoint), sibling=True)
            if host_pool.attachment.pool_id == copied.pool_id:
                host_pool.attachment.pay(copied)

    def _return_unclaimed(
        self, connection: PoolConnection, request: messages.Request, answer: messages.Answer
    ) -> None:
        if isinstance(request, messages.Relay) and isinstance(answer, messages.Reply):
            self.pay_copy(FeatureRef.from_bytes(answer.ref))
        else:
            return_unclaimed(connection, request, answer)

    # --- attaching ------------------------------------------------------------------------------

    async def attach(self, endpoint: str, *, sibling: bool = False) -> PoolConnection:
        """Attach to the owner at `endpoint`, or join the attach in progress.

        The host pool beside another is its `sibling`.
        """
        for connection in self._connections.values():
            if connection.link.endpoint == endpoint:
                return connection
        opening = self._opening.get(endpoint)
        if opening is None:
            opening = SharedTask(lambda: self._attach(endpoint, sibling=sibling))
            self._opening[endpoint] = opening
        try:
            return await opening.join()
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._closed and not (caller and caller.cancelling()):
                raise CacheClosed("the client was closed") from None
            raise

    async def _attach(self, endpoint: str, *, sibling: bool) -> PoolConnection:
        try:
            with system_errors(BackendUnavailable, f"can't map the pool at {endpoint}"):
                return await self._attach_once(endpoint, sibling=sibling)
        finally:
            self._opening.pop(endpoint, None)

    async def _attach_once(self, endpoint: str, *, sibling: bool) -> PoolConnection:
        await self._make_place(sibling=sibling)
        abandon_the_loopless()
        link, welcome, fds = await dial(
            endpoint, self._name, str(self._device or "default"), self._settings
        )
        try:
            connection = await self._connect(link, welcome, fds)
        except BaseException:
            link.say_goodbye()
            raise
        finally:
            close_all(fds)
        if self._closed or link.lost is not None:
            await connection.close()
            # Or the error's traceback would keep the words mapped for as long as it lives.
            del connection
            raise CacheClosed("the client was closed") if self._closed else OwnerLost(link.lost)
        known = self._connections.get(welcome.pool_id)
        if known is not None:  # reached by another spelling of its endpoint
            await connection.close()
            return known
        if welcome.sibling_pool is not None:
            self._siblings.add(welcome.sibling_pool)
        if sibling:
            self._siblings.add(welcome.pool_id)
        self._connections[welcome.pool_id] = connection
        self._lost_pools.pop(welcome.pool_id, None)
        if endpoint == self._bound:
            self.bound_pool, self._lost = welcome.pool_id, None
        link.on_lost = lambda reason: self._on_lost(welcome.pool_id, reason)
        return connection

    async def _connect(self, link: Link, welcome: Welcome, fds: list[int]) -> PoolConnection:
        """Map the pool that the owner described. Takes from `fds` those that it keeps."""
        attachment, hits, doorbell, unreachable = await map_pool(
            welcome, fds, self._device, self._offload, through_host=self._settings.through_host
        )
        device, report = attachment.mapping.device, self._report_unreachable
        # A reader on the CPU has chosen to be; only a GPU's way through the host is worth a warning.
        if unreachable is not None and (device.type != "cpu" or self._settings.through_host):
            report(welcome.pool_id, device, unreachable)
        connection = PoolConnection(
            attachment,
            hits,
            link,
            welcome.endpoint or link.endpoint,
            doorbell,
            self._offload,
            self._spawn,
            lambda reason: report(welcome.pool_id, attachment.mapping.device, reason),
        )
        connection.learn(welcome)
        link.requests.on_orphan = lambda request, answer: self._return_unclaimed(
            connection, request, answer
        )
        link.on_lost = lambda _: connection.lose(link.lost or "it is gone")
        try:
            if link.lost is not None:  # while a thread mapped
                raise OwnerLost(link.lost)
            with anyio.fail_after(self._settings.attach_timeout):
                await connection.wait_mapped(welcome.committed_bytes)
        except BaseException as error:
            connection.lose(link.lost or "it could not be attached")
            if isinstance(error, TimeoutError):
                raise AttachRefused("the owner's segments did not come in time") from None
            raise
        finally:
            link.on_lost = None  # the caller, which keeps the connection, sets its own
        return connection

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Return when all work in the background is done."""
        await asyncio.sleep(0)  # work that another thread has just scheduled begins
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # Python 3.12 does not wait for tasks that are done, and they leave the set in a turn.
            await asyncio.sleep(0)

    async def _make_place(self, *, sibling: bool) -> None:
        """Close the longest attached pool that nobody reads, when the bound is reached.

        Host pools beside others are counted apart: a read staged through one holds both.
        """
        alike = [pool_id for pool_id in self._connections if (pool_id in self._siblings) is sibling]
        if len(alike) + len(self._opening) <= self._settings.attachments:
            return
        for pool_id in alike:
            connection = self._connections[pool_id]
            if not connection.attachment.holds:
                del self._connections[pool_id]
                await connection.close()
                return
        raise PoolFull(
            f"all {self._settings.attachments} attached pools are being read: raise "
            "Settings.attachments"
        )

    def lose_bound(self, reason: str) -> None:
        """Refuse what needs the pool that this client is bound to, until it is attached again."""
        self._lost = reason
        if self.peek_bound() is None:  # the host pools beside it went with it
            self._siblings.clear()
            self._unreachable.clear()

    def _on_lost(self, pool_id: bytes, reason: str) -> None:
        connection = self._connections.pop(pool_id, None)
        if connection is None:
            return
        lost = connection.link.lost or reason
        if pool_id == self.bound_pool:  # not one beside it, which is attached anew
            self.lose_bound(lost)
        if len(self._lost_pools) >= _MAX_LOST:
            self._lost_pools.clear()
        self._lost_pools[pool_id] = lost
        connection.lose(lost)
        for told in self.on_gone:
            told(pool_id)
        events.emit(
            events.OwnerGone(pool=pool_id.hex(), endpoint=connection.link.endpoint, reason=reason)
        )

    # --- the whole ------------------------------------------------------------------------------

    @property
    def connections(self) -> list[PoolConnection]:
        """The connections that are open now."""
        return list(self._connections.values())

    async def close(self) -> None:
        """Say goodbye to every owner."""
        self._closed = True
        for opening in list(self._opening.values()):
            if opening.task is not None:
                opening.task.cancel()
        connections = self.connections
        self._connections.clear()
        # At once, and each whatever becomes of the others: an owner that stands still takes a second.
        ends = await asyncio.gather(
            *(connection.close() for connection in connections), return_exceptions=True
        )
        self.on_gone.clear()  # it refers to the client's puts, which refer to this: no cycle is left
        for end in ends:
            if end is not None:
                raise end

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self._closed = True
        for connection in self.connections:
            connection.forget()
        self._connections.clear()
