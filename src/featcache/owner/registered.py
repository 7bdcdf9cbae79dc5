"""A slab's memory as other hosts may read it: registered as it is committed, deregistered before it goes."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from featcache.errors import BackendUnavailable, FeatcacheError
from featcache.memory.slab import Slab
from featcache.pool.pool import Pool
from featcache.reach.plane import HOST, DataPlane, Memory, Registrations
from featcache.ref import TensorSpec


def memory_of(slab: Slab) -> Memory:
    """Return where a slab lies, as its data plane is told."""
    return HOST if slab.ordinal < 0 else Memory("VRAM", slab.ordinal)


class RegisteredSlab:
    """The slab of one pool, registered with a data plane. `pool.growth` tells it of each change."""

    def __init__(self, pool: Pool, plane: DataPlane) -> None:
        self.plane = plane
        self.memory = memory_of(pool.slab)
        self.epoch = 1
        """Counts the changes of what is registered."""
        self._pool = pool
        self._base = pool.slab.view(0, TensorSpec(None, "uint8", (1,), 0)).data_ptr()
        self._registered = Registrations(pool.store.limits.segment_bytes)
        self._changes: set[asyncio.Task[None]] = set()
        self._last: asyncio.Task[None] | None = None
        self._metadata: tuple[int, bytes] = 0, b""
        self._failed: str | None = None

    async def open(self) -> None:
        """Register what is committed, and follow the slab's size from now on.

        Raises:
            BackendUnavailable: the data plane refuses.

        """
        # Followed first: a segment that is committed meanwhile is in its turn.
        self._pool.growth.follower = self
        self.committed(0, self._pool.store.committed_bytes)
        await self.settled()

    def committed(self, start_bytes: int, end_bytes: int) -> None:
        """Register a range that was committed: the segments that it has now, else cut at their size."""
        segments = self._pool.slab.segments(start_bytes, end_bytes)
        # On a GPU no registration may reach from one piece of its memory into the next.
        parts = [(one.start_bytes, one.start_bytes + one.size_bytes) for one in segments]
        self._change(self._register(parts or self._registered.cut(start_bytes, end_bytes)))

    async def returning(self, end_bytes: int) -> None:
        """Deregister all from an offset on; then it may be given back."""
        await asyncio.shield(self._change(self._deregister(end_bytes)))

    async def settled(self) -> None:
        """Return once all changes are made; raise BackendUnavailable if one was refused."""
        while self._last is not None and not self._last.done():
            await asyncio.wait([self._last])
        if self._failed is not None:
            raise BackendUnavailable(f"memory can't be registered: {self._failed}")

    def pieces(self, offset_bytes: int, nbytes: int) -> list[int]:
        """Return the sizes of an extent's parts, each in one registration."""
        found = self._registered.pieces(offset_bytes, nbytes)
        if found is None:
            raise BackendUnavailable("this part of the slab is not registered with the data plane")
        return found

    def address_of(self, offset_bytes: int) -> int:
        """Return the address of an offset in this process."""
        return self._base + offset_bytes

    async def metadata(self) -> tuple[int, bytes]:
        """Return the epoch, and what a peer needs to read what is registered in it."""
        epoch = self.epoch
        if self._metadata[0] != epoch:
            self._metadata = epoch, await self.plane.metadata()
        return self._metadata

    def _change(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Make changes in the order in which they are told."""
        task = asyncio.get_running_loop().create_task(self._in_turn(self._last, work))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        self._last = task
        return task

    async def _in_turn(
        self, before: "asyncio.Task[None] | None", work: Coroutine[Any, Any, None]
    ) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])
        finally:
            try:
                await work
            except FeatcacheError as error:
                self._failed = str(error)

    async def _register(self, parts: list[tuple[int, int]]) -> None:
        for part in parts:
            await self.plane.register(self._base + part[0], part[1] - part[0])
            # In this order: it is told to peers with an epoch that has it.
            self._registered.add(part)
            self.epoch += 1

    async def _deregister(self, end_bytes: int) -> None:
        for start, _ in self._registered.remove(end_bytes):
            self.epoch += 1
            await self.plane.deregister(self._base + start)

    async def drain(self) -> None:
        """Return when no change is in progress, before the plane is closed."""
        self._pool.growth.follower = None
        if self._changes:
            await asyncio.wait(list(self._changes))
