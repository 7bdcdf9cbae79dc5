"""One attached pool: its mapping, the link that keeps its session alive, and changes of its size."""

import asyncio
import contextlib
import enum
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from featcache.control import many, messages
from featcache.control.descriptors import NO_DESCRIPTOR, close_all, close_taken
from featcache.control.link import Link, SlabChange
from featcache.control.messages import UnmapTail
from featcache.errors import (
    OUT_OF_DESCRIPTORS,
    BackendUnavailable,
    CacheClosed,
    FeatcacheError,
    OwnerLost,
    explain,
)
from featcache.memory.slab import Mapping, Unreachable
from featcache.memory.words import Parting
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.hits import KeyHits
from featcache.session.offload import Offload
from featcache.session.waiting import Doorbell, drain

_SETTLE_S = 10.0
_MAX_CHANGES = 1024
"""Changes that may wait to be carried out: four times as many as a slab can have segments."""
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class ConnectionState(enum.Enum):
    """The life of a connection.

    | from          | by                                                    | to      |
    | ------------- | ----------------------------------------------------- | ------- |
    | OPEN          | `close`: new reads are refused, pinned ones may end   | CLOSING |
    | OPEN, CLOSING | `lose`: the owner is gone; the same                   | LOST    |
    | CLOSING       | the last unpin: goodbye is said, then `_leave` unmaps | LEFT    |
    | LOST          | the last unpin: `_leave` unmaps                       | LEFT    |
    | any           | `abandon`, the last unpin: the loop was closed        | LEFT    |
    """

    OPEN = "open"
    CLOSING = "closing"
    LOST = "lost"
    LEFT = "left"


