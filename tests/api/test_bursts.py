"""Thousands of calls of one client at once: all are answered, and none ends its session."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from api.support import KIB, MIB, filled, pair, tensor, until
from featcache import (
    CacheClosed,
    FeatureClient,
    KeyTimeout,
    OwnerLost,
    PutTimeout,
    Settings,
    by_key,
    remote_keys,
    remote_writer,
)
from featcache.control import asking

MANY = 3000
"""More than a socket's buffer has room for, either way."""
MORE = 4096 + 500
"""More than may be unanswered."""
ROOMY: dict[str, Any] = {"capacity": 4 * MIB, "slots": 4096}

Call = Callable[[FeatureClient, int], Awaitable[Any]]


async def borrowed(client: FeatureClient, _: int) -> Any:
    async with client.borrow("a") as feature:
        return tensor(feature).shape


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda client, _: client.get("a"), MANY),
        (borrowed, MANY),
        (lambda client, _: client.get_or_put("b", lambda: filled(100)), MANY),
        (lambda client, _: client.contains("a"), MORE),
        (lambda client, n: client.evict(str(n)), MANY),
        (lambda client, n: client.put(filled(10), key=str(n)), MANY),
    ],
    ids=["get", "borrow", "get_or_put", "contains", "evict", "put"],
)
async def test_all_are_answered(call: Call, count: int) -> None:
    async with pair(**ROOMY) as (owner, client):
        await client.put(filled(10, 3), key="a")
        assert len(await asyncio.gather(*(call(client, n) for n in range(count)))) == count
        assert await client.contains("a")
        assert owner.statistics().sessions == 1
        await until(lambda: not owner._opened().pool.pages[1].grants)


async def test_all_that_wait_for_one_key_get_it() -> None:
    async with pair(**ROOMY) as (owner, client):
        waiting = [asyncio.create_task(client.get("a", timeout=30)) for _ in range(MANY)]
        await until(lambda: owner._opened().pool.store.seekers.count == MANY)
        await owner.put(filled(10, 3), key="a")
        for feature in await asyncio.gather(*waiting):
            assert torch.equal(tensor(feature), filled(10, 3))


async def test_all_that_wait_for_room_get_it() -> None:
    async with pair(**ROOMY) as (owner, client):
        whole = await owner.put(filled(4 * MIB))
        waiting = [asyncio.create_task(client.put(filled(10), key=str(n))) for n in range(MANY)]
        await until(lambda: owner.statistics().waiters == MANY)
        await client.release(whole)
        await asyncio.gather(*waiting)
        assert owner.statistics().keys == MANY


async def test_what_comes_through_the_host_stands_in_line() -> None:
    async with pair(**ROOMY, through_host=True) as (owner, client):
        refs = [await owner.put(filled(KIB, n % 251)) for n in range(300)]
        features = await asyncio.gather(*(client.get(ref) for ref in refs))
        for n, feature in enumerate(features):
            assert tensor(feature)[0] == n % 251
        assert owner.statistics().relayed == 300


# --- more than may be unanswered -----------------------------------------------------------------


async def ask_for_nothing(client: FeatureClient, count: int) -> list["asyncio.Task[Any]"]:
    """So many askings for what does not come, of which all that may are under way."""
    tasks = [asyncio.create_task(client.get("never", timeout=60)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many may be unanswered, in this test."""
    monkeypatch.setattr(asking, "MAX_REQUESTS", 10)
    return 10


async def test_one_more_waits_for_an_answer(few: int) -> None:
    async with pair() as (owner, client):
        await owner.put(filled(1), key="a")
        tasks = await ask_for_nothing(client, few)
        late = asyncio.create_task(client.contains("a"))
        await until(lambda: owner._opened().pool.store.seekers.count == few)
        assert not late.done()
        tasks[0].cancel()
        assert await late
        for task in tasks:
            task.cancel()


async def test_a_place_that_came_to_one_who_gave_up_goes_to_the_next(few: int) -> None:
    async with pair() as (owner, client):
        await owner.put(filled(1), key="a")
        tasks = await ask_for_nothing(client, few)
        first, second = (asyncio.create_task(client.contains("a")) for _ in range(2))
        await until(lambda: owner._opened().pool.store.seekers.count == few)
        assert client._handles is not None, "open"
        (link,) = (handle.link for handle in client._handles.handles)
        link._pass_on()
        first.cancel()
        await asyncio.sleep(0)
        tasks[0].cancel()
        assert await second
        assert first.cancelled()
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize("who", ["client", "owner"])
async def test_who_waits_to_ask_hears_of_the_end(few: int, who: str) -> None:
    async with pair() as (owner, client):
        tasks = await ask_for_nothing(client, 3 * few)
        await until(lambda: owner._opened().pool.store.seekers.count == few)
        await (client if who == "client" else owner).aclose()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {CacheClosed if who == "client" else OwnerLost}


# --- an owner that does not answer ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda client: client.get("b", timeout=0), KeyTimeout),
        (lambda client: client.get_or_put("b", lambda: filled(1), timeout=0), KeyTimeout),
        (lambda client: client.put(filled(1), timeout=0), PutTimeout),
    ],
    ids=["get", "get_or_put", "put"],
)
async def test_who_does_not_want_to_wait_does_not_wait_for_ever(
    call: Callable[[FeatureClient], Awaitable[Any]],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (by_key, remote_keys, remote_writer):
        monkeypatch.setattr(module, "AT_ONCE_S", 0.01)
    async with pair() as (owner, client):
        await client.put(filled(1), key="a")
        with monkeypatch.context() as busy:
            busy.setattr(owner._opened().main.server._requests, "take", lambda *_: None)
            with pytest.raises(error):
                await call(client)


def test_as_many_reads_may_be_out_as_requests_unanswered() -> None:
    assert Settings().grants >= asking.MAX_REQUESTS
