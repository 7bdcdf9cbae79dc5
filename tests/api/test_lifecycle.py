"""One life for caches and clients, with and without a loop: NEW, OPENING, OPEN, CLOSED."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import featcache
from featcache import CacheClosed, FeatureCache, FeatureClient, OwnerUnreachable
from support.caches import KIB, filled, small, tensor, until

pytestmark = pytest.mark.usefixtures("no_leaks")

Opens = FeatureCache | FeatureClient


@asynccontextmanager
async def owned() -> AsyncIterator[FeatureCache]:
    async with featcache.create(settings=small()) as owner:
        yield owner


def made(kind: str, owner: FeatureCache) -> Opens:
    if kind == "owner":
        return featcache.create(settings=small())
    return featcache.connect(owner.endpoint, settings=small())


def is_open(one: Any) -> bool:
    """Asked through a function, since mypy takes the property for one that does not change."""
    return bool(one.is_open)


KINDS = pytest.mark.parametrize("kind", ["owner", "client"])


@KINDS
async def test_of_two_that_open_at_once_the_second_fails(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        first, second = await asyncio.gather(one.open(), one.open(), return_exceptions=True)
        assert first is one
        assert isinstance(second, CacheClosed)
        assert "opens once" in str(second)
        assert is_open(one)
        if kind == "client":
            assert owner.statistics().sessions == 1
        await one.aclose()
        await until(lambda: owner.statistics().sessions == 0)


async def test_a_named_client_that_opens_twice_at_once_keeps_its_name() -> None:
    async with owned() as owner:
        client = featcache.connect(owner.endpoint, name="tp0", settings=small())
        opened = await asyncio.gather(client.open(), client.open(), return_exceptions=True)
        assert sum(result is client for result in opened) == 1
        ref = await owner.put(filled(KIB), readers=["tp0"])
        assert tensor(await client.get(ref)).numel() == KIB
        await client.aclose()


@KINDS
@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16])
async def test_closed_while_it_opens_it_ends_closed(kind: str, turns: int) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        early = not turns  # before its first step it is still new, and opens after this
        await one.aclose()
        (result,) = await asyncio.gather(opening, return_exceptions=True)
        if early:
            await one.aclose()
        else:
            assert isinstance(result, CacheClosed) or result is one
        assert not is_open(one)
        with pytest.raises(CacheClosed):
            await one.open()
        await until(lambda: owner.statistics().sessions == 0)


@KINDS
async def test_an_open_that_is_closed_meanwhile_says_so(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        await asyncio.sleep(0)
        await one.aclose()
        with pytest.raises(CacheClosed, match="was closed"):
            await opening
        with pytest.raises(CacheClosed, match="was closed"):
            one.statistics()


@KINDS
async def test_an_open_that_is_cancelled_can_be_tried_again(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        opening = asyncio.ensure_future(one.open())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert not is_open(one)
        await one.open()
        assert is_open(one)
        await one.aclose()
        await until(lambda: owner.statistics().sessions == 0)


async def test_an_open_that_fails_can_be_tried_again() -> None:
    async with owned() as owner:
        endpoint = owner.endpoint
    client = featcache.connect(endpoint, settings=small(attach_timeout=0.05))
    for _ in range(2):
        with pytest.raises(OwnerUnreachable):
            await client.open()
        assert not is_open(client)
    async with featcache.create(endpoint=endpoint, settings=small()):
        await client.open()
        await client.aclose()


@KINDS
async def test_closing_what_was_never_opened_leaves_it_new(kind: str) -> None:
    async with owned() as owner:
        one = made(kind, owner)
        await one.aclose()
        async with one:
            assert is_open(one)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: featcache.blocking.create(settings=small()),
        lambda endpoint: featcache.blocking.connect(endpoint, settings=small()),
    ],
    ids=["owner", "client"],
)
def test_threads_that_open_one_object_at_once(
    make: Callable[[str], featcache.blocking.FeatureCache | featcache.blocking.FeatureClient],
) -> None:
    with featcache.blocking.create(settings=small()) as owner:
        one, start = make(owner.endpoint), threading.Barrier(4)
        results: list[BaseException | None] = []

        def run() -> None:
            start.wait()
            try:
                one.open()
                results.append(None)
            except CacheClosed as error:
                results.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count(None) == 1
        assert len(results) == 4
        assert is_open(one)
        one.close()
        one.close()
        assert not is_open(one)
        with pytest.raises(CacheClosed):
            one.open()


def test_the_public_objects_have_the_api_and_nothing_else() -> None:
    shared = {
        *("open", "aclose", "is_open", "statistics", "get", "get_nowait", "borrow", "release"),
        *("discard", "put", "get_or_put", "contains", "evict", "pin", "unpin"),
    }
    blocking = shared - {"aclose"} | {"close"}

    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(FeatureCache) == shared | {"endpoint", "pressure", "put_nowait"}
    assert public(FeatureClient) == shared
    assert public(featcache.blocking.FeatureCache) == blocking | {
        *("endpoint", "pressure", "put_nowait"),
    }
    assert public(featcache.blocking.FeatureClient) == blocking
