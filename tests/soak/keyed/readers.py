"""The scripts of those that read by key: awaiting, in threads, without a loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import torch

import featcache.blocking
from featcache import FeatcacheError, FeatureCache, FeatureClient, KeyNotFound
from soak.board import Step, Word
from soak.keyed.eyes import Eyes, eyes_of
from soak.keyed.perils import Perils
from soak.keyed.plan import TTL_S, KeyedWorld, lengths_of
from soak.keyed.words import MADE, NAMES, make, who_puts
from soak.plan import Role
from soak.process import Process, served

_BATCH: Final = 48
_AGAIN: Final = 3
"""Times that the keys of a batch are read: what is decoded at the first read is known at the next."""
_THREADS: Final = 3
_ROUNDS: Final = 6
"""Batches of a thread, before its process looks whether it is to end."""
_PATIENCE_S: Final = 4.0

Cache = FeatureClient | FeatureCache
Tally = Counter[Word]


def note(me: Process, tally: Tally) -> None:
    """Count what was done; in one thread of a process."""
    for word, count in tally.items():
        me.row[word] += count
    me.row[Word.BEGUN] += 1
    me.row.beat()


class Counting:
    """Reads and misses of a block, counted however it ends."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.reads = self.misses = 0

    def __enter__(self) -> Counting:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Count."""
        self._tally[Word.READS] += self.reads
        self._tally[Word.MISSES] += self.misses


def batch(eyes: Eyes) -> list[int]:
    """Keys to read, several times each."""
    return eyes.choice.next(_BATCH // _AGAIN) * _AGAIN


def made_here(eyes: Eyes, number: int) -> torch.Tensor:
    """Make the feature of a key that whoever wants it makes."""
    world = eyes.me.world
    assert isinstance(world, KeyedWorld)
    nbytes = lengths_of(world.device).of_made(number)
    return make(number, nbytes, 1, eyes.me.made_on)


# --- with a loop -----------------------------------------------------------------------------------


async def get_all(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """Get one after the other, and now and then wait for one that is not there."""
    with Counting(tally) as counting:
        for number in batch(eyes):
            least = eyes.done[number]
            with eyes.lane():
                try:
                    found = await cache.get(NAMES[number])
                except KeyNotFound:
                    counting.misses += 1
                    continue
                eyes.work()
                eyes.check(number, found, least)
            counting.reads += 1


async def get_now(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """Get with no await."""
    get_nowait_all(cache, eyes, tally)


async def borrow_all(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """Borrow one after the other."""
    with Counting(tally) as counting:
        for number in batch(eyes):
            least = eyes.done[number]
            with eyes.lane():
                try:
                    async with cache.borrow(NAMES[number]) as view:
                        eyes.work()
                        eyes.check(number, view, least)
                except KeyNotFound:
                    counting.misses += 1
                    continue
            counting.reads += 1


async def borrow_now(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """Borrow with plain with."""
    borrow_nowait_all(cache, eyes, tally)


async def hold_some(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """Hold several borrows, one key twice among them, over turns of the loop; end them in any order."""
    numbers = eyes.choice.next(eyes.chance.randint(2, 6))
    numbers.append(numbers[0])
    held: list[tuple[int, Any, Any, int]] = []
    async with contextlib.AsyncExitStack() as left:
        for number in numbers:
            least, borrow = eyes.done[number], cache.borrow(NAMES[number])
            with eyes.lane():
                try:
                    view = await borrow.__aenter__()
                except KeyNotFound:
                    tally[Word.MISSES] += 1
                    continue
                left.push_async_exit(borrow)  # idempotent: of what is not left below
                eyes.check(number, view, least)
                held.append((number, borrow, view, least))
        await asyncio.sleep(eyes.chance.choice((0, 0, 0.002, 0.03)))
        eyes.chance.shuffle(held)
        for number, borrow, view, least in held:
            with eyes.lane():
                eyes.work()
                eyes.check(number, view, least)
                await borrow.__aexit__(None, None, None)
            tally[Word.READS] += 1
            await asyncio.sleep(0)


async def get_many(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """Get several in one call, which fails whole if one of them went meanwhile."""
    some = eyes.choice.next(16)
    numbers = [number for number in some if cache.contains_nowait(NAMES[number])]
    least = [eyes.done[number] for number in numbers]
    with eyes.lane():
        try:
            found = await cache.get_many([NAMES[number] for number in numbers])
        except KeyNotFound:
            tally[Word.MISSES] += 1
            return
        for at, number in enumerate(numbers):
            eyes.check(number, found[at], least[at])
    tally[Word.READS] += len(numbers)


async def ask(cache: Cache, eyes: Eyes, tally: Tally) -> None:
    """What needs the owner, at times: waits for keys, pins; what does not: whether keys are there."""
    number, least = eyes.choice.one(), 0
    name = NAMES[number]
    match eyes.chance.randrange(5):
        case 0:
            with eyes.lane():
                least = eyes.done[number]
                eyes.check(number, await cache.get(name, timeout=0.02), least)
            tally[Word.READS] += 1
        case 1:
            await cache.pin(name)
            await asyncio.sleep(eyes.chance.random() * 0.01)
            await cache.unpin(name)
        case 2:  # look up for another, who reads by the ref
            least = eyes.done[number]
            ref = await cache.share(name, readers=1, ttl=TTL_S)
            with eyes.lane():
                eyes.check(number, await cache.get(ref), least)
        case 3:
            for other in eyes.choice.next(_BATCH):
                await cache.contains(NAMES[other])
                cache.contains_nowait(NAMES[other])
        case _:
            numbers = [one for one in eyes.choice.next(_BATCH) if who_puts(one) == MADE]
            for one in numbers:
                with eyes.lane():
                    found = await cache.get_or_put(
                        NAMES[one], partial(made_here, eyes, one), timeout=_PATIENCE_S
                    )
                    eyes.check(one, found, 1)
                tally[Word.MADE_OR_FOUND] += 1


_WAYS: Final[tuple[Callable[[Any, Eyes, Tally], Awaitable[None]], ...]] = (
    *(get_all,) * 6,
    *(get_now,) * 12,
    *(borrow_all,) * 3,
    *(borrow_now,) * 6,
    *(hold_some,) * 2,
    get_many,
    ask,
)


async def read_some(cache: Cache, eyes: Eyes) -> None:
    """Read a batch in one of the ways; count it however it ends."""
    tally: Tally = Counter()
    try:
        await eyes.chance.choice(_WAYS)(cache, eyes, tally)
    finally:
        eyes.settle()
        note(eyes.me, tally)


async def read_awaiting(me: Process) -> None:
    """Read in one task."""
    eyes, perils = eyes_of(me), Perils(me)

    async def act(me: Process, cache: FeatureClient) -> None:
        perils.come()
        me.row[Word.AT] = Step.GET
        await read_some(cache, eyes)
        await asyncio.sleep(0)

    await served(me, act)
    eyes.settle(at_once=True)


# --- in threads --------------------------------------------------------------------------------------


def get_nowait_all(cache: Any, eyes: Eyes, tally: Tally) -> None:
    """Get one after the other, in whichever thread."""
    with Counting(tally) as counting:
        for number in batch(eyes):
            least = eyes.done[number]
            with eyes.lane():
                try:
                    found = cache.get_nowait(NAMES[number])
                except KeyNotFound:
                    counting.misses += 1
                    continue
                eyes.work()
                eyes.check(number, found, least)
            counting.reads += 1


def borrow_nowait_all(cache: Any, eyes: Eyes, tally: Tally) -> None:
    """Borrow one after the other, in whichever thread."""
    with Counting(tally) as counting:
        for number in batch(eyes):
            least = eyes.done[number]
            with eyes.lane():
                try:
                    with cache.borrow(NAMES[number]) as view:
                        eyes.work()
                        eyes.check(number, view, least)
                except KeyNotFound:
                    counting.misses += 1
                    continue
            counting.reads += 1


def in_a_thread(cache: FeatureClient, eyes: Eyes) -> Tally:
    """Some batches; what one raises ends the others."""
    tally: Tally = Counter()
    for _ in range(_ROUNDS):
        if eyes.chance.random() < 0.6:
            get_nowait_all(cache, eyes, tally)
        else:
            borrow_nowait_all(cache, eyes, tally)
    eyes.settle()
    return tally


async def read_in_threads(me: Process) -> None:
    """Read in several threads and in the loop, through one client."""
    perils, own = Perils(me), eyes_of(me)
    of_threads = [eyes_of(me) for _ in range(_THREADS)]

    async def act(me: Process, cache: FeatureClient) -> None:
        perils.come()
        me.row[Word.AT] = Step.GET
        begun = [asyncio.to_thread(in_a_thread, cache, eyes) for eyes in of_threads]
        ended = await asyncio.gather(*begun, read_some(cache, own), return_exceptions=True)
        for each in ended:
            if isinstance(each, Counter):
                note(me, each)
        for each in ended:
            if isinstance(each, BaseException):
                raise each

    await served(me, act)
    for eyes in (own, *of_threads):
        await asyncio.to_thread(eyes.settle, at_once=True)


# --- without a loop -----------------------------------------------------------------------------------


def get_blocking_all(cache: Any, eyes: Eyes, tally: Tally) -> None:
    """Get one after the other with the blocking call; now and then one that is made."""
    for number in eyes.choice.next(_BATCH):
        least = eyes.done[number]
        with eyes.lane():
            try:
                if who_puts(number) == MADE:
                    found = cache.get_or_put(
                        NAMES[number],
                        partial(made_here, eyes, number),
                        timeout=_PATIENCE_S,
                    )
                    tally[Word.MADE_OR_FOUND] += 1
                    tally[Word.READS] -= 1
                else:
                    found = cache.get(NAMES[number])
            except KeyNotFound:
                tally[Word.MISSES] += 1
                continue
            eyes.work()
            eyes.check(number, found, least)
        tally[Word.READS] += 1


def read_blocking(me: Process) -> None:
    """Read in two threads through one blocking client, anew whenever the owner is lost."""
    settings, perils = me.world.sizes.settings(), Perils(me)
    while not me.stopping:
        try:
            me.row[Word.AT] = Step.ATTACH
            with featcache.blocking.connect(
                me.endpoint, device=me.device, settings=settings
            ) as cache:
                me.row.count(Word.ATTACHES)
                _in_two_threads(me, cache, perils)
        except FeatcacheError as error:
            me.row.error(error)
        except Exception as error:  # noqa: BLE001 - see tolerating
            me.outside(error)
        me.row.beat()
        time.sleep(0.02)


def _in_two_threads(me: Process, cache: Any, perils: Perils) -> None:
    ended, counting = threading.Event(), threading.Lock()
    ways = get_blocking_all, get_nowait_all, borrow_nowait_all

    def read(eyes: Eyes, *, first: bool) -> None:
        while cache.is_open and not (ended.is_set() or me.stopping):
            tally: Tally = Counter()
            if first:
                perils.come()
            try:
                with me.tolerating():
                    eyes.chance.choice(ways)(cache, eyes, tally)
            finally:
                eyes.settle()
                with counting:
                    me.row[Word.AT] = Step.GET
                    note(me, tally)
        eyes.settle(at_once=True)

    def read_beside(eyes: Eyes) -> None:
        try:
            read(eyes, first=False)
        except FeatcacheError as error:
            me.row.error(error)
        finally:
            ended.set()

    other = threading.Thread(target=read_beside, args=(eyes_of(me),))
    other.start()
    try:
        read(eyes_of(me), first=True)
    finally:
        ended.set()
        other.join()


# --- which --------------------------------------------------------------------------------------------

READERS: Final[dict[Role, Callable[[Process], Awaitable[None]]]] = {
    Role.KEYED: read_awaiting,
    Role.KEYED_ON_DEVICE: read_awaiting,
    Role.KEYED_THREADS: read_in_threads,
}
