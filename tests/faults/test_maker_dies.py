"""Single flight across processes that die: one makes at a time, each death or error chooses one more."""

import asyncio
import random
import signal
from collections import Counter
from typing import Any, Final

import pytest
import torch

import featcache
from faults.agents import Trouble, feature, is_right
from faults.checks import Log, events
from faults.keyed import (
    CAPACITY,
    SIZE,
    both,
    case,
    claims,
    client,
    host_only,
    key_waiters,
    lost,
    put,
    reads_out,
    reserved,
    waiters,
    works,
)
from featcache import FeatureCache, FeatureClient
from support.processes import Child, Start, until
from support.slabs import Slab

OWNER: Final = "the owner"


class Makes:
    """`get_or_put` in this process, whose `make` does what it is told."""

    def __init__(self, slab: Slab, nbytes: int = SIZE) -> None:
        self.slab = slab
        self.nbytes = nbytes
        self.orders: dict[str, asyncio.Future[str]] = {}

    async def ask(self, who: FeatureCache | FeatureClient, key: str, seed: int) -> bool:
        async def make() -> torch.Tensor:
            assert key not in self.orders, "two make it at once"
            told = self.orders[key] = asyncio.get_running_loop().create_future()
            if await told == "raise":
                raise Trouble(key)
            return feature(seed, self.nbytes).to(self.slab.device)

        return is_right(await who.get_or_put(key, make), seed)

    def order(self, key: str, what: str) -> None:
        """Have a `make` that waits "make" it or "raise"."""
        self.orders.pop(key).set_result(what)

    def begin(self, who: FeatureCache | FeatureClient, key: str, seed: int) -> "asyncio.Task[bool]":
        return asyncio.create_task(self.ask(who, key, seed))


async def making(child: Child, key: str, seed: int, nbytes: int = SIZE) -> None:
    """Have a child be in its `make`."""
    child.tell("begin", key, "get_or_put", key, seed, nbytes)
    assert await both(child) == [("begun",), ("making", key)]


async def waiting(child: Child, key: str, seed: int, nbytes: int = SIZE) -> None:
    """Have a child wait for what another makes."""
    assert await child.ask("begin", key, "get_or_put", key, seed, nbytes) == ("begun",)


async def makes_it(child: Child) -> None:
    """Have a child make what it is in its `make` of, and get it."""
    child.tell("order", "k", "make")
    assert await both(child) == [("k", "right"), ("ordered",)]


async def raises(child: Child, key: str) -> None:
    """Have a child's `make` raise: the error is its own."""
    child.tell("order", key, "raise")
    assert await both(child) == [(key, "raised", "Trouble"), ("ordered",)]


# --- one maker, killed at each step ----------------------------------------------------------------

STEPS = [None, "sent reserve", "reserved", "halfway", "told"]


def cases() -> list[Any]:
    chosen = [("host", step) for step in STEPS] + [("vmm", "halfway")]
    return [case(kind, step, name=step or "making") for kind, step in chosen]


@pytest.mark.parametrize(("slab", "step"), cases(), indirect=["slab"])
async def test_killed_before_it_published(
    start: Start, log: Log, slab: Slab, step: str | None
) -> None:
    """The first of those that wait makes next, and only that one; all get what it made."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await making(child, "k", 1)
        await waiting(other, "k", 2)
        await until(lambda: key_waiters(cache) == 1)
        makes = Makes(slab)
        tasks = [makes.begin(who, "k", 2) for who in (survivor, cache)]
        looks = asyncio.create_task(cache.get("k", timeout=60.0))
        await until(lambda: key_waiters(cache) == 4)
        if step is not None:
            assert await child.ask("arm", step) == ("armed",)
            assert await child.ask("order", "k", "make") == ("ordered",)
            await child.expect("at", step)
        child.kill()
        await other.expect("making", "k")
        await lost(log)
        assert (claims(cache), key_waiters(cache), reserved(cache)) == (1, 3, 0)
        assert not makes.orders
        await makes_it(other)
        assert await asyncio.gather(*tasks) == [True, True]
        assert is_right(await looks, 2)
        assert not makes.orders
        await until(lambda: claims(cache) == 0)
        assert cache.statistics().puts == 1
        await works(cache, slab)


@host_only
async def test_killed_while_its_put_waits_for_room(start: Start, log: Log, slab: Slab) -> None:
    """Its place in the queue goes with its claim; the next maker's put waits in its own."""
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        held = await put(cache, slab, 0, CAPACITY)
        await making(child, "k", 1)
        makes = Makes(slab)
        mine = makes.begin(cache, "k", 2)
        await until(lambda: key_waiters(cache) == 1)
        assert await child.ask("order", "k", "make") == ("ordered",)
        await until(lambda: waiters(cache) == 1)
        child.kill()
        await until(lambda: "k" in makes.orders)
        await until(lambda: waiters(cache) == 0)
        makes.order("k", "make")
        await until(lambda: waiters(cache) == 1)
        assert is_right(await cache.get(held), 0)
        assert await mine
        await lost(log)
        await works(cache, slab)


