"""The queue of puts that wait for room: first come, first served, with an accept handshake.

A granted waiter has its slot reserved at the decision, before its task runs. If that task was
cancelled meanwhile nobody accepts, and `WaitQueue.drop` returns the slot to the store, which frees it
and serves the next. The handshake is psycopg_pool's idea (its `WaitingClient`).
"""

import enum
from collections import OrderedDict
from itertools import islice

import msgspec

from featcache.core.allocator import aligned_size
from featcache.core.slots import Slot


class Request(msgspec.Struct, frozen=True, gc=False):
    """The room that a put needs, and how its feature is to be kept."""

    nbytes: int
    readers: int | frozenset[str]
    """The number of reads owed (0 only with a key), or the names of the readers that owe one each."""
    ttl_s: float | None
    key: bytes | None = None
    session: int = 0
    """The session of the put; the owner's own is 0."""


class Batch(Request, frozen=True, gc=False):
    """The room of several puts together, given at once: `nbytes` is that of all their extents."""

    members: tuple[Request, ...] = ()


class WaiterState(enum.Enum):
    """A waiter's life.

    | from | by | to |
    | --- | --- | --- |
    | WAITING | `grant` | GRANTED: out of the queue, with a slot |
    | GRANTED | `accept` | ACCEPTED: the slot is the caller's |
    | WAITING, GRANTED | `drop` | GONE: a slot that was granted goes back to the store |
    """

    WAITING = "waiting"
    GRANTED = "granted"
    ACCEPTED = "accepted"
    GONE = "gone"


# Members of an enum are slow to look up, and thousands of puts may leave in one turn of the loop.
_WAITING, _GONE = WaiterState.WAITING, WaiterState.GONE


class Waiter:
    """One place in the queue. `tag` is the caller's own (a future); the core never looks at it."""

    __slots__ = ("by_growth", "request", "since_s", "slot", "state", "tag", "ticket")

    def __init__(self, ticket: int, request: Request, tag: object, *, by_growth: bool) -> None:
        self.ticket, self.request, self.tag = ticket, request, tag
        self.by_growth = by_growth
        """Whether its room comes as the slab grows, when it came: it waits for nobody's feature."""
        self.state = WaiterState.WAITING
        self.slot: Slot | None = None
        self.since_s = 0.0
        """When its wait began: the caller's own."""


class WaitQueue:
    """Waiters in order of arrival; any of them can leave at any moment in constant time."""

    def __init__(self) -> None:
        self._queue: OrderedDict[int, Waiter] = OrderedDict()
        self._tickets = 0
        self.count = 0
        """As `len`, for hot paths on which a call is one too many."""
        self.waiting_bytes = 0
        self.growing = 0
        """Those of them that wait `by_growth`: the first in the queue."""
        self.growing_bytes = 0
        """Extents for them."""

    def __len__(self) -> int:
        return self.count

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def head(self) -> Waiter | None:
        """The waiter that is served next, or None."""
        queue = self._queue
        while self.count:
            waiter = next(iter(queue.values()))
            if waiter.state is _WAITING:
                return waiter
            del queue[waiter.ticket]  # it left by `leave_place`
        return None

    def first(self, most: int) -> list[Waiter]:
        """Return the waiters that are served next, up to so many. For reports, not for hot paths."""
        return list(islice((w for w in self._queue.values() if w.state is _WAITING), most))

    def by_session(self, session: int) -> list[Waiter]:
        """Return the waiters of a session. For its end, not for hot paths."""
        waiting = (waiter for waiter in self._queue.values() if waiter.state is _WAITING)
        return [waiter for waiter in waiting if waiter.request.session == session]

    def join(self, request: Request, tag: object, *, by_growth: bool = False) -> Waiter:
        self._tickets += 1
        waiter = Waiter(self._tickets, request, tag, by_growth=by_growth)
        self._queue[waiter.ticket] = waiter
        self.count += 1
        self.waiting_bytes += request.nbytes
        if by_growth:
            self.growing += 1
            self.growing_bytes += aligned_size(request.nbytes)
        return waiter

    def grant(self, waiter: Waiter, slot: Slot) -> None:
        """Hand the waiter its slot and take it out of the queue."""
        # It leaves the queue now, not when it accepts: its room is spent, and the next is the head.
        self._leave(waiter)
        waiter.slot = slot
        waiter.state = WaiterState.GRANTED

    def accept(self, waiter: Waiter) -> Slot:
        """Return the granted slot: from here on it is the caller's to publish or free."""
        if waiter.state is not WaiterState.GRANTED or waiter.slot is None:
            raise ValueError(f"waiter {waiter.ticket} is {waiter.state.value}, not granted")
        waiter.state = WaiterState.ACCEPTED
        return waiter.slot

    def drop(self, waiter: Waiter) -> Slot | None:
        """Leave. Return the slot that was granted but not accepted, if any: the store must free it."""
        was = waiter.state
        if was is _WAITING:
            self._leave(waiter)
        elif was is not WaiterState.GRANTED:
            return None  # accepted or gone already
        waiter.state = _GONE
        return waiter.slot

    def leave_place(self, waiter: Waiter) -> None:
        """As `drop` of one that waits, but its empty place stays until `forget`, or until it is the first.

        Thousands may leave in one turn of the loop.
        """
        waiter.state = _GONE
        self.count -= 1
        self.waiting_bytes -= waiter.request.nbytes
        if waiter.by_growth:
            self._uncount_growth(waiter)

    def forget(self, waiter: Waiter) -> None:
        """Take away the place of a waiter that left."""
        self._queue.pop(waiter.ticket, None)

    def clear(self) -> list[Waiter]:
        """Take all waiters out; return them."""
        waiters = self.first(self.count)
        for waiter in waiters:
            waiter.state = WaiterState.GONE
        self._queue.clear()
        self.count = self.waiting_bytes = self.growing = self.growing_bytes = 0
        return waiters

    def _leave(self, waiter: Waiter) -> None:
        del self._queue[waiter.ticket]
        self.count -= 1
        self.waiting_bytes -= waiter.request.nbytes
        if waiter.by_growth:
            self._uncount_growth(waiter)

    def _uncount_growth(self, waiter: Waiter) -> None:
        self.growing -= 1
        self.growing_bytes -= aligned_size(waiter.request.nbytes)
