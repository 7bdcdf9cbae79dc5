"""Reads by key on a GPU: each is paid behind the reader's stream, and keeps its bytes until then."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from featcache import FeatureCache, FeatureClient, PoolFull
from support.caches import KIB, MIB, filled, spent, steps, tensor, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu, got, right, segmented, shrunk
from support.fakewriters import run_client
from support.keyed import grants, nothing_lost, page_of, pool_of, queued

ALL: dict[str, Any] = {"initial": MIB}
User = FeatureCache | FeatureClient


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


async def read(user: User, key: str, value: int) -> None:
    """Borrow and leave: the read is over for its caller, not for its stream."""
    async with user.borrow(key) as view:
        assert torch.equal(tensor(view), filled(tensor(view).numel(), value))


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_read_is_paid_when_its_stream_has_come_to_it(
    who: str, no_leaks: None, gpu: FakeGpu
) -> None:
    async with segmented(gpu, **ALL) as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(filled(MIB, 1), key="a")
        for _ in range(3):
            await read(user, "a", 1)
        pool_of(owner).collect()
        assert grants(owner) == 3
        assert await owner.evict("a")
        with pytest.raises(PoolFull):
            await both[1].put(filled(1), on_full="raise")
        waiting = asyncio.create_task(owner.put(filled(MIB, 2)))
        await queued(owner, 1)
        await steps(10)
        assert not waiting.done()
        gpu.run()
        await right(owner, await waiting, 2)
        await nothing_lost(owner)


async def test_what_a_stream_still_reads_is_not_evicted(gpu: FakeGpu) -> None:
    async with segmented(gpu, **ALL) as (owner, client):
        quarter = MIB // 4
        for number in range(4):
            await owner.put(filled(quarter, number), key=f"{number}")
        await read(client, "0", 0)
        await read(client, "1", 1)
        for number in range(4, 8):
            await owner.put(filled(quarter, number), key=f"{number}")
        kept = [f"{number}" for number in range(8) if await client.contains(f"{number}")]
        assert kept == ["0", "1", "6", "7"]
        run_client(gpu)
        for number in range(8, 12):
            await owner.put(filled(quarter, number), key=f"{number}")
        assert not await client.contains("0")
        await nothing_lost(owner)


async def test_each_read_is_paid_by_the_stream_that_it_was_left_on(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await owner.put(filled(KIB, 5), key="a")
        api, streams = gpu.clients[0], list[int]()
        for _ in range(3):
            streams.append(api.side_stream())
            await read(client, "a", 5)
        assert grants(owner) == 3
        for left, number in ((2, 1), (1, 2), (0, 0)):
            api.run(streams[number])
            pool_of(owner).collect()
            assert grants(owner) == left
        api.current.clear()
        await nothing_lost(owner)


async def test_a_copy_to_the_host_is_paid_when_it_is_done(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await owner.put(filled(KIB, 5), key="a")
        for user in (owner, client):
            found = tensor(await user.get("a", device="cpu"))
            assert torch.equal(found, filled(KIB, 5))
        pool_of(owner).collect()
        assert grants(owner) == 0
        await nothing_lost(owner)


async def test_grants_whose_words_are_late_are_not_given_out_again(gpu: FakeGpu) -> None:
    async with segmented(gpu, grants=2) as (owner, client):
        await owner.put(filled(KIB, 5), key="a")
        for _ in range(3):
            await read(client, "a", 5)
            await read(client, "a", 5)
            with pytest.raises(PoolFull, match="grants"):
                await client.get("a", device="cpu")
            assert page_of(owner).reads_by_key == 2
            run_client(gpu)
        await read(client, "a", 5)
        run_client(gpu)
        await nothing_lost(owner)


async def test_a_client_that_leaves_waits_for_its_reads_to_be_paid(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await owner.put(filled(KIB, 5), key="a")
        await read(client, "a", 5)
        closing = asyncio.create_task(client.aclose())
        await steps(10)
        assert not closing.done()
        assert grants(owner) == 1
        run_client(gpu)
        await closing
        await nothing_lost(owner)


async def test_a_tail_that_is_read_by_key_stays(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await owner.put(filled(MIB, 5), key="a")
        await read(client, "a", 5)
        assert await owner.evict("a")
        for _ in range(10):
            pool_of(owner)._tick()
            await steps(2)
        assert owner.statistics().used_bytes == owner.statistics().committed_bytes == MIB
        run_client(gpu)
        await spent(owner)
        await shrunk(owner)
        await until(lambda: gpu.mapped() == SEGMENT)


async def test_a_key_in_a_segment_that_is_yet_to_come(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        waiting = [asyncio.create_task(client.get("a", device="cpu", timeout=20)) for _ in range(2)]
        await steps(3)
        await owner.put(filled(5 * SEGMENT, 6), key="a")
        for task in waiting:
            assert torch.equal(tensor(await task), filled(5 * SEGMENT, 6))
        ref = await owner.put(filled(KIB, 7), key="b", readers=1)
        await right(client, ref, 7)
        assert torch.equal(await got(owner, ref), filled(KIB, 7))
        await nothing_lost(owner)
