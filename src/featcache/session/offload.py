"""Work that may block, in threads of one's own, with cancellation that loses nothing."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from featcache.errors import CacheClosed

T = TypeVar("T")
_THREADS = 4


class Offload:
    """A few threads. They start when first needed, so an idle cache has none.

    anyio's worker threads are not used because a native ``task.cancel()`` goes through their shield:
    the caller would give back an extent that a thread is still copying into.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="featcache")
        self._spawned: set[Future[object]] = set()

    async def run(self, work: Callable[[], T], late: Callable[[], object]) -> T:
        """Await `work` in a thread.

        If the caller is cancelled it goes on at once, and `late` is called in the loop when the
        work, which can't be stopped, is done.

        Raises:
            CacheClosed: the threads are gone.

        """
        loop = asyncio.get_running_loop()
        # What the work holds (a large tensor, say) is let go in the thread before its end is told:
        # the caller's next allocation can then have the same, warm memory.
        box = [work]
        del work
        try:
            # The rule that is switched off would empty the box here, into the executor's hands.
            future = loop.run_in_executor(self._executor, lambda: box.pop()())  # noqa: PLW0108
        except RuntimeError:  # what an executor says that was shut down
            raise CacheClosed("the cache was closed") from None
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if future.done():
                _settle(future, late)
            else:
                future.add_done_callback(lambda done: _settle(done, late))
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
        """Return when everything that was spawned is done."""
        spawned = [asyncio.wrap_future(future) for future in list(self._spawned)]
        await asyncio.gather(*spawned, return_exceptions=True)

    def close(self) -> None:
        """Let the threads end when what they do is done."""
        self._executor.shutdown(wait=False)


def _settle(future: "asyncio.Future[T]", late: Callable[[], object]) -> None:
    if not future.cancelled():
        future.exception()  # seen: nobody is left to raise it to
    late()
