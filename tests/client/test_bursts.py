"""Thousands of calls of one client at once: all are answered, and none ends its session."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

import featcache
from featcache import (
    CacheClosed,
    FeatureClient,
    KeyTimeout,
    OwnerLost,
    PoolFull,
    PutTimeout,
    Settings,
    SettingsError,
)
from featcache.control import pending
from featcache.control.turns import FRAME_UNITS
from support.caches import KIB, MIB, filled, pair, small, steps, tensor, until
from support.keyed import nothing_lost, pool_of, sought

MANY = 3000
"""More than a socket's buffer has room for, either way."""
MORE = 2 * pending.MAX_IN_FLIGHT + 500
"""More than may be unanswered."""
ROOMY: dict[str, Any] = {"capacity": 4 * MIB, "slots": 4096}

Call = Callable[[FeatureClient, int], Awaitable[Any]]


async def borrowed(client: FeatureClient, _: int) -> Any:
    async with client.borrow("a") as feature:
        return tensor(feature).shape


async def test_what_a_look_between_turns_has_no_units_for_is_handled_later() -> None:
    """It was read from the socket, which is not readable for it any more."""
    async with pair(**ROOMY) as (owner, client):
        refs = await client.put_many([filled(10)] * 40)
        (connection,) = client._opened().registry.connections
        for ref in refs:
            connection.link.undo_soon(ref.slot, ref.generation)
        far = owner._opened().main.server.sessions[1].channel
        assert far.read_rest(far._turn.left - 2 * FRAME_UNITS)
        owing = pool_of(owner).store.owing
        assert 0 < len(owing) < 40
        await until(lambda: not owing)
        await nothing_lost(owner)


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda client, _: client.get("a"), MORE),
        (borrowed, MANY),
        (lambda client, _: client.get_or_put("b", lambda: filled(100)), MORE),
        (lambda client, _: client.contains("a"), MORE),
        (lambda client, n: client.evict(str(n)), MANY),
        (lambda client, n: client.put(filled(10), key=str(n % 500)), MORE),
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
        await sought(owner, min(MANY, pending.MAX_IN_FLIGHT))
        await owner.put(filled(10, 3), key="a")
        for feature in await asyncio.gather(*waiting):
            assert torch.equal(tensor(feature), filled(10, 3))


async def test_all_that_wait_for_room_get_it() -> None:
    async with pair(**ROOMY) as (owner, client):
        whole = await owner.put(filled(4 * MIB))
        waiting = [asyncio.create_task(client.put(filled(10), key=str(n))) for n in range(MANY)]
        await until(lambda: owner.statistics().waiters == min(MANY, pending.MAX_IN_FLIGHT))
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


# --- more of a kind than may be unanswered -------------------------------------------------------


