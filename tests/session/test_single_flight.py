"""`get_or_put`: of all who ask for a key at once, in all processes, one makes it, and all have it."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
import pytest
import torch

import featcache
from featcache import (
    CacheClosed,
    FeatcacheError,
    FeatureTooLarge,
    KeyTimeout,
    OwnerLost,
    PoolFull,
    SettingsError,
)
from support.caches import filled, pair, spent, steps, tensor, tensors, until
from support.keyed import (
    CAPACITY,
    ONE,
    Cancellable,
    User,
    claims,
    grants,
    in_progress,
    nothing_lost,
    party,
    queued,
    seeking,
    sought,
)
from support.slabs import Place, same

BASE = torch.arange(720, dtype=torch.float32)
Made = torch.Tensor | dict[str, torch.Tensor]


class Kitchen:
    """Makes features when it is told to, and knows how many were at it at once."""

    def __init__(self, *failures: BaseException | None) -> None:
        """Fail as told, in this order; those after them succeed."""
        self.failures = list(failures)
        self.order: list[object] = []
        self.go = asyncio.Event()
        self.busy = self.most = 0

    @property
    def count(self) -> int:
        return len(self.order)

    def maker(self, who: object) -> Callable[[], Coroutine[Any, Any, Made]]:
        """What one passes as its `make`."""

        async def make() -> Made:
            number = self.count
            self.order.append(who)
            self.busy += 1
            self.most = max(self.most, self.busy)
            try:
                await self.go.wait()
                await asyncio.sleep(0)
                if number < len(self.failures) and (failure := self.failures[number]) is not None:
                    raise failure
                return BASE + number
            finally:
                self.busy -= 1

        return make


Tasks = list["asyncio.Task[Made]"]


def all_ask(users: list[User], kitchen: Kitchen) -> Tasks:
    """Tasks of all users, numbered; who of them comes first is left open."""
    return [
        asyncio.create_task(user.get_or_put("a", kitchen.maker(number)))
        for number, user in enumerate(users)
    ]


async def one_after_another(
    owner: featcache.FeatureCache, users: list[User], kitchen: Kitchen
) -> Tasks:
    """As `all_ask`, but each comes before the next; return when one makes and the others wait."""
    tasks = []
    before = seeking(owner) + claims(owner)
    for number, user in enumerate(users, 1):
        tasks.append(asyncio.create_task(user.get_or_put("a", kitchen.maker(number - 1))))
        await until(lambda: seeking(owner) + claims(owner) >= before + number)  # noqa: B023 - awaited here
    await until(lambda: kitchen.busy == 1)
    return tasks


# --- one makes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 3], ids=["the owner", "a client", "the last client"])
async def test_one_makes_for_all(first: int) -> None:
    async with party(3) as (owner, clients):
        users: list[User] = [owner, *clients]
        users = users[first:] + users[:first]
        kitchen = Kitchen()
        tasks = await one_after_another(owner, users * 6, kitchen)
        assert (claims(owner), seeking(owner)) == (1, 23)
        assert kitchen.count == 1
        kitchen.go.set()
        for task in tasks:
            assert same(await task, BASE)
        assert (kitchen.count, owner.statistics().puts) == (1, 1)
        for user in users:  # and who comes later finds it
            assert same(await user.get_or_put("a", kitchen.maker("late")), BASE)
            assert same(await user.get("a"), BASE)
        assert kitchen.count == 1
        await nothing_lost(owner)


async def test_each_key_is_made_by_one_at_once() -> None:
    async with party(3, slots=256) as (owner, clients):
        users: list[User] = [owner, *clients]
        made: list[int] = []

        async def ask(user: User, key: int) -> None:
            async def make() -> torch.Tensor:
                made.append(key)
                await asyncio.sleep(0)
                return filled(1000, key)

            assert same(await user.get_or_put(f"{key}", make), filled(1000, key))

        await asyncio.gather(*(ask(user, key) for key in range(50) for user in users * 2))
        assert sorted(made) == list(range(50))
        await nothing_lost(owner)


async def test_again_and_again_while_it_is_evicted() -> None:
    """Whatever the moment of an eviction: never two at once for one key, and none gets nothing."""
    async with party(2) as (owner, clients):
        users: list[User] = [owner, *clients]
        kitchen = Kitchen()
        kitchen.go.set()

        async def ask(user: User) -> None:
            for _ in range(40):
                found = tensor(await user.get_or_put("a", kitchen.maker(user)))
                assert torch.equal(found, BASE + int(found[0]))

        async def evict() -> None:
            for _ in range(60):
                await steps(3)
                await clients[0].evict("a")

        await asyncio.gather(*(ask(user) for user in users), evict())
        assert kitchen.most == 1
        assert owner.statistics().puts == kitchen.count
        await nothing_lost(owner)


async def test_what_make_may_return(place: Place) -> None:
    """A feature or an awaitable of one; what comes back is contiguous and where it was asked for."""
    async with place.open() as (owner, reader):
        feature = {"pixels": BASE.view(24, 30).T, "grid": torch.tensor([[1, 4, 6]])}

        async def later() -> Made:
            return feature

        makes: list[Callable[[], Made | Awaitable[Made]]] = [
            lambda: feature,
            later,
            lambda: asyncio.ensure_future(later()),
        ]
        for number, make in enumerate(makes):
            made = tensors(await reader.get_or_put(f"{number}", make))
            for found in (made, tensors(await reader.get_or_put(f"{number}", make))):
                for name, value in feature.items():
                    assert same(found[name], value)
                    assert found[name].is_contiguous()
        for device in ("cpu", None):
            there = tensor(
                await reader.get_or_put("bare", lambda: BASE.to(place.slab.device), device=device)
            )
            again = tensor(await reader.get_or_put("bare", lambda: 1 / 0, device=device))  # type: ignore[arg-type,return-value]
            assert same(again, BASE)
            assert same(there, BASE)
            if device is not None:
                assert there.device.type == again.device.type == device
        for key in ("0", "1", "2", "bare"):
            assert await reader.evict(key)
        await until(lambda: owner.statistics().slots_used == 0)


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_what_make_may_not_return(who: str) -> None:
    async with pair() as both:
        user: User = both[who == "client"]
        wrongs: list[Any] = [None, [1.0], {}, BASE.to_sparse()]
        for wrong in wrongs:
            with pytest.raises(SettingsError):
                await user.get_or_put("a", lambda: wrong)  # noqa: B023 - called here
        await until(lambda: not claims(both[0]))
        await spent(both[0])


async def test_make_may_use_the_cache_itself() -> None:
    async with party(2) as (owner, (one, two)):

        async def whole() -> torch.Tensor:
            half = tensor(await one.get_or_put("half", lambda: BASE))
            await one.put(half, key="also")
            return half * 2

        found = await asyncio.gather(
            *(user.get_or_put("whole", whole) for user in (one, two, owner))
        )
        for feature in found:
            assert same(feature, BASE * 2)
        assert owner.statistics().keys == 3
        await nothing_lost(owner)


# --- one that fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1], ids=["the owner", "a client"])
async def test_an_error_is_its_makers_and_the_next_makes(first: int) -> None:
    """One after the other as they came, each with its own error, until one succeeds."""
    errors = [ZeroDivisionError("first"), FeatcacheError("second"), TimeoutError("third")]
    async with party(3) as (owner, clients):
        users: list[User] = [owner, *clients]
        users = users[first:] + users[:first]
        kitchen = Kitchen(*errors)
        tasks = await one_after_another(owner, users * 3, kitchen)
        kitchen.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert kitchen.order == [0, 1, 2, 3], "each of those that wait in its turn"
        assert results[:3] == errors
        for result in results[3:]:
            assert isinstance(result, torch.Tensor)
            assert same(result, BASE + 3)
        assert kitchen.most == 1
        await nothing_lost(owner)


async def test_all_fail() -> None:
    async with party(2) as (owner, clients):
        kitchen = Kitchen(*(ZeroDivisionError(f"{n}") for n in range(9)))
        tasks = await one_after_another(owner, [owner, *clients] * 3, kitchen)
        waiting = asyncio.create_task(clients[0].get("a", timeout=20))
        await sought(owner, 9)
        kitchen.go.set()
        for number, task in enumerate(tasks):
            with pytest.raises(ZeroDivisionError, match=f"^{number}$"):
                await task
        assert kitchen.count == 9
        assert kitchen.most == 1
        await until(lambda: not claims(owner))
        assert seeking(owner) == 1, "who only waits does not make"
        await clients[1].put(BASE, key="a")
        assert same(await waiting, BASE)
        await nothing_lost(owner)


def fails_at_once() -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_make_that_is_no_coroutine_fails(who: str) -> None:
    async with pair() as both:
        user: User = both[who == "client"]
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await user.get_or_put("a", fails_at_once)
        assert same(await user.get_or_put("a", lambda: BASE), BASE)
        await nothing_lost(both[0])


async def test_one_that_is_too_large_for_the_pool() -> None:
    async with party(2, **ONE) as (owner, (one, two)):
        users: list[User] = [one, owner, two]
        sizes = iter([CAPACITY + 1, 2 * CAPACITY, CAPACITY])
        results = await asyncio.gather(
            *(user.get_or_put("a", lambda: filled(next(sizes), 7)) for user in users),
            return_exceptions=True,
        )
        kinds = [type(result) for result in results]
        assert sorted(kinds, key=str) == sorted(
            [FeatureTooLarge, FeatureTooLarge, torch.Tensor], key=str
        )
        assert same(await owner.get("a"), filled(CAPACITY, 7))
        await nothing_lost(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_maker_that_is_cancelled_hands_over(kind: str, who: str) -> None:
    async with party(2) as (owner, (one, two)):
        user: User = owner if who == "owner" else one
        kitchen = Kitchen()
        doomed = Cancellable(kind, lambda: user.get_or_put("a", kitchen.maker("doomed")))
        await until(lambda: kitchen.count == 1)
        tasks = await one_after_another(owner, [two, owner], kitchen)
        doomed.cancel()
        await doomed.wait()
        assert (doomed.result, doomed.error) == (None, None)
        await until(lambda: kitchen.count == 2)
        kitchen.go.set()
        for task in tasks:
            assert same(await task, BASE + 1)
        assert kitchen.order == ["doomed", 0]
        await nothing_lost(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_one_is_cancelled_at_any_moment(kind: str, no_leaks: None) -> None:
    """Waiting, chosen, told, making, putting, done: another then makes, once, and none waits for ever."""
    async with party(3) as (owner, clients):
        users: list[User] = [owner, *clients]
        for turns, user in itertools.product(range(16), users[:2]):
            kitchen = Kitchen(ZeroDivisionError())
            kitchen.go.set()
            asking = all_ask(users[2:3], kitchen)  # who fails first, and hands over
            doomed = Cancellable(kind, lambda: user.get_or_put("a", kitchen.maker("doomed")))  # noqa: B023 - awaited here
            asking += all_ask(users, kitchen)
            await steps(turns)
            doomed.cancel()
            await doomed.wait()
            for result in await asyncio.gather(*asking, return_exceptions=True):
                assert isinstance(result, torch.Tensor | ZeroDivisionError)
            assert kitchen.most == 1
            await nothing_lost(owner)


@pytest.mark.parametrize("stage", ["makes", "puts"])
async def test_a_maker_that_leaves_hands_over(stage: str, no_leaks: None) -> None:
    async with party(2, **ONE) as (owner, (leaving, other)):
        kitchen = Kitchen()
        in_the_way = await owner.put(filled(CAPACITY)) if stage == "puts" else None
        doomed = asyncio.create_task(leaving.get_or_put("a", kitchen.maker("leaving")))
        await until(lambda: kitchen.count == 1)
        tasks = await one_after_another(owner, [other, owner], kitchen)
        if in_the_way is not None:
            kitchen.go.set()
            await queued(owner, 1)
        await leaving.aclose()
        await until(lambda: kitchen.count == 2)
        kitchen.go.set()
        if in_the_way is not None:
            await owner.discard(in_the_way)
        for task in tasks:
            assert same(await task, BASE + 1)
        with pytest.raises((CacheClosed, OwnerLost)):
            await doomed
        assert kitchen.order == ["leaving", 0]
        await nothing_lost(owner)


async def test_one_that_waits_leaves() -> None:
    async with party(2) as (owner, (leaving, other)):
        kitchen = Kitchen(ZeroDivisionError())
        tasks = await one_after_another(owner, [owner, leaving, leaving, other], kitchen)
        await leaving.aclose()
        for task in tasks[1:3]:
            with pytest.raises((CacheClosed, OwnerLost)):
                await task
        kitchen.go.set()
        with pytest.raises(ZeroDivisionError):
            await tasks[0]
        assert same(await tasks[3], BASE + 1)
        assert kitchen.order == [0, 3]
        await nothing_lost(owner)


# --- others that put or wait ---------------------------------------------------------------------


@pytest.mark.parametrize("putter", ["owner", "client"])
async def test_a_plain_put_serves_all_who_wait(putter: str) -> None:
    async with party(2) as (owner, (one, two)):
        by: User = owner if putter == "owner" else two
        kitchen = Kitchen()
        tasks = await one_after_another(owner, [one, owner, two, one], kitchen)
        getting = asyncio.create_task(two.get("a", timeout=20))
        await sought(owner, 4)
        await by.put(BASE * 5, key="a")
        for task in (*tasks[1:], getting):
            assert same(await task, BASE * 5)
        assert not tasks[0].done()
        kitchen.go.set()
        assert same(await tasks[0], BASE), "who makes has what it made"
        assert same(await two.get("a"), BASE), "which then is what the key stands for"
        assert kitchen.count == 1
        await nothing_lost(owner)


async def test_who_asks_while_it_is_made_again_waits_for_that() -> None:
    """Put by another and evicted while it is being made: the one who makes it still is the one."""
    async with pair() as (owner, client):
        kitchen = Kitchen()
        making = all_ask([owner], kitchen)
        await until(lambda: kitchen.count == 1)
        await client.put(BASE * 5, key="a")
        await client.evict("a")
        asking = await one_after_another(owner, [client, owner], kitchen)
        kitchen.go.set()
        for task in (*making, *asking):
            assert same(await task, BASE)
        assert kitchen.count == 1
        await nothing_lost(owner)


async def test_who_only_waits_is_served_and_never_makes() -> None:
    async with party(2) as (owner, (one, two)):
        getting = [asyncio.create_task(user.get("a", timeout=20)) for user in (owner, one, two)]
        await sought(owner, 3)
        kitchen = Kitchen(ZeroDivisionError())
        tasks = await one_after_another(owner, [one, two], kitchen)
        kitchen.go.set()
        with pytest.raises(ZeroDivisionError):
            await tasks[0]
        for task in (tasks[1], *getting):
            assert same(await task, BASE + 1)
        assert kitchen.order == [0, 1]
        await nothing_lost(owner)


async def test_room_is_waited_for_before_others_are_served() -> None:
    async with pair(**ONE) as (owner, client):
        ref = await owner.put(filled(CAPACITY))
        tasks = [
            asyncio.create_task(user.get_or_put("a", lambda: filled(CAPACITY, 3)))
            for user in (client, owner, client)
        ]
        await queued(owner, 1)
        await sought(owner, 2)
        assert not any(task.done() for task in tasks)
        await owner.discard(ref)
        for task in tasks:
            assert same(await task, filled(CAPACITY, 3))
        await nothing_lost(owner)


# --- time and bounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_the_timeout_is_of_waiting_for_another(who: str) -> None:
    async with party(2) as (owner, (one, two)):
        user: User = owner if who == "owner" else one
        kitchen = Kitchen()
        making = asyncio.create_task(two.get_or_put("a", kitchen.maker("two"), timeout=0.02))
        await until(lambda: kitchen.count == 1)
        with pytest.raises(KeyTimeout, match=r"made it within 0\.02 s"):
            await user.get_or_put("a", kitchen.maker("hasty"), timeout=0.02)
        await until(lambda: not seeking(owner))
        # Who makes has as long as it likes: its time is past by now.
        kitchen.go.set()
        assert same(await making, BASE)
        assert kitchen.count == 1
        await until(lambda: not in_progress(owner))
        await nothing_lost(owner)


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_timeout_of_nothing_makes_or_finds_but_does_not_wait(who: str) -> None:
    async with party(2) as (owner, (one, two)):
        user: User = owner if who == "owner" else one
        assert same(await user.get_or_put("a", lambda: BASE, timeout=0), BASE)
        assert same(await user.get_or_put("a", lambda: filled(1), timeout=0), BASE)
        kitchen = Kitchen()
        making = asyncio.create_task(two.get_or_put("b", kitchen.maker("two"), timeout=0))
        await until(lambda: kitchen.count == 1)
        with pytest.raises(KeyTimeout):
            await user.get_or_put("b", kitchen.maker("hasty"), timeout=0)
        kitchen.go.set()
        assert same(await making, BASE)
        assert same(await user.get_or_put("b", lambda: filled(1), timeout=0), BASE)
        assert kitchen.count == 1
        await nothing_lost(owner)


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_deadline_of_the_callers_own(who: str) -> None:
    async with pair() as both:
        user: User = both[who == "client"]
        kitchen = Kitchen()
        with anyio.move_on_after(0.02) as scope:
            await user.get_or_put("a", kitchen.maker("slow"))
        assert scope.cancelled_caught
        await until(lambda: not claims(both[0]))
        assert same(await user.get_or_put("a", lambda: BASE), BASE)
        await nothing_lost(both[0])


async def test_who_would_make_is_let_in_however_many_wait() -> None:
    async with pair(waiters=1) as (owner, client):
        getting = asyncio.create_task(owner.get("b", timeout=20))
        await sought(owner, 1)
        kitchen = Kitchen()
        (making,) = all_ask([client], kitchen)
        await until(lambda: kitchen.count == 1)
        with pytest.raises(PoolFull, match="waiters"):
            await owner.get_or_put("a", kitchen.maker("late"))
        kitchen.go.set()
        assert same(await making, BASE)
        await owner.put(BASE, key="b")
        await getting
        await nothing_lost(owner)


# --- ends ----------------------------------------------------------------------------------------


async def test_the_owner_closes_while_some_make_and_others_wait(no_leaks: None) -> None:
    async with party(2) as (owner, (one, two)):
        kitchen, other = Kitchen(), Kitchen()
        tasks = await one_after_another(owner, [one, owner, two], kitchen)
        tasks.append(asyncio.create_task(owner.get_or_put("b", other.maker("owner"))))
        await until(lambda: claims(owner) == 2)
        await owner.aclose()
        kitchen.go.set()
        other.go.set()
        for task, error in zip(
            tasks, (OwnerLost, CacheClosed, OwnerLost, CacheClosed), strict=True
        ):
            with pytest.raises(error):
                await task


async def test_grants_are_as_many_as_were_served() -> None:
    async with party(2) as (owner, clients):
        kitchen = Kitchen()
        tasks = await one_after_another(owner, [owner, *clients] * 5, kitchen)
        kitchen.go.set()
        await asyncio.gather(*tasks)
        await until(lambda: grants(owner) == 0)
        now = owner.statistics()
        assert (now.misses, now.puts, now.keys) == (15, 1, 1)
        assert now.reads_paid == 14
        await nothing_lost(owner)
