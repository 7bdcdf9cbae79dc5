"""Rooms ahead where words come late: the word that says "written" stands behind the copy on a stream."""

import random
from collections.abc import Iterator

import pytest

from featcache import FeatureCache, FeatureClient, GetTimeout
from support.caches import KIB, filled, until
from support.fakegpu import FakeGpu, fake_gpu, right, segmented
from support.fakewriters import on_client_filled, run_client
from support.keyed import nothing_lost, pool_of


@pytest.fixture
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


async def practised(gpu: FakeGpu, owner: FeatureCache, client: FeatureClient) -> int:
    """Put until there is room ahead; return the number of the client's last request."""
    for value in range(3):
        ref = await client.put(on_client_filled(gpu, KIB, value))
        run_client(gpu)
        await right(owner, ref, value)
    await until(lambda: pool_of(owner).store.ahead)
    return asked(client)


def asked(client: FeatureClient) -> int:
    (connection,) = client._opened().registry.connections
    return connection.link.requests._last_number


async def test_the_word_comes_behind_the_copy(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        before = await practised(gpu, owner, client)
        ref = await client.put(on_client_filled(gpu, KIB, 9))
        assert asked(client) == before
        await until(lambda: pool_of(owner).pending_writes.in_flight)
        with pytest.raises(GetTimeout):
            await owner.get(ref, device="cpu", timeout=0.01)
        run_client(gpu)
        await right(owner, ref, 9)
        await nothing_lost(owner)


@pytest.mark.parametrize("seed", range(3))
async def test_slots_that_are_claimed_again_and_again(gpu: FakeGpu, seed: int) -> None:
    """From the GPU and from the host in turn: no word of one tenant is taken for the next one's."""
    chance = random.Random(seed)
    async with segmented(gpu) as (owner, client):
        await practised(gpu, owner, client)
        for number in range(40):
            value = number % 251
            source = (
                filled(KIB, value) if chance.random() < 0.4 else on_client_filled(gpu, KIB, value)
            )
            ref = await client.put(source)
            if chance.random() < 0.2:
                await client.discard(ref)
                run_client(gpu)
                continue
            run_client(gpu)
            await right(owner, ref, value)
        await nothing_lost(owner)
        await client.aclose()  # every word has landed, as far as it knows
        await until(lambda: not pool_of(owner).store.ahead)


async def test_a_client_that_leaves_with_a_copy_on_its_way(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await practised(gpu, owner, client)
        await client.put(on_client_filled(gpu, KIB, 9), ttl=None)
        run_client(gpu)
        await client.aclose()
        await until(lambda: len(pool_of(owner).store.owing) == 1)
        (slot,) = pool_of(owner).store.owing.values()
        assert pool_of(owner).words.published[slot.index] == slot.generation
        pool_of(owner).apply(pool_of(owner).store.revoke(slot.index, slot.generation, 0.0))
        await nothing_lost(owner)
