"""Tasks that wait for a pool, woken or failed: so many a turn, in order."""

import asyncio
from collections import deque
from typing import Final

from featcache.control.turns import QUANTUM_UNITS, WAKE_UNITS, Turn
from featcache.errors import CacheClosed

_CLOSED: Final = "the cache was closed"


class Wakes:
    """The futures that are to be told, the first first. A turn of the loop wakes only so many tasks."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._waiting: deque[tuple[asyncio.Future[None], bool]] = deque()

    def wake(self, tag: object) -> None:
        """Wake the task of a waiter, who was given what it waits for."""
        assert isinstance(tag, asyncio.Future), "a waiter is tagged with its future"
        turn = self._turn
        if turn.left > 0 and not self._waiting:
            turn.left -= WAKE_UNITS
            if not tag.done():
                tag.set_result(None)
        else:
            self._add(tag, fails=False)

    def fail(self, tag: object) -> None:
        """Fail the task of a waiter: the cache is closed."""
        assert isinstance(tag, asyncio.Future), "a waiter is tagged with its future"
        self._add(tag, fails=True)

    def _add(self, future: "asyncio.Future[None]", *, fails: bool) -> None:
        if not self._waiting:
            self._turn.later(self._tell_some)
        self._waiting.append((future, fails))

    def _tell_some(self) -> bool:
        turn, waiting = self._turn, self._waiting
        until = max(0, turn.left - QUANTUM_UNITS)
        while waiting and turn.left > until:
            future, fails = waiting.popleft()
            if future.done():
                continue
            turn.left -= WAKE_UNITS
            if fails:
                future.set_exception(CacheClosed(_CLOSED))
                future.exception()  # a put that waits for growth alone learns it otherwise: no complaint
            else:
                future.set_result(None)
        return bool(waiting)

    async def told(self) -> None:
        """Return once everybody has been told."""
        while self._waiting:  # noqa: ASYNC110 - a turn of the loop is what it takes
            await asyncio.sleep(0)
