"""Puts that wait for room: told once when they have waited long, and again when their wait is over."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from featcache import events
from featcache.core.put_queue import Waiter, WaiterState

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from featcache.pool.pool import Pool

_MOST_A_TURN: Final = 1024
_EARLY_S: Final = 0.001
"""A loop's timer may come so much before its time."""
_now: Final = time.monotonic


WaitObserver: TypeAlias = Callable[[str, float, bool], object]
"""Called with the pool's name, the seconds waited, and whether the put was granted its room."""
_observers: tuple[WaitObserver, ...] = ()


def observe_waits(observer: WaitObserver) -> None:
    """Have `observer` called at the end of every wait for room in this process's pools. Any thread.

    In the loop of the pool; of the owner's own puts, in the context of their caller.
    """
    global _observers  # noqa: PLW0603 - one process-wide tuple, replaced whole so that no end needs a lock
    _observers = (*_observers, observer)


def unobserve_waits(observer: WaitObserver) -> None:
    """Undo `observe_waits`."""
    global _observers  # noqa: PLW0603 - as above
    _observers = tuple(known for known in _observers if known != observer)


class PutWaits:
    """The puts in one pool's queue, in the order in which they came, and the one timer for all."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._after_s = pool.settings.wait_warning
        self._ended = events.Throttle(pool.settings.log_interval)
        self._long = events.Throttle(pool.settings.log_interval, burst=16)
        self._untold: dict[Waiter, float] = {}
        self._timer: TimerHandle | None = None

    def begin(self, waiter: Waiter, now_s: float) -> None:
        """Note that a put waits from now on."""
        if self._after_s is None:
            return
        self._untold[waiter] = now_s
        if self._timer is None:
            self._arm(self._after_s)

    def end(self, waiter: Waiter, since_s: float, *, granted: bool) -> None:
        """Note that its wait is over, and tell of it."""
        self._untold.pop(waiter, None)
        if self._timer is not None and not self._untold:
            self._timer.cancel()
            self._timer = None
        now_s = _now()
        for observer in _observers:
            observer(self._pool.name, now_s - since_s, granted)
        unlogged = self._ended.pass_(now_s)
        if unlogged is None:
            return
        events.emit(
            events.PutWaited(
                pool=self._pool.name,
                nbytes=waiter.request.nbytes,
                waited_s=now_s - since_s,
                granted=granted,
                unlogged=unlogged,
            )
        )

    def _arm(self, delay_s: float) -> None:
        self._timer = self._pool.loop.call_later(delay_s, self._tell)

    def _tell(self) -> None:
        """Tell of the puts that have waited long, the longest first, and of each once."""
        self._timer = None
        if self._pool.closed or self._after_s is None:
            return
        self._pool.collect()  # some may be granted with what was released
        now_s, ripe = _now(), list[tuple[Waiter, float]]()
        for waiter, since_s in self._untold.items():
            due_s = since_s + self._after_s
            if due_s > now_s + _EARLY_S or len(ripe) == _MOST_A_TURN:
                self._arm(max(0.0, due_s - now_s))
                break
            ripe.append((waiter, since_s))
        for waiter, since_s in ripe:
            del self._untold[waiter]
            if waiter.state is WaiterState.WAITING:
                self._long.emit(now_s, self._warning(waiter, now_s - since_s))

    def _warning(self, waiter: Waiter, waited_s: float) -> Callable[[int], events.Event]:
        def make(unlogged: int) -> events.Event:
            store, holders = self._pool.store, self._pool.debtors.holders()
            return events.PutWaiting(
                pool=self._pool.name,
                session=waiter.request.session,
                nbytes=waiter.request.nbytes,
                waited_s=waited_s,
                waiters=store.queue.count,
                waiting_bytes=store.queue.waiting_bytes,
                free_bytes=store.free_bytes,
                largest_free_bytes=store.largest_free_bytes,
                holders=holders.sentences,
                remedy=holders.remedy,
                unlogged=unlogged,
            )

        return make
