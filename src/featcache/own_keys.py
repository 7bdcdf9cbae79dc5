"""The directory as its owner uses it."""

import anyio

from featcache.asks import key_timeout
from featcache.core.keyed_store import key_label
from featcache.granted import GrantedRead, Making
from featcache.lookups import Claim, Granted, Lookups, not_found
from featcache.own_pool import OwnPool
from featcache.page import Page
from featcache.reaper import OWN_SESSION

__all__ = ["OwnKeys"]


class OwnKeys:
    """`reads.Keys` of the process that has the directory itself."""

    def __init__(self, lookups: Lookups, own: OwnPool) -> None:
        self._lookups = lookups
        self._own = own

    def _page(self) -> Page:
        return self._own.page()

    def _read(self, granted: Granted) -> GrantedRead:
        grant, ref = granted
        return GrantedRead(self._own.attach(), ref, grant.index, grant.serial)

    async def find(self, key: bytes, timeout_s: float | None) -> GrantedRead:
        """Return a read of what is under a key; with a timeout, wait for it that long."""
        granted = self._lookups.find(key, self._page())
        if granted is not None:
            return self._read(granted)
        if timeout_s is None:
            raise not_found(key)
        try:
            with anyio.fail_after(timeout_s):
                found = await self._lookups.seek(key, self._page(), makes=False)
        except TimeoutError:
            raise key_timeout(key_label(key), timeout_s) from None
        assert isinstance(found, Granted), "only who makes is given a claim"
        return self._read(found)

    async def find_or_claim(self, key: bytes, *, waits: bool) -> GrantedRead | Making:
        """Return a read, once there is something, or the right to make it."""
        found: Granted | Claim | None = self._lookups.find(key, self._page())
        if found is None:
            if not waits and self._lookups.is_claimed(key):
                raise not_found(key)
            found = await self._lookups.seek(key, self._page(), makes=True)
        if not isinstance(found, Claim):
            return self._read(found)
        claim = found
        return Making(lambda: self._lookups.unclaim(claim))

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
