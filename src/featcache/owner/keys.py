"""The directory of a served pool: lookups that grant reads, waits for keys, claims, pins."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from featcache.core.key_queue import KeyWaiter
from featcache.core.put_queue import Request
from featcache.core.slots import Slot, SlotState
from featcache.errors import PoolFull
from featcache.pool.page import Grant, SessionPage
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef
from featcache.session.arguments import not_found
from featcache.session.single_flight import Command

if TYPE_CHECKING:
    from featcache.owner.key_sources import KeySources

_now = time.monotonic
_POLL_S: Final = 1e-3
"""Bytes that a stream is to bring are looked for so often, as the recycler does meanwhile."""
_NO_ROOM: Final = Request(0, 0, None)
"""What a share needs besides its slot."""


class Granted(NamedTuple):
    """A read granted by key, and the ref of its feature."""

    grant: Grant
    ref: FeatureRef


class Claim(NamedTuple):
    """The right and duty to make a key's feature, until it is released."""

    key: bytes
    number: int


class Lookups:
    """The directory for the owner's own session and all others; all of it in the loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.sources: KeySources | None = None
        """Where a key may be that is not here; asked after a miss."""
        self.forget_below: Callable[[bytes], bool] | None = None
        """Told of each key that is evicted by name; returns whether there was more of it, below the pool."""

    def find(self, key: bytes, page: SessionPage) -> Granted | None:
        """Grant a read of the feature under a key, or return None.

        Raises:
            PoolFull: the session has as many leases out as it may.

        """
        pool = self._pool
        if not page.can_grant:
            pool.collect()
            if not page.can_grant and key in pool.store.directory:
                page.check_can_grant()
        slot = pool.store.lookup(key, _now())
        pool.tell_tick()
        return None if slot is None else Granted(page.grant(slot), pool.kept[slot.index])

    async def find_elsewhere(self, key: bytes, page: SessionPage) -> Granted:
        """Return a read of a key that `find` did not find, once a source has brought it; or KeyNotFound."""
        if self.sources is None:
            raise not_found(key)
        return await self.sources.find(key, page)

    async def wait_for_key(
        self, key: bytes, page: SessionPage, *, can_make: bool, waits: bool = True
    ) -> Granted | Claim:
        """As `wait_here`, and as the sources have it, if there are any (`KeySources.wait_for_key`)."""
        if self.sources is None:
            return await self.wait_here(key, page, can_make=can_make)
        return await self.sources.wait_for_key(key, page, can_make=can_make, waits=waits)

    async def wait_here(self, key: bytes, page: SessionPage, *, can_make: bool) -> Granted | Claim:
        """Wait for a key under which there is nothing yet; or get the claim, if it `can_make` it.

        Raises:
            PoolFull: too many wait already, or too many leases of the session are out.
            CacheClosed: the cache was closed.

        If cancelled, a grant or claim that was handed over meanwhile goes to the next waiter.
        """
        pool = self._pool
        pool.check_open()
        if key in pool.store.directory and (found := self.find(key, page)) is not None:
            return found  # it came between the caller's lookup and this
        future: asyncio.Future[None] = pool.loop.create_future()
        waiter = pool.store.wait_for_key(key, page.session, can_make=can_make, tag=future)
        if waiter.claim:  # chosen at once
            pool.store.take(waiter)
            return Claim(key, waiter.claim)
        try:
            await future
            return self._taken(waiter, page)
        finally:
            if not pool.closed:
                pool.apply(pool.store.cancel_wait(waiter, _now()))

    def _taken(self, waiter: KeyWaiter, page: SessionPage) -> Granted | Claim:
        """Finish the handshake.

        No other task may run between `take` and the reply or the read: until then the grant is the
        store's, and `cancel_wait` passes it on; from then on it is the session's to end.
        """
        self._pool.check_open()
        if waiter.slot is not None and not page.can_grant:
            self._pool.collect()
            page.check_can_grant()
        slot = self._pool.store.take(waiter)
        if slot is None:
            return Claim(waiter.key, waiter.claim)
        return Granted(page.grant(slot), self._pool.kept[slot.index])

    def share_now(
        self, key: bytes, readers: int | frozenset[str], ttl_s: float | None
    ) -> FeatureRef | None:
        """Return a share of the feature under a key, if there is one and nothing need be waited for."""
        pool, store = self._pool, self._pool.store
        slot = store.directory.find(key)
        if (
            slot is None
            or not store.table.free_slots
            or pool.words.published[slot.index] != slot.generation
        ):
            return None
        store.lookup(key, _now())
        return pool.share(slot, readers, ttl_s)

    async def share(
        self,
        key: bytes,
        readers: int | frozenset[str],
        ttl_s: float | None,
        page: SessionPage,
        *,
        waits: bool,
    ) -> FeatureRef:
        """Return a share of the feature under a key once its bytes are there; KeyNotFound if none is.

        If it `waits`, that is once there is a feature.

        Raises:
            PoolFull: all slots are in use, and none can be made free; or as `wait_for_key`.

        """
        pool = self._pool
        while True:
            slot = await self._look_up_for_share(key, page, waits=waits)
            shared = False
            try:
                if await self.landed(slot):
                    await self._free_a_slot()
                    ref = pool.share(slot, readers, ttl_s)
                    shared = True
                    return ref
                # Its writer died before its bytes came, and the key went with it: look again.
            finally:
                if not shared and not pool.closed:
                    pool.apply(pool.store.pay_grant(slot, _now()))

    async def _look_up_for_share(self, key: bytes, page: SessionPage, *, waits: bool) -> Slot:
        """Return the slot under a key, with a grant on it that is the caller's."""
        slot = self._pool.store.lookup(key, _now())
        if slot is not None:
            return slot
        if waits:
            found = await self.wait_for_key(key, page, can_make=False)
        else:
            found = await self.find_elsewhere(key, page)
        assert isinstance(found, Granted), "only a waiter that can make it is given a claim"
        return page.revoke(found.grant).slot

    async def landed(self, slot: Slot) -> bool:
        """Return once the bytes of a granted slot are there, or False once they never will be."""
        pool = self._pool
        while pool.words.published[slot.index] != slot.generation:
            if slot.state is not SlotState.PUBLISHED:
                return False
            await asyncio.sleep(_POLL_S)
            pool.check_open()
        return True

    async def _free_a_slot(self) -> None:
        """Return once a slot is free, recycling and evicting as a put would; or raise PoolFull."""
        pool, store = self._pool, self._pool.store
        if store.table.full:
            pool.collect()
        if store.table.full and store.ahead:
            pool.ahead.take_back()  # before anything is evicted for it
        while store.table.full:
            comes = pool.collector.behind
            if not comes and not store.queue.count:
                if pool.collector.make_room(_NO_ROOM, 1):
                    continue
                # The coldest is looked for, behind many that were used; or is being copied to a tier.
                comes = store.evicting.is_searching or bool(store.demoting)
            if not comes:
                raise PoolFull(
                    f"all {store.table.count} slots are in use: {pool.debtors.holders()}"
                )
            await pool.turn.wait()
            pool.check_open()

    def is_claimed(self, key: bytes) -> bool:
        """Whether a claim to make this key is out."""
        return self._pool.store.key_waiters.claimed(key)

    def release_claim(self, claim: Claim) -> None:
        """End a claim: its feature was published, or the next waiter is to make it."""
        if not self._pool.closed:
            self._pool.apply(self._pool.store.release_claim(claim.key, claim.number))

    def return_lease(self, page: SessionPage, grant: Grant) -> None:
        """Count a grant that was never taken as paid."""
        if not self._pool.closed and page.grants.get(grant.index) is grant:
            page.revoke(grant)
            self._pool.apply(self._pool.store.pay_grant(grant.slot, _now()))

    def contains_many(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether each of these keys is there."""
        self._pool.check_open()
        directory = self._pool.store.directory
        return [key in directory for key in keys]

    def command(self, command: Command, key: bytes, session: int) -> bool:
        """Do this to a key; return whether it was there. KeyNotFound of pin and unpin if it was not."""
        pool, store = self._pool, self._pool.store
        if command == "contains":
            return key in store.directory
        if command == "evict":
            effects = store.evict(key, _now())
            pool.apply(effects)
            was_below = self.forget_below is not None and self.forget_below(key)
            return bool(effects) or was_below
        if command == "pin":
            store.pin(key, session)
        else:
            store.unpin(key, session)
            if store.queue:
                pool.collect()  # a put that waits may evict it now
        pool.apply(())  # pinned bytes change the pressure
        return True
