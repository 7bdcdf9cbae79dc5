"""Reads: who owes them, who pays them, and what a ref is worth after."""

import asyncio
import contextlib
from typing import Any

import pytest
import torch

import featcache
from featcache import (
    AttachRefused,
    CacheClosed,
    FeatureRef,
    GetTimeout,
    OwnerLost,
    SettingsError,
    StaleRef,
    UnknownPool,
)
from featcache.memory.host.slab import HostMapping
from support.caches import KIB, Gate, filled, pair, small, spent, steps, tensor, until

# --- counts and names ----------------------------------------------------------------------------


async def test_a_count_of_reads_is_paid_by_that_many_sessions() -> None:
    async with pair() as (owner, one), featcache.connect(owner.endpoint) as two:
        ref = await owner.put(filled(KIB), readers=3)
        await one.get(ref)
        async with two.borrow(ref):
            pass
        await until(lambda: owner.statistics().reads_paid == 2)
        assert owner.statistics().slots_used == 1
        await owner.release(ref)
        await spent(owner)
        assert owner.statistics().recycled == 1


async def test_a_session_pays_once() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB), readers=2)
        await client.get(ref)
        calls: list[Any] = [client.get, client.release]
        for call in calls:
            with pytest.raises(StaleRef, match="paid"):
                await call(ref)
        with pytest.raises(StaleRef):
            client.get_nowait(ref)
        with pytest.raises(StaleRef):
            async with client.borrow(ref):
                pass
        with pytest.raises(StaleRef), client.borrow(ref):
            pass
        # Once the owner has looked (it looks in order), the one read is still owed.
        await client.release(await owner.put(filled(KIB)))
        await until(lambda: owner.statistics().recycled == 1)
        assert owner.statistics().slots_used == 1
        await owner.get(ref)
        await spent(owner)


async def test_names_owe_a_read_each() -> None:
    async with (
        pair(name="tp0") as (owner, tp0),
        featcache.connect(owner.endpoint, name="tp1") as tp1,
    ):
        ref = await owner.put(filled(KIB, 3), readers=["tp0", "tp1"])
        await tp0.get(ref)
        await until(lambda: owner.statistics().reads_paid == 1)
        assert owner.statistics().slots_used == 1
        await tp1.release(ref)
        await spent(owner)


async def test_who_is_not_named_reads_but_does_not_pay() -> None:
    async with pair(name="tp0") as (owner, tp0), featcache.connect(owner.endpoint) as other:
        ref = await owner.put(filled(KIB, 3), readers={"tp0"})
        for reader in (other, owner):
            assert torch.equal(tensor(await reader.get(ref)), filled(KIB, 3))
        now = owner.statistics()
        assert (now.reads_paid, now.slots_used) == (0, 1)
        assert torch.equal(tensor(await tp0.get(ref)), filled(KIB, 3))
        now = owner.statistics()
        assert (now.reads_paid, now.slots_used) == (1, 0)


async def test_the_owner_itself_can_be_named() -> None:
    async with featcache.create(name="me", settings=small()) as owner:
        await owner.get(await owner.put(filled(KIB), readers=["me"]))
        await spent(owner)
        ref = await owner.put(filled(KIB), readers=["not me"])
        await owner.get(ref)
        now = owner.statistics()
        assert (now.reads_paid, now.slots_used) == (1, 1)


async def test_a_name_is_one_sessions() -> None:
    async with pair(name="tp0") as (owner, _):
        with pytest.raises(AttachRefused, match="'tp0' is attached already"):
            async with featcache.connect(owner.endpoint, name="tp0"):
                pass
        async with featcache.connect(owner.endpoint, name="tp1"):
            pass
        async with featcache.connect(owner.endpoint, name="tp1"):  # the first said goodbye
            pass


async def test_the_owners_name_is_taken_too() -> None:
    async with featcache.create(name="me", settings=small()) as owner:
        with pytest.raises(AttachRefused):
            async with featcache.connect(owner.endpoint, name="me"):
                pass


@pytest.mark.parametrize(
    "readers",
    [0, -1, 1025, True, 2.0, None, "tp0", b"tp0", [], [""], ["n" * 257], ["a", "b", "a"], [1]],
    ids=repr,
)
async def test_readers_that_are_invalid(readers: Any) -> None:
    async with pair() as (owner, _):
        with pytest.raises(SettingsError, match="readers"):
            await owner.put(filled(1), readers=readers)
        with pytest.raises(SettingsError, match="readers"):
            owner.put_nowait(filled(1), readers=readers)
        await spent(owner)


# --- borrow --------------------------------------------------------------------------------------


