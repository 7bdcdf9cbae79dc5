"""An object of the async API, its event loop in a thread, and calls into it from other threads."""

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import torch

from featcache.api.cache import FeatureCache
from featcache.api.client import FeatureClient
from featcache.api.lifecycle import Engine, Lifecycle, LifeState
from featcache.api.observer import Observer
from featcache.api.serving import served_here
from featcache.blocking.loopthread import Call, LoopThread, Undo
from featcache.errors import CacheClosed, WrongLoop
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef, path_of

T = TypeVar("T")
A = TypeVar("A", FeatureCache, FeatureClient, Observer)
C = TypeVar("C", FeatureCache, FeatureClient)
"""Those of them that read and put."""

_INTERRUPTED_S = 0.5
"""How long an interrupted `open` waits for its loop to have undone it; the loop goes on without."""


class Portal(Generic[A]):
    """One object and the thread in which its loop runs. Its life is the object's (`LifeState`).

    Every wait of the blocking API for the loop is here, so an interrupt (Ctrl-C) is raised at once in
    each: the loop undoes by itself what the caller gave up.
    """

    def __init__(self, inner: A) -> None:
        self.inner: A = inner
        self._life: Lifecycle[Any] = inner._life  # noqa: SLF001 - one object in two classes
        self._life.hint = "not opened yet: use 'with', or open()"
        self._lock = threading.Lock()
        """Guards `_thread` and `_ends`: of the threads that end it, one does."""
        self._thread: LoopThread | None = None
        self._ends = False
        self._closed = False
        """Whether `close` has come, after which nothing opens it any more."""
        self._finalizer: weakref.finalize[[], Any] | None = None
        self._pid = os.getpid()

    # --- life -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the thread and open the object in it."""
        self.check_thread()
        opening, thread = Call(self._open), None
        try:  # from before the thread starts: an interrupt may come at any step
            with self._lock:
                if self._thread is not None or self._life.state is not LifeState.NEW or self._ends:
                    raise CacheClosed("it opens once: make another")
                thread, self._pid = self._loop_thread(), os.getpid()
                self._thread = thread
                thread.start()
                # An object that is dropped while it is open closes, with nobody waiting.
                self._finalizer = weakref.finalize(self, thread.end)
                self._finalizer.atexit = False  # `exits` sees to that, and waits
            thread.post(opening)
            opening.result()
        except BaseException as error:
            if thread is not None:
                # Interrupted, it is at it still: closing cancels that.
                with contextlib.suppress(Exception):  # the error that counts is the first
                    self._end(thread, None if opening.taken else _INTERRUPTED_S)
            if isinstance(error, asyncio.CancelledError):
                raise self._life.closed() from None
            raise

    def _loop_thread(self) -> LoopThread:
        inner = self.inner

        async def aclose() -> None:
            await inner.aclose()  # not of `self`, which can then be dropped while the loop runs

        # Owners last: at the exit of the process their readers are to have said goodbye.
        return LoopThread(aclose, self._life.on_exit, last=isinstance(inner, FeatureCache))

    async def _open(self) -> None:
        thread = self._thread
        if thread is None or thread.ends:  # before this step, when there was nothing to close yet
            raise self._life.closed()
        await self.inner.open()

    def close(self) -> None:
        """Close the object, also while it opens, and end the thread. Idempotent."""
        thread = self._thread
        if thread is not None:
            if self._pid == os.getpid():
                self.check_thread()
            self._closed = True
            self._end(thread, None)

    def _end(self, thread: LoopThread, patience_s: float | None) -> None:
        if self._pid != os.getpid():  # a forked child has no such thread
            self._thread = None
            return
        with self._lock:
            if self._ends or self._thread is not thread:  # another thread is at it
                return
            self._ends = True
        thread.end()
        thread.join(patience_s)
        self._forget(thread)
        thread.raise_error()

    def _forget(self, thread: LoopThread) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        with self._lock:
            self._thread = None
            # One that could not be opened can be opened again.
            self._ends = self._closed or thread.is_alive()

    # --- for the callers' threads -----------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The open engine, or raise CacheClosed."""
        # An observer's is none of these, and its calls look at none.
        engine: Any = self.inner._opened()  # noqa: SLF001 - one object in two classes
        opened: Engine = engine
        return opened

    def place(self, device: Any, out: Feature | None) -> torch.device | None:
        """Return where a get puts its copy, as `CacheBase` has it."""
        inner = self.inner
        assert not isinstance(inner, Observer), "it reads nothing"
        return inner._target(device, out)  # noqa: SLF001 - one object in two classes

    def check_thread(self, ref: FeatureRef | None = None) -> None:
        """Raise WrongLoop in the thread of the event loop that has to answer: the call would deadlock.

        That is this object's loop (a hook runs there), and the loop of the owner that a client reads,
        if it is of this thread. A wait in any other loop's thread only holds that loop, as any call
        that blocks does: a notebook's cells run in one, where nothing else waits, so it is allowed.
        """
        thread = self._thread
        if thread is not None and thread.ident == threading.get_ident():
            raise WrongLoop(
                f"{self!r} was called in its own event loop's thread "
                f"{threading.current_thread().name!r} (a hook runs there), which would wait for itself: "
                "make the call in another thread"
            )
        if asyncio._get_running_loop() is None:  # noqa: SLF001 - the form that does not raise
            return
        owner = served_here(self._endpoints(ref))
        if owner is not None:
            raise WrongLoop(
                f"thread {threading.current_thread().name!r} runs the event loop of the owner at {owner}, "
                "which can't answer while this call waits: use featcache.connect and await it here, or "
                "make the call in another thread (asyncio.to_thread)"
            )

    def _endpoints(self, ref: FeatureRef | None) -> set[str]:
        """Return the endpoints of the owners that a call may wait for."""
        inner = self.inner
        if isinstance(inner, FeatureCache):
            return set()
        found = inner._endpoints()  # noqa: SLF001 - one object in two classes
        return found if ref is None else found | {path_of(ref.endpoint)}

    def call(
        self,
        work: Callable[[], Awaitable[T]],
        undo: Undo[T] | None = None,
        ref: FeatureRef | None = None,
    ) -> T:
        """Await something in the loop. An interrupt here cancels it there.

        A result that it returned by then, and that no caller has, is given to `undo`. `ref` is what
        it is about, whose pool may be yet to be attached.
        """
        _ = self.engine  # before a thread that a fork has left behind is waited for
        self.check_thread(ref)
        return self._call(work, undo)

    def look(self, read: Callable[[], T]) -> T:
        """Return what `read` returns in the loop, which needs no other: at once if this is its thread."""
        _ = self.engine
        thread = self._thread
        if thread is not None and thread.ident == threading.get_ident():
            return read()

        async def look() -> T:
            return read()

        return self._call(look, None)

    def _call(self, work: Callable[[], Awaitable[T]], undo: Undo[T] | None) -> T:
        thread = self._thread
        if thread is None:
            raise self._life.closed()
        call = Call(work, undo)
        try:
            thread.post(call)
            return call.result()
        except BaseException as error:
            if not call.taken:
                thread.abandon(call)
            if isinstance(error, asyncio.CancelledError):  # the loop ended before the work did
                raise self._life.closed() from None
            raise

    def __repr__(self) -> str:
        return f"<blocking.{repr(self.inner)[1:]}"
