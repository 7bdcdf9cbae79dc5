"""A reader is killed, at every step of its life: what it had begun is paid at once, nothing else."""

import asyncio
import random

import pytest

import featcache
from faults.agents import busy_reader, feature, is_right, reader
from faults.checks import Log, assert_whole, events
from featcache import FeatureRef
from featcache.settings import Settings
from support.processes import Child, Start, until

SIZE = 128 << 10
# No timer helps within the life of a test: what is seen here came by an event.
SETTINGS = Settings(capacity=2 * SIZE, initial=2 * SIZE, slots=8, recycle_interval=60.0)

# The step; what leads to it; whether the owner has the session by then, the read is begun, is paid.
STEPS = [
    pytest.param("connected", None, False, False, False, id="before hello"),
    pytest.param("hello", None, True, False, False, id="before the welcome"),
    pytest.param("welcomed", None, True, False, False, id="before mapping"),
    pytest.param(None, None, True, False, False, id="attached"),
    pytest.param("holding", "get", True, True, False, id="in hold"),
    pytest.param("held", "get", True, True, False, id="before the bytes"),
    pytest.param("copied", "get", True, True, False, id="after the bytes"),
    pytest.param("ending", "get", True, True, False, id="before release"),
    pytest.param("paying", "get", True, True, False, id="in release"),
    pytest.param("paid", "get", True, True, True, id="after release"),
    pytest.param(None, "borrow", True, True, False, id="in a borrow"),
    pytest.param("ending", "borrow", True, True, False, id="leaving a borrow"),
    pytest.param("holding", "release", True, True, False, id="releasing"),
]


@pytest.mark.parametrize("name", [None, "tp0"], ids=["anonymous", "named"])
@pytest.mark.parametrize(("step", "command", "admitted", "begun", "paid"), STEPS)
async def test_killed_at_a_step(
    start: Start,
    log: Log,
    name: str | None,
    step: str | None,
    command: str | None,
    admitted: bool,
    begun: bool,
    paid: bool,
) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        owing = 1 if name is None else [name]
        first = await cache.put(feature(1, SIZE), readers=owing)
        second = await cache.put(feature(2, SIZE), readers=owing)
        child = start(reader, cache.endpoint, name=name, stop=step)
        await lead(child, step, command, first)
        greeting = cache._opened().main.server._greeting
        await until(
            lambda: (cache.statistics().sessions, len(greeting)) == (admitted, not admitted)
        )
        assert cache.statistics().used_bytes == (2 - paid) * SIZE
        child.kill()

        expected = 0 if not admitted or (name is None and not begun) else 1
        expected += name is not None and admitted  # what a name owes and never began
        await until(lambda: events(log, "reader.lost") or not (admitted or greeting), timeout_s=2.0)
        await until(lambda: cache.statistics().used_bytes == SIZE * (2 - expected), timeout_s=2.0)
        lost = events(log, "reader.lost")
        if admitted:
            assert [entry["reader"] for entry in lost] == [name]
            assert lost[0]["pid"] == child.pid
            assert lost[0]["reads_paid"] == expected - paid
        assert cache.statistics().readers_lost == len(lost) == admitted
        for ref, gone in ((first, expected > 0), (second, expected > 1)):
            if not gone:  # owed as before: whoever reads it now finds it
                with cache.borrow(ref) as view:
                    assert is_right(view, 1 if ref is first else 2)
                if name is not None:  # a read by somebody else does not pay for a name
                    await cache.discard(ref)
        cache._opened().pool.collect()
        await until(lambda: cache.statistics().used_bytes == 0, timeout_s=2.0)
        await assert_whole(cache)


async def lead(child: Child, step: str | None, command: str | None, ref: FeatureRef) -> None:
    """Bring a reader to its step."""
    if command is None:
        await child.expect(*(("at", step) if step else ("attached",)))
        return
    await child.expect("attached")
    child.tell(command, ref.to_bytes(), *((1,) if command != "release" else ()))
    if command == "borrow":
        await child.expect("right")
        if step is None:
            return
        child.tell("leave")
    await child.expect("at", step)


@pytest.mark.parametrize("name", [None, "tp0"], ids=["anonymous", "named"])
async def test_killed_before_the_owner_looked(start: Start, log: Log, name: str | None) -> None:
    """Its hello and its pidfd are in the socket, and the process is dead when the owner reads them."""
    async with featcache.create(settings=SETTINGS) as cache:
        ref = await cache.put(feature(1, SIZE), readers=1 if name is None else [name])
        child = start(reader, cache.endpoint, name=name, stop="hello")
        assert child.hear_now() == ("at", "hello")
        assert cache.statistics().sessions == 0
        child.kill()
        await until(lambda: events(log, "reader.lost"), timeout_s=2.0)
        if name is None:
            assert cache.statistics().used_bytes == SIZE
            await cache.discard(ref)
        await until(lambda: cache.statistics().used_bytes == 0, timeout_s=2.0)
        await assert_whole(cache)