async def test_a_borrow_is_empty_after_its_block() -> None:
    async with pair() as (owner, client):
        for reader in (owner, client):
            ref = await owner.put(filled(KIB, 4))
            async with reader.borrow(ref) as feature:
                view = tensor(feature)
                assert torch.equal(view, filled(KIB, 4))
                assert owner.statistics().slots_used == 1
            assert view.numel() == 0
            with pytest.raises(StaleRef, match="end of its block"):
                view.sum()
            with pytest.raises(SettingsError, match="end of its block"):
                await reader.put(view)
            with pytest.raises(SettingsError, match="end of its block"):
                await reader.get(ref, out=view)
            await spent(owner)


async def test_a_borrow_pays_though_its_block_raises() -> None:
    async with pair() as (owner, client):
        with pytest.raises(ZeroDivisionError):
            async with client.borrow(await owner.put(filled(KIB))) as feature:
                raise ZeroDivisionError
        assert tensor(feature).numel() == 0
        await spent(owner)


async def test_two_borrows_of_one_session_at_once() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        async with client.borrow(ref) as first:
            async with client.borrow(ref) as second:
                assert tensor(second).data_ptr() == tensor(first).data_ptr()
            assert tensor(second).numel() == 0
            await client.release(await owner.put(filled(KIB, 5)))
            await until(lambda: owner.statistics().recycled == 1)  # the owner has looked meanwhile
            assert torch.equal(tensor(first), filled(KIB, 4))
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, 4))
            assert owner.statistics().slots_used == 1
        await spent(owner)
        with pytest.raises(StaleRef):
            await client.get(ref)


async def test_a_borrow_is_entered_once_at_a_time() -> None:
    async with pair() as (owner, client):
        borrow = client.borrow(await owner.put(filled(KIB)))
        async with borrow:
            with pytest.raises(SettingsError, match="entered already"):
                async with borrow:
                    pass
        await spent(owner)


async def test_a_borrow_outlives_its_cache() -> None:
    """What is borrowed stays readable, and nothing raises in its way out."""
    async with contextlib.AsyncExitStack() as stack:
        owner = await stack.enter_async_context(featcache.create(settings=small()))
        client = await stack.enter_async_context(featcache.connect(owner.endpoint))
        ref = await owner.put(filled(KIB, 4), readers=2)
        with owner.borrow(ref) as mine, client.borrow(ref) as theirs:
            await client.aclose()
            assert torch.equal(tensor(theirs), filled(KIB, 4))
            assert owner.statistics().sessions == 1  # it stays while it reads
            await owner.aclose()
            assert torch.equal(tensor(mine), filled(KIB, 4))
            assert torch.equal(tensor(theirs), filled(KIB, 4))


async def test_a_client_that_closes_in_a_borrow_leaves_when_it_ends() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        with client.borrow(ref) as view:
            await client.aclose()
            assert torch.equal(tensor(view), filled(KIB, 4))
            with pytest.raises(CacheClosed):
                await client.get(ref)
        await spent(owner)
        await until(lambda: owner.statistics().sessions == 0)


@pytest.mark.parametrize("call", ["get", "release"])
async def test_a_stale_ref_does_not_end_the_hold_of_its_slots_next_tenant(call: str) -> None:
    async with pair(slots=1) as (owner, client):
        stale = await owner.put(filled(KIB, 1))
        await owner.discard(stale)
        ref = await owner.put(filled(KIB, 2))
        assert (ref.slot, ref.generation) == (stale.slot, stale.generation + 1)
        async with client.borrow(ref) as feature:
            with pytest.raises(StaleRef):
                await getattr(client, call)(stale)
            await owner.discard(ref)
            with pytest.raises(featcache.PutTimeout):  # the bytes are still being read
                await owner.put(filled(KIB, 3), timeout=0.2)
            assert torch.equal(tensor(feature), filled(KIB, 2))
        await spent(owner)


# --- release, discard, ttl -----------------------------------------------------------------------


async def test_release_pays_without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (owner, client):
        monkeypatch.setattr(HostMapping, "view", None)
        monkeypatch.setattr(HostMapping, "read", None)
        await client.release(await owner.put(filled(KIB)))
        await owner.release(await owner.put(filled(KIB)))
        await spent(owner)


async def test_discard_by_the_owner_and_by_a_client() -> None:
    async with pair() as (owner, client):
        for revoker in (owner, client):
            ref = await owner.put(filled(KIB), readers=5)
            await revoker.discard(ref)
            for reader in (owner, client):
                with pytest.raises(StaleRef):
                    await reader.get(ref)
                with pytest.raises(StaleRef):
                    await reader.discard(ref)
            await spent(owner)
        assert owner.statistics().discarded == 2


async def test_discard_waits_for_who_is_reading() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB, 4), readers=5)
        async with client.borrow(ref) as view:
            await owner.discard(ref)
            with pytest.raises(StaleRef):
                await owner.get(ref)
            await client.release(await owner.put(filled(2 * KIB, 9)))
            await until(lambda: owner.statistics().recycled == 1)
            assert owner.statistics().slots_used == 1
            assert torch.equal(tensor(view), filled(KIB, 4))
        await spent(owner)


