"""The owner's own reads of what its stream has yet to write: in the order of streams, waited for by none."""

import pytest
import torch

import featcache
from featcache import GetTimeout
from support.caches import filled, small, spent, tensor
from support.fakegpu import fake_gpu, segmented

NBYTES = 1000


@pytest.mark.parametrize("stream", ["the same", "another"])
@pytest.mark.parametrize("how", ["get_nowait", "get", "by key"])
async def test_a_read_right_after_the_put(how: str, stream: str) -> None:
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, _):
            for value in (1, 2, 3):
                before = gpu.owner.calls.count("cuStreamWaitEvent")
                gpu.owner.side_stream()
                gpu_value = gpu.tensor(filled(NBYTES, value))
                ref = await owner.put(gpu_value, key="k", readers=1)
                assert owner._opened().pool.words.published[ref.slot] != ref.generation
                if stream == "another":
                    gpu.owner.side_stream()
                if how == "get_nowait":
                    found = owner.get_nowait(ref)
                elif how == "get":
                    found = await owner.get(ref)
                else:
                    found = await owner.get("k")
                    await owner.release(ref)
                assert torch.equal(tensor(found), filled(NBYTES, value))
                waits = gpu.owner.calls.count("cuStreamWaitEvent") - before
                assert waits == (stream == "another")
                await owner.evict("k")
                gpu.run()
            await spent(owner)


@pytest.mark.parametrize("way", ["ref", "key"])
async def test_a_borrow_right_after_the_put(way: str) -> None:
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, _):
            for stream in ("the same", "another"):
                gpu.owner.side_stream()
                ref = await owner.put(gpu.tensor(filled(NBYTES, 7)), key="k", readers=1)
                if stream == "another":
                    gpu.owner.side_stream()
                async with owner.borrow(ref if way == "ref" else "k") as view:
                    gpu.run()  # a kernel on this stream would run now
                    assert torch.equal(tensor(view), filled(NBYTES, 7))
                if way == "ref":
                    second = await owner.put(gpu.tensor(filled(NBYTES, 8)))
                    with owner.borrow(second) as view:
                        gpu.run()
                        assert torch.equal(tensor(view), filled(NBYTES, 8))
                else:
                    await owner.release(ref)
                await owner.evict("k")
                gpu.run()
            await spent(owner)


async def test_others_and_the_cpu_still_wait_for_the_word() -> None:
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, client):
            ref = await owner.put(gpu.tensor(filled(NBYTES, 7)), readers=2)
            await client.put(filled(1))
            for user, device in ((client, None), (owner, "cpu")):
                with pytest.raises(GetTimeout):
                    await user.get(ref, timeout=0, device=device)
                with pytest.raises(GetTimeout):
                    user.get_nowait(ref, device=device)
            gpu.run()
            await client.get(ref, device="cpu")
            await owner.get(ref, device="cpu")


async def test_a_host_slab_has_nothing_to_follow() -> None:
    async with featcache.create(settings=small()) as owner:
        assert torch.equal(tensor(owner.get_nowait(await owner.put(filled(1, 3)))), filled(1, 3))
        assert not owner._opened().pool.own_writes
