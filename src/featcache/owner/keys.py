"""The directory of a pool in service: lookups that grant reads, those that wait, claims, pins."""

import asyncio
from typing import NamedTuple

import anyio

from featcache.core.key_queue import KeyWaiter
from featcache.core.keyed_store import key_label
from featcache.core.slots import Slot
from featcache.errors import KeyNotFound
from featcache.owner.own_session import OwnSession
from featcache.owner.sessions import OWN_SESSION
from featcache.pool.page import Grant, SessionPage
from featcache.pool.pool import Pool, now
from featcache.ref import FeatureRef
from featcache.session.arguments import key_timeout
from featcache.session.lease import KeyLease, MakeClaim


class Granted(NamedTuple):
    """A read given out by key, and what it reads."""

    grant: Grant
    ref: FeatureRef


class Claim(NamedTuple):
    """The right, and the duty, to make what a key stands for, until it is given back."""

    key: bytes
    number: int


def not_found(key: bytes) -> KeyNotFound:
    """Return the error of a key under which there is nothing."""
    hint = ": was a ref's bytes meant? FeatureRef.from_bytes" if key.startswith(b"fR\x01") else ""
    return KeyNotFound(f"no feature is kept under {key_label(key)[:64]!r}{hint}")


class Lookups:
    """What owner and sessions ask of the directory; all of it in the loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def find(self, key: bytes, page: SessionPage) -> Granted | None:
        """Return a read of what is under a key, or None.

        Raises:
            PoolFull: the session has as many reads by key out as it may.

        """
        pool = self._pool
        if not page.can_grant:
            pool.collect()
            if not page.can_grant and key in pool.store.directory:
                page.check_can_grant()
        slot = pool.store.lookup(key, now())
        return None if slot is None else self._granted(slot, page)

    def _granted(self, slot: Slot, page: SessionPage) -> Granted:
        return Granted(page.grant(slot), self._pool.kept[slot.index])

    async def wait_for_key(self, key: bytes, page: SessionPage, *, makes: bool) -> Granted | Claim:
        """Wait for a key under which there is nothing yet; or be chosen, if that `makes`, to make it.

        Raises:
            PoolFull: too many wait already, or too many reads of the session are out.
            CacheClosed: the cache was closed.

        If cancelled, what was handed over meanwhile goes to the next who waits.
        """
        pool = self._pool
        if key in pool.store.directory and (found := self.find(key, page)) is not None:
            return found  # it came between the caller's look and this
        future: asyncio.Future[None] = pool.loop.create_future()
        waiter = pool.store.wait_for_key(key, page.session, can_make=makes, tag=future)
        if waiter.claim:  # chosen at once
            pool.store.take(waiter)
            return Claim(key, waiter.claim)
        try:
            await future
            return self._taken(waiter, page)
        finally:
            if not pool.closed:
                pool.apply(pool.store.cancel_wait(waiter, now()))

    def _taken(self, waiter: KeyWaiter, page: SessionPage) -> Granted | Claim:
        """Finish the handshake. No other task runs between this and the reply or the read."""
        self._pool.check_open()
        if waiter.slot is not None and not page.can_grant:
            self._pool.collect()
            page.check_can_grant()
        slot = self._pool.store.take(waiter)
        return Claim(waiter.key, waiter.claim) if slot is None else self._granted(slot, page)

    def is_claimed(self, key: bytes) -> bool:
        """Whether somebody makes what a key stands for."""
        return self._pool.store.key_waiters.claimed(key)

    def release_claim(self, claim: Claim) -> None:
        """End a claim: its feature was published, or will not be and another is to make it."""
        if not self._pool.closed:
            self._pool.apply(self._pool.store.release_claim(claim.key, claim.number))

    def return_lease(self, page: SessionPage, grant: Grant) -> None:
        """Count a grant as paid that nobody took."""
        if not self._pool.closed and page.grants.get(grant.index) is grant:
            page.revoke(grant)
            self._pool.apply(self._pool.store.pay_grant(grant.slot, now()))

    # --- what is done to a key --------------------------------------------------------------------

    def contains(self, key: bytes) -> bool:
        """Whether there is something under a key. No use of it."""
        return key in self._pool.store.directory

    def evict(self, key: bytes) -> bool:
        """Drop a key; return whether it was there."""
        effects = self._pool.store.evict(key, now())
        self._pool.apply(effects)
        return bool(effects)

    def pin(self, key: bytes, session: int) -> None:
        """Keep a key from being evicted, or raise KeyNotFound."""
        self._pool.store.pin(key, session)
        self._pool.apply(())  # what is pinned presses

    def unpin(self, key: bytes, session: int) -> None:
        """Take back a pin, or raise KeyNotFound. Who waits for room may now get it."""
        self._pool.store.unpin(key, session)
        if self._pool.store.queue:
            self._pool.collect()
        self._pool.apply(())


class OwnerKeys:
    """`reads.Keys` of the process that has the directory itself."""

    def __init__(self, lookups: Lookups, own: OwnSession) -> None:
        self._lookups = lookups
        self._own = own

    def _page(self) -> SessionPage:
        return self._own.page()

    def _read(self, granted: Granted) -> KeyLease:
        grant, ref = granted
        return KeyLease(self._own.attach(), ref, grant.index, grant.serial)

    async def find(self, key: bytes, timeout_s: float | None) -> KeyLease:
        """Return a read of what is under a key; with a timeout, wait for it that long."""
        granted = self._lookups.find(key, self._page())
        if granted is not None:
            return self._read(granted)
        if timeout_s is None:
            raise not_found(key)
        try:
            with anyio.fail_after(timeout_s):
                found = await self._lookups.wait_for_key(key, self._page(), makes=False)
        except TimeoutError:
            raise key_timeout(key_label(key), timeout_s) from None
        assert isinstance(found, Granted), "only who makes is given a claim"
        return self._read(found)

    async def find_or_claim(self, key: bytes, *, waits: bool) -> KeyLease | MakeClaim:
        """Return a read, once there is something, or the right to make it."""
        found: Granted | Claim | None = self._lookups.find(key, self._page())
        if found is None:
            if not waits and self._lookups.is_claimed(key):
                raise not_found(key)
            found = await self._lookups.wait_for_key(key, self._page(), makes=True)
        if not isinstance(found, Claim):
            return self._read(found)
        claim = found
        return MakeClaim(lambda: self._lookups.release_claim(claim))

    async def contains(self, key: bytes) -> bool:
        """Whether there is something under a key."""
        return self._lookups.contains(key)

    async def evict(self, key: bytes) -> bool:
        """Drop a key; return whether it was there."""
        return self._lookups.evict(key)

    async def pin(self, key: bytes) -> None:
        """Keep a key from being evicted."""
        self._lookups.pin(key, OWN_SESSION)

    async def unpin(self, key: bytes) -> None:
        """Take back a pin."""
        self._lookups.unpin(key, OWN_SESSION)