@pytest.mark.parametrize("name", [None, "tp0"], ids=["anonymous", "named"])
async def test_killed_in_a_borrow_frees_the_room_that_a_put_waits_for(
    start: Start, name: str | None
) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        owing = 1 if name is None else [name]
        ref = await cache.put(feature(1, 2 * SIZE), readers=owing)
        child = start(reader, cache.endpoint, name=name)
        await child.expect("attached")
        assert await child.ask("borrow", ref.to_bytes(), 1) == ("right",)
        putting = asyncio.create_task(cache.put(feature(2, 2 * SIZE)))
        await until(lambda: cache.statistics().waiters == 1)
        child.kill()
        after = await asyncio.wait_for(putting, 2.0)
        assert is_right(await cache.get(after), 2)
        cache._opened().pool.collect()
        await assert_whole(cache)


async def test_killed_with_many_refs_held_and_some_paid(start: Start, log: Log) -> None:
    """Of three reads that one owes: one paid, one held, one not begun; others owe theirs as before."""
    settings = Settings(capacity=8 * SIZE, recycle_interval=60.0)
    async with featcache.create(settings=settings) as cache:
        refs = [await cache.put(feature(n, SIZE), readers=["a", "b"]) for n in range(3)]
        child, other = (start(reader, cache.endpoint, name=name) for name in "ab")
        for agent in (child, other):
            await agent.expect("attached")
        assert await child.ask("get", refs[0].to_bytes(), 0) == ("right",)
        assert await child.ask("borrow", refs[1].to_bytes(), 1) == ("right",)
        child.kill()
        await until(lambda: events(log, "reader.lost"), timeout_s=2.0)
        assert events(log, "reader.lost")[0]["reads_paid"] == 2
        assert cache.statistics().used_bytes == 3 * SIZE
        for seed, ref in enumerate(refs):  # b owes all three, and finds their bytes
            assert await other.ask("get", ref.to_bytes(), seed) == ("right",)
        cache._opened().pool.collect()
        assert cache.statistics().used_bytes == 0
        other.tell("end")
        await until(lambda: cache.statistics().sessions == 0)
        await assert_whole(cache)


async def test_a_name_can_come_back_after_its_process_died(start: Start) -> None:
    async with featcache.create(settings=SETTINGS) as cache:
        for seed in range(2):
            child = start(reader, cache.endpoint, name="tp0")
            await child.expect("attached")
            ref = await cache.put(feature(seed, SIZE), readers=["tp0"])
            assert await child.ask("borrow", ref.to_bytes(), seed) == ("right",)
            child.kill()
            await until(lambda: cache.statistics().sessions == 0, timeout_s=2.0)
        await assert_whole(cache)


async def test_many_killed_under_load(start: Start, log: Log) -> None:
    """Six read everything; four are killed, one after the other, while puts wait for room."""
    names = [f"tp{number}" for number in range(6)]
    size, rounds, doomed = 32 << 10, 240, names[:4]
    settings = Settings(capacity=2 * size, recycle_interval=60.0, slots=64)
    async with featcache.create(settings=settings) as cache:
        children = {name: start(busy_reader, cache.endpoint, name=name) for name in names}
        for child in children.values():
            await child.expect("attached")
        random_ = random.Random(5)
        kills = {random_.randrange(20, rounds - 20): name for name in doomed}
        assert len(kills) == len(doomed)
        alive, sent = set(names), dict.fromkeys(names, 0)
        for seed in range(rounds):
            ref = await cache.put(feature(seed, size), readers=sorted(alive), timeout=10.0)
            for name in sorted(alive):
                children[name].tell("ref", seed, ref.to_bytes())
                sent[name] += 1
            if seed in kills:
                alive.remove(kills[seed])
                children[kills[seed]].kill()  # with refs unread in its pipe, or in a read
        for name in sorted(alive):
            assert await children[name].ask("no more") == ("read", sent[name], 0)
        await until(lambda: cache.statistics().sessions == 0)
        assert [entry["reader"] for entry in events(log, "reader.lost")] == [
            kills[seed] for seed in sorted(kills)
        ]
        assert cache.statistics().waited > 0, "the pool was never full: no load"
        assert cache.statistics().recycled == rounds
        await assert_whole(cache)