async def seek_in_vain(client: FeatureClient, count: int) -> list["asyncio.Task[Any]"]:
    """So many askings for what does not come, of which all that may are under way."""
    tasks = [asyncio.create_task(client.get("never", timeout=60)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many of a kind may be unanswered, in this test."""
    monkeypatch.setattr(pending, "MAX_IN_FLIGHT", 10)
    return 10


@pytest.mark.usefixtures("no_key_table")
async def test_one_more_waits_for_an_answer(few: int) -> None:
    async with pair() as (owner, client):
        await owner.put(filled(1), key="a")
        tasks = await seek_in_vain(client, few)
        late = asyncio.create_task(client.get("a"))
        await sought(owner, few)
        assert not late.done()
        tasks[0].cancel()
        await late
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await nothing_lost(owner)


@pytest.mark.usefixtures("no_key_table")
async def test_they_are_served_as_they_came(few: int) -> None:
    async with pair() as (owner, client):
        await owner.put(filled(1), key="a")
        tasks = await seek_in_vain(client, few)
        order: list[int] = []

        async def get(n: int) -> None:
            await client.get("a")
            order.append(n)

        late = [asyncio.create_task(get(n)) for n in range(8)]
        await sought(owner, few)
        late[3].cancel()
        await client.contains("a")  # of another kind: it waits for none of them
        assert not order
        for task in tasks:
            task.cancel()
        await asyncio.gather(*late, *tasks, return_exceptions=True)
        assert order == [0, 1, 2, 4, 5, 6, 7]


async def test_whoever_asks_in_vain_leaves_nothing_in_the_line(few: int) -> None:
    async with pair() as (owner, client):
        tasks = await seek_in_vain(client, few)
        await sought(owner, few)
        for _ in range(5):
            with pytest.raises(KeyTimeout):
                await client.get("b", timeout=0.001)
        tasks[0].cancel()
        with pytest.raises(KeyTimeout):
            await client.get("b", timeout=0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await nothing_lost(owner)


async def test_a_question_that_is_too_long_keeps_no_place(few: int) -> None:
    async with pair(message_bytes=1024) as (owner, client):
        for _ in range(2 * few):
            with pytest.raises(SettingsError, match="message_bytes"):
                await client.put(filled(1), key="k" * 1020)
        await client.put(filled(1), key="a")
        await client.get("a")
        await nothing_lost(owner)


async def test_the_maker_does_not_stand_behind_those_that_wait_for_it(few: int) -> None:
    async with pair() as (owner, client):

        async def make() -> torch.Tensor:
            await sought(owner, few - 1)  # all that may ask do, and more stand in line
            return filled(1, 7)

        made = await asyncio.gather(*(client.get_or_put("a", make) for _ in range(4 * few)))
        assert all(tensor(feature)[0] == 7 for feature in made)
        await nothing_lost(owner)


async def test_a_put_does_not_stand_behind_those_that_wait_for_its_room(few: int) -> None:
    async with pair(capacity=4 * KIB, segment=4 * KIB) as (owner, client):

        async def pass_on(n: int) -> None:
            ref = await client.put(filled(KIB, n))
            assert tensor(await client.get(ref))[0] == n

        await asyncio.gather(*(pass_on(n) for n in range(8 * few)))
        await nothing_lost(owner)


async def test_a_put_that_is_cancelled_among_many_leaves_no_slot(few: int) -> None:
    async with pair(inline_bytes=0) as (owner, client):
        tasks = await seek_in_vain(client, 3 * few)
        for turns in range(12):
            task = asyncio.create_task(client.put(filled(KIB)))
            await steps(turns)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await client.release(await task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await nothing_lost(owner)


@pytest.mark.parametrize("who", ["client", "owner"])
async def test_who_waits_to_ask_hears_of_the_end(few: int, who: str) -> None:
    async with pair() as (owner, client):
        tasks = await seek_in_vain(client, 3 * few)
        await sought(owner, few)
        await (client if who == "client" else owner).aclose()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {CacheClosed if who == "client" else OwnerLost}


async def test_uploads_that_wait_hold_up_no_read_that_makes_their_room() -> None:
    settings = small(capacity=MIB, segment=MIB, slots=256, through_host=True)
    async with (
        featcache.create(settings=settings) as owner,
        featcache.connect(owner.endpoint, settings=settings) as far,
    ):
        refs = [await owner.put(filled(MIB // 4, n)) for n in range(4)]
        puts = [asyncio.create_task(far.put(filled(10, 9))) for _ in range(100)]
        await until(lambda: owner.statistics().waiters == 100)
        with pytest.raises(PutTimeout):
            await far.put(filled(KIB), timeout=0)
        with pytest.raises(PoolFull):
            await far.put(filled(KIB), on_full="raise")
        for n, ref in enumerate(refs):
            assert tensor(await far.get(ref))[0] == n
        for done in asyncio.as_completed(puts):
            await owner.get(await done)


# --- an owner that does not answer ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda client: client.get("b", timeout=0), KeyTimeout),
        (lambda client: client.put(filled(1), timeout=0, on_full="raise"), PutTimeout),
        (lambda client: client.get_or_put("b", lambda: filled(1), timeout=0), KeyTimeout),
        (lambda client: client.put(filled(1), timeout=0), PutTimeout),
    ],
    ids=["get", "raise", "get_or_put", "put"],
)
async def test_who_does_not_want_to_wait_does_not_wait_for_ever(
    call: Callable[[FeatureClient], Awaitable[Any]],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featcache.session.arguments.NOWAIT_RPC_TIMEOUT_S", 0.01)
    async with pair() as (owner, client):
        await client.put(filled(1), key="a")
        with monkeypatch.context() as busy:
            busy.setattr(owner._opened().main.server._dispatcher, "answer", lambda *_: None)
            with pytest.raises(error):
                await call(client)


@pytest.mark.parametrize("on_full", ["wait", "raise", "spill"])
@pytest.mark.parametrize("way", ["direct", "through host"])
async def test_a_put_that_does_not_wait_takes_the_room_there_is(on_full: Any, way: str) -> None:
    settings = small(through_host=way != "direct")
    async with (
        featcache.create(settings=settings, spill=MIB) as owner,
        featcache.connect(owner.endpoint, settings=settings) as client,
    ):
        ref = await client.put(filled(KIB, 3), on_full=on_full, timeout=0)
        assert tensor(await owner.get(ref))[0] == 3


def test_as_many_reads_may_be_out_as_may_be_asked_for() -> None:
    assert Settings().grants >= pending.MAX_IN_FLIGHT
