"""Readers that live and say nothing: stopped, hung up, leaving without a goodbye, leaving with one."""

import signal

import pytest

import featcache
from faults.agents import feature, is_right, reader
from faults.checks import Log, assert_whole, events
from featcache.settings import Settings
from support.processes import Child, Start, until

SIZE = 128 << 10
SETTINGS = Settings(capacity=2 * SIZE, initial=2 * SIZE, slots=8, recycle_interval=60.0)


async def attached(start: Start, endpoint: str, name: str | None = None) -> Child:
    child = start(reader, endpoint, name=name)
    await child.expect("attached")
    return child


async def test_goodbye_pays_nothing(start: Start, log: Log) -> None:
    """Who leaves in order may come back for what its name owes."""
    async with featcache.create(settings=SETTINGS) as cache:
        child = await attached(start, cache.endpoint, "tp0")
        ref = await cache.put(feature(1, SIZE), readers=["tp0"])
        child.tell("end")
        await until(lambda: events(log, "reader.left"), 2.0)
        await child.ends()
        assert cache.statistics().sessions == cache.statistics().readers_lost == 0
        assert cache.statistics().used_bytes == SIZE
        child = await attached(start, cache.endpoint, "tp0")
        assert await child.ask("get", ref.to_bytes(), 1) == ("right",)
        child.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        assert not events(log, "reader.lost")
        await assert_whole(cache)


async def test_ending_without_goodbye_is_death(start: Start, log: Log) -> None:
    """No signal, exit code 0: what counts is that it did not say goodbye."""
    async with featcache.create(settings=SETTINGS) as cache:
        child = await attached(start, cache.endpoint, "tp0")
        ref = await cache.put(feature(1, SIZE), readers=["tp0"])
        await cache.put(feature(2, SIZE), readers=["tp0"])
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        child.tell("exit")
        await until(lambda: events(log, "reader.lost"), 2.0)
        assert events(log, "reader.lost")[0]["reads_paid"] == 2
        assert not events(log, "reader.left")
        await assert_whole(cache)


@pytest.mark.parametrize("end", ["leave", "kill"])
async def test_closed_in_its_borrow(start: Start, log: Log, end: str) -> None:
    """A client that is closed in a borrow says goodbye when the borrow ends, if it lives so long."""
    async with featcache.create(settings=SETTINGS) as cache:
        child = await attached(start, cache.endpoint)
        ref = await cache.put(feature(1, SIZE))
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        assert await child.ask("close") == ("closed",)
        assert cache.statistics().sessions == 1
        await cache.discard(ref)
        with pytest.raises(featcache.PutTimeout):
            await cache.put(feature(2, 2 * SIZE), timeout=0.1)
        assert await child.ask("look", 1) == ("right",)
        if end == "leave":
            assert await child.ask("leave") == ("left",)
        else:
            child.kill()
        await until(lambda: cache.statistics().sessions == 0, 2.0)
        assert bool(events(log, "reader.left")) is (end == "leave")
        assert bool(events(log, "reader.lost")) is (end == "kill")
        await assert_whole(cache)


