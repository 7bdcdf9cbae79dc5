"""Ends of connections that are cut short while a GPU's words are still to land: nothing stays open."""

import asyncio
import os
from collections.abc import Iterator

import pytest

import featcache
from featcache import FeatureClient
from featcache.client.connection import ConnectionState, PoolConnection
from featcache.memory.cuda.mapping import CudaMapping
from featcache.session.waiting import Doorbell
from support import processes
from support.caches import KIB, MIB, filled, small, spent, steps, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu, segmented
from support.leaks import open_descriptors


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    processes.warm_up()


@pytest.fixture
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


def doorbells() -> int:
    return open_descriptors()["anon_inode:[eventfd]"]


def only_one(client: FeatureClient) -> PoolConnection:
    (connection,) = client._opened().registry.connections
    return connection


@pytest.mark.parametrize("end", ["the reader is cancelled", "the client closes"])
async def test_making_place_for_another_pool(gpu: FakeGpu, end: str) -> None:
    """The longest attached pool is being closed when that is given up: it is closed to the end."""
    chosen = small(capacity=MIB, segment=SEGMENT, idle=3600.0)
    async with (
        segmented(gpu) as (one, _),
        featcache.create(settings=chosen) as two,
        featcache.connect(settings=small(attachments=1)) as client,
    ):
        before = doorbells()
        async with client.borrow(await one.put(filled(KIB, 3))):
            pass
        left = only_one(client)
        reading = asyncio.create_task(client.get(await two.put(filled(KIB, 4)), device="cpu"))
        await until(lambda: left.state is ConnectionState.CLOSING)
        await steps(5)
        assert doorbells() == before + 1, "its word is still to land"
        if end == "the client closes":
            closing = asyncio.create_task(client.aclose())
            await steps(5)
            gpu.run()
            await closing
            with pytest.raises(featcache.CacheClosed):
                await reading
            assert doorbells() == before
        else:
            reading.cancel()
            await asyncio.wait([reading])
            gpu.run()
        await until(lambda: left.state is ConnectionState.LEFT)
        await until(lambda: one.statistics().sessions == 1)
        await spent(one)
        gpu.run()


async def test_all_tasks_of_the_loop_are_cancelled(gpu: FakeGpu) -> None:
    """As at the end of `asyncio.run`, which comes while a lost owner's pool is yet to be unmapped."""
    before = doorbells()
    async with segmented(gpu) as (owner, client):
        async with client.borrow(await owner.put(filled(KIB, 3))):
            pass
        registry, left = client._opened().registry, only_one(client)
        closing = asyncio.create_task(owner.aclose())
        await until(lambda: left.state is ConnectionState.LEFT)
        (leaving,) = registry._tasks
        await steps(5)
        assert not leaving.done(), "its word is still to land"
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        gpu.run()
        await closing
        await until(lambda: doorbells() == before)
        await until(lambda: gpu.mapped() == 0)


async def test_an_end_that_is_told_twice(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the socket and by the attach that waits for segments: two threads would unmap at once."""
    ended: list[CudaMapping] = []
    close = CudaMapping.close

    def counting(mapping: CudaMapping) -> None:
        ended.append(mapping)
        close(mapping)

    async with segmented(gpu) as (owner, client):
        registry, left = client._opened().registry, only_one(client)
        monkeypatch.setattr(CudaMapping, "close", counting)
        registry._on_lost(left.attachment.pool_id, "it is gone")
        left.lose("it could not be attached")
        await until(lambda: left.state is ConnectionState.LEFT)
        await registry.drain()
        assert ended == [left._mapping]
        left.lose("it is gone")
        await registry.drain()
        assert ended == [left._mapping]
        left.link.say_goodbye()
        await until(lambda: owner.statistics().sessions == 0)


async def test_a_doorbell_that_nobody_closed() -> None:
    """It goes with what refers to it, as the words' mappings do."""
    before = doorbells()
    bell = Doorbell(os.eventfd(0))
    assert doorbells() == before + 1
    del bell
    assert doorbells() == before
