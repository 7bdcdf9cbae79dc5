"""First come, first served from the call on; and what the bound on waiters counts."""

import asyncio
import gc

import pytest

from featcache import CacheClosed, FeatureCache, FeatureRef, PoolFull
from featcache.control.turns import turn_of
from support.caches import KIB, MIB, filled, full, pair, steps, until

SIZE = 64 * KIB


def sessions_in_line(owner: FeatureCache) -> list[int]:
    """The sessions of the puts that wait, in the order in which they are served."""
    return [waiter.request.session for waiter in owner._opened().pool.store.queue._queue.values()]


async def test_more_puts_than_a_turn_has_room_for_are_served_in_the_order_of_their_calls() -> None:
    async with pair(capacity=SIZE, segment=SIZE, slots=1024) as (owner, client):
        ref = await full(owner)
        served = list[int]()

        async def put(number: int) -> None:
            mine = await owner.put(filled(SIZE))
            served.append(number)
            await client.release(mine)

        tasks = [asyncio.create_task(put(number)) for number in range(300)]
        await steps(1)
        await client.release(ref)
        await asyncio.gather(*tasks)
        assert served == list(range(300))


async def test_a_put_that_yields_is_not_overtaken() -> None:
    """Each put of a loop that never waits keeps its place, also at the call at which the loop turns."""
    async with pair(capacity=SIZE, segment=SIZE, waiters=1) as (owner, client):
        ref = await full(owner)
        turn_of(asyncio.get_running_loop()).left = 0
        first = asyncio.create_task(owner.put(filled(SIZE)))
        await steps(1)  # it let the loop turn
        second = asyncio.create_task(owner.put(filled(SIZE)))
        await asyncio.wait([second])
        with pytest.raises(PoolFull, match="the bound"):
            await second
        await client.release(ref)
        await first


async def test_a_sessions_put_does_not_overtake_those_of_the_owner_that_wait_for_their_turn() -> (
    None
):
    async with pair(capacity=SIZE, segment=SIZE, slots=1024) as (owner, client):
        await full(owner)
        await until(lambda: owner.statistics().waiters == 0)
        warm = asyncio.create_task(client.put(filled(SIZE)))  # it maps the slab for writing
        await until(lambda: owner.statistics().waiters == 1)
        tasks = [asyncio.create_task(owner.put(filled(SIZE))) for _ in range(500)]
        tasks.append(asyncio.create_task(client.put(filled(SIZE))))
        await until(lambda: owner.statistics().waiters == 502)
        assert sessions_in_line(owner) == [1, *[0] * 500, 1]
        for task in [warm, *tasks]:
            task.cancel()
        await asyncio.gather(warm, *tasks, return_exceptions=True)
        await until(lambda: owner.statistics().waiters == 0)


async def test_a_sessions_put_has_its_place_as_soon_as_it_was_read() -> None:
    """Before the task that waits for it has run: an owner's put of the same turn comes after it."""
    async with pair(capacity=SIZE, segment=SIZE) as (owner, client):
        await full(owner)
        task = asyncio.create_task(client.put(filled(SIZE)))
        while not (line := sessions_in_line(owner)):
            assert not owner._opened().main.server.sessions[1].tasks, (
                "it runs before it has a place"
            )
            await asyncio.sleep(0)
        assert line == [1]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: owner.statistics().waiters == 0)


async def test_a_put_that_may_not_wait_keeps_its_place_while_the_slab_grows() -> None:
    async with pair(capacity=2 * SIZE, segment=SIZE) as (owner, client):
        ref = await owner.put(filled(SIZE))
        first = asyncio.create_task(owner.put(filled(SIZE), on_full="raise"))
        await steps(1)
        second = asyncio.create_task(owner.put(filled(SIZE)))
        await first
        assert not second.done()
        await client.release(ref)
        await second


async def test_puts_that_may_not_wait_share_one_growth_in_order() -> None:
    async with pair(capacity=4 * SIZE, segment=SIZE, waiters=0) as (owner, _):
        await owner.put(filled(SIZE))
        puts = (owner.put(filled(SIZE), on_full="raise") for _ in range(5))
        found = await asyncio.gather(*puts, return_exceptions=True)
        assert [isinstance(each, PoolFull) for each in found] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_who_waits_for_growth_alone_does_not_count_against_the_bound(who: str) -> None:
    async with pair(
        capacity=10 * SIZE, segment=2 * SIZE, initial=2 * SIZE, slots=256, waiters=100
    ) as (owner, client):
        putter = owner if who == "owner" else client
        tasks = [asyncio.create_task(putter.put(filled(SIZE), ttl=None)) for _ in range(110)]
        await until(lambda: sum(task.done() for task in tasks) == 10)
        await until(lambda: owner.statistics().waiters == 100)
        assert [task.done() for task in tasks] == [True] * 10 + [False] * 100
        assert not any(task.exception() for task in tasks[:10])
        with pytest.raises(PoolFull, match="100 puts wait already"):
            await putter.put(filled(SIZE))
        for task in tasks[10:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_slots_that_are_missing_are_no_growth() -> None:
    async with pair(capacity=MIB, segment=SIZE, slots=2, waiters=1) as (owner, _):
        puts = [asyncio.create_task(owner.put(filled(SIZE), ttl=None)) for _ in range(4)]
        await until(lambda: sum(put.done() for put in puts) == 3)
        assert [put.done() for put in puts] == [True, True, False, True]
        assert isinstance(puts[3].exception(), PoolFull)
        puts[2].cancel()
        await asyncio.gather(*puts, return_exceptions=True)


async def test_puts_that_may_not_wait_end_with_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever each was waiting for: its turn, growth, or the first step of its task after its turn."""
    for turns in range(12):
        async with pair(capacity=MIB, segment=SIZE, initial=SIZE, slots=512) as (owner, _):
            puts = [
                asyncio.create_task(owner.put(filled(KIB), on_full="raise", ttl=None))
                for _ in range(400)
            ]
            await steps(turns)
            await owner.aclose()
            found = await asyncio.gather(*puts, return_exceptions=True)
            odd = [each for each in found if not isinstance(each, FeatureRef | CacheClosed)]
            assert not odd
        del puts, found
        gc.collect()
    assert "never retrieved" not in caplog.text
