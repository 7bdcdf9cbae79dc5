"""The owner of a slab on a real GPU reads its own puts in the order of its streams, and waits for none."""

import pytest
import torch

from featcache import GetTimeout
from support.caches import MIB, filled, spent, tensor
from support.slabs import HOME, Slab, busy, full_of, mark, on_gpu, primed, same, stream_on

pytestmark = pytest.mark.gpu

LARGE = 64 * MIB


@on_gpu
async def test_a_large_put_is_read_at_once_on_its_stream(slab: Slab) -> None:
    async with primed(slab, capacity=2 * LARGE, segment=LARGE, initial=2 * LARGE) as (owner, _):
        for value in range(1, 4):
            ref = owner.put_nowait(full_of(value, LARGE))
            assert same(owner.get_nowait(ref), filled(LARGE, value))
            awaited = await owner.put(full_of(value + 10, LARGE))
            assert same(await owner.get(awaited), filled(LARGE, value + 10))
            await spent(owner)


@on_gpu
async def test_a_read_on_another_stream_waits_on_the_gpu(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    """The put's stream is busy: the call returns before its bytes are there, which are right all the same."""
    async with primed(slab) as (owner, _):
        for how in ("get_nowait", "get", "get by key"):
            with torch.cuda.stream(side):
                made = busy()
                key = "k" if how == "get by key" else None
                ref = await owner.put(full_of(6, MIB), key=key)
                put = mark()
            with torch.cuda.stream(stream_on(HOME)):
                if how == "get_nowait":
                    found = owner.get_nowait(ref)
                else:
                    found = await owner.get(ref if key is None else key)
                assert not made.query(), f"{how} waited on the host"
                assert not put.query()
                copied = mark()
                assert same(found, filled(MIB, 6))  # which waits for this stream
            assert put.query()
            assert copied.query()
            if key is not None:
                await owner.evict(key)
            await spent(owner)


@on_gpu
async def test_a_borrow_on_another_stream_waits_on_the_gpu(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    async with primed(slab) as (owner, _):
        full_of(1, MIB).add(1)  # the first kernel of its kind may hold the host
        for plain in (True, False):
            with torch.cuda.stream(side):
                made = busy()
                ref = await owner.put(full_of(7, MIB))
            with torch.cuda.stream(stream_on(HOME)):
                if plain:
                    with owner.borrow(ref) as view:
                        kept = tensor(view) + 1
                else:
                    async with owner.borrow(ref) as view:
                        kept = tensor(view) + 1
                assert not made.query(), "the borrow waited on the host"
                assert owner.statistics().slots_used == 1, "paid before it was read"
                assert same(kept, filled(MIB, 8))
            await spent(owner)


@on_gpu
async def test_reads_on_many_streams_of_what_is_put_on_one(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    """Each extent is the next put's as soon as its read is done: nothing may overtake."""
    async with primed(slab) as (owner, _):
        streams = [side, *(stream_on(HOME) for _ in range(3))]
        found: list[torch.Tensor] = []
        for value in range(60):
            with torch.cuda.stream(side):
                if value % 10 == 0:
                    busy()
                ref = await owner.put(full_of(value, MIB // 2), timeout=20)
            with torch.cuda.stream(streams[value % len(streams)]):
                found.append(tensor(owner.get_nowait(ref)))
        torch.cuda.synchronize(HOME)
        for value, copy in enumerate(found):
            assert same(copy, filled(MIB // 2, value))
        await spent(owner)


@on_gpu
async def test_a_copy_to_the_host_and_another_sessions_read_wait_for_the_bytes(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    async with primed(slab) as (owner, client):
        with torch.cuda.stream(side):
            made = busy()
            ref = await owner.put(full_of(8, MIB), readers=2)
        with pytest.raises(GetTimeout):
            owner.get_nowait(ref, device="cpu")
        with pytest.raises(GetTimeout):
            client.get_nowait(ref)
        assert not made.query(), "the stream was not busy for long enough to tell"
        assert same(await owner.get(ref, device="cpu"), filled(MIB, 8))
        assert same(await client.get(ref), filled(MIB, 8))
        await spent(owner)
