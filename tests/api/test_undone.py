"""Ends that are cancelled, or that fail half way: all is undone, once, and the first error is told."""

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import featcache
from featcache import FeatureCache, FeatureClient
from featcache.client.registry import ConnectionRegistry
from featcache.control.link import Link
from featcache.owner.owner import Owner
from featcache.owner.served_pool import ServedPool
from featcache.pool.growth import Growth
from support.caches import KIB, filled, pair, small, steps, until

pytestmark = pytest.mark.usefixtures("no_leaks")


class Slow:
    """A step that stands still until told, in place of another that it then takes."""

    def __init__(self, patch: pytest.MonkeyPatch, holder: type, name: str) -> None:
        self.begun = self.done = 0
        self.go_on = asyncio.Event()
        step = getattr(holder, name)

        async def slow(*arguments: Any) -> Any:
            self.begun += 1
            await self.go_on.wait()
            await step(*arguments)
            self.done += 1

        patch.setattr(holder, name, slow)


class Hangs:
    """A step that never ends."""

    begun = False

    async def __call__(self, *_: Any, **__: Any) -> None:
        self.begun = True
        await asyncio.Event().wait()


def cancels(opening: "asyncio.Task[Any]", _: Any) -> None:
    opening.cancel()


def closes(_: Any, one: Any) -> None:
    task = asyncio.ensure_future(one.aclose())
    task.add_done_callback(lambda done: done.exception())


ENDS: list[Callable[[Any, Any], None]] = [cancels, closes]


@pytest.mark.parametrize("second", ENDS)
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("kind", ["owner", "client"])
async def test_an_open_that_is_ended_twice_is_undone_once_and_wholly(
    kind: str,
    first: Callable[[Any, Any], None],
    second: Callable[[Any, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with featcache.create(settings=small()) as other:
        one: FeatureCache | FeatureClient
        hangs = Hangs()
        if kind == "owner":
            monkeypatch.setattr(Owner, "host_pool", hangs)
            undo = Slow(monkeypatch, Owner, "_take_down")
            one = featcache.create(settings=small(), spill=64 * KIB)
        else:
            monkeypatch.setattr("featcache.client.registry.map_pool", hangs)
            undo = Slow(monkeypatch, ConnectionRegistry, "close")
            one = featcache.connect(other.endpoint, name="tp0")
        opening = asyncio.ensure_future(one.open())
        await until(lambda: hangs.begun)
        first(opening, one)
        await until(lambda: undo.begun)
        for _ in range(3):
            second(opening, one)
            await steps(3)
        assert not opening.done(), "it left its undo behind"
        undo.go_on.set()
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError | featcache.CacheClosed)
        assert undo.done
        await until(lambda: not other.statistics().sessions)
        monkeypatch.undo()


async def test_a_close_that_is_cancelled_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with featcache.create(settings=small()) as owner:
        client = await featcache.connect(owner.endpoint, name="tp0").open()
        goodbye = Slow(monkeypatch, Link, "goodbye")
        closing = asyncio.ensure_future(client.aclose())
        await until(lambda: goodbye.begun)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        again = asyncio.ensure_future(client.aclose())
        await steps(3)
        assert not again.done(), "it is not closed yet"
        goodbye.go_on.set()
        await again
        assert goodbye.done == 1
        await until(lambda: not owner.statistics().sessions)


async def test_blocks_that_end_in_a_scope_that_is_cancelled() -> None:
    """There each await raises at once, also those of the end of the block."""
    async with featcache.create(settings=small()) as owner:
        with anyio.CancelScope() as scope:
            async with (
                featcache.connect(owner.endpoint, name="tp0") as client,
                featcache.create(settings=small(), spill=64 * KIB) as other,
                featcache.connect(other.endpoint) as another,
            ):
                await client.get(await owner.put(filled(KIB)))
                await another.get(await other.put(filled(KIB)))
                scope.cancel()
                await anyio.sleep_forever()
        await until(lambda: not owner.statistics().sessions)
        await until(lambda: not [task for task in asyncio.all_tasks() if "aclose" in repr(task)])


async def test_one_connection_that_fails_to_close_keeps_no_other_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair(name="tp0") as (owner, _), featcache.create(settings=small()) as other:
        client = await featcache.connect(name="tp1").open()
        for one in (owner, other):
            await client.get(await one.put(filled(KIB)))
        goodbye, told = Link.goodbye, []

        async def fails(link: Link) -> None:
            await goodbye(link)
            told.append(link.endpoint)
            raise RuntimeError(f"number {len(told)}")

        with monkeypatch.context() as patch:
            patch.setattr(Link, "goodbye", fails)
            with pytest.raises(RuntimeError, match="number 1"):
                await client.aclose()
        assert set(told) == {owner.endpoint, other.endpoint}
        await until(lambda: owner.statistics().sessions == 1 and not other.statistics().sessions)


async def test_a_main_pool_that_fails_to_close_closes_the_spill_pool_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = await featcache.create(settings=small(), spill=64 * KIB).open()
    aclose, closed = ServedPool.aclose, []

    async def fails(pool: ServedPool) -> None:
        await aclose(pool)
        closed.append(pool)
        raise RuntimeError(f"pool {len(closed)}")

    with monkeypatch.context() as patch:
        patch.setattr(ServedPool, "aclose", fails)
        with pytest.raises(RuntimeError, match="pool 1"):
            await one.aclose()
    assert len(closed) == 2
    closed.clear()


async def test_a_pool_whose_first_step_fails_takes_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = await featcache.create(settings=small()).open()

    async def fails(_: Growth) -> None:
        raise RuntimeError("the growth")

    with monkeypatch.context() as patch:
        patch.setattr(Growth, "drain", fails)
        with pytest.raises(RuntimeError, match="the growth"):
            await one.aclose()
