"""An object of the async API, its event loop in a thread, and calls into it from other threads."""

import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from featcache.api.cache import FeatureCache
from featcache.api.client import FeatureClient
from featcache.api.lifecycle import Engine, Lifecycle, LifeState
from featcache.errors import CacheClosed
from featcache.memory.pack import Feature

T = TypeVar("T")
A = TypeVar("A", FeatureCache, FeatureClient)

_inherited: list[AbstractContextManager[BlockingPortal]] = []
"""Portals whose threads a fork has left behind: even dropping them would wait for those."""


class Portal(Generic[A]):
    """One object and the thread in which its loop runs. Its life is the object's (`LifeState`)."""

    def __init__(self, inner: A) -> None:
        self.inner: A = inner
        self._life: Lifecycle[Any] = inner._life  # noqa: SLF001 - one object in two classes
        self._life.hint = "not opened yet: use 'with', or open()"
        self._lock = threading.Lock()
        """Guards `_manager`: the thread that takes it from there ends the loop's thread."""
        self._portal: BlockingPortal | None = None
        self._manager: AbstractContextManager[BlockingPortal] | None = None
        self._closing = False
        self._pid = os.getpid()

    # --- life -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the thread and open the object in it."""
        with self._lock:
            if self._manager is not None or self._life.state is not LifeState.NEW or self._closing:
                raise CacheClosed("it opens once: make another")
            self._manager, self._pid = start_blocking_portal("asyncio"), os.getpid()
            portal = self._portal = self._manager.__enter__()
        try:
            portal.call(self._open)
        except BaseException:
            self._end(portal)  # an interrupt leaves the loop at it: closing cancels that
            raise

    async def _open(self) -> None:
        if self._closing:  # before this step, when there was nothing to close yet
            raise self._life.closed()
        await self.inner.open()

    def close(self) -> None:
        """Close the object, also while it opens, and end the thread. Idempotent."""
        portal = self._portal
        if portal is not None:
            self._closing = True
            self._end(portal)

    def _end(self, portal: BlockingPortal) -> None:
        with self._lock:
            manager, self._manager = self._manager, None
        if manager is None:  # another thread is at it
            return
        if self._pid != os.getpid():  # a forked child has no such thread
            _inherited.append(manager)
            self._portal = None
            return
        try:
            portal.call(self.inner.aclose)
        finally:
            self._portal = None
            manager.__exit__(None, None, None)

    # --- for the callers' threads -----------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The open engine, or raise CacheClosed."""
        engine: Engine = self.inner._opened()  # noqa: SLF001 - one object in two classes
        return engine

    def place(self, device: Any, out: Feature | None) -> torch.device | None:
        """Return where a get puts its copy, as `CacheBase` has it."""
        return self.inner._target(device, out)  # noqa: SLF001 - one object in two classes

    def call(
        self, work: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None
    ) -> T:
        """Await something in the loop. An interrupt here cancels it there.

        A result that it returned by then, and that no caller has, is given to `undo`.
        """
        _ = self.engine  # before a thread that a fork has left behind is waited for
        portal = self._portal
        if portal is None:
            raise self._life.closed()
        if undo is not None:
            return self._call_or_undo(portal, work, undo)
        future = self._start(portal, work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _start(self, portal: BlockingPortal, work: Callable[[], Awaitable[T]]) -> "Future[T]":
        """Start it in the loop, or raise CacheClosed: another thread may have closed it meanwhile."""
        try:
            return portal.start_task_soon(work)
        except RuntimeError:
            if self._portal is portal:  # it runs, and the error is its own
                raise
            raise self._life.closed() from None

    def _call_or_undo(
        self, portal: BlockingPortal, work: Callable[[], Awaitable[T]], undo: Callable[[T], object]
    ) -> T:
        returned, gone = list[T](), threading.Event()

        async def run() -> T:
            result = await work()
            if gone.is_set():
                undo(result)
            else:
                returned.append(result)
            return result

        async def undo_late() -> (
            None
        ):  # in the loop, so that it is before or after the end of `run`
            gone.set()
            while returned:
                undo(returned.pop())

        future: Future[T] | None = None
        try:
            future = self._start(portal, run)
            return future.result()
        except BaseException:
            with contextlib.suppress(CacheClosed):
                self._start(portal, undo_late)
            if future is not None:
                future.cancel()
            raise
