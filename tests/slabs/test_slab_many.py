"""Many at once, and shares, on a real GPU: in the order of streams, by batches of words."""

import asyncio

import pytest
import torch

from support.caches import KIB, spent, tensor
from support.keyed import nothing_lost
from support.slabs import HOME, Slab, busy, full_of, on_gpu, primed, same, stream_on

COUNT = 40


@on_gpu
@pytest.mark.parametrize("who", ["owner", "client"])
async def test_many_are_put_and_read_in_the_order_of_streams(slab: Slab, who: str) -> None:
    async with primed(slab, slots=256) as both:
        owner, client = both
        writer = both[who == "client"]
        for turn in range(5):
            with torch.cuda.stream(stream_on()):
                busy(0.02)
                features = [full_of((n + turn) % 256, 16 * KIB) for n in range(COUNT)]
                refs = await writer.put_many(features, readers=2)
                for feature in features:
                    feature.fill_(255)  # behind the copies
            for reader in (client, owner):
                with torch.cuda.stream(stream_on()):
                    found = await reader.get_many(refs)
                    sums = torch.stack([tensor(one).long().sum() for one in found]).cpu()
                expected = [((n + turn) % 256) * 16 * KIB for n in range(COUNT)]
                assert sums.tolist() == expected
            await spent(owner)


@on_gpu
async def test_many_keys_mixed_with_refs_and_devices(slab: Slab) -> None:
    async with primed(slab, slots=256) as (owner, client):
        names = [f"{n}" for n in range(COUNT)]
        await client.put_many([full_of(n, KIB) for n in range(COUNT)], keys=names)
        refs = await owner.put_many([full_of(100 + n, KIB) for n in range(COUNT)])
        found = await client.get_many([*names, *refs], device="cpu")
        expected = [*range(COUNT), *range(100, 100 + COUNT)]
        assert [int(tensor(one)[0]) for one in found] == expected
        assert all(same(one, full_of(n, KIB)) for one, n in zip(found, expected, strict=True))
        assert await client.contains_many([*names, "x"]) == [True] * COUNT + [False]
        await nothing_lost(owner)


@on_gpu
@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_share_is_of_bytes_that_have_come(slab: Slab, who: str) -> None:
    async with primed(slab) as both:
        owner, client = both
        with torch.cuda.stream(stream_on()):
            busy(0.05)
            await owner.put(full_of(7, 64 * KIB), key="a")
        refs = await asyncio.gather(*(both[who == "client"].share("a", readers=2) for _ in "xy"))
        assert await owner.evict("a")
        with torch.cuda.stream(stream_on()):
            for ref in refs:
                for reader in (client, owner):
                    assert same(await reader.get(ref), full_of(7, 64 * KIB))
            async with client.borrow(await owner.put(full_of(1, KIB, HOME))):
                pass
        await spent(owner)
