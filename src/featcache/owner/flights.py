"""Work that all who want the same thing share: begun once, and cancelled when the last of them leaves."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from featcache.errors import CacheClosed

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Flight(Generic[T]):
    """One run, and how many wait for it."""

    def __init__(self, task: "asyncio.Task[T]") -> None:
        self.task = task
        self.waiting = 0


class Flights(Generic[K, T]):
    """Runs in progress, by what they are for.

    ::

        (none) ──`join`──→ FLYING ──its work ends──→ (none): all that joined have its result or its error
                             │
                             └──the last that waits is cancelled, or `close`──→ cancelled
    """

    def __init__(self) -> None:
        self._flights: dict[K, Flight[T]] = {}
        self._closed = False

    def __contains__(self, key: K) -> bool:
        """Whether a run is in progress."""
        return self._flying(key) is not None

    def _flying(self, key: K) -> Flight[T] | None:
        # One that has ended, in this turn of the loop, is none: joined, it would end again without a turn,
        # and who asks until the key is there, which was evicted since, would hold the loop.
        flight = self._flights.get(key)
        return None if flight is None or flight.task.done() else flight

    async def join(
        self,
        key: K,
        work: Callable[[], Coroutine[Any, Any, T]],
        done: Callable[[], object] | None = None,
    ) -> T:
        """Return the result of the run in progress, or of a new one.

        `done` is called once the run that this call has begun is over, which may be long after this call
        was cancelled: others may have joined. It is called before this returns if it began none.

        Raises:
            CacheClosed: `close` was called, also meanwhile.

        """
        flight = self._flying(key)
        if done is not None and (flight is not None or self._closed):
            done()
        if self._closed:
            raise CacheClosed("the cache was closed")
        if flight is None:
            task = asyncio.get_running_loop().create_task(work())
            flight = self._flights[key] = Flight(task)
            begun = flight
            task.add_done_callback(lambda _: self._ended(key, begun))
            if done is not None:
                task.add_done_callback(lambda _: done())
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled() and not is_cancelled():
                raise CacheClosed("the cache was closed") from None
            raise
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # In this order: whoever comes from now on begins anew.
                self._forget(key, flight)
                flight.task.cancel()

    async def ended(self, key: K) -> None:
        """Return when the run in progress has ended, however it did, without a part in it."""
        flight = self._flights.get(key)
        if flight is not None:
            await asyncio.wait([flight.task])

    def _ended(self, key: K, flight: Flight[T]) -> None:
        self._forget(key, flight)
        if not flight.task.cancelled():
            flight.task.exception()  # retrieved: all that waited may have been cancelled

    def _forget(self, key: K, flight: Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def close(self) -> None:
        """Cancel all."""
        self._closed = True
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_cancelled() -> bool:
    """Whether the running task was asked to end."""
    caller = asyncio.current_task()
    return caller is not None and caller.cancelling() > 0
