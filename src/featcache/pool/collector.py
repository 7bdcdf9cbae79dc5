"""Room: payments counted, slots recycled, features evicted for those that wait, in pieces."""

import time
from typing import TYPE_CHECKING, Final

from featcache.control.turns import EVICT_UNITS, LEAST, QUANTUM_UNITS
from featcache.core.effects import Effect, Evicted
from featcache.core.keyed_store import STEPS_A_VICTIM
from featcache.core.put_queue import Request
from featcache.memory.words import fence_full
from featcache.pool.page import SessionPage

if TYPE_CHECKING:
    from featcache.pool.pool import Pool

_now: Final = time.monotonic
_BUSY_S: Final = 0.004
_LEASES_A_UNIT: Final = 512
"""Leases that are asked for in a unit of the turn."""
STEPS_A_UNIT: Final = STEPS_A_VICTIM // EVICT_UNITS
"""Extents that a search for victims looks at for a unit of the turn."""


class Collector:
    """One pool's room. What a turn of the loop has no units for is done in the next turns."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._turn = pool.turn
        self.behind = False
        """Whether `collect` goes on in the next turns: there may be more room than is known."""
        self.busy_until_s = float("-inf")
        """Until then releases stream in, as far as is known."""
        self._reclaimed_from = 0
        """Of the slots that are due, the first that `reclaim` has not looked at in this round."""
        self._reclaims_again = False
        """Whether some may have come free that were looked at before in this round."""

    def collect(self) -> None:
        """Count the reads paid since the last call, and recycle the slots that owe none.

        As many as this turn has units for; if there are more it goes on in the next turns (`behind`).
        """
        self._reclaims_again = self._reclaimed_from > 0
        if self._collect(max(self._turn.left, LEAST)):
            self.go_on()

    def on_ring(self) -> None:
        """Hear what sessions rang for: posts, or releases if they were told to ring at these."""
        if not self.hear_posts() or self._pool.ring_at:
            self.collect()

    def look(self) -> None:
        """Hear and collect unasked: a session's loop may not have come to ring."""
        self.hear_posts()
        self.collect_soon()

    def collect_soon(self) -> None:
        """As `collect`, for those who need not know at once: not in a turn that is used up, if it goes on."""
        if not self.behind or self._turn.left > 0:
            self.collect()

    def hear_posts(self) -> bool:
        """Begin to handle what sessions have posted in their pages; return whether any have."""
        server = self._pool.growth.server
        return server is not None and not self._pool.closed and server.posts.hear_all()

    def collect_all(self) -> None:
        """As `collect`, but all of it now, however long it takes: for a call that may not wait."""
        while self._collect(self._pool.store.limits.slots):
            pass

    def go_on(self) -> None:
        if not self.behind:
            self.behind = True
            self._turn.later(self._collect_more)

    def _collect_more(self) -> bool:
        pool = self._pool
        self.behind = False
        if not pool.closed:
            pool.apply(
                pool.store.serve(_now())
            )  # also if none waits any more: readers stop ringing
            self.behind = self._collect(min(QUANTUM_UNITS, max(self._turn.left, LEAST)))
        return self.behind

    def _collect(self, most: int) -> bool:
        """Count so many payments, recycle and evict so many slots; return whether there are more."""
        now_s = _now()
        self._pool.put_bytes = 0
        high = self._pool.store.table.high
        fence_full()  # after `waiting` was set, before the released words are looked at
        left = self._count_payments(most, high, now_s)
        if self._pool.pending_writes.in_flight:
            self._pool.pending_writes.poll()
        more = self.reclaim(now_s, most) or not left
        queue = self._pool.store.queue
        while queue.count and (head := queue.head):
            if (
                most <= 0 or self._reclaimed_from or self._pool.store.serving
            ):  # what went may not be free yet
                return True
            gone = self.make_room(head.request, max(1, most // EVICT_UNITS))
            if not gone:
                return more or self._pool.store.evicting.is_searching
            most -= gone * EVICT_UNITS
        return more

    def counts_more(self, page: SessionPage) -> bool:
        """Collect; return whether there are payments of this session that are not counted yet."""
        self._pool.collect()
        return page.has_more(self._pool.store.table.high)

    def _count_payments(self, most: int, high: int, now_s: float) -> int:
        """Count so many reads as paid; return how many more it might have been."""
        store, effects, left = self._pool.store, list[Effect](), most
        for page in self._pool.pages.values():
            if newly_released := page.newly_released(high, left):
                self.busy_until_s = now_s + _BUSY_S
                left -= len(newly_released)
                effects += store.pay_all(newly_released, page.session, page.name, now_s)
            if page.grants and left:
                for grant in page.paid_grants(left):
                    store.reads_paid += 1
                    left -= 1
                    effects += store.pay_grant(grant.slot, now_s)
            if not left:
                break
        self._turn.left -= most - left
        if effects:
            self._pool.apply(effects)
        return left

    @property
    def makes_room(self) -> bool:
        """Whether more is recycled or evicted in the next turns."""
        store = self._pool.store
        return self.behind or store.evicting.in_progress or bool(store.demoting)

    def evict_some(self, request: Request, *, waits: bool = True) -> int:
        """As `make_room`, as far as this turn goes; none while there is more to recycle."""
        if self.behind:
            return 0
        most = max(LEAST // 2, self._turn.left // EVICT_UNITS)
        return self.make_room(request, most, waits=waits)

    def make_room(self, request: Request, most: int | None = None, *, waits: bool = True) -> int:
        """Evict for a request, if that is the way to room for it; return how many went.

        With `most`, no more than so many, or so much of the search for them as takes the same time; the rest
        when this is called again for the same request. Without `most`, or where it may not wait, nothing is
        copied to a tier but here and now.
        """
        store = self._pool.store
        steps_before = store.evicting.steps
        held = self._pool.is_held.of_many()
        effects = store.evict_for(request, held, _now(), most, waits=waits)
        self._turn.left -= (store.evicting.steps - steps_before) // STEPS_A_UNIT
        self._turn.left -= self._pool.is_held.leases // _LEASES_A_UNIT
        if not effects:
            return 0
        gone = sum(type(effect) is Evicted for effect in effects)
        self._turn.left -= gone * EVICT_UNITS
        self._pool.apply(effects)
        return gone

    def reclaim(self, now_s: float, most: int) -> bool:
        """Recycle those of the next slots that are due that nobody holds; return whether there are more."""
        due = self._pool.store.due(now_s)
        start, self._reclaimed_from = self._reclaimed_from, 0
        if len(due) <= start:
            return bool(start)  # what was to be looked at is gone: begin anew
        more = len(due) > start + most
        if start or more:
            due = due[start : start + most]
        fence_full()  # after `live` was cleared, before the holds are looked at
        published = self._pool.words.published
        ready = [
            slot
            for slot in due
            # A slot recycled before its bytes came would get them on top of its next tenant's.
            if published[slot.index] == slot.generation
            or self._pool.pending_writes.is_abandoned(slot)
        ]
        for page in self._pool.pages.values():
            ready = page.not_held(ready)
        if more:
            self._reclaimed_from = start + most - len(ready)
        if ready:
            self._turn.left -= len(ready)
            self._pool.apply(self._pool.store.recycle(ready, now_s))
        if not more and self._reclaims_again:
            self._reclaims_again = False
            return True
        return more
