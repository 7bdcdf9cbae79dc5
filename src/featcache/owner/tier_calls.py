"""Calls of a tier: each with a deadline, their number bounded, their failures counted and told."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal, TypeVar

from featcache import events
from featcache.core.keyed_store import key_label
from featcache.pool.pool import Pool
from featcache.tier import Tier

T = TypeVar("T")
Operation = Literal["put", "get", "has", "remove", "close"]
_now: Final = time.monotonic
_IN_DOUBT: Final = 3
"""Lookups in a row that took too long, after which one at a time is made until one is answered."""


class TierError(Exception):
    """A call of the tier failed; it was counted and told."""


class Deadline:
    """The time that a call has, and its place among those in progress: neither counts while it is paused."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, places: asyncio.Semaphore
    ) -> None:
        self.passed: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._places = places
        self._left_s = seconds
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def resume(self) -> None:
        """Take a place, when there is one, and let the time pass."""
        await self._places.acquire()
        self._since_s = self._loop.time()
        self._timer = self._loop.call_later(self._left_s, self._pass)

    def pause(self) -> None:
        """Give the place up, and let no time pass, until `resume`; if it is paused already, do nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s = max(0.0, self._left_s - (self._loop.time() - self._since_s))
            self._places.release()

    def _pass(self) -> None:
        if not self.passed.done():
            self.passed.set_result(None)


class TierCalls:
    """The calls of one tier."""

    def __init__(self, tier: Tier, pool: Pool) -> None:
        self.tier = tier
        self.failures = 0
        self._pool = pool
        self._throttle = events.Throttle(pool.settings.log_interval)
        self._drops = events.Throttle(pool.settings.log_interval)
        self._tasks: set[asyncio.Task[object]] = set()
        """Calls in progress, with those that were given up and have not ended."""
        self._writes = asyncio.Semaphore(pool.settings.tier_calls)
        self._lookups = asyncio.Semaphore(pool.settings.tier_calls)
        self._looking_up = 0
        self._unanswered = 0

    def new_deadline(self) -> Deadline:
        """Return the time that a lookup has, paused."""
        return Deadline(self._pool.loop, self._pool.settings.tier_timeout, self._lookups)

    async def look_up(
        self,
        what: Literal["get", "has"],
        key: bytes,
        start: Callable[[], Awaitable[T]],
        deadline: Deadline,
    ) -> T:
        """Make a lookup, when it is its turn; raise TierError if it fails.

        While the tier has not answered the last few in time, only one is made: else each miss would take
        as long as the tier is given.
        """
        await deadline.resume()
        try:
            if self._unanswered >= _IN_DOUBT and self._looking_up:
                raise TierError("the tier does not answer")
            self._looking_up += 1
            try:
                return await self._call(what, key, start, deadline)
            finally:
                self._looking_up -= 1
                self._unanswered = self._unanswered + 1 if deadline.passed.done() else 0
        finally:
            deadline.pause()

    async def write(
        self, what: Literal["put", "remove"], key: bytes, start: Callable[[], Awaitable[object]]
    ) -> None:
        """Make a put or a removal, when it is its turn; raise TierError if it fails."""
        deadline = Deadline(self._pool.loop, self._pool.settings.tier_timeout, self._writes)
        await deadline.resume()
        try:
            await self._call(what, key, start, deadline)
        finally:
            deadline.pause()

    async def _call(
        self, what: Operation, key: bytes, start: Callable[[], Awaitable[T]], deadline: Deadline
    ) -> T:
        async def run() -> T:
            return await start()

        # A task of its own: a tier that does not let itself be cancelled holds nobody up.
        task = self._pool.loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            either: list[asyncio.Future[T] | asyncio.Future[None]] = [task, deadline.passed]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            seconds = self._pool.settings.tier_timeout
            raise self.failed(what, key, f"no answer within {seconds} s (Settings.tier_timeout)")
        if task.cancelled():
            raise self.failed(what, key, "it cancelled itself")
        error = task.exception()
        if error is not None:
            raise self.failed(what, key, f"{type(error).__name__}: {error}") from error
        return task.result()

    def _ended(self, task: "asyncio.Task[object]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: it may have been given up

    def failed(self, what: Operation, key: bytes, reason: str) -> TierError:
        """Count and tell a failure of the tier; return its error."""
        self.failures += 1
        self._throttle.emit(
            _now(),
            lambda unlogged: events.TierFailed(
                pool=self._pool.name,
                operation=what,
                key=key_label(key)[:64],
                reason=reason[:400],
                unlogged=unlogged,
            ),
        )
        return TierError(reason)

    def dropped(self, key: bytes, nbytes: int, reason: str) -> None:
        """Tell of a feature that is not demoted, for want of room to stage it."""
        self._drops.emit(
            _now(),
            lambda unlogged: events.DemotionDropped(
                pool=self._pool.name,
                key=key_label(key)[:64],
                nbytes=nbytes,
                reason=reason,
                unlogged=unlogged,
            ),
        )

    async def close(self) -> None:
        """Cancel what is in progress, and close the tier; neither is waited for beyond its time."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._pool.settings.tier_timeout)
        with contextlib.suppress(TierError):  # it was told: nothing else is to be done
            deadline = Deadline(
                self._pool.loop, self._pool.settings.tier_timeout, asyncio.Semaphore(1)
            )
            await deadline.resume()
            try:
                await self._call("close", b"", self.tier.close, deadline)
            finally:
                deadline.pause()
