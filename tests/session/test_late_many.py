"""Many at once, and shares, on a GPU: words in one batch behind the stream, bytes that come late."""

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest
import torch

from api.test_get_many import values
from featcache import BackendUnavailable, FeatureCache, FeatureClient, GetTimeout
from support.caches import KIB, MIB, filled, spent, steps, until
from support.fakegpu import FakeGpu, fake_gpu, segmented
from support.fakewriters import has_landed, on_client_filled, run_client
from support.keyed import in_progress, nothing_lost, pool_of

ALL: dict[str, Any] = {"initial": MIB}
User = FeatureCache | FeatureClient
BATCH, WORD = "cuStreamBatchMemOp", "cuStreamWriteValue64"


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


def on_owner(gpu: FakeGpu, count: int) -> list[torch.Tensor]:
    return [gpu.tensor(filled(KIB, n)) for n in range(count)]


async def failed(call: Awaitable[object]) -> tuple[int | None, str]:
    """The member whose copy the driver refused, by the error's attribute and its message."""
    try:
        await call
    except BackendUnavailable as error:  # not kept: its traceback keeps the mapping
        return error.member, str(error).partition(",")[0]
    pytest.fail("it did not fail")


async def test_an_owner_publishes_many_by_one_batch_behind_its_stream(gpu: FakeGpu) -> None:
    async with segmented(gpu, **ALL) as (owner, client):
        refs = await owner.put_many(on_owner(gpu, 5), readers=2)
        assert (gpu.owner.calls.count(BATCH), gpu.owner.calls.count(WORD)) == (1, 0)
        assert not any(has_landed(owner, ref) for ref in refs)
        reading = asyncio.create_task(client.get_many(refs, device="cpu"))
        await steps(20)
        assert not reading.done()
        gpu.run()
        assert all(has_landed(owner, ref) for ref in refs)
        assert values(await reading) == list(range(5))
        assert values(await owner.get_many(refs, device="cpu")) == list(range(5))
        gpu.run()
        await spent(owner)


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_many_reads_are_paid_by_one_batch_behind_their_copies(gpu: FakeGpu, who: str) -> None:
    async with segmented(gpu, **ALL) as both:
        owner, reader = both[0], both[who == "client"]
        refs = await owner.put_many([filled(KIB, n) for n in range(5)])
        async with reader.borrow(await owner.put(filled(1))):
            pass  # attached
        gpu.run()
        api = gpu.owner if who == "owner" else gpu.clients[0]
        before = api.calls.count(BATCH), api.calls.count(WORD)
        assert values(await reader.get_many(refs)) == list(range(5))
        assert (api.calls.count(BATCH), api.calls.count(WORD)) == (before[0] + 1, before[1])
        pool_of(owner).collect()
        assert owner.statistics().slots_used == 5, "paid when the stream has come to it"
        gpu.run()
        await spent(owner)


async def test_an_owners_own_reads_of_many_follow_its_stream(gpu: FakeGpu) -> None:
    async with segmented(gpu, **ALL) as (owner, _):
        refs = await owner.put_many(on_owner(gpu, 5))
        assert values(await owner.get_many(refs)) == list(range(5)), "it waits for no word"
        gpu.run()
        await spent(owner)


async def test_a_copy_that_fails_leaves_all_owed_until_the_streams_are_done(gpu: FakeGpu) -> None:
    async with segmented(gpu, **ALL) as (owner, client):
        refs = await owner.put_many([filled(KIB, n) for n in range(3)])
        async with client.borrow(await owner.put(filled(1))):
            pass
        gpu.run()
        gpu.clients[0].fail("cuMemcpyAsync", 2)
        assert await failed(client.get_many(refs)) == (1, "member 2 of 3")
        page = pool_of(owner).pages[1]
        await until(lambda: not any(page.holds(ref.slot, ref.generation) for ref in refs))
        assert values(await client.get_many(refs)) == [0, 1, 2]
        gpu.run()
        await spent(owner)


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_client_tells_of_many_by_one_batch(gpu: FakeGpu, keyed: bool) -> None:
    async with segmented(gpu, **ALL) as (owner, client):
        await client.release(await client.put(filled(1)))
        gpu.run()
        names = [f"{n}" for n in range(4)] if keyed else None
        api = gpu.clients[0]
        features = [on_client_filled(gpu, KIB, n) for n in range(4)]
        refs = await client.put_many(features, keys=names)
        assert (api.calls.count(BATCH), owner.statistics().slots_used) == (1, 4)
        assert not any(has_landed(owner, ref) for ref in refs)
        with pytest.raises(GetTimeout):
            await owner.get_many(names or refs, device="cpu", timeout=0.001)
        run_client(gpu)
        assert values(await owner.get_many(names or refs, device="cpu")) == list(range(4))
        gpu.run()
        await nothing_lost(owner)


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_share_waits_for_the_stream_of_the_put(gpu: FakeGpu, who: str) -> None:
    async with segmented(gpu, **ALL) as both:
        owner, scheduler = both[0], both[who == "client"]
        await owner.put(gpu.tensor(filled(KIB, 7)), key="a")
        sharing = asyncio.create_task(scheduler.share("a", readers=1))
        if who == "client":
            await until(lambda: in_progress(owner) == 1)
        await steps(20)
        assert not sharing.done()
        gpu.run()
        ref = await sharing
        assert has_landed(owner, ref)
        assert values(await both[1].get_many([ref])) == [7]
        assert await owner.evict("a")
        pool_of(owner).collect()
        assert owner.statistics().used_bytes == KIB, "the read is not paid yet"
        gpu.run()
        await spent(owner)


@pytest.mark.parametrize("where", ["owner", "client"])
async def test_a_batch_that_is_given_up_keeps_its_bytes_until_they_have_come(
    gpu: FakeGpu, where: str
) -> None:
    async with segmented(gpu, **ALL) as both:
        owner, writer = both[0], both[where == "client"]
        await writer.put_many([filled(1)], ttl=0.001)
        await spent(owner)
        api = gpu.owner if where == "owner" else gpu.clients[0]
        features = [api.tensor(filled(KIB, n)) for n in range(4)]
        api.fail("cuMemcpyAsync", 3)
        assert await failed(writer.put_many(features)) == (2, "member 3 of 4")
        pool_of(owner).collect()
        assert owner.statistics().slots_used >= 2, "two copies are on their way"
        gpu.run()
        await spent(owner)
