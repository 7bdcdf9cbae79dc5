"""Leases and claims of keys, held apart from any copy, as integrations use them."""

import asyncio

import pytest

import featcache
from featcache import CacheClosed, FeatureClient, KeyTimeout, OwnerLost, PoolFull
from featcache.api.claiming import claim, lease_now
from featcache.memory.host.slab import HostMapping
from support.caches import KIB, filled, pair, small
from support.keyed import claims, nothing_lost
from support.slabs import same

pytestmark = pytest.mark.usefixtures("no_leaks")

BIG = filled(600 * KIB, 1)
"""More than half of a small pool: two do not fit."""


async def test_a_lease_keeps_a_feature_from_eviction_until_its_end() -> None:
    async with pair() as (owner, client):
        await owner.put(BIG, key="a")
        lease = lease_now(client, "a")
        assert lease is not None
        assert lease.nbytes == BIG.nbytes
        with pytest.raises(PoolFull):
            await owner.put(BIG, key="b", on_full="raise")
        assert same(await client.get("a"), BIG)
        lease.end()
        lease.end()
        await owner.put(BIG, key="b")
        assert not await client.contains("a")
        await nothing_lost(owner)


async def test_an_absent_key_has_no_lease() -> None:
    async with pair() as (_, client):
        assert lease_now(client, "a") is None


async def test_a_lease_needs_no_device_that_reaches_the_slab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (owner, client):
        await owner.put(BIG, key="a")
        monkeypatch.setattr(HostMapping, "can_copy_to", lambda *_: False)
        lease = lease_now(client, "a")
        assert lease is not None
        lease.end()


async def test_who_misses_first_has_the_claim_and_the_next_waits_for_its_feature() -> None:
    async with pair() as (owner, client):
        async with featcache.connect(owner.endpoint) as other:
            first = await claim(client, "a", timeout=0)
            assert first is not None
            with pytest.raises(KeyTimeout):
                await claim(other, "a", timeout=0)
            waiting = asyncio.create_task(claim(other, "a"))
            await owner.put(filled(64), key="a")  # by a third: whoever the claimant has for it
            assert await waiting is None
            first.release()
            first.release()
        await nothing_lost(owner)


async def test_a_claim_that_is_given_up_passes_to_who_waits() -> None:
    async with pair() as (owner, client):
        async with featcache.connect(owner.endpoint) as other:
            first = await claim(client, "a")
            assert first is not None
            waiting = asyncio.create_task(claim(other, "a"))
            await asyncio.sleep(0)
            first.release()
            second = await waiting
            assert second is not None
            second.release()
        await nothing_lost(owner)


async def test_a_claim_ends_with_its_session() -> None:
    async with pair() as (owner, client):
        async with featcache.connect(owner.endpoint) as other:
            assert await claim(other, "a") is not None
            assert claims(owner) == 1
        taken = await claim(client, "a")
        assert taken is not None
        taken.release()


async def test_a_key_that_is_there_needs_no_claim() -> None:
    async with pair() as (owner, client):
        await owner.put(filled(64), key="a")
        assert await claim(client, "a") is None
        await nothing_lost(owner)


async def test_nothing_is_leased_of_an_owner_that_is_gone() -> None:
    owner = featcache.create(settings=small())
    await owner.open()
    client: FeatureClient = featcache.connect(owner.endpoint)
    await client.open()
    await owner.put(filled(64), key="a")
    lease = lease_now(client, "a")
    assert lease is not None
    await owner.aclose()
    with pytest.raises(OwnerLost):
        await claim(client, "a")
    with pytest.raises(OwnerLost):
        lease_now(client, "a")
    lease.end()
    await client.aclose()
    with pytest.raises(CacheClosed):
        lease_now(client, "a")
