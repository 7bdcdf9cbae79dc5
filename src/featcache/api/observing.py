"""What watches an owner or client: figures of its pools, and a look at each of its calls.

An object that nobody observes runs the code that it would run if this module were not there. `observe`
gives it a class of its own, whose calls count in a `Meter`, and an owner's store the like
(`core.observed`).
"""

import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import torch

from featcache.api.cache import FeatureCache
from featcache.api.client import FeatureClient
from featcache.api.meter import HOST_BOUNDS_S, Meter
from featcache.core.observed import observe as observe_store
from featcache.core.observed import unobserve as unobserve_store
from featcache.errors import CacheClosed, SettingsError
from featcache.memory.pack import Feature
from featcache.observation import HomeView, ReadingHostView
from featcache.owner.host_views import home_views, reading_views
from featcache.owner.observed_reads import observe as observe_fetches
from featcache.owner.observed_reads import unobserve as unobserve_fetches
from featcache.owner.owner import Owner
from featcache.pool import gauges
from featcache.pool.waits import WaitObserver, observe_waits, unobserve_waits
from featcache.ref import FeatureRef
from featcache.session.borrow import Borrow
from featcache.session.copier import Readable
from featcache.statistics import Statistics

__all__ = [
    "Borrow",
    "Figures",
    "Meter",
    "PoolFigures",
    "WaitObserver",
    "borrow_as",
    "figures",
    "is_observed",
    "observe",
    "observe_waits",
    "unobserve",
    "unobserve_waits",
]

_now: Final = time.monotonic
Watched = FeatureCache | FeatureClient


# --- figures --------------------------------------------------------------------------------------


class PoolFigures(NamedTuple):
    """Figures of one pool."""

    pool: str
    """Its id, in hex, as events name it; empty of a client that is bound to none."""
    device: str
    """Where its slab is, as this process names that; of a client, the device that maps it."""
    statistics: Statistics


class Figures(NamedTuple):
    """What an object counts, and the gauges of the pools that it serves or has attached."""

    own: PoolFigures
    """`statistics()`, of an owner's pool or of the pool that a client is bound to."""
    pools: list[PoolFigures]
    """Of each pool its gauges; the other fields are 0."""
    homes: Sequence[HomeView] = ()
    """Other hosts that an owner reads from."""
    reading_hosts: Sequence[ReadingHostView] = ()
    """Other hosts that read there."""


def figures(watched: Watched) -> Figures:
    """Return the figures of an open object, as `statistics` does. Safe in any thread.

    Raises:
        CacheClosed: it is not open.

    """
    whole = watched.statistics()
    try:
        if isinstance(watched, FeatureCache):
            owner, device = watched._opened(), str(watched._device)  # noqa: SLF001 - one object in two rooms' words
            pools = [PoolFigures(owner.pool.name, device, whole)]
            if owner.spill is not None:
                beside = owner.spill.pool
                pools.append(PoolFigures(beside.name, "cpu", _gauges(beside.words.header)))
            beyond = owner.beyond
            if beyond is None:
                return Figures(pools[0], pools)
            return Figures(pools[0], pools, home_views(beyond), reading_views(beyond))
        registry = watched._opened().registry  # noqa: SLF001 - as above
        pools = [
            PoolFigures(
                connection.attachment.pool_id.hex(),
                str(connection.attachment.mapping.device),
                _gauges(connection.attachment.header),
            )
            for connection in registry.connections
        ]
    except (AttributeError, ValueError):  # another thread closes it: its words are being unmapped
        raise CacheClosed("it was closed") from None
    bound = registry.bound_name()
    devices = [each.device for each in pools if each.pool == bound] or [str(watched._place or "")]  # noqa: SLF001 - as above
    return Figures(PoolFigures(bound, devices[0], whole), pools)


def _gauges(header: memoryview) -> Statistics:
    return Statistics(**gauges.of_headers([header]))


# --- calls ----------------------------------------------------------------------------------------


def observe(
    watched: Watched, meter: Meter, on_closing: Callable[[], object], *, blocking: Any = None
) -> None:
    """Count each call of an open object in `meter`, and what happens in an owner's pool.

    `blocking` is the object of `featcache.blocking` that has it, whose calls then are those that count.
    `on_closing` is called as it is about to close, when its last figures can be had.

    Raises:
        CacheClosed: it is not open.
        SettingsError: it is observed already.

    """
    outer: Any = watched if blocking is None else blocking
    engine = watched._opened()  # noqa: SLF001 - one object in two rooms' words
    if is_observed(outer):
        raise SettingsError(f"{outer!r} is observed already")
    borrows: dict[type[Borrow], type[Borrow]] = {}
    each: Any
    for each in {id(watched): watched, id(outer): outer}.values():
        # Before the class: another thread may be about to call.
        vars(each).update(_meter=meter, _borrow_classes=borrows, _on_closing=on_closing)
        kind: Any = type(each)
        each.__class__ = _observed(kind, is_outer=each is outer)
    if isinstance(engine, Owner):
        observe_store(engine.pool.store, meter)
        if engine.beyond is not None:
            observe_fetches(engine.beyond.reads, meter.fetch)


