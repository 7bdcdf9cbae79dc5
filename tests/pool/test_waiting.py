"""Puts that wait: their order, and what happens when they give up, at every moment."""

import asyncio
from typing import Any

import anyio
import pytest

import featcache
from featcache import CacheClosed, FeatureCache, FeatureRef, FeatureTooLarge, PoolFull, PutTimeout
from featcache.memory.host.slab import HostSlab
from featcache.pool.recycler import Recycler
from support.caches import KIB, MIB, Gate, filled, full, pair, spent, steps, tensor, until
from support.keyed import pool_of

CAPACITY = 64 * KIB
ONE: dict[str, Any] = {"capacity": CAPACITY, "segment": CAPACITY}
"""A pool that one feature fills."""


class Cancellable:
    """A put that can be cancelled natively or through an anyio scope."""

    def __init__(self, kind: str, owner: FeatureCache, value: int, nbytes: int = CAPACITY) -> None:
        self.ref: FeatureRef | None = None
        self.error: BaseException | None = None
        self._kind = kind
        self._scope = anyio.CancelScope()
        self._task = asyncio.create_task(self._run(owner, value, nbytes))

    async def _run(self, owner: FeatureCache, value: int, nbytes: int) -> None:
        try:
            with self._scope:
                self.ref = await owner.put(filled(nbytes, value))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def cancel(self) -> None:
        """Cancel it now."""
        if self._kind == "native":
            self._task.cancel()
        else:
            self._scope.cancel()

    async def wait(self) -> None:
        """Return when it has ended."""
        await asyncio.wait([self._task])


async def queued(owner: FeatureCache, count: int) -> None:
    await until(lambda: owner.statistics().waiters == count)


# --- waiting at all ------------------------------------------------------------------------------


async def test_a_put_waits_for_room() -> None:
    async with pair(**ONE) as (owner, client):
        first = await full(owner, 1)
        task = asyncio.create_task(owner.put(filled(CAPACITY, 2)))
        await queued(owner, 1)
        now = owner.statistics()
        assert (now.waiting_bytes, now.waited, now.free_bytes) == (CAPACITY, 1, 0)
        await client.release(first)
        assert tensor(await client.get(await task))[0] == 2
        await spent(owner)
        assert owner.statistics().waiting_bytes == 0


async def test_a_put_waits_for_a_slot() -> None:
    async with pair(slots=1) as (owner, client):
        first = await owner.put(filled(1))
        with pytest.raises(PoolFull, match="0 of 1 slots"):
            owner.put_nowait(filled(1))
        task = asyncio.create_task(owner.put(filled(1)))
        await queued(owner, 1)
        await client.release(first)
        await client.release(await task)
        await spent(owner)


