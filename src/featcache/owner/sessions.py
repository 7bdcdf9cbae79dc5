"""Session admission and teardown; settles the reads of dead peers."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featcache.control.credentials import own_pidfd
from featcache.control.messages import VERSION, Welcome
from featcache.control.peer import Peer
from featcache.core.effects import Effect
from featcache.errors import AttachRefused, BackendUnavailable, MalformedRef, system_errors
from featcache.memory.slab import Segment
from featcache.memory.words import Parting, SessionWords
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef

if TYPE_CHECKING:
    from featcache.owner.relay import Relay

OWN_SESSION = 0
"""The number of the owner's own session, which reads through the owner's mapping."""
RELAY_SESSION = -1
"""The number of the session that pins features while they are copied for others: the owner's own session
may have paid its read of them."""


class Sessions:
    """Admits sessions to a pool, folds their payments when they end, pays for those that died."""

    def __init__(self, pool: Pool, own_name: str | None) -> None:
        self._pool = pool
        self._own_name = pool.attendance.own_name = own_name
        self._pidfd = own_pidfd()
        self.through_host: Relay | None = None
        """Copies for sessions that can't reach the slab; a pool in host memory has none."""
        self.siblings: list[Pool] = []
        """The owner's other pools: the reads that a dead name owed there are paid as well."""
        self.spills = False
        """Whether puts may go to the other pool."""
        self.readers_lost = 0
        self.discarded = 0

    @property
    def pool_name(self) -> str:
        """The pool's id in hex."""
        return self._pool.name

    def admit(self, session: Peer) -> tuple[Welcome, list[int]]:
        """Make a session's page; return the welcome and the descriptors that go with it."""
        pool = self._pool
        if session.name is not None and session.name == self._own_name:
            raise AttachRefused(f"the owner itself is named {session.name!r}")
        with system_errors(AttachRefused, "the owner can't make this session's page"):
            page = self.open_page(session.number, session.name, session.pid)
        limits = pool.store.limits
        welcome = Welcome(
            version=VERSION,
            pool_id=pool.pool_id,
            session=session.number,
            slots=limits.slots,
            kind=pool.slab.kind,
            device=pool.slab.device_name,
            capacity_bytes=limits.capacity_bytes,
            committed_bytes=pool.store.committed_bytes,
            shrink_epoch=pool.shrink_epoch,
            handle=pool.slab.handle,
            relays=self.through_host is not None,
            sibling_pool=self.siblings[0].pool_id if self.siblings else None,
            sibling_endpoint=self.siblings[0].endpoint if self.spills else "",
            endpoint=pool.endpoint,
            grants=pool.settings.grants,
            message_bytes=pool.settings.message_bytes,
        )
        own = [self._pidfd, pool.words_fd, page.fd, pool.recycler.eventfd]
        return welcome, own + pool.slab.descriptors()

    def segments(self) -> Sequence[Segment]:
        """Return the segments that a session is sent after its welcome."""
        return self._pool.slab.segments(0, self._pool.store.committed_bytes)

    @property
    def relays(self) -> "Relay":
        """The relay for sessions that can't reach the slab, or raise BackendUnavailable."""
        if self.through_host is None:
            raise BackendUnavailable("this pool is in host memory already: read it, and put, there")
        return self.through_host

    def open_page(self, number: int, name: str | None, pid: int) -> SessionPage:
        """Make the page of a session and begin to poll it."""
        slots, grants = self._pool.store.limits.slots, self._pool.settings.grants
        words, fd = SessionWords.create(slots, grants)
        page = self._pool.pages[number] = SessionPage(number, name, words, fd, pid)
        return page

    def quarantine(self, session: Peer) -> None:
        """Release the claims of a session without its socket: it could not publish what it makes."""
        store = self._pool.store
        for key, claim in store.key_waiters.claims_of(session.number):
            self._pool.apply(store.release_claim(key, claim))

    def is_leaving(self, session: Peer) -> bool:
        """Whether a session says in its page that it begins nothing more."""
        return self._parting(session) >= Parting.LEAVING

    def is_abandoned(self, session: Peer) -> bool:
        """Whether it says besides that it holds nothing."""
        return self._parting(session) >= Parting.ABANDONED

    def has_left(self, session: Peer) -> bool:
        """Whether it says besides that it was closed."""
        return self._parting(session) >= Parting.LEFT

    def _parting(self, session: Peer) -> int:
        page = self._pool.pages.get(session.number)
        return Parting.IN_USE if page is None else page.words.header[Parting.WORD]

    def end(self, session: Peer, *, died: bool) -> int:
        """Fold a session's page; if its process died, pay the reads it had begun and those its name owed."""
        pool, now_s = self._pool, time.monotonic()
        # First, so that nothing is evicted for its own waiting puts.
        pool.apply(pool.store.end_session(session.number, now_s))
        pool.collect()
        page = pool.pages.pop(session.number)
        pool.attendance.ended(page, died=died)
        paid, effects = 0, list[Effect]()
        for grant in list(page.grants.values()):
            effects += pool.store.pay_grant(page.revoke(grant).slot, now_s)
            paid += died
        effects += pool.abandon_writes(page)
        if died:
            for slot in pool.store.table.in_use():
                if page.holds(slot.index, slot.generation):
                    owed = slot.reads_left
                    effects += pool.store.pay(
                        slot.index, slot.generation, page.session, page.name, now_s
                    )
                    paid += owed - slot.reads_left
            if page.name is not None and not session.name_passed_on:
                waived, more = pool.store.waive_reads(page.name, now_s)
                paid += waived
                effects += more
                for other in self.siblings:
                    other.collect()  # what it paid itself is not paid for it
                    waived, more_there = other.store.waive_reads(page.name, now_s)
                    paid += waived
                    other.apply(more_there)
            self.readers_lost += 1
        page.close()
        pool.apply(effects)
        pool.collect()  # the slots that the session had pinned can go now
        return paid

    def discard(self, index: int, generation: int) -> None:
        """Cancel the reads that a ref still owes, or raise StaleRef."""
        self._pool.apply(self._pool.store.revoke(index, generation, time.monotonic()))
        self.discarded += 1
        if self._pool.store.queue:
            self._pool.collect()  # a feature under a key may be evictable now

    def discard_ref(self, ref: FeatureRef) -> None:
        """As `discard`, of a whole ref, or raise MalformedRef as a read of it does."""
        slots = self._pool.store.table.count
        if ref.slot >= slots:
            raise MalformedRef(f"slot {ref.slot} of a pool with {slots} slots")
        self._pool.find(ref)
        self.discard(ref.slot, ref.generation)

    def close(self) -> None:
        """Close the owner's pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