@pytest.mark.parametrize("name", [None, "tp0"], ids=["anonymous", "named"])
@pytest.mark.parametrize("how", ["hang_up", "garbage"])
async def test_quarantine(start: Start, log: Log, how: str, name: str | None) -> None:
    """A socket that closed, or spoke nonsense, frees nothing while its process lives."""
    async with featcache.create(settings=SETTINGS) as cache:
        owing = 1 if name is None else [name]
        first = await cache.put(feature(1, SIZE), readers=owing)
        second = await cache.put(feature(2, SIZE), readers=owing)
        child = await attached(start, cache.endpoint, name)
        assert await child.ask("borrow", first.to_bytes(), 1) == ("right",)
        await child.ask(how)
        await until(lambda: events(log, "reader.quarantined"), 2.0)
        (entry,) = events(log, "reader.quarantined")
        assert (entry["pid"], entry["reader"]) == (child.pid, name)
        assert cache.statistics().sessions == 1
        await cache.discard(first)
        with pytest.raises(featcache.PutTimeout):
            await cache.put(feature(3, SIZE), timeout=0.1)
        assert cache.statistics().used_bytes == 2 * SIZE
        assert await child.ask("look", 1) == ("right",)
        if name is not None:  # it may come back by itself: its name is taken while it lives
            with pytest.raises(featcache.AttachRefused):
                await featcache.connect(cache.endpoint, name=name).open()

        child.kill()
        await until(lambda: events(log, "reader.lost"), 2.0)
        assert cache.statistics().sessions == 0
        if name is None:
            assert cache.statistics().used_bytes == SIZE
            await cache.discard(second)
        await until(lambda: cache.statistics().used_bytes == 0, 2.0)
        await assert_whole(cache)


async def test_what_the_quarantined_pay_counts(start: Start, log: Log) -> None:
    """Its words are still read: a borrow that ends in quarantine gives its bytes back."""
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, 2 * SIZE))
        child = await attached(start, cache.endpoint)
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        await child.ask("hang_up")
        await until(lambda: events(log, "reader.quarantined"), 2.0)
        assert await child.ask("leave") == ("left",)
        after = await cache.put(feature(2, 2 * SIZE), timeout=2.0)
        assert is_right(await cache.get(after), 2)
        child.kill()
        await until(lambda: cache.statistics().sessions == 0, 2.0)
        cache._opened().pool.collect()
        await assert_whole(cache)


async def test_stopped_in_a_borrow(start: Start, log: Log) -> None:
    """A stopped reader holds what it holds and nobody else up; it goes on where it was."""
    settings = Settings(capacity=4 * SIZE, initial=4 * SIZE, recycle_interval=0.01)
    async with featcache.create(settings=settings) as cache:
        child, other = [await attached(start, cache.endpoint) for _ in range(2)]
        ref = await cache.put(feature(1, SIZE), ttl=0.1)
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        child.signal(signal.SIGSTOP)
        await until(lambda: events(log, "ref.expired"), 2.0)
        for seed in range(2, 40):  # many times what is free beside it
            passing = await cache.put(feature(seed, SIZE), timeout=2.0)
            assert await other.ask("get", passing.to_bytes(), seed) == ("right",)
        await until(lambda: cache.statistics().used_bytes == SIZE, 2.0)
        assert cache.statistics().sessions == 2
        child.tell("look", 1)
        assert not child.said()
        child.signal(signal.SIGCONT)
        await child.expect("right")
        assert await child.ask("leave") == ("left",)
        await until(lambda: cache.statistics().used_bytes == 0, 2.0)
        assert not events(log, "reader.lost")
        assert not events(log, "reader.quarantined")
        for agent in (child, other):
            agent.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        await assert_whole(cache)


async def test_stopped_and_killed(start: Start, log: Log) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        child = await attached(start, cache.endpoint)
        ref = await cache.put(feature(1, SIZE))
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        child.signal(signal.SIGSTOP)
        child.kill()
        await until(lambda: events(log, "reader.lost"), 2.0)
        await assert_whole(cache)


async def test_stopped_at_the_door(start: Start, log: Log) -> None:
    """Who connects and says nothing is sent away in time, and takes nobody's place."""
    settings = Settings(capacity=2 * SIZE, initial=2 * SIZE, attach_timeout=1.0)
    async with featcache.create(settings=settings) as cache:
        child = start(reader, cache.endpoint, stop="connected")
        await child.expect("at", "connected")
        child.signal(signal.SIGSTOP)
        other = await attached(start, cache.endpoint)
        await until(lambda: events(log, "peer.refused"))
        assert "no Hello" in events(log, "peer.refused")[0]["reason"]
        other.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        await assert_whole(cache)