class PoolConnection:
    """One attached pool: the mapped side and the link. `spawn` runs a coroutine to its end."""

    def __init__(
        self,
        attachment: Attachment,
        hits: KeyHits,
        link: Link,
        endpoint: str,
        doorbell: Doorbell,
        offload: Offload,
        spawn: Spawn,
        on_unreachable: Callable[[str], object],
    ) -> None:
        """Begin with the bytes mapped now; `on_unreachable` is told why, if more can't be mapped."""
        self._pid = os.getpid()
        self.attachment = attachment
        self.link = link
        self.endpoint = endpoint
        """Where the owner listens, as its refs say it."""
        self.spill_endpoint = ""
        """Where the spill pool listens, if puts may spill."""
        self.tensors, self.readers = 256, 1024
        """The owner's bounds of a put, as it said."""
        self.state = ConnectionState.OPEN
        self._mapping: Mapping = attachment.mapping
        self.hits = hits
        self._doorbell = doorbell
        self.ring = doorbell.ring
        self._offload = offload
        self._spawn = spawn
        self._on_unreachable = on_unreachable
        self._loop = asyncio.get_running_loop()
        self._changes: deque[tuple[SlabChange, list[int]]] = deque()
        self._follows = True
        """Whether changes of the slab's size are carried out; once one failed, none is any more."""
        self._change_in_progress = False
        self._changed = asyncio.Event()
        attachment.covered_bytes = self._mapping.end_bytes
        link.take_slab_changes(self._take_change)
        _living.add(self)

    def learn(self, welcome: messages.Welcome) -> None:
        """Take the owner's bounds and spill endpoint from its welcome."""
        self.spill_endpoint = welcome.sibling_endpoint
        self.tensors, self.readers = welcome.tensors, welcome.readers

    # --- the slab's size --------------------------------------------------------------------------

    def _take_change(self, change: SlabChange, fds: list[int]) -> None:
        if self._follows and len(self._changes) >= _MAX_CHANGES:
            self._stall("its owner changes it faster than it can be mapped")
        if not self._follows:
            close_all(fds)
            return
        self._changes.append((change, fds))
        if isinstance(change, UnmapTail):
            # At once, so that no read begins in memory that will be another segment when it comes again.
            self._cover()
            self.attachment.shrink_epoch = change.shrink_epoch
        if not self._change_in_progress:
            self._change_in_progress = True
            self._spawn(self._carry_out())

    def _cover(self) -> None:
        ends = [change.end_bytes for change, _ in self._changes if isinstance(change, UnmapTail)]
        self.attachment.covered_bytes = min([self._mapping.end_bytes, *ends])

    async def _carry_out(self) -> None:
        """Carry changes out in the order in which the owner made them; mapping blocks, so in a thread."""
        try:
            while self._changes:
                change, fds = self._changes[0]
                try:
                    await self._offload.finish(
                        lambda: _change(self._mapping, change, fds)  # noqa: B023 - awaited here
                    )
                except Unreachable as error:  # told by a hidden device only when it is to map
                    await self._fall_back_to_host(str(error))
                self._changes.popleft()
                self._cover()
                if isinstance(change, UnmapTail):
                    self.link.tail_unmapped(change.shrink_epoch)
                self._changed.set()
        except (FeatcacheError, OSError, MemoryError, ValueError) as error:
            if self._follows:
                self._stall(explain(error))  # no later change can be mapped either
            self._changed.set()
        finally:
            self._change_in_progress = False
            if not self._follows:
                self._drop_changes()

    def _stall(self, reason: str) -> None:
        """Let no new read begin: the slab's later changes of size are not followed here."""
        self._follows = False
        self.attachment.refuse(
            BackendUnavailable(f"the slab's new memory can't be mapped: {reason}")
        )
        self._changed.set()

    async def _fall_back_to_host(self, reason: str) -> None:
        """Read through host memory from now on: the owner's can't be mapped for this device."""
        mapping, self._mapping = self.attachment.fall_back_to_host(reason), self.attachment.mapping
        self._on_unreachable(reason)
        await self._in_thread(mapping.close)

    async def wait_mapped(self, end_bytes: int) -> None:
        """Wait until the slab is mapped here as far as the owner had it when it said welcome."""
        while self._mapping.end_bytes < end_bytes:
            self.attachment.check()
            retired = [change for change, _ in self._changes if isinstance(change, UnmapTail)]
            if retired or (not self._changes and self.attachment.shrink_epoch):
                return  # the tail has been unmapped again meanwhile
            self._changed.clear()
            await self._changed.wait()

    # --- the end ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Say goodbye once nothing is pinned any more; until then the session stays."""
        closed = CacheClosed("this client was closed")
        self.state = ConnectionState.CLOSING
        # First: no read may begin that the owner, once told goodbye, would not know of.
        self.attachment.refuse(closed)
        self.link.fail_all(closed)
        if self.attachment.holds:
            self.attachment.part(Parting.LEAVING)
            self.attachment.when_idle(lambda: self._soon(self._say_goodbye_and_leave))
            return
        # A task of its own: a caller that is cancelled, an attach say, does not cut the end short.
        await asyncio.shield(self._spawn(self._end()))

    async def _end(self) -> None:
        try:
            await self._drain()
            self.attachment.part(Parting.LEFT)
            await self.link.goodbye()
        finally:
            self.link.close()
            await self._leave()

    def lose(self, reason: str) -> None:
        """Refuse new reads; pinned slots stay mapped until they are unpinned. Idempotent."""
        if self.state in {ConnectionState.LOST, ConnectionState.LEFT}:
            return  # it is unmapped once: an attach hears of its end twice
        self.state = ConnectionState.LOST
        self.attachment.refuse(OwnerLost(reason))
        self.attachment.part(Parting.LEAVING)  # its owner may live, and only the socket be gone
        self._changed.set()
        self.attachment.when_idle(lambda: self._soon(self._leave))

    def _soon(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have work done in the loop, from any thread. Without a loop the process's end does it."""
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self._loop:
                self._spawn(work())
                return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._spawn(work()))

    async def _say_goodbye_and_leave(self) -> None:
        await self._drain()
        self.attachment.part(Parting.LEFT)
        self.link.say_goodbye()
        await self._leave()

    async def _drain(self) -> None:
        """Wait for the words that this session has on its streams: the owner counts those that landed."""
        if not await drain(self.attachment, _SETTLE_S):
            with contextlib.suppress(
                BackendUnavailable
            ):  # a broken context: nothing comes any more
                await self._in_thread(self._mapping.finish)

    async def _leave(self) -> None:
        """Unmap, in a thread since it takes milliseconds."""
        self.state, self._follows = ConnectionState.LEFT, False
        try:
            # First: unmapping under a stream's work would fault this process's context.
            await self._drain()
        except (
            BaseException
        ):  # cancelled with all tasks of its loop: a thread waits for the streams
            self._offload.spawn(self._unmap_behind_streams)
            raise
        self.attachment.part(Parting.ABANDONED)
        self._doorbell.close()
        if self._changes:
            self._drop_changes()
        await self._in_thread(self._mapping.close)

    def abandon_if_loopless(self) -> None:
        """Abandon it if its loop was closed under it."""
        if self._loop.is_closed():
            self.abandon()

    def abandon(self) -> None:
        """End a connection whose loop was closed under it; the process's next session tells its owner."""
        if self.state is ConnectionState.LEFT or self._pid != os.getpid():  # a fork's copy
            return
        self.state, self._follows = ConnectionState.LOST, False
        self.attachment.refuse(CacheClosed("the event loop of this client was closed"))
        self.attachment.part(Parting.LEAVING)
        self.link.abandon()
        deferred, spawn = self._mapping.deferred, self._offload.spawn
        self.attachment.when_idle(lambda: spawn(self._abandoned) if deferred else self._abandoned())

    def _abandoned(self) -> None:
        if self.state is ConnectionState.LEFT:
            return
        self.state = ConnectionState.LEFT
        self._unmap_behind_streams()

    def _unmap_behind_streams(self) -> None:
        """Unmap once the work of this process's streams is done, which blocks."""
        if not self.attachment.settled:
            with contextlib.suppress(BackendUnavailable):
                self._mapping.finish()
        self.attachment.part(Parting.ABANDONED)
        self._doorbell.close()
        self._drop_changes()
        self._mapping.close()

    def __del__(self) -> None:
        """Abandon what nobody closed: its loop is gone, or it would not be collected."""
        if sys is not None and not sys.is_finalizing():
            self.abandon()

    async def _in_thread(self, work: Callable[[], object]) -> None:
        try:
            await self._offload.finish(work)
        except CacheClosed:  # the client is closed, and its threads with it
            work()

    def _drop_changes(self) -> None:
        first = 1 if self._change_in_progress else 0  # that one is a thread's
        for _, fds in list(self._changes)[first:]:
            close_all(fds)
        while len(self._changes) > first:
            self._changes.pop()

    def forget(self) -> None:
        """Drop descriptors and mappings in a forked child."""
        self.state = ConnectionState.LEFT
        self.link.forget()
        self.attachment.forget()
        self.hits.forget()
        self._doorbell.close()
        for _, fds in self._changes:
            close_all(fds)
        self._changes.clear()


