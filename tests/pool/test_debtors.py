"""Who holds the room: what PoolFull, PutTimeout, pressure and a long wait say of it, and what to do."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

import featcache
from featcache import FeatureCache, FeatureClient, PoolFull, PutTimeout, events
from featcache.client import deadlines
from featcache.control.dispatch import Dispatcher
from featcache.pool.debtors import Holders
from support.caches import KIB, MIB, filled, full, pair, small, until
from support.keyed import pool_of

ONE: dict[str, Any] = {"capacity": MIB, "segment": MIB, "slots": 64, "recycle_interval": 60.0}
E = TypeVar("E", bound=events.Event)
Ask = Callable[[FeatureCache, FeatureClient], Awaitable[str]]


@contextlib.contextmanager
def seen() -> Iterator[list[events.Event]]:
    """The events of the block."""
    told: list[events.Event] = []
    events.add_hook(told.append)
    try:
        yield told
    finally:
        events.remove_hook(told.append)


def of(told: list[events.Event], kind: type[E]) -> list[E]:
    return [event for event in told if isinstance(event, kind)]


async def full_now(owner: FeatureCache, _: FeatureClient) -> str:
    with pytest.raises(PoolFull) as raised:
        owner.put_nowait(filled(MIB))
    return str(raised.value)


async def full_unwaited(owner: FeatureCache, _: FeatureClient) -> str:
    with pytest.raises(PoolFull) as raised:
        await owner.put(filled(MIB), on_full="raise")
    return str(raised.value)


async def timed_out(owner: FeatureCache, _: FeatureClient) -> str:
    with pytest.raises(PutTimeout) as raised:
        await owner.put(filled(MIB), timeout=0.01)
    return str(raised.value)


async def clients_full(_: FeatureCache, client: FeatureClient) -> str:
    with pytest.raises(PoolFull) as raised:
        await client.put(filled(MIB), on_full="raise")
    return str(raised.value)


async def clients_timed_out(_: FeatureCache, client: FeatureClient) -> str:
    with pytest.raises(PutTimeout) as raised:
        await client.put(filled(MIB), timeout=0.01)
    return str(raised.value)


async def clients_timed_out_at_once(_: FeatureCache, client: FeatureClient) -> str:
    with pytest.raises(PutTimeout) as raised:
        await client.put(filled(MIB), timeout=0)
    return str(raised.value)


async def warned(owner: FeatureCache, _: FeatureClient) -> str:
    with seen() as told:
        task = asyncio.create_task(owner.put(filled(MIB)))
        await until(lambda: of(told, events.PutWaiting))
        task.cancel()
    warning = of(told, events.PutWaiting)[0]
    return f"{'; '.join(warning.holders)}; to do: {warning.remedy}"


async def pressure(owner: FeatureCache, _: FeatureClient) -> str:
    with seen() as told:
        pool_of(owner).pressure._gauge._last_s = float("-inf")
        pool_of(owner)._tick()
    report = of(told, events.PoolPressure)[0]
    return f"{'; '.join(report.holders)}; to do: {report.remedy}"


EVERY: list[Ask] = [
    full_now,
    full_unwaited,
    timed_out,
    clients_full,
    clients_timed_out,
    clients_timed_out_at_once,
    warned,
    pressure,
]
every = pytest.mark.parametrize("ask", EVERY, ids=lambda ask: ask.__name__)


@every
async def test_who_owes_is_named_with_what_became_of_each(ask: Ask) -> None:
    async with pair(name="tp0", wait_warning=0.02, **ONE) as (owner, client):
        async with featcache.connect(owner.endpoint, name="gone"):
            pass
        refs = [
            await owner.put(filled(MIB - 8 * KIB), readers=["tp0", "ghost", "gone"], ttl=90),
            await owner.put(filled(4 * KIB), readers=2, ttl=None),
        ]
        async with featcache.connect(owner.endpoint) as other:
            await other.get(refs[1])
            said = await ask(owner, client)
            pid = os.getpid()
            assert f"ref {refs[0].slot}:{refs[0].generation} of {MIB - 8 * KIB} bytes" in said
            assert "ghost (never attached) owes 1 ref" in said
            assert "ttl 90 s" in said
            assert (
                f"owed by ghost (never attached), gone (left), tp0 (session 1, pid {pid})" in said
            )
            assert f"anonymous: 1 read (paid by session 3, pid {pid})" in said
            assert "s old" in said
            remedy = said.partition("to do: ")[2]
            for what in ("never attached", "release or discard", "ttl", "capacity"):
                assert what in remedy


@every
async def test_pins_and_reads_in_progress_are_named(ask: Ask) -> None:
    async with pair(name="tp0", wait_warning=0.02, **ONE) as (owner, client):
        await client.put(filled(MIB - 64 * KIB), key="pinned one")
        await client.pin("pinned one")
        await owner.put(filled(4 * KIB), key="read one")
        ref = await owner.put(filled(4 * KIB))
        async with client.borrow("read one"), client.borrow(ref):
            owes = await ask(owner, client)
            assert "read now by tp0 (session 1" in owes
            await owner.discard(ref)
            said = await ask(owner, client)
            who = f"tp0 (session 1, pid {os.getpid()})"
            assert f"was taken back and is still read by {who}" in said
            assert f"pinned keys hold {MIB - 64 * KIB} bytes: 'pinned one' by {who}" in said
            assert f"{who} has 1 read by key open" in said
            remedy = said.partition("to do: ")[2]
            for what in ("taken back", "unpin", "by key"):
                assert what in remedy


@pytest.mark.parametrize("ask", EVERY[:-1], ids=lambda ask: ask.__name__)
async def test_what_was_released_holds_no_room(ask: Ask) -> None:
    async with pair(wait_warning=0.02, **ONE) as (owner, client):
        await owner.put(filled(KIB), readers=["ghost"])
        ref = await owner.put(filled(MIB - 8 * KIB), ttl=None)
        await client.get(ref)
        said = await ask(owner, client)
        assert "ghost" in said
        assert f"ref {ref.slot}:{ref.generation} " not in said


async def test_the_owners_own_name_is_not_one_that_never_attached() -> None:
    async with featcache.create(settings=small(**ONE), name="me") as owner:
        await owner.put(filled(KIB), readers=["me"])
        await owner.put(filled(MIB - 4 * KIB))
        with pytest.raises(PoolFull, match=r"owed by me \(the owner itself\)") as raised:
            owner.put_nowait(filled(MIB))
        assert "never attached" not in str(raised.value)


async def test_a_name_that_died_is_told_so() -> None:
    async with pair(name="tp0", **ONE) as (owner, _):
        pool = pool_of(owner)
        pool.attendance.ended(pool.pages[1], died=True)
        pool.pages[1].name = None
        await owner.put(filled(MIB), readers=["tp0"])
        with pytest.raises(PoolFull, match=r"owed by tp0 \(died\)"):
            owner.put_nowait(filled(1))


async def test_the_name_that_never_attached_is_found_behind_others() -> None:
    async with pair(name="tp0", **ONE) as (owner, _):
        for _ in range(30):
            await owner.put(filled(KIB), readers=["tp0"])
        for _ in range(7):
            await owner.put(filled(KIB), readers=["tp0", "ghost"])
        await owner.put(filled(MIB - 64 * KIB), readers=["tp0"])
        with pytest.raises(PoolFull, match=r"ghost \(never attached\) owes 7 refs"):
            owner.put_nowait(filled(MIB))


async def test_a_full_table_says_so() -> None:
    async with pair(**(ONE | {"slots": 2})) as (owner, _):
        for _ in range(2):
            await owner.put(filled(KIB))
        with pytest.raises(PoolFull, match=r"0 of 2 slots.*raise Settings\.slots"):
            owner.put_nowait(filled(KIB))


async def test_the_bound_on_waiters_says_who_holds_the_room() -> None:
    async with pair(**(ONE | {"waiters": 0})) as (owner, client):
        await owner.put(filled(MIB), readers=["ghost"])
        for each in (owner, client):
            with pytest.raises(
                PoolFull, match=r"raise Settings\.waiters; ghost \(never attached\)"
            ):
                await each.put(filled(1))


@pytest.mark.parametrize("letter", ["x", "ß", "\n", "語"])
async def test_what_is_said_is_bounded(letter: str) -> None:
    names = [f"{letter * 200}{number}" for number in range(64)]
    async with pair(message_bytes=1024, **ONE) as (owner, client):
        for _ in range(8):
            await owner.put(filled(KIB), readers=names)
        await owner.put(filled(MIB - 64 * KIB), readers=names)
        said = await full_now(owner, client)
        assert "\n" not in said
        assert len(said) < 1500
        assert "never attached" in await clients_full(owner, client)


async def test_many_failing_puts_look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(**ONE) as (owner, client):
        await full(owner)
        debtors = pool_of(owner).debtors
        looks, look = list[float](), debtors._look

        def counted(now_s: float) -> Holders:
            looks.append(now_s)
            return look(now_s)

        monkeypatch.setattr(debtors, "_look", counted)
        monkeypatch.setattr("featcache.pool.debtors._now", lambda: 7.0)
        for _ in range(100):
            await full_now(owner, client)
        assert len(looks) == 1


async def test_a_put_that_waits_long_is_told_of_once() -> None:
    with seen() as told:
        async with pair(wait_warning=0.02, **ONE) as (owner, client):
            ref = await full(owner)
            own = asyncio.create_task(owner.put(filled(KIB), readers=["ghost"]))
            await until(lambda: pool_of(owner).store.queue.count == 1)
            clients = asyncio.create_task(client.put(filled(2 * KIB)))
            await until(lambda: len(of(told, events.PutWaiting)) == 2)
            waits = owner._opened().main.writer.waits
            assert (waits._untold, waits._timer) == ({}, None)  # there is nothing more to tell
            await client.release(ref)
            await asyncio.gather(own, clients)
    warnings = of(told, events.PutWaiting)
    assert [(each.session, each.nbytes, each.urgency) for each in warnings] == [
        (0, KIB, "warning"),
        (1, 2 * KIB, "warning"),
    ]
    assert all(each.waited_s > 0 for each in warnings)
    assert warnings[0].holders[0].startswith(f"ref {ref.slot}:{ref.generation}")
    assert [each.granted for each in of(told, events.PutWaited)] == [True, True]


async def test_a_put_that_has_its_room_in_time_is_not_told_of() -> None:
    with seen() as told:
        async with pair(wait_warning=30.0, **ONE) as (owner, client):
            for _ in range(2):
                ref = await full(owner)
                task = asyncio.create_task(owner.put(filled(KIB)))
                await until(lambda: pool_of(owner).store.queue.count == 1)
                waits = owner._opened().main.writer.waits
                assert waits._timer is not None
                await client.release(ref)
                await client.release(await task)
                assert not waits._untold
                assert f"{waits._timer}" == "None"
    assert not of(told, events.PutWaiting)


def deaf(owner: FeatureCache) -> None:
    """Have a pool look at what was released neither at a ring nor by its timer."""
    recycler = pool_of(owner).recycler
    recycler._timer.cancel()
    asyncio.get_running_loop().remove_reader(recycler.eventfd)


async def test_the_wait_that_a_look_at_what_was_released_ends_is_not_told_of() -> None:
    with seen() as told:
        async with pair(wait_warning=30.0, **ONE) as (owner, client):
            ref = await full(owner)
            task = asyncio.create_task(owner.put(filled(KIB)))
            await until(lambda: pool_of(owner).store.queue.count == 1)
            deaf(owner)
            await client.release(ref)
            waits = owner._opened().main.writer.waits
            waits._after_s = 0.0
            waits._tell()
            await task
    assert not of(told, events.PutWaiting)


async def test_a_flood_of_long_waits_is_bounded_and_counted() -> None:
    with seen() as told:
        async with pair(**(ONE | {"wait_warning": 0.02, "log_interval": 3600.0})) as (owner, _):
            await full(owner)
            tasks = [asyncio.create_task(owner.put(filled(KIB))) for _ in range(40)]
            waits = owner._opened().main.writer.waits
            await until(lambda: len(of(told, events.PutWaiting)) == 16 and not waits._untold)
            for task in tasks:
                task.cancel()
    assert len(of(told, events.PutWaiting)) == 16


async def test_no_wait_is_told_of_if_the_setting_says_so() -> None:
    async with pair(wait_warning=None, **ONE) as (owner, client):
        ref = await full(owner)
        task = asyncio.create_task(owner.put(filled(KIB)))
        await until(lambda: pool_of(owner).store.queue.count == 1)
        assert owner._opened().main.writer.waits._timer is None
        await client.release(ref)
        await task


async def test_room_that_was_released_when_the_time_is_up_is_taken() -> None:
    async with pair(**ONE) as (owner, client):
        ref = await full(owner)
        task = asyncio.create_task(owner.put(filled(KIB), timeout=0.5))
        await until(lambda: pool_of(owner).store.queue.count == 1)
        deaf(owner)
        await client.release(ref)
        assert (await task).nbytes == KIB


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the owner's answer may take longer than a client waits for it."""
    monkeypatch.setattr(deadlines, "ANSWER_S", 20.0)


async def test_an_owner_that_does_not_answer_is_said_to_be_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair(**ONE) as (owner, client):
        await client.release(await client.put(filled(1)))
        await full(owner)
        monkeypatch.setattr(deadlines, "ANSWER_S", 0.01)
        monkeypatch.setattr(Dispatcher, "_send", lambda *_: None)
        with pytest.raises(PutTimeout, match="the owner did not say"):
            await client.put(filled(1), timeout=0.01)


async def test_an_expiry_names_who_never_attached() -> None:
    with seen() as told:
        async with pair(name="tp0", recycle_interval=0.01) as (owner, _):
            await owner.put(filled(KIB), readers=["tp0", "ghost"], ttl=0.01)
            await until(lambda: of(told, events.RefExpired))
    (expired,) = of(told, events.RefExpired)
    assert (expired.owed_by, expired.never_attached) == (("ghost", "tp0"), ("ghost",))


async def test_the_owner_is_not_taken_for_a_session_that_ended() -> None:
    async with pair(**ONE) as (owner, _):
        await owner.put(filled(MIB - 64 * KIB), key="kept")
        await owner.pin("kept")
        with pytest.raises(PoolFull, match="'kept' by the owner;"):
            owner.put_nowait(filled(128 * KIB))
