"""Calls that go on in the order in which they came, though each has to wait for something first."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Line:
    """The calls that wait. One that is cancelled, or fails, gives up its place only."""

    def __init__(self) -> None:
        self._last: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a call waits, or has not gone on yet: a later one is to come after it."""
        return self._last is not None

    async def go(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return what `work` does, once all calls before this one have gone on.

        Those behind go on after the caller has run on from here to its next wait.
        """
        before, done = self._last, asyncio.get_running_loop().create_future()
        self._last = done
        try:
            result = await work()
            if before is not None and not before.done():
                await asyncio.wait([before])
            return result
        finally:
            waits = before is not None and not before.done()
            if self._last is done:
                self._last = before if waits else None
            if before is not None and waits:  # those behind are behind those before, too
                before.add_done_callback(lambda _: done.set_result(None))
            else:
                done.set_result(None)
