"""A storm of cancellations: tasks cancelled at whatever point of a call they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import torch

import featcache
from featcache import FeatcacheError, FeatureCache, FeatureClient, Settings
from soak.board import Step, Word
from soak.content import Feature
from soak.plan import TTL_S
from soak.process import Fumble, Process

_AT_ONCE = 6
Cache = FeatureClient | FeatureCache


async def cancel_all_kinds(me: Process, cache: FeatureClient) -> None:
    """Start some calls at once, of all kinds, and cancel each at a point of its own."""
    kinds: list[Callable[[], Awaitable[None]]] = [
        lambda: _put_and_get(me, cache),
        lambda: _by_key(me, cache),
        lambda: _by_key(me, cache),
        lambda: _borrow(me, cache),
    ]
    if me.chance.random() < 0.2:
        kinds.append(lambda: _open_and_close(me))
    await cancel_some(me, [me.chance.choice(kinds) for _ in range(_AT_ONCE)])
    await me.pause()


async def cancel_some(me: Process, calls: list[Callable[[], Awaitable[None]]]) -> None:
    """Run calls at once and cancel nearly all of them, after a few turns of the loop or a while."""
    ended = await asyncio.gather(*(_cut_short(me, call) for call in calls), return_exceptions=True)
    for error in ended:
        if isinstance(error, BaseException):
            raise error


async def _cut_short(me: Process, call: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(call())
    way = me.chance.random()
    if way < 0.5:
        for _ in range(me.chance.randrange(12)):
            await asyncio.sleep(0)
    elif way < 0.9:
        await asyncio.sleep(me.chance.random() * 0.01)
    else:
        await asyncio.wait([task])
    if task.cancel():
        me.row.count(Word.CANCELLED)
    with me.tolerating():
        try:
            await task
        except asyncio.CancelledError:
            if (current := asyncio.current_task()) is not None and current.cancelling():
                raise


async def _put_and_get(me: Process, cache: Cache) -> None:
    # With no ttl where nobody is killed: what a cancelled put has left is then there at the end.
    content = me.content()
    ttl = TTL_S if me.place.mortal else None
    with me.at(Step.PUT, Word.PUTS):
        ref = await cache.put(content.make(me.made_on), ttl=ttl, timeout=5)
    try:
        with me.at(Step.GET, Word.GETS):
            found = await cache.get(ref)
        me.check(content, found, "get among cancellations")
    except (asyncio.CancelledError, FeatcacheError):
        await asyncio.shield(asyncio.ensure_future(_discard(me, cache, ref)))
        raise


async def _discard(me: Process, cache: Cache, ref: featcache.FeatureRef) -> None:
    try:
        await cache.discard(ref)
    except FeatcacheError as error:
        me.row.error(error)


async def _by_key(me: Process, cache: Cache) -> None:
    key, content = me.key()

    async def make() -> Feature:
        await asyncio.sleep(me.chance.random() * 0.004)
        if me.chance.random() < 0.1:
            raise Fumble
        return content.make(me.made_on)

    with me.at(Step.KEY, Word.KEYED):
        found = await cache.get_or_put(key, make, timeout=5)
    me.check(content, found, "get_or_put among cancellations")


async def _borrow(me: Process, cache: Cache) -> None:
    key, content = me.key()
    with me.at(Step.BORROW, Word.BORROWS):
        async with cache.borrow(key, timeout=0.005) as view:
            await asyncio.sleep(me.chance.random() * 0.005)
            me.check(content, view, "borrow among cancellations")


async def _open_and_close(me: Process) -> None:
    """A second client of this process, and an owner of its own."""
    if me.chance.random() < 0.5:
        async with featcache.connect(me.endpoint, device=me.device) as client:
            await client.contains("nothing")
    else:
        sizes = {"capacity": "2MiB", "segment": "2MiB", "initial": "2MiB"}
        async with featcache.create(settings=Settings(slots=16, **sizes)) as cache:
            await cache.put(torch.zeros(999))


async def cancel_in_owner(me: Process, cache: FeatureCache) -> None:
    """The same in an owner, by its own calls."""
    while not me.stopping:
        calls = [lambda: _put_and_get(me, cache), lambda: _by_key(me, cache)]
        with me.tolerating():
            await cancel_some(me, [me.chance.choice(calls) for _ in range(3)])
        await me.pause(0.05)