_living: "weakref.WeakSet[PoolConnection]" = weakref.WeakSet()


def abandon_the_loopless() -> None:
    """Abandon the connections of this process whose loop was closed, before it attaches anew."""
    for connection in list(_living):
        connection.abandon_if_loopless()


def return_unclaimed(
    connection: PoolConnection, request: messages.Request, answer: messages.Answer
) -> None:
    """Return the lease, claim, reservation or pin of an answer whose request was cancelled."""
    link = connection.link
    if isinstance(answer, messages.Granted):
        connection.attachment.return_grant(answer.index, answer.serial)
    elif isinstance(answer, messages.ClaimGranted) and isinstance(request, messages.Find):
        link.tell(messages.ReleaseClaim(request.key, answer.claim))
    elif isinstance(answer, messages.Reserved):
        link.tell(messages.GiveUpReserved(answer.slot, answer.generation, landed=True))
    elif isinstance(request, messages.Publish):  # nobody has its ref
        link.discard_soon(request.slot, request.generation)
    elif isinstance(request, messages.KeyCommand) and request.command == "pin":
        link.unpin_soon(request.key)
    elif isinstance(request, messages.Upload | messages.Share) and isinstance(
        answer, messages.Reply
    ):
        ref = FeatureRef.from_bytes(answer.ref)
        link.undo_soon(ref.slot, ref.generation)  # of a share: a slot of its own, under no key
    else:
        _return_many(connection, request, answer)


def _return_many(
    connection: PoolConnection, request: messages.Request, answer: messages.Answer
) -> None:
    """As `return_unclaimed`, of an answer for many members."""
    link = connection.link
    if isinstance(answer, many.GrantedMany):
        for one in answer.found:
            if one is not None:
                connection.attachment.return_grant(one[0], one[1])
    elif isinstance(answer, many.ReservedMany):
        for slot, generation, _ in answer.slots:
            link.tell(messages.GiveUpReserved(slot, generation, landed=True))
    elif isinstance(request, many.PublishMany):
        for slot, generation, _, _ in request.members:
            link.undo_soon(slot, generation)


def _change(mapping: Mapping, change: SlabChange, fds: list[int]) -> None:
    try:
        if isinstance(change, UnmapTail):
            mapping.cut(change.end_bytes)
            return
        if NO_DESCRIPTOR in fds:
            raise BackendUnavailable(OUT_OF_DESCRIPTORS)
        at = change.start_bytes
        for size_bytes, fd in zip(change.sizes, fds, strict=True):
            if at >= mapping.end_bytes:  # segments of before this session began may be sent twice
                mapping.extend(at, size_bytes, fd)
            at += size_bytes
    finally:
        close_taken(fds)  # the change may still stand in the queue