def unobserve(watched: Watched, *, blocking: Any = None) -> None:
    """Undo `observe`, of an object that may be closed by now.

    It keeps its meter: a call that is in progress counts as it returns.
    """
    for each in (watched, blocking):
        if is_observed(each):
            each.__class__ = type(each).__base__
    if isinstance(watched, FeatureCache) and watched.is_open:
        owner = watched._opened()  # noqa: SLF001 - one object in two rooms' words
        unobserve_store(owner.pool.store)
        if owner.beyond is not None:
            unobserve_fetches(owner.beyond.reads)


def is_observed(watched: Any) -> bool:
    """Whether an object has an observer."""
    return "_observed" in vars(type(watched))


@functools.cache
def _observed(base: Any, *, is_outer: bool) -> Any:
    """Return the class that an observed object has instead of its own.

    Its calls look the methods of `base` up at each call, so that whoever replaces one there is heard.
    """
    is_blocking = not issubclass(base, FeatureCache | FeatureClient)
    calls: dict[str, Callable[..., Any]] = {}
    if is_outer:
        calls |= _blocking_calls(base) if is_blocking else _async_calls(base)
        if hasattr(base, "put_nowait"):
            calls["put_nowait"] = _put_nowait(base)
    if not is_blocking:  # those that a blocking object leaves to the one that it has
        calls |= {"get_nowait": _get_nowait(base), "borrow": _borrow(base), "aclose": _aclose(base)}
    for name, call in calls.items():
        functools.update_wrapper(call, getattr(base, name))
    told = {"__module__": base.__module__, "__doc__": base.__doc__, "_observed": True}
    return type(base.__name__, (base,), calls | told)


def _async_calls(base: Any) -> dict[str, Callable[..., Any]]:
    # The counting is written out in each: a call would cost as much as all of it. The arguments are those
    # of the calls themselves: gathered in a dict they would cost twice as much.
    async def put(
        self: Any,
        feature: Any,
        *,
        readers: Any = ...,
        key: Any = None,
        ttl: Any = ...,
        timeout: Any = None,
        on_full: Any = "wait",
    ) -> FeatureRef:
        began_s = _now()
        ref: FeatureRef = await base.put(
            self, feature, readers=readers, key=key, ttl=ttl, timeout=timeout, on_full=on_full
        )
        host_s, meter = _now() - began_s, self._meter
        host = meter.put_host
        host.counts[bisect_left(HOST_BOUNDS_S, host_s)] += 1
        host.total += host_s
        meter.put_bytes += ref.nbytes
        return ref

    async def get(
        self: Any,
        ref: FeatureRef | str | bytes,
        *,
        device: Any = None,
        out: Any = None,
        timeout: Any = None,
    ) -> Feature:
        began_s = _now()
        feature: Feature = await base.get(self, ref, device=device, out=out, timeout=timeout)
        host_s, meter = _now() - began_s, self._meter
        host = meter.get_host
        host.counts[bisect_left(HOST_BOUNDS_S, host_s)] += 1
        host.total += host_s
        meter.get_bytes += ref.nbytes if type(ref) is FeatureRef else _nbytes(feature)
        return feature

    async def put_many(self: Any, features: Any, **options: Any) -> list[FeatureRef]:
        refs: list[FeatureRef] = await base.put_many(self, features, **options)
        self._meter.put_bytes += sum(ref.nbytes for ref in refs)
        return refs

    async def get_many(self: Any, members: Any, **options: Any) -> list[Feature]:
        found: list[Feature] = await base.get_many(self, members, **options)
        self._meter.get_bytes += sum(map(_nbytes, found))
        return found

    async def get_or_put(self: Any, key: Any, make: Any, **options: Any) -> Feature:
        noted = _Make(make) if callable(make) else make
        feature: Feature = await base.get_or_put(self, key, noted, **options)
        if not noted.made:
            self._meter.get_bytes += _nbytes(feature)
        return feature

    made: list[Callable[..., Any]] = [put, get, put_many, get_many, get_or_put]
    return {call.__name__: call for call in made}


