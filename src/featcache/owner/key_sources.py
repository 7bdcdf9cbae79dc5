"""Where else a key may be that is not in this pool: a tier, other hosts.

The lookups ask only if there is any source (`Lookups.sources`), and only after a miss. A source brings a
feature into the pool under its key; from there on it is found as any other, by all sessions. What the
key table finds, and `get_nowait` and `contains_nowait`, ask none.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from featcache import events
from featcache.core.slots import Slot
from featcache.errors import CacheClosed, FeatcacheError
from featcache.owner.flights import Flights
from featcache.owner.keys import Claim, Granted, Lookups
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.session.arguments import not_found

_TRIES: Final = 4
"""Times that a key is brought for one call: what was brought may be evicted before it is found."""
_AT_ONCE: Final = 16
"""Keys that one call brings at the same time."""
_HANDOVER_S: Final = 0.05
"""For which a feature that was brought is held."""


class KeySource(Protocol):
    """What may have keys that the pool does not have.

    An error that it raises, other than CacheClosed, is told by an event; the key counts as not there.
    Calls may be cancelled.
    """

    name: str
    """In events."""

    async def bring(self, key: bytes) -> bool:
        """Put the feature under a key into the pool, under that key; return whether it did.

        One call for a key at a time. What was brought is held here until those that wait had the time to
        find it: a put could evict it before their tasks run.
        """

    async def holds(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Return whether it has each of these keys. Not a use of them."""


class KeySources:
    """The sources of one pool, asked from the nearest on, and for one key once at a time."""

    def __init__(self, pool: Pool, lookups: Lookups) -> None:
        self._pool = pool
        self._lookups = lookups
        self._near: list[KeySource] = []
        self._bringing: Flights[bytes, bool] = Flights()
        self._failures = events.Throttle(pool.settings.log_interval, burst=16)

    def add(self, source: KeySource) -> None:
        """Ask this one too, after those before it. Now the key table never says that a key is absent."""
        self._near.append(source)
        if self._lookups.sources is None:
            self._pool.key_table.leave_open()
            self._lookups.sources = self

    # --- lookups after a miss -------------------------------------------------------------------------

    async def find(self, key: bytes, page: SessionPage) -> Granted:
        """Return a read of a key that the pool does not have; KeyNotFound if no source has it."""
        for _ in range(_TRIES):
            if not await self.bring(key):
                break
            found = self._lookups.find(key, page)
            if found is not None:
                return found
        raise not_found(key)

    async def bring(self, key: bytes) -> bool:
        """Have a key brought; return whether it was. Whoever asks meanwhile joins."""
        return await self._bringing.join(key, lambda: self._bring(key))

    async def bring_many(self, keys: Iterable[bytes]) -> None:
        """Have those brought of these keys that are not in the pool, a few at the same time."""
        directory = self._pool.store.directory
        missing = list(dict.fromkeys(key for key in keys if key not in directory))
        left = iter(missing)

        async def some() -> None:
            for key in left:
                await self.bring(key)

        async with asyncio.TaskGroup() as group:
            for _ in missing[:_AT_ONCE]:
                group.create_task(some())

    async def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys is in the pool or can be brought."""
        told = self._lookups.contains_many(keys)
        for source in self._near:
            asks = [n for n, there in enumerate(told) if not there]
            if not asks:
                break
            try:
                flags = await source.holds([keys[n] for n in asks])
            except FeatcacheError as error:
                self._failed(source, error)
                continue
            for n, there in zip(asks, flags, strict=True):
                told[n] = there
        return told

    async def wait_for_key(
        self, key: bytes, page: SessionPage, *, can_make: bool
    ) -> Granted | Claim:
        """As `Lookups.wait_here`, but whoever would wait, or has the claim, has the sources asked first.

        Of all sessions one has the claim: the others wait for the key, as they do without sources.
        """
        if not can_make:
            await self.bring(key)
            return await self._lookups.wait_here(key, page, can_make=False)
        while True:
            found = await self._lookups.wait_here(key, page, can_make=True)
            if isinstance(found, Granted):
                return found
            brought = True
            try:
                brought = await self.bring(key)
            finally:
                if brought:  # or this was cancelled: it is void, or passes to the next
                    self._lookups.release_claim(found)
            if not brought:
                return found

    # --- asking ---------------------------------------------------------------------------------------

    async def _bring(self, key: bytes) -> bool:
        for source in self._near:
            if await self._ask(source, key):
                return True
        return False

    async def _ask(self, source: KeySource, key: bytes) -> bool:
        try:
            if not await source.bring(key):
                return False
        except CacheClosed:
            self._pool.check_open()
            raise
        except FeatcacheError as error:
            self._failed(source, error)
            return False
        self._hold(key)
        return True

    def _hold(self, key: bytes) -> None:
        pool = self._pool
        slot = pool.store.hold(key, time.monotonic())
        if slot is not None:
            pool.loop.call_later(_HANDOVER_S, self._release, slot)

    def _release(self, slot: Slot) -> None:
        if not self._pool.closed:
            self._pool.apply(self._pool.store.pay_grant(slot, time.monotonic()))

    def _failed(self, source: KeySource, error: FeatcacheError) -> None:
        unlogged = self._failures.pass_(time.monotonic())
        if unlogged is not None:
            pool, reason = self._pool.name, str(error)
            events.emit(
                events.KeySourceFailed(
                    pool=pool, source=source.name, reason=reason, unlogged=unlogged
                )
            )

    async def close(self) -> None:
        """End what is in progress."""
        await self._bringing.close()
