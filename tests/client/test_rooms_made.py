"""Puts of clients into a full cache: what makes room for the next one is evicted behind the last one."""

import asyncio
from typing import Any

import pytest

from client.test_rooms_ahead import asked, far_end, rooms, server_of, writer_of
from core.books import check_books
from featcache import FeatureCache, FeatureClient, PoolFull
from featcache.control.channel import Channel
from support.caches import KIB, filled, pair, steps, tensor, until
from support.keyed import nothing_lost, page_of, party, pool_of, queued
from support.slabs import same

COUNT = 512
FULL: dict[str, Any] = {
    "capacity": COUNT * KIB,
    "segment": COUNT * KIB,
    "slots": 1024,
    "rooms_idle": 60.0,
}
"""A pool that so many features fill. A session may have two ahead that were evicted for."""
SPARE = 4


async def fill(owner: FeatureCache, client: FeatureClient, first: int = 0) -> None:
    """Fill the pool, and put until the client's puts have evicted, with room made for the next."""
    for number in range(first, first + COUNT):
        await owner.put(filled(KIB, number % 251), key=f"old {number}")
    for number in range(first, first + 8):
        await client.put(filled(KIB, number % 251), key=f"newer {number}")
        await quiet(owner)
    assert owner.statistics().evicted >= 8
    await until(lambda: made(owner))


async def quiet(owner: FeatureCache) -> None:
    """Return when the owner has heard what was put, and its answer has come."""
    await until(lambda: not any(page.posts for page in pool_of(owner).pages.values()))
    await steps(4)


def made(owner: FeatureCache) -> int:
    """How many rooms there are now that were evicted for."""
    ahead = pool_of(owner).ahead
    return sum(ahead._was_made(slot) for slot in pool_of(owner).store.ahead.values())


@pytest.mark.parametrize("keyed", [True, False])
async def test_in_a_full_cache_puts_in_a_row_ask_for_nothing(*, keyed: bool) -> None:
    async with party(2, **FULL) as (owner, (client, other)):
        await fill(owner, client)
        before, evicted = asked(client), owner.statistics().evicted
        for number in range(100):
            value = filled(KIB, number)
            ref = await client.put(value, key=f"{number}" if keyed else None)
            await quiet(owner)
            if not keyed:
                assert same(await other.get(ref), value)
                continue
            assert same(await other.get(f"{number}"), value)
        assert asked(client) - before == (100 if keyed else 0), "the publish of each, no more"
        now = owner.statistics()
        if keyed:
            assert evicted + 100 - SPARE <= now.evicted <= evicted + 100 + SPARE
        assert now.keys >= COUNT - 2 * SPARE
        check_books(pool_of(owner).store.allocator)
        await nothing_lost(owner)


async def test_under_keys_the_next_rooms_come_with_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frame each way for a put, and one more until the second room is there."""
    async with pair(**FULL) as (owner, client):
        await fill(owner, client)
        ends = [far_end(owner), writer_of(client).connection.link._channel]
        frames, send = [0, 0], Channel.send

        def sends(self: Channel, *given: Any) -> None:
            frames[ends.index(self)] += 1
            send(self, *given)

        for number in range(3):
            await client.put(filled(KIB, 1), key=f"first {number}")
            await quiet(owner)
        monkeypatch.setattr(Channel, "send", sends)
        for number in range(20):
            await client.put(filled(KIB, number), key=f"{number}")
            await quiet(owner)
        assert frames[1] == 20
        assert 20 <= frames[0] <= 21
        await nothing_lost(owner)


async def test_puts_of_several_clients_do_not_take_each_others_room() -> None:
    async with party(2, **FULL) as (owner, clients):
        for each in clients:
            await fill(owner, each, first=1000 * clients.index(each))
        before = [asked(client) for client in clients]
        for number in range(60):
            await clients[number % 2].put(filled(KIB, number), key=f"{number}")
            await quiet(owner)
        questions = [asked(client) - was for client, was in zip(clients, before, strict=True)]
        assert max(questions) <= 30 + 2, "the publish of each, and what the first ones asked"
        assert owner.statistics().keys >= COUNT - 2 * SPARE
        await nothing_lost(owner)


async def test_no_more_is_evicted_than_the_puts_would() -> None:
    async with pair(**FULL) as (owner, client):
        await fill(owner, client)
        puts, evicted = client.statistics().puts, owner.statistics().evicted
        for number in range(50):
            nbytes = (KIB, 300, 700, KIB)[number % 4]
            await client.put(filled(nbytes, number), key=f"{number}")
            await quiet(owner)
        assert owner.statistics().evicted - evicted <= client.statistics().puts - puts + SPARE
        await nothing_lost(owner)


async def test_the_owners_puts_evict_for_themselves_and_leave_made_room() -> None:
    async with pair(**FULL) as (owner, client):
        await fill(owner, client)
        there = made(owner)
        assert there
        for number in range(8):
            await owner.put(filled(KIB, number), key=f"{number}")
        assert made(owner) == there
        before = asked(client)
        assert same(await owner.get(await client.put(filled(KIB, 9))), filled(KIB, 9))
        assert asked(client) == before
        await nothing_lost(owner)


async def test_made_room_is_taken_back_where_nothing_else_can_go() -> None:
    async with pair(**FULL) as (owner, client):
        await fill(owner, client)
        assert made(owner)
        for key in list(pool_of(owner).store.directory):
            await owner.pin(key)
        there = rooms(owner)
        refs = [owner.put_nowait(filled(KIB, 1)) for _ in range(there)]
        assert rooms(owner) == 0
        with pytest.raises(PoolFull):
            owner.put_nowait(filled(KIB, 1))
        with pytest.raises(PoolFull):
            await client.put(filled(KIB), on_full="raise")
        for ref in refs:
            await owner.release(ref)
        await nothing_lost(owner)


async def test_none_is_made_while_somebody_waits() -> None:
    async with party(2, **FULL) as (owner, (client, other)):
        await fill(owner, client)
        keys = list(pool_of(owner).store.directory)
        for key in keys:
            await owner.pin(key)
        waiting = asyncio.create_task(other.put(filled(COUNT * KIB // 2, 3)))
        await queued(owner, 1)
        assert rooms(owner) == 0
        await owner.unpin(keys[0])
        server_of(owner)._dispatcher._handlers.more_rooms(1)
        assert rooms(owner) == 0
        for key in keys[1:]:
            await owner.unpin(key)
        assert same(await owner.get(await waiting), filled(COUNT * KIB // 2, 3))
        await nothing_lost(owner)


async def test_what_is_read_is_not_evicted_for_it() -> None:
    async with party(2, **FULL) as (owner, (client, other)):
        await fill(owner, client)
        key = next(iter(pool_of(owner).store.directory))
        async with other.borrow(key) as view:
            kept = tensor(view).clone()
            for number in range(COUNT + 16):
                await client.put(filled(KIB, 250), key=f"{number}")
                await quiet(owner)
            assert same(view, kept)
            assert await other.contains(key)
        await nothing_lost(owner)


async def test_made_room_that_nobody_uses_goes_back() -> None:
    async with pair(**FULL | {"rooms_idle": 0.05}) as (owner, client):
        for number in range(COUNT + 4):
            await client.put(filled(KIB, 1), key=f"{number}")
        await until(lambda: not rooms(owner))
        assert not page_of(owner).ahead
        assert same(await owner.get(await client.put(filled(KIB, 3))), filled(KIB, 3))
        await nothing_lost(owner)
