"""Puts of clients that can't access the slab: into host memory, from where the owner copies."""

import asyncio

import pytest
import torch

from featcache import FeatureTooLarge, PoolFull, PutTimeout, SettingsError
from support.caches import KIB, MIB, filled, full, tensor, tensors, until
from support.hosted import all_spent, relayed

BASE = torch.arange(720, dtype=torch.float32)


async def test_what_comes_back(no_leaks: None) -> None:
    async with relayed() as (owner, client):
        for value in (BASE, BASE.view(24, 30).T, torch.tensor(3.5), torch.empty(0, 3), BASE > 9):
            ref = await client.put(value, readers=2)
            assert ref.pool_id == owner._opened().pool.pool_id
            assert torch.equal(tensor(await owner.get(ref)), value)
            assert torch.equal(tensor(await client.get(ref)), value)
        ref = await client.put({"a": BASE, "b": BASE.to(torch.int64)})
        read = tensors(await owner.get(ref))
        assert torch.equal(read["a"], BASE)
        assert torch.equal(read["b"], BASE.to(torch.int64))
        assert client.statistics().puts == 6
        await all_spent(owner)


async def test_keys(no_leaks: None) -> None:
    async with relayed() as (owner, client):
        await client.put(BASE, key="k")
        assert torch.equal(tensor(await owner.get("k")), BASE)
        assert torch.equal(tensor(await client.get("k")), BASE)
        made = await client.get_or_put("m", lambda: BASE + 1)
        assert torch.equal(tensor(made), BASE + 1)
        assert torch.equal(tensor(await owner.get("m")), BASE + 1)
        assert await client.evict("k")
        assert await owner.evict("m")
        await all_spent(owner)


async def test_room(no_leaks: None) -> None:
    async with relayed() as (owner, client):
        whole = await full(owner)
        with pytest.raises(PoolFull):
            await client.put(filled(KIB), on_full="raise")
        with pytest.raises(PutTimeout):
            await client.put(filled(KIB), timeout=0.01)
        waiting = asyncio.create_task(client.put(filled(KIB, 3)))
        await until(lambda: owner.statistics().waiters == 1)
        await owner.release(whole)
        ref = await waiting
        assert torch.equal(tensor(await owner.get(ref)), filled(KIB, 3))
        with pytest.raises(FeatureTooLarge):
            await client.put(filled(MIB + 1))
        with pytest.raises(SettingsError):
            await client.put(filled(KIB), on_full="spill")
        await all_spent(owner)


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_cancelled_at_any_moment(turns: int, no_leaks: None) -> None:
    async with relayed() as (owner, client):
        await owner.get(await client.put(BASE))  # attached
        putting = asyncio.create_task(client.put(BASE))
        for _ in range(turns):
            await asyncio.sleep(0)
        if putting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await putting
        else:
            await owner.discard(putting.result())
        assert torch.equal(tensor(await owner.get(await client.put(BASE))), BASE)
        for slot in list(owner._opened().pool.store.owing.values()):
            # Put, and its ref lost with the cancelled call: it is discarded, or goes by its ttl.
            await until(lambda slot=slot: not slot.reads_left)  # type: ignore[misc]
        await all_spent(owner)
