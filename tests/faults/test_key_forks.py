"""A process forks while it reads by key, makes or writes: its parent's grants, claims and slots stay."""

import asyncio

import pytest
import torch

import featcache
from faults.agents import feature, is_right
from faults.checks import Log
from faults.keyed import (
    CAPACITY,
    SIZE,
    claims,
    client,
    key_waiters,
    lost,
    owner,
    put,
    reads_out,
    reserved,
    works,
)
from faults.test_forks import Leash, alive, forked, leash
from featcache import FeatureRef, PutTimeout
from support.processes import Child, Start, until
from support.slabs import Slab, slab_params

__all__ = ["leash"]

# CUDA does not survive a fork, so neither do these on a GPU.
pytestmark = pytest.mark.parametrize("slab", slab_params("host"), indirect=True)


async def fork_and_leave(child: Child, leash: Leash) -> None:
    """Have a child fork in its borrow, and the fork unwind."""
    answers = sorted([await child.ask("fork_and_leave"), await child.hear()])
    leash.pids.append(answers[1][1])
    assert answers[0][2:] == (0, []), "the fork's view is empty and its mapping gone"


async def test_a_fork_leaves_its_parents_borrow(
    start: Start, log: Log, slab: Slab, leash: Leash
) -> None:
    """What the fork unwinds pays nothing: the parent's view stays right while a put waits for it."""
    async with slab.create(recycle_interval=60.0) as cache:
        await put(cache, slab, 1, CAPACITY, key="k")
        child = await client(start, slab, cache.endpoint, leash=leash.given)
        assert await child.ask("borrow_key", "k", 1) == ("right",)
        await fork_and_leave(child, leash)
        assert reads_out(cache) == 1
        assert await cache.evict("k")
        with pytest.raises(PutTimeout):
            await put(cache, slab, 2, timeout=0.1)
        assert await child.ask("look", 1) == ("right",)
        putting = asyncio.create_task(put(cache, slab, 2, CAPACITY))
        await until(lambda: cache.statistics().waiters == 1)
        child.kill()  # the fork lives, and has nothing of it
        assert is_right(await cache.get(await asyncio.wait_for(putting, 20.0)), 2)
        await lost(log)
        assert all(alive(pid) for pid in leash.pids)
        await works(cache, slab)
        leash.let_go()


async def test_a_fork_leaves_its_owners_borrow(
    start: Start, log: Log, slab: Slab, leash: Leash
) -> None:
    child, endpoint = await owner(start, slab, leash=leash.given)
    message, _ = await child.ask("put_key", 1, SIZE, "k")
    assert message == "ref"
    assert await child.ask("borrow_key", "k", 1) == ("right",)
    await fork_and_leave(child, leash)
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        assert await connection.evict("k")
        for seed in range(2, 10):  # more than fit: the read's bytes would be among those recycled
            await put(connection, slab, seed, key=str(seed))
        assert is_right(await connection.get("9"), 9)
        assert await child.ask("look", 1) == ("right",)
    assert await child.ask("leave") == ("left",)
    leash.let_go()
    child.tell("end")
    await child.ends()


async def test_a_fork_can_do_nothing_by_key(
    start: Start, log: Log, slab: Slab, leash: Leash
) -> None:
    """Nor put: each use raises. The parent reads, puts and pins on."""
    async with slab.create(recycle_interval=60.0) as cache:
        ref = await put(cache, slab, 1, key="key", readers=1)
        child = await client(start, slab, cache.endpoint, leash=leash.given)
        assert (await child.ask("put_key", 2, SIZE, "mine"))[0] == "ref"
        assert await child.ask("pin", "mine") == ("pinned",)
        raised, _, mapped = await forked(child, leash, ref)
        assert set(raised.values()) == {"CacheClosed"}, raised
        assert "put under a key" in raised
        assert not [mapping for mapping in mapped if "slab" in mapping], "one to read, one to write"
        assert cache.statistics().pinned_bytes == SIZE
        assert await child.ask("get_key", "key", 1) == ("right",)
        assert (await child.ask("put_key", 3, SIZE, "more"))[0] == "ref"
        child.kill()
        await lost(log)
        assert cache.statistics().pinned_bytes == 0
        assert is_right(await cache.get("more"), 3)
        await cache.discard(ref)
        await works(cache, slab)
        leash.let_go()


async def test_a_fork_gives_no_claim_back(start: Start, log: Log, slab: Slab, leash: Leash) -> None:
    """What ends in the fork is not its parent's claim; its parent's death is seen though it lives."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint, leash=leash.given)
        answers = sorted([await child.ask("fork_in_make", "k"), await child.hear()])
        assert [answer[0] for answer in answers] == ["ended", "parent"]
        leash.pids.append(answers[1][1])
        calls = []

        def make() -> torch.Tensor:
            calls.append(1)
            return feature(2, SIZE)

        task = asyncio.create_task(cache.get_or_put("k", make))
        await until(lambda: key_waiters(cache) == 1)
        with pytest.raises(featcache.KeyTimeout):
            await cache.get("k", timeout=0.1)
        assert (claims(cache), calls) == (1, [])
        child.kill()
        assert is_right(await asyncio.wait_for(task, 20.0), 2)
        assert calls == [1]
        assert all(alive(pid) for pid in leash.pids)
        await lost(log)
        await works(cache, slab)
        leash.let_go()


async def test_a_writer_dies_and_its_fork_lives(
    start: Start, log: Log, slab: Slab, leash: Leash
) -> None:
    """With no hook run the fork keeps the socket, not the slot that its parent was writing."""
    async with slab.create(recycle_interval=60.0) as cache:
        settings = slab.settings(inline_bytes=0)
        child = await client(start, slab, cache.endpoint, leash=leash.given, settings=settings)
        assert await child.ask("hold_writes") == ("holding",)
        child.tell("begin", "put", "put_key", 1, CAPACITY, "k")
        assert {await child.hear(), await child.hear()} == {("begun",), ("at", "writing")}
        message, pid = await child.ask("fork_raw")
        assert message == "parent"
        leash.pids.append(pid)
        putting = asyncio.create_task(put(cache, slab, 2, CAPACITY))
        await until(lambda: cache.statistics().waiters == 1)
        assert reserved(cache) == 1
        child.kill()
        ref: FeatureRef = await asyncio.wait_for(putting, 20.0)
        await lost(log)
        assert all(alive(pid) for pid in leash.pids)
        assert is_right(await cache.get(ref), 2)
        await works(cache, slab)
        leash.let_go()
