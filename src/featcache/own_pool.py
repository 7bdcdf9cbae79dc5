"""The owner as a reader of its own pool."""

import os

from featcache.attachment import Attachment, Bell
from featcache.errors import CacheClosed, UnknownPool
from featcache.pool import Pool
from featcache.reaper import OWN_SESSION, Reaper
from featcache.ref import FeatureRef

__all__ = ["OwnPool"]


class OwnPool:
    """The owner's own session: it reads through its own mapping, with a page like any other's."""

    def __init__(self, pool: Pool, reaper: Reaper, name: str | None) -> None:
        self._pool = pool
        self._reaper = reaper
        self._name = name
        self._attachment: Attachment | None = None
        self._bell: Bell | None = None

    def peek(self, ref: FeatureRef) -> Attachment:
        """Return the owner's attachment; any other pool is unknown to it."""
        if ref.pool_id != self._pool.pool_id:
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}: read it with a client")
        if self._attachment is None:
            self._attachment = self._attach()
        return self._attachment

    def has(self, ref: FeatureRef) -> bool:
        """Whether the owner has read this pool before; the first read makes its page, in the loop."""
        return self._attachment is not None and ref.pool_id == self._pool.pool_id

    async def open(self, ref: FeatureRef) -> Attachment:
        """As `peek`, which never says that something is yet to be opened."""
        return self.peek(ref)

    def _attach(self) -> Attachment:
        pool = self._pool
        page = self._reaper.open_page(OWN_SESSION, self._name)
        self._bell = Bell(os.dup(pool.recycler.eventfd))
        return Attachment(pool.pool_id, pool.words, page.words, pool.slab, self._bell.ring)

    def forget(self) -> None:
        """Cut a forked child off."""
        if self._attachment is not None:
            self._attachment.forget()
        self.close()

    def close(self) -> None:
        """Read no more."""
        if self._attachment is not None:
            self._attachment.refuse(CacheClosed("the cache was closed"))
            self._attachment = None
        if self._bell is not None:
            self._bell.close()
