"""How much is done in one turn of the loop, whatever comes at once; counted, not timed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import featcache
from featcache import CacheClosed, FeatureCache, FeatureClient, FeatureRef
from featcache.control.turns import CALL_UNITS, EVICT_UNITS, LEAST, TURN_UNITS, WAKE_UNITS, turn_of
from featcache.memory.words import Header
from featcache.pool.collector import STEPS_A_UNIT
from featcache.pool.late_puts import A_UNIT
from support.caches import KIB, MIB, filled, pair, steps, until

MANY = 600
ROOM: dict[str, Any] = {"capacity": 2 * MIB, "initial": 2 * MIB, "slots": 1024}
Pair = tuple[FeatureCache, FeatureClient]


class Sampled:
    """A count, looked at in every turn; `most` that it changed by in one."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._last = count()
        self.most = self.turns = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0)
            now = self._count()
            self.most = max(self.most, abs(now - self._last))
            self.turns += now != self._last
            self._last = now


@contextlib.asynccontextmanager
async def sampled(count: Callable[[], int]) -> AsyncIterator[Sampled]:
    """Look at a count in every turn."""
    found = Sampled(count)
    task = asyncio.create_task(found.run())
    await asyncio.sleep(0)
    try:
        yield found
    finally:
        task.cancel()


async def keep(owner: FeatureCache, count: int, nbytes: int = 256) -> None:
    for number in range(count):
        await owner.put(filled(nbytes), key=f"{number}")


# --- what one call or one moment brings about ------------------------------------------------------


async def test_a_put_evicts_in_pieces() -> None:
    async with pair(**ROOM | {"capacity": 256 * KIB, "initial": 256 * KIB}) as (owner, _):
        await keep(owner, 1000)
        async with sampled(lambda: owner.statistics().evicted) as evicted:
            await owner.put(filled(250 * KIB), timeout=20)
        assert owner.statistics().evicted >= 900
        assert evicted.most <= TURN_UNITS // EVICT_UNITS * 2
        assert owner.statistics().waiters == 0


async def test_a_put_that_does_not_wait_for_others_waits_for_its_own_evictions() -> None:
    async with pair(**ROOM | {"capacity": 256 * KIB, "initial": 256 * KIB, "waiters": 0}) as (
        owner,
        _,
    ):
        await keep(owner, 1000)
        await owner.put(filled(250 * KIB), key="large", on_full="raise")
        await keep(owner, 1000)
        owner.put_nowait(filled(200 * KIB), key="at once")


async def test_a_put_looks_for_its_victims_in_pieces() -> None:
    async with pair(**ROOM | {"capacity": 256 * KIB, "initial": 256 * KIB}) as (owner, _):
        await keep(owner, 1000)
        plan = owner._opened().pool.store.evicting
        async with sampled(lambda: plan.steps) as steps_done:
            await owner.put(filled(250 * KIB), timeout=20)
        assert plan.steps >= 900
        # The units of a turn, and what a call and a poll may use though it has none left.
        assert steps_done.most <= (TURN_UNITS + 2 * LEAST) * STEPS_A_UNIT
        assert steps_done.turns > 1


async def test_a_clients_many_cancelled_requests_end_in_pieces() -> None:
    async with pair(capacity=64 * KIB, segment=64 * KIB, slots=1024) as (owner, client):
        await owner.put(filled(64 * KIB), ttl=None)
        tasks = [asyncio.create_task(client.put(filled(16))) for _ in range(MANY)]
        await until(lambda: owner.statistics().waiters == MANY)
        async with sampled(lambda: owner.statistics().waiters) as waiters:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: owner.statistics().waiters == 0)
        assert waiters.most <= TURN_UNITS // WAKE_UNITS


async def test_watermarks_evict_in_pieces() -> None:
    marks = {"evict_above": 0.9, "evict_to": 0.1}
    async with pair(**ROOM | {"capacity": 256 * KIB, "initial": 256 * KIB} | marks) as (owner, _):
        async with sampled(lambda: owner.statistics().evicted) as evicted:
            await keep(owner, 1000)
            await until(lambda: owner.statistics().evicted >= 800)
        assert evicted.most <= TURN_UNITS // EVICT_UNITS * 2


