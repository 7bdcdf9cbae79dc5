"""An event loop in a daemon thread, calls into it from other threads, and its end with the process.

A loop that is left open must neither keep its process alive nor be frozen in the middle of what it
does. The interpreter ends in this order: it runs the hooks of `threading._register_atexit`, waits for
the threads that are no daemons, runs those of `atexit`, and then stops the daemons where they stand.
So the loops are ended by a hook of the first kind, which `concurrent.futures` uses as well:

- before the join, since a thread that waits in a call here (or a worker of an executor that does, for
  which the hook of `concurrent.futures` waits) ends only when the loop is closed. A hook of `atexit`
  would come after that join, which would then deadlock, and a thread of our own that waits for the
  main thread comes after the executors';
- while executors still take work: closing an owner gives its memory back in a thread;
- in children of `multiprocessing` too, which run no hooks of `atexit`.

The thread is a daemon all the same, so that the wait for it can have a bound. Where the private function
is missing, `atexit` is the next best.
"""

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 - its hook first: the hooks run in reverse order
import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from featcache.errors import BackendUnavailable, CacheClosed, FeatcacheError

T = TypeVar("T")
Undo = Callable[[T], Awaitable[object] | None]

_EXIT_S = 10.0
"""How long the end of the process waits for its loops: a stopped owner is given a second by itself."""
_FIRST_LOOK_S = 0.05
_LOOK_S = 0.5
_LAST_CALLS_S = 1.0
"""How long a loop that ends waits for calls that its closing has failed."""


def _wait(wait: Callable[[float], bool]) -> None:
    """Call `wait` with seconds (-1: no limit) until it returns True; an interrupt ends it at any time.

    A signal that comes just before the main thread sleeps does not wake it: Python has looked for
    signals by then, and the system has none to deliver any more. So that thread looks again.
    """
    if wait(_FIRST_LOOK_S):
        return
    look_s = _LOOK_S if threading.current_thread() is threading.main_thread() else -1.0
    while not wait(look_s):
        pass


class Call(Generic[T]):
    """Work for the loop, and the thread that waits for its result.

    The work is always begun, even if the caller is interrupted: it may be the one to give something
    back. An interrupt then cancels it; a result that no caller has is given to `undo`, in the loop.
    """

    __slots__ = (
        "_abandoned",
        "_context",
        "_ended",
        "_error",
        "_results",
        "_task",
        "_undo",
        "_work",
        "taken",
    )

    def __init__(self, work: Callable[[], Awaitable[T]], undo: Undo[T] | None = None) -> None:
        self._work = work
        self._undo = undo
        self._task: asyncio.Task[None] | None = None
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._abandoned = False
        self._context = (
            contextvars.copy_context()
        )  # what the caller bound for its log is the work's too
        self._ended = threading.Lock()
        self._ended.acquire()
        self.taken = False
        """Whether the caller has its result, or its error."""

    # --- in the loop ------------------------------------------------------------------------------

    def begin(self, calls: "dict[Call[Any], asyncio.Task[None] | None]") -> None:
        """Start the work in a task."""
        loop = asyncio.get_running_loop()
        self._task = calls[self] = loop.create_task(self._run(calls), context=self._context)

    async def _run(self, calls: "dict[Call[Any], asyncio.Task[None] | None]") -> None:
        try:
            result = await self._work()
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._error = error
        else:
            self._results.append(result)
            if self._abandoned:
                await self._give_back()
        finally:
            del calls[self]
            self._ended.release()

    def abandon(self, calls: "dict[Call[Any], asyncio.Task[None] | None]") -> None:
        """Cancel the work: its caller was interrupted."""
        self._abandoned = True
        if self._task is None:
            return
        loop = asyncio.get_running_loop()
        if self._task.done():
            self._task = calls[self] = loop.create_task(self._give_back())
            self._task.add_done_callback(lambda _: calls.pop(self))
        else:
            # A turn later: its first step, which is in the queue by now, comes before.
            loop.call_soon(self._task.cancel)

    def fail(self, error: Exception) -> None:
        """End it, of which the loop will run no more."""
        self._error = error
        if self._ended.locked():  # else its caller has gone
            self._ended.release()

    async def _give_back(self) -> None:
        while self._results:
            result = self._results.pop()
            if self._undo is not None:
                with contextlib.suppress(FeatcacheError):  # there is nothing left to give back
                    if (undone := self._undo(result)) is not None:
                        await undone

    # --- in the caller's thread ---------------------------------------------------------------------

    def result(self) -> T:
        """Wait for the end; return the result or raise the error. CancelledError if the loop ended."""
        _wait(lambda slice_s: self._ended.acquire(timeout=slice_s))
        self.taken = True
        error, self._error = self._error, None
        if error is None:
            return self._results[-1]
        try:
            raise error
        finally:
            del error  # or its traceback would keep this frame, and so itself


