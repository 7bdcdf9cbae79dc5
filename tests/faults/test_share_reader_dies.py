"""A rank is killed that owes a share: the share is paid for it, and what was shared is evictable."""

import asyncio

import pytest

import featcache
from faults.agents import is_right
from faults.checks import Log
from faults.keyed import CAPACITY, SIZE, client, lost, put, reads_out, resident, used, works
from support.processes import Child, Start, until
from support.slabs import Slab

BORROWS = pytest.mark.parametrize("borrows", [False, True], ids=["idle", "in a borrow"])


@BORROWS
@pytest.mark.parametrize("named", [True, False], ids=["named", "anonymous"])
async def test_a_killed_rank_owes_nothing_more(
    start: Start, log: Log, slab: Slab, borrows: bool, named: bool
) -> None:
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings(), name="alive") as survivor,
    ):
        await put(cache, slab, 1, key="a")
        child = await client(start, slab, cache.endpoint, name="doomed")
        readers = ["doomed"] if named else 1
        refs = [await survivor.share("a", readers=readers, ttl=None) for _ in range(2)]
        both = await survivor.share("a", readers=["doomed", "alive"], ttl=None)
        if borrows:
            for ref in refs:
                assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        assert await cache.evict("a")
        child.kill()
        await lost(log)
        assert used(cache) == SIZE, "the survivor still owes its read"
        assert is_right(await survivor.get(both), 1)
        if not named and not borrows:
            for ref in refs:
                await survivor.release(ref)
        await until(lambda: used(cache) == 0)
        await works(cache, slab)


async def test_who_shared_dies_and_its_refs_live(start: Start, log: Log, slab: Slab) -> None:
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        await put(cache, slab, 1, key="a")
        child = await client(start, slab, cache.endpoint, name="scheduler")
        shared, data = await child.ask("share", "a", 1)
        assert shared == "shared"
        child.kill()
        await lost(log)
        putting = asyncio.create_task(put(cache, slab, 3, CAPACITY))
        await until(lambda: cache.statistics().waiters == 1)
        ref = featcache.FeatureRef.from_bytes(data)
        assert is_right(await survivor.get(ref), 1)
        assert is_right(await cache.get(await asyncio.wait_for(putting, 20.0)), 3)
        assert (resident(cache), reads_out(cache)) == (set(), 0)
        await works(cache, slab)


async def test_who_waits_to_share_dies(start: Start, log: Log, slab: Slab) -> None:
    async with slab.create(recycle_interval=60.0) as cache:
        child: Child = await client(start, slab, cache.endpoint)
        child.tell("share", "late", 1, 60.0)
        key_waiters = cache._opened().pool.store.key_waiters
        await until(lambda: key_waiters.count == 1)
        child.kill()
        await lost(log)
        assert key_waiters.count == 0
        await put(cache, slab, 1, key="late")
        await works(cache, slab)
