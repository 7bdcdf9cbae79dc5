"""The owner's puts that find no room, or no units left in the loop's turn, at their call."""

import asyncio
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from featcache.control.turns import KEPT, QUANTUM_UNITS, Turn
from featcache.core.put_queue import Waiter, WaiterState
from featcache.core.slots import Slot
from featcache.pool.waits import PutWaits
from featcache.ref import FeatureRef
from featcache.session.staging import Staged

if TYPE_CHECKING:
    from featcache.pool.pool import Pool
    from featcache.pool.writer import OwnerWriter

_WAITING: Final = WaiterState.WAITING
A_UNIT: Final = 8
"""Waits that ended and are told of, or but counted, for a unit of the turn."""
_now: Final = time.monotonic

Unstaged: TypeAlias = tuple[Any, Any, Any, Any]
"""The arguments of `stage`."""


class LatePut:
    """A put that has its place before its task sleeps: in the line of callers, or in the queue for room.

    Thousands may come in one turn of the loop, and be cancelled in one. So a call does no more than
    take its place: staging and the look for room are done in the line (`__call__`). Without a
    timeout its task sleeps on one future from there until it has its room, two coroutines deep.
    """

    __slots__ = ("_future", "_put", "_slot", "_timeout_s", "_wait", "_writer", "since_s", "waiter")

    def __init__(
        self, writer: "OwnerWriter", put: Staged | Unstaged, *, wait: bool, timeout_s: float | None
    ) -> None:
        self._writer = writer
        self._put = put
        self._wait = wait
        self._timeout_s = timeout_s
        self.since_s = 0.0
        """When it joined the queue; of one with a timeout, when it was called."""
        self._future: asyncio.Future[Any] | None = None
        self._slot: Slot | None = None
        self.waiter: Waiter | None = None
        """Its place in the queue, once it has one."""

    def stand_in(self, turn: Turn) -> None:
        """Take a place in the line of callers."""
        if self._timeout_s is not None:
            self.since_s = _now()
        self._future = turn.place(self)

    def __call__(self) -> object:
        """Reserve, or join the queue: this call's turn has come."""
        writer, put = self._writer, self._put
        writer.check_open()
        if type(put) is tuple:
            put = self._put = writer.stage(*put)
        assert type(put) is Staged, "it is staged by now"
        self._slot = writer.reserve(put.request)
        if self._slot is not None:
            return None
        self.join()
        return KEPT if self._sleeps_on else None

    @property
    def _sleeps_on(self) -> bool:
        """Whether the future that it has in the line is also its waiter's."""
        return self._wait and self._timeout_s is None

    def join(self) -> None:
        """Join the queue for room, behind all who asked before; or raise PoolFull."""
        writer, put = self._writer, self._put
        assert type(put) is Staged, "it is staged by now"
        if not self._sleeps_on:
            self.waiter = writer.enter_queue(put.request, wait=self._wait)
            return
        if self._future is None:
            self._future = writer.new_future()
        self.since_s = _now()
        self.waiter = writer.enter_queue(put.request, wait=True, tag=self._future)
        writer.waits.begin(self.waiter, self.since_s)

    async def run(self) -> FeatureRef:
        """Copy the feature in once there is room, and return its ref."""
        writer = self._writer
        if self._future is not None and self._wait and self._timeout_s is None:
            try:
                await self._future
                waiter = self.waiter
                slot = self._slot if waiter is None else writer.accept(waiter)
            except BaseException:
                self._end()
                raise
            if waiter is not None:
                writer.waits.end(waiter, self.since_s, granted=True)
        else:
            slot = await self._bounded()
        staged = self._put
        assert slot is not None, "its turn came"
        assert type(staged) is Staged, "it is staged by now"
        writer.check_parts(slot, staged)
        return await writer.fill(slot, staged)

    async def _bounded(self) -> Slot:
        """Return the slot of a put that has a timeout, or that waits for no others' features."""
        writer, left_s = self._writer, self._timeout_s
        if self._future is not None:
            try:
                await self._future
            except BaseException:
                writer.give_up(self._slot or self.waiter)
                raise
            if left_s is not None:
                left_s = max(0.0, left_s - (_now() - self.since_s))
            if self._slot is not None:
                return self._slot
        assert self.waiter is not None, "its turn came"
        pending: Coroutine[Any, Any, Slot] = (
            writer.granted(self.waiter, left_s) if self._wait else writer.coming(self.waiter)
        )
        return await pending

    def _end(self) -> None:
        """Give up what it has by now: it was cancelled or failed, or the cache was closed."""
        waiter, writer = self.waiter, self._writer
        if waiter is None:
            writer.give_up(self._slot)
        elif waiter.state is _WAITING and writer.turn.left <= 0:
            writer.leavers.add(self, waiter)
        else:
            writer.give_up(waiter)
            writer.waits.end(waiter, self.since_s, granted=False)


class Leavers:
    """Cancelled waiters whose departure is settled in later turns: theirs had no units left.

    Each is out of the queue at once, so that no figure counts it and no slot goes to it. The rest,
    telling of the wait that ended and serving the next waiter, is done in later turns, for all in one.
    """

    def __init__(self, pool: "Pool", waits: PutWaits) -> None:
        self._turn, self._queue = pool.turn, pool.store.queue
        self._collector = pool.collector
        self._waits = waits
        self._gone: list[LatePut] = []

    def add(self, put: LatePut, waiter: Waiter) -> None:
        """Take a put's waiter, which has no slot, out of the queue."""
        self._queue.leave_place(waiter)
        gone = self._gone
        if not gone:
            self._turn.later(self._tell)
        if not self._collector.behind:
            self._collector.go_on()  # it serves the next, and tells readers if there is none
        gone.append(put)

    def _tell(self) -> bool:
        """Tell of the waits that ended, some each time."""
        turn, gone = self._turn, self._gone
        until = max(0, turn.left - QUANTUM_UNITS)
        while gone and turn.left > until:
            turn.left -= 1
            for put in gone[:A_UNIT]:
                assert put.waiter is not None, "it waited"
                self._queue.forget(put.waiter)
                self._waits.end(put.waiter, put.since_s, granted=False)
            del gone[:A_UNIT]
        return bool(gone)
