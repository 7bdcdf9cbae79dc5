"""Shares: one looks up a key, and those that are sent the ref read without asking the owner."""

import asyncio
from typing import Any

import pytest
import torch

import featcache
from featcache import (
    FeatureCache,
    FeatureClient,
    FeatureRef,
    KeyNotFound,
    KeyTimeout,
    PoolFull,
    SettingsError,
    StaleRef,
)
from featcache.control.channel import Channel
from support.caches import KIB, filled, pair, small, spent, tensor, until
from support.keyed import CAPACITY, ONE, in_progress, nothing_lost, party, pool_of, sought
from support.slabs import Place, copy_of, same

BASE = torch.arange(720, dtype=torch.float32)


@pytest.fixture(params=["owner", "client"])
def who(request: pytest.FixtureRequest) -> int:
    """Who shares: an index into (owner, client)."""
    return ["owner", "client"].index(request.param)


async def test_a_share_is_read_as_any_ref(place: Place) -> None:
    async with place.open() as (owner, reader):
        await owner.put(BASE.to(place.slab.device), key="a")
        for user in (owner, reader):
            ref = copy_of(await user.share("a", readers=1))
            assert same(await reader.get(ref), BASE)
            with pytest.raises(StaleRef, match="paid by this session"):
                await reader.get(ref)
            lent = await user.share(b"a", readers=1)
            async with reader.borrow(lent) as view:
                assert same(view, BASE)
            await reader.release(await user.share("a", readers=1))
        await nothing_lost(owner)


async def test_ranks_read_a_share_with_no_message(who: int, monkeypatch: Any) -> None:
    async with party(3) as (owner, (scheduler, *ranks)):
        await owner.put({"x": BASE, "y": filled(3)}, key="a")
        ref = copy_of(await (owner, scheduler)[who].share("a", readers=4))

        def never(*_: Any) -> None:
            raise AssertionError("a rank asked the owner")

        with monkeypatch.context() as alone:
            alone.setattr(Channel, "send", never)
            alone.setattr(Channel, "send_next", never)
            with pytest.raises(AssertionError):
                await ranks[0].evict("b")
            await read_by_all(owner, [*ranks, scheduler], ref)
        await nothing_lost(owner)


async def read_by_all(owner: FeatureCache, ranks: list[FeatureClient], ref: FeatureRef) -> None:
    for reader in ranks:
        found = await reader.get(ref)
        assert isinstance(found, dict)
        assert torch.equal(found["x"], BASE)
    async with owner.borrow(ref) as view:
        assert isinstance(view, dict)


async def test_each_share_of_one_feature_owes_its_own_reads(who: int) -> None:
    async with pair(name="rank") as (owner, client):
        await owner.put(BASE, key="a")
        scheduler = (owner, client)[who]
        first, second = [await scheduler.share("a", readers=["rank"]) for _ in range(2)]
        assert (first.slot, first.generation) != (second.slot, second.generation)
        assert first.offset_bytes == second.offset_bytes
        for ref in (second, first):
            assert torch.equal(tensor(await client.get(ref)), BASE)
        await nothing_lost(owner)


async def test_a_shared_feature_stays_whatever_becomes_of_its_key(who: int) -> None:
    async with pair(**ONE) as (owner, client):
        await owner.put(filled(CAPACITY, 1), key="a")
        ref = await (owner, client)[who].share("a", readers=1)
        for kept in (True, False):
            with pytest.raises(PoolFull, match=f"ref {ref.slot}:{ref.generation}"):
                await owner.put(filled(1), on_full="raise")
            assert await owner.evict("a") is kept
        assert torch.equal(tensor(await client.get(ref)), filled(CAPACITY, 1))
        await spent(owner)


async def test_a_share_outlives_the_feature_that_replaces_its_own() -> None:
    async with pair() as (owner, client):
        await owner.put(filled(KIB, 1), key="a")
        old = await client.share("a", readers=1)
        await owner.put(filled(2 * KIB, 2), key="a")
        new = await client.share("a", readers=1)
        assert torch.equal(tensor(await client.get(new)), filled(2 * KIB, 2))
        assert torch.equal(tensor(await client.get(old)), filled(KIB, 1))
        await until(lambda: owner.statistics().used_bytes == 2 * KIB)
        await nothing_lost(owner)


