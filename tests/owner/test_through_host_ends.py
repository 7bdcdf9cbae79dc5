"""Reads by way of the host that wait, are given up, or lose their owner: the read is owed or paid."""

import asyncio
from typing import Any

import pytest
import torch

import featcache
from featcache import GetTimeout, OwnerLost
from featcache.control.messages import Reply
from featcache.memory.host.slab import HostSlab
from featcache.owner.requests import RequestHandlers
from support.caches import KIB, Gate, filled, steps, tensor, until
from support.hosted import all_spent, holds, relayed, serving, store, stuffed

LONG_S = 300.0
"""Longer than a test lives: what goes before has not expired."""


@pytest.mark.parametrize("how", ["get", "borrow"])
async def test_a_full_host_pool_is_waited_for(how: str) -> None:
    """A copy that is not read goes by itself, and makes room for the next."""
    async with relayed(relay_ttl=0.2) as (owner, client):
        ref = await stuffed(owner, client)
        if how == "get":
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, 8))
        else:
            async with client.borrow(ref) as view:
                assert torch.equal(tensor(view), filled(KIB, 8))
        assert store(owner).expired == 1
        await all_spent(owner)


@pytest.mark.parametrize("how", ["get", "borrow"])
@pytest.mark.parametrize("end", ["timeout", "cancel"])
async def test_given_up_while_the_host_pool_is_full(how: str, end: str, no_leaks: None) -> None:
    async with relayed(relay_ttl=30.0) as (owner, client):
        ref = await stuffed(owner, client)
        timeout = 0.5 if end == "timeout" else None

        async def read() -> None:
            if how == "get":
                await client.get(ref, timeout=timeout)
            else:
                async with client.borrow(ref, timeout=timeout):
                    pass

        task = asyncio.create_task(read())
        await until(lambda: store(owner).queue)
        if end == "cancel":
            task.cancel()
        with pytest.raises(GetTimeout if end == "timeout" else asyncio.CancelledError):
            async with asyncio.timeout(10):
                await task
        assert holds(client) == 0
        for slot in list(store(owner).owing.values()):
            serving(owner).sessions.discard(slot.index, slot.generation)
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 8))  # still owed
        # Nothing is copied for the read that was given up: its request was cancelled.
        await all_spent(owner)


@pytest.mark.parametrize("turns", range(24))
@pytest.mark.parametrize("how", ["get", "borrow"])
async def test_cancelled_at_any_moment(how: str, turns: int, no_leaks: None) -> None:
    """Asked for, copied, attached to where the copy is, copied from there: the read is still owed.

    The copy that nobody reads now is paid by who asked for it: it does not wait to expire.
    """
    async with relayed(relay_ttl=LONG_S) as (owner, client):
        ref = await owner.put(filled(KIB, 6))
        borrow = client.borrow(ref)
        reading: Any = client.get(ref) if how == "get" else borrow.__aenter__()
        task = asyncio.create_task(reading)
        await steps(turns)
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            assert holds(client) == 0
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, 6))
        elif how == "borrow":
            await borrow.__aexit__(None, None, None)
        await all_spent(owner)


async def test_discarded_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is of this ref's bytes, or there is none."""
    gate = Gate()
    async with relayed() as (owner, client):
        await client.get(await owner.put(filled(KIB)))
        ref = await owner.put(filled(KIB, 6))
        with monkeypatch.context() as patch:
            patch.setattr(HostSlab, "read", gate.wrap(HostSlab.read))
            task = asyncio.create_task(client.get(ref))
            await until(gate.entered.is_set)
            await owner.discard(ref)
            await client.release(await owner.put(filled(KIB, 1)))
            gate.open()
            assert torch.equal(tensor(await task), filled(KIB, 6))
        await all_spent(owner)


async def test_a_copy_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise featcache.BackendUnavailable("no copy today")

    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 6))
        with monkeypatch.context() as patch:
            patch.setattr(HostSlab, "read", fails)
            for use in (client.get(ref), client.borrow(ref).__aenter__()):
                with pytest.raises(featcache.BackendUnavailable, match="no copy today"):
                    await use
        assert store(owner).table.used == holds(client) == 0
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 6))
        await all_spent(owner)


