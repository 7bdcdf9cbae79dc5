"""The handle cache: pools that a client has attached, each opened once however many ask at once."""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import anyio
import torch

from featcache import events
from featcache.client.connection import PoolConnection, return_lease
from featcache.control.channel import close_all
from featcache.control.link import Link, dial
from featcache.control.messages import Welcome
from featcache.errors import (
    AttachRefused,
    CacheClosed,
    OwnerLost,
    PoolFull,
    SettingsError,
    UnknownPool,
)
from featcache.memory.backends import map_slab
from featcache.memory.devices import default_device
from featcache.memory.slab import Mapping, Unreachable
from featcache.memory.unreachable import UnreachableSlab
from featcache.memory.words import OwnerWords, SessionWords
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.holds import PageWords
from featcache.session.offload import Offload
from featcache.session.waiting import Doorbell
from featcache.settings import Settings


class Mapped(NamedTuple):
    """A slab as it could be mapped."""

    mapping: Mapping
    adopted: PageWords
    why_not: str | None
    """Why it could not be, and is read through the host."""


_MAX_LOST = 1024  # pools of which is known that they are gone
_CONTROL_DESCRIPTORS = 3  # the owner's words, the session's page, the eventfd


class ConnectionRegistry:
    """Handles by pool. A client bound to one endpoint has that pool's handle only."""

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
        """The pool that was found where this client is connected to, or nothing yet."""
        self._lost: str | None = None  # why the pool that this client is bound to is gone
        self._lost_pools: dict[bytes, str] = {}  # and others, of a client that is bound to none
        self._connections: OrderedDict[bytes, PoolConnection] = OrderedDict()
        self._opening: dict[str, asyncio.Task[PoolConnection]] = {}
        self._kin: set[bytes] = set()  # pools that the owner of the one bound to spills to
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreachable: set[tuple[bytes, torch.device]] = set()
        self._closed = False
        self.on_gone: Callable[[bytes], object] | None = None
        """Told the id of a pool whose owner is gone."""

    # --- reader.Pools ---------------------------------------------------------------------------

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return the attachment of the ref's pool if it is open."""
        try:
            return self._connections[ref.pool_id].attachment
        except KeyError:
            pass  # looked at more closely below
        if self._closed:
            raise CacheClosed("this client was closed, or is another process's")
        if self._bound is not None and ref.pool_id not in self._kin:
            if self._lost is not None:
                raise OwnerLost(self._lost)
            raise UnknownPool(
                f"the ref is of pool {ref.pool_id.hex()}, this client is connected to another"
            )
        return None

    def has(self, ref: FeatureRef) -> bool:
        """Whether the ref's pool is open now."""
        return ref.pool_id in self._connections

    def check(self, ref: FeatureRef) -> None:
        """Raise OwnerLost for a pool that was attached, and whose owner is gone."""
        lost = self._lost_pools.get(ref.pool_id)  # one look: this is asked in any thread
        if lost is not None:
            raise OwnerLost(lost)

    async def open(self, ref: FeatureRef) -> Attachment:
        """Return the attachment of the ref's pool, attaching first. Single flight by endpoint."""
        return (await self.connection(ref)).attachment

    async def connection(self, ref: FeatureRef) -> PoolConnection:
        """Return the handle of the ref's pool, attaching first."""
        if self.peek(ref) is not None:
            return self._connections[ref.pool_id]
        connection = await self.attach(ref.endpoint, kin=ref.pool_id in self._kin)
        if connection.attachment.pool_id != ref.pool_id:
            raise UnknownPool(f"{ref.endpoint} serves another pool now than {ref.pool_id.hex()}")
        return connection

    def peek_bound(self) -> PoolConnection | None:
        """Return the handle of the pool that this client is connected to, if it is open."""
        return self._connections.get(self.bound_pool)

    async def bound_handle(self) -> PoolConnection:
        """Return the handle of the pool that this client is connected to.

        Raises:
            OwnerLost: it is gone.
            SettingsError: the client is connected to none.

        """
        if self._closed:
            raise CacheClosed("this client was closed, or is another process's")
        if self._bound is None:
            raise SettingsError("keys and puts need a client that is connected: connect(endpoint)")
        if self._lost is not None:
            raise OwnerLost(self._lost)
        return await self.attach(self._bound)

    async def reach(self, attachment: Attachment, device: torch.device | None) -> bool:
        """Open a pool for another device of this process; False, said once, where that can't be."""
        mapping = attachment.mapping
        if device is None or isinstance(mapping, UnreachableSlab):
            return False
        try:
            await self._offload.run(lambda: mapping.enable_device(device), lambda: None)
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
        self._kin.add(there.pool_id)
        return there

    # --- attaching ------------------------------------------------------------------------------

    async def attach(self, endpoint: str, *, kin: bool = False) -> PoolConnection:
        """Attach to the owner at `endpoint`, or join who is at it already.

        The host pool beside another is its `kin`.
        """
        for connection in self._connections.values():
            if connection.link.endpoint == endpoint:
                return connection
        task = self._opening.get(endpoint)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._attach(endpoint, kin=kin))
            self._opening[endpoint] = task
            task.add_done_callback(lambda done: self._opened(endpoint, done))
        try:
            # One that gives up must not take the others' attach with it.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if task.cancelled() and self._closed and not (asker and asker.cancelling()):
                raise CacheClosed("the client was closed") from None
            raise

    def _opened(self, endpoint: str, task: "asyncio.Task[PoolConnection]") -> None:
        self._opening.pop(endpoint, None)
        if not task.cancelled():
            task.exception()  # seen: all who asked may have given up

    async def _attach(self, endpoint: str, *, kin: bool) -> PoolConnection:
        await self._make_place(kin=kin)
        link, welcome, fds = await dial(
            endpoint, self._name, str(self._device or "default"), self._settings
        )
        try:
            connection = await self._map(link, welcome, fds)
        except BaseException:
            link.say_goodbye()
            raise
        finally:
            close_all(fds)
        if self._closed or link.lost is not None:
            await connection.close()
            del (
                connection
            )  # or the error's traceback would keep the words mapped as long as it lives
            raise CacheClosed("the client was closed") if self._closed else OwnerLost(link.lost)
        known = self._connections.get(welcome.pool_id)
        if known is not None:  # reached by another spelling of its endpoint
            await connection.close()
            return known
        if welcome.kin is not None:
            self._kin.add(welcome.kin)
        if kin:
            self._kin.add(welcome.pool_id)
        self._connections[welcome.pool_id] = connection
        self._lost_pools.pop(welcome.pool_id, None)
        if endpoint == self._bound:
            self.bound_pool = welcome.pool_id
        link.on_lost = lambda reason: self._on_lost(welcome.pool_id, reason)
        return connection

    async def _map(self, link: Link, welcome: Welcome, fds: list[int]) -> PoolConnection:
        """Map what the owner sent. Takes from `fds` what it keeps."""
        if len(fds) < _CONTROL_DESCRIPTORS:
            raise AttachRefused("the owner's welcome came without its descriptors")
        words = OwnerWords.attach(fds[0], welcome.slots)
        page = SessionWords.attach(fds[1], welcome.slots, welcome.grants)
        mapping, adopted = await self._map_slab(welcome, fds[_CONTROL_DESCRIPTORS:], page)
        doorbell = Doorbell(fds.pop(2))
        attachment = Attachment(welcome.pool_id, words, page, mapping, adopted, doorbell.ring)
        attachment.layout = welcome.layout
        attachment.capacity_bytes = welcome.capacity_bytes
        connection = PoolConnection(
            attachment,
            link,
            welcome.endpoint or link.endpoint,
            doorbell,
            self._offload,
            self._spawn,
            lambda reason: self._report_unreachable(
                welcome.pool_id, attachment.mapping.device, reason
            ),
        )
        connection.kin_endpoint = welcome.kin_endpoint
        link.on_orphan = lambda request, answer: return_lease(connection, request, answer)
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
            link.on_lost = None  # whoever keeps the handle says what is to be done
        return connection

    async def _map_slab(
        self, welcome: Welcome, fds: list[int], page: SessionWords
    ) -> tuple[Mapping, PageWords]:
        box: list[Mapped] = []
        work = _mapper(welcome, fds, self._device, page, through_host=self._settings.through_host)

        def late() -> None:
            for mapped in box:
                self._offload.spawn(mapped.mapping.close)

        await self._offload.run(lambda: box.append(work()), late)
        mapping, adopted, why_not = box[0]
        # Who reads on the CPU has chosen to; only a GPU's detour is worth a warning.
        if why_not is not None and (mapping.device.type != "cpu" or self._settings.through_host):
            self._report_unreachable(welcome.pool_id, mapping.device, why_not)
        return mapping, adopted

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Return when what was begun in the background is done."""
        await asyncio.sleep(0)  # what another thread has just asked for begins
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # Python 3.12 does not wait for tasks that are done, and they leave the set in a turn.
            await asyncio.sleep(0)

    async def _make_place(self, *, kin: bool) -> None:
        """Close the longest attached pool that nobody reads, when the bound is reached.

        Host pools beside others are counted apart: a read by way of one holds both.
        """
        alike = [pool_id for pool_id in self._connections if (pool_id in self._kin) is kin]
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

    def _on_lost(self, pool_id: bytes, reason: str) -> None:
        connection = self._connections.pop(pool_id, None)
        if connection is None:
            return
        lost = connection.link.lost or reason
        if self._bound is not None:
            self._lost = lost
        if len(self._lost_pools) >= _MAX_LOST:
            self._lost_pools.clear()
        self._lost_pools[pool_id] = lost
        connection.lose(lost)
        if self.on_gone is not None:
            self.on_gone(pool_id)
        events.emit(
            events.OwnerGone(pool=pool_id.hex(), endpoint=connection.link.endpoint, reason=reason)
        )

    # --- the whole ------------------------------------------------------------------------------

    @property
    def connections(self) -> list[PoolConnection]:
        """The handles that are open now."""
        return list(self._connections.values())

    async def close(self) -> None:
        """Say goodbye to every owner."""
        self._closed = True
        for task in list(self._opening.values()):
            task.cancel()
        registry = self.connections
        self._connections.clear()
        for connection in registry:
            await connection.close()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self._closed = True
        for connection in self.connections:
            connection.forget()
        self._connections.clear()


def _mapper(
    welcome: Welcome,
    fds: list[int],
    device: torch.device | None,
    page: SessionWords,
    *,
    through_host: bool,
) -> Callable[[], Mapped]:
    """Return what maps a slab, and readies the page for its streams, in a thread."""
    own = [os.dup(fd) for fd in fds]  # the thread's: a cancelled attach closes the others meanwhile

    def mapped() -> tuple[Mapping, str | None]:
        try:
            if through_host and welcome.relays:
                raise Unreachable("Settings.through_host asks for it")
            return map_slab(
                welcome.kind,
                welcome.device,
                welcome.capacity_bytes,
                welcome.committed_bytes,
                welcome.handle,
                own,
                device,
            ), None
        except Unreachable as error:
            if not welcome.relays:
                raise
            return UnreachableSlab(device or default_device(), str(error)), str(error)
        finally:
            close_all(own)

    def work() -> Mapped:
        mapping, why_not = mapped()
        try:
            return Mapped(mapping, PageWords.adopted(mapping, page), why_not)
        except BaseException:
            mapping.close()
            raise

    return work
