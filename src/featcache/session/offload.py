"""A private thread pool whose cancellation never frees memory that a thread still uses; shared tasks."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from featcache.errors import CacheClosed

T = TypeVar("T")
OnAbandoned = Callable[[T | None], object]
_THREADS = 4


class Offload:
    """A few threads. They start when first needed, so an idle cache has none.

    anyio's worker threads are not used because a native ``task.cancel()`` goes through their shield:
    the caller would give back an extent that a thread is still copying into.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="featcache")
        self._spawned: set[Future[object]] = set()
        self._abandoned: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T], on_abandoned: OnAbandoned[T] | None = None) -> T:
        """Await `work` in a thread.

        If the caller is cancelled it goes on at once. The work, which can't be stopped, runs to its
        end; then `on_abandoned` is called in the loop with its result, or with None if it failed.

        Raises:
            CacheClosed: the threads are gone.

        """
        loop = asyncio.get_running_loop()
        # The objects that the work refers to (a large tensor, say) are released in the thread before
        # its end is told: the caller's next allocation can then have the same, warm memory.
        box = [work]
        del work
        try:
            # The rule that is switched off would empty the box here, into the executor's hands.
            future = loop.run_in_executor(self._executor, lambda: box.pop()())  # noqa: PLW0108
        except RuntimeError:  # the executor was shut down
            raise CacheClosed("the cache was closed") from None
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.done():
                _abandon(future, on_abandoned)
            else:
                self._abandoned.add(future)
                future.add_done_callback(lambda done: _abandon(done, on_abandoned))
                future.add_done_callback(self._abandoned.discard)
            raise

    def spawn(self, work: Callable[[], object]) -> None:
        """Have `work` done in a thread some time soon, or here if the threads are gone."""
        try:
            future = self._executor.submit(work)
        except RuntimeError:
            work()
            return
        self._spawned.add(future)
        future.add_done_callback(self._spawned.discard)

    async def drain(self) -> None:
        """Return when all work that was spawned or abandoned is done, with its `on_abandoned`."""
        while self._spawned or self._abandoned:
            spawned = [asyncio.wrap_future(future) for future in list(self._spawned)]
            await asyncio.gather(*spawned, *self._abandoned, return_exceptions=True)
            await asyncio.sleep(0)  # they leave the sets in callbacks of the loop

    def close(self) -> None:
        """Let the threads end when their work is done."""
        self._executor.shutdown(wait=False)


def _abandon(future: "asyncio.Future[T]", on_abandoned: OnAbandoned[T] | None) -> None:
    failed = future.cancelled() or future.exception() is not None  # retrieved: no caller is left
    if on_abandoned is not None:
        on_abandoned(None if failed else future.result())


class SharedTask(Generic[T]):
    """One run of `work` at a time, in a task of its own, joined by all callers that come meanwhile.

    A caller that is cancelled leaves the task running: the others count on it.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self.task: asyncio.Task[T] | None = None
        """The run in progress."""

    async def join(self) -> T:
        """Return the result of the run in progress, or of a new one."""
        task = self.task
        if task is None:
            task = self.task = asyncio.get_running_loop().create_task(self._work())
            task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: "asyncio.Task[T]") -> None:
        self.task = None
        if not task.cancelled():
            task.exception()  # retrieved: every caller may have been cancelled
