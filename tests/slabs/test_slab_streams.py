"""Slabs among the streams of a real GPU: bytes come late, reads are paid late, and nothing is mixed up.

A stream is kept busy for a fifth of a second or so, while the CPU, which waits for nothing, is done in
a few milliseconds. What must not be so yet is asked for as long as an event says that it can't be.
"""

import asyncio
from collections.abc import Callable

import pytest
import torch

import featcache
from featcache import GetTimeout, PoolFull, StaleRef
from support.caches import MIB, filled, spent, tensor
from support.slabs import (
    HOME,
    OTHER,
    Slab,
    busy,
    copy_of,
    full_of,
    landed,
    mark,
    on_gpu,
    primed,
    same,
    stream_on,
    ticking,
    until_past,
)

pytestmark = pytest.mark.gpu

FEATURE = 2 * MIB
"""All that a slab of these tests holds."""


def second_gpu() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU: torch sees one here")
    return OTHER


def waiting(task: "asyncio.Task[object]") -> Callable[[], bool]:
    return lambda: not task.done()


# --- putting -------------------------------------------------------------------------------------


async def test_a_source_that_its_stream_has_yet_to_make(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    """Nobody synchronises; what the stream does to the source afterwards is not seen."""
    async with primed(slab) as (owner, client):
        with torch.cuda.stream(side):
            source = full_of(1, FEATURE)
            made = busy()
            source.fill_(7)
            ref = await owner.put(source)
            assert slab.kind == "host" or not made.query(), "the put waited"
            source.fill_(9)
        assert same(await client.get(copy_of(ref)), filled(FEATURE, 7))
        assert made.query()
        await spent(owner)


async def test_a_strided_source_that_its_stream_has_yet_to_make(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    async with primed(slab) as (owner, client):
        with torch.cuda.stream(side):
            source = torch.zeros(100, 300, device=HOME)
            busy()
            source += torch.arange(300.0, device=HOME)
            ref = await owner.put({"t": source.T, "host": torch.ones(3)})
            source.zero_()
        found = await client.get(ref)
        assert isinstance(found, dict)
        assert same(found["t"], torch.arange(300.0).expand(100, 300).T)
        assert same(found["host"], torch.ones(3))
        await spent(owner)


async def test_a_source_on_another_gpu(slab: Slab) -> None:
    other = second_gpu()
    async with primed(slab) as (owner, client):
        with torch.cuda.stream(stream_on(other)):
            source = full_of(1, FEATURE, other)
            busy(device=other)
            source.fill_(7)
            ref = await owner.put(source)
            source.fill_(9)
        assert same(await client.get(ref), filled(FEATURE, 7))
        mixed = {"a": full_of(3, 100, other), "b": full_of(4, 100), "c": filled(100, 5)}
        found = await client.get(await owner.put(mixed))
        assert isinstance(found, dict)
        assert all(same(found[name], value) for name, value in mixed.items())
        await spent(owner)


# --- early readers -------------------------------------------------------------------------------


@on_gpu
async def test_an_early_reader_waits_on_the_cpu(slab: Slab, side: torch.cuda.Stream) -> None:
    async with primed(slab) as (owner, client):
        with torch.cuda.stream(side):
            made = busy()
            ref = await owner.put(full_of(5, 1000))
        with pytest.raises(GetTimeout):
            client.get_nowait(ref)
        with pytest.raises(GetTimeout), client.borrow(ref):
            pass
        with pytest.raises(GetTimeout):
            await client.get(ref, timeout=0.005)
        cancelled = asyncio.create_task(client.get(ref))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert not made.query(), "the stream was not busy for long enough to tell"
        found, turns = await ticking(client.get(ref))
        assert made.query()
        assert turns > 20, "the loop was held"
        assert same(found, filled(1000, 5))
        assert cancelled.cancelled()
        await spent(owner)


@on_gpu
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
async def test_an_early_reader_elsewhere(slab: Slab, side: torch.cuda.Stream, device: str) -> None:
    if device == "cuda:1":
        second_gpu()
        if slab.kind == "ipc":
            pytest.skip("a process opens its own legacy handle on no other device")
    async with primed(slab) as (owner, client), featcache.connect(device=device) as far:
        with torch.cuda.stream(side):
            busy()
            ref = await owner.put(full_of(5, 1000), readers=3)
        found, turns = await ticking(far.get(ref))
        assert tensor(found).device == torch.device(device)
        assert turns > 20
        assert same(found, filled(1000, 5))
        copy = await client.get(ref, device=device)
        assert tensor(copy).device == torch.device(device)
        assert same(copy, filled(1000, 5))
        await owner.release(ref)
        await spent(owner)


# --- reading in the order of a stream ------------------------------------------------------------


@on_gpu
async def test_a_get_on_a_side_stream(slab: Slab, side: torch.cuda.Stream) -> None:
    """The copy, its use and its payment are in that stream; the next put waits for all of that."""
    async with primed(slab) as (owner, client):
        for reader in (client, owner):
            ref = await owner.put(full_of(5, FEATURE))
            await landed(owner, ref)
            with torch.cuda.stream(side):
                read = busy()
                copy = tensor(await reader.get(ref))
                used = copy + 1
            assert not read.query(), "the get waited"
            with pytest.raises(PoolFull):
                owner.put_nowait(full_of(8, FEATURE))
            putting = asyncio.create_task(owner.put(full_of(8, FEATURE)))
            await until_past(read, waiting(putting))
            side.synchronize()
            assert same(used, filled(FEATURE, 6))
            assert same(copy, filled(FEATURE, 5))
            assert same(await client.get(await putting), filled(FEATURE, 8))
            await spent(owner)


@on_gpu
async def test_a_borrow_is_paid_in_the_order_of_its_stream(
    slab: Slab, side: torch.cuda.Stream
) -> None:
    """A long kernel, then one that reads the view, then the block is left: all at once for the CPU."""
    async with primed(slab) as (owner, client):
        for reader in (client, owner):
            ref = await owner.put(full_of(5, FEATURE))
            await landed(owner, ref)
            with torch.cuda.stream(side):
                async with reader.borrow(ref) as view:
                    busy()
                    out = tensor(view).clone()
                    read = mark()
            assert tensor(view).numel() == 0
            with pytest.raises(StaleRef, match="paid"):
                await reader.get(ref)
            putting = asyncio.create_task(owner.put(full_of(8, FEATURE)))
            looks = await until_past(
                read,
                waiting(putting),
            )
            assert looks > 0, "the stream was not busy for long enough to tell"
            assert same(out, filled(FEATURE, 5))
            assert same(await client.get(await putting), filled(FEATURE, 8))
            await spent(owner)


@on_gpu
async def test_uses_of_one_ref_on_several_streams(slab: Slab, side: torch.cuda.Stream) -> None:
    """The busy one ends first for the CPU; the read is paid when both streams are done."""
    async with primed(slab) as (owner, client):
        ref = await owner.put(full_of(5, FEATURE))
        outs = []
        async with client.borrow(ref) as quick:
            with torch.cuda.stream(side):
                async with client.borrow(ref) as slow:
                    busy()
                    outs.append(tensor(slow).clone())
                    read = mark()
            outs += [tensor(quick).clone(), tensor(await client.get(ref, device="cpu"))]
            with torch.cuda.stream(stream_on(HOME)):
                outs.append(tensor(await client.get(ref)))
        looks = await until_past(read, lambda: owner.statistics().slots_used == 1)
        assert looks > 0, "the stream was not busy for long enough to tell"
        await client.release(await owner.put(full_of(8, FEATURE)))
        torch.cuda.synchronize(HOME)
        assert all(same(out, filled(FEATURE, 5)) for out in outs)
        await spent(owner)


@on_gpu
async def test_out_on_a_side_stream(slab: Slab, side: torch.cuda.Stream) -> None:
    """What the stream did to `out` before comes before the copy, what it does later after it."""
    async with primed(slab) as (owner, client):
        value = torch.arange(3000.0).view(50, 60)
        for out in (torch.empty(50, 60, device=HOME), torch.empty(60, 50, device=HOME).T):
            ref = await owner.put(value.to(HOME))
            await landed(owner, ref)
            with torch.cuda.stream(side):
                busy(0.1)
                out.fill_(-1)
                await client.get(ref, out=out)
                out.add_(1)
            side.synchronize()
            assert torch.equal(out.cpu(), value + 1)
        await spent(owner)


async def test_out_on_a_side_stream_from_a_host_slab(side: torch.cuda.Stream) -> None:
    async with primed(Slab("host")) as (owner, client):
        out = torch.empty(3000, device=HOME)
        ref = await owner.put(torch.arange(3000.0))
        with torch.cuda.stream(side):
            busy(0.1)
            out.fill_(-1)
            found, turns = await ticking(client.get(ref, out=out))
            out += 1
        assert found is out
        assert turns > 20, "the loop was held"
        side.synchronize()
        assert torch.equal(out.cpu(), torch.arange(3000.0) + 1)
        await spent(owner)


async def test_readers_on_two_gpus(side: torch.cuda.Stream) -> None:
    other = second_gpu()
    async with primed(Slab("vmm")) as (owner, near), featcache.connect(device=other) as far:
        there = stream_on(other)
        for value in range(20):
            with torch.cuda.stream(side):
                ref = await owner.put(full_of(value, FEATURE), readers=3)
            copies = [await near.get(ref)]
            with torch.cuda.stream(there):
                copies.append(await far.get(ref))
                async with owner.borrow(ref) as view:
                    copies.append(tensor(view).clone())
            there.synchronize()
            assert all(same(copy, filled(FEATURE, value)) for copy in copies)
        async with far.borrow(await owner.put(full_of(77, FEATURE))) as view:
            assert tensor(view).device == other
            with torch.cuda.stream(there):
                busy(0.1, other)
                out = tensor(view).clone()
            there.synchronize()
        assert same(out, filled(FEATURE, 77))
        await spent(owner)
