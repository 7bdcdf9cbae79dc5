"""Slabs on a GPU, which is a fake, over hosts: what is registered, and in which order bytes are read."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

import featcache
from featcache.memory.backends import plan_for
from featcache.memory.cuda.backing import IPC
from featcache.owner import owner as owners
from featcache.reach.plane import HOST, Memory
from reach.hosts import KEY, Hosts, quick
from support.caches import KIB, MIB, filled, spent, steps, tensor, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu, got, shrunk

VRAM = Memory("VRAM", 0)
GPU, CPU = "GPU", "CPU"


@pytest.fixture
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


@contextlib.asynccontextmanager
async def both(gpu: FakeGpu, home: str, reader: str, **changes: Any) -> AsyncIterator[Hosts]:
    """Two hosts, whose slabs are on the fake GPU or in host memory."""
    settings = quick(**({"capacity": MIB, "segment": SEGMENT, "idle": 3600.0} | changes))
    fake = vars(owners)["plan_for"]
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for place, listen in ((home, "127.0.0.1:0"), (reader, None)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owners, "plan_for", fake if place == GPU else plan_for)
                owner = featcache.create(settings=settings, listen=listen, cluster_key=KEY)
                made.append(await stack.enter_async_context(owner))
        client = await stack.enter_async_context(featcache.connect(made[1].endpoint))
        yield Hosts(made[0], made[1], client)
    gpu.run()


PLACES = [(GPU, GPU), (GPU, CPU), (CPU, GPU)]


@pytest.mark.parametrize(("home", "reader"), PLACES, ids=["VRAM-VRAM", "VRAM-DRAM", "DRAM-VRAM"])
async def test_features_of_a_gpu_and_of_the_host_are_read_by_either(
    gpu: FakeGpu, home: str, reader: str
) -> None:
    async with both(gpu, home, reader) as hosts:
        feature = torch.randint(0, 256, (3 * SEGMENT + 77,), dtype=torch.uint8)
        ref = await hosts.home.put(feature, readers=2)
        assert torch.equal(await got(hosts.client, ref), feature)
        assert torch.equal(await got(hosts.reader, ref), feature)
        assert len(hosts.reader_plane.transfers) == 1
        assert hosts.home_plane.memory == (VRAM if home == GPU else HOST)
        assert hosts.reader_plane.memory == (VRAM if reader == GPU else HOST)
        gpu.run()
        await spent(hosts.home)
        await spent(hosts.reader)


async def test_a_slab_of_one_legacy_allocation_is_read(no_leaks: None) -> None:
    with fake_gpu(IPC) as gpu:
        async with both(gpu, GPU, GPU) as hosts:
            ref = await hosts.home.put(filled(30 * KIB, 5))
            assert torch.equal(await got(hosts.client, ref), filled(30 * KIB, 5))


async def test_a_feature_is_read_only_once_the_putting_stream_has_copied_it(gpu: FakeGpu) -> None:
    async with both(gpu, GPU, CPU) as hosts:
        ref = await hosts.home.put(gpu.tensor(filled(20 * KIB, 7)))
        get = asyncio.create_task(hosts.client.get(ref))
        beyond = hosts.home._opened().beyond
        assert beyond is not None
        assert beyond.peers is not None
        looking = beyond.peers._peers
        await until(lambda: any(each.begun for each in looking.values()))
        await steps(5)
        assert hosts.reader_plane.transfers == []
        gpu.owner.run()
        assert torch.equal(tensor(await get), filled(20 * KIB, 7))


async def test_registrations_are_the_segments_and_go_before_them(gpu: FakeGpu) -> None:
    async with both(gpu, GPU, CPU) as hosts:
        plane, store = hosts.home_plane, hosts.home._opened().pool.store
        assert list(plane.registered.values()) == [SEGMENT]
        ref = await hosts.home.put(filled(3 * SEGMENT, 4))
        assert torch.equal(tensor(await hosts.client.get(ref)), filled(3 * SEGMENT, 4))
        assert sum(plane.registered.values()) == store.committed_bytes > SEGMENT
        left: list[int] = []
        gpu.owner.before["cuMemUnmap"] = lambda: left.append(len(plane.registered))
        gpu.run()
        await spent(hosts.home)
        await shrunk(hosts.home)
        slab = hosts.home._opened().pool.slab
        await until(lambda: len(slab.segments(0, MIB)) == 1)
        assert set(left) == {1}
        again = await hosts.home.put(filled(2 * SEGMENT, 9))
        assert torch.equal(tensor(await hosts.client.get(again)), filled(2 * SEGMENT, 9))
        del gpu.owner.before["cuMemUnmap"]


async def test_no_registration_reaches_into_the_next_segment(gpu: FakeGpu) -> None:
    """Whatever the initial size was: the driver's pieces lie where they were made."""
    changes = {"segment": 2 * SEGMENT, "initial": SEGMENT, "capacity": 8 * SEGMENT}
    async with both(gpu, GPU, CPU, **changes) as hosts:
        feature = filled(6 * SEGMENT, 3)
        ref = await hosts.home.put(feature)
        assert torch.equal(tensor(await hosts.client.get(ref)), feature)
        slab = hosts.home._opened().pool.slab
        made = slab.segments(0, 8 * SEGMENT)
        sizes = [size for _, size in sorted(hosts.home_plane.registered.items())]
        assert sizes == [each.size_bytes for each in made]


