"""Where else a key may be that is not in this pool: a tier, other hosts.

The lookups ask only if there is any source (`Lookups.sources`), and only after a miss. A source brings a
feature into the pool under its key; from there on it is found as any other, by all sessions. What the
key table finds, and `get_nowait` and `contains_nowait`, ask none.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Protocol

from featcache import events
from featcache.core.slots import Slot
from featcache.errors import CacheClosed
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

    @property
    def name(self) -> str:
        """What events call it."""

    async def bring(self, key: bytes) -> bool:
        """Put the feature under a key into the pool, under that key; return whether it did.

        One call for a key at a time. What was brought is held here until those that wait had the time to
        find it: a put could evict it before their tasks run.
        """

    async def holds(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Return whether it has each of these keys. Not a use of them."""


class ClaimingSource(KeySource, Protocol):
    """Other hosts: among them too one makes a key, and its waiters here wait there as well."""

    async def claim(self, claim: Claim, *, waits: bool) -> bool:
        """Bring the key of a claim that is held here; or return False once it is to be made here.

        Raises:
            KeyNotFound: another host makes it, and this call may not wait for it.

        """

    def watching(self, key: bytes) -> contextlib.AbstractContextManager[None]:
        """Bring a key as soon as there is one, while the context lasts."""

    def is_seeking(self, key: bytes) -> bool:
        """Whether who has the claim to a key here is asking for it."""

    def made(self, key: bytes, claim: int) -> None:
        """Take the end of a claim: the feature is in the pool, or will not be."""

    def kept(self, key: bytes) -> None:
        """Take the news that a feature is kept under a key."""


