"""`put_many`: many features for little more than one, all of them or none."""

import asyncio
import gc
from typing import Any

import pytest
import torch

import featcache
from api.test_get_many import sent, values
from featcache import (
    CacheClosed,
    FeatcacheError,
    FeatureRef,
    FeatureTooLarge,
    PoolFull,
    PutTimeout,
    SettingsError,
)
from featcache.session.arguments import MAX_MEMBERS
from featcache.session.offload import Offload
from support.caches import KIB, filled, pair, small, spent, tensor, until
from support.keyed import CAPACITY, ONE, nothing_lost, pool_of, queued, reserved
from support.slabs import Place, copy_of, same, same_dict

BASE = torch.arange(720, dtype=torch.float32)


@pytest.fixture(params=["owner", "client"])
def who(request: pytest.FixtureRequest) -> int:
    """Who puts: an index into (owner, client)."""
    return ["owner", "client"].index(request.param)


def some(count: int, nbytes: int = KIB) -> list[torch.Tensor]:
    return [filled(nbytes, n % 256) for n in range(count)]


async def test_what_was_put_together_is_read_by_anybody(place: Place) -> None:
    async with place.open() as (owner, reader):
        device = place.slab.device
        features: list[Any] = [(BASE + n).to(device) for n in range(5)]
        features[2] = {"x": BASE.to(device), "y": BASE.to(device)[:7]}
        for writer in (owner, reader):
            refs = [copy_of(ref) for ref in await writer.put_many(features)]
            for n in (0, 1, 3, 4):
                assert same(await reader.get(refs[n]), BASE + n)
            assert same_dict(await reader.get(refs[2]), {"x": BASE, "y": BASE[:7]})
        host = await reader.put_many([BASE, BASE + 1])
        assert [same(found, BASE + n) for n, found in enumerate(await owner.get_many(host))] == [
            True,
            True,
        ]
        await nothing_lost(owner)


async def test_readers_keys_and_ttl_are_those_of_each(who: int) -> None:
    async with pair(name="rank") as both:
        owner, writer = both[0], both[who]
        names = (name for name in ["rank"])
        refs = await writer.put_many(some(3), readers=names, ttl=3)
        slots = pool_of(owner).store.table.slots
        assert [(slots[ref.slot].owed_by, slots[ref.slot].ttl_s) for ref in refs] == [
            (("rank",), 3.0)
        ] * 3
        assert values(await both[1].get_many(refs)) == [0, 1, 2]
        mixed = await writer.put_many(some(3), keys=["a", None, b"c"])
        assert [slots[ref.slot].owed_by for ref in mixed] == [0, 1, 0]
        assert await writer.contains_many(["a", "b", "c"]) == [True, False, True]
        assert values(await both[1].get_many(["c", "a", mixed[1]])) == [2, 0, 1]
        await nothing_lost(owner)


async def test_a_key_that_stands_twice_has_the_last_feature(who: int) -> None:
    async with pair() as both:
        await both[who].put_many(some(3), keys=["a", "b", "a"])
        assert values(await both[1].get_many(["a", "b"])) == [2, 1]
        await nothing_lost(both[0])


async def test_a_client_asks_once_for_room_and_once_to_publish(monkeypatch: Any) -> None:
    async with pair() as (owner, client):
        await client.release(await client.put(filled(1)))
        frames = sent(monkeypatch)
        refs = await client.put_many(some(16), keys=[f"{n}" for n in range(16)])
        assert len(frames) == 4, "two questions and their answers"
        assert len({ref.slot for ref in refs}) == 16
        assert owner.statistics().keys == 16
        assert client.statistics().puts == 17
        await nothing_lost(owner)


async def test_nothing_is_put_of_nothing(who: int) -> None:
    async with pair() as both:
        assert await both[who].put_many([]) == []