@pytest.mark.parametrize("by", ["put", "settings"])
async def test_a_ref_expires(by: str) -> None:
    async with pair(ttl=0.03 if by == "settings" else None) as (owner, client):
        ref = await owner.put(filled(KIB), ttl=0.03 if by == "put" else ...)
        lasting = await owner.put(filled(KIB, 2), ttl=None)
        await until(lambda: owner.statistics().expired == 1)
        await until(lambda: owner.statistics().slots_used == 1)
        with pytest.raises(StaleRef):
            await client.get(ref)
        assert torch.equal(tensor(await client.get(lasting)), filled(KIB, 2))
        await spent(owner)
        assert owner.statistics().expired == 1


async def test_what_is_borrowed_outlives_its_ttl() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB, 4), ttl=0.02)
        async with client.borrow(ref) as view:
            await until(lambda: owner.statistics().expired == 1)
            await client.release(await owner.put(filled(KIB, 9)))
            await until(lambda: owner.statistics().recycled == 1)
            assert torch.equal(tensor(view), filled(KIB, 4))
        await spent(owner)


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), "soon", [1]], ids=repr)
async def test_a_ttl_that_makes_no_sense(ttl: Any) -> None:
    async with pair() as (owner, _):
        with pytest.raises(SettingsError, match="ttl"):
            await owner.put(filled(1), ttl=ttl)
        with pytest.raises(SettingsError, match="ttl"):
            owner.put_nowait(filled(1), ttl=ttl)


async def test_an_old_generation_is_stale_whoever_has_the_slot_now() -> None:
    async with pair(slots=1) as (owner, client):
        old = await owner.put(filled(KIB, 1))
        await client.get(old)
        new = await owner.put(filled(KIB, 2))
        assert (new.slot, new.generation) == (old.slot, old.generation + 1)
        for reader in (owner, client):
            with pytest.raises(StaleRef):
                await reader.get(old)
            with pytest.raises(StaleRef):
                await reader.discard(old)
        assert torch.equal(tensor(await client.get(new)), filled(KIB, 2))


# --- waiting for bytes and pools -----------------------------------------------------------------


async def test_a_client_with_no_endpoint_attaches_at_the_first_ref() -> None:
    async with pair() as (owner, _), pair() as (other, _), featcache.connect() as client:
        ref = await owner.put(filled(KIB, 1))
        with pytest.raises(UnknownPool, match="not attached yet"):
            client.get_nowait(ref)
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 1))
        assert torch.equal(tensor(await client.get(await other.put(filled(9)))), filled(9))
        assert client.statistics().sessions == 2
        nowait = await owner.put(filled(KIB, 3))
        assert torch.equal(tensor(client.get_nowait(nowait)), filled(KIB, 3))
        refs = [await cache.put(filled(KIB)) for cache in (owner, other)]
        await client.release(refs[0])
        await client.discard(refs[1])
        await spent(owner)
        await spent(other)


async def test_many_tasks_that_meet_a_pool_attach_once() -> None:
    async with pair() as (owner, attached), featcache.connect() as client:
        refs = [await owner.put(filled(KIB, n)) for n in range(20)]
        features = await asyncio.gather(*(client.get(ref) for ref in refs))
        assert [int(tensor(feature)[0]) for feature in features] == list(range(20))
        assert owner.statistics().sessions == 2
        del attached
        await spent(owner)


async def test_one_of_them_gives_up() -> None:
    async with pair() as (owner, _), featcache.connect() as client:
        refs = [await owner.put(filled(KIB, n)) for n in range(3)]
        tasks = [asyncio.create_task(client.get(ref)) for ref in refs]
        await steps(1)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        for task, value in ((tasks[1], 1), (tasks[2], 2)):
            assert torch.equal(tensor(await task), filled(KIB, value))
        assert torch.equal(tensor(await client.get(refs[0])), filled(KIB, 0))
        await spent(owner)


async def test_a_client_makes_place_for_the_next_pool() -> None:
    async with contextlib.AsyncExitStack() as stack:
        owners = [
            await stack.enter_async_context(featcache.create(settings=small())) for _ in range(4)
        ]
        client = await stack.enter_async_context(featcache.connect(settings=small(attachments=2)))
        for turn in range(3):
            for owner in owners:
                got = await client.get(await owner.put(filled(KIB, turn)))
                assert torch.equal(tensor(got), filled(KIB, turn))
        await until(lambda: sum(owner.statistics().sessions for owner in owners) == 2)
        refs = [await owner.put(filled(KIB)) for owner in owners]
        async with client.borrow(refs[0]), client.borrow(refs[1]):
            with pytest.raises(featcache.PoolFull, match="attachments"):
                await client.get(refs[2])
        await client.get(refs[2])


