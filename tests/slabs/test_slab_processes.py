"""Slabs read in other processes, whose CUDA contexts are their own: by their device, another, or the CPU."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import featcache
from support import processes
from support.caches import KIB, MIB, filled, full, small, spent, tensor, until
from support.far import far_reader, named_reader, of_seed, view_writer
from support.hosted import all_spent
from support.processes import Child, Start
from support.slabs import Place, check_devices, place_params

PLACES = place_params(
    "host-cpu", "host-cuda:0",
    "vmm-cuda:0", "vmm-cuda:1", "vmm-cpu", "ipc-cuda:0", "ipc-cuda:1", "ipc-cpu",
)  # fmt: skip


@pytest.fixture(params=PLACES)
def far(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    check_devices(found)
    return found


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    processes.warm_up()
    with processes.starting() as started:
        yield started


@pytest.fixture(scope="module")
def child(start: Start) -> Child:
    """One process for all places: it takes CUDA a second to begin."""
    return start(far_reader)


async def told(child: Child, owner: featcache.FeatureCache, place: Place, **changes: Any) -> None:
    child.tell("read", owner.endpoint, place.where, changes)
    await child.expect("attached")


async def test_what_another_process_reads(child: Child, far: Place) -> None:
    """Gets and borrows of features of many sizes, through a slab that is too small for them all."""
    async with far.slab.create(capacity=4 * MIB) as owner:
        await told(child, owner, far)
        count = 30
        for seed in range(count):
            nbytes = (1, 255, 100 * KIB, MIB, 3 * MIB)[seed % 5]
            ref = await owner.put(of_seed(seed, nbytes, far.slab.device), timeout=30.0)
            child.tell("ref", "get" if seed % 2 else "borrow", seed, ref.to_bytes())
        on_gpu = count if far.device.type == "cuda" else 0
        if far.where != "cpu" and far.slab.kind == "host":
            on_gpu = count // 2  # a view of a host slab is in host memory
        assert await child.ask("end") == ("read", count, 0, on_gpu)
        await all_spent(owner)
        assert owner.statistics().relayed == (count if far.relayed else 0)


async def test_another_process_that_reads_slowly(child: Child, far: Place) -> None:
    """Its kernels read the view long after it left the block: nothing is put there meanwhile."""
    async with far.slab.create(capacity=2 * MIB) as owner:
        await told(child, owner, far)
        for seed in range(8):
            ref = await owner.put(of_seed(seed, 2 * MIB, far.slab.device), timeout=30.0)
            child.tell("ref", "slow", seed, ref.to_bytes())
        assert (await child.ask("end"))[:3] == ("read", 8, 0)
        await all_spent(owner)


@pytest.mark.parametrize("far", place_params("vmm-cuda:0", "vmm-cuda:1"), indirect=True)
async def test_a_slab_that_grows_and_shrinks_under_another_process(
    child: Child, far: Place
) -> None:
    async with far.slab.create(capacity=16 * MIB, idle=0.02) as owner:
        await told(child, owner, far)
        count = 0
        for _ in range(3):
            for _ in range(5):
                ref = await owner.put(of_seed(count, 3 * MIB, far.slab.device), timeout=30.0)
                child.tell("ref", "slow" if count % 5 == 4 else "get", count, ref.to_bytes())
                count += 1
            assert owner.statistics().committed_bytes > 2 * MIB
            await all_spent(owner)
            await until(lambda: owner.statistics().committed_bytes == 2 * MIB)
        assert await child.ask("end") == ("read", count, 0, count)
        await all_spent(owner)


@pytest.mark.parametrize("far", place_params("vmm-cuda:0", "ipc-cuda:0"), indirect=True)
async def test_another_process_through_host_memory(child: Child, far: Place) -> None:
    async with far.slab.create() as owner:
        await told(child, owner, far, through_host=True)
        for seed in range(6):
            ref = await owner.put(of_seed(seed, 100 * KIB, far.slab.device), timeout=30.0)
            child.tell("ref", "get" if seed % 2 else "slow", seed, ref.to_bytes())
        assert await child.ask("end") == ("read", 6, 0, 6)
        assert owner.statistics().relayed == 6
        await all_spent(owner)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vmm", "ipc"])
@pytest.mark.parametrize("where", ["cuda:0", "cpu"])
async def test_what_is_spilled_from_a_gpu(child: Child, kind: str, where: str) -> None:
    place: Place = place_params(f"{kind}-{where}")[0].values[0]
    settings = place.slab.settings(spill_always=True)
    async with featcache.create(device=place.slab.device, spill="8MiB", settings=settings) as owner:
        await told(child, owner, place)
        for seed in range(6):
            ref = await owner.put(
                of_seed(seed, MIB, place.slab.device), on_full="spill", timeout=30.0
            )
            child.tell("ref", "get", seed, ref.to_bytes())
        answer = await child.ask("end")
        assert answer[:3] == ("read", 6, 0)
        assert (owner.statistics().spilled, owner.statistics().relayed) == (6, 0)
        await all_spent(owner)
    assert torch.cuda.is_available()


async def test_two_named_readers_in_other_processes(start: Start) -> None:
    names = ["tp0", "tp1"]
    async with featcache.create(settings=small(capacity=4 * MIB)) as owner:
        readers = [start(named_reader, owner.endpoint, name) for name in names]
        for reader in readers:
            await reader.expect("ready")
        assert owner.statistics().sessions == 2
        nbytes = 300 * KIB
        for turn in range(30):  # the slab holds 13 of them: later ones must wait
            ref = await owner.put(filled(nbytes, turn), readers=names)
            for reader, how in zip(readers, ("get", "borrow"), strict=True):
                reader.tell(how, ref.to_bytes())
        for turn in range(30):
            for reader in readers:
                await reader.expect(turn * nbytes)
        await spent(owner)
        assert owner.statistics().reads_paid == 60
        for reader in readers:
            reader.tell("leave")
            assert await reader.ends() == 0
        await until(lambda: owner.statistics().sessions == 0)
        assert owner.statistics().readers_lost == 0


async def test_a_reader_that_writes_to_its_view_harms_itself_only(start: Start) -> None:
    async with featcache.create(settings=small()) as owner:
        ref = await owner.put(filled(KIB, 4), readers=2, ttl=None)
        writer = start(view_writer, owner.endpoint, ref.to_bytes())
        assert await writer.ends() == -signal.SIGSEGV
        await until(lambda: owner.statistics().readers_lost == 1)
        assert torch.equal(tensor(await owner.get(ref)), filled(KIB, 4))
        await spent(owner)  # its read was begun, so it was paid for it
        await owner.get(await full(owner))
