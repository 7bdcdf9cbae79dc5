"""Keys over hosts: found at their homes, made once, offered."""

import asyncio
from functools import partial
from typing import Any

import pytest
import torch

import featcache
from featcache import FeatureCache, KeyNotFound, KeyTimeout
from featcache.owner.home import Home
from reach.clusters import cluster, free_addresses, key_at, owner_of
from reach.hosts import clients_of, plane_of
from support.caches import KIB, Feature, filled, tensor, until


async def never() -> torch.Tensor:
    """Make nothing until it is cancelled."""
    await asyncio.Event().wait()
    raise AssertionError


def first(feature: Feature) -> int:
    return int(tensor(feature)[0])


def keys_of(owner: FeatureCache) -> int:
    return owner.statistics().keys


async def test_a_key_is_found_at_its_home_and_kept() -> None:
    async with cluster(2, 1) as owners, featcache.connect(owners[2].endpoint) as client:
        key = key_at(owners, 1)
        await owners[1].put(filled(20 * KIB, 7), key=key)
        assert torch.equal(tensor(await client.get(key)), filled(20 * KIB, 7))
        assert first(await owners[2].get(key)) == 7
        assert first(client.get_nowait(key)) == 7
        assert len(plane_of(owners[2]).transfers) == 1
        assert owners[2].statistics().keys_fetched == 1
        assert not keys_of(owners[0])
        await until(lambda: not tickets_of(owners))


async def test_many_ranks_that_miss_a_key_cost_one_transfer() -> None:
    async with cluster(1, 1) as owners, clients_of(owners[1], 3) as clients:
        await owners[0].put(filled(KIB, 3), key="k")
        got = await asyncio.gather(*(each.get("k") for each in clients for _ in range(4)))
        assert [first(each) for each in got] == [3] * 12
        assert len(plane_of(owners[1]).transfers) == 1


async def test_every_kind_of_lookup_finds_it() -> None:
    async with cluster(2, 1) as owners, featcache.connect(owners[2].endpoint) as client:
        keys = [key_at(owners, n % 2, n) for n in range(6)]
        for n, key in enumerate(keys):
            await owners[n % 2].put({"a": filled(KIB, n), "b": torch.arange(n)}, key=key)
        assert await client.contains(keys[0])
        assert await client.contains_many([*keys, "none"]) == [True] * 6 + [False]
        assert not keys_of(owners[2])
        async with client.borrow(keys[0]) as view:
            assert isinstance(view, dict)
            assert first(view["a"]) == 0
        ref = await client.share(keys[1], readers=1)
        got = await client.get(ref)
        assert isinstance(got, dict)
        assert torch.equal(got["b"], torch.arange(1))
        many = await client.get_many(keys[2:4])
        assert all(isinstance(each, dict) for each in many)
        made = await client.get_or_put(keys[4], lambda: pytest.fail("it is there"))
        assert isinstance(made, dict)
        await owners[2].get(keys[5], timeout=5)
        assert keys_of(owners[2]) == 6


async def test_a_key_that_is_nowhere_is_not_found() -> None:
    async with cluster(2, 1) as owners, featcache.connect(owners[2].endpoint) as client:
        for cache in (owners[0], owners[2], client):
            with pytest.raises(KeyNotFound):
                await cache.get("none")
            with pytest.raises(KeyTimeout):
                await cache.get("none", timeout=0.05)
            with pytest.raises(KeyNotFound):
                await cache.share("none", readers=1)
            assert not await cache.contains("none")


async def test_a_get_with_a_timeout_waits_at_the_home_too() -> None:
    async with cluster(1, 2) as owners, clients_of(owners[1], 2) as clients:
        waiting = [asyncio.ensure_future(each.get("k", timeout=20)) for each in clients]
        await until(lambda: owners[0]._opened().pool.store.key_waiters.count == 1)
        await owners[2].put(filled(KIB, 5), key="k")
        assert [first(each) for each in await asyncio.gather(*waiting)] == [5, 5]
        await until(lambda: not tickets_of(owners))


