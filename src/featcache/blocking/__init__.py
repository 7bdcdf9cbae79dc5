"""The same API for code that has no event loop: worker processes, scripts, notebooks.

``featcache.blocking.create`` and ``connect`` take the arguments of `featcache.create` and
`featcache.connect` and are opened with plain ``with``. An event loop in a thread of its own keeps
sessions and the recycler going; reads of a pool that is attached never enter it, they run in the
caller's thread, and so do a client's puts into room that it was given ahead. These objects are safe in
any thread; they are closed when the main thread ends. A call that would wait for the loop of its own
thread raises WrongLoop.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from featcache.api.arguments import check_ref
from featcache.api.cache import FeatureCache as AsyncCache
from featcache.api.cache import create as _create
from featcache.api.client import FeatureClient as AsyncClient
from featcache.api.client import connect as _connect
from featcache.api.many import parse_members
from featcache.blocking.keys import get_by_key, get_or_put
from featcache.blocking.life import BlockingLife
from featcache.blocking.many import get_many, put_many
from featcache.blocking.observer import Observer, observe
from featcache.blocking.portal import C, Portal
from featcache.core.pressure import PressureLevel
from featcache.errors import GetTimeout, StaleRef
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef
from featcache.session.arguments import check_make, key_bytes, parse_keys
from featcache.session.batch_staging import parse_features
from featcache.session.borrow import Borrow
from featcache.session.copier import targets_of
from featcache.session.reader import Reader
from featcache.settings import parse_timeout
from featcache.statistics import Statistics

__all__ = [
    "FeatureCache",
    "FeatureClient",
    "Observer",
    "Pressure",
    "connect",
    "create",
    "observe",
]

P = ParamSpec("P")
B = TypeVar("B")
OnFull = Literal["wait", "raise", "spill"]


class _BlockingBase(BlockingLife[C]):
    """The API that owners and clients share."""

    def statistics(self) -> Statistics:
        """Return counters and gauges, taken in the loop."""
        return self._portal.look(self._portal.inner.statistics)

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
        portal = self._portal
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                timeout_s = None if timeout is None else parse_timeout(timeout)
                plain = type(ref) is str or type(ref) is bytes
                return get_by_key(portal, ref if plain else key_bytes(ref), device, out, timeout_s)
            check_ref(ref)
        reader, place = portal.engine.reader, portal.place(device, out)
        if reader.pools.has(ref):
            try:
                return reader.get_nowait(ref, place, out)
            except GetTimeout:
                pass  # on its way
        if reader.pools.is_far(ref):
            limit_s = parse_timeout(timeout)
            return portal.call(lambda: reader.get(ref, place, out, limit_s), ref=ref)
        # Only waited for: on a GPU it is the stream of this thread whose order counts.
        _, target = targets_of(ref, place, out)
        timeout_s = parse_timeout(timeout)
        if self._prepared(reader, ref, target, timeout_s, borrows=False):
            return reader.get_nowait(ref, place, out)
        if out is None:
            out = reader.empty(ref, place)
        return portal.call(lambda: reader.get(ref, None, out, timeout_s), ref=ref)

    def get_nowait(
        self, ref: FeatureRef | str | bytes, *, device: Any = None, out: Feature | None = None
    ) -> Feature:
        """As `featcache.FeatureClient.get_nowait`: nothing is waited for."""
        return self._portal.inner.get_nowait(ref, device=device, out=out)

    def borrow(
        self, ref: FeatureRef | str | bytes, *, timeout: float | None = None
    ) -> "BlockingBorrow":
        """Lend a view for the length of a ``with`` block, as `featcache.FeatureClient.borrow`."""
        return BlockingBorrow(self, self._portal.inner.borrow(ref, timeout=timeout))

    def _enter(self, borrow: Borrow) -> Feature:
        """Enter a borrow, waiting for its bytes."""
        ref, portal = borrow.ref, self._portal
        if ref is None:  # a key's, to be looked up
            with contextlib.suppress(GetTimeout, StaleRef):  # on its way, or gone with its writer
                if (view := borrow.enter_at_hand()) is not None:
                    return view
            return portal.call(borrow.__aenter__, lambda _: borrow.close(pays=False))
        reader = portal.engine.reader
        if reader.pools.has(ref):
            try:
                return borrow.__enter__()
            except GetTimeout:
                pass  # on its way
        if self._prepared(reader, ref, None, borrow.timeout_s, borrows=True):
            return borrow.__enter__()
        return portal.call(borrow.__aenter__, lambda _: borrow.close(pays=False), ref)

    def _prepared(
        self,
        reader: Reader,
        ref: FeatureRef,
        place: torch.device | None,
        timeout_s: float | None,
        *,
        borrows: bool,
    ) -> bool:
        portal = self._portal
        portal.check_thread(ref)  # before a wait for bytes that its own loop would have to bring
        return reader.prepare_blocking(ref, place, timeout_s, borrows=borrows) or portal.call(
            lambda: reader.prepare(ref, place, timeout_s, borrows=borrows), ref=ref
        )

    def release(self, ref: FeatureRef, *, timeout: float | None = None) -> None:
        """Pay the read without reading."""
        self._portal.call(lambda: self._portal.inner.release(ref, timeout=timeout), ref=_of(ref))

    def discard(self, ref: FeatureRef) -> None:
        """Take a ref back, as `featcache.FeatureClient.discard`."""
        self._portal.call(lambda: self._portal.inner.discard(ref), ref=_of(ref))

    # --- putting, and the directory -----------------------------------------------------------------

    def put(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: OnFull = "wait",
    ) -> FeatureRef:
        """Copy a feature in, waiting for room, as `featcache.FeatureCache.put`."""
        timeout_s, engine = parse_timeout(timeout), self._portal.engine
        writers = engine.writers_nowait(on_full, key) or self._portal.call(
            lambda: engine.writers(on_full, key, timeout_s)
        )
        staged = writers.stage(feature, readers, ttl, key)
        ref = staged.put_here(self._portal.check_thread, self._portal.look)
        return ref or self._portal.call(
            lambda: staged.put(timeout_s, engine.spills, wait=on_full != "raise"),
            self._portal.inner.discard,
        )

    def get_or_put(
        self,
        key: str | bytes,
        make: Callable[[], Feature],
        *,
        device: Any = None,
        timeout: float | None = None,
    ) -> Feature:
        """As `featcache.FeatureCache.get_or_put`; `make` runs in this thread."""
        check_make(make)
        wanted, timeout_s, portal = key_bytes(key), parse_timeout(timeout), self._portal
        return get_or_put(
            portal, wanted, make, lambda made: self.put(made, key=wanted), device, timeout_s
        )

    def share(
        self,
        key: str | bytes,
        *,
        readers: int | Iterable[str],
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
    ) -> FeatureRef:
        """Return a ref of what is kept under a key, as `featcache.FeatureClient.share`."""
        inner = self._portal.inner
        return self._portal.call(
            lambda: inner.share(key, readers=readers, ttl=ttl, timeout=timeout), inner.discard
        )

    def get_many(
        self,
        members: Iterable[FeatureRef | str | bytes],
        *,
        device: Any = None,
        timeout: float | None = None,
    ) -> list[Feature]:
        """Return copies of many and pay their reads, as `featcache.FeatureClient.get_many`."""
        wanted, portal = parse_members(members), self._portal
        return get_many(portal, wanted, portal.place(device, None), parse_timeout(timeout))

    def contains_many(self, keys: Iterable[str | bytes]) -> list[bool]:
        """Return whether a feature is kept under each key now."""
        wanted, hits = parse_keys(keys, "contains_many"), self._portal.engine.keys.hits
        told = [None] if hits is None else [hits.contains(key) for key in wanted]
        if None not in told:
            return [bool(there) for there in told]
        return self._portal.call(lambda: self._portal.inner.contains_many(wanted))

    def put_many(
        self,
        features: Iterable[torch.Tensor | dict[str, torch.Tensor]],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        keys: Iterable[str | bytes | None] | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: OnFull = "wait",
    ) -> list[FeatureRef]:
        """Copy many features in, all or none, as `featcache.FeatureCache.put_many`."""
        given = parse_features(features, keys, readers, ttl)
        return put_many(self._portal, given, parse_timeout(timeout), on_full)

    def contains(self, key: str | bytes) -> bool:
        """Whether a feature is kept under a key now."""
        there = self._portal.inner.contains_nowait(key)
        return (
            self._portal.call(lambda: self._portal.inner.contains(key)) if there is None else there
        )

    def contains_nowait(self, key: str | bytes) -> bool | None:
        """`contains` by the key table alone, as `featcache.FeatureClient.contains_nowait`."""
        return self._portal.inner.contains_nowait(key)

    def evict(self, key: str | bytes) -> bool:
        """Drop a key; return whether it was there."""
        return self._portal.call(lambda: self._portal.inner.evict(key))

    def pin(self, key: str | bytes) -> None:
        """Keep a feature from being evicted, as `featcache.FeatureCache.pin`."""
        inner = self._portal.inner
        self._portal.call(lambda: inner.pin(key), lambda _: inner.unpin(key))

    def unpin(self, key: str | bytes) -> None:
        """Take back a pin, as `featcache.FeatureCache.unpin`."""
        self._portal.call(lambda: self._portal.inner.unpin(key))


class BlockingBorrow:
    """One borrow, for code with no loop: its value is the view, and leaving the block pays."""

    __slots__ = ("_borrow", "_cache")

    def __init__(self, cache: _BlockingBase[Any], borrow: Borrow) -> None:
        self._cache = cache
        self._borrow = borrow

    def __enter__(self) -> Feature:
        """Return the view, once its bytes are there."""
        return self._cache._enter(self._borrow)  # noqa: SLF001 - one call in two classes

    def __exit__(self, *_: object) -> None:
        """Empty the view and pay the read."""
        self._borrow.close()


class FeatureClient(_BlockingBase[AsyncClient]):
    """`featcache.FeatureClient` for code with no loop. Made by `connect`."""

    @property
    def is_attached(self) -> bool:
        """Whether the pool at this client's endpoint is attached now."""
        return self._portal.inner.is_attached

    def wait_attached(self, *, timeout: float | None = None) -> None:
        """Return when the pool is attached, as `featcache.FeatureClient.wait_attached`."""
        self._portal.call(lambda: self._portal.inner.wait_attached(timeout=timeout))