@pytest.mark.parametrize("reader", ["client", "owner"])
async def test_only_the_ring_wakes_it(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no timer that fires in this test's life, the release itself must wake the put."""
    monkeypatch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    async with pair(recycle_interval=60.0, **ONE) as (owner, client):
        payer = client if reader == "client" else owner
        first = await full(owner)
        task = asyncio.create_task(owner.put(filled(CAPACITY)))
        await queued(owner, 1)
        await payer.release(first)
        second = await task
        async with payer.borrow(second):
            task = asyncio.create_task(owner.put(filled(CAPACITY)))
            await queued(owner, 1)
        third = await task
        task = asyncio.create_task(owner.put(filled(CAPACITY)))
        await queued(owner, 1)
        await payer.get(third)
        fourth = await task
        task = asyncio.create_task(owner.put(filled(CAPACITY)))
        await queued(owner, 1)
        await payer.discard(fourth)
        await task


async def test_only_the_goodbye_of_who_holds_it_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    async with pair(recycle_interval=60.0, **ONE) as (owner, _):
        ref = await full(owner)
        async with featcache.connect(owner.endpoint) as leaving:
            await leaving.release(ref)
            task = asyncio.create_task(owner.put(filled(CAPACITY)))
            await queued(owner, 0)
        await task


async def test_a_missed_ring_is_made_good_by_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.session.waiting.Doorbell.ring", lambda self: None)
    async with pair(recycle_interval=0.02, **ONE) as (owner, client):
        first = await full(owner)
        task = asyncio.create_task(owner.put(filled(CAPACITY)))
        await queued(owner, 1)
        await client.release(first)
        await task


async def test_room_that_was_paid_for_is_found_without_waiting() -> None:
    """A put collects before it waits: what was released a moment ago is room."""
    async with pair(recycle_interval=60.0, **ONE) as (owner, client):
        for _ in range(3):
            await client.release(await owner.put(filled(CAPACITY)))
            await client.release(owner.put_nowait(filled(CAPACITY)))
            await client.release(await owner.put(filled(CAPACITY), on_full="raise"))
        assert owner.statistics().waited == 0


# --- order ---------------------------------------------------------------------------------------


async def test_first_come_first_served() -> None:
    async with pair(**ONE) as (owner, client):
        served: list[int] = []

        async def put(value: int) -> None:
            ref = await owner.put(filled(CAPACITY if value % 2 else 1, value))
            served.append(value)
            await client.release(ref)

        first = await full(owner)
        tasks = []
        for value in range(20):
            tasks.append(asyncio.create_task(put(value)))
            await queued(owner, value + 1)
        await client.release(first)
        await asyncio.gather(*tasks)
        assert served == list(range(20))
        await spent(owner)


async def test_a_small_put_does_not_overtake_a_large_one() -> None:
    async with pair(**ONE) as (owner, client):
        half = await owner.put(filled(CAPACITY // 2))
        large = asyncio.create_task(owner.put(filled(CAPACITY)))
        await queued(owner, 1)
        small = asyncio.create_task(owner.put(filled(1)))
        await queued(owner, 2)
        # There is room for a small one, but others came first.
        with pytest.raises(PoolFull, match="2 puts wait"):
            owner.put_nowait(filled(1))
        with pytest.raises(PoolFull, match="2 puts wait"):
            await owner.put(filled(1), on_full="raise")
        await client.release(half)
        await client.release(await large)
        await client.release(await small)
        await spent(owner)


async def test_what_can_never_fit_does_not_wait() -> None:
    async with pair(**ONE) as (owner, client):
        first = await full(owner)
        with pytest.raises(FeatureTooLarge):
            await owner.put(filled(CAPACITY + 1))
        assert owner.statistics().waited == 0
        await client.release(first)


async def test_the_queue_has_a_bound() -> None:
    async with pair(waiters=2, **ONE) as (owner, client):
        first = await full(owner)
        tasks = [asyncio.create_task(owner.put(filled(1))) for _ in range(2)]
        await queued(owner, 2)
        with pytest.raises(PoolFull, match="waiters"):
            await owner.put(filled(1))
        await client.release(first)
        for ref in await asyncio.gather(*tasks):
            await client.release(ref)
        await spent(owner)


# --- giving up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_a_put_that_times_out(timeout: float) -> None:
    async with pair(**ONE) as (owner, client):
        first = await full(owner)
        with pytest.raises(PutTimeout, match="65536 bytes are free"):
            await owner.put(filled(CAPACITY), timeout=timeout)
        with pytest.raises(TimeoutError):  # what plain code would expect
            await owner.put(filled(CAPACITY), timeout=timeout)
        assert owner.statistics().waiters == 0
        await client.release(first)
        await client.release(await owner.put(filled(CAPACITY), timeout=timeout))
        await spent(owner)


async def test_who_times_out_lets_the_next_by() -> None:
    async with pair(**ONE) as (owner, client):
        half = await owner.put(filled(CAPACITY // 2))
        large = asyncio.create_task(owner.put(filled(CAPACITY), timeout=0.5))
        await queued(owner, 1)
        small = asyncio.create_task(owner.put(filled(1)))
        with pytest.raises(PutTimeout):
            await large
        await client.release(await small)
        await client.release(half)
        await spent(owner)


async def cancel_one_of_four(kind: str, turns: int, victim: int, inline_bytes: int) -> bool:
    """Cancel a put so many turns after room was made for it; return whether it came too late."""
    async with pair(inline_bytes=inline_bytes, **ONE) as (owner, client):
        first = await full(owner)
        puts = []
        for value in range(4):
            puts.append(Cancellable(kind, owner, value))
            await queued(owner, value + 1)
        await client.release(first)
        for put in puts[:victim]:
            await put.wait()
            assert put.ref is not None
            await client.release(put.ref)
        await steps(turns)
        puts[victim].cancel()
        order = []
        for value, put in enumerate(puts[victim:], victim):
            await put.wait()
            assert put.error is None
            assert put.ref is not None or value == victim
            if put.ref is not None:
                order.append(int(tensor(await client.get(put.ref))[0]))
        assert order in ([0, 1, 2, 3][victim:], [0, 1, 2, 3][victim + 1 :])
        await spent(owner)
        return puts[victim].ref is not None


@pytest.mark.parametrize("inline_bytes", [0, CAPACITY])
@pytest.mark.parametrize("kind", ["native", "anyio"])
@pytest.mark.parametrize("victim", [0, 1])
async def test_cancelled_at_any_moment_after_room_was_made(
    kind: str, victim: int, inline_bytes: int, no_leaks: None
) -> None:
    """Not yet granted, granted but not told, told, copying, done: nothing is lost in any of them."""
    late = [await cancel_one_of_four(kind, turns, victim, inline_bytes) for turns in range(10)]
    assert not late[0]
    assert late[-1] or inline_bytes == 0


@pytest.mark.parametrize("kind", ["native", "anyio"])
@pytest.mark.parametrize("turns", range(4))
async def test_cancelled_while_nothing_moves(kind: str, turns: int) -> None:
    async with pair(**ONE) as (owner, client):
        half = await owner.put(filled(CAPACITY // 2))
        large = Cancellable(kind, owner, 1)
        await steps(turns)
        small = Cancellable(kind, owner, 2, 256)
        await steps(turns)
        large.cancel()
        await large.wait()
        await small.wait()  # it fitted all the time: only the large one stood before it
        assert large.ref is None
        assert small.ref is not None
        await client.release(small.ref)
        await client.release(half)
        await spent(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_all_that_wait_are_cancelled_at_once(kind: str) -> None:
    async with pair(**ONE) as (owner, client):
        first = await full(owner)
        puts = [Cancellable(kind, owner, n) for n in range(10)]
        await queued(owner, 10)
        await client.release(first)
        for put in puts:
            put.cancel()
        for put in puts:
            await put.wait()
            assert put.ref is None
        await client.release(await owner.put(filled(CAPACITY)))
        await spent(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_while_its_thread_copies(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, **ONE) as (owner, client):
        with monkeypatch.context() as patch:
            patch.setattr(HostSlab, "write", gate.wrap(HostSlab.write))
            put = Cancellable(kind, owner, 1)
            await until(gate.entered.is_set)
            put.cancel()
            await put.wait()
        assert put.ref is None
        # The thread still writes there: the room is nobody's until it is done.
        assert owner.statistics().used_bytes == CAPACITY
        with pytest.raises(PoolFull):
            owner.put_nowait(filled(1))
        after = asyncio.create_task(owner.put(filled(CAPACITY, 7)))
        await queued(owner, 1)
        gate.open()
        assert tensor(await client.get(await after))[0] == 7
        await spent(owner)


@pytest.mark.parametrize("inline_bytes", [0, CAPACITY])
async def test_a_copy_that_fails_gives_its_room_back(
    inline_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError

    async with pair(inline_bytes=inline_bytes, **ONE) as (owner, client):
        with monkeypatch.context() as patch:
            patch.setattr(HostSlab, "write", fails)
            with pytest.raises(ZeroDivisionError):
                await owner.put(filled(CAPACITY))
            with pytest.raises(ZeroDivisionError):
                owner.put_nowait(filled(CAPACITY))
            assert owner.statistics().used_bytes == 0
        await client.release(await owner.put(filled(CAPACITY)))
        await spent(owner)


# --- closing -------------------------------------------------------------------------------------


async def test_closing_wakes_who_waits() -> None:
    async with pair(**ONE) as (owner, _):
        await full(owner)
        tasks = [asyncio.create_task(owner.put(filled(n))) for n in range(5)]
        await queued(owner, 5)
        await owner.aclose()
        for task in tasks:
            with pytest.raises(CacheClosed):
                await task


@pytest.mark.parametrize("inline_bytes", [0, CAPACITY])
async def test_closing_between_a_grant_and_its_copy(inline_bytes: int) -> None:
    async with pair(inline_bytes=inline_bytes, **ONE) as (owner, client):
        first = await full(owner)
        put = Cancellable("native", owner, 1)
        await queued(owner, 1)
        await client.release(first)
        while owner.statistics().waiters:  # noqa: ASYNC110 - to the very turn, and no further
            await asyncio.sleep(0)
        await owner.aclose()  # the put was granted its room, and has not run since
        await put.wait()
        kind, put.error = type(put.error), None
    assert kind is CacheClosed


async def test_closing_while_a_thread_copies(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, **ONE) as (owner, _):
        monkeypatch.setattr(HostSlab, "write", gate.wrap(HostSlab.write))
        task = asyncio.create_task(owner.put(filled(CAPACITY)))
        await until(gate.entered.is_set)
        await owner.aclose()
        gate.open()
        with pytest.raises(CacheClosed):
            await task


async def test_puts_that_never_wait_find_what_was_released_in_small_numbers() -> None:
    # One look at thousands of paid features would hold up the loop for milliseconds.
    async with pair(initial=MIB, slots=4096, recycle_interval=60.0) as (owner, client):
        await client.release(await owner.put(filled(16)))  # attached
        most = 0
        for _ in range(2000):
            client.get_nowait(owner.put_nowait(filled(16)))
            most = max(most, pool_of(owner).store.table.used)  # `statistics` would look itself
        assert 64 <= most <= 64 * 4 + 1