async def test_a_failed_member_says_which_and_nothing_is_put(who: int) -> None:
    async with pair() as both:
        writer = both[who]
        good, large = filled(KIB), filled((1 << 20) + 1)
        cases: list[tuple[list[Any], dict[str, Any], type[FeatcacheError], int | None]] = [
            ([good, "no tensor"], {}, SettingsError, 1),
            ([good, good, large], {}, FeatureTooLarge, 2),
            ([good, good], {"keys": ["a", 3]}, SettingsError, 1),
            ([good, good], {"keys": ["a"]}, SettingsError, None),
            ([good, good], {"readers": 0}, SettingsError, 0),
            ([good, good], {"ttl": 0}, SettingsError, 0),
            ([good, good], {"on_full": "never"}, SettingsError, None),
            ([filled(600 * KIB)] * 2, {}, FeatureTooLarge, None),
            ([good] * 65, {}, FeatureTooLarge, None),
            ([good] * (MAX_MEMBERS + 1), {}, SettingsError, None),
        ]
        for features, how, kind, member in cases:
            with pytest.raises(kind) as caught:
                await writer.put_many(features, **how)
            assert caught.value.member == member
            if member is not None:
                assert f"member {member + 1} of {len(features)}" in str(caught.value)
        no_lists: list[Any] = [good, {"x": good}, "abc", None]
        for each in no_lists:
            with pytest.raises(SettingsError, match="takes a list"):
                await writer.put_many(each)
        now = both[0].statistics()
        assert (now.slots_used, now.used_bytes, reserved(both[0])) == (0, 0, 0)


async def test_all_wait_in_one_place_for_the_room_of_all(who: int) -> None:
    async with pair(**ONE) as both:
        owner = both[0]
        quarter = CAPACITY // 4
        first = [await owner.put(filled(quarter, 9)) for _ in range(4)]
        batch = asyncio.create_task(both[who].put_many(some(3, quarter), timeout=30.0))
        await queued(owner, 1)
        behind = asyncio.create_task(owner.put(filled(quarter, 7)))
        await queued(owner, 2)
        for ref in first[:2]:
            await both[1].release(ref)
        await until(lambda: owner.statistics().used_bytes == 2 * quarter)
        assert owner.statistics().waiters == 2, "neither the batch by halves, nor who is behind it"
        await both[1].release(first[2])
        assert values(await both[1].get_many(await batch)) == [0, 1, 2]
        await both[1].release(first[3])
        await both[1].release(await behind)
        await spent(owner)


