"""A client is killed as soon as its put has returned: what it published is there, nothing else is left."""

import os
import signal
from typing import Any

import pytest
import torch

import featcache
from featcache import FeatureRef
from support.caches import KIB, small, spent, until
from support.keyed import pool_of
from support.processes import Pipe, Start, gone

PUTS = 3


async def puts_and_dies(pipe: Pipe, endpoint: str, kept: bool) -> None:
    """Put until there is room ahead, then use it up, and be killed in the same breath."""
    async with featcache.connect(endpoint, settings=small()) as client:
        x = torch.full((KIB,), 1, dtype=torch.uint8)
        for _ in range(3):
            await client.discard(await client.put(x))
        assert await pipe.hear() == ("go on",)
        refs = [
            await client.put(
                torch.full_like(x, n), key=f"{n}" if kept and n % 2 else None, readers=1
            )
            for n in range(PUTS)
        ]
        pipe.say("refs", [ref.to_bytes() for ref in refs])
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("hears", [True, False], ids=["the owner runs", "the owner stands still"])
async def test_what_was_published_is_there(start: Start, hears: bool) -> None:
    """Its pidfd fires while the publishes are in the socket still: they come first."""
    async with featcache.create(settings=small()) as cache:
        child = start(puts_and_dies, cache.endpoint, hears)
        await until(lambda: cache.statistics().discarded == 3)
        child.tell("go on")
        _, sent = (await child.hear()) if hears else child.hear_now()
        gone(child.pid)
        refs = [FeatureRef.from_bytes(data) for data in sent]
        await until(lambda: cache.statistics().readers_lost == 1)
        for number, ref in enumerate(refs):
            found: Any = await cache.get(ref)
            assert torch.equal(found, torch.full((KIB,), number, dtype=torch.uint8))
        for key in list(pool_of(cache).store.directory):
            await cache.evict(key)
        await spent(cache)
        assert pool_of(cache).store.allocator.used_bytes == 0
        assert not any(pool_of(cache).words.reserved)
