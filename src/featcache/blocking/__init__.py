"""The same API for code that has no event loop: worker processes, scripts, notebooks.

``featcache.blocking.create`` and ``connect`` take what `featcache.create` and `featcache.connect`
take and are opened with plain ``with``. An event loop in a thread of their own keeps sessions and the
recycler going; reads of a pool that is attached never enter it, they run in the caller's thread.
"""

import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from types import EllipsisType, TracebackType
from typing import Any, Generic, Literal, NoReturn, Self, TypeVar

import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal

from featcache.api import cache as _cache
from featcache.api import client as _client
from featcache.api.arguments import check_ref, no_pickle
from featcache.api.cache import FeatureCache as AsyncCache
from featcache.api.client import FeatureClient as AsyncClient
from featcache.blocking.keys import BlockingByKey
from featcache.core.pressure import PressureLevel
from featcache.errors import CacheClosed, GetTimeout
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef
from featcache.session.borrow import Borrow
from featcache.settings import Settings, parse_timeout
from featcache.statistics import Statistics

__all__ = ["FeatureCache", "FeatureClient", "Pressure", "connect", "create"]

_NOT_OPENED = "not opened yet: use 'with', or open()"
T = TypeVar("T")
_inherited: list[AbstractContextManager[BlockingPortal]] = []
A = TypeVar("A", AsyncCache, AsyncClient)


class _Blocking(BlockingByKey, Generic[A]):
    """An object of the async API and the thread in which its loop runs."""

    def __init__(self, inner: A) -> None:
        self._inner: A = inner
        self._portal: BlockingPortal | None = None
        self._portal_manager: AbstractContextManager[BlockingPortal] | None = None
        self._why_closed: str | None = None
        inner.not_opened = _NOT_OPENED

    # --- life -----------------------------------------------------------------------------------

    def open(self) -> Self:
        """Open it; ``with`` does. Raises as the async form."""
        if self._why_closed is not None or self._portal is not None:
            raise CacheClosed("it opens once: make another")
        manager = start_blocking_portal("asyncio")
        portal = manager.__enter__()
        try:
            portal.call(self._inner.open)
        except BaseException:
            manager.__exit__(None, None, None)
            raise
        self._portal, self._portal_manager = portal, manager
        return self

    def close(self) -> None:
        """Close it; ``with`` does. Idempotent."""
        portal, self._portal = self._portal, None
        manager, self._portal_manager = self._portal_manager, None
        if portal is None or manager is None:
            return
        self._why_closed = "it was closed"
        if not self._inner.is_open:
            # A forked child has no such thread; even dropping the manager would wait for it.
            _inherited.append(manager)
            return
        try:
            portal.call(self._inner.aclose)
        finally:
            manager.__exit__(None, None, None)

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process."""
        return self._portal is not None and self._inner.is_open

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what is to be done."""
        no_pickle(self)

    def __repr__(self) -> str:
        return f"<blocking.{repr(self._inner)[1:]}"

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self, work: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None
    ) -> T:
        """Await something in the loop. An interrupt here cancels it there.

        What it returned by then, and nobody has, is `undo`'s to give back.
        """
        portal = self._portal
        if portal is None:
            raise CacheClosed(self._why_closed or _NOT_OPENED)
        self._inner.check_open()  # before a thread that a fork has left behind is asked
        if undo is None:
            future = self._start(portal, work)
            try:
                return future.result()
            except BaseException:
                future.cancel()
                raise
        return self._call_or_undo(portal, work, undo)

    def _start(self, portal: BlockingPortal, work: Callable[[], Awaitable[T]]) -> "Future[T]":
        """Have the loop do it, or raise CacheClosed: another thread may have closed it meanwhile."""
        try:
            return portal.start_task_soon(work)
        except RuntimeError:
            if self._portal is portal:  # it runs, and says what is wrong
                raise
            raise CacheClosed(self._why_closed or _NOT_OPENED) from None

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

        async def settle() -> None:  # in the loop, so that it is before or after the end of `run`
            gone.set()
            while returned:
                undo(returned.pop())

        future: Future[T] | None = None
        try:
            future = self._start(portal, run)
            return future.result()
        except BaseException:
            with contextlib.suppress(CacheClosed):
                self._start(portal, settle)
            if future is not None:
                future.cancel()
            raise

    # --- reading --------------------------------------------------------------------------------

    def get(
        self,
        ref: FeatureRef | str | bytes,
        *,
        device: Any = None,
        out: Feature | None = None,
        timeout: float | None = None,
    ) -> Feature:
        """Return a copy and pay the read, as `featcache.FeatureClient.get`."""
        inner = self._inner
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                return self._get_key(ref, device, out, timeout)
            check_ref(ref)
        if inner.has_attached(ref):
            try:
                return inner.get_nowait(ref, device=device, out=out)
            except GetTimeout:
                pass  # on its way
        # Only waited for: on a GPU it is the stream of this thread whose order counts.
        place = inner.place_of(ref, device, out)
        if self._prepared(ref, place, timeout, borrows=False):
            return inner.get_nowait(ref, device=device, out=out)
        if out is None:
            out = inner.empty(ref, device=device)
        return self._call(lambda: inner.get(ref, out=out, timeout=timeout))

    def get_nowait(
        self, ref: FeatureRef, *, device: Any = None, out: Feature | None = None
    ) -> Feature:
        """As `featcache.FeatureClient.get_nowait`: nothing is waited for."""
        return self._inner.get_nowait(ref, device=device, out=out)

    def borrow(self, ref: FeatureRef | str | bytes, *, timeout: float | None = None) -> "Lease":
        """Lend a view for the length of a ``with`` block, as `featcache.FeatureClient.borrow`."""
        return Lease(self, self._inner.borrow(ref, timeout=timeout))

    def lend(self, borrow: Borrow) -> Feature:
        """Enter a borrow, waiting for its bytes; for `Lease`."""
        ref, timeout = borrow.ref, borrow.timeout_s
        if borrow.by_key or ref is None:
            return self._call(borrow.__aenter__)
        if self._inner.has_attached(ref):
            try:
                return borrow.__enter__()
            except GetTimeout:
                pass  # on its way
        if self._prepared(ref, None, timeout, borrows=True):
            return borrow.__enter__()
        return self._call(borrow.__aenter__)

    def _prepared(
        self, ref: FeatureRef, place: torch.device | None, timeout: float | None, *, borrows: bool
    ) -> bool:
        inner = self._inner
        return inner.prepare_blocking(ref, place, timeout, borrows=borrows) or self._call(
            lambda: inner.prepare(ref, place, timeout, borrows=borrows)
        )

    def release(self, ref: FeatureRef, *, timeout: float | None = None) -> None:
        """Pay the read without reading."""
        self._call(lambda: self._inner.release(ref, timeout=timeout))

    def discard(self, ref: FeatureRef) -> None:
        """Take a ref back."""
        self._call(lambda: self._inner.discard(ref))

    def statistics(self) -> Statistics:
        """Return the counts, taken in the loop."""
        inner = self._inner

        async def look() -> Statistics:
            return inner.statistics()

        return self._call(look)


