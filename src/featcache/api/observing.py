"""What watches an owner or client: figures of its pools, and a look at each of its calls.

An object that nobody observes runs the code that it would run if this module were not there. `observe`
gives it a class of its own, whose calls tell an `Observer`, and an owner's store the like
(`core.observed`).
"""

import functools
import time
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, NamedTuple, Protocol

import torch

from featcache.api.cache import FeatureCache
from featcache.api.client import FeatureClient
from featcache.core.observed import observe as observe_store
from featcache.core.observed import unobserve as unobserve_store
from featcache.errors import CacheClosed, SettingsError
from featcache.memory.pack import Feature
from featcache.pool import gauges
from featcache.pool.waits import WaitObserver, observe_waits, unobserve_waits
from featcache.ref import FeatureRef
from featcache.session.borrow import Borrow
from featcache.session.copier import Readable
from featcache.statistics import Statistics

__all__ = [
    "Figures",
    "Observer",
    "PoolFigures",
    "WaitObserver",
    "figures",
    "observe",
    "observe_waits",
    "unobserve",
    "unobserve_waits",
]

_now: Final = time.perf_counter
Watched = FeatureCache | FeatureClient


class Observer(Protocol):
    """What is called. Each call must return at once, may come in any thread, and must not raise.

    The host time of a call is what it took of its thread: not what it waited for, in the queue or for
    a copy in another thread.
    """

    def put(self, host_s: float, nbytes: int) -> None:
        """Note a put of one feature through the object."""

    def put_more(self, nbytes: int) -> None:
        """Note the bytes of a `put_many`."""

    def got(self, host_s: float, nbytes: int) -> None:
        """Note a get of one feature."""

    def got_more(self, nbytes: int) -> None:
        """Note the bytes of a borrow, a `get_many`, or a feature that `get_or_put` found."""

    def published(self, nbytes: int) -> None:
        """Note a feature in an owner's pool, whichever process put it there. In the pool's loop."""

    def released(self, age_s: float) -> None:
        """Note the age of a ref in an owner's pool as its room is taken back. In the pool's loop."""

    def closing(self) -> None:
        """Note that the object closes: its last figures can be had now."""


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
            return Figures(pools[0], pools)
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


def observe(watched: Watched, observer: Observer, *, blocking: Any = None) -> None:
    """Tell an observer of each call of an open object, and of what happens in an owner's pool.

    `blocking` is the object of `featcache.blocking` that has it, whose calls then are those that count.

    Raises:
        CacheClosed: it is not open.
        SettingsError: it has an observer already.

    """
    outer = watched if blocking is None else blocking
    engine = watched._opened()  # noqa: SLF001 - one object in two rooms' words
    if "_observer" in vars(outer):
        raise SettingsError(f"{outer!r} is observed already")
    for each in {id(watched): watched, id(outer): outer}.values():
        vars(each).update(_observer=observer, _borrow_class=_borrow_class(observer))
        each.__class__ = _observed(type(each), is_blocking=each is not watched, is_outer=each is outer)
    if isinstance(watched, FeatureCache):
        observe_store(engine.pool.store, observer)


def unobserve(watched: Watched, *, blocking: Any = None) -> None:
    """Undo `observe`, of an object that may be closed by now."""
    for each in (watched, blocking):
        if each is not None and vars(each).pop("_observer", None) is not None:
            del vars(each)["_borrow_class"]
            each.__class__ = type(each).__base__
    if isinstance(watched, FeatureCache) and watched.is_open:
        unobserve_store(watched._opened().pool.store)  # noqa: SLF001 - one object in two rooms' words


@functools.cache
def _observed(base: Any, *, is_blocking: bool, is_outer: bool) -> Any:
    """Return the class that an observed object has instead of its own.

    It calls the methods of `base` by name at each call, so that whoever replaces one there is heard.
    """
    calls: dict[str, Callable[..., Any]] = {}
    if is_outer:
        calls |= _blocking_calls(base) if is_blocking else _async_calls(base)
    if not is_blocking:  # those that a blocking object leaves to the one that it has
        calls |= _calls_of_both(base)
    for name, call in calls.items():
        functools.update_wrapper(call, getattr(base, name))
    return type(base.__name__, (base,), calls | {"__module__": base.__module__, "__doc__": base.__doc__})


