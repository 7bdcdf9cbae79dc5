"""Hosts that are lost while a key is looked up, made, or offered; and what hostile ones say."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

import featcache
from featcache import FeatureCache, KeyNotFound, KeyTimeout, events
from featcache.errors import BackendUnavailable, FeatcacheError, MalformedRef
from featcache.owner.landing import checked_specs
from featcache.reach import messages
from featcache.ref import TensorSpec
from reach.clusters import cluster, free_addresses, key_at, owner_of
from reach.hosts import plane_of
from reach.proxy import Network, network
from reach.test_far_keys import claims_of, first, grants_of, never, tickets_of, waiting_at
from support.caches import KIB, filled, steps, tensor, until


@contextlib.asynccontextmanager
async def behind(**changes: Any) -> AsyncIterator[tuple[list[FeatureCache], Network]]:
    """A home, a host that reaches it over a network, and one that reaches it without."""
    [address] = free_addresses(1)
    async with (
        owner_of([address], address, **changes) as home,
        network(address) as between,
        owner_of([between.address], **changes) as reader,
        owner_of([address], **changes) as other,
    ):
        yield [home, reader, other], between


async def settled(owners: list[FeatureCache]) -> None:
    """Return when nothing is claimed, given or granted any more."""
    await until(
        lambda: not (tickets_of(owners) or claims_of(owners) or grants_of(owners)), timeout_s=20
    )


# --- the maker's host -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "vanished"])
async def test_a_makers_host_that_is_lost_passes_the_claim_on(how: str) -> None:
    async with behind(peer_lease=1.0) as (owners, between):
        making = asyncio.ensure_future(owners[1].get_or_put("k", never))
        await until(lambda: claims_of(owners) == 2)
        waiting = asyncio.ensure_future(owners[2].get_or_put("k", lambda: filled(KIB, 2)))
        await until(lambda: waiting_at(owners[0]) == 1)
        between.cut()
        if how == "vanished":
            between.reset()
        assert first(await asyncio.wait_for(waiting, 10)) == 2
        await until(lambda: owners[0].statistics().claims_passed == 1)
        making.cancel()
        between.mend()
        await settled(owners)


async def test_a_maker_whose_connection_broke_keeps_its_claim() -> None:
    async with behind() as (owners, between):
        go_on = asyncio.Event()

        async def make() -> torch.Tensor:
            await go_on.wait()
            return filled(KIB, 1)

        making = asyncio.ensure_future(owners[1].get_or_put("k", make))
        await until(lambda: claims_of(owners) == 2)
        waiting = asyncio.ensure_future(
            owners[2].get_or_put("k", lambda: pytest.fail("made twice"))
        )
        await until(lambda: waiting_at(owners[0]) == 1)
        between.reset()
        await until(lambda: between.connections == 2)
        go_on.set()
        assert first(await making) == 1
        assert first(await waiting) == 1
        await settled(owners)


async def test_an_offer_of_a_host_that_is_lost_is_not_kept() -> None:
    async with behind(peer_lease=1.0) as (owners, between):
        await owners[1].put(filled(KIB, 1), key="warm")
        await until(lambda: owners[0].statistics().keys == 1)
        plane = plane_of(owners[0])
        plane.held = True
        await owners[1].put(filled(KIB, 7), key="k")
        await until(lambda: len(plane.transfers) == 2)
        between.cut()
        plane.transfers[-1].land()  # and nobody vouches for what was read
        await asyncio.sleep(0)
        with pytest.raises(KeyNotFound):
            await owners[2].get("k")
        plane.held = False
        await until(lambda: owners[0].statistics().slots_used == 1, timeout_s=20)
        between.mend()
        await settled(owners)


async def test_a_read_of_an_offer_that_fails_leaves_the_claim_to_the_next() -> None:
    async with cluster(1, 2) as owners:
        going = asyncio.Event()

        async def make() -> torch.Tensor:
            await going.wait()
            return filled(KIB, 1)

        making = asyncio.ensure_future(owners[1].get_or_put("k", make))
        await until(lambda: claims_of(owners) == 2)
        waiting = asyncio.ensure_future(owners[2].get_or_put("k", lambda: filled(KIB, 2)))
        await until(lambda: waiting_at(owners[0]) == 1)
        plane = plane_of(owners[0])
        plane.held = True
        going.set()
        assert first(await making) == 1
        await until(lambda: len(plane.transfers) == 1)
        plane.held = False
        plane.transfers[0].fail(BackendUnavailable("remote disconnected"))
        assert first(await waiting) == 2
        await settled(owners)


# --- the home ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "vanished", "closed"])
async def test_whoever_waits_at_a_home_that_is_lost_goes_on(how: str) -> None:
    async with behind() as (owners, between):
        home, reader, other = owners
        making = asyncio.ensure_future(other.get_or_put("k", never))
        await until(lambda: claims_of(owners) == 2)
        waits = [
            asyncio.ensure_future(reader.get_or_put("k", lambda: filled(KIB, 2))),
            asyncio.ensure_future(reader.get("k", timeout=20)),
        ]
        await until(lambda: waiting_at(home) == 2)
        if how == "closed":
            await home.aclose()
        else:
            between.cut()
            if how == "vanished":
                between.reset()
        got = await asyncio.wait_for(asyncio.gather(*waits), 10)
        assert [first(each) for each in got] == [2, 2]
        making.cancel()
        with contextlib.suppress(FeatcacheError, asyncio.CancelledError):
            await making


async def test_a_fetch_from_a_home_that_is_lost_ends_as_not_found() -> None:
    async with behind() as (owners, between):
        home, reader, _ = owners
        await home.put(filled(KIB, 1), key="warm")
        await reader.get("warm")
        await home.put(filled(KIB, 7), key="k")
        plane = plane_of(reader)
        plane.held = True
        getting = asyncio.ensure_future(reader.get("k"))
        await until(lambda: len(plane.transfers) == 2)
        between.cut()
        with pytest.raises(KeyNotFound):
            await asyncio.wait_for(getting, 10)
        plane.held = False
        for transfer in plane.transfers:
            transfer.land()
        between.mend()

        assert first(await reader.get("k", timeout=20)) == 7  # its home is tried again
        await settled(owners)


async def test_the_next_in_rank_stands_in_for_a_home_that_is_down() -> None:
    async with cluster(2, 2) as owners:
        key = key_at(owners, 0)
        await owners[0].aclose()
        made: list[int] = []

        async def want(n: int) -> int:
            def make() -> torch.Tensor:
                made.append(n)
                return filled(KIB, n)

            return first(await owners[n].get_or_put(key, make))

        got = [await want(n) for n in (2, 3, 1)]
        assert (got, made) == ([2, 2, 2], [2])
        await until(lambda: owners[1].statistics().keys == 1)


async def test_a_home_that_is_started_again_is_asked_again() -> None:
    [address] = free_addresses(1)
    async with owner_of([address]) as reader:
        async with owner_of([address], address) as home:
            await home.put(filled(KIB, 1), key="a")
            assert first(await reader.get("a")) == 1
        with pytest.raises(KeyNotFound):
            await reader.get("b")
        async with owner_of([address], address) as home:
            waiting = asyncio.ensure_future(reader.get("b", timeout=20))
            await home.put(filled(KIB, 2), key="b")
            assert first(await waiting) == 2


async def test_a_home_of_another_cluster_is_told_of_and_not_asked() -> None:
    told: list[events.Event] = []
    [address] = free_addresses(1)
    async with (
        featcache.create(settings=featcache.Settings(), listen=address, cluster_key="z" * 20),
        owner_of([address]) as reader,
    ):
        events.add_hook(told.append)
        try:
            assert first(await reader.get_or_put("k", lambda: filled(KIB, 3))) == 3
        finally:
            events.remove_hook(told.append)
    assert any(isinstance(each, events.KeySourceFailed) for each in told)


async def test_two_hosts_that_ask_each_other_both_go_on() -> None:
    """Their lists differ, which none should; neither waits for the other."""
    here, there = free_addresses(2)
    async with owner_of([there], here) as one, owner_of([here], there) as other:
        for n in range(5):
            got = await asyncio.wait_for(
                asyncio.gather(
                    *(each.get_or_put(f"k{n}", lambda: filled(KIB, 1)) for each in (one, other) * 2)
                ),
                10,
            )
            assert [first(each) for each in got] == [1] * 4
        await settled([one, other])


async def test_an_own_address_by_another_name_is_found_out() -> None:
    [address] = free_addresses(1)
    named = address.replace("127.0.0.1", "localhost")
    async with owner_of([named], address) as home, owner_of([named]) as reader:
        assert first(await home.get_or_put("k", lambda: filled(KIB, 1))) == 1
        assert first(await reader.get("k")) == 1
        with pytest.raises(KeyNotFound):
            await home.get("none")
        assert home.statistics().keys_offered == 0


# --- room -------------------------------------------------------------------------------------------


async def test_a_feature_that_is_too_large_here_is_not_found_here() -> None:
    [address] = free_addresses(1)
    async with owner_of([address], address) as home, owner_of([address], capacity="64KiB") as small:
        await home.put(filled(200 * KIB), key="k")
        with pytest.raises(KeyNotFound):
            await small.get("k")
        await settled([home, small])


async def test_a_fetched_key_is_evicted_as_any_other() -> None:
    async with cluster(1, 1, capacity="256KiB") as owners:
        for n in range(8):
            await owners[0].put(filled(60 * KIB, n), key=f"k{n}")
            assert first(await owners[1].get(f"k{n}")) == n
        assert owners[1].statistics().keys <= 4
        assert await owners[1].evict("k7")
        assert first(await owners[1].get("k7")) == 7
        await settled(owners)


# --- what is said -----------------------------------------------------------------------------------


def test_specs_that_do_not_fit_the_bytes_are_refused() -> None:
    spec = TensorSpec(None, "uint8", (64,), 0)
    sound = messages.Offer(1, b"k", 0, 0, 64, [64], (spec,), b"")
    assert checked_specs(sound) == (spec,)
    for nbytes, pieces in ((64, [32]), (32, [32])):
        offer = messages.Offer(1, b"k", 0, 0, nbytes, pieces, (spec,), b"")
        with pytest.raises(MalformedRef):
            checked_specs(offer)


# --- all at once ------------------------------------------------------------------------------------


class Storm:
    """Calls of all kinds on all hosts, some of them cancelled."""

    def __init__(self, caches: list[Any], seed: int) -> None:
        self._caches = caches
        self._random = random.Random(seed)

    async def run(self, calls: int = 40) -> None:
        for _ in range(calls):
            task = asyncio.ensure_future(self._call())
            if self._random.random() < 0.3:
                await steps(self._random.randrange(30))
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def _make(self, n: int) -> torch.Tensor:
        await steps(self._random.randrange(5))
        if self._random.random() < 0.2:
            raise RuntimeError("failed")
        return filled(KIB, n)

    async def _call(self) -> None:
        cache, n = self._random.choice(self._caches), self._random.randrange(12)
        with contextlib.suppress(KeyNotFound, KeyTimeout, RuntimeError):
            found = await self._found(cache, n)
            assert all(torch.equal(tensor(each), filled(KIB, n)) for each in found)

    async def _found(self, cache: Any, n: int) -> list[Any]:
        key, kind = f"k{n}", self._random.randrange(6)
        if kind == 0:
            return [await cache.get(key)]
        if kind == 1:
            return [await cache.get(key, timeout=self._random.choice([0.01, 0.3]))]
        if kind == 2:
            return list(await cache.get_many([key, key]))
        if kind == 3:
            await cache.evict(key)
            return []
        return [await cache.get_or_put(key, lambda: self._make(n))]


@pytest.mark.parametrize("seed", range(3))
async def test_storms_of_calls_and_cancellations_leave_nothing(seed: int) -> None:
    async with cluster(2, 2, capacity="2MiB") as owners, contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(featcache.connect(owner.endpoint)) for owner in owners
        ]
        storms = [Storm([*owners, *clients], seed * 100 + n) for n in range(8)]
        await asyncio.wait_for(asyncio.gather(*(storm.run() for storm in storms)), 60)
        await settled(owners)
        # Slots that clients were given ahead of their next puts are taken back in a while.
        await until(lambda: all(owner.statistics().slots_used <= 12 for owner in owners))


async def peril(networks: list[Network], random_: random.Random, until_done: asyncio.Event) -> None:
    """Break connections, and cut and mend networks, until it is told to stop."""
    while not until_done.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until_done.wait(), random_.uniform(0.01, 0.1))
        hit = random_.choice(networks)
        if random_.random() < 0.7:
            hit.reset()
        else:
            hit.cut()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until_done.wait(), random_.uniform(0.1, 0.6))
            hit.mend()


@pytest.mark.parametrize("seed", range(2))
async def test_storms_over_networks_that_break_hang_nobody_and_leave_nothing(seed: int) -> None:
    listens = free_addresses(2)
    changes = {"capacity": "2MiB", "peer_timeout": 0.3, "peer_lease": 1.0}
    async with contextlib.AsyncExitStack() as stack:
        networks = [await stack.enter_async_context(network(listen)) for listen in listens]
        upstream = [each.address for each in networks]
        owners = [
            await stack.enter_async_context(owner_of(upstream, listen, **changes))
            for listen in (*listens, None, None)
        ]
        clients = [
            await stack.enter_async_context(featcache.connect(owner.endpoint)) for owner in owners
        ]
        done = asyncio.Event()
        perils = asyncio.ensure_future(peril(networks, random.Random(seed), done))
        storms = [Storm([*owners, *clients], seed * 100 + n) for n in range(8)]
        await asyncio.wait_for(asyncio.gather(*(storm.run(100) for storm in storms)), 120)
        done.set()
        await perils
        await settled(owners)
