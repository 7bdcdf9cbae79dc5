"""Room, and the waits for it, the same on every kind of slab; growth and shrink with readers attached."""

import asyncio
from collections.abc import MutableMapping, Sequence
from typing import Any

import anyio
import pytest
import torch
from structlog.testing import capture_logs

import featcache
from featcache import FeatureTooLarge, PoolFull, PutTimeout
from support.caches import KIB, MIB, filled, spent, tensor, until
from support.hosted import all_spent
from support.slabs import HOME, SEGMENT, Slab, busy, full_of, mark, same, slab_params, stream_on

FULL = 2 * MIB


def there(slab: Slab, nbytes: int, value: int) -> torch.Tensor:
    return full_of(value, nbytes, slab.device)


async def queued(owner: featcache.FeatureCache, count: int) -> None:
    await until(lambda: owner.statistics().waiters == count)


async def test_puts_wait_in_turn_and_releases_wake_them(slab: Slab) -> None:
    async with slab.pair() as (owner, client):
        first = await owner.put(there(slab, FULL, 0))
        with pytest.raises(PoolFull):
            owner.put_nowait(there(slab, 1, 0))
        with pytest.raises(PoolFull):
            await owner.put(there(slab, 1, 0), on_full="raise")
        tasks = []
        for value in range(1, 5):
            tasks.append(asyncio.create_task(owner.put(there(slab, FULL, value))))
            await queued(owner, value)
        now = owner.statistics()
        assert (now.waiting_bytes, now.waited) == (4 * FULL, 4)
        await client.release(first)
        for value, task in enumerate(tasks, 1):
            ref = await task
            if value % 2:
                assert same(await client.get(ref), filled(FULL, value))
            else:
                async with client.borrow(ref) as view:
                    assert same(view, filled(FULL, value))
        await spent(owner)


