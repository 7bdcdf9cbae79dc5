"""A home that ends in one step of a read after the other: the look-up, the read, the payment."""

import asyncio
import time
from typing import Any

import pytest
import torch

import featcache
from featcache import OwnerLost
from featcache.owner import far_peers
from featcache.owner.far_peers import FarPeers
from reach.hosts import KEY, hosts, quick
from reach.test_far_faults import apart
from support.caches import KIB, filled, spent, tensor, until


async def test_a_home_that_dies_at_the_look_up_is_lost_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = asyncio.Event()
    never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def look(*_: object) -> Any:
        asked.set()
        return await never

    async with apart() as (both, between):
        monkeypatch.setattr(FarPeers, "_look", look)
        ref = between.ref(await both.home.put(filled(KIB)))
        reading = asyncio.create_task(both.client.get(ref))
        await asked.wait()
        between.cut()  # whoever dials it again hears nothing
        between.reset()
        with pytest.raises(OwnerLost):
            await reading
        await spent(both.reader)
        never.cancel()
        await both.home.discard(ref)
        await spent(both.home)


async def test_a_payment_to_a_home_that_has_died_is_owed_to_nobody() -> None:
    async with apart() as (both, between):
        both.reader_plane.notifications = 0
        ref = between.ref(await both.home.put(filled(KIB, 7)))
        assert torch.equal(tensor(await both.client.get(ref)), filled(KIB, 7))
        await both.home.aclose()
        beyond = both.reader._opened().beyond
        assert beyond is not None
        [home] = beyond.homes._homes.values()
        await until(lambda: home.linked is None)
        async with featcache.create(
            settings=quick(), listen=str(between.target), cluster_key=KEY
        ) as again:
            both.reader_plane.notifications = 1
            ref = between.ref(await again.put(filled(KIB, 3)))
            assert torch.equal(tensor(await both.client.get(ref)), filled(KIB, 3))
            await until(lambda: not home.ledger)
            await spent(again)
        await spent(both.reader)


async def test_a_reader_that_closes_in_the_look_up_leaves_nothing_at_the_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = asyncio.Event()
    look = FarPeers._look

    async def slow(*arguments: Any) -> Any:
        found = await look(*arguments)
        asked.set()
        await asyncio.sleep(0)
        return found

    async with hosts() as both:
        await both.client.get(await both.home.put(filled(KIB)))
        monkeypatch.setattr(FarPeers, "_look", slow)
        both.reader_plane.held = True
        ref = await both.home.put(filled(KIB), ttl=None)
        reading = asyncio.create_task(both.client.get(ref))
        await asked.wait()
        await both.reader.aclose()
        with pytest.raises(featcache.FeatcacheError):
            await reading
        await both.home.discard(ref)
        await spent(both.home)


async def test_a_home_that_stood_still_does_not_take_its_readers_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they have sent meanwhile is yet to be heard."""
    async with hosts(peer_timeout=20.0) as both:
        await both.client.get(await both.home.put(filled(KIB)))
        ref = await both.home.put(filled(KIB, 7), readers=2, ttl=None)
        both.reader_plane.held = True
        reading = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(both.reader_plane.transfers) == 2)
        beyond = both.home._opened().beyond
        assert beyond is not None
        assert beyond.peers is not None
        [peer] = beyond.peers._peers.values()
        monkeypatch.setattr(far_peers, "_now", lambda: time.monotonic() + 100)
        assert peer.timer is not None
        peer.timer.cancel()
        beyond.peers._watch(peer)  # as its timer does, before what came is read
        assert beyond.peers.lost == 0
        both.reader_plane.transfers[-1].land()
        assert torch.equal(tensor(await reading), filled(KIB, 7))
        await both.home.discard(ref)
        await spent(both.home)