def _async_calls(base: Any) -> dict[str, Callable[..., Any]]:
    async def put(self: Any, feature: Any, **options: Any) -> FeatureRef:
        began_s, steps = _now(), base.put(self, feature, **options)
        try:
            awaited = steps.send(None)
        except StopIteration as done:  # as most do, with nothing to wait for
            ref: FeatureRef = done.value
            self._observer.put(_now() - began_s, ref.nbytes)
            return ref
        ref, host_s = await _driven(steps, awaited, _now() - began_s)
        self._observer.put(host_s, ref.nbytes)
        return ref

    async def get(self: Any, ref: FeatureRef | str | bytes, **options: Any) -> Feature:
        began_s, steps = _now(), base.get(self, ref, **options)
        try:
            awaited = steps.send(None)
        except StopIteration as done:
            feature: Feature = done.value
            host_s = _now() - began_s
        else:
            feature, host_s = await _driven(steps, awaited, _now() - began_s)
        self._observer.got(host_s, ref.nbytes if type(ref) is FeatureRef else _nbytes(feature))
        return feature

    async def put_many(self: Any, features: Any, **options: Any) -> list[FeatureRef]:
        refs: list[FeatureRef] = await base.put_many(self, features, **options)
        self._observer.put_more(sum(ref.nbytes for ref in refs))
        return refs

    async def get_many(self: Any, members: Any, **options: Any) -> list[Feature]:
        found: list[Feature] = await base.get_many(self, members, **options)
        self._observer.got_more(sum(map(_nbytes, found)))
        return found

    async def get_or_put(self: Any, key: Any, make: Any, **options: Any) -> Feature:
        noted = _Make(make) if callable(make) else make
        feature: Feature = await base.get_or_put(self, key, noted, **options)
        if not noted.made:
            self._observer.got_more(_nbytes(feature))
        return feature

    async def aclose(self: Any) -> None:
        self._observer.closing()
        await base.aclose(self)

    calls = {"put": put, "get": get, "put_many": put_many, "get_many": get_many}
    return calls | {"get_or_put": get_or_put, "aclose": aclose}


def _blocking_calls(base: Any) -> dict[str, Callable[..., Any]]:
    def put(self: Any, feature: Any, **options: Any) -> FeatureRef:
        began_s = _now()
        ref: FeatureRef = base.put(self, feature, **options)
        self._observer.put(_now() - began_s, ref.nbytes)
        return ref

    def get(self: Any, ref: FeatureRef | str | bytes, **options: Any) -> Feature:
        began_s = _now()
        feature: Feature = base.get(self, ref, **options)
        host_s = _now() - began_s
        self._observer.got(host_s, ref.nbytes if type(ref) is FeatureRef else _nbytes(feature))
        return feature

    def put_many(self: Any, features: Any, **options: Any) -> list[FeatureRef]:
        refs: list[FeatureRef] = base.put_many(self, features, **options)
        self._observer.put_more(sum(ref.nbytes for ref in refs))
        return refs

    def get_many(self: Any, members: Any, **options: Any) -> list[Feature]:
        found: list[Feature] = base.get_many(self, members, **options)
        self._observer.got_more(sum(map(_nbytes, found)))
        return found

    def get_or_put(self: Any, key: Any, make: Any, **options: Any) -> Feature:
        noted = _Make(make) if callable(make) else make
        feature: Feature = base.get_or_put(self, key, noted, **options)
        if not noted.made:
            self._observer.got_more(_nbytes(feature))
        return feature

    def close(self: Any) -> None:
        self._observer.closing()
        base.close(self)

    calls = {"put": put, "get": get, "put_many": put_many, "get_many": get_many}
    if hasattr(base, "put_nowait"):
        calls["put_nowait"] = _put_nowait(base)
    return calls | {"get_or_put": get_or_put, "close": close}


def _calls_of_both(base: Any) -> dict[str, Callable[..., Any]]:
    def get_nowait(self: Any, ref: FeatureRef | str | bytes, **options: Any) -> Feature:
        began_s = _now()
        feature: Feature = base.get_nowait(self, ref, **options)
        host_s = _now() - began_s
        self._observer.got(host_s, ref.nbytes if type(ref) is FeatureRef else _nbytes(feature))
        return feature

    def borrow(self: Any, ref: FeatureRef | str | bytes, **options: Any) -> Borrow:
        borrowed: Borrow = base.borrow(self, ref, **options)
        borrowed.__class__ = self._borrow_class  # the same but for `_enter`
        return borrowed

    calls: dict[str, Callable[..., Any]] = {"get_nowait": get_nowait, "borrow": borrow}
    if hasattr(base, "put_nowait"):
        calls["put_nowait"] = _put_nowait(base)
    return calls


def _put_nowait(base: Any) -> Callable[..., FeatureRef]:
    def put_nowait(self: Any, feature: Any, **options: Any) -> FeatureRef:
        began_s = _now()
        ref: FeatureRef = base.put_nowait(self, feature, **options)
        self._observer.put(_now() - began_s, ref.nbytes)
        return ref

    return put_nowait


def _borrow_class(observer: Observer) -> type[Borrow]:
    """Return the class of the borrows of an observed object: each tells its bytes as it is entered."""

    class ObservedBorrow(Borrow):
        __slots__ = ()

        def _enter(self, ref: FeatureRef, source: Readable, copied: Feature | None = None) -> Feature:
            view = super()._enter(ref, source, copied)
            observer.got_more(ref.nbytes)
            return view

    return ObservedBorrow


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


@types.coroutine
def _driven(
    steps: Coroutine[Any, Any, Any], awaited: Any, host_s: float
) -> Generator[Any, Any, tuple[Any, float]]:
    """Run a coroutine that has begun to its end; return its result and the time that it ran."""
    while True:
        step: Callable[[], Any]
        try:
            sent = yield awaited
        except GeneratorExit:
            steps.close()
            raise
        except BaseException as error:  # noqa: BLE001 - thrown into the coroutine, where it belongs
            step = functools.partial(steps.throw, error)
        else:
            step = functools.partial(steps.send, sent)
        began_s = _now()
        try:
            awaited = step()
        except StopIteration as done:
            return done.value, host_s + _now() - began_s
        host_s += _now() - began_s