@pytest.mark.parametrize("how", ["timeout", "task", "scope"])
async def test_giving_up_lets_the_next_by(slab: Slab, how: str) -> None:
    async with slab.pair() as (owner, client):
        half = await owner.put(there(slab, FULL // 2, 1))
        scope = anyio.CancelScope()

        async def large() -> None:
            with scope:
                await owner.put(there(slab, FULL, 2), timeout=0.5 if how == "timeout" else None)

        task = asyncio.create_task(large())
        await queued(owner, 1)
        small = asyncio.create_task(owner.put(there(slab, 100, 3)))
        if how == "task":
            task.cancel()
        elif how == "scope":
            await queued(owner, 2)
            scope.cancel()
        await asyncio.wait([task])
        if how == "timeout":
            assert isinstance(task.exception(), PutTimeout)
        assert same(await client.get(await small), filled(100, 3))
        await client.release(half)
        await client.release(await owner.put(there(slab, FULL, 4)))
        await spent(owner)


@pytest.mark.parametrize("turns", range(0, 8, 2))
async def test_cancelled_after_room_was_made(slab: Slab, turns: int) -> None:
    async with slab.pair(inline_bytes=0) as (owner, client):
        first = await owner.put(filled(FULL))
        tasks = []
        for n in range(3):
            tasks.append(asyncio.create_task(owner.put(filled(FULL, n))))
            await queued(owner, n + 1)
        await client.release(first)
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[0].cancel()
        for n, task in enumerate(tasks):
            await asyncio.wait([task])
            if not task.cancelled():
                assert same(await client.get(await task), filled(FULL, n))
        assert not tasks[1].cancelled()
        await spent(owner)


async def test_a_copy_from_the_host_that_runs_in_a_thread(slab: Slab) -> None:
    """Large enough to leave the loop, both ways."""
    async with slab.pair(capacity=32 * MIB, segment=32 * MIB, inline_bytes=KIB) as (owner, client):
        value = torch.arange(4 << 20, dtype=torch.int32)
        turns, task = 0, asyncio.create_task(owner.put(value, readers=2))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 1
        ref = await task
        copies = await asyncio.gather(*(r.get(ref, device="cpu") for r in (owner, client)))
        assert all(same(copy, value) for copy in copies)
        await all_spent(owner)


# --- growth and shrink ---------------------------------------------------------------------------


def returned(logs: Sequence[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [entry for entry in logs if entry["event"] == "featcache.slab.returned"]


@pytest.mark.parametrize("reads", ["the owner's, on its stream", "a client's, landed"])
async def test_what_was_paid_is_counted_and_not_unpaid_at_close(slab: Slab, reads: str) -> None:
    with capture_logs() as logs:
        async with slab.pair(recycle_interval=60.0) as (owner, client):
            ref = await owner.put(there(slab, FULL, 1))
            if reads == "a client's, landed":
                await client.get(ref)
                if slab.kind != "host":
                    torch.cuda.synchronize(HOME)
                now = owner.statistics()
                assert (now.reads_paid, now.recycled, now.used_bytes) == (1, 1, 0)
            else:
                await owner.get(ref)  # nobody awaits its stream: closing does
            await owner.aclose()
    (closed,) = [entry for entry in logs if entry["event"] == "featcache.pool.closed"]
    assert closed["unpaid_refs"] == 0


async def test_a_full_slab_says_who_holds_it(slab: Slab) -> None:
    async with slab.pair() as (owner, client):
        ref = await owner.put(there(slab, FULL, 1), readers=["ghost"])
        for each in (owner, client):
            for timeout in (0.02, 0):
                with pytest.raises(PutTimeout, match=rf"ghost \(never.*ref {ref.slot}:.*to do: "):
                    await each.put(there(slab, 1, 2), timeout=timeout)


ELASTIC = slab_params("host", "vmm")


@pytest.mark.parametrize("slab", ELASTIC, indirect=True)
async def test_it_grows_and_shrinks_with_readers_attached(slab: Slab) -> None:
    sizes: dict[str, Any] = {"capacity": 16 * MIB, "segment": SEGMENT, "idle": 0.05}
    async with (
        slab.pair(**sizes) as (owner, client),
        featcache.connect(owner.endpoint, device="cpu") as far,
    ):
        assert owner.statistics().committed_bytes == SEGMENT
        for turn in range(3):
            refs = [
                await owner.put(there(slab, 3 * MIB, 10 * turn + n), readers=3) for n in range(5)
            ]
            assert owner.statistics().committed_bytes >= 15 * MIB
            assert any(ref.offset_bytes % SEGMENT for ref in refs), "one lies across borders"
            for n, ref in enumerate(refs):
                expected = filled(3 * MIB, 10 * turn + n)
                for reader in (client, owner, far):
                    assert same(await reader.get(ref), expected)
            with capture_logs() as logs:
                await until(lambda: owner.statistics().committed_bytes == SEGMENT)
                await until(lambda: returned(logs))
            assert all(entry["mapped_in_sessions"] == 0 for entry in returned(logs))
        await all_spent(owner)


@pytest.mark.parametrize("slab", ELASTIC, indirect=True)
async def test_put_nowait_grows_it(slab: Slab) -> None:
    async with slab.pair(capacity=16 * MIB, segment=SEGMENT) as (owner, client):
        refs = [owner.put_nowait(there(slab, 3 * MIB, n)) for n in range(5)]
        with pytest.raises(PoolFull):
            owner.put_nowait(there(slab, 3 * MIB, 9))
        with pytest.raises(FeatureTooLarge):
            owner.put_nowait(there(slab, 16 * MIB + 1, 9))
        for n, ref in enumerate(refs):
            assert same(await client.get(ref), filled(3 * MIB, n))
        await spent(owner)


@pytest.mark.parametrize("slab", slab_params("ipc"), indirect=True)
async def test_the_legacy_backend_has_all_of_it_from_the_start(slab: Slab) -> None:
    async with slab.pair(capacity=16 * MIB, segment=SEGMENT, idle=0.0) as (owner, client):
        assert owner.statistics().committed_bytes == 16 * MIB
        assert same(
            await client.get(await owner.put(there(slab, 16 * MIB, 3))), filled(16 * MIB, 3)
        )
        await spent(owner)
        assert owner.statistics().committed_bytes == 16 * MIB


@pytest.mark.gpu
async def test_the_gpus_memory_is_given_back() -> None:
    async with Slab("vmm").pair(capacity=512 * MIB, segment=64 * MIB, idle=0.05) as (owner, client):
        small = owner.statistics().committed_bytes
        torch.cuda.empty_cache()  # what earlier tests left there would come back in between
        free_before = torch.cuda.mem_get_info(HOME)[0]
        ref = await owner.put(torch.empty(512 * MIB, dtype=torch.uint8, device=HOME))
        torch.cuda.empty_cache()
        assert free_before - torch.cuda.mem_get_info(HOME)[0] >= 400 * MIB
        await client.release(ref)
        await until(lambda: owner.statistics().committed_bytes == small)
        await until(lambda: free_before - torch.cuda.mem_get_info(HOME)[0] < 64 * MIB)


@pytest.mark.gpu
async def test_nothing_shrinks_under_a_stream_that_reads() -> None:
    """Growth and shrink beside reads under way on busy streams; at the end the context is sound."""
    sizes: dict[str, Any] = {"capacity": 16 * MIB, "segment": SEGMENT, "idle": 0.0}
    side = stream_on()
    async with Slab("vmm").pair(**sizes) as (owner, client):
        outs = []
        for value in range(10):
            ref = await owner.put(full_of(value, 15 * MIB))
            with torch.cuda.stream(side):
                async with client.borrow(ref) as view:
                    busy(0.02)
                    outs.append(tensor(view).clone())
                    read = mark()
            assert owner.statistics().committed_bytes >= 15 * MIB or read.query()
            if value % 3 == 0:
                await until(lambda: owner.statistics().committed_bytes == SEGMENT)
        torch.cuda.synchronize(HOME)
        assert all(same(out, filled(15 * MIB, value)) for value, out in enumerate(outs))
        await spent(owner)