async def test_refs_expire_in_pieces() -> None:
    async with pair(**ROOM) as (owner, _):
        for _ in range(MANY):
            await owner.put(filled(16), ttl=0.2)
        async with sampled(lambda: owner.statistics().expired) as expired:
            await until(lambda: owner.statistics().expired == MANY)
        assert expired.most <= TURN_UNITS
        await until(lambda: owner.statistics().slots_used == 0)


async def test_refs_of_as_many_ttls_expire_too() -> None:
    async with pair(**ROOM) as (owner, _):
        for number in range(MANY):
            await owner.put(filled(16), ttl=0.1 + number * 1e-6)
        await until(lambda: owner.statistics().slots_used == 0)
        assert owner.statistics().expired == MANY


async def test_payments_are_counted_and_slots_recycled_in_pieces() -> None:
    async with pair(**ROOM) as (owner, client):
        refs = [await owner.put(filled(16)) for _ in range(MANY)]
        await client.get(refs[0])
        async with sampled(lambda: owner.statistics().recycled) as recycled:
            for ref in refs[1:]:
                client.get_nowait(ref)
            await until(lambda: owner.statistics().recycled == MANY)
        assert recycled.most <= TURN_UNITS * 2


async def test_a_clients_many_requests_are_handled_in_pieces() -> None:
    async with pair(**ROOM) as (owner, client):
        await keep(owner, MANY)
        async with sampled(lambda: owner.statistics().evicted) as evicted:
            await asyncio.gather(*(client.evict(f"{number}") for number in range(MANY)))
        assert owner.statistics().evicted == MANY
        assert evicted.most <= TURN_UNITS


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_who_waits_for_a_key_is_told_in_pieces(who: str) -> None:
    async with pair(**ROOM) as (owner, client):
        done = list[int]()

        async def get(number: int) -> None:
            await (owner if who == "owner" else client).get("k", timeout=20)
            done.append(number)

        tasks = [asyncio.create_task(get(number)) for number in range(MANY)]
        await until(lambda: owner._opened().pool.store.key_waiters.count == MANY)
        async with sampled(lambda: len(done)) as told:
            await owner.put(filled(16), key="k")
            await asyncio.gather(*tasks)
        assert done == list(range(MANY))
        assert told.most <= TURN_UNITS


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_puts_come_to_wait_and_are_told_of_the_end_in_pieces(who: str) -> None:
    async with pair(capacity=64 * KIB, segment=64 * KIB, slots=1024) as (owner, client):
        await owner.put(filled(64 * KIB), ttl=None)
        putter = owner if who == "owner" else client
        ended = list[int]()

        async def put(number: int) -> None:
            with contextlib.suppress(featcache.FeatcacheError):
                await putter.put(filled(16))
            ended.append(number)

        async with sampled(lambda: owner.statistics().waiters) as waiters:
            tasks = [asyncio.create_task(put(number)) for number in range(MANY)]
            await until(lambda: owner.statistics().waiters == MANY)
        # A turn's units, and the least that a call may serve though the turn has none left.
        assert waiters.most <= TURN_UNITS + LEAST
        async with sampled(lambda: len(ended)) as told:
            await owner.aclose()
            await asyncio.gather(*tasks)
        assert told.most <= TURN_UNITS
        assert sorted(ended) == list(range(MANY))


