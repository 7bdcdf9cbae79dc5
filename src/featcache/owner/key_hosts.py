"""Keys that other hosts have: looked up at their homes, fetched, made once over all hosts, and offered."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final

from featcache.errors import (
    CacheClosed,
    FeatcacheError,
    KeyNotFound,
)
from featcache.owner.flights import Flights
from featcache.owner.home import Home, Pins
from featcache.owner.keys import Claim
from featcache.owner.landing import Landing, There, checked_specs
from featcache.owner.offers import Offers, Right
from featcache.owner.registered import RegisteredSlab
from featcache.owner.served_pool import ServedPool
from featcache.owner.upstreams import Upstreams
from featcache.reach import messages


class Watch:
    """A key that is waited for at its home, for all that wait for it here."""

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self.task = task
        self.count = 0


class KeyHosts:
    """The `key_sources.ClaimingSource` of an owner with upstreams.

    A claim that is held here, for a key whose home is elsewhere::

        SEEKING ──found there──────→ (released: the feature is brought)
           │ └──its turn there────→ HELD, with a right there ──put here──→ OFFERED ──the home has it──→ (none)
           │                          └──failed, or its session ended──→ (given back: the next host makes)
           └──nobody to be asked──→ HELD, without one ──put here──→ OFFERED to the home of that time
    """

    name: Final = "other hosts"

    def __init__(
        self,
        served: ServedPool,
        upstreams: Upstreams,
        slab: Callable[[], Awaitable[RegisteredSlab]],
        landing: Landing,
    ) -> None:
        self._served = served
        self._pool = served.pool
        self._upstreams = upstreams
        self._slab = slab
        self._landing = landing
        self._tickets = itertools.count(1)
        self._fetching: Flights[bytes, None] = Flights()
        self._watches: dict[bytes, Watch] = {}
        self._seeking: set[bytes] = set()
        self._rights: dict[int, tuple[bytes, Right | None]] = {}
        """By the number of a claim that is held here: its key, and the right at its home."""
        self._making: set[bytes] = set()
        """Keys of those claims."""
        self.offers = Offers(served, upstreams, slab, self._failed)
        self.fetched = 0
        upstreams.on_down = self._failed

    # --- lookups --------------------------------------------------------------------------------------

    async def bring(self, key: bytes) -> bool:
        """Fetch the feature under a key from its home, if it has one."""
        return await self._brought(key, waits=False)

    async def _brought(self, key: bytes, *, waits: bool) -> bool:
        async def seek(home: Home) -> bool:
            return await self._seek(home, key, claims=False, waits=waits) is None

        try:
            return await self._upstreams.ask(key, seek) or False
        except KeyNotFound:
            return False

    async def _seek(self, home: Home, key: bytes, *, claims: bool, waits: bool) -> Right | None:
        """Fetch a feature, or return the right to make it."""
        ticket = next(self._tickets)
        slab = await self._slab()
        found = await home.seek(key, ticket, slab, claims=claims, waits=waits)
        if isinstance(found, messages.Claimed):
            return Right(home, home.host, ticket)
        pins, over = home.pins, partial(home.give_back, ticket)
        # The pin is the fetch's, not this call's: others may have joined by the time that this is cancelled.
        await self._fetching.join(key, lambda: self._fetch(pins, key, found), over)
        return None

    async def _fetch(self, pins: Pins, key: bytes, found: messages.Sought) -> None:
        if key in self._pool.store.directory:
            return
        there = There(
            *(found.nbytes, found.address, found.pieces, checked_specs(found), found.memory)
        )
        pins.traffic.in_progress += 1
        try:
            await self._landing.land(pins, there, key)
        except FeatcacheError as error:
            pins.traffic.failed += 1
            self._landing.news.failed(pins.address, found.nbytes, error)
            raise
        finally:
            pins.traffic.in_progress -= 1
        self.fetched += 1

    async def holds(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Return whether the homes of these keys have them."""
        told = [False] * len(keys)
        parts: dict[str, list[int]] = {}
        for n, key in enumerate(keys):
            home = self._upstreams.home_of(key)
            if home is not None:
                parts.setdefault(home, []).append(n)

        async def ask(address: str, asks: list[int]) -> None:
            for first in range(0, len(asks), messages.MAX_KEYS):
                some = asks[first : first + messages.MAX_KEYS]
                asked = [keys[n] for n in some]
                flags = await self._upstreams.ask_at(address, partial(Home.ask, keys=asked))
                for n, flag in zip(some, flags or [False] * len(some), strict=True):
                    told[n] = flag

        await asyncio.gather(*(ask(*part) for part in parts.items()))
        return told

    @contextlib.contextmanager
    def watching(self, key: bytes) -> Iterator[None]:
        """Wait at the home of a key for its feature, and fetch it, while the context lasts."""
        watch = self._watches.get(key)
        if watch is None:
            task = asyncio.get_running_loop().create_task(self._watch(key))
            watch = self._watches[key] = Watch(task)
        watch.count += 1
        try:
            yield
        finally:
            watch.count -= 1
            if not watch.count:
                del self._watches[key]
                watch.task.cancel()

    async def _watch(self, key: bytes) -> None:
        while True:
            try:
                if await self._brought(key, waits=True):
                    return  # its waiters here have been told
            except CacheClosed:
                return
            except FeatcacheError as error:
                self._failed(error)
            await asyncio.sleep(self._pool.settings.reconnect_interval)

    def is_seeking(self, key: bytes) -> bool:
        """Whether who has the claim to a key here is asking for it."""
        return key in self._seeking

    # --- claims ---------------------------------------------------------------------------------------

    async def claim(self, claim: Claim, *, waits: bool) -> bool:
        """Bring the key of a claim that is held here; or return False once it is to be made here."""
        key = claim.key

        async def seek(home: Home) -> tuple[Right | None]:
            return (await self._seek(home, key, claims=True, waits=waits),)

        right: Right | None = None
        self._seeking.add(key)
        try:
            sought = await self._upstreams.ask(key, seek)
            if sought == (None,):
                return True
            right = None if sought is None else sought[0]
        except KeyNotFound:
            if not waits:
                raise
        except CacheClosed:
            raise
        except FeatcacheError as error:
            self._failed(error)
        finally:
            self._seeking.discard(key)
        self._rights[claim.number] = key, right
        self._making.add(key)
        return False

    def made(self, key: bytes, claim: int) -> None:
        """Take the end of a claim: the feature is offered to its home, or another host is to make it."""
        held = self._rights.pop(claim, None)
        if held is None:
            return
        self._making.discard(key)
        right = held[1]
        if right is not None and key in self._pool.store.directory:
            right.home.promise(key, right.ticket)
        # Not now: the store is in the middle of it.
        self._pool.loop.call_soon(self._offer_or_pass, key, right)

    def _offer_or_pass(self, key: bytes, right: Right | None) -> None:
        if self._pool.closed:
            return
        if key in self._pool.store.directory:
            self.offers.add(key, right, first=True)
        elif right is not None:
            right.home.give_back(right.ticket)

    def kept(self, key: bytes) -> None:
        """Offer what was put here under a key."""
        if key != self._landing.publishing and key not in self._making:
            self.offers.put(key, next(self._tickets))

    def _failed(self, error: Exception) -> None:
        self._served.sources.failed(self, error)

    async def close(self) -> None:
        """End all that is in progress."""
        tasks = [watch.task for watch in self._watches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.offers.close()
        await self._fetching.close()
        self._upstreams.close()
