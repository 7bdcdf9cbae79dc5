"""Features that are put here under keys, offered to the homes of the keys."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from featcache.errors import CacheClosed, FeatcacheError, PoolFull
from featcache.owner.homes import Home
from featcache.owner.registered import RegisteredSlab
from featcache.owner.served_pool import ServedPool
from featcache.owner.upstreams import Upstreams

_MAX_OFFERS: Final = 4096
"""Keys that wait to be offered: one more is not offered."""
_AT_ONCE: Final = 4
_now: Final = time.monotonic


class Right(NamedTuple):
    """The right to make a key, of all hosts, which its home has given this one."""

    home: Home
    host: bytes
    """The id of the home's pool: one that was started again knows of no right."""
    ticket: int


class Offers:
    """A queue of keys, a few of which are offered at the same time; those with a right come first."""

    def __init__(
        self,
        served: ServedPool,
        upstreams: Upstreams,
        slab: Callable[[], Awaitable[RegisteredSlab]],
        on_failed: Callable[[Exception], object],
    ) -> None:
        self._served = served
        self._pool = served.pool
        self._upstreams = upstreams
        self._slab = slab
        self._on_failed = on_failed
        self._waiting: OrderedDict[bytes, Right | None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.taken = 0
        """Features that a home has fetched."""
        self.dropped = 0

    def add(self, key: bytes, right: Right | None) -> None:
        """Offer the feature under a key to its home, soon."""
        if right is None and (key in self._waiting or len(self._waiting) >= _MAX_OFFERS):
            if key not in self._waiting:
                self.dropped += 1
                # Not now: a put is in the middle of its publishing, and hooks may put.
                full = PoolFull(f"{_MAX_OFFERS} keys wait to be offered to their homes")
                self._pool.loop.call_soon(self._on_failed, full)
            return
        before = self._waiting.pop(key, None)
        if before is not None:
            before.home.give_back(before.ticket)
        self._waiting[key] = right
        if right is not None:
            self._waiting.move_to_end(key, last=False)
        if len(self._tasks) < _AT_ONCE:
            task = self._pool.loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self) -> None:
        while self._waiting:
            key, right = self._waiting.popitem(last=False)
            try:
                await self._offer(key, right)
            except CacheClosed:
                return
            except FeatcacheError as error:
                self._on_failed(error)

    async def _offer(self, key: bytes, right: Right | None) -> None:
        pool = self._pool
        if right is None and self._upstreams.home_of(key) is None:
            return  # this is its home, or there is none to be reached
        slot = pool.store.hold(key, _now())
        try:
            if slot is None or not await self._served.lookups.landed(slot):
                return
            ref, slab = pool.kept[slot.index], await self._slab()
            await slab.settled()

            async def offer(home: Home) -> bool:
                holds = right is not None and right.home is home and right.host == home.host
                ticket = right.ticket if holds and right is not None else 0
                return await home.offer(key, ticket, slab, ref)

            if await self._upstreams.ask(key, offer):
                self.taken += 1
        finally:
            if right is not None:
                right.home.give_back(right.ticket)  # no-op once its home has the feature
            if slot is not None and not pool.closed:
                pool.apply(pool.store.pay_grant(slot, _now()))

    async def close(self) -> None:
        """Offer nothing more."""
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
