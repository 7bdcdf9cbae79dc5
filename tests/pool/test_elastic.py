"""The slab grows as it is needed and gives back what it is not."""

import asyncio
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from featcache import BackendUnavailable, FeatureCache, FeatureTooLarge, PoolFull, SettingsError
from featcache.memory.host.slab import HostSlab
from support.caches import KIB, MIB, Gate, filled, pair, slab_allocated, small, spent, tensor, until

SEGMENT = 64 * KIB


async def recycled(owner: FeatureCache, count: int) -> None:
    await until(lambda: owner.statistics().recycled >= count)


async def committed(owner: FeatureCache, nbytes: int) -> None:
    """Return when the slab has shrunk or grown to this, for the system too."""
    await until(lambda: owner.statistics().committed_bytes == nbytes)
    await until(lambda: slab_allocated() == nbytes)


def names(logs: Any) -> list[str]:
    return [entry["event"] for entry in logs]


@pytest.mark.parametrize("prefault", [True, False])
async def test_segments_are_committed_as_needed_and_given_back(prefault: bool) -> None:
    async with pair(capacity=MIB, segment=SEGMENT, idle=0.05, prefault=prefault) as (owner, client):
        assert owner.statistics().committed_bytes == SEGMENT
        assert slab_allocated() == SEGMENT
        with capture_logs() as logs:
            refs = [await owner.put(filled(SEGMENT, n)) for n in range(1, 11)]
            grown = owner.statistics().committed_bytes
            assert 10 * SEGMENT <= grown <= MIB
            assert slab_allocated() == grown
            for n, ref in enumerate(refs, 1):
                assert torch.equal(tensor(await client.get(ref)), filled(SEGMENT, n))
            await until(lambda: owner.statistics().committed_bytes == SEGMENT)
            await until(lambda: slab_allocated() == SEGMENT)
            await until(lambda: "featcache.slab.returned" in names(logs))
        assert "featcache.slab.committed" in names(logs)
        await until(lambda: client.statistics().committed_bytes == SEGMENT)
        # And it grows again into what it gave back.
        again = await owner.put(filled(MIB, 5))
        assert torch.equal(tensor(await client.get(again)), filled(MIB, 5))
        await spent(owner)


