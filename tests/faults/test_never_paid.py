"""A consumer never pays: its ref expires, the log says so, and nobody's bytes go under a borrow."""

import pytest

import featcache
from faults.agents import feature, is_right, reader
from faults.checks import Log, assert_whole, events
from featcache import StaleRef
from featcache.settings import Settings
from support.processes import Start, until

SIZE = 128 << 10
TTL_S = 0.1
SETTINGS = Settings(capacity=2 * SIZE, initial=2 * SIZE, slots=8, recycle_interval=0.01)


@pytest.mark.parametrize("readers", [3, ["tp1", "tp0"]], ids=["anonymous", "named"])
async def test_expiry_is_told(no_leaks: None, log: Log, readers: int | list[str]) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE), readers=readers, ttl=TTL_S)
        await until(lambda: events(log, "ref.expired"), 2.0)
        (entry,) = events(log, "ref.expired")
        assert entry["ref"] == f"{ref.slot}:{ref.generation}"
        assert entry["nbytes"] == SIZE
        assert TTL_S <= entry["age_s"] < TTL_S + 1.0
        assert entry["owed_by"] == (3 if isinstance(readers, int) else ("tp0", "tp1"))
        assert entry["log_level"] == "warning"
        with pytest.raises(StaleRef):
            await cache.get(ref)
        await until(lambda: cache.statistics().used_bytes == 0, 2.0)
        assert cache.statistics().expired == 1
        await assert_whole(cache)


async def test_expiry_names_only_who_still_owes(start: Start, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(reader, cache.endpoint, name="tp0")
        await child.expect("attached")
        ref = await cache.put(feature(1, SIZE), readers=["tp0", "tp1"], ttl=0.5)
        assert await child.ask("get", ref.to_bytes(), 1) == ("right",)
        await until(lambda: events(log, "ref.expired"), 2.0)
        assert events(log, "ref.expired")[0]["owed_by"] == ("tp1",)
        await until(lambda: cache.statistics().used_bytes == 0, 2.0)


@pytest.mark.parametrize("end", ["leave", "kill"])
async def test_expiry_waits_for_a_borrow(start: Start, log: Log, end: str) -> None:
    """Expired or not, what is being read stays until it was read, or its reader died."""
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(reader, cache.endpoint)
        await child.expect("attached")
        ref = await cache.put(feature(1, 2 * SIZE), readers=2, ttl=TTL_S)
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        await until(lambda: events(log, "ref.expired"), 2.0)
        with pytest.raises(featcache.PutTimeout):
            await cache.put(feature(2, 2 * SIZE), timeout=0.1)
        assert cache.statistics().used_bytes == 2 * SIZE
        with pytest.raises(StaleRef):
            cache.get_nowait(ref)
        assert await child.ask("look", 1) == ("right",)
        if end == "leave":
            child.tell("leave")
        else:
            child.kill()
        after = await cache.put(feature(2, 2 * SIZE), timeout=2.0)
        assert is_right(await cache.get(after), 2)
        if end == "leave":
            await child.expect("left")
            child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        cache._opened().pool.collect()
        await assert_whole(cache)


async def test_anonymous_reads_of_the_dead_wait_for_ttl(start: Start, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        child = start(reader, cache.endpoint)
        await child.expect("attached")
        ref = await cache.put(feature(1, SIZE), ttl=0.5)
        child.kill()
        await until(lambda: events(log, "reader.lost"), 2.0)
        assert cache.statistics().used_bytes == SIZE
        await until(lambda: cache.statistics().used_bytes == 0, 2.0)
        assert events(log, "ref.expired")[0]["ref"] == f"{ref.slot}:{ref.generation}"
        assert events(log, "ref.expired")[0]["owed_by"] == 1


@pytest.mark.parametrize("who", ["owner", "reader"])
async def test_discard_while_held(start: Start, who: str) -> None:
    settings = Settings(capacity=2 * SIZE, initial=2 * SIZE, recycle_interval=60.0)
    async with featcache.create(settings=settings) as cache:
        child = start(reader, cache.endpoint)
        await child.expect("attached")
        ref = await cache.put(feature(1, 2 * SIZE), readers=2)
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        if who == "owner":
            await cache.discard(ref)
        else:
            assert await child.ask("discard", ref.to_bytes()) == ("discarded",)
        with pytest.raises(StaleRef):
            await cache.get(ref)
        with pytest.raises(StaleRef):
            await cache.discard(ref)
        with pytest.raises(featcache.PutTimeout):  # its waiting looks for what was released
            await cache.put(feature(2, 2 * SIZE), timeout=0.1)
        assert await child.ask("look", 1) == ("right",)
        child.tell("leave")
        after = await cache.put(feature(3, 2 * SIZE), timeout=2.0)
        assert is_right(await cache.get(after), 3)
        await child.expect("left")
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("raised", "StaleRef")
        child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        cache._opened().pool.collect()
        await assert_whole(cache)


@pytest.mark.parametrize("step", ["holding", "held"])
async def test_discard_at_a_hold(start: Start, step: str) -> None:
    """Between `held` and the look at `live` the reader is told; after it the owner waits."""
    settings = Settings(capacity=2 * SIZE, initial=2 * SIZE, recycle_interval=60.0)
    async with featcache.create(settings=settings) as cache:
        ref = await cache.put(feature(1, 2 * SIZE))
        child = start(reader, cache.endpoint, stop=step)
        await child.expect("attached")
        child.tell("get", ref.to_bytes(), 1)
        await child.expect("at", step)
        await cache.discard(ref)
        with pytest.raises(featcache.PutTimeout):  # a hold is a hold, whichever way it will go
            await cache.put(feature(2, 2 * SIZE), timeout=0.1)
        child.tell("go on")
        answer = await child.hear()
        assert answer == (("raised", "StaleRef") if step == "holding" else ("right",))
        cache._opened().pool.collect()
        await until(lambda: cache.statistics().used_bytes == 0, 2.0)
        child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        await assert_whole(cache)