async def test_a_reader_without_access_to_the_gpu_gets_it_through_the_host(gpu: FakeGpu) -> None:
    async with both(gpu, CPU, GPU) as hosts:
        ref = await hosts.home.put(filled(9 * KIB, 8))
        through = quick(through_host=True)
        async with featcache.connect(hosts.reader.endpoint, settings=through) as far:
            assert torch.equal(await got(far, ref), filled(9 * KIB, 8))
        assert hosts.reader.statistics().relayed == 1
        gpu.run()
        await spent(hosts.home)


async def test_a_landing_place_is_not_one_that_a_stream_still_reads(gpu: FakeGpu) -> None:
    """The slab is full of a feature whose reader's stream has not run: the fetch waits for its word."""
    async with both(gpu, CPU, GPU, capacity=SEGMENT) as hosts:
        here = await hosts.reader.put(filled(SEGMENT, 1))
        view = hosts.client.borrow(here)
        async with view:
            pass
        ref = await hosts.home.put(filled(SEGMENT, 2))
        get = asyncio.create_task(hosts.client.get(ref, device="cpu"))
        store = hosts.reader._opened().pool.store
        await until(lambda: store.queue.count == 1)
        assert hosts.reader_plane.transfers == []
        gpu.run()
        assert torch.equal(tensor(await get), filled(SEGMENT, 2))


async def test_a_home_that_says_the_wrong_kind_of_memory_is_refused(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with both(gpu, GPU, CPU) as hosts:
        ref = await hosts.home.put(filled(KIB, 1))
        beyond = hosts.home._opened().beyond
        assert beyond is not None
        slab = await beyond.slab()
        monkeypatch.setattr(slab, "memory", HOST)
        with pytest.raises(featcache.OwnerLost, match="memory of this kind"):
            await hosts.client.get(ref)


async def test_a_slot_that_another_host_reads_is_not_given_out(gpu: FakeGpu) -> None:
    """Discarded meanwhile, it is the reader's until it has its bytes, whatever streams do."""
    async with both(gpu, GPU, CPU, capacity=SEGMENT) as hosts:
        first = await hosts.home.put(filled(KIB, 1))
        await hosts.client.get(first)  # it has made the reader's plane
        ref = await hosts.home.put(filled(SEGMENT - 4 * KIB, 2))
        hosts.reader_plane.held = True
        get = asyncio.create_task(hosts.client.get(ref))
        await until(lambda: len(hosts.reader_plane.transfers) == 2)
        await hosts.home.discard(ref)
        put = asyncio.create_task(hosts.home.put(filled(SEGMENT - 4 * KIB, 3)))
        store = hosts.home._opened().pool.store
        await until(lambda: store.queue.count == 1)
        gpu.run()
        await steps(20)
        assert not put.done()
        hosts.reader_plane.transfers[-1].land()
        assert torch.equal(tensor(await get), filled(SEGMENT - 4 * KIB, 2))
        await put
