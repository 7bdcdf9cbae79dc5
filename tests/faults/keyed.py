"""Shared by the tests of keys and of clients that put: children, steps, looks into the owner."""

from typing import Any, Final

import pytest

import featcache
from faults.agents import feature, is_right, keyed_owner, keyed_reader
from faults.checks import Log, events
from featcache import FeatureCache, FeatureRef
from support.caches import MIB
from support.processes import Child, Start, until
from support.slabs import Slab, slab_params

CAPACITY: Final = 2 * MIB
SIZE: Final = MIB // 2
"""A quarter of what there is."""


host_only = pytest.mark.parametrize("slab", slab_params("host"), indirect=True)


def case(kind: str, *values: Any, name: str) -> Any:
    """One case of a test that has a slab and more. On a GPU those that differ there will do."""
    (slab_of_kind,) = slab_params(kind)
    return pytest.param(
        *slab_of_kind.values, *values, marks=slab_of_kind.marks, id=f"{kind}-{name}"
    )


async def client(start: Start, slab: Slab, endpoint: str, **given: Any) -> Child:
    """A process with a client."""
    settings = given.pop("settings", None) or slab.settings()
    child = start(keyed_reader, endpoint, device=str(slab.device), settings=settings, **given)
    await child.expect("attached")
    return child


async def lead(child: Child, step: str | None, *order: Any) -> None:
    """Bring a client to a step of what it is told, or to the right end of it, which is None."""
    if step is None:
        assert await child.ask(*order) == ("right",)
        return
    assert await child.ask("arm", step) == ("armed",)
    child.tell(*order)
    await child.expect("at", step)


async def both(child: Child) -> list[Any]:
    """Two messages, which may come in either order."""
    return sorted([await child.hear(), await child.hear()])


async def owner(start: Start, slab: Slab, **given: Any) -> tuple[Child, str]:
    """A process with a pool, and its endpoint."""
    settings = slab.settings(**given.pop("changes", {}))
    child = start(keyed_owner, settings=settings, device=str(slab.device), **given)
    message, endpoint = await child.hear()
    assert message == "open"
    return child, endpoint


async def put(
    cache: FeatureCache | featcache.FeatureClient,
    slab: Slab,
    seed: int,
    nbytes: int = SIZE,
    **how: Any,
) -> FeatureRef:
    """Put a feature that tells which it is."""
    return await cache.put(feature(seed, nbytes).to(slab.device), **how)


async def lost(log: Log, count: int = 1) -> None:
    """Wait until the owner has seen so many deaths."""
    await until(lambda: len(events(log, "reader.lost")) >= count)


def waiters(cache: FeatureCache) -> int:
    """How many puts wait for room."""
    return cache.statistics().waiters


def used(cache: FeatureCache) -> int:
    """How many bytes are in use."""
    return cache.statistics().used_bytes


def resident(cache: FeatureCache) -> set[bytes]:
    """What is kept under keys."""
    return set(cache._opened().pool.store.directory)


def reads_out(cache: FeatureCache) -> int:
    """How many reads by key are out, in whichever session."""
    return sum(page.reads_by_key for page in cache._opened().pool.pages.values())


def reserved(cache: FeatureCache) -> int:
    """How many slots sessions have that they have not published."""
    return sum(len(page.reserved) for page in cache._opened().pool.pages.values())


def key_waiters(cache: FeatureCache) -> int:
    """How many wait for a key."""
    return cache._opened().pool.store.key_waiters.count


def claims(cache: FeatureCache) -> int:
    """How many keys somebody has the right to make."""
    return len(cache._opened().pool.store.key_waiters._claims)


def assert_nothing_out(cache: FeatureCache) -> None:
    """Nobody reads, writes, waits or makes; only what is kept under keys is there, and all of it idle."""
    store = cache._opened().pool.store
    assert (reads_out(cache), reserved(cache), key_waiters(cache), claims(cache)) == (0, 0, 0, 0)
    assert not store.queue
    assert not store.key_waiters._waiting
    assert not store.owing
    assert not store._retiring
    pool = cache._opened().pool
    assert not pool.store.key_waiters.waiting()
    assert not pool.pending_writes.in_flight
    assert sum(number > 0 for number in pool.pages) == cache.statistics().sessions
    directory = store.directory
    assert not directory._pins
    assert directory.idle_bytes == directory.resident_bytes == cache.statistics().used_bytes
    assert store.table.used - len(store.ahead) == len(directory)
    assert all(slot.grants == 0 for slot in store.table.in_use())


async def works(cache: FeatureCache, slab: Slab) -> None:
    """The pool can do what a new one can: all of it is one feature's, kept ones make room."""

    def settled() -> bool:
        cache._opened().pool.collect()  # no timer looks
        is_out = reads_out(cache) or reserved(cache) or key_waiters(cache) or claims(cache)
        return not is_out and cache.statistics().used_bytes == cache.statistics().resident_bytes

    await until(settled)
    assert_nothing_out(cache)
    ref = await put(cache, slab, 99, CAPACITY, timeout=20.0)
    assert is_right(await cache.get(ref), 99)

    def empty() -> bool:
        cache._opened().pool.collect()
        return cache.statistics().slots_used == 0

    await until(empty)
    assert cache.statistics().used_bytes == 0