@pytest.mark.parametrize("how", ["get", "borrow"])
async def test_a_copy_that_is_made_and_can_not_be_read(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read is owed; the copy is not: nobody knows of it any more."""

    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    async with relayed(relay_ttl=LONG_S) as (owner, client):
        value = filled(KIB, 6)
        for feature in (value, {"one": value, "other": value}):
            ref = await owner.put(feature)
            reading: Any = client.get(ref) if how == "get" else client.borrow(ref).__aenter__()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", refuse)
                patch.setattr(torch, "empty_strided", refuse)
                with pytest.raises(featcache.BackendUnavailable, match="2[.]00 GiB"):
                    await reading
            assert holds(client) == 0
            await until(lambda: store(owner).table.used == 0)
            await client.get(ref)
        await all_spent(owner)


@pytest.mark.parametrize("how", ["get", "borrow"])
async def test_a_copy_whose_pool_can_not_be_attached(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can pay it then: it expires."""
    refused = 0

    async def refuse(*_: Any) -> Any:
        nonlocal refused
        refused += 1
        raise featcache.AttachRefused("not today")

    async with relayed(relay_ttl=1.0) as (owner, client):
        ref = await owner.put(filled(KIB, 6))
        reading: Any = client.get(ref) if how == "get" else client.borrow(ref).__aenter__()
        with monkeypatch.context() as patch:
            patch.setattr("featcache.client.registry.dial", refuse)
            with pytest.raises(featcache.AttachRefused, match="not today"):
                await reading
            await until(lambda: refused == 2)  # once to get it, once to pay it
        await until(lambda: store(owner).expired == 1)
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 6))
        await all_spent(owner)


async def test_an_answer_that_can_not_be_sent() -> None:
    """The copy goes with it, as a grant or a slot does: the session is gone, or the ref too long."""
    async with relayed(relay_ttl=LONG_S) as (owner, client):
        ref = await owner.put(filled(KIB, 6))
        served = owner._opened().served[0]
        for session in (next(n for n in served.pool.pages if n > 0), 1000):
            data = await served.sessions.relays.encoded(ref.to_bytes())
            assert store(owner).table.used == 1
            handlers = RequestHandlers(served.pool, served.writer, served.lookups, served.sessions)
            handlers.revoke(session, Reply(1, ref=data))
            await until(lambda: store(owner).table.used == 0)
        await client.release(ref)
        await all_spent(owner)


async def test_bytes_that_are_still_on_their_way() -> None:
    async with relayed() as (owner, client):
        ref = await owner.put(filled(KIB, 6))
        published = owner._opened().pool.words.published
        published[ref.slot] = 0
        with pytest.raises(GetTimeout):
            await client.get(ref, timeout=0.02)
        task = asyncio.create_task(client.get(ref))
        await steps(5)
        assert not task.done()
        published[ref.slot] = ref.generation
        assert torch.equal(tensor(await task), filled(KIB, 6))
        await all_spent(owner)


# --- the owner's end -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["queue", "copy"])
async def test_the_owner_closes_during_a_relay(
    at: str, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with relayed() as (owner, client):
        ref = await stuffed(owner, client) if at == "queue" else await owner.put(filled(KIB))
        with monkeypatch.context() as patch:
            if at == "copy":
                patch.setattr(HostSlab, "read", gate.wrap(HostSlab.read))
            task = asyncio.create_task(client.get(ref))
            await until(gate.entered.is_set if at == "copy" else lambda: store(owner).queue)
            closing = asyncio.create_task(owner.aclose())
            await steps(3)
            gate.open()
            await closing
        with pytest.raises(OwnerLost):
            await task
        await until(lambda: client.statistics().sessions == 0)


async def test_the_client_closes_during_a_relay(no_leaks: None) -> None:
    async with relayed(relay_ttl=0.3) as (owner, client):
        ref = await stuffed(owner, client)
        task = asyncio.create_task(client.get(ref))
        await until(lambda: store(owner).queue)
        task.cancel()
        await client.aclose()
        await asyncio.wait([task])
        await until(lambda: not store(owner).queue)  # the session is gone, and its relay with it
        await owner.get(ref)
        await all_spent(owner)