async def test_killed_after_it_published(start: Start, log: Log, slab: Slab) -> None:
    """Everybody has it: nobody makes it again, though its claim never was given back by itself."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await making(child, "k", 1)
        await waiting(other, "k", 1)
        makes = Makes(slab)
        tasks = [makes.begin(who, "k", 1) for who in (survivor, cache)]
        await until(lambda: key_waiters(cache) == 3)
        assert await child.ask("arm", "sent publish") == ("armed",)
        assert await child.ask("order", "k", "make") == ("ordered",)
        await child.expect("at", "sent publish")
        assert await asyncio.gather(*tasks) == [True, True]
        assert await other.hear() == ("k", "right")
        assert claims(cache) == 1
        # Gone again before its claim has ended: who asks now waits for that.
        await cache.evict("k")
        again = makes.begin(survivor, "k", 2)
        await until(lambda: key_waiters(cache) == 1)
        assert not makes.orders
        child.kill()
        await until(lambda: "k" in makes.orders)
        makes.order("k", "make")
        assert await again
        await lost(log)
        await works(cache, slab)


async def test_killed_before_the_bytes_that_it_published_came(
    start: Start, log: Log, slab: Slab
) -> None:
    """Those who had it granted, and wait for its bytes, ask again: one of them makes it."""
    async with (
        slab.create(recycle_interval=60.0) as cache,
        featcache.connect(cache.endpoint, settings=slab.settings()) as survivor,
    ):
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        assert (await child.ask("put_key", 0, SIZE, None))[0] == "ref"
        await making(child, "k", 1)
        await waiting(other, "k", 2)
        makes = Makes(slab)
        tasks = [makes.begin(who, "k", 2) for who in (survivor, cache)]
        await until(lambda: key_waiters(cache) == 3)
        assert await child.ask("late") == ("late",)
        child.tell("order", "k", "make")
        if slab.kind == "host":
            assert await both(child) == [
                ("k", "right"),
                ("ordered",),
            ]
        await until(lambda: reads_out(cache) == 3)
        child.kill()
        await until(lambda: claims(cache) == 1 and key_waiters(cache) == 2)
        await until(lambda: other.said() or "k" in makes.orders)  # it has begun
        if other.said():
            await other.expect("making", "k")
            other.tell("order", "k", "make")
            answers = await both(other)
        else:
            makes.order("k", "make")
            answers = [await other.hear()]
        assert answers[0] == ("k", "right")
        assert await asyncio.gather(*tasks) == [True, True]
        await lost(log)
        discarded = cache._opened().pool.store.owing.copy()
        for slot in discarded.values():  # what the child put first
            cache._opened().main.sessions.discard(slot.index, slot.generation)
        await works(cache, slab)


@host_only
async def test_the_chosen_is_dead(start: Start, log: Log, slab: Slab) -> None:
    """Chosen in the same breath as it dies, it never hears of it: the next makes."""
    async with slab.create(recycle_interval=60.0) as cache:
        makes = Makes(slab)
        mine = makes.begin(cache, "k", 1)
        await until(lambda: "k" in makes.orders)
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await waiting(child, "k", 2)
        await until(lambda: key_waiters(cache) == 1)
        await waiting(other, "k", 3)
        await until(lambda: key_waiters(cache) == 2)
        makes.order("k", "raise")
        with pytest.raises(Trouble):
            await mine
        child.kill()  # it is the one who may make, by now
        await other.expect("making", "k")
        await lost(log)
        await makes_it(other)
        assert is_right(await cache.get("k"), 3)
        await works(cache, slab)


# --- errors, and makers that only seem dead --------------------------------------------------------


@host_only
async def test_an_error_is_its_makers_alone(start: Start, log: Log, slab: Slab) -> None:
    """A client's, the owner's, a client's that is killed after it: three makes, then the right one."""
    async with slab.create(recycle_interval=60.0) as cache:
        first, second, third = [await client(start, slab, cache.endpoint) for _ in range(3)]
        makes = Makes(slab)
        await making(first, "k", 1)
        mine = makes.begin(cache, "k", 2)
        await until(lambda: key_waiters(cache) == 1)
        await waiting(second, "k", 3)
        await until(lambda: key_waiters(cache) == 2)
        await waiting(third, "k", 4)
        await until(lambda: key_waiters(cache) == 3)
        await raises(first, "k")
        await until(lambda: "k" in makes.orders)
        assert not second.said()
        makes.order("k", "raise")
        with pytest.raises(Trouble):
            await mine
        await second.expect("making", "k")
        assert not third.said()
        second.kill()
        await third.expect("making", "k")
        await makes_it(third)
        assert await first.ask("get_key", "k", 4) == ("right",)
        await works(cache, slab)