class FeatureCache(_BlockingBase[AsyncCache]):
    """`featcache.FeatureCache` for code with no loop. Made by `create`."""

    def __init__(self, inner: AsyncCache) -> None:
        super().__init__(inner)
        self._pressure = Pressure(self._portal)

    @property
    def endpoint(self) -> str:
        """The path of the socket that `connect` takes."""
        return self._portal.inner.endpoint

    @property
    def address(self) -> str | None:
        """Where other hosts find it, as `featcache.FeatureCache.address`."""
        return self._portal.inner.address

    def drain(self, timeout: float) -> bool:
        """Take no more puts, and let those who read now finish, as `featcache.FeatureCache.drain`."""
        return self._portal.call(lambda: self._portal.inner.drain(timeout))

    @property
    def pressure(self) -> "Pressure":
        """The pool's `Pressure`: its `level` now, and `below(level)` to wait for a lower one."""
        return self._pressure

    def put_nowait(
        self,
        feature: torch.Tensor | dict[str, torch.Tensor],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        key: str | bytes | None = None,
        ttl: float | EllipsisType | None = ...,
    ) -> FeatureRef:
        """Copy a feature in, or raise PoolFull: it waits for its loop, never for room."""
        writer = self._portal.inner._opened().main.writer  # noqa: SLF001 - one object in two classes
        staged = writer.stage(feature, readers, ttl, key)

        async def put() -> FeatureRef:
            return writer.put_nowait(staged)

        return self._portal.call(put, self._portal.inner.discard)


