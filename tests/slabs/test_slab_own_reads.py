"""The owner's own reads right after its put on a real GPU: in stream order, no wait by the host."""

import pytest
import torch

from featcache import GetTimeout
from featcache.memory.cuda.driver import _torch_lasts
from support.caches import MIB, filled, spent, tensor
from support.slabs import HOME, Slab, busy, full_of, mark, on_gpu, primed, same, stream_on

pytestmark = pytest.mark.gpu

BIG = 64 * MIB


def reading_stream(which: str, side: torch.cuda.Stream) -> torch.cuda.Stream:
    return side if which == "same" else stream_on(HOME)


@on_gpu
@pytest.mark.parametrize("which", ["same", "other"])
@pytest.mark.parametrize("how", ["get_nowait", "get", "key"])
async def test_a_copy_right_after_the_put(
    slab: Slab, side: torch.cuda.Stream, how: str, which: str
) -> None:
    """The put's stream is busy for a while; nobody but the GPU waits for that."""
    async with primed(slab, capacity=BIG, segment=BIG) as (owner, _):
        reading = reading_stream(which, side)
        for value in (3, 4):
            with torch.cuda.stream(side):
                busy(0.1)
                ref = await owner.put(full_of(value, BIG), key="k", readers=1)
                put = mark()
            with torch.cuda.stream(reading):
                if how == "get_nowait":
                    copy = owner.get_nowait(ref)
                else:
                    copy = await owner.get(ref if how == "get" else "k")
                used = tensor(copy) + 1
            assert not put.query(), "the host waited"
            reading.synchronize()
            assert bool((used == value + 1).all())
            if how == "key":
                await owner.release(ref)
            await owner.evict("k")
            await spent(owner)


@on_gpu
@pytest.mark.parametrize("which", ["same", "other"])
@pytest.mark.parametrize("how", ["with", "async with", "key"])
async def test_a_borrow_right_after_the_put(
    slab: Slab, side: torch.cuda.Stream, how: str, which: str
) -> None:
    async with primed(slab, capacity=BIG, segment=BIG) as (owner, _):
        reading = reading_stream(which, side)
        for value in (3, 4):
            with torch.cuda.stream(side):
                busy(0.1)
                ref = await owner.put(full_of(value, BIG), key="k", readers=1)
                put = mark()
            with torch.cuda.stream(reading):
                if how == "with":
                    with owner.borrow(ref) as view:
                        used = tensor(view) + 1
                else:
                    async with owner.borrow(ref if how == "async with" else "k") as view:
                        used = tensor(view) + 1
            assert not put.query(), "the host waited"
            reading.synchronize()
            assert bool((used == value + 1).all())
            if how == "key":
                await owner.release(ref)
            await owner.evict("k")
            await spent(owner)


@on_gpu
async def test_what_has_no_memory_on_a_gpu(slab: Slab) -> None:
    async with primed(slab) as (owner, client):
        zeros = torch._efficientzerotensor((3, 4), device=HOME)
        for writer in (owner, client):
            ref = await writer.put(zeros)
            assert same(await client.get(ref), torch.zeros(3, 4))
            freed = torch.ones(100, device=HOME)
            freed.untyped_storage().resize_(0)
            with pytest.raises(ValueError, match="0 bytes"):
                await writer.put(freed)
            ref = await owner.put(torch.ones(100, device=HOME))
            with pytest.raises(ValueError, match="0 bytes"):
                await writer.get(ref, out=freed)
            await writer.release(ref)
        await spent(owner)


@on_gpu
async def test_a_stream_that_torch_did_not_make_is_not_followed(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    """It may be gone by the time of the read: the read waits for the bytes, as another session's."""
    foreign = torch.cuda.ExternalStream(stream_on(HOME).cuda_stream, HOME)  # type: ignore[no-untyped-call]
    for stream, lasts in ((torch.cuda.default_stream(HOME), True), (side, True), (foreign, False)):
        with torch.cuda.stream(stream):
            assert _torch_lasts(0) == lasts
    async with primed(slab) as (owner, _):
        with torch.cuda.stream(foreign):
            made = busy()
            ref = await owner.put(full_of(5, MIB))
            with pytest.raises(GetTimeout):
                owner.get_nowait(ref)
            assert not made.query(), "the stream was not busy for long enough to tell"
            found = await owner.get(ref)
            assert made.query()
        assert same(found, filled(MIB, 5))
        await spent(owner)