async def test_a_put_is_offered_to_its_home() -> None:
    async with cluster(2, 2) as owners, featcache.connect(owners[2].endpoint) as client:
        key = key_at(owners, 0)
        await client.put(filled(KIB, 4), key=key)
        await until(lambda: keys_of(owners[0]) == 1)
        assert first(await owners[3].get(key)) == 4
        assert owners[2].statistics().keys_offered == 1
        assert not keys_of(owners[1])
        await until(lambda: not grants_of(owners))


async def test_what_is_on_its_way_to_its_home_is_found_there() -> None:
    async with cluster(1, 2) as owners:
        plane = plane_of(owners[0])
        plane.held = True
        await owners[1].put(filled(KIB, 4), key="k")
        await until(lambda: len(plane.transfers) == 1)
        looks = [asyncio.ensure_future(owners[n].get("k")) for n in (0, 2)]
        assert await owners[0].contains("k")
        await until(lambda: waits_for_offers(owners[0]))
        plane.transfers[0].land()
        assert [first(each) for each in await asyncio.gather(*looks)] == [4, 4]
        await until(lambda: not grants_of(owners))
        assert len(plane.transfers) == 1


async def test_what_was_put_or_made_is_found_by_the_next_call_on_any_host() -> None:
    async with cluster(2, 2) as owners:
        await until(lambda: all(connected(owner) for owner in owners[2:]))
        for n in range(10):
            await owners[2].put(filled(KIB, n), key=f"put {n}")
            assert first(await owners[n % 2 * 3].get(f"put {n}")) == n
            made = await owners[2].get_or_put(f"made {n}", partial(filled, KIB, n))
            assert first(made) == n
            assert first(await owners[n % 2 + 1].get(f"made {n}")) == n
        await until(lambda: not (tickets_of(owners) or grants_of(owners)))


async def test_two_hosts_make_a_key_once() -> None:
    async with (
        cluster(1, 2) as owners,
        featcache.connect(owners[1].endpoint) as one,
        featcache.connect(owners[2].endpoint) as other,
    ):
        made: list[int] = []
        go_on = asyncio.Event()

        async def make(n: int) -> torch.Tensor:
            made.append(n)
            await go_on.wait()
            return filled(KIB, n)

        async def want(cache: Any, n: int) -> int:
            return first(await cache.get_or_put("k", lambda: make(n)))

        caches = [*owners, one, other]
        wants = [asyncio.ensure_future(want(each, n)) for n, each in enumerate(caches)]
        await until(lambda: bool(made))
        await until(lambda: waiting_at(owners[0]) >= 1)
        go_on.set()
        assert len(set(await asyncio.gather(*wants))) == 1
        assert len(made) == 1
        assert [keys_of(owner) for owner in owners] == [1, 1, 1]
        await until(lambda: not tickets_of(owners) and not claims_of(owners))


async def test_a_maker_that_fails_passes_the_claim_to_the_next_host() -> None:
    async with cluster(1, 2) as owners:
        going = asyncio.Event()

        async def fail() -> torch.Tensor:
            await going.wait()
            raise RuntimeError("no such image")

        first_try = asyncio.ensure_future(owners[1].get_or_put("k", fail))
        await until(lambda: claims_of(owners) == 2)  # one here, one at the home
        second = asyncio.ensure_future(owners[2].get_or_put("k", lambda: filled(KIB, 2)))
        await until(lambda: waiting_at(owners[0]) == 1)
        going.set()
        with pytest.raises(RuntimeError):
            await first_try
        assert first(await second) == 2
        assert first(await owners[1].get("k", timeout=10)) == 2
        await until(lambda: not tickets_of(owners) and not claims_of(owners))


async def test_a_cancelled_maker_passes_the_claim_on() -> None:
    async with cluster(1, 2) as owners:
        making = asyncio.ensure_future(owners[1].get_or_put("k", never))
        await until(lambda: claims_of(owners) == 2)
        second = asyncio.ensure_future(owners[2].get_or_put("k", lambda: filled(KIB, 2)))
        await until(lambda: waiting_at(owners[0]) == 1)
        making.cancel()
        assert first(await second) == 2
        await until(lambda: not tickets_of(owners) and not claims_of(owners))


