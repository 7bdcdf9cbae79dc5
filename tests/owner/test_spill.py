"""Puts that go to the host slab when the slab is full: their refs are refs like others."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from featcache import (
    CacheClosed,
    FeatureCache,
    FeatureRef,
    FeatureTooLarge,
    OwnerLost,
    PoolFull,
    PutTimeout,
    SettingsError,
    StaleRef,
)
from featcache.owner.served_pool import ServedPool
from support.caches import KIB, MIB, filled, full, small, tensor, tensors, until
from support.hosted import all_spent, serving, spilling, store

CAPACITY = 64 * KIB
ONE: dict[str, Any] = {"capacity": CAPACITY, "segment": CAPACITY}


async def spilled(owner: FeatureCache, nbytes: int = KIB, value: int = 5, **how: Any) -> FeatureRef:
    """Put into the host slab."""
    before = owner.statistics().spilled
    ref = await owner.put(filled(nbytes, value), on_full="spill", **how)
    assert owner.statistics().spilled == before + 1
    assert ref.pool_id == serving(owner).pool.pool_id
    return ref


# --- where a put goes ----------------------------------------------------------------------------


async def test_it_spills_only_what_finds_no_room(no_leaks: None) -> None:
    async with spilling(**ONE) as (owner, client):
        here = await owner.put(filled(CAPACITY, 1), on_full="spill")
        assert owner.statistics().spilled == 0
        there = await spilled(owner, value=2)
        now = owner.statistics()
        assert (now.puts, now.waited, now.used_bytes) == (2, 0, CAPACITY)
        assert (store(owner).puts, store(owner).allocator.used_bytes) == (1, KIB)
        assert here.pool_id != there.pool_id
        assert here.endpoint != there.endpoint
        for ref, value in ((here, 1), (there, 2)):
            assert torch.equal(tensor(await client.get(ref)), filled(ref.nbytes, value))
        await all_spent(owner)
        assert (await owner.put(filled(1), on_full="spill")).pool_id == here.pool_id
        assert owner.statistics().spilled == 1


async def test_what_expires_or_is_discarded_in_the_host_slab_is_counted() -> None:
    async with spilling(**ONE) as (owner, _):
        await owner.put(filled(CAPACITY))
        await owner.discard(await spilled(owner))
        await spilled(owner, ttl=0.001)
        await until(lambda: owner.statistics().expired)
        now = owner.statistics()
        assert (now.puts, now.spilled, now.discarded, now.expired) == (3, 2, 1, 1)


async def test_the_slab_grows_before_anything_spills() -> None:
    async with spilling(capacity=MIB, segment=CAPACITY) as (owner, _):
        for _ in range(16):
            await owner.put(filled(CAPACITY), on_full="spill")
        assert owner.statistics().spilled == 0
        assert owner.statistics().committed_bytes == MIB
        await spilled(owner)


async def test_it_overtakes_nobody_and_waits_behind_nobody() -> None:
    """While others wait for the slab, a put that may spill does so, though there is room for it."""
    async with spilling(**ONE) as (owner, client):
        half = await owner.put(filled(CAPACITY // 2))
        large = asyncio.create_task(owner.put(filled(CAPACITY, 3)))
        await until(lambda: owner.statistics().waiters == 1)
        there = await spilled(owner)
        await client.release(half)
        assert tensor(await client.get(await large))[0] == 3
        await client.release(there)
        await all_spent(owner)


async def test_every_put_that_may_spill_does_if_asked_to() -> None:
    async with spilling(spill_always=True, **ONE) as (owner, client):
        there = await spilled(owner, value=4)
        here = await owner.put(filled(KIB, 5))
        assert here.pool_id != there.pool_id
        for ref, value in ((there, 4), (here, 5)):
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, value))
        await all_spent(owner)


@pytest.mark.parametrize("on_full", ["wait", "raise"])
async def test_nothing_spills_unasked(on_full: Any) -> None:
    async with spilling(**ONE) as (owner, _):
        await full(owner)
        with pytest.raises(PoolFull if on_full == "raise" else PutTimeout):
            await owner.put(filled(1), on_full=on_full, timeout=0.01)
        with pytest.raises(PoolFull):
            owner.put_nowait(filled(1))
        assert owner.statistics().spilled == store(owner).puts == 0


async def test_too_large_for_the_slab_but_not_for_the_host() -> None:
    async with spilling(4 * CAPACITY, **ONE) as (owner, client):
        ref = await spilled(owner, 4 * CAPACITY, 6)
        assert owner.statistics().used_bytes == 0
        assert torch.equal(tensor(await client.get(ref)), filled(4 * CAPACITY, 6))
        with pytest.raises(FeatureTooLarge):
            await owner.put(filled(4 * CAPACITY))
        for on_full in ("spill", "wait"):
            with pytest.raises(FeatureTooLarge):
                await owner.put(filled(4 * CAPACITY + 1), on_full=on_full)
        await all_spent(owner)


async def test_a_host_slab_that_is_the_smaller_one() -> None:
    """What fits the slab and not the host has nowhere to spill to, and says so at once."""
    async with spilling(CAPACITY, capacity=4 * CAPACITY, segment=CAPACITY) as (owner, client):
        with pytest.raises(FeatureTooLarge):
            await owner.put(filled(2 * CAPACITY), on_full="spill")
        await client.get(await owner.put(filled(2 * CAPACITY)))
        await all_spent(owner)


async def test_without_a_host_slab() -> None:
    async with featcache.create(settings=small()) as owner:
        with pytest.raises(SettingsError, match=r"create\(.*spill"):
            await owner.put(filled(1), on_full="spill")
        assert owner.statistics().spilled == 0
        await owner.get(await owner.put(filled(1)))
    with pytest.raises(CacheClosed):
        await owner.put(filled(1), on_full="spill")


@pytest.mark.parametrize("spill", [0, -1, "much", True, 1.5, 1 << 60], ids=repr)
def test_sizes_that_make_no_sense(spill: Any) -> None:
    with pytest.raises(SettingsError, match="spill"):
        featcache.create(spill=spill, settings=small())


async def queued_there(owner: FeatureCache, count: int) -> None:
    await until(lambda: len(store(owner).queue) == count)


# --- a host slab that is full --------------------------------------------------------------------


async def test_a_full_host_slab_is_waited_for_in_turn() -> None:
    async with spilling(CAPACITY, **ONE) as (owner, client):
        await full(owner)
        first = await spilled(owner, CAPACITY, 0)
        tasks = []
        for value in range(1, 6):
            put = owner.put(filled(CAPACITY, value), on_full="spill")
            tasks.append(asyncio.create_task(put))
            await queued_there(owner, value)
        assert owner.statistics().waiters == 0  # they are not in the slab's queue
        tasks[2].cancel()
        with pytest.raises(PutTimeout):
            await owner.put(filled(1), on_full="spill", timeout=0.01)
        assert len(store(owner).queue) == 4
        await client.release(first)
        for value in (1, 2, 4, 5):
            assert tensor(await client.get(await tasks[value - 1]))[0] == value
        assert tasks[2].cancelled()
        assert owner.statistics().spilled == 5
        await until(lambda: store(owner).table.used == 0)


async def test_closing_wakes_who_waits_for_the_host_slab(no_leaks: None) -> None:
    async with spilling(CAPACITY, **ONE) as (owner, _):
        await full(owner)
        await spilled(owner, CAPACITY)
        task = asyncio.create_task(owner.put(filled(1), on_full="spill"))
        await until(lambda: store(owner).queue)
        await owner.aclose()
        with pytest.raises(CacheClosed):
            await task


# --- reading what was spilled --------------------------------------------------------------------


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
async def test_every_way_of_reading(bound: bool, no_leaks: None) -> None:
    feature = {
        "pixel_values": torch.arange(600.0).view(20, 30).T,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    settings = small(spill_always=True, capacity=CAPACITY, segment=CAPACITY)
    async with (
        featcache.create(spill=MIB, settings=settings) as owner,
        featcache.connect(owner.endpoint if bound else None, settings=small()) as client,
    ):
        ref = FeatureRef.from_bytes((await owner.put(feature, on_full="spill")).to_bytes())
        copies = tensors(await client.get(ref))
        assert all(torch.equal(copies[name], value) for name, value in feature.items())
        for reader in (client, owner):
            ref = await spilled(owner, readers=4)
            out = torch.empty(KIB, dtype=torch.uint8)
            async with reader.borrow(ref) as view:
                assert torch.equal(tensor(view), filled(KIB, 5))
                assert await reader.get(ref, out=out) is out
                assert torch.equal(tensor(reader.get_nowait(ref, device="cpu")), out)
            assert tensor(view).numel() == 0
            assert torch.equal(out, filled(KIB, 5))
            with pytest.raises(StaleRef, match="paid"):
                await reader.get(ref)
            await owner.discard(ref)
            await reader.release(await spilled(owner))
        await all_spent(owner)


@pytest.mark.parametrize("who", ["owner", "client", "unbound"])
async def test_discarding_what_was_spilled(who: str) -> None:
    async with spilling(spill_always=True, **ONE) as (owner, client), featcache.connect() as other:
        ref = await spilled(owner, readers=3)
        by: Any = {"owner": owner, "client": client, "unbound": other}[who]
        async with client.borrow(ref) as view:
            await by.discard(ref)
            with pytest.raises(StaleRef):
                await other.get(ref)
            with pytest.raises(StaleRef):
                await by.discard(ref)
            assert torch.equal(tensor(view), filled(KIB, 5))
            assert store(owner).table.used == 1
        await all_spent(owner)


async def test_it_expires_there_too() -> None:
    async with spilling(spill_always=True, **ONE) as (owner, client):
        with capture_logs() as logs:
            ref = await spilled(owner, ttl=0.02)
            await all_spent(owner)
        with pytest.raises(StaleRef):
            await client.get(ref)
        expired = [entry for entry in logs if entry["event"] == "featcache.ref.expired"]
        assert [entry["pool"] for entry in expired] == [ref.pool_id.hex()]


async def test_names_owe_there_too() -> None:
    async with spilling(name="tp0", spill_always=True, **ONE) as (owner, tp0):
        ref = await spilled(owner, readers=["tp0", "tp1"])
        async with featcache.connect(owner.endpoint) as nobody:
            await nobody.get(ref)  # pays nothing that a name owes
        async with featcache.connect(owner.endpoint, name="tp1") as tp1:
            await tp0.get(ref)
            await until(lambda: store(owner).find(ref.slot, ref.generation).owed_by == ("tp1",))
            await tp1.release(ref)
        await all_spent(owner)


async def test_the_owners_own_name_owes_there_too() -> None:
    settings = small(spill_always=True)
    async with featcache.create(name="tp0", spill=MIB, settings=settings) as owner:
        await owner.get(await spilled(owner, readers=["tp0"]))
        await all_spent(owner)


async def test_the_owner_closes(no_leaks: None) -> None:
    async with spilling(spill_always=True, **ONE) as (owner, client):
        ref, later = await spilled(owner), await spilled(owner)
        async with client.borrow(ref) as view:
            await owner.aclose()
            assert torch.equal(tensor(view), filled(KIB, 5))
        await until(lambda: client.statistics().sessions == 0)
        with pytest.raises(OwnerLost):
            await client.get(later)


# --- what is told --------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_the_event(who: str) -> None:
    with capture_logs() as logs:
        async with spilling(log_interval=60.0, **ONE) as (owner, client):
            await full(owner)
            user = owner if who == "owner" else client
            refs = [await user.put(filled(256 * n), on_full="spill") for n in (1, 2, 3)]
            pool_id = owner._opened().pool.name
    (entry,) = [entry for entry in logs if entry["event"] == "featcache.put.spilled"]
    assert entry["pool"] == pool_id
    assert entry["spill_pool"] == refs[0].pool_id.hex()
    assert (entry["nbytes"], entry["unlogged"]) == (256, 0)


async def test_spills_that_are_not_logged_are_counted() -> None:
    with capture_logs() as logs:
        async with spilling(log_interval=0.0, **ONE) as (owner, _):
            await full(owner)
            for _ in range(3):
                await spilled(owner)
    entries = [entry for entry in logs if entry["event"] == "featcache.put.spilled"]
    assert [entry["unlogged"] for entry in entries] == [0, 0, 0]


def test_with_no_loop(no_leaks: None) -> None:
    settings = small(capacity=CAPACITY, segment=CAPACITY)
    with (
        featcache.blocking.create(spill=MIB, settings=settings) as owner,
        featcache.blocking.connect(owner.endpoint, settings=settings) as client,
    ):
        here = owner.put(filled(CAPACITY, 1), on_full="spill")
        there = owner.put(filled(KIB, 2), on_full="spill", readers=2)
        assert owner.statistics().spilled == 1
        with client.borrow(there) as view:
            assert torch.equal(tensor(view), filled(KIB, 2))
        assert torch.equal(tensor(owner.get(there)), filled(KIB, 2))
        assert torch.equal(tensor(client.get(here)), filled(CAPACITY, 1))
        gone = owner.put(filled(2 * CAPACITY), on_full="spill")
        client.discard(gone)
        with pytest.raises(StaleRef):
            client.get(gone)
        owner.put(filled(2 * CAPACITY), on_full="spill")  # and is not paid
        with pytest.raises(PutTimeout):
            owner.put(filled(MIB), on_full="spill", timeout=0.0)


async def test_who_attaches_while_the_host_slab_is_made_is_told_of_it(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """The slab listens before its host slab is there; whoever comes that early waits for both."""
    endpoint = str(runtime_dir / "early.sock")
    made, listening = asyncio.Event(), asyncio.Event()
    open_pool = ServedPool.open

    async def open_late(*arguments: Any) -> ServedPool:
        if listening.is_set():
            await made.wait()
        served = await open_pool(*arguments)
        listening.set()
        return served

    monkeypatch.setattr(ServedPool, "open", open_late)
    owner = featcache.create(endpoint=endpoint, spill=CAPACITY, settings=small(**ONE))
    opening = asyncio.ensure_future(owner.open())
    await listening.wait()
    client = featcache.connect(endpoint, settings=small())
    attaching = asyncio.ensure_future(client.open())
    for _ in range(20):  # turns of the loop, in which it could be greeted too early
        await asyncio.sleep(0)
    made.set()
    await asyncio.gather(opening, attaching)
    async with contextlib.AsyncExitStack() as opened:
        opened.push_async_callback(owner.aclose)
        opened.push_async_callback(client.aclose)
        room = await owner.put(filled(CAPACITY))
        ref = await client.put(filled(KIB, 3), on_full="spill")
        assert ref.pool_id != room.pool_id
