"""A reader's side of other hosts: each feature is fetched once, for all sessions of this owner."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final

from featcache.control.peer import SessionState
from featcache.core.slots import SlotState
from featcache.errors import CacheClosed, KeyNotFound, OwnerLost
from featcache.owner.home import Home, Pins
from featcache.owner.homes import Homes
from featcache.owner.landing import Landing, There
from featcache.owner.registered import RegisteredSlab
from featcache.owner.served_pool import ServedPool
from featcache.reach import messages
from featcache.reach.messages import Place
from featcache.ref import FeatureRef

_now: Final = time.monotonic
_PREFIX: Final = b"\xff\x00featcache.far\x00"
"""Of the keys under which features of other hosts are kept: no text's, and no content key's."""
_MAX_COPIES: Final = 1 << 16


class Turn:
    """The calls of one session for one feature, of which one at a time asks the home."""

    def __init__(self) -> None:
        self.lock, self.calls = asyncio.Lock(), 0


class Copy:
    """One feature of another host, as far as it is here.

    ::

        (no entry) ──`bring`──→ FETCHING ──its bytes are here──→ KEPT under a key, with a share of it
                                    │                            for each session that asked
                                    └──fails, or nobody waits    KEPT ──evicted──→ (fetched anew)
                                       for it any more           KEPT ──its home's ref ended──→ OVER: the
                                                                 shares live until they are read
    """

    def __init__(self, place: Place, home: str) -> None:
        self.place = place
        self.home = home
        self.key = _PREFIX + place.pool + place.slot.to_bytes(8, "little")
        self.key += place.generation.to_bytes(8, "little")
        self.given: dict[int, FeatureRef] = {}
        """The refs of its shares, by the session that each is for."""
        self.asking: dict[int, Turn] = {}
        self.task: asyncio.Task[None] | None = None
        self.waiting = 0
        self.over = False


class FarReads:
    """Refs of other hosts, made refs of this owner's pool."""

    def __init__(
        self,
        served: ServedPool,
        homes: Homes,
        slab: Callable[[], Awaitable[RegisteredSlab]],
        landing: Landing,
    ) -> None:
        self._served = served
        self._pool = served.pool
        self._homes = homes
        self._slab = slab
        self._landing = landing
        self._copies: OrderedDict[Place, Copy] = OrderedDict()
        self._begun: dict[int, list[tuple[Home, Place]]] = {}
        """Reads of sessions that are ending, which are paid if they died."""
        self._closed = False
        self.fetched = self.fetched_bytes = self.failed = 0
        homes.on_gone = self._ended
        homes.on_lost = self._lost

    # --- calls ----------------------------------------------------------------------------------------

    async def bring(self, ref: FeatureRef, session: int, name: str | None) -> FeatureRef:
        """Return a ref of this pool with the bytes of another host's, which owes this session's read.

        The read that is owed at home is paid. Asked again, for the same session, it is the same ref.

        Raises:
            OwnerLost: the home is gone, or does not answer in time.
            AttachRefused: the home has another cluster key, or refuses for another reason.
            StaleRef, MalformedRef, UnknownPool: as the home says.
            PoolFull, FeatureTooLarge: there is no room here.

        """
        self._check_open()
        self._pool.store.check_size(ref.nbytes)
        copy = self._copy(ref)
        turn = copy.asking.setdefault(session, Turn())
        turn.calls += 1
        try:
            async with turn.lock:
                if session not in copy.given:
                    copy.given[session] = await self._brought(copy, ref, session, name)
                return copy.given[session]
        finally:
            turn.calls -= 1
            if not turn.calls:
                copy.asking.pop(session, None)

    async def _brought(
        self, copy: Copy, ref: FeatureRef, session: int, name: str | None
    ) -> FeatureRef:
        home, found = await self._looked(ref, session, name)
        pins, done = home.pins, False
        try:
            while (local := await self._share(copy)) is None:
                await self._join(copy, pins, ref, found)
            done = True
        finally:
            if done:
                home.pay(copy.place, session, name)
            elif self._is_active(session):
                home.drop(copy.place, session)
            else:  # its socket is gone: whether it died is yet to be known
                self._begun.setdefault(session, []).append((home, copy.place))
        return local

    async def _looked(
        self, ref: FeatureRef, session: int, name: str | None
    ) -> tuple[Home, messages.Found]:
        """Look a ref up at its home; again, once, if the connection was found to be broken already."""
        slab, home = await self._slab(), await self._homes.home(ref)
        link = home.link
        try:
            return home, await home.look(ref, session, name, slab)
        except OwnerLost:
            if not link.is_broken:
                raise
        home = await self._homes.home(ref)
        return home, await home.look(ref, session, name, slab)

    async def release(self, ref: FeatureRef, session: int, name: str | None) -> FeatureRef | None:
        """Pay a session's read at its home; or return the ref here that stands for it, to be paid."""
        self._check_open()
        copy = self._copies.get(_place(ref))
        if copy is not None and session in copy.given:
            return copy.given[session]
        await (await self._homes.home(ref)).release(ref, session, name)
        return None

    async def discard(self, ref: FeatureRef) -> None:
        """Cancel what a ref owes, at its home and here."""
        self._check_open()
        await (await self._homes.home(ref)).discard(ref)
        copy = self._copies.pop(_place(ref), None)
        if copy is not None:
            self._drop_key(copy)
            for given in copy.given.values():
                self._served.sessions.discard_unsent(given)

    def session_ended(self, session: int, name: str | None, *, died: bool) -> None:
        """Take back what was made for a session; if it died, pay what it had begun, and tell of its name."""
        for copy in self._copies.values():
            given = copy.given.pop(session, None)
            if given is not None:
                self._served.sessions.discard_unsent(given)
        for home, place in self._begun.pop(session, ()):
            if died:
                home.pay(place, session, name)
            else:
                home.drop(place, session)
        if died and name is not None:
            self._homes.name_lost(name)

    def _is_active(self, session: int) -> bool:
        peer = self._served.server.sessions.get(session)
        return peer is None or peer.state is SessionState.ACTIVE  # the owner's own is no peer

    # --- copies ---------------------------------------------------------------------------------------

    def _copy(self, ref: FeatureRef) -> Copy:
        place = _place(ref)
        copy = self._copies.get(place)
        if copy is None:
            copy = self._copies[place] = Copy(place, ref.address)
        self._copies.move_to_end(place)
        for old in list(islice(self._copies.values(), 2)):
            if old is not copy and (self._is_done(old) or len(self._copies) > _MAX_COPIES):
                del self._copies[old.place]
        return copy

    def _is_done(self, copy: Copy) -> bool:
        """Whether nothing is left of it here."""
        if copy.task is not None or copy.asking or copy.key in self._pool.store.directory:
            return False
        return all(not self._lives(ref) for ref in copy.given.values())

    def _lives(self, ref: FeatureRef) -> bool:
        slot = self._pool.store.table.find(ref.slot, ref.generation)
        return slot is not None and slot.state is SlotState.PUBLISHED

    async def _share(self, copy: Copy) -> FeatureRef | None:
        """Return a share of a feature that is here, for one read."""
        pool, lookups = self._pool, self._served.lookups
        if copy.key not in pool.store.directory:
            return None
        ttl_s = pool.settings.ttl
        shared = lookups.share_now(copy.key, 1, ttl_s)
        if shared is None:
            page = self._served.own.page()
            try:
                return await lookups.share(copy.key, 1, ttl_s, page, waits=False)
            except KeyNotFound:  # evicted while a slot was waited for
                return None
        return shared

    def _drop_key(self, copy: Copy) -> None:
        if not self._pool.closed:
            self._pool.apply(self._pool.store.evict(copy.key, _now()))

    def _ended(self, place: Place) -> None:
        """Recycle a copy whose ref owes nothing any more, once its readers are done."""
        copy = self._copies.get(place)
        if copy is not None and not copy.over:
            copy.over = True
            self._drop_key(copy)

    def _lost(self, address: str) -> None:
        """Keep nothing of a home that is gone but what is being read."""
        for copy in list(self._copies.values()):
            if copy.home == address:
                self._drop_key(copy)

    # --- fetching -------------------------------------------------------------------------------------

    async def _join(self, copy: Copy, pins: Pins, ref: FeatureRef, found: messages.Found) -> None:
        """Fetch it, or wait for the fetch in progress; one that nobody waits for any more is cancelled."""
        task = copy.task
        if task is None or task.done():  # as `Flights._flying`
            task = copy.task = asyncio.get_running_loop().create_task(
                self._fetch(copy, pins, ref, found)
            )
            pins.traffic.in_progress += 1
            task.add_done_callback(lambda done: self._fetch_ended(copy, pins, ref, done))
            copy.waiting = 0
        copy.waiting += 1
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not self._closed and not _is_cancelled():
                return  # by the last that waited before: begin anew
            raise
        finally:
            if copy.task is task:
                copy.waiting -= 1
                if not copy.waiting and not task.done():
                    copy.task = None
                    task.cancel()

    def _fetch_ended(
        self, copy: Copy, pins: Pins, ref: FeatureRef, task: "asyncio.Task[None]"
    ) -> None:
        if copy.task is task:
            copy.task = None
        pins.traffic.in_progress -= 1
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self.failed += 1
            pins.traffic.failed += 1
        if error is not None:
            self._landing.news.failed(pins.address, ref.nbytes, error)

    async def _fetch(self, copy: Copy, pins: Pins, ref: FeatureRef, found: messages.Found) -> None:
        there = There(ref.nbytes, found.address, found.pieces, ref.specs, found.memory)
        await self._landing.land(pins, there, copy.key)
        self.fetched += 1
        self.fetched_bytes += ref.nbytes

    # --- the end --------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("the cache was closed")

    async def close(self) -> None:
        """End all fetches."""
        self._closed = True
        tasks = [copy.task for copy in self._copies.values() if copy.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _place(ref: FeatureRef) -> Place:
    return Place(ref.pool_id, ref.slot, ref.generation)


def _is_cancelled() -> bool:
    caller = asyncio.current_task()
    return caller is not None and caller.cancelling() > 0
