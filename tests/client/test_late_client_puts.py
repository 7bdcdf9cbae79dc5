"""Puts of clients into a slab on a GPU: a second mapping to write by, and bytes that a stream brings late."""

import asyncio
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

import featcache
from api.test_put_get import BASE
from featcache import (
    BackendUnavailable,
    FeatureClient,
    GetTimeout,
    KeyTimeout,
    OwnerLost,
    PutTimeout,
    StaleRef,
)
from featcache.memory.cuda.backing import IPC
from featcache.memory.cuda.mapping import CudaMapping
from memory.fakecuda import Code
from memory.fakepages import bytes_alive
from support.caches import KIB, MIB, Gate, filled, small, spent, steps, tensor, tensors, until
from support.fakegpu import SEGMENT, FakeGpu, fake_gpu, got, right, segmented, shrunk
from support.fakewriters import (
    has_landed,
    on_client,
    on_client_filled,
    read_only,
    run_client,
    writable,
)
from support.keyed import Cancellable, grants, nothing_lost, pool_of, queued, reserved

HALF = MIB // 2
ALL: dict[str, Any] = {"initial": MIB}
"""A slab that does not grow."""


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


# --- what goes in comes out ----------------------------------------------------------------------


async def test_from_the_host_and_from_its_gpu(no_leaks: None, gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        for where in ("host", 0, 1):
            for value in (BASE, BASE.view(24, 30).T, BASE[5], BASE[:0], BASE[1::3]):
                source = value if where == "host" else on_client(gpu, value, ordinal=int(where))
                ref = await client.put(source, readers=2)
                run_client(gpu)
                for reader in (owner, client):
                    assert torch.equal(await got(reader, ref), value)
        feature = {"here": on_client(gpu, BASE), "there": BASE * 2, "none": torch.empty(0, 3)}
        ref = await client.put(feature)
        run_client(gpu)
        found = tensors(await owner.get(ref, device="cpu"))
        assert torch.equal(found["here"], BASE)
        assert torch.equal(found["there"], BASE * 2)
        await spent(owner)


async def test_it_is_mapped_once_more_to_be_written(gpu: FakeGpu) -> None:
    """What is lent stays read-only; who does not put has no such mapping."""
    async with (
        segmented(gpu) as (owner, client),
        featcache.connect(owner.endpoint, settings=small()),
    ):
        await client.get(await owner.put(filled(KIB)), device="cpu")
        assert (read_only(gpu), writable(gpu)) == (SEGMENT, 0)
        ref = await client.put(filled(KIB, 3))
        assert (read_only(gpu), writable(gpu)) == (SEGMENT, SEGMENT)
        async with client.borrow(ref) as view:
            assert torch.equal(tensor(view), filled(KIB, 3))
            where = tensor(view).data_ptr()
            (region,) = [
                region
                for region in gpu.clients[0].memory.regions.values()
                if region.overlaps(where, 1)
            ]
            assert not any(region.access.values())
        assert bytes_alive() == SEGMENT, "it is the same memory"
        assert (read_only(gpu, 1), writable(gpu, 1)) == (SEGMENT, 0)
        gpu.run()
        await spent(owner)


async def test_a_slab_of_one_fixed_segment(no_leaks: None) -> None:
    with fake_gpu(IPC) as gpu:
        async with segmented(gpu) as (owner, client):
            for number in range(3):
                ref = await client.put(on_client_filled(gpu, MIB, number))
                assert not has_landed(owner, ref)
                run_client(gpu)
                await right(owner, ref, number)
                await spent(owner)


async def test_an_owner_as_a_client_of_itself(gpu: FakeGpu) -> None:
    """Both put in turn, each by its own mapping, and each reads what the other put."""
    async with segmented(gpu) as (owner, client):
        for number in range(6):
            by = client if number % 2 else owner
            source = on_client_filled(gpu, KIB, number) if by is client else filled(KIB, number)
            ref = await by.put(source, readers=2)
            run_client(gpu)
            await right(owner, ref, number)
            await right(client, ref, number)
        await spent(owner)


# --- bytes and words that come late --------------------------------------------------------------


async def test_bytes_are_there_when_the_clients_stream_has_come_to_its_word(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        ref = await client.put(on_client_filled(gpu, KIB, 4), readers=2)
        api = gpu.clients[0]
        for _ in range(2):  # the copy, then the word
            assert not has_landed(owner, ref)
            for reader in (owner, client):
                with pytest.raises(GetTimeout):
                    reader.get_nowait(ref, device="cpu")
                with pytest.raises(GetTimeout):
                    await got(reader, ref, timeout=0.01)
            api.step()
        assert has_landed(owner, ref)
        for reader in (owner, client):
            await right(reader, ref, 4)
        await spent(owner)


async def test_each_put_lands_in_the_order_of_its_own_stream(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        api = gpu.clients[0]
        streams, refs = [], []
        for number in range(3):
            streams.append(api.side_stream())
            refs.append(await client.put(on_client_filled(gpu, KIB, number)))
        waiting = [asyncio.create_task(got(owner, ref)) for ref in refs]
        for number in (2, 0, 1):
            await steps(5)
            assert not waiting[number].done()
            api.run(streams[number])
            assert torch.equal(await waiting[number], filled(KIB, number))
        api.current.clear()
        await spent(owner)


async def test_lookups_wait_for_bytes_that_are_on_their_way(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        early = asyncio.create_task(owner.get("a", device="cpu", timeout=20))
        await steps(3)
        await client.put(on_client_filled(gpu, KIB, 6), key="a")
        for user in (owner, client):
            assert await user.contains("a")
            with pytest.raises(GetTimeout) as caught:
                await user.get("a", device="cpu", timeout=0.01)
            assert not isinstance(caught.value, KeyTimeout)
        late = asyncio.create_task(client.get("a", device="cpu"))
        made = asyncio.create_task(owner.get_or_put("a", lambda: filled(1), device="cpu"))
        await until(lambda: grants(owner) == 3)
        assert not any(task.done() for task in (early, late, made))
        run_client(gpu)
        for task in (early, late, made):
            assert torch.equal(tensor(await task), filled(KIB, 6))
        gpu.run()
        await nothing_lost(owner)


TAKEN_BACK: dict[str, dict[str, Any]] = {
    "discard": {"ttl": None},
    "expire": {"ttl": 0.01},
    "evict": {"key": "a"},
    "replace": {"key": "a"},
}


@pytest.mark.parametrize("how", TAKEN_BACK)
async def test_room_of_bytes_that_have_not_landed_is_nobodys(gpu: FakeGpu, how: str) -> None:
    """Taken back before they came: another gets the room only when they have come."""
    async with segmented(gpu, **ALL) as (owner, client):
        ref = await client.put(on_client_filled(gpu, HALF, 1), **TAKEN_BACK[how])
        if how == "discard":
            await client.discard(ref)
        elif how == "expire":
            await until(lambda: owner.statistics().expired == 1)
        elif how == "evict":
            assert await client.evict("a")
        other = await owner.put(filled(HALF, 2), key="a" if how == "replace" else None, readers=1)
        assert other.offset_bytes != ref.offset_bytes
        with pytest.raises(StaleRef):
            await client.get(ref)
        for putter in (owner, client):
            with pytest.raises(PutTimeout):
                await putter.put(filled(HALF, 3), timeout=0.02)
        waiting = asyncio.create_task(client.put(on_client_filled(gpu, HALF, 3)))
        await queued(owner, 1)
        run_client(gpu)
        third = await waiting
        assert third.offset_bytes == ref.offset_bytes
        run_client(gpu)
        await right(owner, third, 3)
        await right(owner, other, 2)
        await nothing_lost(owner)


async def test_what_has_not_landed_is_not_evicted_in_vain(gpu: FakeGpu) -> None:
    """Evicting it frees nothing yet: a put that needs room waits for one rather than for all of them."""
    assert await kept_beside_a_put(gpu) == 3


async def kept_beside_a_put(gpu: FakeGpu) -> int:
    async with segmented(gpu, **ALL) as (owner, client):
        for number in range(4):
            await client.put(on_client_filled(gpu, MIB // 4, number), key=f"{number}")
        task = asyncio.create_task(owner.put(filled(MIB // 4, 9), readers=1))
        await queued(owner, 1)
        for _ in range(10):
            pool_of(owner).collect()
            await steps(2)
        run_client(gpu)
        await owner.discard(await task)
        kept = owner.statistics().keys
        await nothing_lost(owner)
    return kept


async def test_the_owner_looks_often_while_something_is_on_its_way(gpu: FakeGpu) -> None:
    """With a long interval: the word rings nobody, so the recycler looks by itself."""
    async with segmented(gpu, recycle_interval=60.0) as (owner, client):
        ref = await client.put(on_client_filled(gpu, KIB, 2))
        task = asyncio.create_task(got(owner, ref))
        await steps(5)
        run_client(gpu)
        assert torch.equal(await task, filled(KIB, 2))


# --- puts that fail or are given up --------------------------------------------------------------


async def test_a_put_that_fails_with_some_copies_under_way(no_leaks: None, gpu: FakeGpu) -> None:
    async with segmented(gpu, **ALL) as (owner, client):
        feature = {"a": on_client_filled(gpu, KIB, 1), "b": on_client_filled(gpu, KIB, 2)}
        await owner.discard(await client.put(filled(1)))
        await spent(owner)
        gpu.clients[0].fail("cuMemcpyAsync", 2)
        with pytest.raises(BackendUnavailable):
            await client.put(feature)
        await until(lambda: not reserved(owner))
        assert owner.statistics().slots_used == 1, "one part is on its way"
        with pytest.raises(PutTimeout):
            await client.put(filled(MIB), timeout=0.02)
        run_client(gpu)
        ref = await client.put(on_client_filled(gpu, MIB, 3))
        run_client(gpu)
        await right(owner, ref, 3)
        await nothing_lost(owner)


@pytest.mark.parametrize("call", ["cuMemcpyAsync", "cuStreamWriteValue64"])
async def test_a_call_of_a_put_that_fails_once(gpu: FakeGpu, call: str) -> None:
    async with segmented(gpu, **ALL) as (owner, client):
        await owner.discard(await client.put(filled(1)))
        gpu.clients[0].fail(call, 1)
        with pytest.raises(BackendUnavailable):
            await client.put(on_client_filled(gpu, MIB, 1))
        run_client(gpu)
        await until(lambda: not reserved(owner))
        await spent(owner)
        ref = await client.put(on_client_filled(gpu, MIB, 2))
        run_client(gpu)
        await right(owner, ref, 2)
        await nothing_lost(owner)


async def test_a_client_whose_gpu_breaks(
    no_leaks: None, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel faulted: its put fails, and the owner has the room back."""
    monkeypatch.setattr(
        "featcache.client.connection._SETTLE_S", 0.01
    )  # how long it waits for its streams
    async with segmented(gpu, **ALL) as (owner, client):
        await owner.discard(await client.put(filled(1)))
        await spent(owner)
        (api,) = gpu.clients
        api.lose(at=len(api.calls))
        with pytest.raises(BackendUnavailable):
            await client.put(on_client_filled(gpu, MIB, 1))
        await spent(owner)
        await right(owner, await owner.put(filled(MIB, 3)), 3)
        api._lost_at = None  # so that this process, which lives on, can take it all down
        await client.aclose()
        await right(owner, await owner.put(filled(MIB, 4)), 4)
        await nothing_lost(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_at_any_moment_with_copies_under_way(
    no_leaks: None, gpu: FakeGpu, kind: str
) -> None:
    late = set()
    async with segmented(gpu, **ALL) as (owner, client):
        for turns in range(14):
            source = on_client_filled(gpu, MIB, 1)
            doomed = Cancellable(kind, lambda: client.put(source, ttl=None))  # noqa: B023 - awaited here
            await steps(turns)
            doomed.cancel()
            await doomed.wait()
            assert doomed.error is None
            late.add(doomed.result is not None)
            if doomed.result is not None:
                await owner.discard(doomed.result)
            if gpu.clients[0].streams.in_flight(0, 1 << 62):
                with pytest.raises(PutTimeout):
                    await owner.put(filled(MIB), timeout=0.005)
            run_client(gpu)
            await right(owner, await owner.put(filled(MIB, 2), timeout=20), 2)
            await nothing_lost(owner)
    assert late == {False, True}


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_while_a_thread_copies_from_the_host(
    gpu: FakeGpu, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu, client={"inline_bytes": 0}, **ALL) as (owner, client):
        await owner.discard(await client.put(filled(1)))
        with monkeypatch.context() as patch:
            write = CudaMapping.write
            mapping = mapping_of(client)
            held = gate.wrap(write)
            patch.setattr(
                CudaMapping,
                "write",
                lambda self, *rest: (held if self is mapping else write)(self, *rest),
            )
            doomed = Cancellable(kind, lambda: client.put(filled(MIB, 1)))
            await until(gate.entered.is_set)
            doomed.cancel()
            await doomed.wait()
            with pytest.raises(PutTimeout):
                await owner.put(filled(MIB), timeout=0.01)
            gate.open()
            await right(owner, await owner.put(filled(MIB, 2)), 2)
        await nothing_lost(owner)


def mapping_of(client: FeatureClient) -> object:
    (handle,) = client._opened().registry.connections
    return handle.attachment.mapping


# --- opening for writing -------------------------------------------------------------------------


async def test_many_segments_are_opened_for_writing_at_once(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        refs = [await owner.put(filled(SEGMENT, n)) for n in range(10)]
        across = await client.put(on_client_filled(gpu, 5 * SEGMENT, 7))
        assert writable(gpu) == read_only(gpu) == owner.statistics().committed_bytes
        run_client(gpu)
        await right(owner, across, 7)
        for number, ref in enumerate(refs):
            await right(client, ref, number)
        await spent(owner)


OPENING = ("cuMemAddressReserve", "cuMemMap", "cuMemSetAccess")


async def test_each_call_of_the_opening_fails_in_turn(no_leaks: None, gpu: FakeGpu) -> None:
    """What was mapped so far is taken down, reads go on, and the next put opens it after all."""
    async with segmented(gpu) as (owner, client):
        await owner.put(filled(4 * SEGMENT, 5), key="kept")
        await client.get("kept", device="cpu")
        api = gpu.clients[0]
        before, mapped = dict(api.memory.reserved), read_only(gpu)
        segments = len(owner._opened().pool.slab.segments(0, mapped))
        assert segments > 2
        calls = [(OPENING[0], 1)]
        calls += [(call, nth) for call in OPENING[1:] for nth in range(1, segments + 1)]
        for call, nth in calls:
            api.fail(call, nth, Code.CUDA_ERROR_OPERATING_SYSTEM)
            with pytest.raises(BackendUnavailable, match=call):
                await client.put(filled(KIB), key="new")
            assert api.memory.reserved == before
            assert (writable(gpu), read_only(gpu)) == (0, mapped)
            async with client.borrow("kept") as view:
                assert torch.equal(tensor(view), filled(4 * SEGMENT, 5))
            gpu.run()
            await until(lambda: not reserved(owner))
        ref = await client.put(filled(KIB, 3))
        assert writable(gpu) == read_only(gpu) >= mapped
        await right(owner, ref, 3)
        await nothing_lost(owner)


async def test_an_opening_that_fails_once_fails_all_who_wait_for_it(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        gpu.clients[0].fail("cuMemMap", code=Code.CUDA_ERROR_OUT_OF_MEMORY)
        results = await asyncio.gather(
            *(client.put(filled(KIB)) for _ in range(3)), return_exceptions=True
        )
        assert [isinstance(result, BackendUnavailable) for result in results] == [True] * 3
        await right(owner, await client.put(filled(KIB, 1)), 1)
        await nothing_lost(owner)
        del results


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
async def test_a_later_segment_that_can_not_be_mapped_for_writing(gpu: FakeGpu, call: str) -> None:
    """Neither is it for reading then: this client says so and goes no further."""
    async with segmented(gpu) as (owner, client):
        await right(owner, await client.put(filled(KIB, 1)), 1)
        api = gpu.clients[0]
        api.fail(call, 2, Code.CUDA_ERROR_OPERATING_SYSTEM)  # the first is the mapping for reads
        with pytest.raises(BackendUnavailable):
            await client.put(filled(2 * SEGMENT, 2))
        assert (writable(gpu), read_only(gpu)) == (SEGMENT, SEGMENT)
        await owner.put(filled(KIB), key="there")
        for use in (client.put(filled(1)), client.get("there", device="cpu")):
            with pytest.raises(BackendUnavailable):
                await use
        await until(lambda: not reserved(owner))
        await nothing_lost(owner)


# --- growth and shrinking ------------------------------------------------------------------------


async def test_it_grows_while_a_writer_is_attached(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        await right(owner, await client.put(filled(KIB, 1)), 1)
        refs = [await client.put(on_client_filled(gpu, 3 * SEGMENT, n)) for n in range(4)]
        assert writable(gpu) == read_only(gpu) == owner.statistics().committed_bytes
        run_client(gpu)
        for number, ref in enumerate(refs):
            await right(owner, ref, number)
        await spent(owner)


@pytest.mark.parametrize("source", ["host", "gpu"])
async def test_a_put_waits_for_its_segment(
    gpu: FakeGpu, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its room before the segment is mapped here, and writes only then."""
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        await right(owner, await client.put(filled(KIB, 1)), 1)
        value = filled(2 * SEGMENT, 2)
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        task = asyncio.create_task(client.put(value if source == "host" else on_client(gpu, value)))
        await until(gate.entered.is_set)
        await until(lambda: reserved(owner) == 1)
        await steps(10)
        assert not task.done()
        gate.open()
        ref = await task
        run_client(gpu)
        await right(owner, ref, 2)
        await spent(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_while_it_waits_for_its_segment(
    gpu: FakeGpu, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        await right(owner, await client.put(filled(KIB, 1)), 1)
        monkeypatch.setattr(CudaMapping, "extend", gate.wrap(CudaMapping.extend))
        doomed = Cancellable(kind, lambda: client.put(filled(2 * SEGMENT, 2)))
        await until(gate.entered.is_set)
        await until(lambda: reserved(owner) == 1)
        doomed.cancel()
        await doomed.wait()
        gate.open()
        await nothing_lost(owner)
        await right(owner, await client.put(filled(2 * SEGMENT, 3)), 3)


async def test_it_shrinks_and_grows_while_a_writer_is_attached(gpu: FakeGpu) -> None:
    """Both mappings give the segments back, and get others in their place."""
    async with segmented(gpu) as (owner, client):
        for turn in range(3):
            ref = await client.put(on_client_filled(gpu, MIB, turn))
            assert writable(gpu) == read_only(gpu) == bytes_alive() == MIB
            run_client(gpu)
            await right(client, ref, turn)
            await spent(owner)
            await shrunk(owner)
            await until(lambda: writable(gpu) == read_only(gpu) == SEGMENT)
            await until(lambda: bytes_alive() == SEGMENT)


async def test_a_tail_that_is_being_written_stays(gpu: FakeGpu) -> None:
    """The fake would say if what a stream writes to were unmapped."""
    async with segmented(gpu) as (owner, client):
        ref = await client.put(on_client_filled(gpu, MIB, 1))
        await owner.discard(ref)
        store = pool_of(owner).store
        before, store.size.limits = store.size.limits, attrs.evolve(store.size.limits, idle_s=0.0)
        for _ in range(10):
            pool_of(owner)._tick()
            await steps(2)
        assert owner.statistics().committed_bytes == writable(gpu) == MIB
        run_client(gpu)
        await until(lambda: owner.statistics().committed_bytes == SEGMENT)
        await until(lambda: writable(gpu) == SEGMENT)
        store.size.limits = before
        await spent(owner)


async def test_a_put_into_what_grew_again_waits_until_the_old_is_unmapped(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu) as (owner, client):
        await right(owner, await client.put(filled(MIB, 1)), 1)
        await spent(owner)
        plain, mapping = CudaMapping.cut, mapping_of(client)
        slow = gate.wrap(plain)

        def cut(self: CudaMapping, end_bytes: int) -> None:
            (slow if self is mapping else plain)(self, end_bytes)

        with monkeypatch.context() as patch:
            patch.setattr(CudaMapping, "cut", cut)
            await shrunk(owner)
            await until(gate.entered.is_set)
            task = asyncio.create_task(client.put(filled(MIB, 2)))
            await until(lambda: reserved(owner) == 1)
            await steps(10)
            assert not task.done()
            gate.open()
            await right(owner, await task, 2)
        await spent(owner)


# --- ends ----------------------------------------------------------------------------------------


async def test_a_client_that_leaves_waits_for_what_it_writes(gpu: FakeGpu) -> None:
    async with segmented(gpu) as (owner, client):
        ref = await client.put(on_client_filled(gpu, KIB, 3))
        closing = asyncio.create_task(client.aclose())
        await steps(10)
        assert not closing.done()
        assert owner.statistics().sessions == 1
        run_client(gpu)
        await closing
        await right(owner, ref, 3)
        await spent(owner)


async def test_a_client_that_leaves_while_its_thread_writes(
    no_leaks: None, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with segmented(gpu, client={"inline_bytes": 0}, **ALL) as (owner, client):
        await owner.discard(await client.put(filled(1)))
        write, mapping = CudaMapping.write, mapping_of(client)
        held = gate.wrap(write)

        def gated(self: CudaMapping, *rest: Any) -> None:
            (held if self is mapping else write)(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(CudaMapping, "write", gated)
            putting = Cancellable("native", lambda: client.put(filled(MIB, 1), ttl=None))
            await until(gate.entered.is_set)
            closing = asyncio.create_task(client.aclose())
            behind = asyncio.create_task(owner.put(filled(MIB, 2)))
            await queued(owner, 1)
            await steps(10)
            assert not behind.done()
            gate.open()
            await closing
            await putting.wait()
        await until(lambda: owner.statistics().sessions == 0)
        if owner.statistics().waiters:  # it was published all the same
            (slot,) = pool_of(owner).store.owing.values()
            pool_of(owner).apply(pool_of(owner).store.revoke(slot.index, slot.generation, 0.0))
        await right(owner, await behind, 2)
        putting.error = None
        await nothing_lost(owner)


async def test_an_owner_that_closes_does_not_wait_for_what_clients_write(gpu: FakeGpu) -> None:
    """The memory is there as long as the client has it mapped."""
    assert await closes_beside_a_writer(gpu)


async def closes_beside_a_writer(gpu: FakeGpu) -> bool:
    async with segmented(gpu) as (owner, client):
        await client.put(on_client_filled(gpu, KIB, 3))
        closing = asyncio.create_task(owner.aclose())
        done, _ = await asyncio.wait([closing], timeout=10.0)
        run_client(gpu)
        await closing
        await until(lambda: client.statistics().sessions == 0)
        with pytest.raises(OwnerLost):
            await client.put(filled(1))
    return bool(done)


async def test_a_put_from_the_host_in_the_place_of_one_from_a_gpu_settles(gpu: FakeGpu) -> None:
    """Else the client waits ten seconds, as it closes, for a word of an earlier put."""
    assert await settles_after_both(gpu)


async def settles_after_both(gpu: FakeGpu) -> bool:
    async with segmented(gpu) as (owner, client):
        for source in (on_client_filled(gpu, KIB, 1), filled(KIB, 2)):
            ref = await client.put(source)
            run_client(gpu)
            await owner.release(ref)
            await spent(owner)
        (handle,) = client._opened().registry.connections
        settled = handle.attachment.settled
        handle.attachment._in_flight.clear()
    return settled


async def test_the_owner_goes_while_a_client_copies(
    no_leaks: None, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it copies to stays mapped until the copy is done."""
    gate = Gate()
    async with segmented(gpu, client={"inline_bytes": 0}) as (owner, client):
        await owner.discard(await client.put(filled(1)))
        write, mapping = CudaMapping.write, mapping_of(client)
        held = gate.wrap(write)

        def gated(self: CudaMapping, *rest: Any) -> None:
            (held if self is mapping else write)(self, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(CudaMapping, "write", gated)
            putting = Cancellable("native", lambda: client.put(filled(KIB, 1)))
            await until(gate.entered.is_set)
            closing = asyncio.create_task(owner.aclose())
            await until(lambda: client.statistics().sessions == 0)
            assert writable(gpu) == SEGMENT
            gate.open()
            await closing
            await putting.wait()
        kind, putting.error = type(putting.error), None
        assert kind is OwnerLost
