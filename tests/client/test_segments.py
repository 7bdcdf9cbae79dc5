"""A slab that is sent in segments: they come before the refs that lie in them, and go in order."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from featcache import FeatureClient, GetTimeout
from featcache.client.connection import PoolConnection
from featcache.memory.cuda.backing import IPC
from featcache.memory.cuda.mapping import CudaMapping
from memory.fakepages import bytes_alive
from support.caches import KIB, MIB, Gate, filled, small, spent, steps, tensor, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu, got, right, segmented, shrunk


@pytest.fixture
def gpu(no_leaks: None) -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


def handle_of(client: FeatureClient) -> PoolConnection:
    (handle,) = client._opened().registry.connections
    return handle


# --- growth --------------------------------------------------------------------------------------


async def test_segments_come_as_they_are_made(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        assert gpu.mapped() == SEGMENT
        await right(client, await owner.put(filled(SEGMENT, 1)), 1)
        await owner.put(filled(KIB))
        across = await owner.put(filled(5 * SEGMENT, 2), readers=2)
        assert across.offset_bytes % SEGMENT
        await right(client, across, 2)
        await right(owner, across, 2)
        assert gpu.mapped() == owner.statistics().committed_bytes >= 6 * SEGMENT
        with client.borrow(owner.put_nowait(filled(3 * SEGMENT, 3))) as view:
            assert torch.equal(tensor(view), filled(3 * SEGMENT, 3))
        gpu.run()


async def test_who_attaches_later_gets_all_there_is(gpu: FakeGpu) -> None:
    """More segments than one message brings."""
    async with segmented(gpu, capacity=40 * SEGMENT) as (owner, client):
        refs = [await owner.put(filled(SEGMENT, n), readers=2) for n in range(40)]
        async with featcache.connect(owner.endpoint, settings=small()) as late:
            assert gpu.mapped(1) == 40 * SEGMENT
            for value, ref in enumerate(refs):
                await right(late, ref, value)
                await right(client, ref, value)
        await spent(owner)


async def test_all_at_once_is_one_segment(gpu: FakeGpu) -> None:
    async with segmented(gpu, initial=MIB) as (owner, client):
        assert [s.size_bytes for s in owner._opened().pool.slab.segments(0, MIB)] == [MIB]
        await right(client, await owner.put(filled(MIB, 4)), 4)


async def test_a_ref_that_comes_before_its_segment_is_mapped(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        early = await owner.put(filled(SEGMENT, 1))
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        late = await owner.put(filled(2 * SEGMENT, 2))
        await until(gate.entered.is_set)
        for use in (client.get_nowait, lambda ref: client.borrow(ref).__enter__()):
            with pytest.raises(GetTimeout):
                use(late)
        with pytest.raises(GetTimeout):
            await got(client, late, timeout=0.02)
        with pytest.raises(GetTimeout):
            async with client.borrow(late, timeout=0.02):
                pass
        tasks = [asyncio.create_task(got(client, late)) for _ in range(2)]
        await steps(5)
        tasks[0].cancel()
        await right(client, early, 1)  # what lies in what is mapped is read meanwhile
        gate.open()
        assert torch.equal(await tasks[1], filled(2 * SEGMENT, 2))
        assert tasks[0].cancelled()
        await spent(owner)


async def test_a_loop_that_waits_for_a_segment_goes_on(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, turns = Gate(), 0
    async with segmented(gpu) as (owner, client):
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        task = asyncio.create_task(got(client, await owner.put(filled(2 * SEGMENT, 2))))
        while turns < 100:
            turns += 1
            await asyncio.sleep(0)
        assert not task.done()
        gate.open()
        await task


# --- shrinking -----------------------------------------------------------------------------------


async def test_segments_go_everywhere(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        for turn in range(3):
            await right(client, await owner.put(filled(MIB, turn)), turn)
            assert gpu.mapped() == bytes_alive() == MIB
            await spent(owner)
            with capture_logs() as logs:
                await shrunk(owner)
                await until(lambda: gpu.mapped() == SEGMENT)
                await until(lambda: logs)
            assert bytes_alive() == SEGMENT
            (entry,) = [e for e in logs if e["event"] == "featcache.slab.returned"]
            assert entry["mapped_in_sessions"] == 0
            assert entry["returned_bytes"] == MIB - SEGMENT
            assert (
                owner._opened().pool.shrink_epoch
                == handle_of(client).attachment.shrink_epoch
                == turn + 1
            )


async def test_what_stays_is_read_while_the_tail_goes(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        kept = await owner.put(filled(KIB, 5))
        await client.release(await owner.put(filled(8 * SEGMENT)))
        async with client.borrow(kept) as view:
            await until(lambda: owner.statistics().slots_used == 1)
            await shrunk(owner)
            await until(lambda: gpu.mapped() == SEGMENT)
            assert torch.equal(tensor(view), filled(KIB, 5))
        gpu.run()
        await spent(owner)


async def test_a_tail_that_a_stream_still_reads_stays(gpu: FakeGpu) -> None:
    """The borrow is left, its stream has not got there: nothing is unmapped (the fake would say)."""
    async with segmented(gpu) as (owner, client):
        ref = await owner.put(filled(MIB, 6))
        async with client.borrow(ref) as view:
            assert torch.equal(tensor(view), filled(MIB, 6))
        before = owner.statistics().recycled
        for _ in range(10):
            await steps(2)
            owner._opened().pool.collect()
        assert owner.statistics().recycled == before
        assert owner.statistics().used_bytes == MIB
        gpu.run()
        await spent(owner)
        await shrunk(owner)
        await until(lambda: gpu.mapped() == SEGMENT)


async def test_a_session_that_has_not_heard_of_it_reads_nothing(gpu: FakeGpu) -> None:
    """It would find in its old memory what was there before: it waits until it has unmapped that."""
    async with segmented(gpu) as (owner, client):
        await right(client, await owner.put(filled(MIB, 1)), 1)
        await spent(owner)
        link, heard = handle_of(client).link, list[Any]()
        take, link._on_slab = link._on_slab, lambda change, fds: heard.append((change, fds))
        await shrunk(owner)
        stays, moves = await owner.put(filled(KIB, 2)), await owner.put(filled(6 * SEGMENT, 3))
        await until(lambda: len(heard) == 2)
        for ref in (stays, moves):
            with pytest.raises(GetTimeout):
                client.get_nowait(ref, device="cpu")
            with pytest.raises(GetTimeout):
                await got(client, ref, timeout=0.01)
        tasks = [asyncio.create_task(got(client, ref)) for ref in (stays, moves)]
        await steps(5)
        assert gpu.mapped() == MIB
        link._on_slab = take
        assert take is not None
        for change, fds in heard:
            take(change, fds)
        assert torch.equal(await tasks[0], filled(KIB, 2))
        assert torch.equal(await tasks[1], filled(6 * SEGMENT, 3))
        await spent(owner)


async def test_the_slab_grows_again_before_a_session_has_unmapped(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        await right(client, await owner.put(filled(MIB, 1)), 1)
        await spent(owner)
        with monkeypatch.context() as patch, capture_logs() as logs:
            plain = CudaMapping.cut
            slow = gate.wrap(plain)
            mapping: object = handle_of(client).attachment.mapping

            def cut(self: CudaMapping, end_bytes: int) -> None:
                (slow if self is mapping else plain)(self, end_bytes)

            patch.setattr(CudaMapping, "cut", cut)
            await shrunk(owner)
            await until(gate.entered.is_set)
            again = await owner.put(filled(MIB, 2))
            task = asyncio.create_task(got(client, again))
            await steps(10)
            assert not task.done()
            assert "featcache.slab.returned" not in [entry["event"] for entry in logs]
            gate.open()
            assert torch.equal(await task, filled(MIB, 2))
            await until(lambda: "featcache.slab.returned" in [entry["event"] for entry in logs])


async def test_a_session_that_does_not_unmap_in_time_is_told_of(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with segmented(gpu, attach_timeout=0.5) as (owner, client):
        await right(client, await owner.put(filled(MIB, 1)), 1)
        await spent(owner)
        heard: list[Any] = []
        link = handle_of(client).link
        link._on_slab = lambda change, fds: heard.append(change)
        with capture_logs() as logs:
            await shrunk(owner)
            await until(lambda: logs)
        assert logs[0]["mapped_in_sessions"] == 1
        assert bytes_alive() == MIB, "what one has mapped is not free"
    assert len(heard) == 1


async def test_closing_while_a_session_has_not_unmapped(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await client.release(await owner.put(filled(MIB, 1)))
        await spent(owner)
        handle_of(client).link._on_slab = lambda change, fds: None
        await shrunk(owner)
        await owner.aclose()  # waits for nobody


async def test_a_read_of_the_owners_that_waits_while_the_slab_shrinks(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await client.release(await owner.put(filled(MIB - SEGMENT)))
        await spent(owner)
        ref = await owner.put(gpu.tensor(filled(KIB, 9)), readers=2)
        tasks = [asyncio.create_task(got(reader, ref)) for reader in (owner, client)]
        await steps(5)
        await shrunk(owner)
        assert not any(task.done() for task in tasks)
        gpu.run()
        async with asyncio.timeout(10):
            for task in tasks:
                assert torch.equal(await task, filled(KIB, 9))
        await spent(owner)


# --- the legacy backend --------------------------------------------------------------------------


async def test_a_slab_of_one_fixed_segment(no_leaks: None) -> None:
    with fake_gpu(IPC) as gpu:
        async with segmented(gpu, idle=0.0) as (owner, client):
            assert owner.statistics().committed_bytes == MIB
            for value in range(3):
                await right(client, await owner.put(filled(MIB, value)), value)
                with client.borrow(await owner.put(filled(KIB, value))) as view:
                    assert torch.equal(tensor(view), filled(KIB, value))
                gpu.run()
                await spent(owner)
            assert owner._opened().pool.shrink_epoch == 0
            assert owner.statistics().committed_bytes == MIB