async def test_a_session_ends_in_pieces() -> None:
    async with pair(**ROOM) as (owner, _):
        await keep(owner, MANY)
        async with featcache.connect(owner.endpoint) as leaving:
            await asyncio.gather(*(leaving.pin(f"{number}") for number in range(MANY)))
            assert owner.statistics().pinned_bytes == MANY * 256
            async with sampled(lambda: owner.statistics().pinned_bytes // 256) as pinned:
                await leaving.aclose()
                await until(lambda: owner.statistics().pinned_bytes == 0)
        assert pinned.most <= TURN_UNITS
        await until(lambda: owner.statistics().sessions == 1)


async def test_a_name_is_free_again_once_its_session_is_settled() -> None:
    async with pair(**ROOM) as (owner, _):
        await keep(owner, MANY)
        for _ in range(3):
            async with featcache.connect(owner.endpoint, name="tp0") as client:
                await asyncio.gather(*(client.pin(f"{number}") for number in range(MANY)))


# --- calls that find everything at hand ------------------------------------------------------------

Call = Callable[[FeatureCache | FeatureClient], Awaitable[object]]


async def _borrow(cache: FeatureCache | FeatureClient) -> None:
    async with cache.borrow("k"):
        pass


async def _discard(cache: FeatureCache | FeatureClient) -> None:
    await cache.discard(await cache.put(filled(16)))


HITS: dict[str, Call] = {
    "get": lambda cache: cache.get("k"),
    "borrow": _borrow,
    "get_or_put": lambda cache: cache.get_or_put("k", lambda: filled(16)),
    "contains": lambda cache: cache.contains("k"),
    "pin": lambda cache: cache.pin("k"),
    "evict": lambda cache: cache.evict("none"),
    "put and discard": _discard,
}


@pytest.mark.parametrize("call", HITS)
async def test_hits_in_a_loop_let_the_loop_turn(call: str) -> None:
    async with pair(**ROOM) as (owner, _):
        await owner.put(filled(16), key="k")
        calls = [0]
        async with sampled(lambda: calls[0]) as made:
            for _ in range(MANY):
                await HITS[call](owner)
                calls[0] += 1
        assert made.most <= TURN_UNITS // CALL_UNITS + 1
        assert made.turns >= MANY * CALL_UNITS // TURN_UNITS - 1


@pytest.mark.parametrize("who", ["owner", "client"])
@pytest.mark.parametrize("how", ["get", "borrow", "release"])
async def test_reads_by_ref_in_a_loop_let_the_loop_turn(who: str, how: str) -> None:
    async with pair(**ROOM) as (owner, client):
        refs = [await owner.put(filled(16)) for _ in range(MANY)]
        reader = owner if who == "owner" else client
        await reader.get(refs[0])
        calls = [0]
        async with sampled(lambda: calls[0]) as made:
            for ref in refs[1:]:
                if how == "borrow":
                    async with reader.borrow(ref):
                        pass
                else:
                    await (reader.get(ref) if how == "get" else reader.release(ref))
                calls[0] += 1
        assert made.most <= TURN_UNITS // CALL_UNITS + 1
        assert made.turns >= MANY * CALL_UNITS // TURN_UNITS - 1


async def test_copies_in_the_loop_count_by_their_bytes() -> None:
    async with pair(capacity=16 * MIB, initial=16 * MIB) as (owner, client):
        refs = [await owner.put(filled(MIB)) for _ in range(15)]
        await client.get(refs[0])
        calls = [0]
        async with sampled(lambda: calls[0]) as made:
            for ref in refs[1:]:
                await client.get(ref)
                calls[0] += 1
        assert made.most <= TURN_UNITS // 16 + 1
        assert made.turns > 1


@pytest.mark.parametrize("how", ["get", "borrow", "release", "put", "get by key"])
async def test_cancelled_where_it_lets_the_loop_turn_a_call_has_done_nothing(how: str) -> None:
    async with pair(**ROOM) as (owner, _):
        ref = await owner.put(filled(16))
        await owner.put(filled(16), key="k")
        used = owner.statistics().slots_used
        for turns in range(4):
            turn_of(asyncio.get_running_loop()).left = 0
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "get": lambda: owner.get(ref),
                "borrow": lambda: owner.borrow(ref).__aenter__(),
                "release": lambda: owner.release(ref),
                "put": lambda: owner.put(filled(16)),
                "get by key": lambda: owner.get("k"),
            }
            task = asyncio.ensure_future(calls[how]())
            await steps(1)
            assert not task.done()
            await steps(turns)
            if task.done() or not task.cancel():
                break
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if not task.cancelled():
                break
            assert (owner.statistics().slots_used, owner.statistics().waiters) == (used, 0)
        else:
            pytest.fail("it never went on")
        assert turns, "it was cancelled once at least"


