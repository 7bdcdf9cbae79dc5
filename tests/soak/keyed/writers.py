"""Those that put: the owners, which read as well, and clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from functools import partial
from typing import Any, Final

import featcache
from bench.poison import Poison
from featcache import FeatcacheError, FeatureCache, FeatureClient, KeyNotFound, PoolFull, events
from soak.board import Step, Word
from soak.keyed.eyes import Eyes, eyes_of
from soak.keyed.plan import TTL_S, lengths_of
from soak.keyed.readers import made_here, read_some
from soak.keyed.words import (
    KEYS,
    LASTING_WRITERS,
    MADE,
    NAMES,
    OWNERS,
    OWNERS_TOO,
    WRITERS,
    Choice,
    Ledger,
    make,
    who_puts,
)
from soak.owners import DRAIN_S, account_file, figures
from soak.process import Process, served
from soak.turns import TimedSelector
from support.processes import NotSo, until

_AT_ONCE: Final = 6
_TO_FILL: Final = 600
_EMPTY_EVERY_S: Final = 8.0
_EMPTY_S: Final = 0.4


class PoisonAtOnce(Poison):
    """Poison that is there before the extent is free: clients write there without a word to its owner."""

    def _poison(self, offset_bytes: int, nbytes: int) -> None:
        super()._poison(offset_bytes, nbytes)
        self._wait()


class Versions:
    """The next version of each key that a process puts."""

    def __init__(self, me: Process, whose: int) -> None:
        self.me = me
        ledger: Ledger = me.world.ledger  # type: ignore[attr-defined]  # a KeyedWorld
        self._begun, self._done = ledger.begun[me.place.pool], ledger.done[me.place.pool]
        self._lengths = lengths_of(me.world.device)
        numbers = {number for number in range(KEYS) if who_puts(number) == whose}
        self.choice = Choice(me.chance, numbers)

    def next(self, cache: FeatureCache | FeatureClient) -> tuple[int, int, Any]:
        """A key, as often one that is not there as any, its next version, and the feature."""
        number = self.choice.one()
        if self.me.chance.random() < 0.5:
            some = self.choice.next(8)
            number = next((one for one in some if not cache.contains_nowait(NAMES[one])), number)
        version = self._begun[number] = self._begun[number] + 1
        feature = make(number, self._lengths.by(self.me.chance), version, self.me.made_on)
        return number, version, feature

    def ended(self, number: int, version: int) -> None:
        """A put has returned: see `Ledger`."""
        if not self.me.place.mortal:
            self._done[number] = version


# --- owners ----------------------------------------------------------------------------------------


class KeyedOwner:
    """One owner: it puts, evicts, pins and reads, and poisons what it frees."""

    def __init__(self, me: Process, selector: TimedSelector) -> None:
        self.me = me
        self.selector = selector
        self.eyes = eyes_of(me)
        self.versions, self.versions_too = Versions(me, OWNERS), Versions(me, OWNERS_TOO)
        self.counts: Counter[str] = Counter()
        self.by_table = 0
        self._to_put = _TO_FILL

    def note(self, event: events.Event) -> None:
        """Count what the pool tells."""
        self.counts[event.name.removeprefix("featcache.")] += 1

    async def run(self) -> None:
        """Own a pool until the storm is over, then account for it."""
        me = self.me
        events.remove_hook(events.log_to_structlog)
        events.add_hook(self.note)
        asyncio.get_running_loop().set_exception_handler(self._faulty)
        me.row[Word.AT] = Step.ATTACH
        created = featcache.create(
            device=me.made_on, endpoint=me.endpoint, settings=me.world.sizes.settings()
        )
        async with created as cache:
            poison = PoisonAtOnce(cache)
            await poison.prove(cache)
            self._count_hits(cache)
            if not me.place.mortal:
                await self._warm_up(cache)
            me.row.count(Word.BEGUN)
            first = figures()
            self.selector.reset()
            await asyncio.gather(self.fill(cache), self.empty(cache), self.use(cache))
            self.eyes.settle(at_once=True)
            account: dict[str, Any] = {"first": first, "busy": figures()}
            while me.world.board.stopping < 2:  # noqa: ASYNC110 - shared memory has no event
                await asyncio.sleep(0.01)
            account |= await self._drained(cache, poison)
            account["last"] = figures()
        if not me.place.mortal:
            account_file(me.world, me.place).write_text(json.dumps(account))

    def _faulty(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Count what only the loop is told: no call of this process fails by it."""
        self.me.outside(context.get("exception") or RuntimeError(context["message"]))

    async def fill(self, cache: FeatureCache) -> None:
        """Put keys of one's own, with other sizes each time."""
        while not self.me.stopping:
            for _ in range(self._to_put):
                with self.me.tolerating():
                    await self._put(cache)
            self._to_put = min(self._to_put, _AT_ONCE)
            self.me.row.beat()
            await asyncio.sleep(self.me.chance.random() * 0.008)

    async def _put(self, cache: FeatureCache) -> None:
        # In no lane: `use` is in one while this task runs, and what is made and put without an await is
        # on one stream, whichever.
        number, version, feature = self.versions.next(cache)
        try:
            cache.put_nowait(feature, key=NAMES[number])
        except PoolFull:
            self.counts["full"] += 1
            self.eyes.finish()
            await cache.put(feature, key=NAMES[number], timeout=1.0)
            self.eyes.finish()
        self.versions.ended(number, version)
        self.me.row.count(Word.PUTS)

    async def empty(self, cache: FeatureCache) -> None:
        """Now and then drop all keys, so that the slab shrinks as far as those who hold it let it."""
        due_s = time.monotonic() + _EMPTY_EVERY_S
        while not self.me.stopping:
            if time.monotonic() > due_s:
                self._to_put = 0
                for name in NAMES:
                    await cache.evict(name)
                await asyncio.sleep(_EMPTY_S)
                self._to_put = _TO_FILL
                due_s = time.monotonic() + _EMPTY_EVERY_S
            await asyncio.sleep(0.05)

    async def use(self, cache: FeatureCache) -> None:
        """Read, pin, evict, make, and put what nobody reads."""
        while not self.me.stopping:
            with self.me.tolerating():
                await read_some(cache, self.eyes)
                await self._meddle(cache)
            await asyncio.sleep(self.me.chance.random() * 0.01)

    async def _meddle(self, cache: FeatureCache) -> None:
        names = [NAMES[number] for number in self.eyes.choice.next(4)]
        match self.me.chance.randrange(6):
            case 0:
                for name in names:
                    await cache.evict(name)
            case 1:
                await pinned(cache, names, self.me.chance.random() * 0.02)
            case 2:
                number, version, feature = self.versions_too.next(cache)
                await cache.put(feature, readers=2, ttl=TTL_S, timeout=1.0)
                # Kept under a key, whose reads expire: the feature stays.
                await cache.put(feature, key=NAMES[number], readers=1, ttl=TTL_S, timeout=1.0)
                self.versions_too.ended(number, version)
            case _:
                pass

    # --- the account ---------------------------------------------------------------------------------

    def _count_hits(self, cache: FeatureCache) -> None:
        """Have the hits by the table counted beside those by message, as sessions end."""
        sessions = cache._opened().main.sessions
        fold = sessions._fold_lookups

        def folding(page: Any, *, died: bool) -> int:
            self.by_table += page.own_lookups[0]
            return fold(page, died=died)

        sessions._fold_lookups = folding  # type: ignore[method-assign]

    async def _warm_up(self, cache: FeatureCache) -> None:
        """Use everything once, so that what comes later and stays is a leak."""
        for _ in range(64):
            await self._put(cache)
        for number in range(KEYS):
            if who_puts(number) == MADE:
                await cache.get_or_put(NAMES[number], partial(made_here, self.eyes, number))
                break
        with contextlib.suppress(FeatcacheError):
            await read_some(cache, self.eyes)
        settings = self.me.world.sizes.settings()
        async with featcache.connect(
            self.me.endpoint, device=self.me.device, settings=settings
        ) as client:
            await client.get(NAMES[number])
        for name in NAMES:
            await cache.evict(name)
        await until(lambda: not cache.statistics().used_bytes, DRAIN_S)

    async def _drained(self, cache: FeatureCache, poison: Poison) -> dict[str, Any]:
        """Wait for the ends of all reads: what is used is what the keys keep. Then drop the keys."""
        pool = cache._opened().pool

        def beyond_keys() -> dict[str, int]:
            pool.collect()
            now = cache.statistics()
            reads = sum(page.reads_by_key for page in pool.pages.values())
            return {
                "bytes_beyond_keys": now.used_bytes - now.resident_bytes,
                "slots_beyond_keys": now.slots_used - now.keys,
                "pinned_bytes": now.pinned_bytes,
                "waiters": now.waiters,
                "sessions": now.sessions,
                "reads_by_key_out": reads,
            }

        began_s = time.monotonic()
        with contextlib.suppress(NotSo):
            await until(lambda: not any(beyond_keys().values()), DRAIN_S)
        left, before = beyond_keys(), cache.statistics()
        own = sum(page.own_lookups[0] for page in pool.pages.values())
        for name in NAMES:
            await cache.evict(name)
        with contextlib.suppress(NotSo):
            await until(lambda: pool.collect() or not cache.statistics().slots_used, DRAIN_S)
        after = cache.statistics()
        left |= {"bytes_without_keys": after.used_bytes, "slots_without_keys": after.slots_used}
        initial_bytes = self.me.world.sizes.segment_bytes
        with contextlib.suppress(NotSo):
            await until(lambda: cache.statistics().committed_bytes <= initial_bytes, DRAIN_S / 3)
        names = ("hits", "misses", "puts", "recycled", "evicted", "expired", "waited")
        return {
            "left": left,
            "drain_s": round(time.monotonic() - began_s, 2),
            "keys_at_the_end": before.keys,
            "statistics": {name: getattr(after, name) for name in (*names, "readers_lost")}
            | {"hits_by_the_table": self.by_table + own},
            "poisoned": {"extents": poison.extents, "bytes": poison.poisoned_bytes},
            "segments": {
                "committed": self.counts["slab.committed"],
                "returned": self.counts["slab.returned"],
            },
            "full": self.counts["full"],
        }