class Lease:
    """One borrow, for code with no loop: its value is the view, and leaving the block pays."""

    __slots__ = ("_borrow", "_cache")

    def __init__(self, cache: _Blocking[Any], borrow: Borrow) -> None:
        self._cache = cache
        self._borrow = borrow

    def __enter__(self) -> Feature:
        """Return the view, once its bytes are there."""
        return self._cache.lend(self._borrow)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Empty the view and pay the read."""
        self._borrow.close()


class FeatureClient(_Blocking[AsyncClient]):
    """`featcache.FeatureClient` for code with no loop."""

    def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: Literal["wait", "raise", "spill"] = "wait",
    ) -> FeatureRef:
        """Copy a feature in, waiting for room, as `featcache.FeatureClient.put`."""
        inner, timeout_s = self._inner, parse_timeout(timeout)
        places = self._call(lambda: inner.places(on_full, key))
        staged = inner.stage(places, feature, readers=readers, key=key, ttl=ttl)
        return self._call(lambda: inner.put_staged(staged, timeout_s, on_full))


class FeatureCache(_Blocking[AsyncCache]):
    """`featcache.FeatureCache` for code with no loop."""

    def __init__(self, inner: AsyncCache) -> None:
        super().__init__(inner)
        self.pressure = Pressure(self)

    @property
    def endpoint(self) -> str:
        """The path of the socket that `connect` takes."""
        return self._inner.endpoint

    def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: Literal["wait", "raise", "spill"] = "wait",
    ) -> FeatureRef:
        """Copy a feature in, waiting for room, as `featcache.FeatureCache.put`."""
        inner, timeout_s = self._inner, parse_timeout(timeout)
        inner.check_open()
        staged = inner.stage(feature, readers=readers, key=key, ttl=ttl, on_full=on_full)
        return self._call(lambda: inner.put_staged(staged, timeout_s, on_full))

    def put_nowait(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: Any = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
    ) -> FeatureRef:
        """Copy a feature in, or raise PoolFull: it waits for its loop, never for room."""
        inner = self._inner
        inner.check_open()
        staged = inner.stage(feature, readers=readers, key=key, ttl=ttl, on_full="raise")
        return self._call(lambda: inner.put_staged_nowait(staged))


class Pressure:
    """The pool's pressure, for code with no loop."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache

    @property
    def level(self) -> PressureLevel:
        """The level now."""
        return self._cache._inner.pressure.level  # noqa: SLF001 - one object in two classes

    def below(self, level: PressureLevel | str, *, timeout: float | None = None) -> None:
        """Return once the level is lower, as `featcache.pool.pressure.Pressure.below`."""
        inner = self._cache._inner  # noqa: SLF001 - one object in two classes
        self._cache._call(lambda: inner.pressure.below(level, timeout=timeout))  # noqa: SLF001


def create(
    *,
    device: Any = "cpu",
    capacity: int | str | None = None,
    endpoint: str | None = None,
    name: str | None = None,
    spill: int | str | None = None,
    settings: Settings | None = None,
    initial: int | str | None = None,
    segment: int | str | None = None,
    idle: float | None = None,
) -> FeatureCache:
    """Return a cache to be opened with ``with``; the arguments are `featcache.create`'s."""
    return FeatureCache(
        _cache.create(
            device=device,
            capacity=capacity,
            endpoint=endpoint,
            name=name,
            spill=spill,
            settings=settings,
            initial=initial,
            segment=segment,
            idle=idle,
        )
    )


def connect(
    endpoint: str | None = None,
    *,
    device: Any = None,
    name: str | None = None,
    settings: Settings | None = None,
) -> FeatureClient:
    """Return a client to be opened with ``with``; the arguments are `featcache.connect`'s."""
    return FeatureClient(_client.connect(endpoint, device=device, name=name, settings=settings))
