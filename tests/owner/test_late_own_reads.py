"""Who waits for the bytes of a put that a stream has yet to write, and what a read that does not pays."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import torch

from featcache import BackendUnavailable, FeatureCache, FeatureClient, FeatureRef, GetTimeout
from support.caches import KIB, filled, spent, tensor, until
from support.fakegpu import FakeGpu, fake_gpu, segmented

Opened = tuple[FakeGpu, FeatureCache, FeatureClient]


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Opened]:
    """An owner and a client on a GPU whose streams do their work when a test says so."""
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, client):
            yield gpu, owner, client
            gpu.run()
            await spent(owner)


def is_there(owner: FeatureCache, ref: FeatureRef) -> bool:
    return owner._opened().pool.words.published[ref.slot] == ref.generation


async def test_a_borrow_stands_behind_the_put_and_pays_behind_it(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 5)))
    side = gpu.owner.side_stream()
    with owner.borrow(ref) as view:
        gpu.owner.run(side)  # it can do nothing yet
        assert not is_there(owner, ref)
        assert tensor(view).numel() == KIB
    gpu.owner.run(side)
    assert owner.statistics().slots_used == 1  # not paid: the read is behind the put
    gpu.owner.run()
    assert is_there(owner, ref)
    assert owner.statistics().slots_used == 1  # nor now
    gpu.owner.run(side)
    await spent(owner)


async def test_a_dict_of_tensors_some_of_them_on_the_host(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put({"a": gpu.tensor(filled(KIB, 1)), "b": filled(KIB, 2)})
    gpu.owner.side_stream()
    with owner.borrow(ref) as found:
        assert not is_there(owner, ref)
        gpu.run()
        assert isinstance(found, dict)
        assert torch.equal(found["a"], filled(KIB, 1))
        assert torch.equal(found["b"], filled(KIB, 2))


async def test_a_copy_to_the_host_waits_there(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 8)))
    with pytest.raises(GetTimeout):
        owner.get_nowait(ref, device="cpu")
    waiting = asyncio.ensure_future(owner.get(ref, device="cpu"))
    await asyncio.sleep(0)
    assert not waiting.done()
    gpu.run()
    assert torch.equal(tensor(await waiting), filled(KIB, 8))


async def test_what_a_session_wrote_is_waited_for(opened: Opened) -> None:
    """Also in a slot that the owner put before."""
    gpu, owner, client = opened
    before = await owner.put(gpu.tensor(filled(KIB, 1)))
    owner.get_nowait(before)
    gpu.run()
    await spent(owner)
    await client.release(await client.put(filled(1)))
    gpu.run()
    await spent(owner)
    api = gpu.clients[0]
    ref = await client.put(api.tensor(filled(KIB, 2)))
    assert ref.slot == before.slot
    with pytest.raises(GetTimeout):
        owner.get_nowait(ref)
    with pytest.raises(GetTimeout), owner.borrow(ref):
        pass
    gpu.run()
    await until(lambda: is_there(owner, ref))
    assert torch.equal(tensor(owner.get_nowait(ref)), filled(KIB, 2))


async def test_a_stream_that_torch_did_not_make_is_not_followed(opened: Opened) -> None:
    """It may be gone by now, and its handle be a new stream's, which is in no order with the put."""
    gpu, owner, _ = opened
    gpu.owner.foreign.add(gpu.owner.side_stream())
    ref = await owner.put(gpu.tensor(filled(KIB, 3)))
    with pytest.raises(GetTimeout):
        owner.get_nowait(ref)
    gpu.owner.side_stream()
    with pytest.raises(GetTimeout):
        owner.get_nowait(ref)
    gpu.run()
    assert torch.equal(tensor(owner.get_nowait(ref)), filled(KIB, 3))


async def test_a_driver_that_refuses_the_event_leaves_the_read_owed(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 3)))
    gpu.owner.side_stream()
    reads: list[Callable[[], object]] = [
        lambda: owner.get_nowait(ref),
        lambda: owner.borrow(ref).__enter__(),
    ]
    for read in reads:
        gpu.owner.fail("cuEventRecord")
        with pytest.raises(BackendUnavailable, match="cuEventRecord"):
            read()
    assert torch.equal(tensor(owner.get_nowait(ref)), filled(KIB, 3))


async def test_a_read_of_what_was_taken_back_is_stale(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 3)), readers=2)
    with owner.borrow(ref):
        await owner.discard(ref)
        gpu.run()
        assert owner.statistics().slots_used == 1  # held
