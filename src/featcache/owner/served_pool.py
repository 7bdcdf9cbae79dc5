"""One served pool: its slab and words, its sessions at a socket, the owner's own session and puts."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import anyio

from featcache.control import endpoint as endpoints
from featcache.control.server import Server
from featcache.core.effects import Limits
from featcache.errors import BackendUnavailable
from featcache.memory.slab import Slab
from featcache.owner.keys import Lookups
from featcache.owner.own_session import OwnSession
from featcache.owner.requests import RequestHandlers
from featcache.owner.sessions import RELAY_SESSION, Sessions
from featcache.pool.pool import Pool
from featcache.pool.writer import OwnerWriter
from featcache.session.offload import Offload
from featcache.settings import Settings

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
    ) -> None:
        self.pool = pool
        self.sessions = sessions
        self.server = server
        self.writer = writer
        self.lookups = lookups
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
        with contextlib.ExitStack() as undo:
            slab = await offload.run(make, _close_made)
            undo.callback(slab.close)
            try:
                await offload.run(
                    lambda: slab.commit(0, limits.initial_bytes, prefault=settings.prefault)
                )
            except asyncio.CancelledError:
                # First: a thread is still committing to the slab's descriptor.
                await offload.drain()
                raise
            except MemoryError as error:
                raise BackendUnavailable(f"the slab could not be made: {error}") from error
            sock, path = endpoints.listen(endpoint)
            undo.callback(endpoints.unlink, path)
            undo.callback(sock.close)
            pool = Pool(slab, limits, settings, offload)
            undo.callback(pool.close)
            pool.endpoint = path
            sessions = Sessions(pool, name)
            undo.callback(sessions.close)
            writer, lookups = OwnerWriter(pool), Lookups(pool)
            handlers = RequestHandlers(pool, writer, lookups, sessions)
            server = pool.growth.server = Server(sock, path, settings, sessions, handlers)
            undo.pop_all()
        return cls(pool, sessions, server, writer, lookups, name)

    async def aclose(self) -> None:
        """Close: waiting puts raise CacheClosed, sessions are told, the socket's file goes."""
        self.server.close()
        own = self.own.attached
        self.own.close()
        self.relaying.close()
        pool, slab, offload = self.pool, self.pool.slab, self.pool.offload
        pool.stop()
        try:
            await pool.growth.drain()
            # Unmapping under a stream's work would fault the context: first it all must land.
            give_up_s = time.monotonic() + _SETTLE_S
            while slab.deferred and not (pool.settled and (own is None or own.settled)):
                if time.monotonic() > give_up_s:
                    await offload.finish(slab.finish)
                    break
                await anyio.sleep(_POLL_S)
            pool.collect()  # what was paid until now, streams included, is not owed
        finally:
            self.unpaid_refs = len(pool.store.owing)
            pool.close()
            self.sessions.close()
            # Giving a gigabyte back takes a tenth of a second: not in the loop.
            await offload.finish(slab.close, lambda _: slab.close())

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self.server.forget()
        self.own.forget()
        self.relaying.forget()
        self.pool.forget()
        self.sessions.close()


def _close_made(slab: Slab | None) -> None:
    if slab is not None:
        slab.close()
