"""Processes that do everything by key are killed one after the other: no byte is wrong, nothing is lost."""

import asyncio
import functools
import random

from faults.agents import KEYS, Busy, busy_by_key, is_right
from faults.checks import Log
from faults.keyed import CAPACITY, lost, put, works
from featcache import FeatureCache
from support.processes import Child, Start, until
from support.slabs import Slab

PROCESSES = 4
KILLS = 12


def has_put(cache: FeatureCache, count: int) -> bool:
    return cache.statistics().puts >= count


async def test_many_killed_under_load(start: Start, log: Log, slab: Slab) -> None:
    """Four at a time and the owner, in a slab that holds part of what they want, some of it late."""
    random_ = random.Random(7)
    settings = slab.settings(inline_bytes=96 << 10)

    async def begin(seed: int) -> Child:
        child = start(
            busy_by_key, cache.endpoint, seed=seed, settings=settings, device=str(slab.device)
        )
        await child.expect("attached")
        return child

    async with slab.create(recycle_interval=0.05) as cache:
        held = await put(cache, slab, 99, CAPACITY // 2)  # so that puts wait
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
        assert cache.statistics().waited > 0, "never full: no load"
        assert is_right(await cache.get(held), 99)
        for seed in range(KEYS):
            if await cache.contains(str(seed)):
                assert is_right(await cache.get(str(seed)), seed)
        for slot in list(cache._opened().pool.store.owing.values()):  # of the dead, for nobody
            cache._opened().main.sessions.discard(slot.index, slot.generation)
        await works(cache, slab)
