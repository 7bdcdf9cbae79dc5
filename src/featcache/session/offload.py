"""A private thread pool whose cancellation never frees memory that a thread still uses; shared tasks."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from featcache.errors import BackendUnavailable, CacheClosed

T = TypeVar("T")
OnAbandoned = Callable[[T | None], object]
_THREADS = 4


class _Threads(ThreadPoolExecutor):
    """An executor that goes on with the threads it has when the system refuses it another.

    The hook is not public. Should a later Python call it no more, work is refused that could have
    waited for a thread: `_hand_over` rests on nothing but `submit` and the future's own states.
    """

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except (RuntimeError, MemoryError):  # RLIMIT_AS, RLIMIT_NPROC or pids.max is reached
            if not self._threads:  # they take the work from the queue as they come free
                raise


class Offload:
    """A few threads. They start when first needed, so an idle cache has none.

    anyio's worker threads are not used because a native ``task.cancel()`` goes through their shield:
    the caller would give back an extent that a thread is still copying into.
    """

    def __init__(self) -> None:
        self._executor = _Threads(_THREADS, thread_name_prefix="featcache")
        self._closed = False
        self._spawned: set[Future[object]] = set()
        self._abandoned: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T], on_abandoned: OnAbandoned[T] | None = None) -> T:
        """Await `work` in a thread.

        If the caller is cancelled it goes on at once. The work, which can't be stopped, runs to its
        end; then `on_abandoned` is called in the loop with its result, or with None if it failed.

        Raises:
            CacheClosed: the threads are gone, and the work will never run.
            BackendUnavailable: no thread can be started, and the work will never run.

        """
        handed_over: Future[T] = Future()
        # Made first: once the work is handed over nothing may fail before it is awaited.
        future = asyncio.wrap_future(handed_over)
        result = asyncio.shield(future)
        # The objects that the work refers to (a large tensor, say) are released in the thread before
        # its end is told: the caller's next allocation can then have the same, warm memory.
        box = [work]
        del work
        self._hand_over(handed_over, box)
        try:
            return await result
        except asyncio.CancelledError:
            if future.done():
                _abandon(future, on_abandoned)
            else:
                self._abandoned.add(future)
                future.add_done_callback(lambda done: _abandon(done, on_abandoned))
                future.add_done_callback(self._abandoned.discard)
            raise

    async def finish(self, work: Callable[[], T], on_abandoned: OnAbandoned[T] | None = None) -> T:
        """As `run`, of work that takes something down: it is done here if no thread can be had."""
        try:
            return await self.run(work, on_abandoned)
        except ThreadRefused:
            return work()

    def spawn(self, work: Callable[[], object]) -> None:
        """Have `work` done in a thread some time soon, or here if none can be had."""
        future: Future[object] = Future()
        try:
            self._hand_over(future, [work])
        except (CacheClosed, ThreadRefused):
            work()
            return
        self._spawned.add(future)
        future.add_done_callback(self._spawned.discard)

    def _hand_over(self, future: "Future[T]", box: list[Callable[[], T]]) -> None:
        """Queue the work in the box; if that is refused, it provably never runs.

        An executor queues work before it starts a thread for it, and what a refusal leaves in the
        queue is run by the next thread that comes free. So the work is its future's: a thread runs
        it only if it can mark the future as running, which one that is cancelled can't be.
        """
        try:
            self._executor.submit(_run, future, box)
        except (RuntimeError, MemoryError) as error:
            if not future.cancel():
                return  # a thread has taken it from the queue already
            box.clear()
            if self._closed or "shutdown" in str(error):  # of the executor, or of the interpreter
                raise CacheClosed("the cache was closed") from None
            # No thread is there to empty the queue: its cancelled entries go with the executor.
            self._executor.shutdown(wait=False)
            self._executor = _Threads(_THREADS, thread_name_prefix="featcache")
            raise ThreadRefused(
                f"no thread can be started for work that would hold the event loop up: {error}; "
                "raise the limit on threads (ulimit -u, pids.max) or on memory (ulimit -v)"
            ) from error

    async def drain(self) -> None:
        """Return when all work that was spawned or abandoned is done, with its `on_abandoned`."""
        while self._spawned or self._abandoned:
            spawned = [asyncio.wrap_future(future) for future in list(self._spawned)]
            await asyncio.gather(*spawned, *self._abandoned, return_exceptions=True)
            await asyncio.sleep(0)  # they leave the sets in callbacks of the loop

    def close(self) -> None:
        """Let the threads end when their work is done."""
        self._closed = True
        self._executor.shutdown(wait=False)


class ThreadRefused(BackendUnavailable):
    """The system starts no thread for this process, and none is there."""


def _run(future: "Future[T]", box: list[Callable[[], T]]) -> None:
    """Do the work in the box, in a thread, unless it was refused."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = box.pop()()
    except BaseException as error:  # noqa: BLE001 - told to the caller, as executors do
        future.set_exception(error)
        del (
            future
        )  # the exception's traceback refers to this frame, and the future to the exception
    else:
        future.set_result(result)


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