@host_only
async def test_a_stopped_maker_is_waited_for(start: Start, log: Log, slab: Slab) -> None:
    async with slab.create(recycle_interval=60.0) as cache:
        child = await client(start, slab, cache.endpoint)
        await making(child, "k", 1)
        makes = Makes(slab)
        mine = makes.begin(cache, "k", 1)
        await until(lambda: key_waiters(cache) == 1)
        child.signal(signal.SIGSTOP)
        with pytest.raises(featcache.KeyTimeout):
            await cache.get_or_put("k", lambda: torch.zeros(1), timeout=0.1)
        assert (claims(cache), key_waiters(cache)) == (1, 1)
        child.signal(signal.SIGCONT)
        await makes_it(child)
        assert await mine
        assert not makes.orders
        await works(cache, slab)


@host_only
async def test_what_a_quarantined_maker_makes_is_for_another_to_make(
    start: Start, log: Log, slab: Slab
) -> None:
    """Its socket closed: it may be making still, but it can't publish what it makes.

    The places of others stand; what the quarantined itself waited for it waits for no more.
    """
    async with slab.create(recycle_interval=60.0) as cache:
        child, other = [await client(start, slab, cache.endpoint) for _ in range(2)]
        await making(child, "k", 1)
        await making(other, "m", 2)
        await waiting(child, "m", 1)
        await until(lambda: key_waiters(cache) == 1)
        makes = Makes(slab)
        mine = makes.begin(cache, "k", 3)
        await until(lambda: key_waiters(cache) == 2)
        child.tell("hang_up")
        assert await both(child) == [
            ("hung up",),
            ("m", "raised", "CacheClosed"),
        ]
        await until(lambda: events(log, "reader.quarantined"))
        await until(lambda: "k" in makes.orders)
        assert (claims(cache), key_waiters(cache)) == (2, 0)
        await raises(other, "m")  # nobody is left to make that
        await until(lambda: claims(cache) == 1)
        makes.order("k", "make")
        assert await mine
        child.kill()
        await lost(log)
        await works(cache, slab)


# --- many processes -------------------------------------------------------------------------------


class Crew:
    """Processes, and this one, that all ask for the same keys; who makes what, and what came of it."""

    def __init__(self, cache: FeatureCache, children: dict[str, Child], makes: Makes) -> None:
        self.cache = cache
        self.children = children
        self.makes = makes
        self.making: dict[str, str] = {}
        """Who makes a key now. Taken out as it is ordered or killed: another may come from then on."""
        self.count: Counter[str] = Counter()
        self.expected: dict[str, int] = {}
        self.ends: dict[tuple[str, str], tuple[Any, ...]] = {}
        self.raisers: set[tuple[str, str]] = set()
        self.standing: set[str] = set()
        self.armed = 0
        self._tasks: dict[str, asyncio.Task[bool]] = {}

    @property
    def alive(self) -> list[str]:
        return [*self.children, OWNER]

    def look(self) -> None:
        """Take in what was said."""
        for name, child in self.children.items():
            while child.said():
                self._take(name, *child.hear_now())
        for key in self.makes.orders:
            if self.making.get(key) != OWNER:
                self._makes(OWNER, key)
        for key, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[key]
                error = task.exception()
                good = error is None and task.result()
                self.ends[OWNER, key] = ("right",) if good else ("raised", type(error).__name__)

    def _take(self, name: str, message: str, *rest: Any) -> None:
        if message == "making":
            self._makes(name, rest[0])
        elif message == "at":
            self.standing.add(name)
        elif message == "armed":
            self.armed += 1
        elif message not in {"begun", "ordered"}:
            self.ends[name, message] = rest

    def _makes(self, name: str, key: str) -> None:
        assert key not in self.making, f"{name} makes {key} while {self.making[key]} does"
        self.making[key] = name
        self.count[key] += 1

    async def until(self, predicate: Any) -> None:
        def holds() -> object:
            self.look()
            return predicate()

        await until(holds)

    async def ask(self, keys: dict[str, int]) -> None:
        """All ask for all keys at once, as soon as they can."""
        for child in self.children.values():
            for key, seed in keys.items():
                child.tell("begin", key, "get_or_put", key, seed, self.makes.nbytes)
        for key, seed in keys.items():
            self._tasks[key] = self.makes.begin(self.cache, key, seed)
            self.expected[key] = 1
        others = len(keys) * (len(self.alive) - 1)
        await self.until(
            lambda: len(self.making) == len(keys) and key_waiters(self.cache) == others
        )

    def waiting_for(self, key: str) -> int:
        """How many could make a key if its maker does not."""
        return sum(
            (name, key) not in self.ends and (name, key) not in self.raisers for name in self.alive
        ) - (key in self.making)

    # --- what is done to a maker -------------------------------------------------------------------

    def order(self, key: str, what: str) -> None:
        name = self.making.pop(key)
        if what == "raise":
            self.raisers.add((name, key))
            self.expected[key] += 1
        if name == OWNER:
            self.makes.order(key, what)
        else:
            self.children[name].tell("order", key, what)

    def kill(self, name: str) -> None:
        self.children.pop(name).kill()
        self.standing.discard(name)
        for key, maker in list(self.making.items()):
            if maker == name:
                del self.making[key]
                self.expected[key] += 1

    async def kill_at(self, key: str, step: str) -> None:
        """Kill a maker in its put. What is published by then is made."""
        name = self.making[key]
        child, armed = self.children[name], self.armed
        child.tell("arm", step)
        await self.until(lambda: self.armed > armed)
        child.tell("order", key, "make")
        await self.until(lambda: name in self.standing)
        if step == "sent publish":
            directory = self.cache._opened().pool.store.directory
            await self.until(lambda: key.encode() in directory)
            del self.making[key]
        self.kill(name)

    def is_seen_to(self, key: str) -> bool:
        """Whether somebody makes it, or all that live have it or have failed."""
        return key in self.making or all((name, key) in self.ends for name in self.alive)


