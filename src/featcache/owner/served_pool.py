"""One pool in service: its slab and words, its sessions at a socket, the owner's own reads and puts."""

import contextlib
import time
from collections.abc import Callable

import anyio

from featcache.control import endpoint as endpoints
from featcache.control.server import Server
from featcache.core.effects import Limits
from featcache.errors import BackendUnavailable, SettingsError
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
_LOOK_S = 0.001


class ServedPool:
    """What an open pool has, taken down in the reverse order of its making."""

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
        """Make the slab, commit what it begins with, and listen.

        Raises:
            BackendUnavailable: the memory or the system's help for it is not there.
            SettingsError: the endpoint can't be used.

        """
        with contextlib.ExitStack() as undo:
            slab = await _made(make, offload)
            undo.callback(slab.close)
            try:
                await offload.run(
                    lambda: slab.commit(0, limits.initial_bytes, prefault=settings.prefault),
                    lambda: None,
                )
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
            server = pool.growth.sessions = Server(sock, path, settings, sessions, handlers)
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
            # Nothing of ours may be on a stream when the memory goes.
            give_up_s = time.monotonic() + _SETTLE_S
            while slab.deferred and not (pool.settled and (own is None or own.settled)):
                if time.monotonic() > give_up_s:
                    await offload.run(slab.finish, lambda: None)
                    break
                await anyio.sleep(_LOOK_S)
        finally:
            pool.close()
            self.sessions.close()
            # Giving a gigabyte back takes a tenth of a second: not in the loop.
            await offload.run(slab.close, slab.close)

    def forget(self) -> None:
        """Drop everything in a forked child."""
        self.server.forget()
        self.own.forget()
        self.relaying.forget()
        self.pool.forget()
        self.sessions.close()


async def _made(make: Callable[[], Slab], offload: Offload) -> Slab:
    box: list[Slab] = []

    def late() -> None:
        for slab in box:
            slab.close()

    await offload.run(lambda: box.append(make()), late)
    return box[0]


def limits_of(
    settings: Settings,
    granularity_bytes: int,
    most_segments: int | None = None,
    capacity_bytes: int | None = None,
    initial_bytes: int | None = None,
) -> Limits:
    """Return the sizes of a pool, rounded up to what its slab can do; SettingsError if they clash.

    A slab that can't be cut into as many segments as asked for gets larger ones. `capacity_bytes` and
    `initial_bytes` are those of a pool whose size is not the settings'.
    """

    def up(size_bytes: int, unit_bytes: int) -> int:
        return -(-size_bytes // unit_bytes) * unit_bytes

    wanted_bytes = settings.initial if capacity_bytes is None else initial_bytes
    capacity_bytes = up(capacity_bytes or settings.capacity, granularity_bytes)
    segment_bytes = min(up(settings.segment, granularity_bytes), capacity_bytes)
    if most_segments is not None:
        least_bytes = up(-(-capacity_bytes // most_segments), granularity_bytes)
        segment_bytes = max(segment_bytes, least_bytes)
    if wanted_bytes is None:
        wanted_bytes = segment_bytes
    if wanted_bytes > capacity_bytes:
        raise SettingsError(f"initial={settings.initial} is more than capacity={capacity_bytes}")
    return Limits(
        capacity_bytes=capacity_bytes,
        segment_bytes=segment_bytes,
        initial_bytes=min(up(wanted_bytes, segment_bytes), capacity_bytes),
        slots=settings.slots,
        waiters=settings.waiters,
        grace_s=settings.grace,
        idle_s=settings.idle,
        evict_first=settings.when_full == "evict",
        evict_above=settings.evict_above,
        evict_to=_evict_to(settings),
        compact=settings.compact,
    )


def _evict_to(settings: Settings) -> float:
    above, to = settings.evict_above, settings.evict_to
    if above is None:
        return 1.0
    if to is None:
        return max(0.0, above - 0.05)
    if to > above:
        raise SettingsError(f"evict_to={to} is more than evict_above={above}")
    return to
