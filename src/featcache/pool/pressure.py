"""The pool's pressure: observed at each change of use, reported at a bounded rate, awaitable."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from featcache import events
from featcache.control.turns import CALL_UNITS, turn_of
from featcache.core.keyed_store import KeyedStore
from featcache.core.pressure import ALWAYS_NORMAL, PressureGauge, PressureLevel
from featcache.errors import CacheClosed, GetTimeout, SettingsError, WrongLoop
from featcache.pool import gauges
from featcache.pool.debtors import Debtors
from featcache.pool.refresh import refresh
from featcache.settings import Settings, parse_timeout

if TYPE_CHECKING:
    from featcache.pool.pool import Pool

_NORMAL = PressureLevel.NORMAL
_REPORTED = (
    *("capacity_bytes", "committed_bytes", "used_bytes", "free_bytes", "largest_free_bytes"),
    *("slots", "slots_used", "waiters", "waiting_bytes", "resident_bytes", "pinned_bytes"),
)
"""The gauges that a `PoolPressure` event reports."""


class PressureMonitor:
    """Keeps the level of one store, emits `PoolPressure`, wakes tasks that await a lower level."""

    def __init__(
        self, pool_name: str, store: KeyedStore, settings: Settings, debtors: Debtors
    ) -> None:
        self._pool_name = pool_name
        self._debtors = debtors
        self._store = store
        self._gauge = PressureGauge(settings.log_interval, settings.pressure_interval)
        self.quiet_below_bytes = int(store.limits.capacity_bytes * ALWAYS_NORMAL)
        """Below this use, with no put waiting, a normal level stays normal: no need to observe."""
        self.is_normal = True
        """Cached `level is NORMAL`."""
        self._awaiting: dict[asyncio.Future[None], PressureLevel] = {}
        self._turn = turn_of(asyncio.get_running_loop())

    @property
    def level(self) -> PressureLevel:
        """The level now."""
        return self._gauge.level

    def observe(self) -> None:
        """Follow the store. Cheap when nothing changed: it runs at every put."""
        store = self._store
        used_bytes = store.unevictable_bytes + store.leased_bytes
        if (
            used_bytes < self.quiet_below_bytes
            and not store.queue.count
            and self._gauge.level is _NORMAL
        ):
            return
        if self._gauge.observe(used_bytes, store.limits.capacity_bytes, store.blocked_puts):
            self.is_normal = self._gauge.level is _NORMAL
            self._wake()

    def report(self, now_s: float) -> None:
        """Emit an event if one is due."""
        previous = self._gauge.due(now_s)
        if previous is not None:
            events.emit(events.PoolPressure(**self._facts(now_s), previous=previous.value))

    async def below(self, level: PressureLevel) -> None:
        """Return once the level is lower than `level`."""
        turn = self._turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        while self._gauge.level.rank >= level.rank:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaiting[future] = level
            try:
                await future
            finally:
                self._awaiting.pop(future, None)

    def close(self, error: Exception) -> None:
        """Fail every task that awaits a level."""
        for future in self._awaiting:
            if not future.done():
                future.set_exception(error)

    def _wake(self) -> None:
        for future, level in self._awaiting.items():
            if self._gauge.level.rank < level.rank and not future.done():
                future.set_result(None)

    def _facts(self, now_s: float) -> dict[str, Any]:
        store = self._store
        oldest = next(iter(store.owing.values()), None)
        values, holders = gauges.of_store(store), self._debtors.holders()
        return {name: values[name] for name in _REPORTED} | {
            "pool": self._pool_name,
            "level": self._gauge.level.value,
            "oldest_ref": None if oldest is None else oldest.label,
            "oldest_age_s": 0.0 if oldest is None else now_s - oldest.born_s,
            "oldest_owed_by": 0 if oldest is None else oldest.owed_by,
            "holders": holders.sentences,
            "remedy": "" if self.is_normal else holders.remedy,
        }


class Pressure:
    """The pool's pressure, as users see it: the level now, and a way to await a lower one.

    ``await cache.pressure.below("high")`` before taking on work is admission control.
    """

    def __init__(self, pool: Callable[[], "Pool"], in_loop: Callable[[], "Pool"]) -> None:
        """`pool` and `in_loop` return the pool; the latter raises WrongLoop outside the loop."""
        self._pool = pool
        self._in_loop = in_loop

    @property
    def level(self) -> PressureLevel:
        """``normal``, ``elevated`` (75 % used), ``high`` (90 %) or ``exhausted`` (a put waits).

        Safe in any thread; outside the cache's loop it is the level as it was last looked at.
        """
        return self._monitor().level

    def _monitor(self) -> PressureMonitor:
        try:
            pool = self._in_loop()
        except WrongLoop:
            return self._pool().pressure  # as it was last looked at
        if not pool.pressure.is_normal:
            refresh(pool)  # what was released lowers it
        return pool.pressure

    async def below(self, level: PressureLevel | str, *, timeout: float | None = None) -> None:
        """Return once the level is lower than `level`, at once if it is so now.

        Args:
            level: any level but ``normal``, below which there is none.
            timeout: seconds to wait at most; None waits without limit.

        Raises:
            SettingsError: no such level, or no such time.
            GetTimeout: the level did not fall in time.
            CacheClosed: the cache was closed meanwhile.
            WrongLoop: called outside the cache's loop.

        """
        try:
            wanted = PressureLevel(level)
        except ValueError:
            raise SettingsError(
                f"level={level!r} is none of {[str(known) for known in PressureLevel]}"
            ) from None
        timeout_s = parse_timeout(timeout)
        if wanted is PressureLevel.NORMAL:
            raise SettingsError("no level is below 'normal'")
        self._in_loop()
        try:
            with anyio.fail_after(timeout_s):
                await self._monitor().below(wanted)
        except TimeoutError:
            holders = self._pool().debtors.holders()
            raise GetTimeout(
                f"pressure stayed at {self.level} for {timeout_s} s: {holders}"
            ) from None

    def __repr__(self) -> str:
        try:
            return f"<Pressure {self.level.value}>"
        except CacheClosed:
            return "<Pressure of a closed cache>"