class KeySources:
    """The sources of one pool, asked from the nearest on, and for one key once at a time.

    Other hosts come last. They ask in turn here, for what is in this pool or *near*: in its other sources.
    """

    def __init__(self, pool: Pool, lookups: Lookups) -> None:
        self._pool = pool
        self._lookups = lookups
        self._near: list[KeySource] = []
        self._hosts: ClaimingSource | None = None
        self._bringing: Flights[bytes, bool] = Flights()
        self._asking: Flights[bytes, bool] = Flights()
        self._failures = events.Throttle(pool.settings.log_interval, burst=16)

    def add(self, source: KeySource) -> None:
        """Ask this one too, after those before it. Now the key table never says that a key is absent."""
        self._near.append(source)
        self._begin()

    def add_hosts(self, hosts: ClaimingSource) -> None:
        """Ask other hosts too, and tell them of what is made and put here."""
        self._hosts = hosts
        self._pool.store.on_claim_ended = hosts.made
        self._pool.on_kept = hosts.kept
        self._begin()

    def _begin(self) -> None:
        if self._lookups.sources is None:
            self._pool.key_table.leave_open()
            self._lookups.sources = self

    def is_seeking(self, key: bytes) -> bool:
        """Whether who has the claim to a key here is asking other hosts for it."""
        return self._hosts is not None and self._hosts.is_seeking(key)

    # --- lookups after a miss -------------------------------------------------------------------------

    async def find(self, key: bytes, page: SessionPage) -> Granted:
        """Return a read of a key that the pool does not have; KeyNotFound if no source has it."""
        return await self._found(key, page, self.bring)

    async def find_near(self, key: bytes, page: SessionPage) -> Granted:
        """As `find`, without other hosts."""
        return await self._found(key, page, self.bring_near)

    async def _found(
        self, key: bytes, page: SessionPage, bring: Callable[[bytes], Awaitable[bool]]
    ) -> Granted:
        for _ in range(_TRIES):
            if not await bring(key):
                break
            found = self._lookups.find(key, page)
            if found is not None:
                return found
        raise not_found(key)

    async def bring(self, key: bytes) -> bool:
        """Have a key brought; return whether it was. Callers meanwhile join."""
        hosts = self._hosts
        if await self.bring_near(key) or hosts is None:
            return key in self._pool.store.directory
        return await self._asking.join(key, lambda: self._ask(hosts, key))

    async def bring_near(self, key: bytes) -> bool:
        """As `bring`, without other hosts."""
        if not self._near:
            return False
        return await self._bringing.join(key, lambda: self._bring_near(key))

    async def bring_many(self, keys: Iterable[bytes]) -> None:
        """Have those brought of these keys that are not in the pool, a few at the same time."""
        directory = self._pool.store.directory
        missing = list(dict.fromkeys(key for key in keys if key not in directory))
        left = iter(missing)

        async def some() -> None:
            for key in left:
                await self.bring(key)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in missing[:_AT_ONCE]:
                    group.create_task(some())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys is in the pool or can be brought."""
        told = await self.contains_near(keys)
        if self._hosts is not None:
            await self._ask_whether(self._hosts, keys, told)
        return told

    async def contains_near(self, keys: Sequence[bytes]) -> list[bool]:
        """As `contains_many`, without other hosts."""
        told = self._lookups.contains_many(keys)
        for source in self._near:
            await self._ask_whether(source, keys, told)
        return told

    async def wait_for_key(
        self, key: bytes, page: SessionPage, *, can_make: bool, waits: bool
    ) -> Granted | Claim:
        """As `Lookups.wait_here`; but before a wait, and by the holder of the claim, the sources are asked.

        Of all sessions one has the claim: the others wait for the key, as they do without sources.

        Raises:
            KeyNotFound: another host makes it, and this call may not wait for it; else as `wait_here`.

        """
        hosts = self._hosts
        if hosts is None:
            return await self.wait_near(key, page, can_make=can_make)
        if can_make:
            return await self._claimed(key, page, lambda claim: hosts.claim(claim, waits=waits))
        await self.bring_near(key)
        with hosts.watching(key):
            return await self._lookups.wait_here(key, page, can_make=False)

    async def wait_near(self, key: bytes, page: SessionPage, *, can_make: bool) -> Granted | Claim:
        """As `wait_for_key`, without other hosts."""
        if can_make:
            return await self._claimed(key, page, None)
        await self.bring_near(key)
        return await self._lookups.wait_here(key, page, can_make=False)

    async def _claimed(
        self, key: bytes, page: SessionPage, ask: Callable[[Claim], Awaitable[bool]] | None
    ) -> Granted | Claim:
        while True:
            found = await self._lookups.wait_here(key, page, can_make=True)
            if isinstance(found, Granted):
                return found
            is_there = True
            try:
                is_there = await self.bring_near(key) or (ask is not None and await ask(found))
            finally:
                if is_there:  # or this failed: the claim is void, or passes to the next
                    self._lookups.release_claim(found)
            if not is_there:
                return found

    # --- asking ---------------------------------------------------------------------------------------

    async def _bring_near(self, key: bytes) -> bool:
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
        except Exception as error:  # noqa: BLE001 - a tier may be a user's own
            self.failed(source, error)
            return False
        self._hold(key)
        return True

    async def _ask_whether(
        self, source: KeySource, keys: Sequence[bytes], told: list[bool]
    ) -> None:
        asks = [n for n, there in enumerate(told) if not there]
        if not asks:
            return
        try:
            flags = await source.holds([keys[n] for n in asks])
        except CacheClosed:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            self.failed(source, error)
            return
        for n, there in zip(asks, flags, strict=True):
            told[n] = there

    def _hold(self, key: bytes) -> None:
        pool = self._pool
        slot = pool.store.hold(key, time.monotonic())
        if slot is not None:
            pool.loop.call_later(_HANDOVER_S, self._release, slot)

    def _release(self, slot: Slot) -> None:
        if not self._pool.closed:
            self._pool.apply(self._pool.store.pay_grant(slot, time.monotonic()))

    def failed(self, source: KeySource, error: Exception) -> None:
        """Tell that a source failed."""
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
        await self._asking.close()
