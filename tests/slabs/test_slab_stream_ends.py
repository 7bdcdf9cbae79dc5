"""What a stream is still at when its ref is taken back, its put cancelled, its pool closed."""

import asyncio

import pytest
import torch

import featcache
from featcache import PoolFull, StaleRef
from support.caches import MIB, filled, spent, tensor, until
from support.slabs import (
    HOME,
    Slab,
    busy,
    full_of,
    landed,
    on_gpu,
    primed,
    same,
    stream_on,
    until_past,
)

pytestmark = [pytest.mark.gpu, on_gpu]

FEATURE = 2 * MIB
"""All that a slab of these tests holds."""


@pytest.mark.parametrize("how", ["discard", "expire", "client"])
async def test_a_copy_that_lands_after_its_ref_was_taken_back(
    slab: Slab, side: torch.cuda.Stream, how: str
) -> None:
    """The next feature in these bytes, put on another stream, has none of them."""
    async with primed(slab) as (owner, client):
        with torch.cuda.stream(side):
            made = busy()
            ref = await owner.put(full_of(1, FEATURE), ttl=0.005 if how == "expire" else None)
        if how == "expire":
            await until(lambda: owner.statistics().expired == 1)
        else:
            await (client if how == "client" else owner).discard(ref)
        with pytest.raises(StaleRef):
            await client.get(ref)
        with pytest.raises(PoolFull):
            owner.put_nowait(full_of(2, FEATURE))
        putting = asyncio.create_task(owner.put(full_of(2, FEATURE)))
        looks = await until_past(made, lambda: not putting.done())
        assert looks > 0, "the stream was not busy for long enough to tell"
        second = await putting
        assert second.offset_bytes == ref.offset_bytes
        side.synchronize()
        assert same(await client.get(second), filled(FEATURE, 2))
        await spent(owner)


async def test_a_put_that_is_cancelled_while_it_waits(slab: Slab, side: torch.cuda.Stream) -> None:
    async with primed(slab) as (owner, client):
        first = await owner.put(full_of(1, FEATURE))
        with torch.cuda.stream(side):
            busy(0.1)
            tasks = [asyncio.create_task(owner.put(full_of(n, FEATURE))) for n in range(3)]
            await until(lambda: owner.statistics().waiters == 3)
        tasks[1].cancel()
        await client.release(first)
        for n in (0, 2):
            assert same(await client.get(await tasks[n]), filled(FEATURE, n))
        assert tasks[1].cancelled()
        await spent(owner)


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["owner", "client"])
async def test_closing_with_copies_under_way(
    slab: Slab, side: torch.cuda.Stream, first: str
) -> None:
    """Nothing is unmapped under a copy: the context lives, and what was read is right."""
    async with primed(slab) as (owner, client):
        ref = await owner.put(full_of(5, FEATURE), readers=2)
        await landed(owner, ref)
        with torch.cuda.stream(side):
            busy()
            copies = [await client.get(ref), await owner.get(ref)]
        await (owner if first == "owner" else client).aclose()
        await (client if first == "owner" else owner).aclose()
        torch.cuda.synchronize(HOME)
        assert all(same(copy, filled(FEATURE, 5)) for copy in copies)


async def test_a_burst_on_many_streams(slab: Slab) -> None:
    """Four slots' worth of room, eight streams, 200 features: each is what was put."""
    streams = [stream_on(HOME) for _ in range(8)]
    async with primed(slab, capacity=8 * MIB, initial=8 * MIB) as (owner, client):
        wrong: list[torch.Tensor] = []

        async def read(value: int, ref: featcache.FeatureRef) -> None:
            await landed(owner, ref)
            # Nothing is awaited in it: torch's current stream is the thread's, not the task's.
            with torch.cuda.stream(streams[(value * 5) % 8]):
                if value % 2:
                    copy = tensor(client.get_nowait(ref))
                    wrong.append((copy != value % 251).any())
                else:
                    with client.borrow(ref) as view:
                        wrong.append((tensor(view) != value % 251).any())

        reads = []
        for value in range(200):
            with torch.cuda.stream(streams[value % 8]):
                if value % 20 == 0:
                    busy(0.005)
                ref = await owner.put(full_of(value % 251, FEATURE - 256 * (value % 7)))
            reads.append(asyncio.create_task(read(value, ref)))
        await asyncio.gather(*reads)
        torch.cuda.synchronize(HOME)
        assert len(wrong) == 200
        assert not any(bool(flag) for flag in wrong)
        assert owner.statistics().waited > 0
        await spent(owner)