async def pinned(cache: FeatureCache | FeatureClient, names: list[str], for_s: float) -> None:
    """Pin those that are there, for a while."""
    held = []
    for name in names:
        with contextlib.suppress(KeyNotFound):
            await cache.pin(name)
            held.append(name)
    await asyncio.sleep(for_s)
    for name in held:
        with contextlib.suppress(KeyNotFound):  # it was evicted, and its pins with it
            await cache.unpin(name)


# --- clients ---------------------------------------------------------------------------------------


async def write_by_key(me: Process) -> None:
    """Put keys of one's own, and meddle with all."""
    versions = Versions(me, WRITERS if me.place.mortal else LASTING_WRITERS)
    eyes = eyes_of(me)

    async def act(me: Process, cache: FeatureClient) -> None:
        me.row[Word.AT] = Step.PUT
        for _ in range(8):
            await _put_one(me, cache, versions, eyes)
        names = [NAMES[number] for number in eyes.choice.next(3)]
        match me.chance.randrange(8):
            case 0:
                await cache.evict(names[0])
            case 1:
                await pinned(cache, names, me.chance.random() * 0.02)
            case 2:
                await read_some(cache, eyes)
            case _:
                pass
        await me.pause(0.02)

    await served(me, act)
    eyes.settle(at_once=True)


async def _put_one(me: Process, cache: FeatureClient, versions: Versions, eyes: Eyes) -> None:
    on_full: Any = me.chance.choice(("wait", "wait", "raise"))
    with eyes.lane(), me.at(Step.PUT, Word.PUTS):
        number, version, feature = versions.next(cache)
        putting = cache.put(feature, key=NAMES[number], timeout=1.0, on_full=on_full)
        if me.place.mortal and me.chance.random() < 0.1:  # cancelled, wherever it is by then
            try:
                await asyncio.wait_for(putting, me.chance.random() * 0.001)
            except TimeoutError:
                me.row.count(Word.CANCELLED)
            return
        await putting
    versions.ended(number, version)
