"""A storm over a pool that is far too small, with a tier below it that is slow, fails and hangs."""

import asyncio
import random
from typing import Any

import pytest
import torch

from featcache import FeatureCache, FeatureClient, KeyNotFound
from featcache.errors import PoolFull
from featcache.tier import MakeRoom
from support.caches import KIB, raw, tensor, until
from support.keyed import nothing_lost, pool_of
from support.tiers import MemoryTier, is_quiet, tiered

KEYS = 60
ROUNDS = 400
WORDS = 8


class StormyTier(MemoryTier):
    """Answers late, not at all, or with an error, as a seed has it."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.calm = False

    async def _ask(self, operation: str, key: bytes) -> None:
        await super()._ask(operation, key)
        dice = 1.0 if self.calm else self._rng.random()
        if dice < 0.05:
            raise OSError("a storm")
        if dice < 0.08:
            await asyncio.Event().wait()
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(0)

    async def get(self, key: bytes, room: MakeRoom) -> int | None:
        written = await super().get(key, room)
        await self._ask("got", key)
        return written


def made(key: int, version: int, nbytes: int) -> torch.Tensor:
    """A feature each word of which says whose it is."""
    return torch.full((nbytes // WORDS,), key << 32 | version, dtype=torch.int64)


class Storm:
    """Puts, gets and evictions of one user at a time a key, so that each key's version is known."""

    def __init__(self, seed: int, owner: FeatureCache, client: FeatureClient) -> None:
        self.rng = random.Random(seed)
        self.users: list[Any] = [owner, client]
        self.versions = [0] * KEYS
        self.evicted = [True] * KEYS
        self.found = 0

    async def worker(self, mine: list[int]) -> None:
        for _ in range(ROUNDS):
            await self.step(self.rng.choice(mine))

    async def step(self, key: int) -> None:
        rng, user = self.rng, self.rng.choice(self.users)
        what = rng.random()
        if what < 0.25:
            self.versions[key] += 1
            nbytes = rng.choice([WORDS, KIB, 3 * KIB, 8 * KIB])
            await user.put(made(key, self.versions[key], nbytes), key=f"{key}")
            self.evicted[key] = False
        elif what < 0.3:
            await user.evict(f"{key}")
            self.evicted[key] = True
        elif what < 0.35:
            call = asyncio.create_task(user.get(f"{key}"))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        else:
            try:
                found = tensor(await user.get(f"{key}"))
            except KeyNotFound:
                return
            except PoolFull:
                return
            assert not self.evicted[key], "it was evicted by name"
            self.found += 1
            wanted = made(key, self.versions[key], found.nbytes)
            assert raw(found) == raw(wanted), "a word of another feature, or of an older one"


@pytest.mark.parametrize("inline", [4 << 20, 0], ids=["at once", "in threads"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_no_wrong_byte_and_nothing_lost(seed: int, inline: int) -> None:
    tier = StormyTier(random.Random(seed + 100))
    changes: dict[str, Any] = {"inline_bytes": inline, "tier_timeout": 0.03, "tier_bytes": 40 * KIB}
    async with tiered(tier, **changes) as (_, owner, client):
        storm = Storm(seed, owner, client)
        keys = list(range(KEYS))
        await asyncio.gather(*(storm.worker(keys[first::6]) for first in range(6)))
        now = owner.statistics()
        assert storm.found > 100
        assert now.promoted > 20
        assert now.demoted > 20
        assert now.tier_failures > 0
        assert not pool_of(owner).store.demoting
        tier.calm = True
        await until(lambda: is_quiet(owner))
        await nothing_lost(owner)