async def test_a_shared_feature_is_kept_and_evictable_once_its_reads_are_paid(who: int) -> None:
    async with pair(**ONE) as (owner, client):
        await owner.put(filled(CAPACITY, 1), key="a")
        await client.release(await (owner, client)[who].share("a", readers=1))
        await until(lambda: owner.statistics().slots_used == 1)
        assert await client.contains("a")
        await client.release(await owner.put(filled(CAPACITY, 2), timeout=10.0))
        assert not await client.contains("a")
        await spent(owner)


@pytest.mark.parametrize("ends", ["discard", "ttl", "leave"])
async def test_a_share_ends_otherwise_and_says_how(who: int, ends: str) -> None:
    async with pair() as (owner, client):
        await owner.put(BASE, key="a")
        scheduler = (owner, client)[who]
        async with featcache.connect(owner.endpoint, name="rank", settings=small()) as rank:
            ttl = 0.01 if ends == "ttl" else None
            ref = await scheduler.share("a", readers=["rank"], ttl=ttl)
            if ends == "discard":
                await scheduler.discard(ref)
            elif ends == "leave":
                await rank.release(ref)
        await until(lambda: owner.statistics().slots_used == 1)
        why = {"discard": "discarded", "ttl": "expired", "leave": "paid"}[ends]
        with pytest.raises(StaleRef, match=why):
            await owner.get(ref)
        assert await client.contains("a")
        await nothing_lost(owner)


async def test_the_ttl_of_a_share_is_the_settings_unless_it_has_its_own(who: int) -> None:
    async with pair(ttl=7.0) as (owner, client):
        await owner.put(BASE, key="a")
        scheduler, slots = (owner, client)[who], pool_of(owner).store.table.slots
        for given, ttl_s in (({}, 7.0), ({"ttl": 3}, 3.0), ({"ttl": None}, None)):
            ref = await scheduler.share("a", readers=1, **given)
            assert slots[ref.slot].ttl_s == ttl_s
            await client.release(ref)
        await nothing_lost(owner)


