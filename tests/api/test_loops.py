"""The same on every kind of event loop: what touches the loop most, under asyncio and uvloop."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
import torch
import uvloop

import featcache
from featcache import AttachRefused, CacheClosed, OwnerLost, PutTimeout, StaleRef
from featcache.memory.host.slab import HostSlab
from featcache.pool.recycler import Recycler
from support.caches import KIB, Gate, filled, full, pair, spent, tensor, until

Scenario = Callable[[pytest.MonkeyPatch], Coroutine[Any, Any, None]]
CAPACITY = 64 * KIB
ONE: dict[str, Any] = {"capacity": CAPACITY, "segment": CAPACITY}


async def shared(patch: pytest.MonkeyPatch) -> None:
    async with pair(inline_bytes=KIB) as (owner, client), featcache.connect() as other:
        for nbytes in (0, 1, KIB, 5 * KIB):
            ref = await owner.put(filled(nbytes, 3), readers=3)
            assert torch.equal(tensor(await client.get(ref)), filled(nbytes, 3))
            assert torch.equal(tensor(await other.get(ref)), filled(nbytes, 3))
            async with owner.borrow(ref) as view:
                assert torch.equal(tensor(view), filled(nbytes, 3))
        await spent(owner)
        ref = await owner.put(filled(1))
        await client.discard(ref)
        with pytest.raises(StaleRef):
            await client.discard(ref)
        await spent(owner)


async def woken_by_the_ring(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    async with pair(recycle_interval=60.0, **ONE) as (owner, client):
        ref = await full(owner)
        for _ in range(5):
            task = asyncio.create_task(owner.put(filled(CAPACITY)))
            await until(lambda: owner.statistics().waiters == 1)
            await client.release(ref)
            ref = await task


async def given_up(patch: pytest.MonkeyPatch) -> None:
    async with pair(**ONE) as (owner, client):
        first = await full(owner)
        with pytest.raises(PutTimeout):
            await owner.put(filled(1), timeout=0.01)
        tasks = [asyncio.create_task(owner.put(filled(CAPACITY, n))) for n in range(4)]
        await until(lambda: owner.statistics().waiters == 4)
        tasks[1].cancel()
        with anyio.move_on_after(0.001):
            await owner.put(filled(1))
        await client.release(first)
        for n in (0, 2, 3):
            assert tensor(await client.get(await tasks[n]))[0] == n
        assert tasks[1].cancelled()
        await spent(owner)


async def cancelled_copy(patch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, **ONE) as (owner, client):
        with patch.context() as inner:
            inner.setattr(HostSlab, "write", gate.wrap(HostSlab.write))
            task = asyncio.create_task(owner.put(filled(CAPACITY)))
            await until(gate.entered.is_set)
            task.cancel()
            await asyncio.wait([task])
        assert owner.statistics().used_bytes == CAPACITY
        gate.open()
        await client.release(await owner.put(filled(CAPACITY)))
        await spent(owner)


async def grown(patch: pytest.MonkeyPatch) -> None:
    async with pair(segment=64 * KIB) as (owner, client):
        value = torch.arange(100 * KIB).to(torch.int16)
        assert torch.equal(tensor(await client.get(await owner.put(value))), value)
        await spent(owner)


async def closed(patch: pytest.MonkeyPatch) -> None:
    async with pair(name="tp0", **ONE) as (owner, client):
        with pytest.raises(AttachRefused):
            await featcache.connect(owner.endpoint, name="tp0").open()
        ref = await full(owner)
        task = asyncio.create_task(owner.put(filled(1)))
        await until(lambda: owner.statistics().waiters == 1)
        await owner.aclose()
        with pytest.raises(CacheClosed):
            await task
        await until(lambda: client.statistics().sessions == 0)
        with pytest.raises(OwnerLost):
            await client.get(ref)


async def expired(patch: pytest.MonkeyPatch) -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(1), ttl=0.01)
        await spent(owner)
        with pytest.raises(StaleRef):
            await client.get(ref)
        assert owner.statistics().expired == 1


@pytest.fixture(scope="module", autouse=True)
def uvloop_has_run() -> None:
    """Opens the pipe that libuv makes once for a whole process, before leaks are looked for."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))


@pytest.mark.parametrize(
    "scenario",
    [shared, woken_by_the_ring, given_up, cancelled_copy, grown, closed, expired],
    ids=lambda scenario: scenario.__name__,
)
@pytest.mark.parametrize(
    "loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_on_every_loop(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
    scenario: Scenario,
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: None,
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario(monkeypatch))
