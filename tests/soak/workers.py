"""The scripts of the workers: who reads, borrows, puts, makes; with a loop and without one."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Awaitable, Callable
from typing import Any

import attrs

import featcache.blocking
from featcache import FeatcacheError, FeatureClient, FeatureRef
from soak.board import Step, Word
from soak.cancelling import cancel_all_kinds
from soak.content import Content, Feature, unpack
from soak.forging import forge_frames, forge_refs
from soak.plan import TTL_S, Role
from soak.process import Fumble, Process, served

_PATIENCE_S = 4.0
_HELD_S = 0.15

# --- reading -------------------------------------------------------------------------------------


async def read_one(me: Process, cache: FeatureClient) -> None:
    """Take a ref from the mailbox and read it in one of the ways there are."""
    taken = await me.take()
    if taken is None:
        return
    content, ref = taken
    await read(me, cache, content, ref)
    await me.pause()


async def read(me: Process, cache: FeatureClient, content: Content, ref: FeatureRef) -> None:
    """Read a ref, and compare."""
    way = me.chance.random()
    if way < 0.55:
        with me.at(Step.GET, Word.GETS):
            found = await cache.get(ref, timeout=_PATIENCE_S)
        me.check(content, found, "get")
    elif way < 0.7:
        with me.at(Step.GET, Word.GETS):
            found = cache.get_nowait(ref)
        me.check(content, found, "get_nowait")
    elif way < 0.92:
        await borrow(me, cache, content, ref, _HELD_S if me.chance.random() < 0.1 else 0.0)
    else:
        with me.at(Step.GET, Word.RELEASES):
            await cache.release(ref, timeout=_PATIENCE_S)


async def borrow(
    me: Process, cache: FeatureClient, content: Content, ref: FeatureRef | str, held_s: float
) -> None:
    """Borrow, hold the view for a while, and see that its bytes stay what they are."""
    with me.at(Step.BORROW, Word.BORROWS):
        async with cache.borrow(ref, timeout=_PATIENCE_S) as view:
            me.check(content, view, "borrow")
            if held_s:
                await me.pause(held_s)
                me.check(content, view, "borrow, held")


async def borrow_some(me: Process, cache: FeatureClient) -> None:
    """Borrow up to four refs at once, each for a while of its own."""
    holding: list[asyncio.Task[None]] = []

    async def hold(content: Content, ref: FeatureRef) -> None:
        with me.tolerating():
            await borrow(me, cache, content, ref, _HELD_S)

    for _ in range(me.chance.randint(1, 4)):
        taken = await me.take()
        if taken is not None:
            holding.append(asyncio.ensure_future(hold(*taken)))
    ended = await asyncio.gather(*holding, return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error


# --- by key --------------------------------------------------------------------------------------


async def use_key(me: Process, cache: FeatureClient) -> None:
    """Look a key up, make its feature, or do something else with it."""
    key, content = me.key()
    way = me.chance.random()
    with me.at(Step.KEY, Word.KEYED):
        if way < 0.6:
            found = await cache.get_or_put(key, lambda: make(me, content), timeout=_PATIENCE_S)
            me.check(content, found, "get_or_put")
        elif way < 0.75:
            wait_s = 0.02 if me.chance.random() < 0.3 else None
            me.check(content, await cache.get(key, timeout=wait_s), "get by key")
        elif way < 0.85:
            await borrow(me, cache, content, key, _HELD_S / 5)
        elif way < 0.9:
            await cache.pin(key)
            await cache.unpin(key)
        elif way < 0.95:
            await cache.contains(key)
        else:
            await cache.evict(key)
    await me.pause()


async def make(me: Process, content: Content) -> Feature:
    """Make a key's feature, for a moment in which the maker may die; or raise."""
    me.row[Word.AT] = Step.MAKE
    await me.pause()
    if me.chance.random() < 0.05:
        raise Fumble
    me.row.count(Word.MADE)
    feature = content.make(me.made_on)
    me.row[Word.AT] = Step.PUT
    return feature


# --- writing -------------------------------------------------------------------------------------


async def put_one(me: Process, cache: FeatureClient) -> None:
    """Put, and send the ref to whoever owes a read."""
    places = [place for place in me.world.readers(me.place.pool) if place.role is not Role.FORGER]
    to = me.chance.sample(places, me.chance.randint(1, min(3, len(places))))
    if me.chance.random() < 0.5:
        to = [place for place in to if place.name] or to
    names = [place.name for place in to if place.name]
    readers = names if len(names) == len(to) else len(to)
    content = me.content()
    on_full: Any = me.chance.choice(("wait", "wait", "raise", "spill"))
    with me.at(Step.PUT, Word.PUTS):
        ref = await cache.put(
            content.make(me.made_on),
            readers=readers,
            ttl=TTL_S,
            timeout=_PATIENCE_S,
            on_full=on_full,
        )
    if not me.send(content, ref, to) and me.chance.random() < 0.5:
        await cache.discard(ref)
    await me.pause()


# --- without a loop ------------------------------------------------------------------------------


def without_loop(me: Process) -> None:
    """Read, and put by key, with no event loop of one's own."""
    while not me.stopping:
        try:
            settings = me.world.sizes.settings()
            me.row[Word.AT] = Step.ATTACH
            with featcache.blocking.connect(
                me.endpoint, device=me.device, name=me.place.name, settings=settings
            ) as cache:
                me.row.count(Word.ATTACHES)
                while not me.stopping:
                    with me.tolerating():
                        _act_without_loop(me, cache)
        except FeatcacheError as error:
            me.row.error(error)
        except Exception as error:  # noqa: BLE001 - see tolerating
            me.outside(error)
        me.row.beat()
        time.sleep(0.02)


def _act_without_loop(me: Process, cache: featcache.blocking.FeatureClient) -> None:
    if select.select([me.inbox], [], [], 0.02)[0]:
        content, ref = unpack(me.inbox.recv(1 << 16))
        with me.at(Step.GET, Word.GETS):
            found = cache.get(ref, timeout=_PATIENCE_S)
        me.check(content, found, "blocking get")
    key, content = me.key()
    with me.at(Step.KEY, Word.KEYED):
        found = cache.get_or_put(key, lambda: content.make(me.made_on), timeout=_PATIENCE_S)
    me.check(content, found, "blocking get_or_put")


# --- which -----------------------------------------------------------------------------------------


async def through_host(me: Process) -> None:
    """Read as one whose device can't access the slab does."""
    settings = attrs.evolve(me.world.sizes.settings(), through_host=True)
    await served(me, read_one, settings=settings)


SCRIPTS: dict[Role, Callable[[Process], Awaitable[None]]] = {
    Role.READER: lambda me: served(me, read_one),
    Role.BORROWER: lambda me: served(me, borrow_some),
    Role.RELAYED: through_host,
    Role.ROAMER: lambda me: served(me, read_one, bound=False),
    Role.MAKER: lambda me: served(me, use_key),
    Role.WRITER: lambda me: served(me, put_one),
    Role.FICKLE: lambda me: served(me, cancel_all_kinds),
    Role.FORGER: lambda me: served(me, forge_refs),
    Role.VANDAL: forge_frames,
}