class Pressure:
    """The pool's pressure, for code with no loop."""

    def __init__(self, portal: Portal[AsyncCache]) -> None:
        self._portal = portal

    @property
    def level(self) -> PressureLevel:
        """The level now."""
        pressure = self._portal.inner.pressure
        return self._portal.look(lambda: pressure.level)

    def below(self, level: PressureLevel | str, *, timeout: float | None = None) -> None:
        """Return once the level is lower, as `below` of `featcache.FeatureCache.pressure`."""
        pressure = self._portal.inner.pressure
        self._portal.call(lambda: pressure.below(level, timeout=timeout))

    def __repr__(self) -> str:
        return repr(self._portal.inner.pressure)


def _of(ref: Any) -> FeatureRef | None:
    """Return the ref, or None of what is none, which is refused in the loop."""
    return ref if isinstance(ref, FeatureRef) else None


def _blocking(make: Callable[P, C], wrap: Callable[[C], B]) -> Callable[P, B]:
    """Return a `create` or `connect` whose objects are opened with plain ``with``."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> B:
        return wrap(make(*args, **kwargs))

    made.__module__ = __name__
    made.__doc__ = (make.__doc__ or "").replace("``async with``", "plain ``with``")
    made.__annotations__ = make.__annotations__ | {"return": wrap}
    signature = inspect.signature(make).replace(return_annotation=wrap)
    made.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect and help()
    return made


create = _blocking(_create, FeatureCache)
connect = _blocking(_connect, FeatureClient)
