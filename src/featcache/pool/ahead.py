"""Rooms ahead: slots that sessions are given before they ask, so that a put need not wait for an answer.

A session that has put a few features is given slots for the next ones, as large as the largest of the
last ones, in number and bytes bounded. It claims one by a word of its own, with no message
(`memory.words.RoomClaim`), and what it does not fill is cut off as the slot is published. What no session
has claimed is anybody's: it counts as free, is taken back at once when a put finds no room or waits, and
after a while when nobody uses it. So nobody waits, or is overtaken, for a room ahead.

Where a cache is full, room is what others leave. There a session's put that had to evict, or was made in a
room that was evicted for, has as many bytes evicted for its next one, off its path. So these rooms cost
no more than its puts would, but for those that are ahead: at most a hundred-and-twenty-eighth part of the
capacity for all together, so what is kept is hit as before. Another put evicts for itself before it takes
one of them back.
"""

import time
from typing import TYPE_CHECKING, Final

from featcache.control.rooms import Room
from featcache.control.turns import FRAME_UNITS
from featcache.core.put_queue import Request
from featcache.core.slots import Slot
from featcache.memory.words import RoomClaim, fence_full
from featcache.pool.page import SessionPage

if TYPE_CHECKING:
    from featcache.core.effects import Effect
    from featcache.pool.pool import Pool
    from featcache.pool.writer import OwnerWriter

_now: Final = time.monotonic
_OPEN: Final = RoomClaim.OPEN
_LEAST_PUTS: Final = 2
"""Puts of a session after which it is given room ahead."""
_SESSION_SHARE: Final = 32
"""The part of the capacity, as a divisor, that one session has ahead at most."""
_SHARE: Final = 8
"""The part that all have ahead together."""
_MADE_SHARE: Final = 128
"""The part that all have ahead together when more is evicted for; one session may have half of it."""