class LoopThread:
    """A running loop, until it is ended: `close` is then awaited in it, and its thread stops."""

    def __init__(
        self,
        close: Callable[[], Awaitable[object]],
        on_exit: Callable[[], object],
        *,
        last: bool,
    ) -> None:
        """`on_exit` is called as the process exits; if `last`, it is ended after those that are not.

        Raises:
            BackendUnavailable: there are no descriptors for the loop.

        """
        self._close = close
        self.on_exit = on_exit
        self.last = last
        self.ends = False
        """Whether it was told to end."""
        self.error: BaseException | None = None
        """What closing raised, or ended the loop before that."""
        self._broke = False
        """Whether the loop could not run, or something that it called ended it."""
        self._lock = threading.Lock()
        """Guards `_accepts`: a call comes before the loop's last turns, or is refused."""
        self._accepts = True
        self._calls: dict[Call[Any], asyncio.Task[None] | None] = {}
        """Those that have not ended, with their tasks once they have begun."""
        self._told = asyncio.Event()
        try:
            self._loop = asyncio.new_event_loop()
        except OSError as error:
            raise BackendUnavailable(
                f"no event loop can be made: {error}; raise the limit on descriptors (ulimit -n)"
            ) from error
        self._thread = threading.Thread(target=self._main, name="featcache-loop", daemon=True)

    def start(self) -> None:
        """Start the thread.

        Raises:
            CacheClosed: the interpreter is exiting.
            BackendUnavailable: there can be no thread now.

        """
        running.add(self)
        if exits.begun:  # after it was added: the exit saw it, or it sees the exit
            self._never_ran()
            raise CacheClosed("the interpreter is exiting: nothing opens any more")
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            self._never_ran()
            raise BackendUnavailable(
                f"no thread can be started for the event loop: {error}; raise the limit on threads "
                "(ulimit -u, pids.max) or on memory (ulimit -v)"
            ) from error

    def _never_ran(self) -> None:
        running.discard(self)
        self._loop.close()

    @property
    def ident(self) -> int | None:
        """The thread's number, once it runs."""
        return self._thread.ident

    def is_alive(self) -> bool:
        """Whether the thread has not stopped."""
        return self._thread.is_alive()

    def post(self, call: Call[Any]) -> None:
        """Have a call begun in the loop, or raise CacheClosed if that ends."""
        with self._lock:
            if not self._accepts:
                raise self._ended()
            self._calls[call] = None
            self._loop.call_soon_threadsafe(call.begin, self._calls)

    def abandon(self, call: Call[Any]) -> None:
        """Have a call cancelled whose caller was interrupted."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the work with it
            self._loop.call_soon_threadsafe(call.abandon, self._calls)

    def end(self) -> None:
        """Tell it to close and stop, without waiting. Idempotent, and safe wherever a finalizer runs."""
        self.ends = True
        if self in running:  # not so in a forked child, whose copy of the loop wakes the parent's
            with contextlib.suppress(RuntimeError):  # it has closed meanwhile
                self._loop.call_soon_threadsafe(self._told.set)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the thread has stopped."""
        thread = self._thread
        if thread.ident is None:
            return
        if timeout_s is not None:
            thread.join(timeout_s)
            return

        def stopped(slice_s: float) -> bool:
            thread.join(None if slice_s < 0 else slice_s)
            return not thread.is_alive()

        _wait(stopped)

    def _ended(self) -> FeatcacheError:
        if not self._broke:
            return CacheClosed("it was closed meanwhile")
        ended = BackendUnavailable(f"the event loop of its thread ended: {self.error}")
        ended.__cause__ = self.error
        return ended

    def raise_error(self) -> None:
        """Raise what closing raised; BackendUnavailable if the loop broke off before."""
        if self._broke:
            raise self._ended()
        if self.error is not None:
            raise self.error

    # --- in the thread ------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            # The runner cancels what is left, and closes the loop.
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                try:
                    runner.run(self._serve())
                except BaseException as error:  # noqa: BLE001 - the callers'
                    self.error, self._broke = error, True
                    runner.run(self._give_up())
        except RuntimeError as error:  # the loop can't run at all
            self.error, self._broke = self.error or error, True
        finally:
            with self._lock:
                self._accepts = False
            for call in self._calls.copy():  # none, unless the loop broke off
                call.fail(self._ended())
            running.discard(self)

    async def _give_up(self) -> None:
        await self._close()

    async def _serve(self) -> None:
        await self._told.wait()
        try:
            await self._close()
        except BaseException as error:  # noqa: BLE001 - the closer's
            self.error = error
        with self._lock:
            self._accepts = False
        # What was posted before is in the queue: one turn begins it, the next takes its first step.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if tasks := [task for task in self._calls.values() if task is not None]:
            await asyncio.wait(tasks, timeout=_LAST_CALLS_S)


running: set[LoopThread] = set()
"""Those that are open in this process."""
_inherited: list[LoopThread] = []
"""Those whose threads a fork has left behind, kept: a loop warns when it is dropped unclosed."""


class _Exits:
    """The end of the process."""

    def __init__(self) -> None:
        self.begun = False

    def end_all(self) -> None:
        """End every loop: readers first, or they would see their owner go."""
        self.begun = True
        give_up_s = time.monotonic() + _EXIT_S
        for last in (False, True):
            ending = [thread for thread in running.copy() if thread.last is last]
            for thread in ending:
                thread.on_exit()
                thread.end()
            for thread in ending:
                thread.join(max(0.0, give_up_s - time.monotonic()))


def _after_fork_in_child() -> None:
    _inherited.extend(running)
    running.clear()


exits = _Exits()
os.register_at_fork(after_in_child=_after_fork_in_child)
try:
    getattr(threading, "_register_atexit", atexit.register)(exits.end_all)
except RuntimeError:  # imported as the interpreter exits
    exits.begun = True
