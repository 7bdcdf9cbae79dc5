"""Hosts that are late, or gone, between two steps of a lookup or of an offer."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest
import torch

from featcache import FeatureCache, KeyNotFound
from featcache.errors import FeatcacheError
from featcache.reach import messages
from featcache.reach.link import HomeLink
from featcache.reach.plane import pair
from featcache.reach.secret import TlsContexts
from reach.clusters import cluster
from reach.hosts import KEY, plane_of, quick
from reach.test_far_key_faults import settled
from reach.test_far_keys import claims_of, first, tickets_of, waiting_at
from support.caches import KIB, filled, steps, tensor, until


def joined(owner: FeatureCache, key: bytes) -> int:
    """How many calls of an owner wait for a key that is being fetched."""
    beyond = owner._opened().beyond
    assert beyond is not None
    assert beyond.keys is not None
    flight = beyond.keys._fetching._flights.get(key)
    return 0 if flight is None else flight.waiting


async def test_an_offer_that_nobody_vouched_for_in_time_ends_the_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A maker's host that stood still has given its ticket up with its late word: the next makes."""
    tell = HomeLink.tell

    def late(link: HomeLink, note: messages.Note) -> None:
        if not isinstance(note, messages.Vouch):
            tell(link, note)

    async with cluster(1, 2, peer_lease=30.0) as owners:
        going = asyncio.Event()

        async def make() -> torch.Tensor:
            await going.wait()
            return filled(KIB, 1)

        making = asyncio.ensure_future(owners[1].get_or_put("k", make))
        await until(lambda: claims_of(owners) == 2)
        waiting = asyncio.ensure_future(owners[2].get_or_put("k", lambda: filled(KIB, 2)))
        await until(lambda: waiting_at(owners[0]) == 1)
        monkeypatch.setattr(HomeLink, "tell", late)
        going.set()
        assert first(await making) == 1
        await until(lambda: plane_of(owners[0]).transfers != [])
        await until(lambda: tickets_of(owners[1:2]) == 0)
        monkeypatch.undo()
        assert first(await asyncio.wait_for(waiting, 10)) == 2
        await settled(owners)


async def test_what_is_fetched_for_another_call_stays_pinned_when_the_first_gives_up() -> None:
    """Two calls fetch a key together, the first is cancelled, and the home has other bytes by then."""
    async with cluster(1, 1, capacity="1MiB", peer_timeout=20.0) as owners:
        home, reader = owners
        await home.put(filled(KIB, 9), key="warm")
        await reader.get("warm")
        await home.put(filled(400 * KIB, 1), key="k")
        plane = plane_of(reader)
        plane.held = True
        looking = asyncio.ensure_future(reader.get("k", timeout=20))
        await until(lambda: len(plane.transfers) == 2)
        await home.evict("k")
        await home.put(filled(400 * KIB, 2), key="k")
        getting = asyncio.ensure_future(reader.get_or_put("k", lambda: pytest.fail("made")))
        await until(lambda: joined(reader, b"k") == 2)
        looking.cancel()
        await asyncio.wait([looking])
        putting = asyncio.ensure_future(home.put(filled(400 * KIB, 3)))
        await steps(200)  # room for a put at home, if the first one's pin were not kept
        plane.held = False
        for transfer in plane.transfers:
            transfer.land()
        assert set(tensor(await getting).tolist()) == {1}
        await putting
        await settled(owners)


@contextlib.asynccontextmanager
async def linked(home: FeatureCache) -> AsyncIterator[HomeLink]:
    """A host that says what it likes."""
    settings = quick(peer_timeout=20.0)
    host = os.urandom(16)
    link = await HomeLink.dial(str(home.address), KEY.encode(), host, settings, TlsContexts(), list)
    try:
        yield link
    finally:
        link.close()


@pytest.mark.parametrize("claims", [False, True])
async def test_two_requests_under_one_ticket_are_not_given_two_things(claims: bool) -> None:
    """What no ticket stands for could never be given back."""
    async with cluster(1, 0) as owners, linked(owners[0]) as link:
        if not claims:
            for n in range(3):
                await owners[0].put(filled(KIB, n), key=f"k{n}")
        asks = [
            messages.Seek(link.number(), b"k%d" % n, 7, claims, waits=False, epoch=0)
            for n in range(3)
        ]
        told = await asyncio.gather(*map(link.request, asks), return_exceptions=True)
        assert sum(isinstance(each, FeatcacheError) for each in told) == 2
        link.tell(messages.GiveBack(7))
        await settled(owners)


async def test_a_promise_that_is_not_kept_is_waited_for_once() -> None:
    async with cluster(1, 1, peer_timeout=0.3) as owners, linked(owners[0]) as link:
        link.tell(messages.Promise(7, b"k"))
        await until(lambda: tickets_of(owners) > 0)
        assert await owners[1].contains("k")
        with pytest.raises(KeyNotFound):
            await owners[1].get("k")
        assert not await owners[1].contains("k")
        assert first(await owners[1].get_or_put("k", lambda: filled(KIB, 3))) == 3
        link.tell(messages.GiveBack(7))
        await settled(owners)


def test_a_read_of_many_pieces_is_cut_without_counting_each_again() -> None:
    pieces = pair(1000, [1] * 200_000, 0, [1, 199_999])
    assert len(pieces) == 200_000
    assert pieces[-1] == (1000 + 199_999, 199_999, 1)