async def test_a_feature_may_lie_across_borders() -> None:
    async with pair(capacity=MIB, segment=SEGMENT) as (owner, client):
        await owner.put(filled(100), ttl=None)
        value = torch.arange(5 * SEGMENT // 4, dtype=torch.int32)
        ref = await owner.put(value)
        assert ref.offset_bytes % SEGMENT != 0
        assert ref.nbytes > SEGMENT
        assert torch.equal(tensor(await client.get(ref)), value)


async def test_the_tail_stays_while_something_is_in_it() -> None:
    async with pair(capacity=MIB, segment=SEGMENT, idle=0.02) as (owner, client):
        early = await owner.put(filled(6 * SEGMENT, 1))
        late = await owner.put(filled(SEGMENT, 2))
        await client.release(early)
        await until(lambda: owner.statistics().used_bytes == SEGMENT)
        committed = owner.statistics().committed_bytes
        for _ in range(10):  # ten looks of the recycler, each counted by what it recycles
            before = owner.statistics().recycled
            await client.release(await owner.put(filled(1)))
            await recycled(owner, before + 1)
        assert owner.statistics().committed_bytes == committed
        assert torch.equal(tensor(await client.get(late)), filled(SEGMENT, 2))
        await until(lambda: owner.statistics().committed_bytes == SEGMENT)


async def test_idle_segments_are_kept_for_a_while() -> None:
    async with pair(capacity=MIB, segment=SEGMENT, idle=3600.0) as (owner, client):
        await client.get(await owner.put(filled(MIB)))
        await spent(owner)
        assert owner.statistics().committed_bytes == MIB


async def test_put_nowait_grows_the_slab_itself() -> None:
    async with pair(capacity=MIB, segment=SEGMENT) as (owner, client):
        refs = [owner.put_nowait(filled(3 * SEGMENT, n)) for n in range(5)]
        assert owner.statistics().committed_bytes >= 15 * SEGMENT
        assert owner.statistics().waited == 0
        with pytest.raises(PoolFull):
            owner.put_nowait(filled(2 * SEGMENT))
        for n, ref in enumerate(refs):
            assert torch.equal(tensor(await client.get(ref)), filled(3 * SEGMENT, n))


async def test_put_nowait_commits_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the loop: a segment of 64 MiB for a feature of 1 KiB takes it 20 ms."""
    added, commit = list[int](), HostSlab.commit

    def spied(slab: HostSlab, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        added.append(stop_bytes - start_bytes)
        commit(slab, start_bytes, stop_bytes, prefault=prefault)

    async with pair(capacity=256 * MIB, segment=64 * MIB, initial=0) as (owner, client):
        monkeypatch.setattr(HostSlab, "commit", spied)
        values = [filled(size, size % 251) for size in (KIB, 3 * MIB, 5 * MIB, MIB)]
        refs = [owner.put_nowait(value) for value in values]
        assert added == [2 * MIB, 2 * MIB, 6 * MIB]
        for ref, value in zip(refs, values, strict=True):
            assert torch.equal(tensor(await client.get(ref)), value)
        waited = await owner.put(filled(11 * MIB))
        assert owner.statistics().committed_bytes == 64 * MIB  # a put that waits grows by segments
        await client.release(waited)
        await spent(owner)


async def test_initial_is_there_from_the_beginning_and_stays() -> None:
    for initial, expected in ((0, 0), (1, SEGMENT), (3 * SEGMENT, 3 * SEGMENT), (MIB, MIB)):
        settings = small(capacity=MIB, segment=SEGMENT, initial=initial, idle=0.0)
        async with featcache.create(settings=settings) as owner:
            assert owner.statistics().committed_bytes == expected
            assert slab_allocated() == expected
            await owner.get(await owner.put(filled(MIB)))
            await committed(owner, expected)


async def test_the_arguments_of_create_win_over_settings() -> None:
    made = featcache.create(
        capacity="2MiB", initial="1MiB", segment="512KiB", idle=5, settings=small()
    )
    async with made as owner:
        assert owner.statistics().capacity_bytes == 2 * MIB
        assert owner.statistics().committed_bytes == MIB


async def test_a_memory_that_is_not_there_at_the_start(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostSlab, "commit", no_memory)
    with pytest.raises(BackendUnavailable, match="no memory"):
        async with featcache.create(settings=small(initial=MIB)):
            pass


def no_memory(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("no memory today")


async def test_a_commit_that_fails_is_a_full_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(capacity=MIB, segment=SEGMENT) as (owner, client):
        first = await owner.put(filled(SEGMENT, 1))
        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(HostSlab, "commit", no_memory)
            with pytest.raises(PoolFull):
                owner.put_nowait(filled(SEGMENT))
            waiting = asyncio.create_task(owner.put(filled(SEGMENT, 2)))
            await until(lambda: owner.statistics().waiters == 1)
            with pytest.raises(PoolFull):
                await owner.put(filled(SEGMENT), on_full="raise")
            await client.release(first)  # room comes back where there is memory
            second = await waiting
        failures = [entry for entry in logs if entry["event"] == "featcache.slab.commit_failed"]
        assert len(failures) == 1
        assert failures[0]["log_level"] == "error"
        assert failures[0]["committed_bytes"] == SEGMENT
        assert failures[0]["wanted_bytes"] >= SEGMENT
        assert "no memory today" in failures[0]["error"]
        assert owner.statistics().committed_bytes == SEGMENT
        # Once the system has memory again the same pool grows: it tries anew by itself.
        assert torch.equal(tensor(await client.get(second)), filled(SEGMENT, 2))
        large = await owner.put(filled(MIB, 3))
        assert torch.equal(tensor(await client.get(large)), filled(MIB, 3))
        await spent(owner)


async def test_a_waiting_put_meets_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(capacity=MIB, segment=SEGMENT) as (owner, _):
        monkeypatch.setattr(HostSlab, "commit", no_memory)
        with capture_logs() as logs, pytest.raises(featcache.PutTimeout):
            await owner.put(filled(2 * SEGMENT), timeout=0.1)
        assert names(logs).count("featcache.slab.commit_failed") == 1
        with pytest.raises(FeatureTooLarge):
            await owner.put(filled(MIB + 1))
        await spent(owner)


async def test_a_put_that_is_cancelled_while_the_slab_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    async with pair(capacity=MIB, segment=SEGMENT) as (owner, client):
        monkeypatch.setattr(HostSlab, "commit", gate.wrap(HostSlab.commit))
        task = asyncio.create_task(owner.put(filled(2 * SEGMENT)))
        await until(gate.entered.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await until(lambda: owner.statistics().committed_bytes > SEGMENT)
        await client.release(await owner.put(filled(MIB)))
        await spent(owner)


async def close_while(owner: FeatureCache, gate: Gate) -> None:
    """Begin to close while a thread stands at the gate; the close may wait for it."""
    closing = asyncio.create_task(owner.aclose())
    await asyncio.sleep(0)
    gate.open()
    await closing


@pytest.mark.parametrize("call", ["commit", "decommit"])
async def test_closing_while_the_slab_changes(
    call: str, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with pair(capacity=MIB, segment=SEGMENT, idle=0.0) as (owner, client):
        if call == "decommit":
            monkeypatch.setattr(HostSlab, call, gate.wrap(HostSlab.decommit))
            await client.release(await owner.put(filled(MIB)))
            await until(gate.entered.is_set)
            await close_while(owner, gate)
        else:
            monkeypatch.setattr(HostSlab, call, gate.wrap(HostSlab.commit))
            task = asyncio.create_task(owner.put(filled(MIB)))
            await until(gate.entered.is_set)
            await close_while(owner, gate)
            with pytest.raises(featcache.CacheClosed):
                await task


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 0},
        {"capacity": "12 parsecs"},
        {"capacity": -1},
        {"capacity": 1 << 60},
        {"capacity": True},
        {"capacity": 1.5},
        {"segment": 0},
        {"segment": "x"},
        {"initial": 2 * MIB},
        {"initial": -1},
        {"idle": -1},
        {"idle": "long"},
    ],
    ids=str,
)
def test_sizes_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(change))):
        featcache.create(**({"capacity": MIB} | change))
