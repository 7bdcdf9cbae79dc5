"""A slab that grows and shrinks: segments made in a thread, announced to sessions, and given back."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from featcache import events
from featcache.control.server import Server
from featcache.core.effects import Effect
from featcache.core.store import Store
from featcache.errors import BackendUnavailable
from featcache.memory.slab import Slab
from featcache.memory.words import Header
from featcache.session.offload import Offload
from featcache.settings import Settings


class Follower(Protocol):
    """Told of the memory that is committed, and of that which is to be given back, before it is."""

    def committed(self, start_bytes: int, end_bytes: int) -> None: ...

    async def returning(self, end_bytes: int) -> None: ...


class Growth:
    """Carries out one store's decisions on its slab's size."""

    def __init__(
        self,
        pool_name: str,
        slab: Slab,
        store: Store,
        header: memoryview,
        settings: Settings,
        offload: Offload,
        apply: Callable[[Sequence[Effect]], None],
    ) -> None:
        """`header` is of the owner's words; `apply` carries out the store's effects."""
        self._pool_name = pool_name
        self._slab = slab
        self._store = store
        self._header = header
        self._settings = settings
        self._offload = offload
        self._apply = apply
        self._tasks: set[asyncio.Task[None]] = set()
        self.server: Server | None = None
        """Tells the sessions of the slab's size."""
        self.follower: Follower | None = None
        self.closed = False
        self.in_progress: asyncio.Task[None] | None = None
        """A growth, until it is done."""
        self.refused = ""
        """Why the slab could not grow when it was to last; empty if it could."""

    def grow(self, end_bytes: int) -> None:
        """Commit memory up to `end_bytes`, in a thread."""
        self.in_progress = self._spawn(self._grow(end_bytes))

    def shrink(self, end_bytes: int, old_end_bytes: int) -> None:
        """Give the memory from `end_bytes` on back, in a thread."""
        self._spawn(self._shrink(end_bytes, old_end_bytes))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _grow(self, end_bytes: int) -> None:
        start_bytes, slab = self._store.committed_bytes, self._slab
        prefault = self._settings.prefault
        try:
            try:
                await self._offload.run(
                    lambda: slab.commit(start_bytes, end_bytes, prefault=prefault)
                )
            finally:
                # In the step that gives the memory out, and before it, since that may begin the next
                # growth: who met one that is done would await it without ever letting the loop turn.
                self.in_progress = None
        except Exception as error:
            self.grow_failed(end_bytes - start_bytes, error)
            if not isinstance(error, MemoryError | OSError | BackendUnavailable):
                raise  # a bug in featcache, which must not be the end of growth
        else:
            self.grown(end_bytes)

    def grown(self, end_bytes: int) -> None:
        """Give out the memory that was committed up to `end_bytes`."""
        if self.closed:
            return
        self.refused = ""
        start_bytes = self._store.committed_bytes
        added_bytes = end_bytes - start_bytes
        self._header[Header.COMMITTED] = end_bytes
        if self.follower is not None:
            self.follower.committed(start_bytes, end_bytes)
        segments = self._slab.segments(start_bytes, end_bytes)
        if segments and self.server is not None:
            self.server.announce(segments)  # before the store can give out a ref that lies there
        self._apply(self._store.grown(end_bytes, time.monotonic()))
        events.emit(
            events.SegmentsCommitted(
                pool=self._pool_name, committed_bytes=end_bytes, added_bytes=added_bytes
            )
        )

    def grow_failed(self, wanted_bytes: int, error: Exception) -> None:
        """Go on at the present size; waiting puts go on waiting."""
        self.refused = str(error)
        self._store.size.grow_failed(time.monotonic())
        events.emit(
            events.CommitFailed(
                pool=self._pool_name,
                committed_bytes=self._store.committed_bytes,
                wanted_bytes=wanted_bytes,
                error=str(error),
            )
        )

    async def _shrink(self, end_bytes: int, old_end_bytes: int) -> None:
        slab, timeout_s = self._slab, self._settings.attach_timeout
        retiring: Coroutine[Any, Any, int] | None = None
        if self.server is not None and slab.segments(end_bytes, old_end_bytes):
            # Before anything can be put where readers have the old segments mapped.
            epoch = self._header[Header.SHRINK_EPOCH] = self._header[Header.SHRINK_EPOCH] + 1
            retiring = self.server.retire(epoch, end_bytes, timeout_s)
        try:
            if self.follower is not None:
                await self.follower.returning(end_bytes)
            await self._offload.run(lambda: slab.decommit(end_bytes, old_end_bytes))
        except (OSError, BackendUnavailable) as error:  # the slab tries again before it grows there
            events.emit(
                events.ReturnFailed(
                    pool=self._pool_name, returned_bytes=old_end_bytes - end_bytes, error=str(error)
                )
            )
        finally:
            if not self.closed:
                self._apply(self._store.shrunk(time.monotonic()))
        behind = 0 if retiring is None else await retiring
        events.emit(
            events.SegmentsReturned(
                pool=self._pool_name,
                committed_bytes=end_bytes,
                returned_bytes=old_end_bytes - end_bytes,
                mapped_in_sessions=behind,
            )
        )

    async def drain(self) -> None:
        """Wait for changes in progress: a thread uses the slab's descriptor."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Change nothing any more, whatever a thread still does; release the words."""
        self.closed = True
        del self._header