async def test_a_share_counts_as_a_use_and_a_hit(who: int) -> None:
    async with pair(**ONE) as (owner, client):
        for name in "ab":
            await owner.put(filled(CAPACITY // 2), key=name)
        await client.release(await (owner, client)[who].share("a", readers=1))
        with pytest.raises(KeyNotFound):
            await (owner, client)[who].share("c", readers=1)
        now = owner.statistics()
        assert (now.hits, now.misses, now.puts) == (1, 1, 2)
        await owner.put(filled(CAPACITY // 2), key="c")
        assert [await owner.contains(name) for name in "abc"] == [True, False, True]
        await nothing_lost(owner)


@pytest.mark.parametrize("readers", [0, -1, True, [], ["a", "a"], "ab", None, 1 << 40])
async def test_bad_readers_are_refused(who: int, readers: Any) -> None:
    async with pair() as both:
        await both[0].put(BASE, key="a")
        with pytest.raises(SettingsError, match="readers"):
            await both[who].share("a", readers=readers)
        with pytest.raises(SettingsError, match="ttl"):
            await both[who].share("a", readers=1, ttl=0)
        await nothing_lost(both[0])


async def test_what_is_not_there_is_not_shared_or_waited_for(who: int) -> None:
    async with pair() as both:
        owner, scheduler = both[0], both[who]
        with pytest.raises(KeyNotFound, match="nowhere"):
            await scheduler.share("nowhere", readers=1)
        for timeout in (0, 0.001):
            with pytest.raises(KeyTimeout):
                await scheduler.share("nowhere", readers=1, timeout=timeout)
        waiting = asyncio.create_task(scheduler.share("late", readers=1, timeout=10.0))
        await sought(owner, 1)
        await owner.put(BASE, key="late")
        assert torch.equal(tensor(await both[1].get(await waiting)), BASE)
        await nothing_lost(owner)


async def test_a_cancelled_share_leaves_nothing(who: int) -> None:
    async with pair() as both:
        owner = both[0]
        for step in range(12):
            await owner.put(BASE, key="a")
            task = asyncio.create_task(both[who].share("a", readers=1, ttl=None))
            for _ in range(step):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
            [found] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(found, FeatureRef):
                await owner.discard(found)
            await nothing_lost(owner)


async def fill_slots(owner: FeatureCache, count: int) -> list[FeatureRef]:
    return [await owner.put(filled(1), ttl=None) for _ in range(count)]


async def test_a_full_table_gives_a_share_the_slot_of_what_is_coldest(who: int) -> None:
    async with pair(slots=8) as both:
        owner = both[0]
        for name in "abc":
            await owner.put(filled(KIB), key=name)
        refs = await fill_slots(owner, 5)
        refs.append(await both[who].share("a", readers=1))
        assert [await owner.contains(name) for name in "abc"] == [True, False, True]
        refs.append(await both[who].share("a", readers=1))
        assert [await owner.contains(name) for name in "ac"] == [True, False]
        with pytest.raises(PoolFull, match="slots"):
            await both[who].share("a", readers=1)
        for ref in refs:
            await both[1].release(ref)
        await nothing_lost(owner)


@pytest.mark.parametrize(("policy", "count"), [("lru", 2500), ("sieve", 600)])
async def test_a_share_gets_the_slot_of_what_is_coldest_though_very_many_were_used(
    who: int, policy: str, count: int
) -> None:
    changes: dict[str, Any] = {"slots": count, "capacity": count * KIB, "rooms_ahead": 0}
    changes["eviction"] = policy
    async with pair(**changes) as both:
        owner, client = both
        for number in range(count):
            owner.put_nowait(filled(8), key=b"%d" % number)
        for number in range(count):
            # Not at once: a set of the key table may have no room for one of so many digests.
            assert await client.get(b"%d" % number) is not None
        assert pool_of(owner).store.table.full
        await client.release(await both[who].share("5", readers=1))
        assert owner.statistics().evicted == 1


async def test_a_share_takes_the_slot_of_room_ahead_before_it_evicts(who: int) -> None:
    """What a client has ahead, and has not claimed, is anybody's."""
    async with pair(slots=16, rooms_idle=600.0) as both:
        owner, client = both
        await owner.put(filled(KIB), key="a")
        await owner.put(filled(KIB), key="b")
        for _ in range(3):
            await owner.release(await client.put(filled(KIB)))
        store = pool_of(owner).store

        def settled() -> bool:
            pool_of(owner).collect()
            return bool(store.ahead) and store.table.used == 2 + len(store.ahead)

        await until(settled)
        await fill_slots(owner, len(store.table.free_slots))
        assert store.table.full
        assert store.ahead
        await both[who].share("a", readers=1, ttl=None)
        assert not store.ahead
        assert await owner.contains("b")


async def test_a_share_waits_for_bytes_that_are_on_their_way(who: int) -> None:
    async with pair() as both:
        owner = both[0]
        await owner.put(BASE, key="a")
        pool = pool_of(owner)
        (slot,) = pool.store.table.in_use()
        pool.words.published[slot.index] = 0  # as before a stream's word
        task = asyncio.create_task(both[who].share("a", readers=1))
        if who:
            await until(lambda: in_progress(owner) == 1)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        pool.words.published[slot.index] = slot.generation
        await both[1].release(await task)
        await nothing_lost(owner)


async def test_a_share_of_what_a_dead_writer_left_is_of_nothing(who: int) -> None:
    async with pair() as both:
        owner = both[0]
        await owner.put(BASE, key="a")
        pool = pool_of(owner)
        (slot,) = pool.store.table.in_use()
        pool.words.published[slot.index] = 0
        task = asyncio.create_task(both[who].share("a", readers=1))
        await until(lambda: slot.grants == 1)
        pool.apply(pool.store.fail_write(slot, 0.0))
        with pytest.raises(KeyNotFound):
            await task
        pool.words.published[slot.index] = slot.generation
        await nothing_lost(owner)
