"""One served pool: its slab and words, its sessions at a socket, the owner's own session and puts."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import anyio

from featcache.control import endpoint as endpoints
from featcache.control.server import Server
from featcache.core.effects import Limits
from featcache.errors import BackendUnavailable, system_errors
from featcache.memory.slab import Slab
from featcache.owner.draining import refuse_puts
from featcache.owner.key_sources import KeySources
from featcache.owner.keys import Lookups
from featcache.owner.observing import Observations
from featcache.owner.own_session import OwnSession
from featcache.owner.requests import RequestHandlers
from featcache.owner.sessions import RELAY_SESSION, Sessions
from featcache.pool.block import PoolBlock
from featcache.pool.pool import Pool
from featcache.pool.writer import OwnerWriter
from featcache.session.attachment import Attachment
from featcache.session.offload import Offload, OnAbandoned
from featcache.settings import Settings

T = TypeVar("T")
_SETTLE_S = 10.0
_POLL_S = 0.001


class ServedPool:
    """The parts of an open pool, taken down in the reverse order of their making."""

    def __init__(
        self,
        pool: Pool,
        sessions: Sessions,
        server: Server,
        writer: OwnerWriter,
        lookups: Lookups,
        name: str | None,
        shown: Observations,
        handlers: RequestHandlers,
    ) -> None:
        self.pool = pool
        self.sessions = sessions
        self.server = server
        self.writer = writer
        self.lookups = lookups
        self.sources = KeySources(pool, lookups)
        """Where keys may be that are not here: none, unless one is added."""
        self.handlers = handlers
        self.shown = shown
        """What observers are shown."""
        self.own = OwnSession(pool, sessions, name)
        self.relaying = OwnSession(pool, sessions, None, RELAY_SESSION)
        self.unpaid_refs = 0
        """Once it is closed: refs that owed reads at the end."""

    @classmethod
    async def open(
        cls,
        make: Callable[[], Slab],
        limits: Limits,
        settings: Settings,
        offload: Offload,
        endpoint: str | None,
        name: str | None,
    ) -> "ServedPool":
        """Make the slab, commit its initial bytes, and listen.

        Raises:
            BackendUnavailable: the memory or the system's help for it is not there.
            SettingsError: the endpoint can't be used.

        """
        unopened = system_errors(BackendUnavailable, "the pool can't be opened")
        with unopened, contextlib.ExitStack() as undo:
            slab = await offload.run(make, _close_made)
            undo.callback(slab.close)
            try:
                await _to_its_end(
                    offload,
                    lambda: slab.commit(0, limits.initial_bytes, prefault=settings.prefault),
                )
            except MemoryError as error:
                raise BackendUnavailable(f"the slab could not be made: {error}") from error
            listener = endpoints.listen(endpoint)
            undo.callback(listener.close)
            make_block = partial(PoolBlock.make, slab, limits.slots)
            block = [await _to_its_end(offload, make_block, PoolBlock.close)]
            # Taken out: this frame may live in an error's traceback, and would keep the words mapped.
            pool = Pool(slab, block.pop(), limits, settings, offload)
            undo.callback(pool.close)
            pool.endpoint = pool.ref_endpoint = listener.path
            sessions = Sessions(pool, name)
            undo.callback(sessions.close)
            writer, lookups = OwnerWriter(pool), Lookups(pool)
            handlers = RequestHandlers(pool, writer, lookups, sessions)
            shown = Observations(pool, lookups, name, sessions.pidfd)
            server = pool.growth.server = Server(listener, settings, sessions, handlers, shown)
            shown.server = server
            undo.pop_all()
        return cls(pool, sessions, server, writer, lookups, name, shown, handlers)

    def refuse_puts(self) -> None:
        """Take no more puts, and end all waits; what is read now may go on."""
        refuse_puts(self.handlers._answers)  # noqa: SLF001 - the one change of what it answers
        self.pool.ahead.stop()
        self.pool.stop()

    async def aclose(self) -> None:
        """Close: waiting puts raise CacheClosed, sessions are told, the socket's file goes."""
        own, pool, slab = self.own.attached, self.pool, self.pool.slab
        await take_each(
            self.sources.close,
            self.server.close,
            self.shown.close,
            self.own.close,
            self.relaying.close,
            pool.stop,
            pool.wakes.told,
            self.server.ended,
            self.sessions.settled,
            pool.growth.drain,
            lambda: self._settle(own),
            self._count_unpaid,
            pool.close,
            self.sessions.close,
            # Giving a gigabyte back takes a tenth of a second: not in the loop.
            lambda: pool.offload.finish(slab.close, lambda _: slab.close()),
        )

    async def _settle(self, own: Attachment | None) -> None:
        """Wait until all work of streams has landed: unmapping under it would fault the context."""
        pool, slab, give_up_s = self.pool, self.pool.slab, time.monotonic() + _SETTLE_S
        while slab.deferred and not (pool.settled and (own is None or own.settled)):
            if time.monotonic() > give_up_s:
                await pool.offload.finish(slab.finish)
                return
            await anyio.sleep(_POLL_S)

    def _count_unpaid(self) -> None:
        try:
            self.pool.collect()  # what was paid until now, streams included, is not owed
        finally:
            self.unpaid_refs = len(self.pool.store.owing)

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self.server.forget()
        self.own.forget()
        self.relaying.forget()
        self.pool.forget()
        self.sessions.close()


async def take_each(*steps: Callable[[], Awaitable[object] | object]) -> None:
    """Take every step of an end, also after one that failed; then raise the first error."""
    first: BaseException | None = None
    for step in steps:
        try:
            taken = step()
            if isinstance(taken, Awaitable):
                await taken
        except BaseException as error:  # noqa: BLE001 - raised below
            first = first or error
    try:
        if first is not None:
            raise first
    finally:
        first = None  # its traceback refers to this frame


async def _to_its_end(
    offload: Offload, work: Callable[[], T], on_abandoned: OnAbandoned[T] | None = None
) -> T:
    """Await work on a slab in a thread; if the caller is cancelled, until it is done."""
    try:
        return await offload.run(work, on_abandoned)
    except asyncio.CancelledError:
        # First: a thread is still at work on what is closed next.
        await offload.drain()
        raise


def _close_made(slab: Slab | None) -> None:
    if slab is not None:
        slab.close()