def _blocking_calls(base: Any) -> dict[str, Callable[..., Any]]:
    def put(self: Any, feature: Any, **options: Any) -> FeatureRef:
        began_s = _now()
        ref: FeatureRef = base.put(self, feature, **options)
        self._meter.put_host.add(_now() - began_s)
        self._meter.put_bytes += ref.nbytes
        return ref

    def get(
        self: Any,
        ref: FeatureRef | str | bytes,
        *,
        device: Any = None,
        out: Any = None,
        timeout: Any = None,
    ) -> Feature:
        began_s = _now()
        feature: Feature = base.get(self, ref, device=device, out=out, timeout=timeout)
        host_s, meter = _now() - began_s, self._meter
        host = meter.get_host
        host.counts[bisect_left(HOST_BOUNDS_S, host_s)] += 1
        host.total += host_s
        meter.get_bytes += ref.nbytes if type(ref) is FeatureRef else _nbytes(feature)
        return feature

    def put_many(self: Any, features: Any, **options: Any) -> list[FeatureRef]:
        refs: list[FeatureRef] = base.put_many(self, features, **options)
        self._meter.put_bytes += sum(ref.nbytes for ref in refs)
        return refs

    def get_many(self: Any, members: Any, **options: Any) -> list[Feature]:
        found: list[Feature] = base.get_many(self, members, **options)
        self._meter.get_bytes += sum(map(_nbytes, found))
        return found

    def get_or_put(self: Any, key: Any, make: Any, **options: Any) -> Feature:
        noted = _Make(make) if callable(make) else make
        feature: Feature = base.get_or_put(self, key, noted, **options)
        if not noted.made:
            self._meter.get_bytes += _nbytes(feature)
        return feature

    made: list[Callable[..., Any]] = [put, get, put_many, get_many, get_or_put]
    return {call.__name__: call for call in made}


def _put_nowait(base: Any) -> Callable[..., FeatureRef]:
    def put_nowait(
        self: Any, feature: Any, *, readers: Any = ..., key: Any = None, ttl: Any = ...
    ) -> FeatureRef:
        began_s = _now()
        ref: FeatureRef = base.put_nowait(self, feature, readers=readers, key=key, ttl=ttl)
        host_s, meter = _now() - began_s, self._meter
        host = meter.put_host
        host.counts[bisect_left(HOST_BOUNDS_S, host_s)] += 1
        host.total += host_s
        meter.put_bytes += ref.nbytes
        return ref

    return put_nowait


def _get_nowait(base: Any) -> Callable[..., Feature]:
    def get_nowait(
        self: Any, ref: FeatureRef | str | bytes, *, device: Any = None, out: Any = None
    ) -> Feature:
        began_s = _now()
        feature: Feature = base.get_nowait(self, ref, device=device, out=out)
        host_s, meter = _now() - began_s, self._meter
        host = meter.get_host
        host.counts[bisect_left(HOST_BOUNDS_S, host_s)] += 1
        host.total += host_s
        meter.get_bytes += ref.nbytes if type(ref) is FeatureRef else _nbytes(feature)
        return feature

    return get_nowait


def _borrow(base: Any) -> Callable[..., Borrow]:
    def borrow(self: Any, ref: FeatureRef | str | bytes, *, timeout: Any = None) -> Borrow:
        borrowed: Borrow = base.borrow(self, ref, timeout=timeout)
        kind, classes = type(borrowed), self._borrow_classes
        if kind not in classes:
            classes[kind] = _borrow_class(kind, self._meter)
        borrowed.__class__ = classes[kind]  # the same but for `_enter`
        return borrowed

    return borrow


def _aclose(base: Any) -> Callable[..., Any]:
    async def aclose(self: Any) -> None:
        self._on_closing()
        await base.aclose(self)

    return aclose


def _borrow_class(kind: Any, meter: Meter) -> type[Borrow]:
    """Return the class of the borrows of an observed object: each counts its bytes as it is entered."""
    enter = kind._enter  # noqa: SLF001 - the one step of all ways into a borrow

    class ObservedBorrow(kind):  # type: ignore[misc]  # whichever class the borrow has
        __slots__ = ()

        def _enter(
            self, ref: FeatureRef, source: Readable, copied: Feature | None = None
        ) -> Feature:
            view: Feature = enter(self, ref, source, copied)
            meter.get_bytes += ref.nbytes
            return view

    return ObservedBorrow


B = TypeVar("B", bound=Borrow)


def borrow_as(kind: type[B], borrowed: Borrow) -> B:
    """Return the same borrow, which was not entered yet, as one of a subclass that may have more slots."""
    made = kind.__new__(kind)
    for name in Borrow.__slots__:
        setattr(made, name, getattr(borrowed, name))
    return made


class _Make:
    """A `make` that knows whether it was called."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.made = False

    def __call__(self) -> Any:
        self.made = True
        return self._make()


def _nbytes(feature: Feature) -> int:
    if isinstance(feature, torch.Tensor):
        return feature.nbytes
    return sum(tensor.nbytes for tensor in feature.values())