async def test_two_batches_that_need_the_whole_slab_do_not_wait_for_each_other() -> None:
    async with pair(**ONE) as (owner, client):
        sizes = [CAPACITY // 8] * 8

        async def one(writer: Any) -> None:
            for _ in range(4):
                refs = await writer.put_many([filled(size) for size in sizes], timeout=30.0)
                await client.get_many(refs)

        await asyncio.gather(one(owner), one(client), one(owner))
        await spent(owner)


async def test_room_is_made_by_eviction_where_it_is_not_in_one_piece(who: int) -> None:
    async with pair(**ONE) as both:
        owner = both[0]
        eighth = CAPACITY // 8
        for n in range(8):
            await owner.put(filled(eighth, n), key=f"{n}")
        for n in (1, 4, 7):
            await owner.pin(f"{n}")
        refs = await both[who].put_many([*some(3, eighth), filled(2 * eighth, 3)], timeout=30.0)
        kept = await owner.contains_many([f"{n}" for n in range(8)])
        assert kept == [False, True, False, False, True, False, False, True]
        assert values(await both[1].get_many(refs)) == [0, 1, 2, 3]
        await nothing_lost(owner)


async def test_the_slab_grows_for_a_batch(who: int) -> None:
    async with pair() as both:
        assert both[0].statistics().committed_bytes == 64 * KIB
        refs = await both[who].put_many(some(15, 40 * KIB), on_full="raise")
        assert values(await both[1].get_many(refs)) == list(range(15))
        await spent(both[0])


async def test_what_does_not_fit_now_is_refused_or_times_out(who: int) -> None:
    async with pair(**ONE) as both:
        ref = await both[0].put(filled(CAPACITY // 2), ttl=None)
        features = some(3, CAPACITY // 4)
        with pytest.raises(PoolFull):
            await both[who].put_many(features, on_full="raise")
        for timeout in (0, 0.01):
            with pytest.raises(PutTimeout):
                await both[who].put_many(features, timeout=timeout)
        assert both[0].statistics().used_bytes == CAPACITY // 2
        await both[1].release(ref)
        await spent(both[0])


@pytest.mark.parametrize("inline", [0, 1 << 20])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_cancelled_call_leaves_nothing(who: int, inline: int, keyed: bool) -> None:
    async with pair(inline_bytes=inline) as both:
        owner = both[0]
        for step in range(16):
            keys = ["a", "b", None] if keyed else None
            task = asyncio.create_task(both[who].put_many(some(3), keys=keys, ttl=None))
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            [found] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(found, list):
                for ref in found:
                    if isinstance(ref, FeatureRef) and not (keyed and ref is not found[2]):
                        await owner.discard(ref)
            await nothing_lost(owner)


async def test_a_cancelled_wait_gives_its_place_to_the_next(who: int) -> None:
    async with pair(**ONE) as both:
        owner = both[0]
        ref = await owner.put(filled(CAPACITY // 2))
        batch = asyncio.create_task(both[who].put_many(some(3, CAPACITY // 4)))
        await queued(owner, 1)
        behind = asyncio.create_task(both[1].put(filled(CAPACITY // 2)))
        await queued(owner, 2)
        batch.cancel()
        await both[1].release(await behind)
        await both[1].release(ref)
        await spent(owner)


async def test_closing_fails_a_batch_that_waits(who: int) -> None:
    async with pair(**ONE) as both:
        await both[0].put(filled(CAPACITY))
        batch = asyncio.create_task(both[who].put_many(some(2)))
        await queued(both[0], 1)
        await both[who].aclose()
        with pytest.raises(CacheClosed):
            await batch


async def test_a_tensor_that_is_gone_by_its_turn_fails_all(who: int) -> None:
    async with pair(**ONE) as both:
        owner = both[0]
        full = await owner.put(filled(CAPACITY))
        features = some(3)
        batch = asyncio.create_task(both[who].put_many(features))
        await queued(owner, 1)
        features[1].untyped_storage().resize_(0)
        await both[1].release(full)
        with pytest.raises(SettingsError, match="member 2 of 3") as caught:
            await batch
        assert caught.value.member == 1
        await spent(owner)


async def test_long_copies_go_to_one_thread(who: int, monkeypatch: Any) -> None:
    async with pair(inline_bytes=KIB) as both:
        await both[1].release(await both[who].put(filled(1)))
        runs: list[object] = []
        run = Offload.run

        async def counted(self: Offload, work: Any, on_abandoned: Any = None) -> Any:
            runs.append(work)
            return await run(self, work, on_abandoned)

        monkeypatch.setattr(Offload, "run", counted)
        refs = await both[who].put_many([filled(KIB + n % 2, n) for n in range(6)])
        assert len(runs) == 1
        monkeypatch.undo()
        assert values(await both[1].get_many(refs)) == list(range(6))
        await spent(both[0])


async def test_all_spill_or_none() -> None:
    settings = small(**ONE)
    async with (
        featcache.create(settings=settings, spill="1MiB") as owner,
        featcache.connect(owner.endpoint, settings=settings) as client,
    ):
        for writer in (owner, client):
            ref = await owner.put(filled(CAPACITY // 2))
            refs = await writer.put_many(some(3, CAPACITY // 4), on_full="spill")
            assert {each.pool_id for each in refs}.isdisjoint({ref.pool_id})
            assert values(await client.get_many([*refs, ref])) == [0, 1, 2, 0]
            await spent(owner)
            with pytest.raises(SettingsError, match="does not spill"):
                await writer.put_many(some(1), keys=["a"], on_full="spill")
        assert (owner.statistics().spilled, client.statistics().spilled) == (3, 3)


async def test_as_many_as_there_may_be(who: int) -> None:
    async with pair(slots=2048, capacity=1 << 22) as both:
        names = [f"{n:04}" * 200 for n in range(MAX_MEMBERS)]  # longer than a message takes
        await both[who].put_many(some(MAX_MEMBERS, 1), keys=names)
        expected = [n % 256 for n in range(MAX_MEMBERS)]
        assert values(await both[1].get_many(names)) == expected
        refs = await both[who].put_many(some(MAX_MEMBERS, 1))
        assert values(await both[1].get_many(refs)) == expected
        gc.collect()
        assert tensor(await both[0].get(names[7])).numel() == 1
        await nothing_lost(both[0])
