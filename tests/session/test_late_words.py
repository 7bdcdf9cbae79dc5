"""Bytes and words that a stream brings late: readers wait, and nobody's room is given away early."""

import asyncio
from collections.abc import Iterator

import pytest
import torch

import featcache
from featcache import BackendUnavailable, StaleRef
from support.caches import KIB, MIB, filled, spent, steps, tensor, until
from support.fakegpu import FakeGpu, fake_gpu, got, right, segmented


@pytest.fixture
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


async def test_an_early_reader_waits_on_the_cpu(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        ref = await owner.put(gpu.tensor(filled(KIB, 4)))
        with pytest.raises(featcache.GetTimeout):
            client.get_nowait(ref, device="cpu")
        task = asyncio.create_task(got(client, ref))
        await steps(30)
        assert not task.done()
        gpu.run()
        assert torch.equal(await task, filled(KIB, 4))
        await spent(owner)


@pytest.mark.parametrize("how", ["discard", "expire"])
async def test_bytes_that_land_after_their_ref_was_taken_back(gpu: FakeGpu, how: str) -> None:
    """Another stream's put gets no byte of theirs: their room is nobody's until they have landed."""
    async with segmented(gpu, initial=MIB) as (owner, client):
        half = MIB // 2
        ref = await owner.put(gpu.tensor(filled(half, 1)), ttl=0.01 if how == "expire" else None)
        if how == "discard":
            await owner.discard(ref)
        else:
            await until(lambda: owner.statistics().expired == 1)
        with pytest.raises(StaleRef):
            await client.get(ref)
        gpu.owner.side_stream()
        other = await owner.put(gpu.tensor(filled(half, 2)))
        assert other.offset_bytes != ref.offset_bytes
        with pytest.raises(featcache.PutTimeout):
            await owner.put(filled(half, 3), timeout=0.02)
        waiting = asyncio.create_task(owner.put(filled(half, 3)))
        await until(lambda: owner.statistics().waiters == 1)
        gpu.run()
        third = await waiting
        assert third.offset_bytes == ref.offset_bytes
        await right(client, other, 2)
        await right(client, third, 3)
        await spent(owner)


async def test_a_put_that_fails_with_some_bytes_on_their_way(gpu: FakeGpu) -> None:
    async with segmented(gpu, initial=MIB) as (owner, client):
        feature = {"a": gpu.tensor(filled(KIB, 1)), "b": gpu.tensor(filled(KIB, 2))}
        gpu.owner.fail("cuMemcpyAsync", 2)
        with pytest.raises(BackendUnavailable):
            await owner.put(feature)
        assert owner.statistics().slots_used == 1, "one part is on its way"
        with pytest.raises(featcache.PutTimeout):
            await owner.put(filled(MIB), timeout=0.02)
        gpu.run()
        await right(client, await owner.put(filled(MIB, 3)), 3)
        await spent(owner)


async def test_closing_waits_for_what_is_on_its_way(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await owner.put(gpu.tensor(filled(KIB, 1)))
        async with client.borrow(await owner.put(filled(KIB, 2))):
            pass
        closing = [asyncio.create_task(side.aclose()) for side in (owner, client)]
        await asyncio.wait(closing, timeout=0.02)
        assert not any(task.done() for task in closing)
        gpu.run()
        await asyncio.gather(*closing)


@pytest.mark.parametrize("who", ["client", "owner"])
async def test_a_read_that_is_paid_but_not_yet_seen_to_be(gpu: FakeGpu, who: str) -> None:
    """Until the stream has come to the word: a second read would find the next feature's bytes."""
    async with segmented(gpu) as pair:
        owner = pair[0]
        reader = pair[who == "client"]
        ref = await owner.put(filled(KIB, 3), readers=2)
        async with reader.borrow(ref) as view:
            assert torch.equal(tensor(view), filled(KIB, 3))
        for use in (got(reader, ref), reader.release(ref), reader.borrow(ref).__aenter__()):
            with pytest.raises(StaleRef, match="paid"):
                await use
        with pytest.raises(StaleRef, match="paid"):
            reader.get_nowait(ref, device="cpu")
        await owner.discard(ref)
        gpu.run()
        await spent(owner)


async def test_uses_that_overlap_are_paid_behind_the_last(gpu: FakeGpu) -> None:
    """Each on a stream of its own; the word comes when both streams have got there."""
    async with segmented(gpu) as (owner, client):
        ref = await owner.put(filled(KIB, 3))
        outer, inner = client.borrow(ref), client.borrow(ref)
        await outer.__aenter__()
        await inner.__aenter__()
        (api,) = gpu.clients
        first = api.side_stream()
        await inner.__aexit__(None, None, None)
        second = api.side_stream()
        await outer.__aexit__(None, None, None)
        api.run(second)
        owner._opened().pool.collect()
        assert owner.statistics().slots_used == 1
        api.run(first)
        owner._opened().pool.collect()
        assert owner.statistics().slots_used == 1, "the second waits behind the first"
        api.run(second)
        await spent(owner)


async def test_a_copy_to_the_host_beside_a_borrow_is_paid_with_it(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        ref = await owner.put(filled(KIB, 3))
        async with client.borrow(ref) as view:
            assert torch.equal(await got(client, ref), filled(KIB, 3))
            owner._opened().pool.collect()
            assert owner.statistics().slots_used == 1
            assert torch.equal(tensor(view), filled(KIB, 3))
        owner._opened().pool.collect()
        assert owner.statistics().slots_used == 1
        gpu.run()
        await spent(owner)


async def test_a_reader_that_leaves_before_its_stream_got_there(gpu: FakeGpu) -> None:
    """Its goodbye waits for the words that it has under way: else its reads would count as unpaid."""
    async with segmented(gpu) as (owner, client):
        async with client.borrow(await owner.put(filled(KIB, 3))):
            pass
        closing = asyncio.create_task(client.aclose())
        await steps(10)
        assert owner.statistics().sessions == 1
        assert not closing.done()
        gpu.run()
        await closing
        await spent(owner)
        assert owner.statistics().reads_paid == 1