KILLS: Final = ["maker", "maker and waiter", "waiter", "in its put", "in its put"]
PUT_STEPS: Final = ["reserved", "halfway", "told", "sent publish"]


async def disturb(crew: Crew, action: str, random_: random.Random) -> None:
    """Do something to who makes a key, or to who waits for it."""
    # Of keys that somebody else would make.
    keys = sorted(key for key in crew.making if crew.waiting_for(key))
    if action == "raise":
        if keys:
            crew.order(random_.choice(keys), "raise")
        return
    makers = sorted({crew.making[key] for key in keys} - {OWNER})
    if "waiter" in action or not makers:
        crew.kill(random_.choice(sorted(crew.children.keys() - makers[:1])))
    if "maker" in action and makers:
        crew.kill(makers[0])
    elif action == "in its put" and makers:
        key = next(key for key in keys if crew.making[key] == makers[0])
        await crew.kill_at(key, random_.choice(PUT_STEPS))


@host_only
@pytest.mark.parametrize("seed", range(6))
async def test_eight_processes_and_the_owner(start: Start, log: Log, slab: Slab, seed: int) -> None:
    """Rounds of keys that all want at once; in each of them somebody is killed, and some raise."""
    random_ = random.Random(seed)
    async with slab.create(recycle_interval=60.0) as cache:
        children = {f"p{n}": await client(start, slab, cache.endpoint) for n in range(8)}
        crew = Crew(cache, children, Makes(slab, 32 << 10))
        rounds = 4
        for round_ in range(rounds):
            keys = {f"{round_}-{n}": 3 * round_ + n for n in range(3)}
            await crew.ask(keys)
            plan = [random_.choice(KILLS)] + ["raise"] * random_.randrange(5)
            random_.shuffle(plan)
            for action in plan:
                await disturb(crew, action, random_)
                await crew.until(lambda keys=keys: all(crew.is_seen_to(key) for key in keys))
            while crew.making:
                crew.order(next(iter(crew.making)), "make")
                await crew.until(lambda keys=keys: all(crew.is_seen_to(key) for key in keys))
            for key in keys:
                assert crew.count[key] == crew.expected[key], key
                for name in crew.alive:
                    raised = (name, key) in crew.raisers
                    wanted = ("raised", "Trouble") if raised else ("right",)
                    assert crew.ends[name, key] == wanted, (name, key)
        killed = 8 - len(crew.children)
        assert killed >= rounds
        await lost(log, killed)
        assert cache.statistics().puts == 3 * rounds
        assert cache.statistics().readers_lost == killed
        for name, child in crew.children.items():
            assert await child.ask("get_key", "0-0", 0) == ("right",), name
        await works(cache, slab)
