"""Pools that spill or relay to the host, and what tests look at in the one on the host."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, Settings
from featcache.core.store import Store
from featcache.owner.served_pool import ServedPool
from support.caches import KIB, MIB, filled, small, until


def serving(owner: FeatureCache) -> ServedPool:
    """The pool on the host of an open owner."""
    state = owner._life.engine
    assert state is not None, "open"
    assert state.spill is not None, "nothing was spilled or relayed yet"
    return state.spill


def store(owner: FeatureCache) -> Store:
    """What the pool on the host decides."""
    return serving(owner).pool.store


def has_host_pool(owner: FeatureCache) -> bool:
    return owner._life.engine is not None and owner._life.engine.spill is not None


async def all_spent(owner: FeatureCache) -> None:
    """Return when nothing is in either pool: no byte, no slot, no waiter."""

    def empty() -> bool:
        now = owner.statistics()
        there = not has_host_pool(owner) or (
            store(owner).allocator.used_bytes == store(owner).table.used == 0
            and not store(owner).queue
        )
        return there and now.used_bytes == now.slots_used == now.waiters == 0

    await until(empty)


def through_host(**changes: Any) -> Settings:
    """Settings of a client whose reads are staged through host memory."""
    return small(through_host=True, **changes)


@contextlib.asynccontextmanager
async def spilling(
    spill: int | str = MIB, *, name: str | None = None, **changes: Any
) -> AsyncIterator[tuple[FeatureCache, FeatureClient]]:
    """An owner that spills, and a client attached to it."""
    chosen = small(**changes)
    async with (
        featcache.create(spill=spill, settings=chosen) as owner,
        featcache.connect(owner.endpoint, name=name, settings=chosen) as client,
    ):
        yield owner, client


@contextlib.asynccontextmanager
async def relayed(
    *, name: str | None = None, client: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[tuple[FeatureCache, FeatureClient]]:
    """An owner, and a client that reads through the host although it need not."""
    async with (
        featcache.create(settings=small(**changes)) as owner,
        featcache.connect(
            owner.endpoint, name=name, settings=through_host(**(client or {}))
        ) as reader,
    ):
        yield owner, reader


def holds(client: FeatureClient) -> int:
    return sum(handle.attachment.holds for handle in client._opened().registry.connections)


async def stuffed(owner: FeatureCache, client: FeatureClient) -> FeatureRef:
    """Fill the host pool, which is as large as the slab, with a copy that nobody reads."""
    capacity = owner.statistics().capacity_bytes
    first = await owner.put(filled(capacity))
    await client.get(first)
    await all_spent(owner)
    first = await owner.put(filled(capacity), readers=2)
    await owner._opened().relay.copy(first)
    await owner.discard(first)
    await until(lambda: owner.statistics().used_bytes == 0)
    assert store(owner).free_bytes == 0
    return await owner.put(filled(KIB, 8))