async def test_a_get_or_put_that_may_not_wait_does_not() -> None:
    async with cluster(1, 2) as owners:
        making = asyncio.ensure_future(owners[1].get_or_put("k", never))
        await until(lambda: claims_of(owners) == 2)
        for cache in (owners[0], owners[2]):
            with pytest.raises(KeyTimeout):
                await cache.get_or_put("k", lambda: filled(KIB), timeout=0)
        making.cancel()
        await until(lambda: not tickets_of(owners) and not claims_of(owners))


async def test_a_wait_that_is_cancelled_leaves_nothing_at_the_home() -> None:
    async with cluster(1, 2) as owners:
        making = asyncio.ensure_future(owners[1].get_or_put("k", never))
        await until(lambda: claims_of(owners) == 2)
        with pytest.raises(KeyTimeout):
            await owners[2].get_or_put("k", lambda: filled(KIB), timeout=0.1)
        with pytest.raises(KeyTimeout):
            await owners[2].get("k", timeout=0.1)
        await until(lambda: waiting_at(owners[0]) == 0)
        making.cancel()
        await until(lambda: not tickets_of(owners) and not claims_of(owners))


def tickets_of(owners: list[FeatureCache]) -> int:
    """What homes have given by key, as both ends know it."""
    count = 0
    for owner in owners:
        beyond = owner._opened().beyond
        assert beyond is not None
        count += sum(len(home.tickets) for home in beyond.homes._homes.values())
        if beyond.peers is not None:
            peers = beyond.peers._peers.values()
            count += sum(len(peer.given) + len(peer.promised) for peer in peers)
            assert beyond.far_keys is not None
            count += len(beyond.far_keys._coming)
    return count


def connected(owner: FeatureCache) -> bool:
    """Whether an owner is connected to two others."""
    beyond = owner._opened().beyond
    assert beyond is not None
    return beyond.homes.connected == 2


def waits_for_offers(owner: FeatureCache) -> bool:
    """Whether another host's request waits at a home for what is offered."""
    beyond = owner._opened().beyond
    assert beyond is not None
    assert beyond.peers is not None
    return sum(len(peer.tasks) for peer in beyond.peers._peers.values()) == 2


def claims_of(owners: list[FeatureCache]) -> int:
    return sum(owner._opened().pool.store.key_waiters.claims for owner in owners)


def waiting_at(owner: FeatureCache) -> int:
    return owner._opened().pool.store.key_waiters.count


def grants_of(owners: list[FeatureCache]) -> int:
    """Reads by key that are out."""
    return sum(
        slot.grants for owner in owners for slot in owner._opened().pool.store.table.in_use()
    )


async def test_a_home_that_starts_later_is_told_of_what_is_put() -> None:
    addresses = free_addresses(2)
    async with (
        owner_of(addresses, addresses[0], reconnect_interval=60.0, peer_timeout=10.0) as early,
        owner_of(addresses, addresses[1], peer_timeout=10.0) as late,
        owner_of(addresses) as reader,
    ):
        await until(lambda: any(home.linked is not None for home in _homes_of(early)))
        key = key_at([early, late], 1)
        await early.put(filled(KIB, 1), key=key)
        assert torch.equal(tensor(await reader.get(key)), filled(KIB, 1))


async def test_an_owner_that_has_opened_is_connected_to_the_homes_that_are_there() -> None:
    async with cluster(2, 1, peer_timeout=10.0) as owners:
        assert sum(home.linked is not None for home in _homes_of(owners[2])) == 2
        for home in range(2):
            key = key_at(owners, home)
            await owners[2].put(filled(KIB, home), key=key)
            assert first(await owners[home].get(key)) == home


def _homes_of(owner: FeatureCache) -> list[Home]:
    beyond = owner._opened().beyond
    assert beyond is not None, "it is of a cluster"
    return beyond.homes_known()
