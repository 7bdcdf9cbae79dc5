"""Tiers for tests: a dict in memory, which a test can have stop, fail and lie."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import featcache
from featcache import FeatureCache, FeatureClient
from featcache.owner.lower_tier import LowerTier
from featcache.tier import MakeRoom
from support.caches import KIB, filled, small, until
from support.keyed import pool_of

SIZE: Final = 8 * KIB
PLACES: Final = 8
"""Features of `SIZE` that fill the pool of `tiered`."""


class MemoryTier:
    """Keeps what it is given, and what it was asked. `stop` holds an operation until `go`."""

    def __init__(self) -> None:
        self.features: dict[bytes, tuple[bytes, bytes]] = {}
        self.asked: list[tuple[str, bytes]] = []
        self.fails: dict[str, BaseException] = {}
        """By operation: what it raises."""
        self.lies: Callable[[bytes, MakeRoom], Awaitable[Any]] | None = None
        """What `get` does instead."""
        self.cancelled = 0
        self.closed = 0
        self._gates: dict[str, asyncio.Event] = {}

    def stop(self, operation: str) -> None:
        self._gates[operation] = asyncio.Event()

    def go(self, operation: str) -> None:
        self._gates.pop(operation).set()

    def count(self, operation: str, key: bytes | None = None) -> int:
        return sum(what == operation and key in {None, which} for what, which in self.asked)

    async def _ask(self, operation: str, key: bytes) -> None:
        self.asked.append((operation, key))
        gate = self._gates.get(operation)
        if gate is not None:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if operation in self.fails:
            raise self.fails[operation]

    async def put(self, key: bytes, header: bytes, data: memoryview) -> None:
        assert data.readonly
        await self._ask("put", key)
        self.features[key] = header, bytes(data)

    async def get(self, key: bytes, room: MakeRoom) -> int | None:
        await self._ask("get", key)
        if self.lies is not None:
            told: int | None = await self.lies(key, room)
            return told
        if key not in self.features:
            return None
        header, data = self.features[key]
        view = await room(header)
        view[:] = data
        return len(data)

    async def has(self, key: bytes) -> bool:
        await self._ask("has", key)
        return key in self.features

    async def remove(self, key: bytes) -> None:
        await self._ask("remove", key)
        self.features.pop(key, None)

    async def close(self) -> None:
        await self._ask("close", b"")
        self.closed += 1


@contextlib.asynccontextmanager
async def tiered(
    tier: MemoryTier | None = None, **changes: Any
) -> AsyncIterator[tuple[MemoryTier, FeatureCache, FeatureClient]]:
    """A tier, a pool above it that `PLACES` features fill, and a client, in one loop."""
    below = tier or MemoryTier()
    sizes = {"capacity": SIZE * PLACES, "segment": SIZE * PLACES}
    chosen = small(**(sizes | {"tier_bytes": 1 << 20} | changes))
    async with (
        featcache.create(settings=chosen, tier=below) as owner,
        featcache.connect(owner.endpoint, settings=chosen) as client,
    ):
        yield below, owner, client


def lower(owner: FeatureCache) -> LowerTier:
    found = owner._opened().tier
    assert found is not None
    return found


async def fill(user: FeatureCache | FeatureClient, first: int = 0, count: int = PLACES) -> None:
    """Put so many features, each of its number, under its number."""
    for number in range(first, first + count):
        await user.put(filled(SIZE, number % 251), key=f"{number}")


def is_quiet(owner: FeatureCache) -> bool:
    """Whether nothing is on its way to the tier, and all of the staging memory is free."""
    demotions = lower(owner)._demotions
    allocator = demotions.staging.allocator
    return not (demotions._last or demotions._staged or allocator.used_bytes)


def is_kept(owner: FeatureCache, key: str) -> bool:
    """Whether a key is in the pool itself."""
    return key.encode() in pool_of(owner).store.directory


async def push_out(owner: FeatureCache, key: str, first: int) -> None:
    """Have a key evicted, by putting others."""

    def is_idle() -> bool:
        pool_of(owner).collect()
        slot = pool_of(owner).store.directory.find(key.encode())
        return slot is None or slot.idle

    await until(is_idle)  # it is held for a while after it came
    await fill(owner, first)
    assert not is_kept(owner, key)


def unset() -> MemoryTier:
    """Fail as a factory that looks for a variable which is not set."""
    os.environ["NO_SUCH_VARIABLE"]
    return MemoryTier()
