"""Gets of another host's refs that are cancelled at any moment: each is paid once, and no slot is lost."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from featcache import FeatureClient, FeatureRef, StaleRef
from featcache.owner.home import Home
from reach.hosts import Hosts, clients_of, hosts
from support.caches import KIB, filled, spent, tensor, until

_TURNS = 12
"""Turns of the loop within which a get is cancelled: it takes more."""


async def cancelled_and_then_read(rank: FeatureClient, ref: FeatureRef, turns: list[int]) -> None:
    for count in turns:
        reading = asyncio.ensure_future(rank.get(ref))
        for _ in range(count):
            await asyncio.sleep(0)
        if not reading.cancel():
            break
        await asyncio.wait([reading])
        if not reading.cancelled():
            break
    else:
        reading = asyncio.ensure_future(rank.get(ref))
    assert torch.equal(tensor(await reading), filled(ref.nbytes, ref.nbytes % 251))


async def batches(both: Hosts, count: int) -> AsyncIterator[list[FeatureRef]]:
    for first in range(count):
        sizes = range(first + 1, first + 1 + 24)
        yield [
            await both.home.put(filled(n * KIB, n * KIB % 251), readers=2, ttl=None) for n in sizes
        ]


async def test_gets_that_are_cancelled_at_any_moment_lose_no_slot() -> None:
    dice = random.Random(1)
    async with (
        hosts(peer_timeout=20.0, peer_lease=60.0) as both,
        clients_of(both.reader, 1) as [other],
    ):
        async for refs in batches(both, 8):
            await asyncio.gather(
                *(
                    cancelled_and_then_read(rank, ref, [dice.randrange(_TURNS) for _ in range(3)])
                    for ref in refs
                    for rank in (both.client, other)
                )
            )
        await spent(both.home)
        await spent(both.reader)


async def asked(both: Hosts, count: int) -> None:
    """Return once the reading owner works at so many requests of its clients."""
    server = both.reader._opened().main.server
    await until(lambda: sum(len(peer.tasks) for peer in server.sessions.values()) == count)


async def test_gets_of_one_session_take_turns_when_the_first_of_them_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[FeatureRef] = []
    look = Home.look

    async def counted(home: Home, ref: FeatureRef, *more: Any) -> Any:
        looks.append(ref)
        return await look(home, ref, *more)

    async with hosts(peer_timeout=20.0, peer_lease=60.0) as both:
        await both.client.get(await both.home.put(filled(KIB)))
        monkeypatch.setattr(Home, "look", counted)
        plane = both.reader_plane
        plane.held = True
        ref = await both.home.put(filled(KIB, 7), ttl=None)
        first = asyncio.create_task(both.client.get(ref))
        await until(lambda: len(plane.transfers) == 2)
        second = asyncio.create_task(both.client.get(ref))
        await asked(both, 2)
        first.cancel()
        await until(lambda: len(plane.transfers) == 3)  # of the second, once the first has ended
        third = asyncio.create_task(both.client.get(ref))
        await asked(both, 2)
        for transfer in plane.transfers:
            transfer.land()
        assert torch.equal(tensor(await second), filled(KIB, 7))
        # The third has the ref of the second: a session's read of it may be over by now.
        [outcome] = await asyncio.gather(third, return_exceptions=True)
        assert isinstance(outcome, torch.Tensor | StaleRef)
        assert len(looks) == 2
        await spent(both.home)
        await spent(both.reader)
