"""Poll scheduling: on the doorbell, at deadlines, and periodically."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

from featcache.pool.collector import Collector

_FIRST_DELAY_S = 0.001
_SHARED_S = 0.001
_now = time.monotonic


class Recycler:
    """Calls the collector when sessions ring, and `tick` on a timer; both run in the loop.

    While a put waits for room the timer starts at a millisecond. On a host slab the ring comes
    after the word, so the timer is only the net under a missed ring, and backs off as soon as a tick
    says that releases do not stream in. Where words come `deferred` (a GPU's stream writes them after
    the CPU rang) it stays at a millisecond.
    """

    def __init__(
        self,
        collector: Collector,
        tick: Callable[[], bool],
        interval_s: float,
        *,
        deferred: bool,
    ) -> None:
        self._collector = collector
        self._tick = tick
        self._interval_s = interval_s
        self._growth = 1.0 if deferred else 2.0
        self._delay_s = interval_s
        self._hurried = False
        self._busy = True
        self._loop = asyncio.get_running_loop()
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._loop.add_reader(self.eventfd, self._on_ring)
        except BaseException:
            os.close(self.eventfd)
            raise
        self._timer = self._loop.call_later(interval_s, self._on_timer)
        self._dues: set[asyncio.TimerHandle] = set()
        self._last_look_s = float("-inf")

    def set_busy(self, waiting: bool) -> None:
        """Poll soon while a put waits; fall back to the interval when none does."""
        if waiting == self._hurried:
            return
        self._hurried = self._busy = waiting
        if waiting:
            self._delay_s = min(_FIRST_DELAY_S, self._interval_s)
            self._timer.cancel()
            self._timer = self._loop.call_later(self._delay_s, self._on_timer)
        else:
            self._delay_s = self._interval_s

    def poll_after(self, delay_s: float) -> None:
        """Poll once more after `delay_s`: a grace period will have passed.

        Those that end within a millisecond share one poll: thousands may begin in one turn.
        """
        now_s = _now()
        due_s = now_s + delay_s
        if delay_s and self._dues:
            if due_s <= self._last_look_s <= due_s + _SHARED_S:
                return
            delay_s += _SHARED_S
            self._last_look_s = now_s + delay_s

        def look() -> None:
            self._dues.discard(handle)
            self._collector.collect_soon()

        handle = self._loop.call_later(delay_s, look)
        self._dues.add(handle)

    def _on_ring(self) -> None:
        with contextlib.suppress(OSError):  # read by an earlier turn, or by the next one
            os.eventfd_read(self.eventfd)
        self._collector.on_ring()

    def _on_timer(self) -> None:
        # Armed again before the work, so that a tick that raises is not the last (psycopg_pool).
        if self._hurried:
            growth = 1.0 if self._busy else self._growth
            self._delay_s = min(self._delay_s * growth, self._interval_s)
        self._timer = self._loop.call_later(self._delay_s, self._on_timer)
        self._busy = self._tick()

    def close(self) -> None:
        """Stop polling."""
        self._timer.cancel()
        for handle in self._dues:
            handle.cancel()
        self._loop.remove_reader(self.eventfd)
        os.close(self.eventfd)

    def forget(self) -> None:
        """Drop the descriptor in a forked child."""
        os.close(self.eventfd)