class RoomsAhead:
    """The rooms ahead of all sessions of one pool. Each session's are in its page."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        capacity_bytes = pool.store.limits.capacity_bytes
        self._session_bytes = capacity_bytes // _SESSION_SHARE
        self._most_bytes = capacity_bytes // _SHARE
        self._made_bytes = capacity_bytes // _MADE_SHARE
        self._most_slots = pool.store.table.count // _SHARE
        self._most = pool.settings.rooms_ahead
        self._idle_s = pool.settings.rooms_idle
        self._made: dict[int, int] = {}
        """By index: the generation of the last room there that was evicted for."""

    # --- given ------------------------------------------------------------------------------------

    def give(
        self, page: SessionPage, writer: "OwnerWriter", *, least: int = 1, evicts: bool = False
    ) -> tuple[Room, ...]:
        """Return new rooms for a session's next puts, if `least` of them are due and their room is free.

        If it `evicts`, also room that is made as the session's last puts made theirs (`count_asked`). What
        the session has and was not told of yet comes with them.
        """
        pool, store, sizes = self._pool, self._pool.store, page.put_sizes
        untold = self.untold(page)
        evicts = evicts and page.to_evict_bytes > 0
        due = self._most - len(page.ahead) >= least or evicts
        if not due or len(sizes) < _LEAST_PUTS or store.queue.count or writer.has_callers:
            return untold
        nbytes = max(sizes)
        if nbytes > self._session_bytes:
            nbytes = sizes[-1]
        most = min(self._most, self._session_bytes // max(nbytes, 1))
        evicts = evicts and self._may_make(page, nbytes)
        if store.free_bytes < self._most_bytes and not evicts:
            most = min(most, 1)
        given: list[Room] = []
        while (
            len(page.ahead) < most
            and len(store.ahead) < self._most_slots
            and store.ahead_bytes + nbytes <= self._most_bytes
            and (slot := self._reserve(nbytes, page, writer, evicts=evicts)) is not None
        ):
            page.ahead[slot.index] = slot
            pool.words.reserved[slot.index] = slot.generation | _OPEN
            pool.turn.left -= FRAME_UNITS
            given.append(Room(slot.index, slot.generation, slot.offset_bytes, slot.nbytes))
        return (*untold, *given)

    @staticmethod
    def untold(page: SessionPage) -> tuple[Room, ...]:
        """Return the rooms that a session was given and not told of, for it to be told now."""
        untold, page.untold = page.untold, ()
        return untold

    def _reserve(
        self, nbytes: int, page: SessionPage, writer: "OwnerWriter", *, evicts: bool
    ) -> Slot | None:
        """Reserve for a session's next put, if that takes nothing from anybody, or `evicts` as it would."""
        writer.count_bytes(nbytes)
        slot = self._pool.store.reserve_ahead(nbytes, page.session, _now())
        if slot is None:
            self._pool.collect()
            slot = self._pool.store.reserve_ahead(nbytes, page.session, _now())
        return self._make(nbytes, page) if slot is None and evicts else slot

    def _make(self, nbytes: int, page: SessionPage) -> Slot | None:
        """Evict for a session's next put what its last ones would have, and reserve it."""
        pool = self._pool
        if (
            not self._may_make(page, nbytes)
            or pool.turn.left <= 0
            or pool.store.evicting.in_progress
        ):
            return None
        page.to_evict_bytes -= nbytes
        pool.collector.evict_some(Request(nbytes, 0, None, None, page.session))
        pool.store.evicting.give_up()  # this request is not made again
        slot = pool.store.reserve_ahead(nbytes, page.session, _now())
        if slot is not None:
            self._made[slot.index] = slot.generation
        return slot

    def _may_make(self, page: SessionPage, nbytes: int) -> bool:
        """Whether another room may be evicted for, if there is none: see above."""
        of_session = nbytes + sum(slot.nbytes for slot in page.ahead.values())
        return (
            page.to_evict_bytes >= nbytes
            and self._pool.store.ahead_bytes + nbytes <= self._made_bytes
            and (not page.ahead or 2 * of_session <= self._made_bytes)
        )

    def count_asked(self, page: SessionPage, nbytes: int) -> None:
        """Count a put that had to ask, and to evict: its session is short of room for as much, and again.

        With two rooms one is on its way while the other is written.
        """
        self._count(page, 2 * nbytes)

    def _count(self, page: SessionPage, nbytes: int) -> None:
        """Let so much be evicted for a session's next puts."""
        if nbytes <= self._made_bytes:
            page.to_evict_bytes = min(self._made_bytes, page.to_evict_bytes + nbytes)

    def _was_made(self, slot: Slot) -> bool:
        return self._made.get(slot.index) == slot.generation

    def fit(self, page: SessionPage, slot: Slot, request: Request) -> None:
        """Fit a slot that was given ahead to the put that has taken it: it is published next."""
        if effects := self._pool.store.fit_ahead(slot, request, _now()):
            self._pool.apply(effects)
        page.put_sizes.append(request.nbytes)
        if self._was_made(slot):
            self._count(page, request.nbytes)

    # --- claimed ----------------------------------------------------------------------------------

    def find(self, page: SessionPage, index: int, generation: int) -> Slot:
        """Return a slot that a session may write, claimed or asked for, or raise StaleRef."""
        slot = page.ahead.get(index)
        if slot is not None and slot.generation == generation:
            self._claimed(page, slot)
        return self._pool.pending_writes.find_reserved(page, index, generation)

    def _claimed(self, page: SessionPage, slot: Slot) -> None:
        del page.ahead[slot.index]
        self._pool.store.claim_ahead(slot)
        self._pool.pending_writes.reserve(slot, page)

    def stop(self) -> None:
        """Give no more, and take back what is unclaimed."""
        self._most = 0
        self.take_back()

    # --- taken back -------------------------------------------------------------------------------

    def take_back(self, *, given_before_s: float = float("inf"), made: bool = True) -> bool:
        """Take back the rooms that no session has claimed; return whether there were some.

        Not those that were `made`, by evicting, if these are to stay.
        """
        pool, reserved = self._pool, self._pool.words.reserved
        taken = [
            (page, slot)
            for page in pool.pages.values()
            for slot in page.ahead.values()
            if slot.born_s < given_before_s and (made or not self._was_made(slot))
        ]
        if not taken:
            return False
        for _, slot in taken:
            reserved[slot.index] = slot.generation
        # A session stores its claim, fences, then looks at `reserved`; here it is the other way round. So
        # whoever claims now finds the room gone, or its claim is found here (`RoomClaim`).
        fence_full()
        for page, slot in taken:
            if page.has_claimed(slot.index, slot.generation):
                self._claimed(page, slot)
            else:
                self._free(page, slot)
        return True

    def _free(self, page: SessionPage, slot: Slot) -> None:
        pool, index, generation = self._pool, slot.index, slot.generation
        del page.ahead[index]
        effects = pool.store.free_ahead(slot, _now())
        pool.pending_writes.end_reserved(index, generation)
        if effects:
            pool.apply(effects)

    def take_back_idle(self, now_s: float) -> None:
        """Take back the rooms that nobody has used for a while."""
        if self._pool.store.ahead:
            self.take_back(given_before_s=now_s - self._idle_s)

    def free_reserved(self, page: SessionPage, now_s: float) -> "list[Effect]":
        """Free one of the slots that a session has reserved, which has ended."""
        _, slot = page.reserved.popitem()
        index, generation = slot.index, slot.generation
        effects = self._pool.store.free_reserved(slot, now_s)
        self._pool.pending_writes.end_reserved(index, generation)
        return effects

    def end_session(self, page: SessionPage) -> None:
        """Free the rooms ahead of a session that has ended: it writes nothing more."""
        while page.ahead:
            self._free(page, next(iter(page.ahead.values())))

    # --- refs that are met before their publish ----------------------------------------------------

    def is_coming(self, index: int, generation: int) -> bool:
        """Whether a ref, of which no number is trusted, may be of a put whose publish is on its way."""
        return self._is_coming(index, generation) and (
            not self._pool.collector.hear_posts() or self._is_coming(index, generation)
        )

    def _is_coming(self, index: int, generation: int) -> bool:
        pool = self._pool
        slot = None if pool.closed else pool.store.table.find(index, generation)
        if slot is None or pool.words.reserved[index] & RoomClaim.GENERATION != generation:
            return False
        if index not in pool.store.ahead:
            return True
        return any(
            page.has_claimed(index, generation)
            for page in pool.pages.values()
            if index in page.ahead
        )

    def published(self, slot: Slot, index: int, generation: int) -> None:
        """Tell whoever met a slot's ref before its publish that it has come; count what they have paid."""
        pool = self._pool
        pool.pending_writes.end_reserved(index, generation)
        if slot.early_paid is not None and slot.generation == generation:
            pool.apply(pool.store.count_early(slot, generation, _now()))

    async def arrival(self, index: int, generation: int) -> None:
        """Return once the publish of such a ref has come, or never will."""
        await self._pool.pending_writes.arrival(lambda: self.is_coming(index, generation), index)
