"""Session admission and teardown; settles the reads of dead peers."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from featcache.control.credentials import own_pidfd
from featcache.control.messages import VERSION, Welcome
from featcache.control.peer import Peer
from featcache.control.turns import LEAVE_UNITS, QUANTUM_UNITS
from featcache.core.effects import Effect
from featcache.core.keyed_store import KeyedStore
from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    MalformedRef,
    StaleRef,
    UnknownPool,
    system_errors,
)
from featcache.memory.slab import Segment
from featcache.memory.words import Parting, SessionWords
from featcache.pool.page import SessionPage
from featcache.pool.pool import Pool
from featcache.ref import FeatureRef

if TYPE_CHECKING:
    from featcache.owner.far_reads import FarReads
    from featcache.owner.relay import Relay

OWN_SESSION = 0
"""The number of the owner's own session, which reads through the owner's mapping."""
_STEPS: Final = 32
"""Steps of a session's end whose effects are carried out together."""
RELAY_SESSION = -1
"""The number of the session that pins features while they are copied for others: the owner's own session
may have paid its read of them."""


class Sessions:
    """Admits sessions to a pool, folds their payments when they end, pays for those that died."""

    def __init__(self, pool: Pool, own_name: str | None) -> None:
        self._pool = pool
        self._own_name = pool.attendance.own_name = own_name
        self.pidfd = own_pidfd()
        self.through_host: Relay | None = None
        """Copies for sessions that can't reach the slab; a pool in host memory has none."""
        self.far: FarReads | None = None
        """Refs of other hosts; None of a pool that reaches none."""
        self.siblings: list[Pool] = []
        """The owner's other pools: the reads that a dead name owed there are paid as well."""
        self.spills = False
        """Whether puts may go to the other pool."""
        self.readers_lost = 0
        self.discarded = 0
        self.settling = 0
        """Sessions whose end is not done yet."""

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
        session.posts = page.posts
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
            endpoint=pool.ref_endpoint,
            grants=pool.settings.grants,
            message_bytes=pool.settings.message_bytes,
            tensors=pool.settings.tensors,
            readers=pool.settings.readers,
        )
        own = [self.pidfd, pool.words_fd, page.fd, pool.recycler.eventfd]
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

    @property
    def reach(self) -> "FarReads":
        """What leads to other hosts, or raise UnknownPool."""
        if self.far is None:
            raise UnknownPool(
                "the ref is of a pool of another host, and this owner reaches none: "
                "create(cluster_key=…)"
            )
        return self.far

    def make_page(self) -> tuple[SessionWords, int]:
        """Make the words of a page, and their descriptor. Safe in any thread."""
        return SessionWords.create(self._pool.store.limits.slots, self._pool.settings.grants)

    def open_page(
        self, number: int, name: str | None, pid: int, made: tuple[SessionWords, int] | None = None
    ) -> SessionPage:
        """Make the page of a session, unless it is `made`, and begin to poll it."""
        words, fd = made or self.make_page()
        page = self._pool.pages[number] = SessionPage(number, name, words, fd, pid)
        return page

    def quarantine(self, session: Peer) -> None:
        """Release the claims of a session without its socket: it could not publish what it makes."""
        self._pool.turn.do_all(self._unclaiming(session.number))

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

    def _unclaiming(self, session: int) -> Iterator[None]:
        store = self._pool.store
        claims = store.key_waiters.claims_of(session)
        yield from self._carry_out(
            self._pool, (store.release_claim(key, claim) for key, claim in claims)
        )

    async def settled(self) -> None:
        """Return when every session that ended is settled."""
        while self.settling:  # noqa: ASYNC110 - a turn of the loop is what it takes
            await asyncio.sleep(0)

    def end(self, session: Peer, ended: Callable[[int], object], *, died: bool) -> None:
        """Fold a session's page; if its process died, pay the reads it had begun and those its name owed.

        In pieces, if there is much to do; then `ended` is called with the reads that were paid so.
        """
        self.settling += 1
        self._pool.turn.do_all(self._ending(session, ended, died=died))

    def _ending(
        self, session: Peer, ended: Callable[[int], object], *, died: bool
    ) -> Iterator[None]:
        paid = 0
        try:
            paid = yield from self._settle(session, died=died)
        except Exception as error:  # noqa: BLE001 - a fault of featcache's own, which is told
            self._drop(session, error)
        finally:
            self.settling -= 1  # whatever failed: `settled`, and so the close, waits for this
        ended(paid)

    def _drop(self, session: Peer, error: Exception) -> None:
        """End a session whose settlement failed: its name and place are free, the fault is told.

        It reads nothing any more. A read that it owed and that is not paid by now waits for its ttl.
        """
        pool, page = self._pool, self._pool.pages.pop(session.number, None)
        if page is not None:
            # Whatever failed, its grants and its slots keep nothing any more; each is tried.
            for steps in (
                self._grants_paid(page, time.monotonic()),
                pool.abandon_writes_by_steps(page),
            ):
                with contextlib.suppress(Exception):  # the first fault is told
                    for effects in steps:
                        pool.apply(effects)
            page.close()
        pool.loop.call_exception_handler(
            {
                "message": f"featcache: the end of session {session.number} could not be settled",
                "exception": error,
            }
        )

    def _settle(self, session: Peer, *, died: bool) -> Generator[None, None, int]:
        pool, turn, now_s = self._pool, self._pool.turn, time.monotonic()
        page = pool.pages[session.number]
        turn.left -= LEAVE_UNITS
        # First, so that nothing is evicted for its own waiting puts.
        yield from self._carry_out(pool, pool.store.end_session_by_steps(session.number, now_s))
        # Their tasks are gone before its page is: none is given a slot that nobody would free.
        yield from session.end_tasks(turn)
        while pool.collector.counts_more(page):
            yield
        pool.attendance.ended(page, died=died)
        if self.far is not None:
            self.far.session_ended(page.session, page.name, died=died)
        paid = self._fold_lookups(page, died=died)
        yield from self._carry_out(pool, self._grants_paid(page, now_s))
        yield from self._carry_out(pool, pool.abandon_writes_by_steps(page))
        if died:
            paid += yield from self._paying_for(page, now_s, named=not session.name_passed_on)
            self.readers_lost += 1
        pool.uses.count_of(page, pool.store.table)
        pool.uses.fold(page, pool.store.recency.tick)
        del pool.pages[session.number]
        page.close()
        if not pool.closed:
            pool.collect()  # the slots that the session had pinned can go now
        return paid

    def _fold_lookups(self, page: SessionPage, *, died: bool) -> int:
        """Fold what a session counted in its page; return the reads by key that end with its death."""
        store, (hits, misses), out = self._pool.store, page.own_lookups, page.leases_out
        store.hits += hits
        store.misses += misses
        store.reads_paid += max(0, hits - out)
        return len(page.grants) + out if died else 0

    def _grants_paid(self, page: SessionPage, now_s: float) -> Iterator[list[Effect]]:
        while page.grants:
            grant = next(iter(page.grants.values()))
            yield self._pool.store.pay_grant(page.revoke(grant).slot, now_s)

    def _paying_for(
        self, page: SessionPage, now_s: float, *, named: bool
    ) -> Generator[None, None, int]:
        """Pay the reads that a dead session had begun, and if `named` those that its name owed.

        Returns how many.
        """
        pool, paid = self._pool, [0]

        def begun() -> Iterator[list[Effect]]:
            for index, generation in page.held_of(pool.store.table.in_use()):
                owed = pool.store.table.slots[index].reads_left
                yield pool.store.pay(index, generation, page.session, page.name, now_s)
                paid[0] += max(0, owed - pool.store.table.slots[index].reads_left)

        def owed_in(store: KeyedStore, name: str) -> Iterator[list[Effect]]:
            for index, generation in store.owed_by(name):
                waived = store.waive_read(index, generation, name, now_s)
                paid[0] += waived is not None
                yield waived or []

        pool.turn.left -= QUANTUM_UNITS  # all slots are gone over
        yield
        yield from self._carry_out(pool, begun())
        if named and page.name is not None:
            for each in [pool, *self.siblings]:
                pool.turn.left -= QUANTUM_UNITS
                yield
                each.collect()  # what it paid itself is not paid for it
                yield from self._carry_out(each, owed_in(each.store, page.name))
        return paid[0]

    @staticmethod
    def _carry_out(pool: Pool, steps: Iterator[list[Effect]]) -> Iterator[None]:
        """Carry out the effects of steps, many at once; it can be interrupted after each of these."""
        effects: list[Effect] = []
        for count, step in enumerate(steps, 1):
            effects += step
            if count % _STEPS == 0:
                pool.turn.left -= _STEPS
                pool.apply(effects)
                effects = []
                yield
        pool.apply(effects)

    def discard(self, index: int, generation: int, *, undoes: bool = False) -> None:
        """Cancel the reads that a ref still owes, and its key if it `undoes` the put; or raise StaleRef."""
        store, now_s = self._pool.store, time.monotonic()
        cancel = store.undo if undoes else store.revoke
        self._pool.apply(cancel(index, generation, now_s))
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

    def discard_unsent(self, ref: FeatureRef) -> None:
        """Cancel what a ref of this or the owner's other pools owes, which reached nobody."""
        for pool in (self._pool, *self.siblings):
            if pool.pool_id == ref.pool_id and not pool.closed:
                with contextlib.suppress(StaleRef):
                    pool.apply(pool.store.revoke(ref.slot, ref.generation, time.monotonic()))

    def close(self) -> None:
        """Close the owner's pidfd."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