async def test_bytes_that_are_still_on_their_way() -> None:
    """On a GPU the word comes late; here it is held back."""
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        state = owner._life.engine
        assert state is not None
        published = state.pool.words.published
        published[ref.slot] = 0
        with pytest.raises(GetTimeout):
            client.get_nowait(ref)
        with pytest.raises(GetTimeout), client.borrow(ref):
            pass
        with pytest.raises(GetTimeout):
            await client.get(ref, timeout=0.01)
        with pytest.raises(GetTimeout):
            async with client.borrow(ref, timeout=0.01):
                pass
        tasks = [asyncio.create_task(reader.get(ref)) for reader in (client, client)]
        await steps(3)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        published[ref.slot] = ref.generation
        assert torch.equal(tensor(await tasks[1]), filled(KIB, 4))
        await spent(owner)


@pytest.mark.parametrize("end", ["discard", "close"])
async def test_bytes_that_never_come(end: str) -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        state = owner._life.engine
        assert state is not None
        state.pool.words.published[ref.slot] = 0
        task = asyncio.create_task(client.get(ref))
        await steps(3)
        if end == "discard":
            await owner.discard(ref)
            with pytest.raises(StaleRef):
                await task
            # What is still on its way would land in the next feature's bytes.
            state.pool.collect()
            await asyncio.sleep(2 * small().grace)
            state.pool.collect()
            assert owner.statistics().slots_used == 1
            state.pool.words.published[ref.slot] = ref.generation
            await spent(owner)
        else:
            await owner.aclose()
            with pytest.raises(OwnerLost):
                await task


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan"), [1]], ids=repr)
async def test_a_timeout_that_makes_no_sense(timeout: Any) -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(1))
        with pytest.raises(SettingsError, match="timeout"):
            await owner.put(filled(1), timeout=timeout)
        for reader in (owner, client):
            with pytest.raises(SettingsError, match="timeout"):
                await reader.get(ref, timeout=timeout)
            with pytest.raises(SettingsError, match="timeout"):
                reader.borrow(ref, timeout=timeout)
            with pytest.raises(SettingsError, match="timeout"):
                await reader.release(ref, timeout=timeout)


# --- cancellation of a copy ----------------------------------------------------------------------


async def test_a_get_cancelled_while_its_thread_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with pair(inline_bytes=0) as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        monkeypatch.setattr(HostMapping, "read", gate.wrap(HostMapping.read))
        task = asyncio.create_task(client.get(ref))
        await until(gate.entered.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The thread still reads: whatever becomes of the ref, its bytes stay.
        await owner.discard(ref)
        await client.release(await owner.put(filled(KIB, 9)))
        await until(lambda: owner.statistics().recycled == 1)
        assert owner.statistics().slots_used == 1
        gate.open()
        await spent(owner)


async def test_after_a_cancelled_get_the_read_is_still_owed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0) as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "read", gate.wrap(HostMapping.read))
            task = asyncio.create_task(client.get(ref))
            await until(gate.entered.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        again = asyncio.create_task(client.get(ref))  # beside the thread that is still at it
        assert torch.equal(tensor(await again), filled(KIB, 4))
        assert owner.statistics().slots_used == 1
        gate.open()
        await spent(owner)


async def test_a_get_whose_copy_fails_leaves_the_read_owed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError

    for inline_bytes in (0, KIB):
        async with pair(inline_bytes=inline_bytes) as (owner, client):
            ref = await owner.put(filled(KIB, 4))
            with monkeypatch.context() as patch:
                patch.setattr(HostMapping, "read", fails)
                with pytest.raises(ZeroDivisionError):
                    await client.get(ref)
                with pytest.raises(ZeroDivisionError):
                    client.get_nowait(ref)
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, 4))
            await spent(owner)


async def test_the_owner_closes_while_a_client_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with pair(inline_bytes=0) as (owner, client):
        ref = await owner.put(filled(KIB, 4))
        monkeypatch.setattr(HostMapping, "read", gate.wrap(HostMapping.read))
        task = asyncio.create_task(client.get(ref))
        await until(gate.entered.is_set)
        await owner.aclose()
        gate.open()
        assert torch.equal(tensor(await task), filled(KIB, 4))  # mapped bytes stay readable


# --- refs as others send them --------------------------------------------------------------------


async def test_a_ref_read_back_from_its_bytes_is_the_same() -> None:
    async with pair() as (owner, client):
        ref = await owner.put({"a": filled(KIB, 4), "b": torch.ones(3)})
        again = FeatureRef.from_bytes(ref.to_bytes())
        assert again == ref
        assert hash(again) == hash(ref)
        assert len({ref, again}) == 1
        await client.release(again)
        with pytest.raises(StaleRef):
            await client.release(ref)
