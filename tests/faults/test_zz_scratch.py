"""Processes that do everything by key are killed one after the other: no byte is wrong, nothing is lost."""

import asyncio
import functools
import random

from api.slabs import Slab
from api.support import MIB
from faults.agents import KEYS, Busy, busy_by_key, is_right
from faults.checks import Log
from faults.keyed import lost, slab, start, works
from featcache import FeatureCache
from helpers import Child, Start, until

__all__ = ["slab", "start"]

PROCESSES = 4
KILLS = 50


def has_put(cache: FeatureCache, count: int) -> bool:
    return cache.statistics().puts >= count


async def test_many_killed_under_load(start: Start, log: Log, slab: Slab) -> None:
    """Four at a time and the owner, in a slab that holds part of what they want, some of it late."""
    random_ = random.Random(__import__("os").getpid())
    settings = slab.settings(capacity=2 * MIB, recycle_interval=0.05, inline_bytes=16 << 10)

    async def begin(seed: int) -> Child:
        child = start(
            busy_by_key, cache.endpoint, seed=seed, settings=settings, device=str(slab.device)
        )
        await child.expect("attached")
        return child

    async with slab.create(recycle_interval=0.05, slots=64, capacity=131072, segment=4096) as cache:
        own = Busy(cache, random.Random(5), str(slab.device))
        stop = asyncio.Event()
        task = asyncio.create_task(own.run(stop))
        children = [await begin(seed) for seed in range(PROCESSES)]
        for count in range(KILLS):
            until_puts = cache.statistics().puts + random_.randrange(5, 30)
            await until(functools.partial(has_put, cache, until_puts))
            children.pop(random_.randrange(PROCESSES)).kill()
            children.append(await begin(PROCESSES + count))
        for child in children:
            message, done, wrong = await child.ask("enough")
            assert (message, wrong) == ("did", [])
            assert done
        stop.set()
        await task
        assert own.wrong == []
        await until(lambda: cache.statistics().sessions == 0)
        await lost(log, KILLS)
        assert cache.statistics().evicted > 0, "never full: no load"
    
        for seed in range(KEYS):
            if await cache.contains(str(seed)):
                assert is_right(await cache.get(str(seed)), seed)
        for slot in list(cache._opened().pool.store.owing.values()):  # of the dead, for nobody
            cache._opened().main.reaper.discard(slot.index, slot.generation)
        from faults.keyed import assert_nothing_out; cache._opened().pool.collect(); await asyncio.sleep(0.3); assert_nothing_out(cache)
