"""The owner's own sessions: it reads its pools through its own mappings."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, NamedTuple

import torch

from featcache.errors import (
    BackendUnavailable,
    CacheClosed,
    FeatcacheError,
    UnknownPool,
    system_errors,
)
from featcache.memory.slab import PageWords, Unreachable
from featcache.memory.words import SessionWords
from featcache.owner.sessions import OWN_SESSION, Sessions
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.pool.refresh import comes, hear
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.hits import KeyHits
from featcache.session.offload import Offload
from featcache.session.waiting import Doorbell


class OwnPage(NamedTuple):
    """A page that is not a session's yet."""

    words: SessionWords
    fd: int
    adopted: PageWords

    @staticmethod
    def close(page: "OwnPage | None") -> None:
        """Close the descriptor; the slab still knows the words."""
        if page is not None:
            os.close(page.fd)


class OwnSession:
    """The owner's own session: it reads through its own mapping, with a page like any other's."""

    def __init__(
        self, pool: Pool, sessions: Sessions, name: str | None, number: int = OWN_SESSION
    ) -> None:
        self._pool = pool
        self._sessions = sessions
        self._name = name
        self._number = number
        self._attachment: Attachment | None = None
        self.hits: KeyHits | None = None
        """Its lookups in the key table, once it has read."""
        self._doorbell: Doorbell | None = None
        self._preparing = asyncio.Lock()

    @property
    def attached(self) -> Attachment | None:
        """The owner's attachment, once it was prepared or has read: the first read makes its page."""
        return self._attachment

    def attach(self) -> Attachment:
        """Return the owner's attachment."""
        if self._attachment is None:
            self._pool.check_open()
            with system_errors(BackendUnavailable, "the owner can't read its own pool"):
                self._attachment = self._made(self._page_made())
        return self._attachment

    async def prepare(self) -> None:
        """Attach with the page made in a thread, where a driver pins its words: in tens of milliseconds."""
        async with self._preparing:
            if self._attachment is not None:
                return
            with system_errors(BackendUnavailable, "the owner can't read its own pool"):
                made = await self._pool.offload.run(self._page_made, OwnPage.close)
                if (
                    self._attachment is not None or self._pool.closed
                ):  # a read of this loop, or the end
                    OwnPage.close(made)
                    self._pool.check_open()
                else:
                    self._attachment = self._made(made)

    def _page_made(self) -> OwnPage:
        words, fd = self._sessions.make_page()
        try:
            return OwnPage(words, fd, PageWords.adopted(self._pool.slab, words))
        except BaseException:
            os.close(fd)
            raise

    def _made(self, made: OwnPage) -> Attachment:
        pool = self._pool
        page = self._sessions.open_page(self._number, self._name, os.getpid(), made[:2])
        try:
            self._doorbell = Doorbell(os.dup(pool.recycler.eventfd))
        except BaseException:  # the next read tries again
            del pool.pages[self._number]
            page.close()
            raise
        attachment = Attachment(
            pool.pool_id, pool.words, page.words, pool.slab, made.adopted, self._doorbell.ring
        )
        attachment.covered_bytes = pool.store.limits.capacity_bytes
        attachment.why_stale = pool.store.why_stale
        attachment.hear, attachment.comes = lambda: hear(pool), partial(comes, pool)
        # Its own mapping is never behind: nothing lies in memory that it has given back.
        attachment.shrink_epoch = None
        self.hits = KeyHits(attachment, pool.key_table)
        attachment.own_writes = pool.own_writes if pool.slab.deferred else None
        return attachment

    def page(self) -> SessionPage:
        """Return the page of the owner's own session."""
        self.attach()
        return self._pool.pages[self._number]

    def forget(self) -> None:
        """Cut a forked child off."""
        if self._attachment is not None:
            self._attachment.forget()
            self.hits = None
        self.close()

    def close(self) -> None:
        """Stop accepting reads."""
        if self._attachment is not None:
            self._attachment.refuse(CacheClosed("the cache was closed"))
            self._attachment = self.hits = None
        if self._doorbell is not None:
            self._doorbell.close()


class OwnPools:
    """The `session.reader.Pools` of the owner. `relay` copies a ref to the host pool."""

    def __init__(
        self,
        offload: Offload,
        relay: Callable[[FeatureRef], Awaitable[FeatureRef]],
        sessions: Sessions,
        name: str | None,
    ) -> None:
        """`sessions` knows whether other hosts can be reached; `name` is the owner's own."""
        self._offload = offload
        self._sessions = sessions
        self._name = name
        self._pools: dict[bytes, OwnSession] = {}
        self.relay = relay

    def add(self, pool_id: bytes, own: OwnSession) -> None:
        """Read this pool too."""
        self._pools[pool_id] = own

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return the owner's attachment; None of another host's, to be brought. Others are unknown to it."""
        own = self._pools.get(ref.pool_id)
        if own is None:
            if self.is_far(ref):
                return None
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}: read it with a client")
        return own.attach()

    def has(self, ref: FeatureRef) -> bool:
        """Whether the owner has read this pool before: only then any thread may."""
        own = self._pools.get(ref.pool_id)
        return own is not None and own.attached is not None

    def check(self, ref: FeatureRef) -> None:
        """No-op: own pools can't be lost."""

    async def open(self, ref: FeatureRef) -> Attachment:
        """As `peek`, of a pool of its own."""
        attachment = self.peek(ref)
        if attachment is None:
            raise UnknownPool(f"the ref is of pool {ref.pool_id.hex()}: read it with a client")
        return attachment

    def is_far(self, ref: FeatureRef) -> bool:
        """Whether a ref is of another host, which this owner reaches."""
        if self._sessions.far is None or ref.pool_id in self._pools:
            return False
        return bool(ref.address)

    async def bring(self, ref: FeatureRef) -> FeatureRef:
        """Fetch another host's feature; return a ref of it here."""
        return await self._sessions.reach.bring(ref, OWN_SESSION, self._name)

    async def end_far(
        self, ref: FeatureRef, command: Literal["release", "discard"]
    ) -> FeatureRef | None:
        """Have a read paid, or all discarded; return the ref here that is to be paid instead, if any."""
        reach = self._sessions.reach
        if command == "release":
            return await reach.release(ref, OWN_SESSION, self._name)
        await reach.discard(ref)
        return None

    def pay_copy(self, copied: FeatureRef) -> None:
        """Pay a relay's copy that nobody is going to get, if the pools are open."""
        with contextlib.suppress(FeatcacheError):
            attachment = self.peek(copied)
            if attachment is not None:
                attachment.pay(copied)

    async def reach(self, attachment: Attachment, device: torch.device | None) -> bool:
        """Enable another device of this process for the slab."""
        if device is None:
            return True
        try:
            await self._offload.run(lambda: attachment.mapping.enable_device(device))
        except Unreachable:
            return False
        return True
