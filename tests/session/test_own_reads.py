"""The owner reads what it put itself in the order of its streams: nothing waits on the host."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import torch

from featcache import BackendUnavailable, FeatureCache, FeatureClient, FeatureRef, GetTimeout
from support.caches import KIB, filled, spent, tensor, until
from support.fakegpu import FakeGpu, fake_gpu, segmented

Opened = tuple[FakeGpu, FeatureCache, FeatureClient]
WAITS = ("cuEventRecord", "cuStreamWaitEvent")


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


async def test_on_the_stream_of_the_put_nothing_waits(opened: Opened) -> None:
    gpu, owner, _ = opened
    for value in range(3):
        ref = await owner.put(gpu.tensor(filled(KIB, value)))
        assert not is_there(owner, ref)
        gpu.owner.calls.clear()
        assert torch.equal(tensor(owner.get_nowait(ref)), filled(KIB, value))
        assert not set(WAITS) & set(gpu.owner.calls)


async def test_another_stream_waits_by_an_event(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 4)))
    gpu.owner.side_stream()
    gpu.owner.calls.clear()
    assert torch.equal(tensor(owner.get_nowait(ref)), filled(KIB, 4))
    assert [call for call in gpu.owner.calls if call in WAITS] == list(WAITS)
    assert "cuStreamSynchronize" not in gpu.owner.calls


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


async def test_what_is_seen_in_a_borrow_is_what_was_put(opened: Opened) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 6)))
    async with owner.borrow(ref) as view:
        gpu.run()  # as a kernel on this stream would come after it
        assert torch.equal(tensor(view), filled(KIB, 6))


@pytest.mark.parametrize("side", [False, True])
async def test_gets_and_borrows_that_are_awaited(opened: Opened, side: bool) -> None:
    gpu, owner, _ = opened
    refs = [await owner.put(gpu.tensor(filled(KIB, value))) for value in range(2)]
    if side:
        gpu.owner.side_stream()
    async with owner.borrow(refs[1]):
        assert not is_there(owner, refs[1])
    assert torch.equal(tensor(await owner.get(refs[0])), filled(KIB, 0))


@pytest.mark.parametrize("side", [False, True])
async def test_by_key(opened: Opened, side: bool) -> None:
    gpu, owner, _ = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 7)), key="k")
    if side:
        gpu.owner.side_stream()
    async with owner.borrow("k"):
        assert not is_there(owner, ref)
    assert torch.equal(tensor(await owner.get("k")), filled(KIB, 7))
    await owner.evict("k")


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


async def test_others_wait_for_the_word(opened: Opened) -> None:
    gpu, owner, client = opened
    ref = await owner.put(gpu.tensor(filled(KIB, 9)))
    await client.release(await owner.put(filled(1)))  # it is attached
    with pytest.raises(GetTimeout):
        client.get_nowait(ref, device="cpu")
    with pytest.raises(GetTimeout), client.borrow(ref):
        pass
    gpu.run()
    assert torch.equal(tensor(client.get_nowait(ref, device="cpu")), filled(KIB, 9))


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


async def test_a_stream_that_torch_did_not_make_may_be_gone(opened: Opened) -> None:
    """A read there is in order; elsewhere it waits for the word, since the stream can't be named."""
    gpu, owner, _ = opened
    foreign = gpu.owner.side_stream()
    gpu.owner.foreign.add(foreign)
    refs = [await owner.put(gpu.tensor(filled(KIB, value))) for value in range(2)]
    assert torch.equal(tensor(owner.get_nowait(refs[0])), filled(KIB, 0))
    other = await owner.put(gpu.tensor(filled(KIB, 3)))
    gpu.owner.side_stream()
    with pytest.raises(GetTimeout):
        owner.get_nowait(other)
    gpu.run()
    for ref in (refs[1], other):
        owner.get_nowait(ref)


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
