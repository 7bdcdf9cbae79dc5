"""The handle cache: pools that a client has attached, each opened once however many ask at once."""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable

import torch

from featcache import events
from featcache._offload import Offload
from featcache.attachment import Attachment, Bell
from featcache.control.channel import close_all
from featcache.control.client import Link, dial
from featcache.control.messages import Welcome
from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    CacheClosed,
    OwnerLost,
    PoolFull,
    UnknownPool,
)
from featcache.memory import host
from featcache.memory.slab import Mapping
from featcache.memory.words import OwnerWords, SessionWords
from featcache.ref import FeatureRef
from featcache.settings import Settings

__all__ = ["Handle", "HandleCache"]

_CONTROL_DESCRIPTORS = 3  # the owner's words, the session's page, the eventfd


class Handle:
    """One attached pool: the mapped side and the link that keeps its session alive."""

    def __init__(self, attachment: Attachment, link: Link, bell: Bell, offload: Offload) -> None:
        self.attachment = attachment
        self.link = link
        self._bell = bell
        self._offload = offload

    async def close(self) -> None:
        """Say goodbye, once nothing is held any more; until then the session stays."""
        if self.attachment.holds:
            loop = asyncio.get_running_loop()
            self.attachment.refuse(CacheClosed("this client was closed"))
            self.attachment.when_idle(lambda: loop.call_soon_threadsafe(self._finish_late))
            return
        await self.link.goodbye()
        self._bell.close()
        mapping = self.attachment.mapping
        await self._offload.run(mapping.close, mapping.close)

    def lose(self, reason: str) -> None:
        """Refuse new reads; what is held stays mapped until it is let go."""
        self.attachment.refuse(OwnerLost(reason))
        self.attachment.when_idle(self._let_go)

    def _finish_late(self) -> None:
        self.link.say_goodbye()
        self._let_go()

    def _let_go(self) -> None:
        self._bell.close()
        # Unmapping a large slab takes milliseconds: not in the loop.
        self._offload.spawn(self.attachment.mapping.close)

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child."""
        self.link.forget()
        self.attachment.forget()
        self._bell.close()
        self.attachment.mapping.close()


class HandleCache:
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
        self._lost: str | None = None  # why the pool that this client is bound to is gone
        self._handles: OrderedDict[bytes, Handle] = OrderedDict()
        self._opening: dict[str, asyncio.Task[Handle]] = {}
        self._closed = False

    # --- reader.Pools ---------------------------------------------------------------------------

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return the attachment of the ref's pool if it is open."""
        handle = self._handles.get(ref.pool_id)
        if handle is not None:
            return handle.attachment
        if self._closed:
            raise CacheClosed("this client was closed, or is another process's")
        if self._bound is not None:
            if self._lost is not None:
                raise OwnerLost(self._lost)
            raise UnknownPool(
                f"the ref is of pool {ref.pool_id.hex()}, this client is connected to another"
            )
        return None

    def has(self, ref: FeatureRef) -> bool:
        """Whether the ref's pool is open now."""
        return ref.pool_id in self._handles

    async def open(self, ref: FeatureRef) -> Attachment:
        """Return the attachment of the ref's pool, attaching first. Single flight by endpoint."""
        return (await self.handle(ref)).attachment

    async def handle(self, ref: FeatureRef) -> Handle:
        """Return the handle of the ref's pool, attaching first."""
        if self.peek(ref) is not None:
            return self._handles[ref.pool_id]
        handle = await self.attach(ref.endpoint)
        if handle.attachment.pool_id != ref.pool_id:
            raise UnknownPool(f"{ref.endpoint} serves another pool now than {ref.pool_id.hex()}")
        return handle

    # --- attaching ------------------------------------------------------------------------------

    async def attach(self, endpoint: str) -> Handle:
        """Attach to the owner at `endpoint`, or join who is at it already."""
        for handle in self._handles.values():
            if handle.link.endpoint == endpoint:
                return handle
        task = self._opening.get(endpoint)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._attach(endpoint))
            self._opening[endpoint] = task
            task.add_done_callback(lambda done: self._opened(endpoint, done))
        # One that gives up must not take the others' attach with it.
        return await asyncio.shield(task)

    def _opened(self, endpoint: str, task: "asyncio.Task[Handle]") -> None:
        self._opening.pop(endpoint, None)
        if not task.cancelled():
            task.exception()  # seen: all who asked may have given up

    async def _attach(self, endpoint: str) -> Handle:
        await self._make_place()
        link, welcome, fds = await dial(
            endpoint, self._name, str(self._device or "default"), self._settings
        )
        try:
            handle = await self._map(link, welcome, fds)
        except BaseException:
            link.say_goodbye()
            raise
        finally:
            close_all(fds)
        if self._closed or link.lost is not None:
            await handle.close()
            del handle  # or the error's traceback would keep the words mapped as long as it lives
            raise CacheClosed("the client was closed") if self._closed else OwnerLost(link.lost)
        known = self._handles.get(welcome.pool_id)
        if known is not None:  # reached by another spelling of its endpoint
            await handle.close()
            return known
        self._handles[welcome.pool_id] = handle
        link.on_lost = lambda reason: self._on_lost(welcome.pool_id, reason)
        return handle

    async def _map(self, link: Link, welcome: Welcome, fds: list[int]) -> Handle:
        """Map what the owner sent. Takes from `fds` what it keeps."""
        if len(fds) < _CONTROL_DESCRIPTORS:
            raise AttachRefused("the owner's welcome came without its descriptors")
        words = OwnerWords.attach(fds[0], welcome.slots)
        page = SessionWords.attach(fds[1], welcome.slots)
        slab_fds = fds[_CONTROL_DESCRIPTORS:]
        mapping = await self._offload.run(_mapper(welcome, slab_fds), lambda: None)
        bell = Bell(fds.pop(2))
        attachment = Attachment(welcome.pool_id, words, page, mapping, bell.ring)
        return Handle(attachment, link, bell, self._offload)

    async def _make_place(self) -> None:
        """Close the longest attached pool that nobody reads, when the bound is reached."""
        if len(self._handles) + len(self._opening) <= self._settings.attachments:
            return
        for pool_id, handle in self._handles.items():
            if not handle.attachment.holds:
                del self._handles[pool_id]
                await handle.close()
                return
        raise PoolFull(
            f"all {self._settings.attachments} attached pools are being read: raise "
            "Settings.attachments"
        )

    def _on_lost(self, pool_id: bytes, reason: str) -> None:
        handle = self._handles.pop(pool_id, None)
        if handle is None:
            return
        lost = handle.link.lost or reason
        if self._bound is not None:
            self._lost = lost
        handle.lose(lost)
        events.emit(
            events.OwnerGone(pool=pool_id.hex(), endpoint=handle.link.endpoint, reason=reason)
        )

    # --- the whole ------------------------------------------------------------------------------

    @property
    def handles(self) -> list[Handle]:
        """The handles that are open now."""
        return list(self._handles.values())

    async def close(self) -> None:
        """Say goodbye to every owner."""
        self._closed = True
        for task in list(self._opening.values()):
            task.cancel()
        handles = self.handles
        self._handles.clear()
        for handle in handles:
            await handle.close()

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self._closed = True
        for handle in self.handles:
            handle.forget()
        self._handles.clear()


def _mapper(welcome: Welcome, fds: list[int]) -> Callable[[], Mapping]:
    if welcome.kind != host.KIND:
        raise BackendUnavailable(f"this client can't map a slab of kind {welcome.kind!r}")
    if len(fds) != 1:
        raise AttachRefused("a host slab comes with one descriptor")
    fd = os.dup(fds[0])  # the thread's own: a cancelled attach closes the others while it maps

    def work() -> Mapping:
        try:
            return host.HostMapping.attach(fd, welcome.capacity_bytes, welcome.committed_bytes)
        finally:
            os.close(fd)

    return work