async def test_a_put_that_waits_for_its_turn_as_the_cache_closes() -> None:
    async with pair(**ROOM) as (owner, _):
        turn_of(asyncio.get_running_loop()).left = 0
        task = asyncio.create_task(owner.put(filled(16)))
        await steps(1)
        await owner.aclose()
        with pytest.raises(CacheClosed):
            await task


async def test_puts_that_wait_get_room_in_pieces_and_in_order() -> None:
    async with pair(capacity=256 * KIB, segment=256 * KIB, slots=1024) as (owner, client):
        ref = await owner.put(filled(256 * KIB), ttl=None)
        served = list[int]()

        async def put(number: int) -> None:
            await owner.put(filled(16))
            served.append(number)

        tasks = [asyncio.create_task(put(number)) for number in range(MANY)]
        await until(lambda: owner.statistics().waiters == MANY)
        async with sampled(lambda: owner.statistics().waiters) as waiters:
            await client.release(ref)
            await asyncio.gather(*tasks)
        assert served == list(range(MANY))
        assert waiters.most <= TURN_UNITS + LEAST


async def waiting_puts(owner: FeatureCache, count: int) -> list["asyncio.Task[FeatureRef]"]:
    tasks = [asyncio.create_task(owner.put(filled(16))) for _ in range(count)]
    await until(lambda: owner.statistics().waiters == count)
    return tasks


@pytest.mark.parametrize("left", [0, TURN_UNITS], ids=["no units left", "a whole turn"])
async def test_puts_cancelled_at_once_leave_at_once_and_are_told_of_in_pieces(left: int) -> None:
    async with pair(capacity=64 * KIB, segment=64 * KIB, slots=1024) as (owner, _):
        await owner.put(filled(64 * KIB), ttl=None)
        tasks = await waiting_puts(owner, MANY)
        writer, pool = owner._opened().main.writer, owner._opened().pool
        told = [0]
        end = writer.waits.end

        def counted(*args: Any, **kwargs: Any) -> None:
            told[0] += 1
            end(*args, **kwargs)

        writer.waits.end = counted  # type: ignore[method-assign]
        async with sampled(lambda: told[0]) as ended:
            turn_of(asyncio.get_running_loop()).left = left
            for task in tasks:
                task.cancel()
            await steps(1)
            assert all(task.cancelled() for task in tasks)
            assert (owner.statistics().waiters, pool.store.queue.waiting_bytes) == (0, 0)
            await until(lambda: told[0] == MANY)
        assert ended.most <= TURN_UNITS * A_UNIT
        await until(lambda: pool.words.header[Header.WAITING] == 0)
        assert owner.pressure.level == "high"
        assert not writer.waits._untold


async def test_of_puts_cancelled_at_once_no_slot_is_lost_and_those_behind_are_served() -> None:
    """Some have their slot granted as they are cancelled, some wait, some are not in the queue yet."""
    async with pair(capacity=256 * KIB, segment=256 * KIB, slots=1024) as (owner, _):
        for granted in range(0, MANY, MANY // 4):
            full = await owner.put(filled(256 * KIB), ttl=None)
            tasks = await waiting_puts(owner, MANY)
            await owner.discard(full)
            await until(lambda: owner.statistics().waiters <= MANY - granted)  # noqa: B023 - awaited here
            behind = [asyncio.create_task(owner.put(filled(16))) for _ in range(100)]
            unstaged = [asyncio.create_task(owner.put(filled(16))) for _ in range(MANY)]
            await steps(1)
            turn_of(asyncio.get_running_loop()).left = 0
            for task in (*tasks, *unstaged):
                task.cancel()
            refs = list(await asyncio.gather(*behind))
            for task in (*tasks, *unstaged):
                with contextlib.suppress(asyncio.CancelledError):
                    refs.append(await task)
            for ref in refs:
                await owner.discard(ref)
            await until(lambda: owner.statistics().used_bytes == 0)
            assert (owner.statistics().slots_used, owner.statistics().waiters) == (0, 0)
